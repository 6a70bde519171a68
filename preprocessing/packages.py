"""Files of packages on PyPI: where pip's index has them, and what a wheel holds. Nothing is installed or run."""

import html.parser
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin

from atlas.files.jsonl import DataError
from fetch import MIRROR, Fetcher
from partial import FetchError


class Links(html.parser.HTMLParser):
    """The links of a page of an index, which has one for each file (PEP 503)."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append(dict(attrs).get("href") or "")


def index_address() -> str:
    """The index that pip takes packages from, after its files of settings and variables. Raises: FetchError."""
    wide = {**os.environ, "COLUMNS": "10000"}  # so that pip breaks no line
    told = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], env=wide, capture_output=True, text=True)
    address = re.search(r"--index-url.*?\(default (\S+)\)", told.stdout)
    if not address:
        raise FetchError(f"pip, which knows where PyPI is, does not say it; install pip, or give a mirror ({MIRROR})")
    if "****" in address[1]:
        raise FetchError(f"pip's index {address[1]} needs a password, which is not known here; {MIRROR}")
    return address[1].rstrip("/")


def find(package: str, name: str, sha256: str | None, fetcher: Fetcher) -> str:
    """The address of a file of a package. Raises: FetchError; also if the index says that it has another SHA-256."""
    page, content = fetcher.read(f"{index_address()}/{package}/")
    for link in Links(content.decode("utf-8", "replace")).found:
        address, _, fragment = urljoin(page, link).partition("#")
        if unquote(address.rpartition("/")[2]) == name:
            listed = fragment.removeprefix("sha256=")
            if sha256 and fragment.startswith("sha256=") and listed != sha256:
                raise FetchError(f"{page}: {name} has the SHA-256 {listed} instead of {sha256}; {MIRROR}")
            return address
    raise FetchError(f"{page}: the index has no {name}; {MIRROR}")


def read_wheel(
    wheel: Path | BinaryIO, choose: Callable[[str], Callable[[BinaryIO], Any] | None], unpacked_limit: int
) -> dict[str, Any]:
    """Read the chosen files of a wheel, or of another zip archive: a result for each name.

    Args:
        choose: returns the function that reads the file of this name, or None to skip it.
        unpacked_limit: most bytes that the chosen files may have in total.

    Raises: DataError with the archive and what is wrong with it, also for a ValueError of a function.
    """
    place = wheel if isinstance(wheel, Path) else getattr(wheel, "name", "an archive within an archive")
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = [(member, read) for member in archive.infolist() if (read := choose(member.filename))]
            if sum(member.file_size for member, _ in chosen) > unpacked_limit:
                raise ValueError(f"more than {unpacked_limit:,} bytes in the files that are needed")
            results = {}
            for member, read in chosen:
                with archive.open(member) as content:
                    results[member.filename] = read(content)
            return results
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{place}: damaged, or not a zip archive ({error}); remove it and fetch it again") from error
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
