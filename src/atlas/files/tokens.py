"""Token ids of a corpus, kept in the cache beside it (cache.py): reading them takes a fraction of tokenizing again.

They are in one file or several. Each process appends the rows of its share to a file of its own, block by block, and
any number of processes reads what another number has written. A block that is cut off or damaged is as good as none,
so nothing has to be finished: whoever needs its rows tokenizes them, and may append them.
"""

import contextlib
import errno
import os
import re
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from atlas.files.cache import folders_for
from atlas.files.disk import existing_directory
from atlas.files.lock import open_locked

MAGIC = b"ATLASTOK"
_HEADER = struct.Struct("<8sQQQI")  # MAGIC, first row, number of rows, bytes of the content, CRC-32 of the content
_CHECKSUM = struct.Struct("<I")  # CRC-32 of the header, which it follows
_LENGTH = np.dtype("<u2")  # a row has at most 512 tokens


class _Block(NamedTuple):
    """Consecutive rows: their lengths, then their token ids."""

    first: int
    stop: int  # the row after the last
    path: Path
    start: int  # of the content, in bytes
    bytes: int
    checksum: int


class TokenCache:
    """The token ids that are kept of a corpus. Picklable: files are opened when they are read."""

    def __init__(self, source: Path, content: str, reading: str, vocabulary_size: int) -> None:
        """Looks for what is kept.

        Args:
            source: a file of the corpus, beside which they are.
            content: 16 hexadecimal digits, which change with the content of the corpus.
            reading: 16 hexadecimal digits, which change with the files of the corpus and how they are tokenized.
        """
        self._places, self._content, self._reading = folders_for(source), content, reading
        self._dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
        found = [block for path, of_content in self._files() if of_content == content for block in _scan(path)[0]]
        self._blocks = sorted(found, key=lambda block: (block.first, block.stop))
        self._longest = max((block.stop - block.first for block in found), default=0)

    def missing(self, rows: range) -> int:
        """How many of these rows are not there, if nothing is damaged."""
        missing, at = len(rows), rows.start
        for block in self._blocks:
            first, stop = max(block.first, at), min(block.stop, rows.stop)
            if first < stop:
                missing, at = missing - (stop - first), stop
        return missing

    def read(self, rows: range) -> list[np.ndarray] | None:
        """Token ids of each row, (n,) uint16 or uint32; None if one of them is not there or damaged."""
        found: list[np.ndarray] = []
        while len(found) < len(rows):
            row = rows.start + len(found)
            part = next((tokens for block in self._with(row) if (tokens := self._rows_of(block, row, rows.stop))), None)
            if part is None:
                return None
            found += part
        return found

    def writer(self, rows: range, corpus_rows: int, mean_tokens: float) -> "TokenWriter":
        """What appends rows of a process's share, `rows`.

        Args:
            corpus_rows: rows of the whole corpus, of which all processes write those that are missing.
            mean_tokens: of a row.
        """
        needed = self.missing(range(corpus_rows)) * (mean_tokens * self._dtype.itemsize + _LENGTH.itemsize)
        name = f"{self._content}-{self._reading}.{rows.start}-{rows.stop}.tokens"
        paths = [folder / f"{begin}.{name}" for folder, begin in self._places]
        return TokenWriter(paths, self._dtype, round(needed), self._remove_others)

    def _files(self) -> Iterator[tuple[Path, str]]:
        """The files of this corpus, read in this way, and the content of the corpus when they were made."""
        for folder, name in self._places:
            pattern = re.compile(rf"{re.escape(name)}\.([0-9a-f]{{16}})-{self._reading}\.[0-9]+-[0-9]+\.tokens")
            with contextlib.suppress(OSError):
                for entry in sorted(os.listdir(folder)):
                    if match := pattern.fullmatch(entry):
                        yield folder / entry, match[1]

    def _remove_others(self) -> None:
        """Remove what was kept of earlier contents of the same files."""
        for path, content in self._files():
            if content != self._content:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _with(self, row: int) -> Iterator[_Block]:
        """Blocks that have a row."""
        for i in reversed(range(bisect_right(self._blocks, row, key=lambda block: block.first))):
            block = self._blocks[i]
            if block.first + self._longest <= row:
                return
            if row < block.stop:
                yield block

    def _rows_of(self, block: _Block, row: int, stop: int) -> list[np.ndarray] | None:
        """The rows from `row` up to `stop` that a block has; None if it is damaged."""
        try:
            with open(block.path, "rb") as file:
                file.seek(block.start)
                content = file.read(block.bytes)
        except OSError:  # removed meanwhile
            return None
        if len(content) != block.bytes or zlib.crc32(content) != block.checksum:
            return None
        n = block.stop - block.first
        ends = np.cumsum(np.frombuffer(content, _LENGTH, n), dtype=np.int64)
        ids = np.frombuffer(content, self._dtype, offset=n * _LENGTH.itemsize)
        return [ids[a:b] for a, b in pairwise([0, *ends.tolist()])][row - block.first : stop - block.first]


class TokenWriter:
    """Appends blocks to a file, in the first folder that can take it.

    Attributes:
        path: of the file; None before the first block.
        size: of it, in bytes.
        failure: why nothing more is kept, once that is so. What a full disk cut off is removed again.
    """

    def __init__(self, paths: list[Path], dtype: np.dtype, needed: int, when_opened: Callable[[], object]) -> None:
        """Args:
        paths: where the file may be, the best place first.
        needed: bytes that are still to be written, also by other processes.
        """
        self._paths, self._dtype, self._needed, self._when_opened = paths, dtype, needed, when_opened
        self._file: int | None = None
        self.path: Path | None = None
        self.size = 0
        self.failure: str | None = None

    def add(self, first_row: int, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Append consecutive rows: the length of each, (n,), and their token ids one after the other. Never raises."""
        if self._file is None and self.failure is None:
            self._open()
        if self.failure is not None:
            return
        content = lengths.astype(_LENGTH).tobytes() + ids.astype(self._dtype).tobytes()
        header = _HEADER.pack(MAGIC, first_row, len(lengths), len(content), zlib.crc32(content))
        rest = block = memoryview(header + _CHECKSUM.pack(zlib.crc32(header)) + content)
        try:
            while rest:  # a full disk or a signal may let only some bytes through
                rest = rest[os.write(self._file, rest) :]
            self.size += len(block)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()  # makes room for what is needed more
                self.path.parent.rmdir()  # if nothing else is in it
            self.failure = f"{self.path}: {error.strerror}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        failures = []
        for path in self._paths:
            try:
                free = shutil.disk_usage(existing_directory(path)).free
                if free < 2 * self._needed:  # a run needs room for other things
                    raise OSError(errno.ENOSPC, f"they take {self._needed:,} bytes, and {free:,} are free")
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_locked(path)
                if self._file is None:
                    self.failure = f"another run is writing {path}"
                    return
                self.size = _scan(path)[1]  # of a killed start
                os.ftruncate(self._file, self.size)
                os.lseek(self._file, self.size, os.SEEK_SET)
            except OSError as error:
                failures.append(f"{path.parent}: {error.strerror or error}")
                continue
            self.path = path
            self._when_opened()
            return
        self.failure = "; ".join(failures)


def _scan(path: Path) -> tuple[list[_Block], int]:
    """The blocks of a file up to one that is not whole, and where that begins. Contents are not read."""
    blocks, end = [], 0
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(header := file.read(_HEADER.size + _CHECKSUM.size)) == _HEADER.size + _CHECKSUM.size:
            magic, first, rows, length, checksum = _HEADER.unpack_from(header)
            (of_header,) = _CHECKSUM.unpack_from(header, _HEADER.size)
            start = end + len(header)
            if magic != MAGIC or of_header != zlib.crc32(header[: _HEADER.size]) or start + length > size:
                break
            blocks.append(_Block(first, first + rows, path, start, length, checksum))
            end = file.seek(start + length)
    return blocks, end
