"""Files with one row per line (JSON, or another format), larger than memory, read as one sequence of rows."""

import bisect
import contextlib
import gzip
import io
import json
import mmap
import operator
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from atlas.files.disk import writing

CHUNK = 1 << 20  # bytes: small enough that the comparison's result stays in the processor's cache
CACHE_VERSION = 1
CACHE_FROM = 1 << 24  # bytes: in smaller files the lines are found within milliseconds, so nothing is cached
NPY_HEADER = 128  # bytes before the numbers in a one-dimensional .npy file
HEADER = 3  # the cached array starts with version, file size and mtime_ns; the offsets follow
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINE_END = ord("\n")


class DataError(ValueError):
    """A data file is wrong. The message is one sentence that names the file and, if there is one, the line."""


class LineFormat(NamedTuple):
    """How a file stores its rows."""

    decode: Callable[[bytes], dict]  # from a line to a row; raises ValueError(reason)
    has_header: bool = False  # whether the first line is a header, not a row


class JsonlCorpus(Sequence[dict]):
    """Rows of one or several jsonl files, in order: `len(c)`, `c[i]`, `c[2:5]`, `c[[4, 1]]`.

    Files are memory-mapped and only the offsets of the lines are kept, so that all processes on a machine share one
    copy in the page cache. Offsets are found once and, for a large file, cached in `{file}.offsets.npy`. `{file}.gz` is
    decompressed once to `{file}`; with several processes, let one of them open the corpus first. Blank lines are
    ignored. A pickled corpus opens its files again.

    Args:
        parse: applied to each row when it is read; raises ValueError(reason) if the row is bad.
        max_rows: read at most this many rows over all files; -1 means all.
        choose_format: takes a file's path and first line (empty if the file is) and returns its format; None means that
            every file is JSON lines.

    Raises:
        FileNotFoundError: a file does not exist.
        DataError: a row that is read is not UTF-8, not a JSON object, or refused by `parse`; a file is refused by
            `choose_format`; a `.gz` is damaged.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        parse: Callable[[dict], dict] | None = None,
        max_rows: int = -1,
        choose_format: Callable[[Path, bytes], LineFormat] | None = None,
    ):
        paths = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.paths = [decompress(Path(path)) for path in paths]
        self.parse = parse
        self.max_rows = max_rows
        self.choose_format = choose_format
        self.formats: list[LineFormat] = []  # one per file
        self._maps: list[mmap.mmap | bytes] = []
        self._offsets: list[np.ndarray] = []
        self._first_rows = [0]  # one per file, and the total number of rows at the end
        for path in self.paths:
            text, offsets = open_lines(path)
            self.formats.append(self._format_of(path, text, offsets))
            offsets = offsets[int(self.formats[-1].has_header) :]
            total = len(self) + len(offsets)
            self._maps.append(text)
            self._offsets.append(offsets)
            self._first_rows.append(min(total, max_rows) if max_rows >= 0 else total)

    def __reduce__(self):
        return JsonlCorpus, (self.paths, self.parse, self.max_rows, self.choose_format)

    def __len__(self) -> int:
        return self._first_rows[-1]

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> dict | list[dict]:
        if isinstance(rows, slice):
            return [self._row(i) for i in range(*rows.indices(len(self)))]
        if isinstance(rows, Sequence | np.ndarray):
            return [self._row(i) for i in rows]
        return self._row(rows)

    def record(self, row: int) -> dict:
        """A row without `parse` applied. Raises: DataError."""
        return self._read(row, None)

    def format_of(self, row: int) -> LineFormat:
        """The format of the file that contains the row."""
        return self.formats[self._locate(row)[0]]

    def rows_of_files(self) -> list[range]:
        """The rows of each file, in the order of `paths`."""
        return [range(*ends) for ends in pairwise(self._first_rows)]

    def raw(self, row: int) -> bytes:
        """The line of a row as it is in the file, without its line end."""
        file, start = self._locate(row)
        return line_at(self._maps[file], start).removesuffix(b"\r")

    def where(self, row: int) -> str:
        """`{file}, line {n}`, counted from 1 and including blank lines. Reads the file up to that line."""
        file, start = self._locate(row)
        text = self._maps[file]
        line_ends = sum(text[begin : min(begin + CHUNK, start)].count(b"\n") for begin in range(0, start, CHUNK))
        return f"{self.paths[file]}, line {line_ends + 1}"

    def _row(self, row: int) -> dict:
        return self._read(row, self.parse)

    def _read(self, row: int, parse: Callable[[dict], dict] | None) -> dict:
        try:
            record = self.format_of(row).decode(self.raw(row))
            return record if parse is None else parse(record)
        except ValueError as error:
            raise DataError(f"{self.where(row)}: {error}") from error

    def _format_of(self, path: Path, text: mmap.mmap | bytes, offsets: np.ndarray) -> LineFormat:
        if self.choose_format is None:
            return JSON_LINES
        try:
            return self.choose_format(path, line_at(text, int(offsets[0])).removesuffix(b"\r") if len(offsets) else b"")
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def _locate(self, row: int) -> tuple[int, int]:  # which file, and where in it the line starts
        index = operator.index(row) + (len(self) if row < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} rows")
        file = bisect.bisect_right(self._first_rows, index) - 1
        start, text = int(self._offsets[file][index - self._first_rows[file]]), self._maps[file]
        follows_a_line = 0 < start < len(text) and text[start - 1] == LINE_END
        if start and not follows_a_line and text[: max(0, min(start, 4))] != BYTE_ORDER_MARK:
            raise DataError(f"{offsets_file(self.paths[file])} is damaged: remove it, and it will be made again")
        return file, start


def decode_text(line: bytes) -> str:  # a ValueError gives the reason; the caller adds file and line
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})") from error


def decode(line: bytes) -> dict:
    try:
        record = json.loads(decode_text(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object {{...}}, found {json.dumps(record)[:40]}")
    if b"\\ud" in line or b"\\uD" in line:  # half of an escaped surrogate pair is not text: tokenizers refuse it
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) in a string") from error
    return record


JSON_LINES = LineFormat(decode)


def open_lines(path: Path) -> tuple[mmap.mmap | bytes, np.ndarray]:
    """The memory-mapped file, and the offsets (rows,) int64 of its lines that are not blank."""
    with open_existing(path) as file:
        status = os.fstat(file.fileno())
        # An empty file cannot be mapped.
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
    header = np.array([CACHE_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    cache = offsets_file(path)
    offsets = read_offsets(cache, header)
    if offsets is None:
        offsets = find_offsets(text)
        if status.st_size < CACHE_FROM:
            return text, offsets
        # If they cannot be written (the directory is read-only or full), they stay in memory.
        with contextlib.suppress(OSError), replacing(cache) as beside, open(beside, "wb") as file:
            np.save(file, np.concatenate([header, offsets]))
    return text, offsets


def offsets_file(path: Path) -> Path:
    return path.with_name(path.name + ".offsets.npy")


def read_offsets(cache: Path, header: np.ndarray) -> np.ndarray | None:
    """The offsets in the cache; None if it is absent, damaged or belongs to another version of the file."""
    try:
        rows = max(0, (cache.stat().st_size - NPY_HEADER) // 8)
        with open(cache, "rb") as file:
            is_intact = file.read(NPY_HEADER) == npy_header(rows)  # numpy's parser fails in many ways on damaged ones
        if not is_intact or rows < HEADER:
            return None
        cached = np.memmap(cache, np.int64, "r", offset=NPY_HEADER, shape=(rows,))
    except (OSError, ValueError):
        return None
    return np.asarray(cached[HEADER:]) if np.array_equal(cached[:HEADER], header) else None


def npy_header(rows: int) -> bytes:
    """The header that `np.save` writes before this many int64 numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (rows,)})
    return file.getvalue()


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
    """`{file}` for `{file}.gz`, decompressed unless a newer one exists; any other path unchanged.

    Raises: FileNotFoundError; DataError if the file is damaged or its directory cannot be written to.
    """
    if path.suffix != ".gz":
        return path
    plain = path.with_suffix("")
    with open_existing(path) as compressed:
        if plain.exists() and plain.stat().st_mtime_ns >= os.fstat(compressed.fileno()).st_mtime_ns:
            return plain
        try:
            with replacing(plain) as beside, gzip.open(compressed) as source, open(beside, "wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
        except OSError as error:
            raise DataError(
                f"{path}: cannot be decompressed into its own directory ({error}); decompress it elsewhere"
            ) from error
    return plain


def open_existing(path: Path) -> BinaryIO:
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist" + (": it is a directory" if path.is_dir() else ""))
    return open(path, "rb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` if the block succeeds, removed if it fails.

    Raises: FullDiskError if the block has no space to write it.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with writing(path, beside=beside):
            yield beside
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
