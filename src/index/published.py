"""Published indices: `embeddings.{i}.pt` and `passages.{i}.pt`, converted once into our format.

They are pickles and may come from anywhere: embeddings are read by `torch.load(weights_only=True)`, passages by an
unpickler that finds no class and no function, so nothing in a file can run.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from src.index import files
from src.index.passages import parse_passage
from src.jsonl import JsonlCorpus

_SHARD = re.compile(r"(embeddings|passages)\.(\d+)\.pt")


def is_published(directory: Path) -> bool:
    """Whether the directory looks like a published index."""
    return any(_SHARD.fullmatch(path.name) for path in directory.glob("*.pt"))


def fingerprint_published(directory: Path) -> str:
    """Changes when a file of the index does: names, sizes and times."""
    stats = [(path.name, path.stat()) for pair in _shards(directory) for path in pair]
    return hashlib.sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode()).hexdigest()[:16]


def convert_published(
    directory: Path, output: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Write a published index in our format, in one process and the memory of one shard.

    The index in `output`, if there is one, is replaced in one step at the end.

    Args:
        progress: called with the number of passages done and of all, several times per shard.

    Raises:
        ValueError: a shard is missing, or a file is damaged, of another kind, or holds anything but plain data.
        OSError: a file cannot be read or written.
    """
    shards = _shards(directory)
    shapes = [_load_embeddings(embeddings).shape for embeddings, _ in shards]  # memory-mapped: only headers are read
    dimension, size = shapes[0][0], sum(n for _, n in shapes)
    for (embeddings, _), (d, _) in zip(shards, shapes, strict=True):
        if d != dimension:
            raise ValueError(f"{embeddings} holds embeddings of size {d}, {shards[0][0].name} of size {dimension}")
    generation = files.next_generation(output)
    array, text = output / f"embeddings.{generation}.npy", output / f"passages.{generation}.jsonl"
    files.create_embeddings(array, size, dimension)
    done, largest_norm = 0, 0.0
    with open(text, "xb") as lines:
        for embeddings, passages in shards:
            heartbeat = partial(progress, done, size)
            columns = _load_embeddings(embeddings)  # (D, n)
            _write_passages(lines, passages, columns.shape[1], heartbeat)
            try:
                largest_norm = max(largest_norm, files.write_embeddings(array, done, columns.T, heartbeat))
            except ValueError as error:
                raise ValueError(f"{embeddings}: {error}") from error
            done += columns.shape[1]
    progress(done, size)
    files.commit(
        output,
        files.Description(
            type="flat",
            size=size,
            dimension=dimension,
            largest_norm=largest_norm,
            passages=text.name,
            embeddings=array.name,
            titles_joined=True,
            corpus=files.fingerprint_corpus(text, len(JsonlCorpus(text))),
            retriever=None,
            source=fingerprint_published(directory),
        ),
    )


def load_plain_pickle(path: Path) -> Any:
    """What a pickle holds, as long as that is dicts, lists, tuples, strings, bytes, numbers, booleans and None.

    Raises:
        ValueError: it is damaged, or asks for a class or a function; which one is named, and it is not even imported.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # damaged pickles fail in every way there is
        raise ValueError(f"{path} cannot be read as plain passages: {error or type(error).__name__}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it holds {module}.{name}, and nothing but text, numbers, lists and dicts is loaded"
        )


def _shards(directory: Path) -> list[tuple[Path, Path]]:
    """The pairs of files, by number. Raises: ValueError if one is missing."""
    numbers = {int(match[2]) for path in directory.glob("*.pt") if (match := _SHARD.fullmatch(path.name))}
    pairs = [(directory / f"embeddings.{i}.pt", directory / f"passages.{i}.pt") for i in range(max(numbers) + 1)]
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: a published index has both files of every number from 0 to {max(numbers)}"
            )
    return pairs


def _load_embeddings(path: Path) -> torch.Tensor:  # (D, n)
    try:
        embeddings = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # as above
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a tensor, and nothing else is loaded: {reason}") from error
    if not isinstance(embeddings, torch.Tensor):
        raise ValueError(f"{path} holds a {type(embeddings).__name__}, not a tensor of embeddings")
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or embeddings.layout != torch.strided:
        raise ValueError(
            f"{path} holds a tensor {tuple(embeddings.shape)} {embeddings.dtype}, not (D, n) fp16 embeddings"
        )
    return embeddings


def _write_passages(lines: BinaryIO, path: Path, n: int, heartbeat: Callable[[], None]) -> None:
    passages = load_plain_pickle(path)
    if not isinstance(passages, list) or len(passages) != n:
        found = f"{len(passages)} passages" if isinstance(passages, list) else f"a {type(passages).__name__}"
        raise ValueError(f"{path} holds {found}, its embeddings are {n}")
    for number, passage in enumerate(passages):
        try:
            parse_passage(passage, join_titles=False)
            lines.write(json.dumps(passage, ensure_ascii=False).encode() + b"\n")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, passage {number}: {error}") from error
        if number % 10_000 == 0:
            heartbeat()
