"""Split a Wikipedia dump into passages of about 100 words, and extract its infoboxes.

    python preprocessing/prepare_wikipedia.py enwiki-20211220-pages-articles.xml.bz2 --output_directory my_wiki

Writes two files in the format of the released corpora: `text-list-100-sec.jsonl` and `infobox.jsonl`, with `id`,
`title`, `section` and `text` in each line. Redirects, disambiguation pages and pages that are not articles are left
out. Dumps are one or several `pages-articles` files, plain or packed (.bz2, .gz, .xz). They are read once, piece by
piece, and the output does not depend on the number of processes. Infoboxes, disambiguation pages, sections that only
have references, and templates that stand for words are recognised by their names in the English Wikipedia;
--infobox_names adds those of another language. What is left out of the articles is counted.
"""

import argparse
import bz2
import gzip
import importlib.util
import lzma
import multiprocessing
import signal
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

from tqdm import tqdm

from atlas.files.jsonl import DataError, open_existing
from atlas.runtime.launch import available_cores
from flags import at_least, exit_on_user_error
from splitting import Section, add_words_flag, batched, passages_of, writing

PARSER = "mwparserfromhell"
CHUNK = 1 << 16  # bytes of an unpacked dump
PAGE_LIMIT = 1 << 24  # characters of one page, eight times what MediaWiki allows
BATCH = 16  # pages that a process is given at a time
PAGE_SECONDS = 30  # limit of processor time for a page; most take hundredths of a second
NAMES_SHOWN = 5  # of the templates that are not known, unless --list_templates asks for all
# By the first bytes of a packed file: how it is read; None if the standard library cannot.
PACKED: dict[bytes, tuple[str, Callable[[BinaryIO], BinaryIO] | None]] = {
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
    b"7z\xbc\xaf\x27\x1c": ("7z", None),
    b"PK\x03\x04": ("zip", None),
    b"\x28\xb5\x2f\xfd": ("zstd", None),
    b"\x04\x22\x4d\x18": ("lz4", None),
    b"Rar!": ("rar", None),
    b"\x1f\x9d": ("compress", None),
}
AHEAD = 4  # batches per process that are read ahead


class Page(NamedTuple):
    id: str
    title: str
    namespace: str
    is_redirect: bool
    wikitext: str


class DumpReader:
    """Takes the bytes of a dump piece by piece and returns pages. Keeps no more than one page and a piece in memory.

    A document type can declare XML entities that expand to gigabytes. Dumps have no document type, so a file that has
    one is refused.

    Raises: ValueError if the XML is not well-formed or not a dump.
    """

    FIELDS = {
        ("mediawiki", "siteinfo", "namespaces", "namespace"): "namespace",
        ("mediawiki", "page", "title"): "title",
        ("mediawiki", "page", "ns"): "ns",
        ("mediawiki", "page", "id"): "id",
        ("mediawiki", "page", "revision", "text"): "text",
    }

    def __init__(self) -> None:
        self.file_namespaces: list[str] = []  # the names of the file and category namespaces in this language
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._path: list[str] = []
        self._field: str | None = None  # the field that the characters belong to
        self._pieces: list[str] = []
        self._length = 0
        self._namespace_key = ""
        self._page: dict[str, str] = {}
        self._pages: list[Page] = []

    def feed(self, data: bytes, is_last: bool) -> list[Page]:
        """Parse a piece; returns the pages that end in it."""
        try:
            self._parser.Parse(data, is_last)
        except expat.ExpatError as error:
            reason = expat.ErrorString(error.code)
            raise ValueError(f"not well-formed XML ({reason}): damaged or truncated, fetch it again") from error
        pages, self._pages = self._pages, []
        return pages

    @property
    def line(self) -> int:
        return self._parser.CurrentLineNumber

    def _refuse(self, *_: object) -> None:
        raise ValueError("a document type (<!DOCTYPE ...>), which dumps do not have and which may hide entity bombs")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._path and name != "mediawiki":
            raise ValueError(f"not a MediaWiki dump: the first element is <{name[:40]}>, not <mediawiki>")
        self._path.append(name)
        self._field = self.FIELDS.get(tuple(self._path))
        self._pieces, self._length = [], 0
        self._namespace_key = attributes.get("key", "")
        if self._path == ["mediawiki", "page"]:
            self._page = {}
        elif self._path == ["mediawiki", "page", "redirect"]:
            self._page["redirect"] = "yes"

    def _characters(self, text: str) -> None:
        if self._field is not None:
            self._length += len(text)
            if self._length > PAGE_LIMIT:
                raise ValueError(f"a {self._field} of more than {PAGE_LIMIT:,} characters, which no page has")
            self._pieces.append(text)

    def _end(self, name: str) -> None:
        if self._field == "namespace" and self._namespace_key in ("6", "14"):  # File and Category, in every language
            self.file_namespaces.append("".join(self._pieces))
        elif self._field is not None:
            self._page[self._field] = "".join(self._pieces)
        elif self._path == ["mediawiki", "page"]:
            missing = [field for field in ("id", "title", "text") if field not in self._page]
            if missing:
                raise ValueError(f"a page without <{missing[0]}>")
            page = self._page
            is_redirect = "redirect" in page or page["text"][:20].lstrip().lower().startswith("#redirect")
            self._pages.append(Page(page["id"], page["title"], page.get("ns", "0"), is_redirect, page["text"]))
        self._path.pop()
        self._field = None


def read_dump(path: Path, progress: Callable[[int], object]) -> Iterator[tuple[Page, list[str]]]:
    """Pages of a dump in order, each with the names of the file and category namespaces.

    `progress` is called with the number of bytes read since the last call.

    Raises: FileNotFoundError; DataError with file and line.
    """
    reader, done = DumpReader(), 0
    with open_existing(path) as packed:
        file = unpacked(packed, path)
        while True:
            try:
                data = file.read(CHUNK)
                pages = reader.feed(data, is_last=not data)
            except EOFError as error:
                raise DataError(f"{path}: truncated ({error}); fetch it again") from error
            except (OSError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{path}: damaged ({error}); fetch it again") from error
            except ValueError as error:
                raise DataError(f"{path}, line {reader.line:,}: {error}") from error
            progress(packed.tell() - done)
            done = packed.tell()
            for page in pages:
                yield page, reader.file_namespaces
            if not data:
                return


def unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    """The text of a dump, packed or not. Raises: DataError if it is packed in a way that cannot be read."""
    start = file.read(max(map(len, PACKED)))
    file.seek(0)
    name, read = next((PACKED[magic] for magic in PACKED if start.startswith(magic)), ("", None))
    if name and read is None:
        raise DataError(f"{path}: packed by {name}, which cannot be read here; unpack it first and give the .xml")
    return read(file) if read else file


class Parsed(NamedTuple):
    """The results for a batch of pages."""

    passages: list[dict]
    infoboxes: list[dict]
    counts: Counter[str]
    failures: list[str]  # titles of pages that could not be parsed
    left_out: Counter[tuple[str, str]]  # of the articles, by kind and name


def read_pages(
    pages: list[tuple[Page, list[str]]], words: int, infobox_names: Iterable[str] = (), seconds: float = PAGE_SECONDS
) -> Parsed:
    """Parse pages and split them, in a worker process. A page that takes longer than `seconds` ends the process."""
    from mwparserfromhell.parser import ParserError

    from wikitext import infobox_pattern, read_article

    parsed = Parsed([], [], Counter(), [], Counter())
    pattern = infobox_pattern(infobox_names)
    for page, namespaces in pages:
        if page.namespace != "0":
            parsed.counts["pages that are not articles"] += 1
            continue
        if page.is_redirect:
            parsed.counts["redirects"] += 1
            continue
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process even inside the C parser
            article = read_article(page.wikitext, namespaces, pattern)
        except (ParserError, RecursionError):
            parsed.failures.append(page.title)
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        passages = passages_of(page.id, page.title, article.sections, words)
        boxes = [Section("", [f"{entry};" for entry in box[:-1]] + box[-1:]) for box in article.infoboxes]
        infoboxes = passages_of(f"{page.id}-infobox", page.title, boxes, words)
        if article.is_disambiguation or page.title.endswith("(disambiguation)"):
            parsed.counts["disambiguation pages"] += 1
        elif not passages and not infoboxes:
            parsed.counts["articles without text"] += 1
        else:
            parsed.counts["articles"] += 1
            parsed.passages.extend(passages)
            parsed.infoboxes.extend(infoboxes)
            parsed.left_out.update(article.left_out)
    return parsed


def start_processes(number: int) -> ProcessPoolExecutor:
    # "spawn" is the same on every system and copies no locks. Ctrl-C is handled by this process only.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def in_order(
    function: Callable[[list, Any], Any], batches: Iterable[list], setting: Any, processes: int, give_up: Callable
) -> Iterator[Any]:
    """`function(batch, setting)` for every batch, in order, on several processes; few batches are in memory at a time.

    The parser is written in C, and some wikitext crashes its process or takes too long. The batch is then repeated in
    smaller and smaller parts, and an item that ends a process by itself is replaced by `give_up(item)`.
    """
    pool = start_processes(processes)
    waiting: deque[tuple[list, Future]] = deque()

    def results() -> list:
        batch, future = waiting.popleft()
        try:
            return [future.result()]
        except BrokenProcessPool:  # raised for all batches that were waiting; each is repeated by itself
            return in_parts(function, batch, setting, give_up)

    try:
        for batch in batches:
            try:
                future = pool.submit(function, batch, setting)
            except BrokenProcessPool:
                pool.shutdown()
                pool = start_processes(processes)
                future = pool.submit(function, batch, setting)
            waiting.append((batch, future))
            if len(waiting) > AHEAD * processes:
                yield from results()
        while waiting:
            yield from results()
    finally:
        pool.shutdown(cancel_futures=True)


def in_parts(function: Callable[[list, Any], Any], batch: list, setting: Any, give_up: Callable) -> list:
    with start_processes(1) as alone:
        try:
            return [alone.submit(function, batch, setting).result()]
        except BrokenProcessPool:
            if len(batch) == 1:
                return [give_up(batch[0])]
    half = len(batch) // 2
    return [result for part in (batch[:half], batch[half:]) for result in in_parts(function, part, setting, give_up)]


def cannot_read(page: tuple[Page, list[str]]) -> Parsed:
    return Parsed([], [], Counter(), [page[0].title], Counter())


def prepare(
    dumps: list[Path],
    output: Path,
    words: int,
    processes: int,
    max_pages: int | None,
    infobox_names: Iterable[str] = (),
    list_templates: bool = False,
) -> None:
    """Write both files and print their counts. Raises: FileNotFoundError, DataError."""
    for path in dumps:
        with open_existing(path) as file:
            unpacked(file, path)
    sizes = sum(path.stat().st_size for path in dumps)
    counts: Counter[str] = Counter()
    total = Parsed([], [], Counter(), [], Counter())
    passages_path, infoboxes_path = output / "text-list-100-sec.jsonl", output / "infobox.jsonl"
    read = partial(read_pages, infobox_names=tuple(infobox_names))
    with (
        tqdm(desc="Wikipedia", total=sizes, unit="B", unit_scale=True, disable=None) as bar,
        writing(passages_path) as write_passage,
        writing(infoboxes_path) as write_infobox,
    ):
        pages = (page for path in dumps for page in read_dump(path, bar.update))
        for parsed in in_order(read, batched(islice(pages, max_pages), BATCH), words, processes, cannot_read):
            for passage in parsed.passages:
                write_passage(passage)
            for passage in parsed.infoboxes:
                write_infobox(passage)
            counts.update(passages=len(parsed.passages), infoboxes=len(parsed.infoboxes))
            total.counts.update(parsed.counts)
            total.failures.extend(parsed.failures)
            total.left_out.update(parsed.left_out)
        articles = total.counts.pop("articles", 0)
        if not articles:
            raise DataError(f"{', '.join(map(str, dumps))}: contains no article; left out: {listed(total.counts)}")
    print(f"{passages_path}: {counts['passages']:,} passages of {articles:,} articles")
    print(f"{infoboxes_path}: {counts['infoboxes']:,} passages")
    if not counts["infoboxes"]:
        print(
            "no infobox was found: they are recognised by names such as `Infobox person`; for a dump in another "
            "language, --infobox_names gives the words with which their names begin or end"
        )
    report_left_out(total, list_templates)


def report_left_out(total: Parsed, list_templates: bool) -> None:
    """Print what is not in the files: pages, and what articles have beside their text, by kind."""
    from templates import UNKNOWN

    if names := total.failures:
        print(f"left out because {PARSER} cannot read them: {', '.join(names[:10])}{', ...' * (len(names) > 10)}")
        total.counts["articles that cannot be read"] = len(names)
    print(f"left out: {listed(total.counts)}")
    kinds: Counter[str] = Counter()
    for (kind, _), number in total.left_out.items():
        kinds[kind] += number
    unknown = kinds.pop(UNKNOWN, 0)
    print(f"removed from the articles: {listed(kinds)}")
    templates = sorted(
        ((number, name, kind) for (kind, name), number in total.left_out.items() if name.startswith("{{")),
        key=lambda entry: (-entry[0], entry[1]),
    )
    names = [f"{name} {number:,}" for number, name, kind in templates if kind == UNKNOWN]
    if names:
        most_often = ", ".join(names[:NAMES_SHOWN]) + ("" if list_templates else "; --list_templates shows them")
        print(f"left out: {unknown:,} {UNKNOWN}, of {len(names):,} names, most often {most_often}")
    for number, name, kind in templates if list_templates else ():
        print(f"{number:>9,}  {name}  ({kind})")


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {number:,}" for what, number in sorted(counts.items())) or "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("dumps", type=Path, nargs="+", metavar="DUMP", help="pages-articles.xml, .xml.bz2, .gz or .xz")
    parser.add_argument("--output_directory", type=Path, required=True)
    add_words_flag(parser)
    cores = available_cores()
    parser.add_argument("--processes", type=at_least(1, int), default=cores, help=f"default: all {cores} cores")
    parser.add_argument("--max_pages", type=at_least(1, int), help="stop after this many pages, for a first look")
    parser.add_argument(
        "--infobox_names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="words with which names of infoboxes begin or end, beside those of the English Wikipedia",
    )
    parser.add_argument(
        "--list_templates", action="store_true", help="list all templates that were left out, and how often"
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec(PARSER) is None:
        sys.exit(f"error: this needs the package {PARSER}; run: pip install mwparserfromhell")
    with exit_on_user_error(stopped="nothing was written"):
        prepare(
            arguments.dumps,
            arguments.output_directory,
            arguments.words,
            arguments.processes,
            arguments.max_pages,
            arguments.infobox_names,
            arguments.list_templates,
        )


if __name__ == "__main__":
    main()
