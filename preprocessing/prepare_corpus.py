"""Split your own documents into passages of about 100 words.

    python preprocessing/prepare_corpus.py my_documents --output my_corpus.jsonl
    python preprocessing/prepare_corpus.py articles.csv --output my_corpus.jsonl

A source is a folder, which is searched recursively for .txt, .md and .html files; or a single such file; or a table
(.csv, .tsv) with a header that names its columns: `text`, and optionally `id`, `title` and `section`. Lines of the
output have `id`, `title`, `section` and `text`. An id is the file's path in the folder (or the row's `id`, or its
number, from 1), a hyphen, and the number of the passage in the document, from 0. The title is the first heading if all
others are below it, else that of the HTML page or the front matter, else the file's name. Other headings become
sections. Hidden files and folders are ignored, and so are symbolic links that lead out of the folder, and links to
folders; --follow_links reads what they lead to as well. Words are separated by spaces.
"""

import argparse
import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from tqdm import tqdm

from atlas.files.jsonl import DataError, decode_text, open_existing
from flags import exit_on_user_error
from splitting import Section, add_words_flag, blocks_of, heading_path, passages_of, writing

FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|$)", re.DOTALL)


class Document(NamedTuple):
    id: str
    title: str
    sections: list[Section]


class Outline:
    """A document while it is read: headings, and the text below each."""

    def __init__(self) -> None:
        self.title = ""
        self.parts: list[tuple[int, str, list[str]]] = [(0, "", [])]  # level and text of a heading, text below it

    def heading(self, level: int, text: str) -> None:
        if text := " ".join(text.split()):
            self.parts.append((level, text, []))

    def text(self, text: str) -> None:
        self.parts[-1][2].append(text)

    def document(self, identifier: str, name: str) -> Document:
        """The finished document; `name` is its title if it has no other."""
        parts = [(level, heading, blocks_of("".join(texts))) for level, heading, texts in self.parts]
        if len(parts) > 1 and all(parts[1][0] < level for level, _, _ in parts[2:]):
            self.title = parts[1][1]
        above: list[tuple[int, str]] = []
        sections = []
        for level, heading, blocks in parts:
            # A heading that repeats the title is not a section.
            path = heading_path(above, level, "" if heading == self.title else heading)
            if blocks:
                sections.append(Section(path, blocks))
        return Document(identifier, self.title or name, sections)


class Page(HTMLParser):
    """Fills an outline from HTML, without scripts, styles and navigation; every block element starts a paragraph."""

    SKIPPED = re.compile("script|style|noscript|template|nav|svg|button|select|textarea|iframe|object")
    INLINE = re.compile(
        "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|img|ins|kbd|label|mark|q|s|samp|small|span|strike|"
        "strong|sub|sup|time|tt|u|var|wbr"
    )
    OPENING = {"br": "\n", "li": "\n* ", "td": " ", "th": " "}
    CLOSING = {"li": "\n", "td": " ", "th": " "}
    BESIDE_HEADINGS = re.compile("p|ul|ol|dl|table|pre|blockquote")  # an unclosed heading ends there

    def __init__(self, outline: Outline):
        super().__init__()
        self.outline = outline
        self.skipped: list[str] = []  # the open elements that are skipped
        self.captured: tuple[str, list[str]] | None = None  # the open title or heading, and its text

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self.SKIPPED.fullmatch(tag):
            self.skipped.append(tag)
        elif self.skipped:
            return
        elif re.fullmatch("title|h[1-6]", tag):
            self._end_capture()
            self.captured = (tag, [])
        elif not self.INLINE.fullmatch(tag):
            if self.BESIDE_HEADINGS.fullmatch(tag):
                self._end_capture()
            self._text(" " if self.captured else self.OPENING.get(tag, "\n\n"))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if not self.SKIPPED.fullmatch(tag):  # `<svg/>` is empty, but in `<div/>` HTML ignores the slash
            self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipped:
            del self.skipped[len(self.skipped) - 1 - self.skipped[::-1].index(tag) :]
        elif self.skipped:
            return
        elif self.captured and tag == self.captured[0]:
            self._end_capture()
        elif not self.INLINE.fullmatch(tag):
            self._text(" " if self.captured else self.CLOSING.get(tag, "\n\n"))

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self._text(re.sub(r"\s+", " ", data))  # line ends in HTML are spaces

    def close(self) -> None:
        super().close()
        self._end_capture()

    def _text(self, text: str) -> None:
        (self.captured[1].append if self.captured else self.outline.text)(text)

    def _end_capture(self) -> None:
        if self.captured:
            (tag, texts), self.captured = self.captured, None
            if tag == "title":
                self.outline.title = self.outline.title or " ".join("".join(texts).split())
            else:
                self.outline.heading(int(tag[1]), "".join(texts))


def read_markdown(text: str) -> Outline:
    """CommonMark with tables; `title:` in the front matter (between two lines `---` at the start) is the title."""
    title = ""
    if front := FRONT_MATTER.match(text):
        title = next((line[6:].strip(" \"'") for line in (front[1] or "").split("\n") if line.startswith("title:")), "")
        text = text[front.end() :]
    outline = read_html(MarkdownIt().enable("table").render(text))
    outline.title = outline.title or title
    return outline


def read_html(text: str) -> Outline:
    page = Page(Outline())
    page.feed(text)
    page.close()
    return page.outline


def read_text(text: str) -> Outline:
    outline = Outline()
    outline.text(text)
    return outline


READERS = {
    **dict.fromkeys((".txt", ".text"), read_text),
    **dict.fromkeys((".md", ".markdown"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
}
TABLES = {".csv": ",", ".tsv": "\t"}


def read_file(path: Path, identifier: str) -> Document:
    """Raises: DataError if the file is not UTF-8."""
    try:
        text = decode_text(path.read_bytes()).removeprefix("\ufeff")
    except ValueError as error:
        raise DataError(f"{path}: {error}; save it as UTF-8") from error
    outline = READERS[path.suffix.lower()](text.replace("\r\n", "\n").replace("\r", "\n"))
    return outline.document(identifier, path.stem)


def find_files(folder: Path, follow_links: bool, counts: Counter[str]) -> list[Path]:
    """All files in the folder and its subfolders that are not hidden, sorted by path; links left out are counted."""

    def fail(error: OSError) -> None:
        raise error

    def is_left_out(path: Path) -> bool:
        left_out = path.is_symlink() and not (
            follow_links or (path.is_file() and path.resolve().is_relative_to(inside))
        )
        if left_out or (path.is_symlink() and not path.exists()):
            counts["symbolic links"] += 1
            return True
        return False

    inside, seen, files = folder.resolve(), set(), []
    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=follow_links):
        place = Path(directory)
        if place.resolve() in seen:  # a link to a folder that it is in, or that has been read
            folders.clear()
            continue
        seen.add(place.resolve())
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and not is_left_out(place / name)]
        files += [place / name for name in names if not name.startswith(".") and not is_left_out(place / name)]
    return sorted(files)


def read_table(path: Path) -> Iterator[Document]:
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
            for number, row in enumerate(filter(None, rows), 1):
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields, but the header has {len(header)} ({', '.join(header)})")
                record = dict(zip(header, row, strict=True))
                identifier = record.get("id", "").strip() or str(number)
                if identifier in seen:
                    raise ValueError(f"an earlier row has the same id, {identifier}")
                seen.add(identifier)
                section = Section(record.get("section", "").strip(), blocks_of(record["text"].replace("\r", "\n")))
                yield Document(identifier, record.get("title", "").strip(), [section])
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: not {path.suffix[1:]} ({error})") from error
        except ValueError as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}") from error
        finally:
            csv.field_size_limit(limit)


def read_source(source: Path, counts: Counter[str], follow_links: bool = False) -> Iterator[Document]:
    """All documents; files of unknown kinds and links left out are counted. Raises: FileNotFoundError, DataError."""
    if source.is_dir():
        files = find_files(source, follow_links, counts)
        readable = [path for path in files if path.suffix.lower() in READERS]
        counts["files of other kinds"] += len(files) - len(readable)
        for path in tqdm(readable, "Documents", unit=" files", disable=None):
            yield read_file(path, path.relative_to(source).as_posix())
        return
    open_existing(source).close()
    if source.suffix.lower() in TABLES:
        yield from tqdm(read_table(source), "Documents", unit=" rows", disable=None)
    elif source.suffix.lower() in READERS:
        yield read_file(source, source.name)
    else:
        raise DataError(f"{source}: neither a folder nor one of {', '.join([*READERS, *TABLES])}")


def prepare(source: Path, output: Path, words: int, follow_links: bool = False) -> None:
    """Write the passages and print how many there are. Raises: FileNotFoundError, DataError."""
    counts: Counter[str] = Counter()
    with writing(output) as write:
        for document in read_source(source, counts, follow_links):
            passages = passages_of(document.id, document.title, document.sections, words)
            counts["documents" if passages else "empty documents"] += 1
            counts["passages"] += len(passages)
            for passage in passages:
                write(passage)
        if not counts["passages"]:
            raise DataError(f"{source}: contains no text (supported: {', '.join([*READERS, *TABLES])})")
    print(f"{output}: {counts.pop('passages'):,} passages of {counts.pop('documents'):,} documents")
    left_out = ", ".join(f"{what} {number:,}" for what, number in sorted(counts.items()) if number)
    print(f"left out: {left_out or 'nothing'}")


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
    add_words_flag(parser)
    arguments = parser.parse_args()
    with exit_on_user_error(stopped="nothing was written"):
        prepare(arguments.source, arguments.output, arguments.words, arguments.follow_links)


if __name__ == "__main__":
    main()
