"""From the files that people have to text with headings: plain text, Markdown, HTML, Word, PDF.

Each kind of file is read by a library, which is imported only if there is such a file. What a reader leaves out it
counts, in `Outline.left_out`.
"""

import importlib.util
import itertools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from atlas.files.jsonl import decode_text
from splitting import Section, blocks_of, heading_path, unwrapped, with_line_feeds

if TYPE_CHECKING:
    from lxml.etree import _Element as Element

# YAML, as its first line shows (`name: …`): prose may stand between two rules, too.
_NAME = r"""["']?[^\s:"']+(?: [^\s:"']+){0,2}["']?"""
FRONT_MATTER = re.compile(
    rf"---[ \t]*\n((?:(?:[ \t]*(?:#[^\n]*)?\n)*{_NAME}:(?:[ \t][^\n]*)?\n(?:.*?\n)?)?)---[ \t]*(?:\n|$)", re.DOTALL
)


class UnreadableFile(ValueError):
    """A file that cannot be read. The message is the reason; `kind` says it in a few words that suit many files."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class Part(NamedTuple):
    level: int  # of the heading; 0 before the first one
    heading: list[str]
    texts: list[str]


class Outline:
    """A document while it is read: headings, and the text below each."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.left_out: list[tuple[str, str]] = []  # the kind of what was not read, and what or where it is
        self.parts = [Part(0, [], [])]
        self.in_heading = False

    def start_heading(self, level: int) -> None:
        """What follows is a heading, until `end_heading` or the next one."""
        self.end_heading()
        self.parts.append(Part(level, [], []))
        self.in_heading = True

    def end_heading(self) -> None:
        if self.in_heading and not "".join(self.parts[-1].heading).strip():
            self.parts.pop()
        self.in_heading = False

    def text(self, text: str) -> None:
        """`* ` at the start of a line is a list item, a blank line the end of a paragraph."""
        if text:
            self.current().append(text)

    def current(self) -> list[str]:
        """The pieces of the heading or the text that is being read."""
        return self.parts[-1].heading if self.in_heading else self.parts[-1].texts

    def raised_or_lowered(self, text: str, is_raised: bool) -> None:
        """A superscript or subscript: `10^23` is not 1023, `101_2` not 1012. 1st, H2O, word[1] stay what they are."""
        before = self.current()[-1][-1] if self.current() else ""
        if before.isalnum() or before in (")", "]", "}"):
            if is_raised and not NO_EXPONENT.fullmatch(text):
                text = f"^{text}" if re.fullmatch(r"[-−–+]?\w+[-−–+]?|\(.*\)", text) else f"^({text})"
            elif not is_raised and before.isdigit() and text[:1].isdigit():
                text = f"_{text}"
        self.text(text)

    def sections(self) -> list[Section]:
        """The sections that have text. The title is the first heading if all others are below it."""
        self.end_heading()
        parts = [(part.level, flat("".join(part.heading)), blocks_of("".join(part.texts))) for part in self.parts]
        if len(parts) > 1 and all(parts[1][0] < level for level, _, _ in parts[2:]):
            self.title = parts[1][1]
        above: list[tuple[int, str]] = []
        sections = []
        for level, heading, blocks in parts:
            # A heading that repeats the title is not a section.
            path = heading_path(above, level, "" if heading == self.title else heading)
            if blocks:
                sections.append(Section(path, blocks))
        return sections


# Ordinals and abbreviations (1st, XXe, 1o, Mme), marks (®, *), notes ([2]).
NO_EXPONENT = re.compile(r"[eoa]|[^\W\d_][^\W\d_ .]+|[^\w(]*|\[.*|[^\W\d_]+( [^\W\d_]+)+")


def flat(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def read_text(text: str) -> Outline:
    outline = Outline()
    outline.text(text)
    return outline


def read_markdown(text: str) -> Outline:
    """CommonMark with tables; `title:` in the front matter (between two lines `---` at the start) is the title."""
    from markdown_it import MarkdownIt

    title = ""
    if front := FRONT_MATTER.match(text):
        title = next((line[6:].strip(" \"'") for line in (front[1] or "").split("\n") if line.startswith("title:")), "")
        text = text[front.end() :]
    outline = read_html(_with_named_elements(MarkdownIt().enable("table").render(text)))
    outline.title = outline.title or title
    return outline


def _with_named_elements(rendered: str) -> str:
    """HTML of Markdown in which tags that nothing closes are text: prose names elements, which would hide the rest."""
    closed = set(re.findall(r"</([a-z]+)", rendered.lower()))
    tags = re.compile(rf"<(?=({'|'.join((*SKIPPED, 'title'))})\b)", re.IGNORECASE)
    return tags.sub(lambda found: "<" if found[1].lower() in closed else "&lt;", rendered)


HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
SKIPPED = ("script", "style", "noscript", "template", "nav", "svg", "select", "textarea", "iframe", "object")
INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|img|ins|kbd|label|mark|q|rb|rp|rt|ruby|s|samp|small|"
    "span|strike|strong|sub|sup|time|tt|u|var|wbr"
)
AROUND = {"br": ("\n", ""), "li": ("\n* ", "\n"), "td": (" ", " "), "th": (" ", " ")}
BESIDE_HEADINGS = {"p", "ul", "ol", "dl", "table", "pre", "blockquote"}  # an unclosed heading ends there


def read_html(text: str) -> Outline:
    """HTML without scripts, styles, navigation and forms. Raises: UnreadableFile."""
    from lxml import etree

    outline = Outline()
    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    root = etree.fromstring(text.encode(), parser) if text.strip() else None
    if any(error.level == etree.ErrorLevels.FATAL for error in parser.error_log):  # the parser stopped there
        raise UnreadableFile("damaged files", f"line {parser.error_log[-1].line}: {parser.error_log[-1].message}")
    if root is None:
        return outline
    buttons = [button for button in root.iter("button") if not is_heading(button)]
    for button in buttons:
        button.tag = "nav"
    etree.strip_elements(root, *SKIPPED, with_tail=False)
    outline.title = flat(root.xpath("string(//title)"))
    etree.strip_elements(root, "title", with_tail=False)
    notes = set(root.xpath("//sup[.//a] | //a[count(node()) = 1]/sup"))  # a superscript that is a link to a note
    for element in root.xpath("//sup | //sub"):
        etree.strip_tags(element, "*")
        if element in notes and re.search(r"\d", element.text or ""):
            element.text = f"[{element.text.strip('[]() ')}]"
    for formula in list(root.iter("math")):
        formula.tag, formula.text = "span", formula.get("alttext") or " ".join(formula.itertext())
        del formula[:]
    for event, element in etree.iterwalk(root, ("start", "end")):
        read_element(outline, element, event == "start")
    return outline


def is_heading(button: "Element") -> bool:
    """Whether a button is all that there is in a heading, and not beside it: `Copy link`."""
    heading = next(button.iterancestors(*HEADINGS, "dt", "summary"), None)
    others = ".//text()[normalize-space() and not(ancestor::button or ancestor::svg or ancestor::style)]"
    return heading is not None and not heading.xpath(others)


def read_element(outline: Outline, element: "Element", is_start: bool) -> None:
    """Add the text at the start of an element, or that at its end."""
    tag, text = element.tag, element.text if is_start else element.tail
    if tag in HEADINGS or (tag in BESIDE_HEADINGS and is_start):
        outline.end_heading()
    if tag in HEADINGS and is_start:
        outline.start_heading(int(tag[1]))
    if tag in ("sup", "sub") and is_start:
        outline.raised_or_lowered(flat(text or ""), is_raised=tag == "sup")
        return
    outline.text(AROUND.get(tag, ("", "") if INLINE.fullmatch(tag) else ("\n\n", "\n\n"))[not is_start])
    # Line ends in HTML are spaces, except between Chinese characters.
    outline.text(re.sub(r"\s+", " ", unwrapped(text or "")))


def own_title(title: str) -> str:
    """The title in a document's properties, unless a program made it up."""
    title = flat(title)
    return "" if re.fullmatch(r"untitled|word document|microsoft .* - .*|\S+\.\w{2,5}", title, re.I) else title


def read_docx(data: bytes) -> Outline:
    """Word documents: headings, paragraphs, lists, tables, text boxes, and at the end the notes.

    Headers, footers, comments and what was deleted while changes were tracked are not text. Raises: UnreadableFile.
    """
    import docx
    from docx.oxml import parse_xml

    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise UnreadableFile("encrypted .docx files", "encrypted, or in the old format .doc; save it as .docx")
    document = docx.Document(BytesIO(data))
    outline = Outline(own_title(document.core_properties.title))
    styles = {style.style_id: style.element for style in document.styles}
    read_paragraphs(outline, document.element.body, styles)
    for relation in document.part.rels.values():
        if relation.reltype.endswith(("/footnotes", "/endnotes")):
            read_paragraphs(outline, parse_xml(relation.target_part.blob), styles)
    return outline


W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
MARKS = {"tab": " ", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
IN_FORMULAS = {"sup": "^", "sub": "_", "num": "", "den": "/", "rad": "√", "d": ""}  # and then brackets if need be
# Nested paragraphs are read by themselves; `Fallback` repeats what is beside it, for old programs.
NOT_IN_RUNS = {"p", "pPr", "rPr", "del", "moveFrom", "Fallback"}


def read_paragraphs(outline: Outline, root: "Element", styles: dict[str, "Element"]) -> None:
    for paragraph in root.iter(f"{W}p"):
        if is_in(paragraph, "{*}Fallback"):
            continue
        in_cell = is_in(paragraph, f"{W}tc")
        level, is_item = style_of(paragraph, styles)
        if level is not None:
            outline.start_heading(level)
        elif is_item and not in_cell:
            outline.text("\n* ")
        for position, texts in itertools.groupby(runs_of(paragraph), lambda run: run[0]):
            text = "".join(text for _, text in texts)
            text = text.replace("\n", " ") if is_item else text  # a line break is no end of an item
            if position:
                outline.raised_or_lowered(text, is_raised=position == "superscript")
            else:
                outline.text(text)
        outline.end_heading()
        is_last = not in_cell or next(paragraph.iterancestors(f"{W}tc")).getnext() is None
        outline.text("\n" if is_item and not in_cell else "\n\n" if is_last else " ")


def runs_of(element: "Element") -> Iterator[tuple[str, str]]:
    """The texts of a paragraph, each with its vertical position: superscript, subscript or nothing."""
    for child in element.iterchildren("*"):
        name = child.tag.partition("}")[2]
        if name == "t":
            position = element.find(f"{W}rPr/{W}vertAlign")
            yield "" if position is None else position.get(f"{W}val", "").replace("baseline", ""), child.text or ""
        elif name in MARKS:
            yield "", MARKS[name]
        elif name not in NOT_IN_RUNS:
            runs = list(runs_of(child))
            yield from [("", formula(child, name, runs))] if name in IN_FORMULAS and runs else runs


def formula(element: "Element", name: str, runs: list[tuple[str, str]]) -> str:
    """A part of a formula on one line: `(a+b)^2`, `(a+b)/(c+d)`."""
    text = "".join(text for _, text in runs)
    if name != "d" and re.fullmatch(r"\w+", text):
        return IN_FORMULAS[name] + text
    marks = [element.find(f"{{*}}dPr/{{*}}{end}") for end in ("begChr", "endChr")]
    opening, closing = (
        default if mark is None else next(iter(mark.attrib.values()), "")
        for mark, default in zip(marks, "()", strict=True)
    )
    return IN_FORMULAS[name] + opening + text + closing


def style_of(paragraph: "Element", styles: dict[str, "Element"]) -> tuple[int | None, bool]:
    """The level of a heading (0: the title; None: no heading), and whether the paragraph is a list item.

    Both are properties of the paragraph, or of its style, or of one that this style is based on.
    """
    sources, name = [paragraph], value(paragraph, "pPr", "pStyle")
    while name in styles and styles[name] not in sources:
        sources.append(styles[name])
        name = value(styles[name], "basedOn")
    levels = (int(level) + 1 for source in sources if (level := value(source, "pPr", "outlineLvl")) and level < "9")
    names = (value(source, "name") for source in sources[1:])
    named = (
        0 if name.lower() == "title" else int(name[8:])
        for name in names
        if re.fullmatch("title|heading [1-9]", name, re.I)
    )
    numbering = next((number for source in sources if (number := value(source, "pPr", "numPr", "numId"))), "0")
    return next(itertools.chain(named, levels), None), numbering != "0"


def is_in(element: "Element", *tags: str) -> bool:
    return next(element.iterancestors(*tags), None) is not None


def value(element: "Element", *path: str) -> str:
    """The value of a property in Word's XML; empty if it is not there."""
    found = element.find("/".join(f"{W}{name}" for name in path))
    return "" if found is None else found.get(f"{W}val", "")


class Faults(logging.Handler):
    """Keeps what pypdf reports as an error: text that it may have decoded wrongly. It repairs what it warns about."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(("unknown encodings (their text may be wrong)", record.getMessage().partition(",")[0][:80]))


def read_pdf(data: bytes) -> Outline:
    """PDF: the text of all pages as one section, without what is repeated at their edges. Raises: UnreadableFile."""
    import pypdf

    faults = Faults()
    pypdf_log = logging.getLogger("pypdf")
    pypdf_log.handlers, pypdf_log.propagate = [faults], False
    try:
        reader = pypdf.PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableFile("encrypted .pdf files", "encrypted; save it without a password")
        pages = [[line for line in map(flat, page.extract_text().splitlines()) if line] for page in reader.pages]
        title = own_title(str((reader.metadata or {}).get("/Title") or ""))
    except pypdf.errors.DependencyError as error:
        raise UnreadableFile("encrypted .pdf files", f"encrypted ({error}); or save it without a password") from error
    outline = Outline(title)
    empty = [("pages without text", f"page {number}") for number, lines in enumerate(pages, 1) if not any(lines)]
    if len(empty) == len(pages):
        raise UnreadableFile(
            "scanned .pdf files", "no page has text; if it was scanned, recognise its text (OCR) first"
        )
    lines, repeated = body_of(pages)
    outline.left_out = empty + [("headers and footers", line) for line in repeated] + faults.found
    outline.text(joined_words("\n".join(lines)))
    return outline


def body_of(pages: list[list[str]]) -> tuple[list[str], list[str]]:
    """The lines of all pages, and those that are headers, footers and page numbers.

    The latter are among the first or last two lines of at least three pages and a third of all, and are the same on
    each, or the same but for a number that grows with the pages.
    """
    seen = Counter(key for number, lines in enumerate(pages) for i in edges(lines) for key in keys(lines[i], number))
    repeated = {key for key, times in seen.items() if times >= max(3, len(pages) / 3)}
    body: list[str] = []
    others: list[str] = []
    for number, lines in enumerate(pages):
        is_repeated = [bool(repeated & keys(line, number)) for line in lines]
        top = len(list(itertools.takewhile(bool, is_repeated[:2])))
        bottom = max(top, len(lines) - len(list(itertools.takewhile(bool, is_repeated[:-3:-1]))))
        body += lines[top:bottom]
        others += lines[:top] + lines[bottom:]
    return body, others


def edges(lines: list[str]) -> set[int]:
    """The places of the first and the last two lines."""
    return set(range(len(lines))[:2]) | set(range(len(lines))[-2:])


def keys(line: str, page: int) -> set[str]:
    """What is the same for lines that differ in the number of the page only."""
    numbers = re.finditer(r"(?<!\d)\d{1,5}(?!\d)", line)
    return {line, *(f"{line[: found.start()]}\0{int(found[0]) - page}\0{line[found.end() :]}" for found in numbers)}


def joined_words(text: str) -> str:
    """Text without hyphens at the ends of lines, except where the text has the word with a hyphen elsewhere."""
    compounds = set(re.findall(r"[^\W\d_]+-[^\W\d_]+", text))

    def joined(found: re.Match[str]) -> str:
        compound = f"{found[1]}-{found[2]}"
        return compound if compound in compounds else found[1] + found[2]

    text = re.sub("[\ufb00-\ufb06]", lambda found: unicodedata.normalize("NFKC", found[0]), text)  # ligatures
    text = re.sub(r"\.(?: ?\.){4,}", "…", text)  # the dotted lines of a table of contents
    return re.sub(r"([^\W\d_]+)[-‐]\n([^\W\d_]+)", lambda f: joined(f) if f[2][0].islower() else f"{f[1]}-{f[2]}", text)


class Format(NamedTuple):
    read: Callable[[str], Outline] | Callable[[bytes], Outline]
    modules: tuple[str, ...] = ()  # that are imported to read it
    is_text: bool = True


FORMATS = {
    **dict.fromkeys((".txt", ".text"), Format(read_text)),
    **dict.fromkeys((".md", ".markdown"), Format(read_markdown, ("markdown_it", "lxml"))),
    **dict.fromkeys((".html", ".htm", ".xhtml"), Format(read_html, ("lxml",))),
    ".docx": Format(read_docx, ("docx",), is_text=False),
    ".pdf": Format(read_pdf, ("pypdf",), is_text=False),
}
PACKAGES = {"markdown_it": "markdown-it-py", "lxml": "lxml", "docx": "python-docx", "pypdf": "pypdf"}


def missing_packages(suffix: str) -> list[str]:
    """The packages that a format needs and that are not installed."""
    return [PACKAGES[name] for name in FORMATS[suffix].modules if importlib.util.find_spec(name) is None]


def read_document(data: bytes, suffix: str) -> Outline:
    """Raises: UnreadableFile; ValueError with the reason if a file of text is not UTF-8."""
    read, _, is_text = FORMATS[suffix]
    content = with_line_feeds(decode_text(data).removeprefix("\ufeff")) if is_text else data
    try:
        return read(content)
    except UnreadableFile:
        raise
    except Exception as error:  # for damaged files, the libraries raise what they happen to stumble over
        raise UnreadableFile("damaged files", f"damaged ({type(error).__name__}: {error})") from error
