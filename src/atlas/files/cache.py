"""What is derived from a user's file and kept for the next run, such as its unpacked text and the offsets of its lines.

An entry lies in `.atlas-cache` beside the file or, where nothing can be written, in `$XDG_CACHE_HOME/atlas`. Its name
holds a fingerprint of the file and one of itself: entries of a changed file, and damaged ones, are made again.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from atlas.files.lock import temporary

FOLDER = ".atlas-cache"
BLOCKS, BLOCK_BYTES = 64, 4096  # that a fingerprint reads: a file of up to 256 KiB is read as a whole


def fingerprint(file: BinaryIO) -> str:
    """16 hexadecimal digits: a hash of the size and of blocks spread over the file, the first and the last included."""
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    for block in range(BLOCKS):
        file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1) if size > BLOCKS * BLOCK_BYTES else block * BLOCK_BYTES)
        digest.update(file.read(BLOCK_BYTES))
    file.seek(0)
    return digest.hexdigest()[:16]


def kept(source: Path, file: BinaryIO, kind: str, facts: str = "") -> Path | None:
    """The entry that `cached` would not have to make, if there is one. Arguments: as there."""
    key = _key(file, facts)
    for folder, name in folders_for(source):
        for entry, of_file, of_entry in _entries(folder, name, kind):
            if of_file == key and _fingerprint_at(entry) == of_entry:
                return entry
    return None


def cached(source: Path, file: BinaryIO, kind: str, write: Callable[[Path], object], facts: str = "") -> Path:
    """The entry that `write(path)` makes of a file, unless it is there already; entries of other versions are removed.

    Several processes may do so at the same time: entries are renamed when they are whole, and never changed.

    Args:
        source: the path of the file, or of the one that it was unpacked from.
        file: the file itself, open.
        kind: what is derived, as the end of a name.
        facts: what an entry depends on besides the file.

    Raises:
        OSError: an entry can be written neither beside the file nor in the user's cache; the message says why.
    """
    if entry := kept(source, file, kind, facts):
        return entry
    key, failures = _key(file, facts), []
    places = folders_for(source)
    for folder, name in places:
        try:
            entry = _write(folder, name, key, kind, write)
        except OSError as error:
            failures.append(f"{folder}: {error.strerror or error}")
            continue
        _remove_others(places, kind, entry)
        return entry
    raise OSError("; ".join(failures))


def forget(source: Path) -> None:
    """Remove what is kept beside a file, or half of it, and the folder if nothing else is in it."""
    folder, name = source.parent / FOLDER, re.escape(source.name)
    with contextlib.suppress(OSError):
        for entry in folder.glob("*"):
            if re.fullmatch(rf"{name}\.[0-9a-f]{{16}}-[0-9a-f]{{16}}\..+|\.{name}\..+\.part", entry.name):
                entry.unlink()
        folder.rmdir()


def _key(file: BinaryIO, facts: str) -> str:
    return hashlib.sha256((fingerprint(file) + facts).encode()).hexdigest()[:16] if facts else fingerprint(file)


def users_state(name: str) -> Path:
    """Where a program keeps what its user would miss, such as a history. Raises: RuntimeError without a home."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "atlas" / name


def folders_for(source: Path) -> list[tuple[Path, str]]:
    """The folders in which an entry may be, the best one first, each with how its name begins there."""
    source = source.absolute()
    places = [(source.parent / FOLDER, source.name)]
    with contextlib.suppress(RuntimeError):  # nobody knows where the home directory is
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "atlas"
        path = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
        places.append((home, f"{path}-{source.name}"))
    return places


def _entries(folder: Path, name: str, kind: str) -> Iterator[tuple[Path, str, str]]:
    """The entries of a file, each with the fingerprints of the file and of itself when it was made."""
    pattern = re.compile(rf"{re.escape(name)}\.([0-9a-f]{{16}})-([0-9a-f]{{16}})\.{re.escape(kind)}")
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(folder)):
            if match := pattern.fullmatch(entry):
                yield folder / entry, match[1], match[2]


def _fingerprint_at(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return fingerprint(file)
    except OSError:
        return None


def _write(folder: Path, name: str, key: str, kind: str, write: Callable[[Path], object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with temporary(folder / f"{name}.{kind}") as beside:
            write(beside)
            with open(beside, "r+b") as file:
                os.fsync(file.fileno())
                entry = folder / f"{name}.{key}-{fingerprint(file)}.{kind}"
            os.replace(beside, entry)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
    return entry


def _remove_others(places: list[tuple[Path, str]], kind: str, kept: Path) -> None:
    for folder, name in places:
        for entry, *_ in _entries(folder, name, kind):
            if entry != kept:
                with contextlib.suppress(OSError):
                    entry.unlink()
