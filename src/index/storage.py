"""Save an index and open it again, at any number of ranks: each writes, and later maps, its range of rows."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from src import distributed
from src.index import files
from src.index.files import Description
from src.index.flat import FlatIndex
from src.index.passages import open_passages
from src.index.published import convert_published, fingerprint_published, is_published
from src.index.sharded import ShardedIndex, shard_rows
from src.jsonl import JsonlCorpus

log = logging.getLogger("atlas")
T = TypeVar("T")


def save_index(directory: Path, index: ShardedIndex, *, retriever_fingerprint: str | None = None) -> None:
    """Write the index with its passages; an index that is there is replaced in one step. Collective.

    Args:
        retriever_fingerprint: of the encoder that made the embeddings.

    Raises:
        ValueError: an embedding is not finite in fp16.
        OSError: the directory cannot be written to, or the disk is full.
    """
    directory = Path(directory)

    def prepare() -> tuple[str, str]:
        generation = files.next_generation(directory)
        embeddings = f"embeddings.{generation}.npy"
        files.create_embeddings(directory / embeddings, index.size, index.dimension)
        return _keep_passages(directory, f"passages.{generation}.jsonl", index.passages), embeddings

    def write_rows() -> float:
        rows = index.rows
        return files.write_embeddings(directory / embeddings, rows.start, index.embeddings, distributed.progress)

    def finish() -> None:
        description = Description(
            type="flat",
            size=index.size,
            dimension=index.dimension,
            largest_norm=largest_norm,
            passages=passages,
            embeddings=embeddings,
            titles_joined=_titles_joined(index.passages),
            corpus=files.fingerprint_corpus(directory / passages, index.size),
            retriever=retriever_fingerprint,
        )
        files.commit(directory, description)

    passages, embeddings = _on_main("writing the passages", prepare)
    largest_norm = max(distributed.gather_objects(_on_every_rank("writing the embeddings", write_rows)))
    _on_main("replacing the index", finish)


def open_index(
    directory: Path,
    *,
    device: torch.device,
    dimension: int | None = None,
    retriever_fingerprint: str | None = None,
    converted: Path | None = None,
) -> ShardedIndex:
    """Open a saved index, ours or published: every rank its range of rows. Collective.

    On a CPU the embeddings stay in the memory-mapped file (writing into them changes this process's copy only); on a
    GPU they are copied to it.

    Args:
        dimension: D of the retriever that is to search; None: any.
        retriever_fingerprint: of the passage encoder; embeddings of another one are only warned of, because that is
            normal after a tied training and when a run goes on.
        converted: where a published index is converted to, once; an unchanged one is not converted again.

    Raises:
        ValueError: on every rank, with what differs: no index, damaged or changed files, another D.
        OSError: a file cannot be read.
    """

    def check() -> tuple[Path, Description]:
        place = directory if files.has_index(directory) else _convert(directory, converted)
        description = files.read_description(place)
        if description.type != "flat":
            raise ValueError(f"{place} is an index of type {description.type}; this version opens flat ones")
        if dimension not in (None, description.dimension):
            raise ValueError(
                f"{place} holds embeddings of size {description.dimension}, the retriever makes them of size "
                f"{dimension}: use the retriever that the index was made with, or build the index anew"
            )
        files.check_corpus(place / description.passages, description.corpus)
        passages = _passages(place, description)  # finds the offsets of the lines, before the other ranks need them
        if len(passages) != description.size:
            raise ValueError(
                f"{place}: {len(passages)} passages and {description.size} embeddings; build the index anew"
            )
        return place, description

    def open_rows() -> tuple[JsonlCorpus, torch.Tensor]:
        rows = shard_rows(description.size, distributed.rank(), distributed.world_size())
        mapped = files.map_embeddings(place / description.embeddings, description.size, description.dimension)
        embeddings = torch.from_numpy(mapped[rows.start : rows.stop])
        return _passages(place, description), embeddings if device.type == "cpu" else _copy_to(embeddings, device)

    directory = Path(directory)
    place, description = _on_main("checking the index", check)
    passages, embeddings = _on_every_rank("opening the index", open_rows)
    if None not in (retriever_fingerprint, description.retriever) and description.retriever != retriever_fingerprint:
        log.warning(
            "%s was made by retriever %s and is searched with %s", place, description.retriever, retriever_fingerprint
        )
    return ShardedIndex(passages, embeddings, FlatIndex(embeddings, largest_norm=description.largest_norm))


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
    """Bring the corpus into the directory without changing a line, at no cost where possible; the file's name there."""
    path = directory / name
    if len(passages.paths) == 1 and passages.max_rows < 0:
        corpus = passages.paths[0].resolve()
        if corpus.parent == directory.resolve() and files.is_ours(corpus.name):
            return corpus.name
        with contextlib.suppress(OSError):  # on another file system, or on one without links
            os.link(corpus, path)
    if not path.exists():
        with open(path, "xb") as file:
            for row in range(len(passages)):
                file.write(passages.raw(row) + b"\n")
                if row % 10_000 == 0:
                    distributed.progress()
    JsonlCorpus(path)  # leaves the offsets of its lines beside it
    return name


def _titles_joined(passages: JsonlCorpus) -> bool:
    """How `open_passages` reads this corpus: whether its lines hold titles that are joined with sections."""
    return not passages.parse.keywords["join_titles"]


def _passages(directory: Path, description: Description) -> JsonlCorpus:
    return open_passages(directory / description.passages, titles_joined=description.titles_joined)


def _copy_to(embeddings: torch.Tensor, device: torch.device) -> torch.Tensor:
    copy = torch.empty(embeddings.shape, dtype=embeddings.dtype, device=device)
    step = max(1, files.WRITE_BYTES // max(1, embeddings.element_size() * embeddings.shape[1]))
    for start in range(0, len(embeddings), step):
        copy[start : start + step] = embeddings[start : start + step]
        distributed.progress()
    return copy


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
