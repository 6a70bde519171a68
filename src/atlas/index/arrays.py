"""One array of an index: an ordinary `.npy` file that all ranks write together, and of which each maps its rows.

The file is cut into blocks that are checked one by one (docs/formats.md). A rank writes the blocks whose first byte is
in its rows, so that no two ranks, perhaps on two machines, write into the same page.
"""

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from atlas.files.checksums import BLOCK_BYTES, Blocks, Recorded, as_text, extend
from atlas.files.disk import writing
from atlas.index.flat import measure_largest_norm
from atlas.index.live import LiveRows
from atlas.runtime import distributed
from atlas.runtime.tracking import progress_bar

HEADER_BYTES = 4096  # a page, so that rows begin at one
WRITE_BYTES = 2**26  # converted at a time
FP16, BYTE, INT64 = np.dtype("<f2"), np.dtype("u1"), np.dtype("<i8")
AGAIN = "copy the index again, or build it anew"


@dataclass(frozen=True)
class Layout:
    """An array of `size` rows of `width` items, and how long the header before them is."""

    size: int
    width: int
    dtype: np.dtype
    header_bytes: int = HEADER_BYTES

    def offset(self, row: int) -> int:
        """Where a row begins in the file."""
        return self.header_bytes + row * self.width * self.dtype.itemsize

    def row_at(self, offset: int) -> int:
        """The row that a byte of the file belongs to; 0 in the header."""
        return min(max(0, (offset - self.header_bytes) // (self.width * self.dtype.itemsize)), self.size - 1)

    def header(self) -> bytes:
        """Version 1.0 of numpy's format, always the same, so that it can be compared instead of parsed."""
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.size}, {self.width}), }}"
        magic = b"\x93NUMPY\x01\x00" + (self.header_bytes - 10).to_bytes(2, "little")
        return magic + text.ljust(self.header_bytes - 11).encode() + b"\n"

    def __str__(self) -> str:
        return f"{self.size} x {self.width} {'fp16 numbers' if self.dtype == FP16 else 'bytes'}"


@dataclass(frozen=True)
class Array:
    """An array on disk."""

    file: str  # its name
    largest_norm: float  # bounds the L2 norm of every row, or of what a code stands for
    block_bytes: int | None  # None: written by version 1, which had no checksums
    blocks: str | None  # CRC-32 of every block, eight hexadecimal digits each


def create(path: Path, layout: Layout, same: Path | None = None) -> None:
    """Make the file, full of zeros, or a second name of a file `same` that holds what is to be written over it."""
    if same is not None and same.is_file() and same.stat().st_size == layout.offset(layout.size):
        with contextlib.suppress(OSError):  # on a file system without links
            os.link(same, path)
            return
    with writing(path, layout.offset(layout.size)), open(path, "xb") as file:
        file.write(layout.header())
        file.truncate(layout.offset(layout.size))


def check_header(path: Path, layout: Layout) -> None:
    """Raises: ValueError when the file is missing, of another size or of another shape."""
    if not path.is_file():
        raise ValueError(f"{path}, which index.json names, is missing: {AGAIN}")
    expected, found = layout.offset(layout.size), path.stat().st_size
    if found != expected:
        raise ValueError(f"{path} is {found} bytes long, {layout} take {expected}: {AGAIN}")
    with open(path, "rb") as file:
        if file.read(layout.header_bytes) != layout.header():
            raise ValueError(f"{path} does not begin as an array of {layout}: {AGAIN}")


def map_rows(path: Path, layout: Layout, rows: range) -> np.ndarray:
    """These rows `(n, width)`, memory-mapped and read-only. Raises: as `check_header`."""
    check_header(path, layout)
    if not rows:  # nothing to map
        return np.zeros((0, layout.width), layout.dtype)
    return np.memmap(path, layout.dtype, "r", offset=layout.offset(rows.start), shape=(len(rows), layout.width))


def as_tensor(mapped: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor; writing into it would end the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(mapped)


def fp16_parts(
    embeddings: torch.Tensor | LiveRows, first_row: int, report: Callable[[int], object] = lambda rows: None
) -> Iterator[tuple[np.ndarray, float]]:
    """Embeddings `(n, D)` part by part as they are written, each with the largest L2 norm in it.

    `report` is told how many rows a part had, once it is written.

    Raises:
        ValueError: a value is not finite in fp16; `first_row` is the number of the first row in the whole corpus.
    """
    step = max(1, WRITE_BYTES // (2 * embeddings.shape[1]))
    for start in range(0, len(embeddings), step):
        rows = embeddings[start : start + step].to("cpu", torch.float16).contiguous()
        yield rows.numpy().astype(FP16, copy=False), measure_largest_norm(rows, first_row + start)
        report(len(rows))


class BlockWriter:
    """Writes a file in order from some byte on, and takes the checksums of the blocks that begin there.

    Attributes:
        checksums: of every block so far; the last one may not be full yet.
        head: what was given before the first block began. It belongs to a block of another writer.
    """

    def __init__(self, path: Path, position: int, checksums: Sequence[int] = ()) -> None:
        """Args:
        position: where in the file the next byte goes.
        checksums: of the blocks before, where this writer goes on with the last one.
        """
        self.path, self.position, self.checksums, self.head = path, position, list(checksums), b""

    def write(self, parts: Iterable[tuple[np.ndarray, float]]) -> float:
        """Write all parts (contiguous rows, and what bounds their norms), and return what bounds all norms."""
        largest = 0.0
        with _open_to_write(self.path) as file:
            for rows, norm in parts:
                self._write(file, rows.reshape(-1).view(np.uint8))
                largest = max(largest, norm)
        return largest

    def finish(self, heads: Iterable[bytes]) -> None:
        """Fill the last block with the heads of the writers behind, in their order."""
        with _open_to_write(self.path) as file:
            for head in heads if self.checksums else ():
                if self.position % BLOCK_BYTES == 0:
                    break
                self._write(file, np.frombuffer(head, np.uint8))

    def _write(self, file: int, content: np.ndarray) -> None:
        if not self.checksums:
            before, content = np.split(content, [-self.position % BLOCK_BYTES])
            self.head += before.tobytes()
            self.position += len(before)
        while len(content):
            part, content = np.split(content, [BLOCK_BYTES - self.position % BLOCK_BYTES])
            extend(self.checksums, self.position, memoryview(part), BLOCK_BYTES)
            write_at(file, part, self.position)
            self.position += len(part)


def write_at(file: int, content: np.ndarray, position: int) -> None:
    """Write all bytes `(n,)` uint8 at a place of the file."""
    while len(content):  # a full disk or a signal may let only some bytes through
        written = os.pwrite(file, content, position)
        position, content = position + written, content[written:]


def write_array(
    path: Path,
    layout: Layout,
    first_row: int,
    parts: Iterable[tuple[np.ndarray, float]],
    same: Path | None = None,
) -> Array:
    """Make the file of an array; each rank writes the rows that it has. Collective.

    Args:
        first_row: of this rank.
        parts: this rank's rows, as `BlockWriter.write` takes them.
        same: a file that holds these rows already, if there is one: both names share its space.

    Raises:
        ValueError, OSError: on every rank when `parts` raises it on any, or a file cannot be written.
    """
    distributed.on_main(f"making {path}", partial(create, path, layout, same))
    before = header_checksum(layout) if distributed.is_main() else ()
    writer = BlockWriter(path, layout.offset(first_row), before)
    norms = distributed.gather_objects(distributed.on_every_rank(f"writing {path}", partial(writer.write, parts)))
    heads = distributed.gather_objects(writer.head)[distributed.rank() + 1 :]  # less than a block of each rank
    distributed.on_every_rank(f"finishing {path}", partial(writer.finish, heads))
    checksums = [checksum for of_rank in distributed.gather_objects(writer.checksums) for checksum in of_rank]
    return Array(path.name, max(norms), BLOCK_BYTES, as_text(checksums))


def header_checksum(layout: Layout) -> list[int]:
    """The checksums that a file begins with: whoever writes the first row goes on with them."""
    return [zlib.crc32(layout.header())]


def recorded(directory: Path, array: Array, layout: Layout) -> Recorded | None:
    """What is to be compared; None of an array of version 1, which had no checksums."""
    if array.blocks is None:
        return None
    content = Blocks(layout.offset(layout.size), array.block_bytes, array.blocks)
    return Recorded(directory / array.file, content, AGAIN, layout)


def check_all(whole: Recorded) -> None:
    """Read a whole file, with a bar. Raises: ValueError when blocks are not as they were written."""
    with whole.open() as file, progress_bar(f"checking {whole.path.name}", len(whole), "blocks") as bar:
        whole.compare(file, range(len(whole)), bar.update)


@contextlib.contextmanager
def _open_to_write(path: Path) -> Iterator[int]:
    """A file that is there; write-only, so that a network file system need not read pages before it writes them."""
    file = os.open(path, os.O_WRONLY)
    with writing(path, os.fstat(file).st_size):  # `create` gave it its size, but no space
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)
