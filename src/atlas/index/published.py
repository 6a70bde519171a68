"""Published indices: `embeddings.{i}.pt` and `passages.{i}.pt`, converted once into our format.

They are pickles and may come from anywhere: embeddings are read by `torch.load(weights_only=True)`, passages by an
unpickler that finds no class and no function, so nothing in a file can run.

A conversion goes shard by shard, and keeps a list of those that are done (`converting.json`) beside the files that it
writes: the next conversion resumes after the last of them.
"""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from atlas.files.checksums import as_text, read_file
from atlas.files.disk import writing
from atlas.files.jsonl import JsonlCorpus
from atlas.index import arrays
from atlas.index import directory as files
from atlas.index.arrays import (
    FP16,
    Array,
    BlockWriter,
    Layout,
    check_header,
    create,
    fp16_parts,
    header_checksum,
)
from atlas.index.directory import Description, Segment
from atlas.index.passages import parse_passage
from atlas.runtime.tracking import log, progress_bar

_SHARD = re.compile(r"(embeddings|passages)\.(\d+)\.pt")
# Of a passage, beyond its bytes in a pickle, which has the names of its fields once: those names, and its offset.
_MORE_BYTES = 64


def is_published(directory: Path) -> bool:
    """Whether the directory looks like a published index."""
    return any(_SHARD.fullmatch(path.name) for path in directory.glob("*.pt"))


def is_converted(directory: Path, output: Path) -> bool:
    """Whether `output` holds what the published index is converted to. Raises: ValueError as `read_description`."""
    if not files.has_index(output):
        return False
    description = files.read_description(output)
    return description.source == fingerprint_published(directory) and description.quantizer is None


def fingerprint_published(directory: Path) -> str:
    """Changes when a file of the index does: names, sizes and times."""
    return _fingerprint(path for pair in _shards(directory) for path in pair)


@dataclass(frozen=True)
class Source:
    """What is known of a published index before its shards are read."""

    shards: list[tuple[Path, Path]]  # embeddings and passages
    rows: list[int]  # passages of every shard
    dimension: int  # D

    @property
    def size(self) -> int:
        """N."""
        return sum(self.rows)

    @property
    def bytes(self) -> int:
        """About what the converted index takes."""
        text = sum(passages.stat().st_size for _, passages in self.shards)
        return text + self.size * (2 * self.dimension + _MORE_BYTES)


def look_at(directory: Path) -> Source:
    """Find the shards and their sizes.

    Raises:
        ValueError: a shard is missing, or its embeddings are damaged, something else, or of another D.
    """
    shards = _shards(directory)
    shapes = [_load_embeddings(embeddings).shape for embeddings, _ in shards]  # memory-mapped: only headers are read
    dimension = shapes[0][0]
    for (embeddings, _), (d, _) in zip(shards, shapes, strict=True):
        if d != dimension:
            raise ValueError(f"{embeddings} holds embeddings of size {d}, {shards[0][0].name} of size {dimension}")
    return Source(shards, [n for _, n in shapes], dimension)


def convert_published(
    directory: Path,
    output: Path,
    *,
    more_bytes: int = 0,
) -> None:
    """Write a published index in our format, in one process and the memory of one shard.

    A conversion that was stopped is resumed at the first shard that it did not finish, or that has changed since; the
    files become the same as without the stop. An index in `output` is replaced in one step at the end, unless it is
    what comes out.

    Args:
        more_bytes: that are to be free where `output` is, beyond what is written here.

    Raises:
        ValueError: a shard is missing or changes meanwhile, a file is damaged, of another kind, or holds anything but
            plain data; there is no room; another process converts into the same directory.
        OSError: a file cannot be read or written.
    """
    if is_converted(directory, output):
        files.tidy_unless_busy(output)
        return
    source = look_at(directory)
    begun = _resume(output, source)
    files.check_space(output, source.bytes + more_bytes - (begun.written(source) if begun else 0))
    with files.locked(output):
        conversion = _resume(output, source) or _begin(output, source)
        if conversion.done:
            log.info("Resuming after the first %d of %d shards", len(conversion.done), len(source.shards))
        try:
            _convert_shards(source, output, conversion)
        except (ValueError, OSError):
            if conversion.done:
                done, of = len(conversion.done), len(source.shards)
                log.warning("%d of %d shards are converted and kept: the same command resumes after them", done, of)
            else:
                files.tidy(output)
            raise
        for shard, done in zip(source.shards, conversion.done, strict=True):
            if _fingerprint(shard) != done.fingerprint:
                raise ValueError(f"{_name(shard)} changed while the index was converted: give the same command again")
        files.commit(output, _describe(source, output, conversion))


def _describe(source: Source, output: Path, conversion: "_Conversion") -> Description:
    """The finished index."""
    text = output / conversion.passages
    JsonlCorpus(text)  # leaves the offsets of its lines beside it
    largest_norm = max(done.largest_norm for done in conversion.done)
    embeddings = Array(conversion.embeddings, largest_norm, arrays.BLOCK_BYTES, as_text(conversion.checksums))
    return Description(
        type="flat",
        dimension=source.dimension,
        titles_joined=True,
        retriever=None,
        embedder_precision=None,
        source=_fingerprint(path for shard in source.shards for path in shard),
        quantizer=None,
        segments=(Segment(source.size, files.describe_passages(text, read_file(text)), embeddings, codes=None),),
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


@dataclass(frozen=True)
class _Done:
    """A shard that is converted, and on the disk."""

    fingerprint: str  # of its two files
    end: int  # of its passages in the text, in bytes
    largest_norm: float
    blocks: int  # of the embeddings, begun so far
    last_checksum: int  # of the last of them, which may not be full yet


@dataclass(frozen=True)
class _Conversion:
    """What `converting.json` says."""

    size: int
    dimension: int
    block_bytes: int
    passages: str  # name of a file
    embeddings: str  # name of a file
    done: list[_Done]
    checksums: list[int]  # of the blocks of embeddings

    @property
    def layout(self) -> Layout:
        return Layout(self.size, self.dimension, FP16)

    def written(self, source: Source) -> int:
        """Bytes of both files that need not be written again."""
        return self.done[-1].end + 2 * self.dimension * sum(source.rows[: len(self.done)])

    def save(self, output: Path) -> None:
        files.write_fields(output / files.CONVERTING, asdict(self))


def _resume(output: Path, source: Source) -> _Conversion | None:
    """A conversion that was stopped, up to the first shard that has changed since; None if there is nothing to use."""
    try:
        version, fields = files.read_fields(output / files.CONVERTING)
    except (ValueError, FileNotFoundError):
        return None
    if version != files.VERSION:
        return None
    begun = _Conversion(**fields | {"done": [_Done(**done) for done in fields["done"]]})
    if (begun.size, begun.dimension, begun.block_bytes) != (source.size, source.dimension, arrays.BLOCK_BYTES):
        return None
    if files.has_index(output) and begun.passages in files.read_description(output).files():
        return None  # it has finished, and was killed before it removed its notes
    same = [_fingerprint(shard) == done.fingerprint for shard, done in zip(source.shards, begun.done, strict=False)]
    done = begun.done[: same.index(False) if False in same else len(same)]
    text = output / begun.passages
    if not done or not text.is_file() or text.stat().st_size < done[-1].end:
        return None
    try:
        check_header(output / begun.embeddings, begun.layout)
    except ValueError:
        return None
    checksums = [*begun.checksums[: done[-1].blocks - 1], done[-1].last_checksum]
    return replace(begun, done=done, checksums=checksums)


def _begin(output: Path, source: Source) -> _Conversion:
    """Make both files, after what is left of other conversions is removed."""
    if (output / files.CONVERTING).is_file():
        log.warning("%s: what a conversion that was stopped has left cannot be used: starting anew", output)
    files.tidy(output)
    generation, layout = files.next_generation(output), Layout(source.size, source.dimension, FP16)
    names = f"passages.{generation}.jsonl", f"embeddings.{generation}.npy"
    conversion = _Conversion(
        source.size, source.dimension, arrays.BLOCK_BYTES, *names, done=[], checksums=header_checksum(layout)
    )
    create(output / conversion.embeddings, layout)
    (output / conversion.passages).touch(exist_ok=False)
    return conversion


def _convert_shards(source: Source, output: Path, conversion: _Conversion) -> None:
    """Convert the shards that are not done; each is noted down once it is on the disk."""
    first = sum(source.rows[: len(conversion.done)])
    writer = BlockWriter(output / conversion.embeddings, conversion.layout.offset(first), conversion.checksums)
    with (
        writing(output / conversion.passages),
        open(output / conversion.passages, "r+b") as lines,
        progress_bar("converting", source.size, "passages", initial=first) as bar,
    ):
        lines.truncate(conversion.done[-1].end if conversion.done else 0)
        lines.seek(0, os.SEEK_END)
        for number in range(len(conversion.done), len(source.shards)):
            shard, n = source.shards[number], source.rows[number]
            fingerprint, columns = _fingerprint(shard), _load_embeddings(shard[0])  # (D, n)
            if columns.shape != (source.dimension, n):
                raise ValueError(f"{shard[0]} changed while the index was converted: give the same command again")
            _write_passages(lines, shard[1], n, bar.update)
            lines.flush()
            os.fsync(lines.fileno())
            try:
                norm = writer.write(fp16_parts(columns.T, first))
            except ValueError as error:
                raise ValueError(f"{shard[0]}: {error}") from error
            first += n
            blocks = len(writer.checksums)
            conversion.done.append(_Done(fingerprint, lines.tell(), norm, blocks, writer.checksums[-1]))
            conversion.checksums[:] = writer.checksums
            conversion.save(output)


def _fingerprint(paths: Iterable[Path]) -> str:
    stats = [(path.name, path.stat()) for path in paths]
    return hashlib.sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode()).hexdigest()[:16]


def _name(shard: tuple[Path, Path]) -> str:
    return f"{shard[0]} or {shard[1].name}"


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


def _write_passages(lines: BinaryIO, path: Path, n: int, report: Callable[[int], object]) -> None:
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
        report(1)
