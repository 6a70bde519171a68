"""The part of a file that has been downloaded so far, and the version of the file that it belongs to."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from atlas.files.disk import writing
from atlas.files.jsonl import replacing
from atlas.files.lock import open_locked


class FetchError(Exception):
    """A file cannot be fetched. The message is one sentence and says what to do if anything can be done."""


class Version(NamedTuple):
    """A version of a file on a server: its size in bytes, and a validator that identifies its content, if known."""

    size: int | None
    validator: str | None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> "Version":
        """The version in the headers of a response."""
        length, etag = headers.get("Content-Length") or "", headers.get("ETag") or ""
        # RFC 9110, 13.1.5: a weak ETag (W/"...") does not identify the exact bytes.
        validator = etag if etag.startswith('"') else headers.get("Last-Modified")
        return cls(int(length) if length.isdecimal() and len(length) < 20 else None, validator)


class PartialFile:
    """`{target}.part`, which is locked by one process at a time, and `{target}.part.json`, which names its version.

    It contains the beginning of `version`. Unless it is empty, it is kept when the process ends, so that the next one
    can resume. `progress` is called with the number of bytes added (negative if bytes are discarded).

    Raises: FetchError if another process has locked it.
    """

    def __init__(self, target: Path, progress: Callable[[int], object]):
        self.target, self.progress = target, progress
        self.path = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")
        if (file := open_locked(self.path)) is None:
            raise FetchError(f"{self.path}: another process is fetching this file; wait for it, or stop it")
        self._file = os.fdopen(file, "r+b")
        self.size = self._file.seek(0, os.SEEK_END)
        self.version = self._read_note()
        self.resumed = self.size > 0
        progress(self.size)

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.size == 0 and not self._file.closed:
            self.discard()
        with writing(self.path):
            self._file.close()

    @property
    def complete(self) -> bool:
        return self.version is not None and self.size == self.version.size

    def begin(self, version: Version) -> None:
        """Empty the file, to be filled with this version."""
        self.clear()
        with replacing(self.note) as beside:
            beside.write_text(json.dumps(version._asdict()), encoding="utf-8")
        self.version = version

    def append(self, chunk: bytes) -> None:
        with writing(self.path, self.version.size if self.version else None):
            self._file.write(chunk)
        self.size += len(chunk)
        self.progress(len(chunk))

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.progress(-self.size)
        self.size, self.version, self.resumed = 0, None, False

    def discard(self) -> None:
        self.clear()
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def content(self) -> BinaryIO:
        """The file, positioned at its beginning, to be read."""
        self._file.seek(0)
        return self._file

    def finish(self) -> None:
        """Rename the complete file to `target`."""
        with writing(self.path, self.size):
            self._file.flush()
            os.fsync(self._file.fileno())
        self.note.unlink(missing_ok=True)
        os.replace(self.path, self.target)
        self._file.close()

    def _read_note(self) -> Version | None:
        try:
            note = json.loads(self.note.read_bytes())
            return Version(note["size"], note["validator"])
        except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: the version is unknown
            return None
