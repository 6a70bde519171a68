"""What the command lines of all scripts that fetch have in common."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from atlas.files.jsonl import DataError
from fetch import Fetcher, check_address
from partial import FetchError


class Checksums:
    """The SHA-256 of files by name, from lines as `sha256sum` writes them. Without a file nothing is known.

    Raises: DataError if a line is not of that form.
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
        """None if there is no list. Raises: DataError if there is one and the file is not on it."""
        if self.path and name not in self._by_name:
            raise DataError(f"{self.path}: no line for {name}; add it, or fetch without --checksums")
        return self._by_name.get(name)


def base_url(text: str) -> str:
    """An argparse type: the address of a directory, without a slash at its end."""
    try:
        return check_address(text).rstrip("/")
    except FetchError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(smallest: float, kind: type) -> Callable[[str], float]:
    """An argparse type: a number of a kind, not below the smallest."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return value

    return number


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all scripts that fetch have in common."""
    parser.add_argument("--output_directory", type=Path, default=Path("data"), help="default: data")
    parser.add_argument(
        "--checksums", type=Path, help="SHA-256 of the files, as sha256sum writes them; all are checked"
    )
    parser.add_argument("--parallel", type=at_least(1, int), default=4, help="files at a time (default: 4)")
    parser.add_argument(
        "--retries", type=at_least(0, int), default=5, help="attempts after one that brought nothing (default: 5)"
    )
    parser.add_argument("--retry_wait", type=at_least(0, float), default=1.0, help="seconds, doubled each time (1.0)")
    parser.add_argument(
        "--timeout", type=at_least(0.01, float), default=60.0, help="a server's longest silence, s (60)"
    )


def fetcher(arguments: argparse.Namespace) -> Fetcher:
    return Fetcher(arguments.parallel, arguments.retries, arguments.retry_wait, arguments.timeout)


@contextlib.contextmanager
def exit_on_user_error(stopped: str = "the same command goes on") -> Iterator[None]:
    """End the script with one sentence and status 1 if something is wrong with files, servers or data.

    `stopped` is what the user is told after Ctrl-C.
    """
    try:
        yield
    except (FetchError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary end would wait for threads that wait for silent servers
