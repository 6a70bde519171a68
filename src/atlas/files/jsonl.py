"""Files with one row per line (JSON, or another format), larger than memory, read as one sequence of rows."""

import bisect
import contextlib
import gzip
import json
import logging
import mmap
import operator
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from atlas.files.cache import cached
from atlas.files.disk import writing
from atlas.files.left_over import LeftOver
from atlas.files.lock import temporary

T = TypeVar("T")
log = logging.getLogger("atlas")
CHUNK = 1 << 20  # bytes: small enough that the comparison's result stays in the processor's cache
CACHE_FROM = 1 << 24  # bytes: in smaller files the lines are found within milliseconds, so nothing is cached
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINE_END = ord("\n")


class DataError(ValueError):
    """A data file is wrong. The message is one sentence that names the file and, if there is one, the line."""


class BadLine(NamedTuple):
    """A row that cannot be read, and why."""

    row: int
    reason: str


class LineFormat(NamedTuple):
    """How a file stores its rows."""

    decode: Callable[[bytes], dict]  # from a line to a row; raises ValueError(reason)
    has_header: bool = False  # whether the first line is a header, not a row


class JsonlCorpus(Sequence[dict]):
    """Rows of one or several jsonl files, in order: `len(c)`, `c[i]`, `c[2:5]`, `c[[4, 1]]`.

    Files are memory-mapped and only the offsets of the lines are kept, so that all processes on a machine share one
    copy in the page cache. The offsets of a large file and the text of a `.gz` are found once and cached (cache.py);
    with several processes, let one of them open the corpus first. Blank lines are ignored. A pickled corpus opens its
    files again.

    Attributes:
        sources: the files as they were given, by which messages name them.
        paths: the files that hold their text: other ones for `.gz`.

    Args:
        parse: applied to each row when it is read; raises ValueError(reason) if the row is bad.
        max_rows: read at most this many rows over all files; -1 means all.
        choose_format: takes a file's path and first line (empty if the file is) and returns its format; None means that
            every file is JSON lines.

    Raises:
        FileNotFoundError: a file does not exist.
        DataError: a row that is read is not UTF-8, not a JSON object, or refused by `parse`; a file is refused by
            `choose_format`; a file is JSON, but not with one object per line; a `.gz` is damaged.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        parse: Callable[[dict], dict] | None = None,
        max_rows: int = -1,
        choose_format: Callable[[Path, bytes], LineFormat] | None = None,
    ):
        paths = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.sources = [Path(path) for path in paths]
        self.paths = [decompress(path) for path in self.sources]
        self.parse = parse
        self.max_rows = max_rows
        self.choose_format = choose_format
        self.dropped = np.empty(0, np.int64)  # see `drop`
        self._left = LeftOver(self.dropped)
        self.formats: list[LineFormat] = []  # one per file
        self._maps: list[mmap.mmap | bytes] = []
        self._offsets: list[np.ndarray] = []
        self._entries: list[Path | None] = []  # the files of the offsets
        self._first_rows = [0]  # one per file, and the total number of rows at the end
        for source, path in zip(self.sources, self.paths, strict=True):
            text, offsets, entry = open_lines(path, source)
            self.formats.append(self._format_of(source, text, offsets))
            offsets = offsets[int(self.formats[-1].has_header) :]
            total = len(self) + len(offsets)
            self._maps.append(text)
            self._offsets.append(offsets)
            self._entries.append(entry)
            self._first_rows.append(min(total, max_rows) if max_rows >= 0 else total)

    def __reduce__(self):
        arguments = (self.sources, self.parse, self.max_rows, self.choose_format)
        return JsonlCorpus, arguments, self.dropped if len(self.dropped) else None

    def __setstate__(self, dropped: np.ndarray) -> None:
        self.drop(dropped)

    def __len__(self) -> int:
        return self._first_rows[-1] - len(self.dropped)

    def drop(self, rows: Sequence[int]) -> None:
        """Leave out these rows, in ascending order: those behind them move up."""
        of_all = self._left.among_all(np.array(rows, np.int64))
        self.dropped = np.union1d(self.dropped, of_all)  # counted with them
        self._left = LeftOver(self.dropped)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> dict | list[dict]:
        if isinstance(rows, slice):
            return [self._row(i) for i in range(*rows.indices(len(self)))]
        if isinstance(rows, Sequence | np.ndarray):
            with self._scattered():
                return [self._row(i) for i in rows]
        return self._row(rows)

    def record(self, row: int) -> dict:
        """A row without `parse` applied. Raises: DataError."""
        return self._read(row, lambda record: record)

    def read(self, row: int, function: Callable[[dict], T], bad: list[BadLine] | None = None) -> T | None:
        """What `function` makes of a row. A row that cannot be read, or that it refuses, goes to `bad`: None then.

        Raises: DataError with file and line, without `bad`; in any case if the file was changed or damaged.
        """
        return self._read(row, lambda record: function(self._parsed(record)), bad)

    def format_of(self, row: int) -> LineFormat:
        """The format of the file that contains the row."""
        return self.formats[self._locate(row)[0]]

    def rows_of_files(self) -> list[range]:
        """The rows of each file, in the order of `paths`."""
        return [range(*ends) for ends in pairwise(self._first_rows - np.searchsorted(self.dropped, self._first_rows))]

    def raw(self, row: int) -> bytes:
        """The line of a row as it is in the file, without its line end."""
        file, start = self._locate(row)
        return line_at(self._maps[file], start).removesuffix(b"\r")

    def where(self, row: int) -> str:
        """`{file}, line {n}`, counted from 1 and including blank lines. Reads the file up to that line."""
        ((source, line),) = self.places([row])
        return f"{source}, line {line}"

    def places(self, rows: Iterable[int]) -> Iterator[tuple[Path, int]]:
        """The file and the line of each row, as `where` says them, of rows in ascending order. Reads each file once."""
        read, behind, line = None, 0, 1
        for row in rows:
            file, start = self._locate(row)
            if file != read:
                read, behind, line = file, 0, 1
            text = self._maps[file]
            line += sum(text[i : min(i + CHUNK, start)].count(b"\n") for i in range(behind, start, CHUNK))
            behind = start
            yield self.sources[file], line

    @contextlib.contextmanager
    def _scattered(self) -> Iterator[None]:
        """What is read of the disk is the pages of the rows alone, not megabytes of what follows them."""
        maps = [text for text in self._maps if isinstance(text, mmap.mmap)] if hasattr(mmap, "MADV_RANDOM") else []
        for text in maps:
            text.madvise(mmap.MADV_RANDOM)
        try:
            yield
        finally:
            for text in maps:
                text.madvise(mmap.MADV_NORMAL)

    def _row(self, row: int) -> dict:
        return self._read(row, self._parsed)

    def _parsed(self, record: dict) -> dict:
        return record if self.parse is None else self.parse(record)

    def _read(self, row: int, function: Callable[[dict], T], bad: list[BadLine] | None = None) -> T | None:
        try:
            return function(self.format_of(row).decode(self.raw(row)))
        except DataError:  # not of this row alone
            raise
        except ValueError as error:
            if bad is None:
                raise DataError(f"{self.where(row)}: {error}") from error
            bad.append(BadLine(row, str(error)))
            return None

    def _format_of(self, source: Path, text: mmap.mmap | bytes, offsets: np.ndarray) -> LineFormat:
        first_line = line_at(text, int(offsets[0])).removesuffix(b"\r") if len(offsets) else b""
        unpacked = source.with_suffix("") if source.suffix == ".gz" else source
        try:
            chosen = JSON_LINES if self.choose_format is None else self.choose_format(unpacked, first_line)
            if not chosen.has_header:
                check_one_object_a_line(first_line)
            return chosen
        except ValueError as error:
            raise DataError(f"{source}: {error}") from error

    def _locate(self, row: int) -> tuple[int, int]:  # which file, and where in it the line starts
        index = operator.index(row) + (len(self) if row < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} rows")
        if len(self.dropped):
            index = int(self._left.among_all(index))
        file = bisect.bisect_right(self._first_rows, index) - 1
        start, text = int(self._offsets[file][index - self._first_rows[file]]), self._maps[file]
        follows_a_line = 0 < start < len(text) and text[start - 1] == LINE_END
        if start and not follows_a_line and text[: max(0, min(start, 4))] != BYTE_ORDER_MARK:
            changed = f"{self.paths[file]} was changed while it was in use: start again"
            entry = self._entries[file]
            raise DataError(f"{entry} is damaged: remove it, and it will be made again" if entry else changed)
        return file, start


def decode_text(line: bytes) -> str:  # a ValueError gives the reason; the caller adds file and line
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})") from error


def check_one_object_a_line(line: bytes) -> None:
    """Raises: ValueError if the first line of a file shows that it is JSON in another form, as most tools write it."""
    start = line.strip()
    if start.startswith(b"["):
        raise ValueError("a JSON list; write one object per line")
    if start == b"{":
        raise ValueError("a JSON object over several lines; write one object per line")


def decode(line: bytes) -> dict:
    try:
        record = json.loads(decode_text(line))
    except json.JSONDecodeError as error:
        check_one_object_a_line(line)
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(record, dict):
        check_one_object_a_line(line)
        raise ValueError(f"expected a JSON object {{...}}, found {json.dumps(record)[:40]}")
    if b"\\ud" in line or b"\\uD" in line:  # half of an escaped surrogate pair is not text: tokenizers refuse it
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) in a string") from error
    return record


JSON_LINES = LineFormat(decode)


class Lines(NamedTuple):
    """A file as lines."""

    text: mmap.mmap | bytes  # the whole of it, memory-mapped
    offsets: np.ndarray  # (rows,) int64: where the lines that are not blank start
    entry: Path | None  # the file that the offsets are mapped from


def open_lines(path: Path, source: Path | None = None) -> Lines:
    """Map a file, and find its lines, or where they were found before.

    `source`: the file that it was unpacked from, beside which the offsets are kept then.

    Raises: FileNotFoundError.
    """
    with open_existing(path) as file:
        size = os.fstat(file.fileno()).st_size
        # An empty file cannot be mapped.
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        find = cache(partial(find_offsets, text))
        if size >= CACHE_FROM and size:
            # Where nothing can be written (a directory is read-only or full), the offsets stay in memory.
            with contextlib.suppress(OSError, ValueError):
                entry = cached(source or path, file, "offsets.npy", lambda beside: _save_offsets(path, beside, find()))
                return Lines(text, np.load(entry, mmap_mode="r").view(np.ndarray), entry)
        return Lines(text, find(), None)


def _save_offsets(path: Path, beside: Path, offsets: np.ndarray) -> None:
    with open(beside, "wb") as file:
        np.save(file, offsets)
    if (old := path.with_name(path.name + ".offsets.npy")).is_file():
        log.info("%s is of an earlier version of this program and no longer used: you may remove it", old)


def find_offsets(text: mmap.mmap | bytes) -> np.ndarray:
    """Where the lines that are not blank start, (rows,) int64."""
    data = np.frombuffer(text, np.uint8)
    first = len(BYTE_ORDER_MARK) if text[:3] == BYTE_ORDER_MARK else 0
    starts = [without_blank_lines(text, data, np.array([first]))]
    for begin in range(0, len(data), CHUNK):
        line_ends = np.flatnonzero(data[begin : begin + CHUNK] == ord("\n")) + begin
        starts.append(without_blank_lines(text, data, line_ends + 1))
    return np.concatenate(starts, dtype=np.int64)


def without_blank_lines(text: mmap.mmap | bytes, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    starts = starts[starts < len(data)]  # no line starts after the last line end
    suspects = np.flatnonzero(data[starts] <= ord(" "))  # empty, indented, or nothing but white space
    at = starts[suspects]
    after_return = np.minimum(at + (data[at] == ord("\r")), len(data) - 1)
    empty = data[after_return] == ord("\n")
    blank = [i for i in suspects[~empty] if not line_at(text, int(starts[i])).strip()]  # few: checked one by one
    return np.delete(starts, np.concatenate([suspects[empty], np.array(blank, np.int64)]))


def line_at(text: mmap.mmap | bytes, start: int) -> bytes:
    end = text.find(b"\n", start)
    return text[start : end if end >= 0 else len(text)]


def decompress(path: Path) -> Path:
    """Where the text of a `.gz` is, after it has been decompressed into the cache; any other path unchanged.

    Raises: FileNotFoundError; DataError if the file is damaged or nothing can be written.
    """
    if path.suffix != ".gz":
        return path
    with open_existing(path) as compressed:

        def unpack(beside: Path) -> None:
            log.info("Unpacking %s into %s", path, beside.parent)
            compressed.seek(0)
            try:
                with gzip.open(compressed) as source, open(beside, "wb") as target:
                    shutil.copyfileobj(source, target, CHUNK)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error

        try:
            return cached(path, compressed, "text", unpack)
        except OSError as error:
            raise DataError(
                f"{path}: there is no place to unpack it ({error}); make room, or unpack it yourself and give that file"
            ) from error


def open_existing(path: Path) -> BinaryIO:
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist" + (": it is a directory" if path.is_dir() else ""))
    return open(path, "rb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` if the block succeeds, removed if it fails.

    Raises: FullDiskError if the block has no space to write it.
    """
    with temporary(path) as beside, writing(path, beside=beside):
        yield beside
        os.replace(beside, path)
