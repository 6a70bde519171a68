"""Writing where the disk may be full, with the permissions that the umask gives."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

# No space, a quota, a limit on the size of files. Libraries written in other languages only pass the words on.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WORDS = tuple(os.strerror(number) for number in _FULL)


class FullDiskError(OSError):
    """A file cannot be written for want of space. The message is one sentence that names it."""


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None, beside: Path | None = None) -> Iterator[None]:
    """Name the file, the bytes needed and those free, if the block fails for want of space; it removes nothing.

    Args:
        needed: the size that the file is to have, if it is known.
        beside: where it is written first.

    Raises:
        FullDiskError: in place of whatever error of any library says so.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:  # libraries have classes of their own
        if not is_full(error):
            raise
        reason = next((words for words in _WORDS if words in str(error)), "no space")
        free = shutil.disk_usage(existing_directory(path)).free
        raise FullDiskError(
            f"{path} cannot be written ({reason}; {_needed(needed, beside or path)}, {free:,} are free): make room, or "
            "choose another place"
        ) from error


def is_full(error: Exception) -> bool:
    """Whether an error, of whatever class, says that there is no space."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _WORDS)


def _needed(needed: int | None, written: Path) -> str:
    if needed is not None:
        return f"{needed:,} bytes are needed"
    return f"more than {written.stat().st_size if written.is_file() else 0:,} bytes are needed"


def existing_directory(path: Path) -> Path:
    """The innermost directory of a path that is there: tells the file system of what is still to be written."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


@contextlib.contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Let a library write the file that makes it readable for its owner alone, and give it those of other files."""
    path.touch()  # as the umask says
    permissions = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(permissions)
