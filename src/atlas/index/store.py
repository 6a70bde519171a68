"""Save an index and open it again, at any number of ranks: each writes, and later maps, its range of rows."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas.files.checksums import Blocks, Recorded, chunks, read_file, write_file
from atlas.files.copies import clone
from atlas.files.jsonl import JsonlCorpus, replacing
from atlas.files.left_over import LeftOver
from atlas.index import directory as files
from atlas.index.arrays import WRITE_BYTES, Array, Layout, as_tensor, check_all, fp16_parts, map_rows, write_array
from atlas.index.build import compress, copy_to
from atlas.index.codec import FLAT, Codec, Compression
from atlas.index.compressed import CompressedIndex, explain_probes
from atlas.index.directory import Description, Passages, Segment
from atlas.index.flat import FlatIndex
from atlas.index.live import LiveRows, joined
from atlas.index.passages import fingerprint_of, is_verbatim, open_passages, saved_lines, titles_joined
from atlas.index.published import convert_published, is_converted, is_published
from atlas.index.sharded import LocalIndex, ShardedIndex, Stored
from atlas.runtime import distributed
from atlas.runtime.session import Stopped
from atlas.runtime.tracking import log, progress_bar
from atlas.runtime.verification import Verification

ANY, NONE = Compression(), Verification("off")
_RESTORED_AT_ONCE = 65536  # rows


def save_index(
    directory: Path,
    index: ShardedIndex,
    *,
    retriever_fingerprint: str | None = None,
    embedder_precision: str | None = None,
    identity: str | None = None,
    restored: Stored | None = None,
    codes_only: bool = False,
) -> None:
    """Write the index with its passages; an index that is there is replaced in one step. Collective.

    The passages are copied, so that the index stays whole when their files change. Passages and embeddings that a saved
    index on the same file system holds already are linked, not written again. An updated index becomes one segment.

    Args:
        retriever_fingerprint: of the encoder that made the embeddings.
        embedder_precision: that they were computed in.
        identity: of all that they depend on, for `restore_embeddings`.
        restored: what that returned, if the embeddings are from there.
        codes_only: leave the embeddings of a compressed index out.

    Raises:
        ValueError: an embedding is not finite in fp16; a flat index without its embeddings; no room for the passages.
        OSError: the directory cannot be written to, or the disk is full.
    """
    compressed = index.compressed
    content = Content(
        index.passages,
        index.rows,
        None if codes_only else index.embeddings,
        compressed.codec if compressed else None,
        [(compressed.codes(), compressed.largest_norm)] if compressed else (),
        restored or index.stored,
    )
    write_index(Path(directory), content, Origin(retriever_fingerprint, embedder_precision, identity=identity))
    if fields := distributed.on_main("looking for the passages", partial(_moved, index.passages, Path(directory))):
        reopen = partial(passages_of, Path(directory), files.description_of(fields))
        index.passages = distributed.on_every_rank("opening the passages", reopen)


def _moved(passages: JsonlCorpus, directory: Path) -> dict[str, Any] | None:
    """What the saved index says, if the passages are nowhere else: those of an updated one have become one text."""
    return None if all(text.is_file() for text in passages.paths) else asdict(files.read_description(directory))


@dataclass(frozen=True)
class Content:
    """What this rank writes: its rows, and on rank 0 all passages."""

    passages: JsonlCorpus
    rows: range
    embeddings: torch.Tensor | LiveRows | None  # (n, D)
    codec: Codec | None = None
    codes: Iterable[tuple[np.ndarray, float]] = ()  # (n, code_size) in parts, each with what bounds its norms
    stored: Stored | None = None  # holds the same embeddings


@dataclass(frozen=True)
class Origin:
    """Where embeddings come from, as far as it is known; fields as in `Description`."""

    retriever: str | None = None
    embedder_precision: str | None = None
    source: str | None = None
    identity: str | None = None


def write_index(directory: Path, content: Content, origin: Origin) -> None:
    """Write an index in one step; if that fails, nothing is left of it. Collective. Raises: as `save_index`."""
    if content.embeddings is None and content.codec is None:
        raise ValueError(
            "--save_index_codes_only: a flat index has no codes; leave the flag out, or compress the index"
        )
    with distributed.held_on_main("locking the index", partial(files.locked, directory)):
        try:
            _write(directory, content, origin)
        except (ValueError, OSError):
            distributed.on_main("removing what was written", partial(remove_what_failed, directory))
            raise


def remove_what_failed(directory: Path) -> None:
    try:
        files.tidy(directory)
    except ValueError as damaged:  # an index that was there before, which says nothing about its files
        log.warning("What was written is not removed: %s", damaged)


def _write(directory: Path, content: Content, origin: Origin) -> None:
    prepare = partial(_prepare, directory, content, origin)
    generation, fields = distributed.on_main("writing the passages", prepare)
    description = files.description_of(fields)
    (segment,) = description.segments
    segment = write_arrays(directory, generation, description, segment, content)
    finished = replace(description, segments=(segment,))
    distributed.on_main("replacing the index", partial(files.commit, directory, finished))


def write_arrays(
    directory: Path, generation: int, description: Description, segment: Segment, content: Content
) -> Segment:
    """The segment with the arrays that it lacks, of which each rank writes its rows. Collective."""
    first_row = content.rows.start
    if content.embeddings is not None and segment.embeddings is None:
        path = directory / f"embeddings.{generation}.npy"
        with progress_bar("writing embeddings", len(content.rows), "passages") as bar:
            parts = fp16_parts(content.embeddings, first_row, bar.update)
            layout, same = description.embeddings_layout(segment), directory / files.EMBEDDING
            segment = replace(segment, embeddings=write_array(path, layout, first_row, parts, same))
    if content.codec:
        path = directory / f"codes.{generation}.npy"
        layout = description.codes_layout(segment)
        segment = replace(segment, codes=write_array(path, layout, first_row, content.codes))
    return segment


def _prepare(directory: Path, content: Content, origin: Origin) -> tuple[int, dict[str, Any]]:
    """On rank 0: the passages, the quantizer, and embeddings that can be linked. The arrays are still to be written.

    Returns: the generation, and the fields of the description, which can be sent to the other ranks.
    """
    files.tidy(directory)  # what killed writers left may take the room that is needed
    generation, codec = files.next_generation(directory), content.codec
    passages = _keep_passages(directory, f"passages.{generation}.jsonl", content.passages)
    embeddings = quantizer = None
    if content.embeddings is not None and content.stored:
        embeddings = _keep_embeddings(directory, f"embeddings.{generation}.npy", content.stored)
    if codec:
        path = directory / f"trained.{generation}.faiss"
        quantizer = files.write_trained(path, codec.serialize(), codec.code_size)
    description = Description(
        type=codec.factory if codec else "flat",
        dimension=codec.dimension if codec else content.embeddings.shape[1],
        titles_joined=titles_joined(content.passages),
        quantizer=quantizer,
        segments=(Segment(len(content.passages), passages, embeddings, codes=None),),
        **vars(origin),
    )
    return generation, asdict(description)


def open_index(
    directory: Path,
    *,
    device: torch.device,
    dimension: int | None = None,
    retriever_fingerprint: str | None = None,
    allow_other: bool = False,
    embedder_precision: str | None = None,
    converted: Path | None = None,
    compression: Compression = ANY,
    verification: Verification = NONE,
) -> ShardedIndex:
    """Open a saved index, ours or published: every rank its range of rows. Collective.

    On a CPU embeddings and codes stay in the memory-mapped files, read-only; on a GPU what is searched is copied to it.
    An index of another kind than asked for is made of the embeddings.

    Args:
        dimension: D of the retriever that is to search; None: any.
        retriever_fingerprint: of the passage encoder; embeddings of another one are refused.
        allow_other: only warn of those of another encoder, as is wanted, or normal in a resumed run.
        embedder_precision: of the queries; passages that were embedded in another one are mentioned in the log.
        converted: where a published index is converted to, once; an unchanged one is not converted again.
        compression: the kind of index asked for, and how it is searched.
        verification: compares all or some of the text and the arrays with their checksums.

    Raises:
        ValueError: on every rank, with what differs: no index, damaged or changed files, another D, another kind where
            there are no embeddings to make it of; the embeddings of another passage encoder.
        OSError: a file cannot be read.
    """
    retriever = None if allow_other else retriever_fingerprint
    check = partial(_find, Path(directory), converted, dimension, retriever, compression)
    place, fields, fits = distributed.on_main("checking the index", check)
    description = files.description_of(fields)
    verification.check(str(place), partial(description.recorded, place))
    kind, where = (compression, device) if fits else (Compression(FLAT[0]), torch.device("cpu"))
    open_rows = partial(_open_rows, place, description, kind, where)
    passages, embeddings, local = distributed.on_every_rank("opening the index", open_rows)
    _tell_differences(place, description, retriever_fingerprint, embedder_precision)
    stored = Stored(place, description)
    if not fits:
        log.info("%s is an index of type %s: making the one asked for of its embeddings", place, description.type)
        flat = ShardedIndex(passages, embeddings, local, stored=stored)
        return compress(flat, compression, device=device)
    if isinstance(local, CompressedIndex):
        log.info("%s is a compressed index: %s, %d bytes a passage", place, description.type, local.codec.code_size)
        if explanation := explain_probes(local.codec.lists, compression.probes(local.codec.lists)):
            log.info(explanation)
    return ShardedIndex(passages, embeddings, local, refine_factor=compression.refine_factor, stored=stored)


def _tell_differences(place: Path, description: Description, retriever: str | None, precision: str | None) -> None:
    """Log where passages were embedded in another way than queries are, as far as both are known."""
    if retriever and description.retriever is None:
        log.warning("%s does not say which retriever it was made by: use the one that belongs to it", place)
    elif retriever and description.retriever != retriever:
        log.warning("%s was made by retriever %s and is searched with %s", place, description.retriever, retriever)
    embedded_in = description.embedder_precision
    if None not in (precision, embedded_in) and embedded_in != precision:
        log.info("%s was embedded in %s and is searched with queries in %s", place, embedded_in, precision)


def _find(
    directory: Path, converted: Path | None, dimension: int | None, retriever: str | None, compression: Compression
) -> tuple[Path, dict[str, Any], bool]:
    """Where the index is (a published one is converted first), what it is, and whether it is of the kind asked for."""
    place = directory if files.has_index(directory) else _convert(directory, converted)
    description = files.read_description(place)
    if dimension not in (None, description.dimension):
        raise ValueError(
            f"{place} holds embeddings of size {description.dimension}, the retriever makes them of size "
            f"{dimension}: use the retriever that the index was made with, or build the index anew"
        )
    if None not in (retriever, description.retriever) and description.retriever != retriever:
        raise ValueError(
            f"{place} was made by the passage encoder {description.retriever} and would be searched with {retriever}, "
            "whose embeddings are others: build the index anew (--passages), use the model that it was made with, or "
            "insist with --allow_other_index"
        )
    fits = _fits(place, description, compression)
    checked_passages(place, description)  # finds the offsets of the lines, before the other ranks need them
    return place, asdict(description), fits


def _open_rows(
    place: Path, description: Description, compression: Compression, device: torch.device
) -> tuple[JsonlCorpus, torch.Tensor | None, LocalIndex]:
    """This rank's part of an index of the kind asked for."""
    rows = distributed.shard_rows(description.size, distributed.rank(), distributed.world_size())
    passages = passages_of(place, description)
    embeddings = map_embeddings(place, description, rows) if description.has_embeddings else None
    if description.quantizer and compression.kind not in FLAT:
        codec = open_codec(place, description)
        codes = map_codes(place, description, rows)[:].numpy()  # a copy, if it is not one part of one file
        nprobe = compression.probes(codec.lists)
        try:
            local = CompressedIndex(codec, codes, largest_norm=description.codes_norm, nprobe=nprobe, device=device)
        except ValueError as error:
            raise ValueError(f"{place / description.segments[0].codes.file}: {error}; build the index anew") from error
        return passages, embeddings, local
    embeddings = copy_to(embeddings, device)
    return passages, embeddings, FlatIndex(embeddings, largest_norm=description.embeddings_norm)


def restore_embeddings(
    directory: Path,
    identity: str,
    rows: range,
    store: Callable[[int, torch.Tensor], None],
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Stored | None:
    """Where a saved index has the embeddings that would be made, give this rank's to `store`. Collective.

    They are compared with their checksums first; where one does not fit, all are made anew.

    Args:
        identity: of all that embeddings depend on.
        rows: of this rank; `store(place in rows, (m, D) fp16)` gets them in parts.
        asked_to_stop: whether this rank is to stop; asked before every part.

    Raises:
        Stopped: on every rank, if one was asked to stop.
    """
    fields = distributed.on_main("looking for embeddings", partial(_holding, directory, identity))
    if fields is None:
        return None
    description = files.description_of(fields)

    def read() -> None:
        embeddings = map_embeddings(directory, description, rows)
        for start in range(0, len(rows), _RESTORED_AT_ONCE):
            if asked_to_stop():
                return
            store(start, embeddings[start : start + _RESTORED_AT_ONCE])
            distributed.progress()

    def recorded() -> list[Recorded]:
        arrays = {directory / segment.embeddings.file for segment in description.segments}
        return [one for one in description.recorded(directory) if one.path in arrays]

    try:
        Verification("full", "Before they are used").check(f"the embeddings in {directory}", recorded)
    except (ValueError, OSError) as damaged:
        log.warning("All passages are embedded anew: %s", damaged)
        return None
    log.info("%s holds the embeddings of these passages: they are not made again", directory)
    distributed.on_every_rank("reading the embeddings", read)
    if distributed.any_rank(asked_to_stop()):
        raise Stopped
    return Stored(directory, description)


def _holding(directory: Path, identity: str) -> dict[str, Any] | None:
    """The fields of the saved index's description, if it has the embeddings of this identity."""
    if not files.has_index(directory):
        return None
    try:
        found = files.read_description(directory)
    except ValueError:  # whoever writes there says so
        return None
    return asdict(found) if found.identity == identity and found.has_embeddings else None


def passages_of(place: Path, description: Description) -> JsonlCorpus:
    """The passages that are not deleted."""
    return _without_deleted(all_passages_of(place, description), place, description)


def _without_deleted(passages: JsonlCorpus, place: Path, description: Description) -> JsonlCorpus:
    if len(deleted := deleted_rows(place, description)):
        passages.drop(deleted)
    return passages


def all_passages_of(place: Path, description: Description) -> JsonlCorpus:
    """The text of all segments, deleted passages included."""
    texts = [place / segment.passages.file for segment in description.segments]
    return open_passages(texts, titles_joined=description.titles_joined)


def deleted_rows(place: Path, description: Description) -> np.ndarray:
    """The deleted rows of all segments, counted through them: `(rows,)` int64, ascending."""
    first = np.cumsum([0, *(segment.size for segment in description.segments)])
    of_segments = [files.read_tombstones(place, segment) for segment in description.segments]
    return np.concatenate([rows + start for rows, start in zip(of_segments, first, strict=False)])


def checked_passages(place: Path, description: Description) -> JsonlCorpus:
    """The passages of a saved index. Raises: ValueError when they are not those that it was made of."""
    for segment in description.segments:
        files.check_text(place, segment.passages)
    passages = all_passages_of(place, description)
    found = [len(rows) for rows in passages.rows_of_files()]
    if found != [segment.size for segment in description.segments]:
        size = sum(segment.size for segment in description.segments)
        raise ValueError(f"{place}: {sum(found)} passages and {size} embeddings; build the index anew")
    return _without_deleted(passages, place, description)


def saved_content(place: Path, description: Description) -> Content:
    """What this rank writes of a saved index to save it once more: nothing of it is read into memory."""
    rows, codec, codes = (
        distributed.shard_rows(description.size, distributed.rank(), distributed.world_size()),
        None,
        (),
    )
    embeddings = map_embeddings(place, description, rows) if description.has_embeddings else None
    if description.quantizer:
        codec, live, norm = open_codec(place, description), map_codes(place, description, rows), description.codes_norm
        step = max(1, WRITE_BYTES // codec.code_size)
        codes = ((live[start : start + step].numpy(), norm) for start in range(0, len(live), step))
    return Content(passages_of(place, description), rows, embeddings, codec, codes)


def map_embeddings(place: Path, description: Description, rows: range) -> torch.Tensor | LiveRows:
    """`(n, D)` fp16, read-only: these of the rows that are not deleted.

    Raises:
        ValueError: a file is missing, of another size or of another shape.
    """
    arrays = [(part.embeddings, description.embeddings_layout(part)) for part in description.segments]
    return _map_live(place, description, arrays, rows)


def map_codes(place: Path, description: Description, rows: range) -> torch.Tensor | LiveRows:
    """`(n, code_size)` uint8, read-only, as `map_embeddings`. Raises: as `map_embeddings`."""
    arrays = [(part.codes, description.codes_layout(part)) for part in description.segments]
    return _map_live(place, description, arrays, rows)


def _map_live(
    place: Path, description: Description, arrays: Iterable[tuple[Array, Layout]], rows: range
) -> torch.Tensor | LiveRows:
    first, mapped, deleted = 0, [], []
    for segment, (array, layout) in zip(description.segments, arrays, strict=True):
        gone = files.read_tombstones(place, segment)
        low, high = (min(max(end - first, 0), segment.live) for end in (rows.start, rows.stop))
        inside = LeftOver(gone).range_among_all(range(low, high))
        mapped.append(as_tensor(map_rows(place / array.file, layout, inside)))
        deleted.append(gone[(gone >= inside.start) & (gone < inside.stop)] - inside.start)
        first += segment.live
    return joined(mapped, deleted)


def open_codec(place: Path, description: Description) -> Codec:
    """What made the codes of a compressed index. Raises: ValueError when it is missing or damaged."""
    content = files.read_trained(place, description.quantizer)
    try:
        return Codec.load(content, description.type, description.dimension)
    except ValueError as error:
        raise ValueError(f"{place / description.quantizer.file}: {error}; build the index anew") from error


def _fits(place: Path, description: Description, compression: Compression) -> bool:
    """Whether the saved index can be opened as what is asked for. Raises: ValueError when it cannot be made either."""
    if compression.kind is None:
        return True
    if compression.nlist is None and (found := re.search(r"IVF(\d+)", description.type)):
        compression = replace(compression, nlist=int(found[1]))  # of whatever number of lists
    wanted = compression.factory(description.size, description.dimension)
    if wanted == description.type or (wanted == "flat" and description.has_embeddings):
        return True
    if not description.has_embeddings:
        raise ValueError(
            f"{place} is an index of type {description.type} without embeddings, and {wanted} is asked for, which "
            "cannot be made of it: leave the --faiss flags out, or open an index that has embeddings"
        )
    return False


def _convert(directory: Path, converted: Path | None) -> Path:
    """Convert a published index, unless that has been done."""
    check_is_index(directory)
    if converted is None:
        raise ValueError(
            f"{directory} is a published index: convert it (preprocessing/convert_index.py), and open that"
        )
    converted = Path(converted)
    if is_converted(directory, converted):
        log.info("Opening %s, which %s was converted to", converted, directory)
    else:
        found = files.read_description(converted) if files.has_index(converted) else None
        if found and (found.source is None or found.quantizer):
            raise ValueError(f"{converted}, where {directory} is to be converted to, holds another index: move it away")
        log.info("Converting the published index %s; from now on %s can be given in its place", directory, converted)
        log.info("`python preprocessing/convert_index.py %s DIRECTORY` does so beforehand, for all runs", directory)
    convert_published(directory, converted)
    return converted


def check_is_index(directory: Path) -> None:
    """Raises: ValueError unless the directory holds an index, ours or a published one."""
    if files.has_index(directory) or is_published(directory):
        return
    if (directory / files.CONVERTING).is_file():
        raise ValueError(f"{directory} holds an index whose conversion was stopped: give the same command again")
    if not directory.is_dir():
        raise ValueError(f"{directory} holds no index: there is no such directory")
    raise ValueError(f"{directory} holds no index, neither ours (index.json) nor a published one (embeddings.0.pt, …)")


def _keep_passages(directory: Path, name: str, corpus: JsonlCorpus) -> Passages:
    """Give the index the corpus as Atlas jsonl, in a file of its own that no later change of the user's reaches.

    At no cost where it has been copied before, into this index or another one.
    """
    path, whole = directory / name, len(corpus.paths) == 1 and corpus.max_rows < 0 and is_verbatim(corpus)
    if whole and (text := _text_of_an_index(directory, name, corpus.paths[0].resolve())):
        return text
    fingerprint = fingerprint_of(corpus)
    if copy := _copy_there(directory, fingerprint):
        return copy
    content = _copy_file(corpus.paths[0], path) if whole else write_lines(corpus, path)
    JsonlCorpus(path)  # leaves the offsets of its lines beside it
    return files.describe_passages(path, content, fingerprint)


def _text_of_an_index(directory: Path, name: str, original: Path) -> Passages | None:
    """The text that this or another index of ours has copied already; linked if it is another one's."""
    text = files.own_passages(original)
    if text is None or original.parent == directory.resolve():
        return text
    with contextlib.suppress(OSError):  # on another file system, or on one without links
        os.link(original, directory / name)
        JsonlCorpus(directory / name)  # leaves the offsets of its lines beside it
        return replace(text, file=name)
    return None


def _copy_file(original: Path, path: Path) -> Blocks:
    with replacing(path) as beside:
        if clone(original, beside):
            return read_file(beside)
        size = original.stat().st_size
        with files.in_space(path, size):
            log.info("Copying %s to %s: %.2f GB", original, path, size / 1e9)
            return write_file(beside, chunks(original))


def write_lines(corpus: JsonlCorpus, path: Path, *, join_titles: bool = False) -> Blocks:
    """Write the passages as Atlas jsonl, with or without titles that hold the section. Raises: as `in_space`."""
    # of a corpus that is cut, nobody knows how much text is taken
    needed = sum(part.stat().st_size for part in corpus.paths) if corpus.max_rows < 0 else 0
    with files.in_space(path, needed), replacing(path) as beside:
        log.info("Copying the passages to %s", path)
        starts = range(0, len(corpus), 1000)
        parts = (range(start, min(start + 1000, len(corpus))) for start in starts)
        return write_file(
            beside, (b"".join(line + b"\n" for line in saved_lines(corpus, rows, join_titles)) for rows in parts)
        )


def _copy_there(directory: Path, fingerprint: str) -> Passages | None:
    """The passages of the directory's index, if they are a copy of the same corpus and still whole."""
    try:
        description = files.read_description(directory) if files.has_index(directory) else None
        texts = [segment.passages for segment in description.segments] if description else []
        # without checksums: as earlier versions wrote it
        text = next((text for text in texts if text.copied_from == fingerprint and text.blocks is not None), None)
        if text is not None:
            files.check_text(directory, text)
            check_all(files.recorded_text(directory, text))
        return text
    except ValueError as damaged:
        log.warning("The passages are written anew: %s", damaged)
        return None


def _keep_embeddings(directory: Path, name: str, stored: Stored) -> Array | None:
    """Have the embeddings of a saved index in the directory at no cost, where possible."""
    whole = stored.description.whole
    array = whole.embeddings if whole else None
    if array is None or array.blocks is None:  # as version 1 wrote them
        return None
    source = (stored.directory / array.file).resolve()
    if source.parent == directory.resolve():
        return array if source.is_file() else None
    with contextlib.suppress(OSError):  # on another file system, or on one without links
        os.link(source, directory / name)
        return replace(array, file=name)
    return None
