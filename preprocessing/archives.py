"""Read files out of a tar archive from an untrusted source. Nothing is ever unpacked to disk."""

import gzip
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from atlas.files.jsonl import DataError

MEMBERS_LIMIT = 10_000
HEADER_LIMIT = 1 << 20  # bytes of one member's headers, which tarfile reads at once
CHUNK = 1 << 20


class Metered:
    """A stream that raises ValueError when more than its allowance is read."""

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
    """Read the chosen files of a .tar or .tar.gz: a result for each name.

    All members are checked, chosen or not. They must be plain files and directories with relative names, each name
    once, at most MEMBERS_LIMIT of them and at most `unpacked_limit` bytes in total.

    Args:
        choose: returns the function that reads the file of this name, or None to skip it.

    Raises: DataError with the archive, the member and what is wrong with it, also for a ValueError of a function.
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
            # "r|": one pass, forward only. The encoding of the names is fixed, so that the locale does not matter.
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
    """Raises: ValueError if this member has no place in an archive of data."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise ValueError("this name points outside the archive; nothing was unpacked")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError("a link, a device or otherwise not a plain file; nothing was unpacked")
    if member.isreg() and name in seen:
        raise ValueError("the archive contains it twice; nothing was unpacked")
    if len(seen) >= MEMBERS_LIMIT:
        raise ValueError(f"more than {MEMBERS_LIMIT:,} files; nothing was unpacked")
    if member.size < 0 or total > unpacked_limit:
        raise ValueError(f"with this file, more than {unpacked_limit:,} bytes; nothing was unpacked")
