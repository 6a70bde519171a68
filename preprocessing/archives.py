"""Read files out of a tar archive that somebody else made. Nothing is ever unpacked: no member becomes a file here."""

import gzip
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from atlas.files.jsonl import DataError

MEMBERS_LIMIT = 10_000
HEADER_LIMIT = 1 << 20  # bytes of one member's headers, which tarfile reads in one piece
CHUNK = 1 << 20


class Metered:
    """A stream that refuses to give more than its allowance."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.allowance = HEADER_LIMIT

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.allowance -= len(data)
        if self.allowance < 0:
            raise ValueError("more data than a file and its name can have")
        return data


def read_archive(
    archive: Path, choose: Callable[[PurePosixPath], Callable[[BinaryIO], Any] | None], unpacked_limit: int
) -> dict[PurePosixPath, Any]:
    """What the functions that `choose` gives for names (None: not wanted) make of the files in a .tar or .tar.gz.

    All members are checked, wanted or not: only files and directories with relative names inside the archive, each name
    once, at most MEMBERS_LIMIT of them and `unpacked_limit` bytes together.

    Raises: DataError with the archive, the member and what is wrong with it; a ValueError of a function becomes one.
    """
    results: dict[PurePosixPath, Any] = {}
    seen: set[PurePosixPath] = set()
    total = 0
    place = str(archive)
    try:
        with open(archive, "rb") as packed:
            compressed = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            metered = Metered(gzip.GzipFile(fileobj=packed) if compressed else packed)
            # "r|": one pass, forward only. A fixed encoding of the names, so that a locale changes nothing.
            with tarfile.open(fileobj=metered, mode="r|", encoding="utf-8") as tar:
                while member := tar.next():
                    name = PurePosixPath(member.name)
                    place = f"{archive}, {str(name)!r:.90}"
                    total += member.size
                    check_member(member, seen, total, unpacked_limit)
                    seen.add(name)
                    if member.isreg():
                        metered.allowance = member.size + HEADER_LIMIT
                        content = tar.extractfile(member)
                        if read := choose(name):
                            results[name] = read(content)
                        while content.read(CHUNK):
                            pass
                    place = str(archive)
                    metered.allowance = HEADER_LIMIT
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OverflowError, RecursionError) as error:
        raise DataError(f"{place}: damaged, or not a tar archive ({error}); remove it and fetch it again") from error
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    return results


def check_member(member: tarfile.TarInfo, seen: set[PurePosixPath], total: int, unpacked_limit: int) -> None:
    """Raises: ValueError if no honest archive of data has such a member."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise ValueError("this name leads out of the archive; nothing was unpacked")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError("a link, a device or otherwise no plain file; nothing was unpacked")
    if member.isreg() and name in seen:
        raise ValueError("there twice; nothing was unpacked")
    if len(seen) >= MEMBERS_LIMIT:
        raise ValueError(f"more than {MEMBERS_LIMIT:,} files; nothing was unpacked")
    if member.size < 0 or total > unpacked_limit:
        raise ValueError(f"with this file more than {unpacked_limit:,} bytes; nothing was unpacked")
