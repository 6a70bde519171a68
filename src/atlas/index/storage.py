"""Save an index and open it again, at any number of ranks: each writes, and later maps, its range of rows.

And what can be done with a saved index without any model: compress it, export it.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import faiss
import numpy as np
import torch

from atlas.files.jsonl import JsonlCorpus, replacing
from atlas.index import files
from atlas.index.build import compress, copy_to, encode_parts, train_quantizer
from atlas.index.codec import FLAT, Codec, Compression, code_size, make_empty
from atlas.index.compressed import CompressedIndex, explain_nprobe
from atlas.index.files import Compressed, CorpusFingerprint, Description
from atlas.index.flat import FlatIndex
from atlas.index.passages import is_verbatim, open_passages, saved_lines, titles_joined
from atlas.index.published import convert_published, is_converted, is_published
from atlas.index.sharded import LocalIndex, Progress, ShardedIndex, Stored, shard_rows
from atlas.runtime import distributed

log = logging.getLogger("atlas")
ANY = Compression()
T = TypeVar("T")


def save_index(
    directory: Path, index: ShardedIndex, *, retriever_fingerprint: str | None = None, codes_only: bool = False
) -> None:
    """Write the index with its passages; an index that is there is replaced in one step. Collective.

    Embeddings that a saved index on the same file system holds already are linked, not written again.

    Args:
        retriever_fingerprint: of the encoder that made the embeddings.
        codes_only: leave the embeddings of a compressed index out.

    Raises:
        ValueError: an embedding is not finite in fp16; a flat index without its embeddings.
        OSError: the directory cannot be written to, or the disk is full.
    """
    compressed = index.compressed

    def write_codes(path: Path) -> float:
        files.write_codes(path, index.rows.start, compressed.codes(), distributed.progress)
        return compressed.largest_norm

    _save(
        Path(directory),
        index,
        compressed.quantizer if compressed else None,
        write_codes,
        retriever_fingerprint=retriever_fingerprint,
        codes_only=codes_only,
    )


def _save(
    directory: Path,
    index: ShardedIndex,
    quantizer: Codec | None,
    write_codes: Callable[[Path], float],
    *,
    retriever_fingerprint: str | None,
    codes_only: bool,
    source: str | None = None,
) -> None:
    """Save an index with codes of this quantizer, if there is one, which `write_codes` puts into a file.

    Args:
        write_codes: writes this rank's rows and returns what bounds the norms of what they stand for.
        source: fingerprint of the published index that all this was made from.
    """
    if codes_only and quantizer is None:
        raise ValueError(
            "--save_index_codes_only: a flat index has no codes; leave the flag out, or compress the index"
        )
    with_embeddings = index.embeddings is not None and not codes_only

    def prepare() -> Description:
        generation = files.next_generation(directory)
        passages, copied_from = _keep_passages(directory, f"passages.{generation}.jsonl", index.passages)
        description = Description(
            type=quantizer.factory if quantizer else "flat",
            size=index.size,
            dimension=index.dimension,
            largest_norm=None,
            passages=passages,
            embeddings=f"embeddings.{generation}.npy" if with_embeddings else None,
            titles_joined=titles_joined(index.passages),
            corpus=CorpusFingerprint(0, 0, ""),
            retriever=retriever_fingerprint,
            source=source,
            copied_from=copied_from,
        )
        if quantizer:
            trained, codes = f"trained.{generation}.faiss", f"codes.{generation}.npy"
            checksum = files.write_trained(directory / trained, quantizer.serialize())
            files.create_codes(directory / codes, index.size, quantizer.code_size)
            codes_part = Compressed(trained, checksum, codes, quantizer.code_size, largest_norm=0.0)
            description = replace(description, compressed=codes_part)
        if with_embeddings:
            if kept := _keep_embeddings(directory, description.embeddings, index.stored):
                return replace(description, embeddings=kept, largest_norm=index.stored.description.largest_norm)
            files.create_embeddings(directory / description.embeddings, index.size, index.dimension)
        return description

    def write_rows() -> tuple[float | None, float]:
        norm = description.largest_norm
        norm_of_codes = write_codes(directory / description.compressed.codes) if quantizer else 0.0
        if with_embeddings and norm is None:
            norm = files.write_embeddings(
                directory / description.embeddings, index.rows.start, index.embeddings, distributed.progress
            )
        return norm, norm_of_codes

    def finish() -> None:
        norm, norm_of_codes = (None if None in of_ranks else max(of_ranks) for of_ranks in zip(*norms, strict=True))
        compressed = replace(description.compressed, largest_norm=norm_of_codes) if quantizer else None
        corpus = files.fingerprint_corpus(directory / description.passages, index.size)
        files.commit(directory, replace(description, corpus=corpus, largest_norm=norm, compressed=compressed))

    description = _on_main("writing the passages", prepare)
    norms = distributed.gather_objects(_on_every_rank("writing the index", write_rows))
    _on_main("replacing the index", finish)


def open_index(
    directory: Path,
    *,
    device: torch.device,
    dimension: int | None = None,
    retriever_fingerprint: str | None = None,
    converted: Path | None = None,
    compression: Compression = ANY,
    progress: Progress = lambda what, done, of: None,
) -> ShardedIndex:
    """Open a saved index, ours or published: every rank its range of rows. Collective.

    On a CPU embeddings and codes stay in the memory-mapped files (writing into them changes this process's copy only);
    on a GPU what is searched is copied to it. An index of another kind than asked for is made of the embeddings.

    Args:
        dimension: D of the retriever that is to search; None: any.
        retriever_fingerprint: of the passage encoder; embeddings of another one are only warned of, because that is
            normal after a tied training and when a run goes on.
        converted: where a published index is converted to, once; an unchanged one is not converted again.
        compression: the kind of index asked for, and how it is searched.
        progress: as `compress` has it.

    Raises:
        ValueError: on every rank, with what differs: no index, damaged or changed files, another D, another kind where
            there are no embeddings to make it of.
        OSError: a file cannot be read.
    """

    def check() -> tuple[Path, Description, bool]:
        place = directory if files.has_index(directory) else _convert(directory, converted, progress)
        description = files.read_description(place)
        if dimension not in (None, description.dimension):
            raise ValueError(
                f"{place} holds embeddings of size {description.dimension}, the retriever makes them of size "
                f"{dimension}: use the retriever that the index was made with, or build the index anew"
            )
        fits = _fits(place, description, compression)
        files.check_corpus(place / description.passages, description.corpus)
        passages = _passages(place, description)  # finds the offsets of the lines, before the other ranks need them
        if len(passages) != description.size:
            raise ValueError(
                f"{place}: {len(passages)} passages and {description.size} embeddings; build the index anew"
            )
        return place, description, fits

    def open_rows() -> tuple[JsonlCorpus, torch.Tensor | None, LocalIndex]:
        rows = shard_rows(description.size, distributed.rank(), distributed.world_size())
        embeddings, compressed = None, description.compressed
        if description.embeddings:
            mapped = files.map_embeddings(place / description.embeddings, description.size, description.dimension)
            embeddings = torch.from_numpy(mapped[rows.start : rows.stop])
        if compressed and fits and compression.kind not in FLAT:
            return _passages(place, description), embeddings, _open_codes(rows)
        if fits:
            embeddings = copy_to(embeddings, device)
        return _passages(place, description), embeddings, FlatIndex(embeddings, largest_norm=description.largest_norm)

    def _open_codes(rows: range) -> CompressedIndex:
        compressed = description.compressed
        quantizer, mapped = _map_codes(place, description)
        try:
            local = CompressedIndex(
                quantizer,
                mapped[rows.start : rows.stop],
                largest_norm=compressed.largest_norm,
                nprobe=compression.nprobe,
                device=device,
                heartbeat=distributed.progress,
            )
        except ValueError as error:
            raise ValueError(f"{place / compressed.codes}: {error}; build the index anew") from error
        if quantizer.lists:
            files.forget_pages(mapped)  # copied into the lists
        return local

    directory = Path(directory)
    place, description, fits = _on_main("checking the index", check)
    passages, embeddings, local = _on_every_rank("opening the index", open_rows)
    if None not in (retriever_fingerprint, description.retriever) and description.retriever != retriever_fingerprint:
        log.warning(
            "%s was made by retriever %s and is searched with %s", place, description.retriever, retriever_fingerprint
        )
    stored = Stored(place, description)
    if not fits:
        log.info("%s is an index of type %s: making the one asked for of its embeddings", place, description.type)
        flat = ShardedIndex(passages, embeddings, local, stored=stored)
        return compress(flat, compression, device=device, progress=progress)
    if isinstance(local, CompressedIndex):
        log.info("%s is a compressed index: %s, %d bytes a passage", place, description.type, local.quantizer.code_size)
        if explanation := explain_nprobe(local.quantizer.lists, compression.nprobe):
            log.info(explanation)
    return ShardedIndex(passages, embeddings, local, refine_factor=compression.refine_factor, stored=stored)


def compress_index(
    source: Path,
    target: Path,
    compression: Compression,
    *,
    codes_only: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> None:
    """Make a compressed index of a saved one that has embeddings, without any model. Collective.

    Rows are encoded and written part by part: memory is for the quantizer's sample, and does not grow with the index.

    Args:
        target: where it is saved; may be the source, which it replaces in one step.
        progress: as `compress` has it.

    Raises:
        ValueError: as `open_index` and `save_index`; the source has no embeddings; there is no room for the target.
        OSError: a file cannot be read or written.
    """
    source, target = Path(source), Path(target)

    def check() -> str:
        description = files.read_description(source)
        if description.embeddings is None:
            raise ValueError(
                f"{source} is an index of type {description.type} without embeddings, which another kind cannot be "
                "made of: compress an index that has embeddings"
            )
        factory = compression.factory(description.size, description.dimension)
        files.check_space(target, _bytes_of_target(source, description, target, factory, codes_only))
        return factory

    factory = _on_main("checking the index", check)
    flat = open_index(source, device=torch.device("cpu"), compression=Compression(FLAT[0]))
    quantizer = train_quantizer(flat, factory, compression, progress) if factory != FLAT[0] else None

    def write_codes(path: Path) -> float:
        largest_norm = 0.0
        for start, codes, norm in encode_parts(quantizer, flat, progress):
            files.write_codes(path, flat.rows.start + start, codes, distributed.progress)
            largest_norm = max(largest_norm, norm)
        return largest_norm

    description = flat.stored.description
    _save(
        target,
        flat,
        quantizer,
        write_codes,
        retriever_fingerprint=description.retriever,
        codes_only=codes_only,
        source=description.source,
    )


def export_index(directory: Path, target: Path) -> None:
    """Write a saved index as one file that `faiss.read_index` reads; its row i is passage i, from 0. For one process.

    A flat index becomes an `IndexScalarQuantizer` of fp16 numbers, which has the values of our embeddings in half the
    bytes of an `IndexFlatIP`; a compressed one what its Faiss factory string makes. The whole of it is in memory once.

    Raises:
        ValueError: no index of ours, damaged files, no room for the target.
        OSError: a file cannot be read or written.
    """
    directory, target = Path(directory), Path(target)
    description = files.read_description(directory)
    files.check_corpus(directory / description.passages, description.corpus)
    if description.compressed:
        quantizer, codes = _map_codes(directory, description)
    else:
        quantizer = Codec(make_empty("SQfp16", description.dimension), "SQfp16")
        embeddings = files.map_embeddings(directory / description.embeddings, description.size, description.dimension)
        codes = embeddings.view(np.uint8)  # (N, 2D): Faiss's fp16 codes are little-endian numbers too
    exported = codes.nbytes + (8 * len(codes) if quantizer.lists else 0)
    files.check_space(target, exported)
    log.info("Exporting %d passages: %.2f GB, in memory and in the file", len(codes), exported / 1e9)
    index = quantizer.filled(codes)
    with replacing(target) as beside:
        try:
            faiss.write_index(index, str(beside))
        except RuntimeError as error:
            raise OSError(f"{target} cannot be written ({' '.join(str(error).split())})") from error


def _bytes_of_target(source: Path, description: Description, target: Path, factory: str, codes_only: bool) -> int:
    """What a compressed index of this kind takes, made of this saved one."""
    copied = 0
    if files.existing_directory(target).stat().st_dev != source.stat().st_dev:  # where nothing can be linked
        copied = (source / description.passages).stat().st_size
        copied += 0 if codes_only else 2 * description.size * description.dimension
    return description.size * code_size(factory, description.dimension) + copied


def _map_codes(place: Path, description: Description) -> tuple[Codec, np.ndarray]:
    """The quantizer of a compressed index and its codes, memory-mapped. Raises: ValueError when they are damaged."""
    compressed, trained = description.compressed, place / description.compressed.trained
    content = files.read_trained(trained, compressed.trained_checksum)
    try:
        quantizer = Codec.load(content, description.type, description.dimension)
    except ValueError as error:
        raise ValueError(f"{trained}: {error}; build the index anew") from error
    return quantizer, files.map_codes(place / compressed.codes, description.size, compressed.code_size)


def _fits(place: Path, description: Description, compression: Compression) -> bool:
    """Whether the saved index can be opened as what is asked for. Raises: ValueError when it cannot be made either."""
    if compression.kind is None:
        return True
    if compression.nlist is None and (found := re.search(r"IVF(\d+)", description.type)):
        compression = replace(compression, nlist=int(found[1]))  # of whatever number of lists
    wanted = compression.factory(description.size, description.dimension)
    if wanted == description.type or (wanted == "flat" and description.embeddings is not None):
        return True
    if description.embeddings is None:
        raise ValueError(
            f"{place} is an index of type {description.type} without embeddings, and {wanted} is asked for, which "
            "cannot be made of it: leave the --faiss flags out, or open an index that has embeddings"
        )
    return False


def _convert(directory: Path, converted: Path | None, progress: Progress) -> Path:
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
        if found and (found.source is None or found.compressed):
            raise ValueError(f"{converted}, where {directory} is to be converted to, holds another index: move it away")
        log.info("Converting the published index %s; from now on %s can be given in its place", directory, converted)
        log.info("`python preprocessing/convert_index.py %s DIRECTORY` does so beforehand, for all runs", directory)

    def report(done: int, of: int) -> None:
        progress("converting", done, of)
        distributed.progress()

    convert_published(directory, converted, report)
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


def _keep_passages(directory: Path, name: str, passages: JsonlCorpus) -> tuple[str, str | None]:
    """Bring the corpus into the directory as Atlas jsonl, at no cost where it is that or has been copied before.

    Returns:
        the file's name there, and the fingerprint of what it was copied from unless it is the corpus itself.
    """
    path, fingerprint = directory / name, None
    if len(passages.paths) == 1 and passages.max_rows < 0 and is_verbatim(passages):
        corpus = passages.paths[0].resolve()
        if corpus.parent == directory.resolve() and files.is_ours(corpus.name):
            return corpus.name, None
        with contextlib.suppress(OSError):  # on another file system, or on one without links
            os.link(corpus, path)
    if not path.exists():
        fingerprint = _fingerprint_of_copy(passages)
        if copy := _copy_there(directory, fingerprint):
            return copy, fingerprint
        with open(path, "xb") as file:
            for row, line in enumerate(saved_lines(passages, range(len(passages)))):
                file.write(line + b"\n")
                if row % 10_000 == 0:
                    distributed.progress()
    JsonlCorpus(path)  # leaves the offsets of its lines beside it
    return name, fingerprint


def _fingerprint_of_copy(passages: JsonlCorpus) -> str:
    """Changes with the files of a corpus, their order, and how many of their passages are taken."""
    stats = [(str(path.resolve()), path.stat()) for path in passages.paths]
    facts = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    return hashlib.sha256(repr([facts, len(passages)]).encode()).hexdigest()[:16]


def _copy_there(directory: Path, fingerprint: str) -> str | None:
    """The name of the passages of the directory's index, if they are a copy of the same corpus and still whole."""
    try:
        description = files.read_description(directory) if files.has_index(directory) else None
        if description is None or description.copied_from != fingerprint:
            return None
        files.check_corpus(directory / description.passages, description.corpus)
    except ValueError as damaged:
        log.warning("The passages are written anew: %s", damaged)
        return None
    return description.passages


def _keep_embeddings(directory: Path, name: str, stored: Stored | None) -> str | None:
    """Have the embeddings of a saved index in the directory at no cost, where possible; the file's name there."""
    if stored is None or stored.description.embeddings is None:
        return None
    source = (stored.directory / stored.description.embeddings).resolve()
    if source.parent == directory.resolve():
        return source.name
    with contextlib.suppress(OSError):  # on another file system, or on one without links
        os.link(source, directory / name)
        return name
    return None


def _passages(directory: Path, description: Description) -> JsonlCorpus:
    return open_passages(directory / description.passages, titles_joined=description.titles_joined)


def _on_every_rank(what: str, work: Callable[[], T]) -> T:
    """Do long work on every rank; a mistake of one ends all."""
    result = error = None
    try:
        result = work()
    except (ValueError, OSError) as found:
        error = found
    distributed.wait_for_all(what)
    distributed.raise_on_all_ranks(error)
    return result


def _on_main(what: str, work: Callable[[], T]) -> T:
    """Do long work on rank 0; every rank gets the result, or the error."""
    return distributed.from_main(_on_every_rank(what, lambda: work() if distributed.is_main() else None))
