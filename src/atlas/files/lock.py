"""Locks in files, which end with the process that holds them, however it ends.

Where a file system has no locks, nothing is locked: a warning says so once, and everything else works.
"""

import contextlib
import glob
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from atlas.files.disk import writing

log = logging.getLogger("atlas")
_held: dict[Path, int] = {}  # the locks of this process, and their descriptors
_warned = False


@contextlib.contextmanager
def holding(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock `path` during the block, unless this process holds it already.

    The file says who holds it and is removed at the end. Directories are made where they are missing, and removed again
    if they stay empty. A killed process leaves the file but not the lock.

    Raises:
        ValueError: another process holds it: `{what} (process, host, since when): {remedy}`.
        OSError: the file cannot be written.
    """
    path = path.absolute()
    if path in _held:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked_file(path) as file:
            if file is None:
                raise ValueError(f"{what} ({_holder(path)}): {remedy}")
            if try_lock(file) is None:
                _warn_once(path)
            note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            with writing(path):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(note).encode() + b"\n", 0)
            yield
    finally:
        with contextlib.suppress(OSError):  # there are files in it
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to, which is removed after the block if it still has its name.

    What killed processes left there is removed first; that they are gone is known by their locks.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(OSError):
            _remove_leftover(leftover)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with _locked_file(beside):
        yield beside


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[int | None]:
    """`open_locked` during the block, and the file is removed after it; in a forked process neither of both."""
    file = open_locked(path)
    if file is None:
        yield None
        return
    _held[path] = file
    try:
        yield file
    finally:
        if path in _held:  # not in a forked process
            path.unlink(missing_ok=True)
            os.close(_held.pop(path))


def open_locked(path: Path) -> int | None:
    """A descriptor of the file, made if it is not there, and locked until it is closed; None if another one has it.

    Raises:
        OSError: it cannot be written, or is a symbolic link, which is not followed: somebody else may have put it here.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if try_lock(file) is False:
            os.close(file)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # whoever held it has removed or renamed it between the two calls


def try_lock(file: int) -> bool | None:
    """Lock a descriptor until it is closed. False: another process has locked it. None: there are no locks here."""
    try:
        import fcntl  # not on every system

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _remove_leftover(path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if try_lock(file):  # without locks nobody knows whether it is still written to
            path.unlink()
    finally:
        os.close(file)


def _warn_once(path: Path) -> None:
    global _warned
    if not _warned:
        log.warning("%s: this file system has no locks, so make sure that nobody else writes there", path.parent)
    _warned = True


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_bytes())
        return f"process {int(note['pid'])} on {note['host']}, since {note['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "which one is not known"


def _let_go() -> None:
    """In a forked process: the locks are its parent's, and must not outlive it."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
