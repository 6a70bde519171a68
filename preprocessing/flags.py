"""Flags and error handling shared by the scripts that download files."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from atlas.config import sentence
from atlas.files.jsonl import DataError
from fetch import Fetcher, check_address
from partial import FetchError


class Checksums:
    """SHA-256 checksums by file name, from lines in the format of `sha256sum`; none without a file.

    Raises: DataError if a line has another format.
    """

    def __init__(self, path: Path | None):
        self.path, self._by_name = path, {}
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines() if path else (), 1
        ):
            checksum, _, name = line.strip().partition(" ")
            name = os.path.normpath(name.strip().removeprefix("*")) if name.strip() else ""
            if not line.strip() or line.startswith("#"):
                continue
            if len(checksum) != 64 or set(checksum.lower()) - set("0123456789abcdef") or not name:
                raise DataError(f"{path}, line {number}: expected `SHA-256  file` as sha256sum writes it: {line!r:.90}")
            self._by_name[name] = checksum.lower()

    def of(self, name: str) -> str | None:
        """The checksum, or None if there is no list. Raises: DataError if there is a list without this file."""
        if self.path and name not in self._by_name:
            raise DataError(f"{self.path}: no line for {name}; add it, or fetch without --checksums")
        return self._by_name.get(name)


def base_url(text: str) -> str:
    """An argparse type: the address of a directory, without a trailing slash."""
    try:
        return check_address(text).rstrip("/")
    except FetchError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(smallest: float, kind: type) -> Callable[[str], float]:
    """An argparse type: a number of this kind that is not smaller than `smallest`."""

    def number(text: str) -> float:
        value = kind(text)
        if not smallest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no number of at least {smallest}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags shared by all scripts that download files."""
    parser.add_argument("--output_directory", type=Path, default=Path("data"), help="default: data")
    parser.add_argument(
        "--checksums", type=Path, help="SHA-256 of the files, as sha256sum writes them; all are checked"
    )
    parser.add_argument("--parallel", type=at_least(1, int), default=4, help="files at a time (default: 4)")
    parser.add_argument(
        "--retries", type=at_least(0, int), default=5, help="retries in a row without new bytes (default: 5)"
    )
    parser.add_argument(
        "--retry_wait", type=at_least(0, float), default=1.0, help="seconds before a retry, doubled each time (1.0)"
    )
    parser.add_argument(
        "--timeout", type=at_least(0.01, float), default=60.0, help="seconds that a server may send nothing (60)"
    )


def fetcher(arguments: argparse.Namespace) -> Fetcher:
    return Fetcher(arguments.parallel, arguments.retries, arguments.retry_wait, arguments.timeout)


@contextlib.contextmanager
def exit_on_user_error(stopped: str = "run the same command again to resume") -> Iterator[None]:
    """End the script with one sentence and status 1 if something is wrong with files, servers or data.

    `stopped` is the message printed after Ctrl-C.
    """
    try:
        yield
    except (FetchError, DataError, OSError) as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary exit would wait for threads, which may wait for a server
