"""Checksums of the blocks of a file: taken while it is written, compared when it is read again (docs/formats.md)."""

import hashlib
import json
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

BLOCK_BYTES = 2**22  # 38 million embeddings have 14,000 blocks
CHUNK = 2**18  # written or read at a time: stays in the processor's cache between the two things done with it
SMALL_BLOCKS = 4  # files of no more blocks are read whole, even where a sample is asked for
SAMPLE_SHARE = 0.01


@dataclass(frozen=True)
class Blocks:
    """What is known of a file since it was written."""

    bytes: int
    block_bytes: int
    blocks: str  # CRC-32 of every block, eight hexadecimal digits each; the last block may be shorter


class Layout(Protocol):
    """How a file is divided into rows."""

    def row_at(self, offset: int) -> int:
        """The row that a byte of the file belongs to."""


@dataclass(frozen=True)
class Recorded:
    """A file to compare with what is known of it."""

    path: Path
    content: Blocks
    remedy: str  # what to do when it is damaged
    layout: Layout | None = None  # to name rows instead of bytes

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.content.blocks) // 8

    @property
    def is_small(self) -> bool:
        """Whether a sample of it is all of it."""
        return len(self) <= SMALL_BLOCKS

    def open(self) -> BinaryIO:
        """The file to read, which stays the same when another is put in its place.

        Raises:
            ValueError: it is missing, of another length, or its checksums are not all there.
        """
        blocks = -(-self.content.bytes // self.content.block_bytes)
        if len(self) != blocks:
            raise ValueError(
                f"{self.path.parent} has {len(self)} checksums of {self.path.name}, not all {blocks}: {self.remedy}"
            )
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError as error:
            raise ValueError(f"{self.path} is missing: {self.remedy}") from error
        found = os.fstat(file.fileno()).st_size
        if found != self.content.bytes:
            file.close()
            raise ValueError(
                f"{self.path} is {found} bytes long, when it was written {self.content.bytes}: {self.remedy}"
            )
        return file

    def compare(self, file: BinaryIO, numbers: Sequence[int], read: Callable[[], object] = lambda: None) -> None:
        """Read these blocks, one at a time. `read` is called after each.

        Raises:
            ValueError: some are not as they were written, with their numbers, and rows or bytes.
            OSError: the file cannot be read.
        """
        checksums, damaged = from_text(self.content.blocks), []
        for number in numbers:
            file.seek(number * self.content.block_bytes)
            if zlib.crc32(file.read(self.content.block_bytes)) != checksums[number]:
                damaged.append(number)
            read()
        if damaged:
            raise ValueError(self._sentence(damaged, len(numbers)))

    def _sentence(self, damaged: list[int], read: int) -> str:
        of = f"{read}" if read == len(self) else f"the {read} that were read of {len(self)}"
        first, last = (number * self.content.block_bytes for number in (damaged[0], damaged[-1] + 1))
        if self.layout is not None:
            where = f"rows {self.layout.row_at(first)} to {self.layout.row_at(last)}"
        else:
            where = f"bytes {first} to {min(last, self.content.bytes)}"
        numbers = f"{', '.join(map(str, damaged[:5]))}{', ...' if len(damaged) > 5 else ''}"
        return (
            f"{self.path} is damaged: {len(damaged)} of {of} blocks do not fit their checksums (from 0: {numbers}; all "
            f"are in {where}): {self.remedy}"
        )


def choose_sample(blocks: int, share: range) -> list[int]:
    """Which of a share of a file's blocks to compare: all of a small file, else 1 % and at least one, others each time.

    They are drawn from the system's own generator, so that every choice that a seed decides stays as it is.
    """
    if blocks <= SMALL_BLOCKS:
        return list(share)
    wanted = max(1, round(SAMPLE_SHARE * len(share)))
    return sorted(random.SystemRandom().sample(share, min(wanted, len(share))))


def extend(checksums: list[int], position: int, content: memoryview, block_bytes: int = BLOCK_BYTES) -> None:
    """Take in what follows at this byte of a file: the last checksum goes on, and new blocks begin."""
    while len(content):
        in_block = position % block_bytes
        if in_block == 0:
            checksums.append(0)
        part, content = content[: block_bytes - in_block], content[block_bytes - in_block :]
        checksums[-1] = zlib.crc32(part, checksums[-1])
        position += len(part)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Blocks:
    """Write a file of these parts, of any lengths, onto the disk, and take its checksums.

    Raises:
        OSError: it cannot be written.
    """
    checksums: list[int] = []
    position = 0
    with open(path, "wb") as file:
        for part in parts:
            whole = memoryview(part)
            for start in range(0, len(whole), CHUNK):
                content = whole[start : start + CHUNK]
                extend(checksums, position, content)
                file.write(content)
                position += len(content)
        file.flush()
        os.fsync(file.fileno())
    return Blocks(position, BLOCK_BYTES, as_text(checksums))


def read_file(path: Path) -> Blocks:
    """The checksums of a file that is there."""
    checksums: list[int] = []
    position = 0
    for content in chunks(path):
        extend(checksums, position, memoryview(content))
        position += len(content)
    return Blocks(position, BLOCK_BYTES, as_text(checksums))


def chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, part by part."""
    with open(path, "rb") as file:
        while content := file.read(CHUNK):
            yield content


def as_text(checksums: Iterable[int]) -> str:
    """Checksums as `Blocks.blocks` has them."""
    return "".join(f"{checksum:08x}" for checksum in checksums)


def from_text(blocks: str) -> list[int]:
    """The reverse of `as_text`."""
    return [int(blocks[i : i + 8], 16) for i in range(0, len(blocks), 8)]


def of_fields(fields: dict[str, Any]) -> str:
    """A checksum of what goes into a JSON file, for the file itself to hold."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
