"""From the wikitext of an article to readable text: sections of plain text, and infoboxes.

Tables, references, files, galleries, comments, categories and templates are removed, except templates that stand for
words (`TEMPLATES`). Lists, the text of links, and formulas as they were typed are kept.
"""

import html
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import mwparserfromhell
from mwparserfromhell import nodes

from splitting import Section, batched, blocks_of, heading_path

# Sections that only have references or names of other articles.
SKIPPED_SECTIONS = {
    *("references", "notes", "footnotes", "citations", "sources", "notes and references", "references and notes"),
    *("bibliography", "further reading", "external links", "see also", "works cited", "gallery", "explanatory notes"),
}
SKIPPED_TAGS = {
    *("ref", "references", "table", "gallery", "timeline", "score", "imagemap", "hiero", "syntaxhighlight", "source"),
    *("templatestyles", "noinclude", "includeonly", "graph", "mapframe", "indicator", "style"),
}
VERBATIM_TAGS = {"math", "chem", "ce", "nowiki", "pre"}
BLOCK_TAGS = {"p", "div", "blockquote", "poem", "center", "hr"}
SKIPPED_LINKS = {"file", "image", "media", "category"}  # names of namespaces that every language understands
DISAMBIGUATION = re.compile(r"(?:.*[ -])?(?:disambig|disambiguation|disamb|dab|hndis|geodis|numberdis)(?:[ -]cleanup)?")
INFOBOX = re.compile(r"(?:infobox|geobox)\b.*|.*\binfobox|(?:automatic )?taxobox|speciesbox|chembox|drugbox")
# Words in the names of infobox parameters that only concern the layout.
LAYOUT = {
    *("image", "imagesize", "img", "logo", "photo", "caption", "map", "mapsize", "color", "colour", "width", "pixels"),
    *(
        "align",
        "alt",
        "style",
        "coordinates",
        "coord",
        "lat",
        "latd",
        "latm",
        "lats",
        "latns",
        "long",
        "longd",
        "longm",
    ),
    *(
        "longs",
        "longew",
        "pushpin",
        "footnotes",
        "ref",
        "refs",
        "embed",
        "module",
        "child",
        "signature",
        "coa",
        "bodyclass",
    ),
}
FILE_NAME = re.compile(r"\.(?:png|jpe?g|svg|gif|tiff?|ogg|webm)$", re.I)
INTERLANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?:\S")
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)
TEMPLATE_NAME = re.compile(r"\{\{([^{}|<>\[\]]+)")
TERM, MEANING = "\x02", "\x03"  # replace `;` and `:`; these characters do not occur in texts
EMPTY_BRACKETS = re.compile(r"\(\s*(?:[;,:]\s*)*\)|\[\s*\]")
# Markup that the parser could not parse.
LEFT_OVER = re.compile(
    r"^\s*(?:\{\||\|[-}]|[|!]|\[\[(?:file|image):).*$|<ref\b[^<>]*>.*?(?:</ref>|$)|</?(?:ref|br|small|div|span|sup|sub|font"
    r"|center|blockquote|code|nowiki|gallery|math|big|tt|references|onlyinclude|noinclude|includeonly)\b[^<>]*>|__[A-Z]+__",
    re.IGNORECASE | re.MULTILINE,
)
TIDY = (
    (re.compile(r"[^\S\n]+"), " "),  # first, because later patterns are slow on long runs of spaces
    (re.compile(r"(?: ?\n){2,}"), "\n\n"),
    (LEFT_OVER, ""),
    (re.compile(r"(?<=\w)'{3}(?=s\b)"), "'"),  # a title in italics, and its genitive
    (re.compile(r"'{2,}"), ""),
    (re.compile(rf"^[ \t]*{MEANING}+", re.MULTILINE), ""),
    (re.compile(rf"^[ \t]*{TERM}([^\n{MEANING}]*?)[ \t]*{MEANING}", re.MULTILINE), r"\n\1: "),
    (re.compile(rf"^[ \t]*{TERM}(.*?)[ \t]*:?[ \t]*$", re.MULTILINE), r"\n\1:"),
    (re.compile(f"[{TERM}{MEANING}]+"), " "),
    (EMPTY_BRACKETS, ""),
    (re.compile(r"\(\s*(?:[;,]\s*)+"), "("),
    (re.compile(r"(?:\s*[;,])+\s*\)"), ")"),
    (re.compile(r"\( +"), "("),
    (re.compile(r" +\)"), ")"),
    (re.compile(r" +([,.;:!?])(?=\s|$)"), r"\1"),
)


class Article(NamedTuple):
    """The content of an article; empty if it is a disambiguation page."""

    sections: list[Section]
    infoboxes: list[list[str]]  # the entries of each, `name: value`
    is_disambiguation: bool = False


def read_article(wikitext: str, namespaces: Iterable[str] = ()) -> Article:
    """Parse and render an article. `namespaces` are the names of the file and category namespaces in its language.

    Each section is parsed separately, so that an unclosed bracket affects only its own section.

    Raises: mwparserfromhell.parser.ParserError or RecursionError if the parser fails.
    """
    wikitext = COMMENT.sub("", wikitext)
    if "__DISAMBIG__" in wikitext or any(map(DISAMBIGUATION.fullmatch, map(folded, TEMPLATE_NAME.findall(wikitext)))):
        return Article([], [], is_disambiguation=True)
    render = Renderer({name.lower() for name in namespaces} | SKIPPED_LINKS)
    sections, infoboxes = [], []
    for heading, text in split_by_headings(wikitext, render):
        code = parse(text)
        boxes = (node for node in code.nodes if isinstance(node, nodes.Template) and INFOBOX.fullmatch(name_of(node)))
        infoboxes += [entries for box in boxes if (entries := list(render.entries(box)))]
        if blocks := blocks_of(tidy(render(code))):
            sections.append(Section(heading, blocks))
    return Article(sections, infoboxes)


def parse(wikitext: str) -> mwparserfromhell.wikicode.Wikicode:
    """Parse, but keep the quotes of bold and italics: in wikitext they end with the line, in the parser they do not."""
    return mwparserfromhell.parse(wikitext, skip_style_tags=True)


def split_by_headings(wikitext: str, render: "Renderer") -> Iterator[tuple[str, str]]:
    """Headings, preceded by those above them, with the wikitext below them; without skipped sections."""
    first, *rest = HEADING.split(wikitext)
    yield "", first
    above: list[tuple[int, str]] = []
    for signs, heading, text in batched(rest, 3):
        path = heading_path(above, len(signs), " ".join(tidy(render(parse(heading))).split()))
        if not any(title.lower() in SKIPPED_SECTIONS for _, title in above):
            yield path, text


def name_of(template: nodes.Template) -> str:
    """The template's name in lower case, with spaces for underscores and without the namespace."""
    return folded(str(template.name))


def folded(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).lower().removeprefix("template:")


def tidy(text: str) -> str:
    """Remove what is left over after removals: empty brackets, commas after nothing, runs of spaces."""
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    return text


class Renderer:
    """Renders the parser's nodes as text. List items become lines with `* `; other line ends are kept."""

    def __init__(self, skipped_links: set[str]):
        self.skipped_links = skipped_links

    def __call__(self, code: Any) -> str:
        """The text of a piece of wikitext; empty for None."""
        return "".join(map(self.node, code.nodes)) if code is not None else ""

    def node(self, node: nodes.Node) -> str:
        match node:
            case nodes.Text():
                return node.value
            case nodes.HTMLEntity():
                return html.unescape(str(node)).replace("\xa0", " ")
            case nodes.Wikilink():
                return self.link(node)
            case nodes.ExternalLink():
                return self(node.title)
            case nodes.Tag():
                return self.tag(node)
            case nodes.Template():
                return self.template(node)
            case nodes.Argument():
                return self(node.default)
        return ""  # comments, and headings inside other nodes

    def link(self, link: nodes.Wikilink) -> str:
        target = str(link.title).strip()
        namespace = target.partition(":")[0].strip().lower().replace("_", " ")
        if namespace in self.skipped_links or (link.text is None and INTERLANGUAGE.match(target)):
            return ""
        return self(link.title).strip().removeprefix(":") if link.text is None else self(link.text)

    def tag(self, tag: nodes.Tag) -> str:
        name = str(tag.tag).strip().lower()
        if name in SKIPPED_TAGS:
            return ""
        if name in VERBATIM_TAGS:
            return html.unescape(str(tag.contents))
        if (
            name in ("li", "dt", "dd") and tag.wiki_markup
        ):  # only the marker: the parser puts the item's text after the node
            return {";": TERM, ":": MEANING}.get(tag.wiki_markup, "* ")
        inside = self(tag.contents) if not tag.self_closing else ""
        if name in ("li", "dt", "dd"):
            return f"\n* {inside}"
        if name in BLOCK_TAGS:
            return f"\n\n{inside}\n\n"
        if name in ("br", "ul", "ol", "dl"):
            return f"\n{inside}\n" if inside else "\n"
        if name == "sup" and re.fullmatch(r"[-−+\d]+", inside):
            return f"^{inside}"  # 10^3 is not 103
        return inside

    def template(self, template: nodes.Template) -> str:
        name = name_of(template)
        rule = TEMPLATES.get("lang" if name.startswith("lang-") else name)
        if rule is None:
            return ""
        named = {str(parameter.name).strip(): self(parameter.value).strip() for parameter in template.params}
        values = [value for key, value in named.items() if key.isdecimal()]
        if name.startswith("lang-"):
            values.insert(0, name)  # `{{lang-la|verbum}}` is `{{lang|la|verbum}}`
        return rule(values, named)

    def entries(self, box: nodes.Template) -> Iterator[str]:
        """The entries `name: value` of an infobox, without empty ones and those that only concern the layout."""
        for parameter in box.params:
            name = " ".join(str(parameter.name).strip().split())
            lines = tidy(self(parameter.value)).split("\n")
            values = [words for line in lines if (words := " ".join(line.lstrip("* ").split()).rstrip(",;"))]
            words = re.findall(r"[^\W\d_]+", name.lower())
            if values and words and not LAYOUT & set(words) and not FILE_NAME.search(values[0]):
                yield f"{name.replace('_', ' ')}: {', '.join(values)}"


Rule = Callable[[list[str], dict[str, str]], str]  # takes the positional parameters, and all parameters by name


def nth(number: int) -> Rule:
    """The positional parameter of this number, from 0; -1 is the last."""
    return lambda values, named: values[number] if number < len(values) and values else ""


def constant(text: str) -> Rule:
    return lambda values, named: text


def joined(separator: str, before: str = "") -> Rule:
    return lambda values, named: before + separator.join(filter(None, values))


def quantity(values: list[str], named: dict[str, str]) -> str:
    """`{{convert|3|to|5|m|ft}}`: `3 to 5 m`, without the conversion. `{{val|5|e=3|u=m}}`: `5×10^3 m`."""
    unit = next((i for i, value in enumerate(values) if not NUMBER.fullmatch(value)), len(values))
    number = " ".join(values[: unit + 1] if "e" not in named and "u" not in named else values[:1])
    exponent = f"×10^{named['e']}" if named.get("e") else ""
    return " ".join(filter(None, (number + exponent, named.get("u") or named.get("ul"))))


def date(values: list[str], named: dict[str, str]) -> str:
    """`{{birth date|1809|2|12}}`: `12 February 1809`, or only month and year, or the year; a death date comes first."""
    year, *rest = [*values, "", "", ""]
    month = int(rest[0]) if re.fullmatch(r"0?[1-9]|1[0-2]", rest[0]) else 0
    day = rest[1].lstrip("0") if month and rest[1].isdecimal() else ""
    return " ".join(filter(None, (day, MONTHS[month], year)))


def as_of(values: list[str], named: dict[str, str]) -> str:
    words = "since" if "since" in named else "as of"
    return f"{words if 'lc' in named else words.capitalize()} {date(values, named)}"


NUMBER = re.compile(r"[-–−+±]?[\d.,/]+|to|and|or|by|x|×|-|–|to\(-\)|and\(-\)|\+/-|±")
MONTHS = (
    *("", "January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
# Templates of the English Wikipedia that stand for words, by lower-case name; all others are removed.
TEMPLATES: dict[str, Rule] = {
    name: rule
    for rule, names in (
        (
            nth(0),
            "nowrap; nobr; small; smaller; big; bigger; abbr; tooltip; sic; em; strong; nobold; sc; sub; quote; "
            "cquote; blockquote; quotation; center; centre; angbr; angle bracket; math; mvar; var; keypress; "
            "flag; flagu; flagcountry; url; nihongo; ill; interlanguage link; marriage; vanchor; script/hebrew",
        ),
        (nth(1), "lang; transl; transliteration; native name; color; script"),
        (nth(-1), "resize; columns-list; nastaliq; font; longitem"),
        (
            joined("\n* ", "\n* "),
            "ubl; unbulleted list; hlist; plainlist; flatlist; vunblist; bulleted list; collapsible list",
        ),
        (joined(""), "chem; chem2; linktext"),
        (joined("/"), "frac; sfrac"),
        (joined(" ", "USS "), "uss"),
        (joined(" ", "HMS "), "hms"),
        (joined("", "^"), "sup; pow"),
        (joined("", "×10^"), "e; x10^"),
        (joined(" ", "c. "), "circa; c."),
        (quantity, "convert; cvt; val; nts; gaps"),
        (date, "birth date; birth date and age; birth-date; birth-date and age; birth year and age; bda; dob; dts"),
        (date, "death date; death date and age; death-date; death-date and age; death year and age; dda"),
        (date, "start date; start date and age; end date; film date"),
        (as_of, "as of"),
        (constant(" – "), "ndash; en dash; –; snd; spaced ndash; spaced en dash"),
        (constant(" — "), "mdash; em dash; —; mdashb; spaced mdash"),
        (constant(" · "), "·; •; middot"),
        (constant("'"), "'"),
        (constant("'s"), "'s"),
        (constant("="), "="),
        (constant("|"), "!; pipe"),
        (constant(" "), "nbsp; spaces; space; thinsp; br; clear"),
    )
    for name in names.split("; ")
}
