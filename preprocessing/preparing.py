"""Shared by the prepare_*.py scripts: fetch the original files, write the prepared ones, keep a record of them."""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flags
import packages
from atlas.files.jsonl import DataError, decode, replacing
from fetch import Download, digest, readable, set_aside
from sources import PackageFile

Content = Iterable[dict | str] | Path  # rows of jsonl, lines of text, or a finished file that is moved


def make_parser(document: str, originals: Sequence[str | PackageFile]) -> argparse.ArgumentParser:
    """The flags of a script; `document` is its docstring, `originals` are the files that it reads."""
    parser = argparse.ArgumentParser(description=document.split("\n")[0])
    names = ", ".join(map(file_name, originals))
    parser.add_argument("--base_url", type=flags.base_url, help=f"directory of a mirror with {names}")
    parser.add_argument("--keep_downloads", action="store_true", help="leave them in {output_directory}/downloads")
    flags.add_flags(parser)
    return parser


def run(
    name: str,
    arguments: argparse.Namespace,
    originals: Sequence[str | PackageFile],
    prepare: Callable[[dict[str, Path]], Iterator[tuple[str, Content]]],
    **settings: Any,
) -> None:
    """Write the files that `prepare` yields, unless all of them exist and are unchanged.

    `prepare` is given the paths of the originals by name, and yields paths below the output directory with what is to
    be in them.
    The record `.{name}.json` has the `settings` and the SHA-256 of every file that was written.
    """
    output, record = arguments.output_directory, arguments.output_directory / f".{name}.json"
    with flags.exit_on_user_error():
        before = read_record(record)
        if (
            before["settings"] == settings
            and before["files"]
            and all(
                (output / file).is_file() and digest(output / file) == sha256
                for file, sha256 in before["files"].items()
            )
        ):
            print(f"{output}: the {len(before['files'])} files of {name} exist and are unchanged")
            return
        downloads = fetch_originals(arguments, originals)
        written = {}
        for file, content in prepare({download.target.name: download.target for download in downloads}):
            written[file] = write(output / file, content, before["files"].get(file))
        with replacing(record) as beside:
            beside.write_text(json.dumps({"settings": settings, "files": written}, indent=1), encoding="utf-8")
        if not arguments.keep_downloads:
            for download in downloads:
                download.target.unlink()
            with contextlib.suppress(OSError):  # other files are in it
                downloads[0].target.parent.rmdir()


def fetch_originals(arguments: argparse.Namespace, originals: Sequence[str | PackageFile]) -> list[Download]:
    """Fetch the originals into `{output_directory}/downloads/`."""
    checksums, fetcher = flags.Checksums(arguments.checksums), flags.fetcher(arguments)
    downloads = []
    for original in originals:
        name = file_name(original)
        target = arguments.output_directory / "downloads" / name
        sha256, address = checksums.of(name), f"{arguments.base_url}/{name}"
        if isinstance(original, PackageFile):
            sha256 = sha256 or original.sha256
            if not arguments.base_url and not (target.is_file() and digest(target) == sha256):
                address = packages.find(original.package, name, sha256, fetcher)
        elif not arguments.base_url:
            address = original
        downloads.append(Download(address, target, sha256))
    fetcher.fetch(downloads)
    return downloads


def file_name(original: str | PackageFile) -> str:
    return original.name if isinstance(original, PackageFile) else original.rpartition("/")[2]


def read_record(path: Path) -> dict[str, Any]:
    """The record of an earlier run; an empty one if there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and isinstance(record.get("files"), dict) and "settings" in record:
            return record
    return {"settings": None, "files": {}}


def write(path: Path, content: Content, ours: str | None) -> str:
    """Write rows as jsonl, or lines as they are, or move a finished file to this path; returns the SHA-256.

    A file with another SHA-256 is renamed first, unless that is `ours`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        sha256 = digest(content)
        set_aside(path, ours, sha256)
        os.replace(content, path)
        print(f"{path}: {readable(path.stat().st_size)}")
        return sha256
    checksum, lines = hashlib.sha256(), 0
    with replacing(path) as beside, open(beside, "wb") as file:
        for lines, row in enumerate(content, 1):
            try:
                text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
                line = (text + "\n").encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{path}, line {lines}: half of a surrogate pair in a string") from error
            checksum.update(line)
            file.write(line)
        set_aside(path, ours, checksum.hexdigest())
    print(f"{path}: {lines} lines")
    return checksum.hexdigest()


def read_jsonl(path: Path, parse: Callable[[dict], dict]) -> list[dict]:
    """All rows of a file, read into memory. Raises: DataError that names file and line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    rows.append(parse(decode(line)))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    return rows


def pick(rows: Sequence[dict], positions: Sequence[int], source: str) -> list[dict]:
    """The rows at these positions, in this order. Raises: DataError if there are not enough rows."""
    if positions and not 0 <= min(positions) <= max(positions) < len(rows):
        raise DataError(
            f"{source} has {len(rows):,} rows, but rows {min(positions):,} to {max(positions):,} are needed: it is not "
            "the file that was published"
        )
    return [rows[position] for position in positions]


def string(record: dict, field: str) -> str:
    """A field that is a string and not blank. Raises: ValueError."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{field}` must be a string that is not empty, found {value!r:.40}")
    return value


def strings(record: dict, field: str) -> list[str]:
    """A field that is a list of strings, without those that are blank. Raises: ValueError."""
    value = record.get(field)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"`{field}` must be a list of strings, found {value!r:.40}")
    return [item for item in value if item.strip()]
