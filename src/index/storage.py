"""Save an index and open it again, at any number of ranks: each writes, and later maps, its range of rows."""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from src import distributed
from src.index import files
from src.index.files import Compressed, CorpusFingerprint, Description
from src.index.flat import FlatIndex
from src.index.passages import is_verbatim, open_passages, saved_lines, titles_joined
from src.index.published import convert_published, fingerprint_published, is_published
from src.index.quantized import FLAT, Compression, QuantizedIndex, Quantizer, explain_nprobe
from src.index.sharded import LocalIndex, Progress, ShardedIndex, Stored, compress, copy_to, shard_rows
from src.jsonl import JsonlCorpus

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
    directory, compressed = Path(directory), index.compressed
    if codes_only and compressed is None:
        raise ValueError(
            "--save_index_codes_only: a flat index has no codes; leave the flag out, or compress the index"
        )
    with_embeddings = index.embeddings is not None and not codes_only

    def prepare() -> Description:
        generation = files.next_generation(directory)
        description = Description(
            type=index.type,
            size=index.size,
            dimension=index.dimension,
            largest_norm=None,
            passages=_keep_passages(directory, f"passages.{generation}.jsonl", index.passages),
            embeddings=f"embeddings.{generation}.npy" if with_embeddings else None,
            titles_joined=titles_joined(index.passages),
            corpus=CorpusFingerprint(0, 0, ""),
            retriever=retriever_fingerprint,
        )
        if compressed:
            trained, codes = f"trained.{generation}.faiss", f"codes.{generation}.npy"
            checksum = files.write_trained(directory / trained, compressed.quantizer.serialize())
            files.create_codes(directory / codes, index.size, compressed.quantizer.code_size)
            codes_part = Compressed(trained, checksum, codes, compressed.quantizer.code_size, compressed.largest_norm)
            description = replace(description, compressed=codes_part)
        if with_embeddings:
            if kept := _keep_embeddings(directory, description.embeddings, index.stored):
                return replace(description, embeddings=kept, largest_norm=index.stored.description.largest_norm)
            files.create_embeddings(directory / description.embeddings, index.size, index.dimension)
        return description

    def write_rows() -> float | None:
        start, norm = index.rows.start, description.largest_norm
        if compressed:
            files.write_codes(directory / description.compressed.codes, start, compressed.codes(), distributed.progress)
        if with_embeddings and norm is None:
            norm = files.write_embeddings(
                directory / description.embeddings, start, index.embeddings, distributed.progress
            )
        return norm

    def finish() -> None:
        corpus = files.fingerprint_corpus(directory / description.passages, index.size)
        files.commit(directory, replace(description, corpus=corpus, largest_norm=largest_norm))

    description = _on_main("writing the passages", prepare)
    norms = distributed.gather_objects(_on_every_rank("writing the index", write_rows))
    largest_norm = max(norms) if with_embeddings else None
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
        place = directory if files.has_index(directory) else _convert(directory, converted)
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

    def _open_codes(rows: range) -> QuantizedIndex:
        compressed, trained = description.compressed, place / description.compressed.trained
        content = files.read_trained(trained, compressed.trained_checksum)
        try:
            quantizer = Quantizer.load(content, description.type, description.dimension)
        except ValueError as error:
            raise ValueError(f"{trained}: {error}; build the index anew") from error
        mapped = files.map_codes(place / compressed.codes, description.size, compressed.code_size)
        try:
            local = QuantizedIndex(
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
    if isinstance(local, QuantizedIndex):
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

    Args:
        target: where it is saved; may be the source, which it replaces in one step.
        progress: as `compress` has it.

    Raises:
        ValueError, OSError: as `open_index` and `save_index`.
    """
    index = open_index(source, device=torch.device("cpu"), compression=compression, progress=progress)
    retriever = index.stored.description.retriever
    save_index(target, index, retriever_fingerprint=retriever, codes_only=codes_only)


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


def _convert(directory: Path, converted: Path | None) -> Path:
    """Convert a published index, unless that has been done."""
    if not is_published(directory):
        raise ValueError(
            f"{directory} holds no index, neither ours (index.json) nor a published one (embeddings.0.pt, …)"
        )
    if converted is None:
        raise ValueError(f"{directory} is a published index: convert it, and open what comes out")
    converted = Path(converted)
    if files.has_index(converted):
        source = files.read_description(converted).source
        if source == fingerprint_published(directory):
            log.info("Opening %s, which %s was converted to", converted, directory)
            return converted
        if source is None:
            raise ValueError(f"{converted}, where {directory} is to be converted to, holds another index: move it away")
    log.info("Converting the published index %s; from now on %s can be given in its place", directory, converted)
    convert_published(directory, converted, lambda done, of: distributed.progress())
    return converted


def _keep_passages(directory: Path, name: str, passages: JsonlCorpus) -> str:
    """Bring the corpus into the directory as Atlas jsonl, at no cost where it is that; the file's name there."""
    path = directory / name
    if len(passages.paths) == 1 and passages.max_rows < 0 and is_verbatim(passages):
        corpus = passages.paths[0].resolve()
        if corpus.parent == directory.resolve() and files.is_ours(corpus.name):
            return corpus.name
        with contextlib.suppress(OSError):  # on another file system, or on one without links
            os.link(corpus, path)
    if not path.exists():
        with open(path, "xb") as file:
            for row, line in enumerate(saved_lines(passages, range(len(passages)))):
                file.write(line + b"\n")
                if row % 10_000 == 0:
                    distributed.progress()
    JsonlCorpus(path)  # leaves the offsets of its lines beside it
    return name


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
    distributed.raise_anywhere(error)
    return result


def _on_main(what: str, work: Callable[[], T]) -> T:
    """Do long work on rank 0; every rank gets the result, or the error."""
    return distributed.from_main(_on_every_rank(what, lambda: work() if distributed.is_main() else None))
