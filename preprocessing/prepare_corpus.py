"""Split your own documents into passages of about 100 words.

    python preprocessing/prepare_corpus.py my_documents --output my_corpus.jsonl
    python preprocessing/prepare_corpus.py articles.csv --output my_corpus.jsonl

A source is a folder, which is searched recursively for .txt, .md, .html, .docx and .pdf files; or a single such file;
or a table (.csv, .tsv) with a header that names its columns: `text`, and optionally `id`, `title` and `section`. Lines
of the output have `id`, `title`, `section` and `text`. An id is the file's path in the folder (or the row's `id`, or
its number, from 1), a hyphen, and the number of the passage in the document, from 0. The title is the first heading if
all others are below it, else that of the page, the document's properties or the front matter, else the file's name.
Other headings become sections. Hidden files and folders are left out, and so are symbolic links that lead out of the
folder, and links to folders; --follow_links reads what they lead to as well. Words are separated by spaces; in scripts
without spaces (Chinese, Japanese, Thai, Khmer, Lao, Burmese, Tibetan) every character counts as a word. At the end
stands what was left out, by kind and name.
"""

import argparse
import csv
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from atlas.files.jsonl import DataError, open_existing
from documents import FORMATS, UnreadableFile, missing_packages, read_document
from flags import exit_on_user_error
from splitting import Section, add_words_flag, blocks_of, passages_of, with_line_feeds, writing

COLUMNS = ("id", "title", "section", "text")
TABLES = {".csv": ",", ".tsv": "\t"}
SUPPORTED = ", ".join([*FORMATS, *TABLES])
MOST_NAMES = 10  # of each kind in the report


class Document(NamedTuple):
    id: str
    title: str
    sections: list[Section]


class LeftOut(defaultdict[str, list[str]]):
    """What does not get into the corpus: names by kind."""

    def __init__(self) -> None:
        super().__init__(list)

    def summary(self) -> str:
        numbers = ", ".join(f"{kind} {len(names):,}" for kind, names in sorted(self.items()) if names)
        return f"left out: {numbers or 'nothing'}"

    def report(self, most_names: int | None) -> str:
        """The summary, and below it the names of each kind, at most this many."""
        lines = [self.summary()]
        for kind, names in sorted(self.items()):
            shown = names[:most_names]
            more = f" and {len(names) - len(shown):,} more (--list_left_out names all)"
            if names:
                lines.append(f"    {kind}: {', '.join(shown)}{more if shown != names else ''}")
        return "\n".join(lines).encode(errors="backslashreplace").decode()  # names of files need not be UTF-8


def read_file(path: Path, identifier: str, left_out: LeftOut) -> Document:
    """Raises: UnreadableFile if the file is not UTF-8, or its library cannot read it."""
    try:
        outline = read_document(path.read_bytes(), path.suffix.lower())
    except UnreadableFile:
        raise
    except ValueError as error:
        raise UnreadableFile("files that are not UTF-8", f"{error}; save it as UTF-8") from error
    for kind, detail in outline.left_out:
        left_out[kind].append(f"{identifier}: {detail}")
    sections = outline.sections()
    return Document(identifier, outline.title or path.stem, sections)


def find_files(folder: Path, follow_links: bool, left_out: LeftOut) -> list[Path]:
    """All files of known kinds in the folder and its subfolders, sorted by path."""

    def fail(error: OSError) -> None:
        raise error

    def kind_left_out(path: Path, is_folder: bool) -> str:
        if path.name.startswith("."):
            return "hidden files and folders"
        if path.is_symlink():
            is_inside = path.is_file() and path.resolve().is_relative_to(inside)
            if not path.exists() or not (follow_links or is_inside):
                return "symbolic links"
        if is_folder or (path.suffix.lower() in FORMATS and path.is_file()):
            return ""
        hint = " (give a table by itself)" if path.suffix.lower() in TABLES else ""
        return f"{path.suffix.lower()} files{hint}" if path.suffix else "files without a suffix"

    def kept(place: Path, names: list[str], is_folder: bool) -> list[str]:
        kinds = {name: kind_left_out(place / name, is_folder) for name in sorted(names)}
        for name, kind in kinds.items():
            if kind:
                left_out[kind].append((place / name).relative_to(folder).as_posix() + "/" * is_folder)
        return [name for name, kind in kinds.items() if not kind]

    inside, seen, files = folder.resolve(), set(), []
    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=follow_links):
        place = Path(directory)
        if place.resolve() in seen:  # a link to a folder that it is in, or that has been read
            left_out["folders read under another name"].append(f"{place.relative_to(folder).as_posix()}/")
            folders.clear()
            continue
        seen.add(place.resolve())
        folders[:] = kept(place, folders, is_folder=True)
        files += [place / name for name in kept(place, names, is_folder=False)]
    return sorted(files)


def read_table(path: Path, left_out: LeftOut) -> Iterator[Document]:
    """A document per row. Raises: DataError with file and line."""
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's limit of 128 KiB
    seen = set()
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=TABLES[path.suffix.lower()], strict=True)
        try:
            header = [name.strip().lower() for name in next(rows, [])]
            if "text" not in header:
                raise ValueError(
                    f"the first line must name the columns, including `text`; found {', '.join(header)!r:.90}"
                )
            if twice := [name for name in COLUMNS if header.count(name) > 1]:
                raise ValueError(f"two columns are called `{twice[0]}`; rename or remove one")
            left_out["columns"] += [name or "(without a name)" for name in header if name not in COLUMNS]
            for number, row in enumerate(filter(None, rows), 1):
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields, but the header has {len(header)} ({', '.join(header)})")
                record = dict(zip(header, row, strict=True))
                identifier = record.get("id", "").strip() or str(number)
                if identifier in seen:
                    raise ValueError(f"an earlier row has the same id, {identifier}")
                seen.add(identifier)
                section = Section(record.get("section", "").strip(), blocks_of(with_line_feeds(record["text"])))
                yield Document(identifier, record.get("title", "").strip(), [section])
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: not {path.suffix[1:]} ({error})") from error
        except ValueError as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}") from error
        finally:
            csv.field_size_limit(limit)


def check_packages(paths: list[Path]) -> None:
    """Raises: DataError if the package for a kind of file is not installed."""
    for suffix, number in Counter(path.suffix.lower() for path in paths).items():
        if missing := missing_packages(suffix):
            first = next(path for path in paths if path.suffix.lower() == suffix)
            names = " ".join(missing)
            raise DataError(f"{first}: reading {suffix} files ({number:,} here) needs {names}; pip install {names}")


def read_source(source: Path, left_out: LeftOut, follow_links: bool = False) -> Iterator[Document]:
    """All documents; which files there are is known when this returns. Raises: FileNotFoundError, DataError."""
    if source.is_dir():
        files = find_files(source, follow_links, left_out)
        check_packages(files)
        return read_files(source, files, left_out)
    open_existing(source).close()
    if source.suffix.lower() in TABLES:
        return iter(tqdm(read_table(source, left_out), "Documents", unit=" rows", disable=None))
    if source.suffix.lower() not in FORMATS:
        raise DataError(f"{source}: neither a folder nor one of {SUPPORTED}")
    check_packages([source])
    try:
        return iter([read_file(source, source.name, left_out)])
    except UnreadableFile as error:
        raise DataError(f"{source}: {error}") from error


def read_files(folder: Path, files: list[Path], left_out: LeftOut) -> Iterator[Document]:
    """The documents in files of a folder, without those that cannot be read."""
    for path in tqdm(files, "Documents", unit=" files", disable=None):
        identifier = path.relative_to(folder).as_posix()
        try:
            yield read_file(path, identifier, left_out)
        except UnreadableFile as error:
            tqdm.write(f"left out: {path}: {error}", file=sys.stderr)
            left_out[error.kind].append(identifier)


def prepare(
    source: Path, output: Path, words: int, follow_links: bool = False, most_names: int | None = MOST_NAMES
) -> None:
    """Write the passages and print how many there are. Raises: FileNotFoundError, DataError."""
    left_out = LeftOut()
    documents = total = 0
    found = read_source(source, left_out, follow_links)
    with writing(output) as write:
        for document in found:
            passages = passages_of(document.id, document.title, document.sections, words)
            if not passages:
                left_out["empty documents"].append(document.id)
            documents += bool(passages)
            total += len(passages)
            for passage in passages:
                write(passage)
        if not total:
            raise DataError(f"{source}: contains no text (supported: {SUPPORTED}); {left_out.summary()}")
    print(f"{output}: {total:,} passages of {documents:,} documents")
    print(left_out.report(most_names))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder, a document, or a .csv or .tsv")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .jsonl to write")
    parser.add_argument(
        "--follow_links", action="store_true", help="follow symbolic links out of the folder, and to folders"
    )
    parser.add_argument(
        "--list_left_out", action="store_true", help=f"name all that was left out, not {MOST_NAMES} of each kind"
    )
    add_words_flag(parser)
    arguments = parser.parse_args()
    if arguments.output.suffix.lower() in (*FORMATS, *TABLES):
        parser.error(f"--output {arguments.output} would be one of the documents: give a name that ends in .jsonl")
    with exit_on_user_error(stopped="nothing was written"):
        most_names = None if arguments.list_left_out else MOST_NAMES
        prepare(arguments.source, arguments.output, arguments.words, arguments.follow_links, most_names)


if __name__ == "__main__":
    main()
