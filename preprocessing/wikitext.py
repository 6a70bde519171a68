"""From the wikitext of an article to readable text: sections of plain text, and infoboxes.

Templates become the words that they stand for (templates.py). Lists, the text of links, and formulas as they were typed
are kept. Comments are removed without a word; everything else that is left out is counted: tables, references, files,
categories, and templates.
"""

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import mwparserfromhell
from mwparserfromhell import nodes

from splitting import Section, batched, blocks_of, heading_path
from templates import COUNTRIES, PREFIX, TEMPLATES, UNKNOWN, WORDLESS, Arguments, apply, superscript

# Sections that only have references or names of other articles.
SKIPPED_SECTIONS = {
    *("references", "notes", "footnotes", "citations", "sources", "notes and references", "references and notes"),
    *("bibliography", "further reading", "external links", "see also", "works cited", "gallery", "explanatory notes"),
}
SKIPPED_TAGS = {
    tag: kind
    for kind, tags in (
        ("references", "ref references"),
        ("tables", "table"),
        ("images, diagrams and recordings", "gallery timeline score imagemap hiero graph mapframe"),
        ("listings of programs", "syntaxhighlight source"),
        ("layout", "templatestyles noinclude includeonly indicator style"),
    )
    for tag in tags.split()
}
VERBATIM_TAGS = {"math", "chem", "ce", "nowiki", "pre"}
BLOCK_TAGS = {"p", "div", "blockquote", "poem", "center", "hr"}
SKIPPED_LINKS = {"file", "image", "media", "category"}  # names of namespaces that every language understands
DISAMBIGUATION = re.compile(r"(?:.*[ -])?(?:disambig|disambiguation|disamb|dab|hndis|geodis|numberdis)(?:[ -]cleanup)?")
INFOBOX = r"(?:infobox|geobox)\b.*|.*\binfobox|(?:automatic )?taxobox|speciesbox|chembox|drugbox"
# Words in the names of infobox parameters that only concern the layout.
LAYOUT = set(
    re.findall(
        r"\w+",
        "image imagesize img logo photo caption map mapsize color colour width pixels align alt style coordinates "
        "coord lat latd latm lats latns long longd longm longs longew pushpin footnotes ref refs embed module child "
        "signature coa bodyclass",
    )
)
FILE_NAME = re.compile(r"\.(?:png|jpe?g|svg|gif|tiff?|ogg|webm)$", re.I)
INTERLANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?:\S")
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)
TEMPLATE_NAME = re.compile(r"\{\{([^{}|<>\[\]]+)")
# A function of the wiki: its name, and that of the tag in `{{#tag:ref|...}}`.
FUNCTION = re.compile(r"#tag: ?\w+|#\w+:|(?:formatnum|padleft|lc|uc|lcfirst|ucfirst|displaytitle|defaultsort|plural):")
TERM, MEANING = "\x02", "\x03"  # replace `;` and `:`; these characters do not occur in texts
EMPTY_BRACKETS = re.compile(r"\(\s*(?:[;,:]\s*)*\)|\[\s*\]")
# Markup that the parser could not parse: what is lost with its words, and what is not.
BROKEN = re.compile(
    r"^\s*(?:\{\||\|[-}]|[|!]|\[\[(?:file|image):).*$|<ref\b[^<>]*>.*?(?:</ref>|$)", re.IGNORECASE | re.MULTILINE
)
LEFT_OVER = re.compile(
    r"</?(?:ref|br|small|div|span|sup|sub|font|center|blockquote|code|nowiki|gallery|math|big|tt|references|onlyinclude"
    r"|noinclude|includeonly)\b[^<>]*>|__[A-Z]+__",
    re.IGNORECASE,
)
TIDY = (
    (re.compile(r"[^\S\n]+"), " "),  # first, because later patterns are slow on long runs of spaces
    (re.compile(r"(?: ?\n){2,}"), "\n\n"),
    (BROKEN, ""),
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
    left_out: Counter[tuple[str, str]] = Counter()  # by kind, and by name: ("references", "{{sfn}}")


def infobox_pattern(names: Iterable[str] = ()) -> re.Pattern[str]:
    """Names of infoboxes: those of the English Wikipedia, and those that begin or end with one of these `names`."""
    more = [rf"{name}\b.*|.*\b{name}" for name in map(re.escape, map(folded, names))]
    return re.compile("|".join([INFOBOX, *more]))


def read_article(wikitext: str, namespaces: Iterable[str] = (), infoboxes: re.Pattern[str] | None = None) -> Article:
    """Parse and render an article.

    Each section is parsed separately, so that an unclosed bracket affects only its own section.

    Args:
        namespaces: the names of the file and category namespaces in its language.
        infoboxes: the names of infoboxes; None means those of the English Wikipedia.

    Raises: mwparserfromhell.parser.ParserError or RecursionError if the parser fails.
    """
    wikitext = COMMENT.sub("", wikitext)
    if "__DISAMBIG__" in wikitext or any(map(DISAMBIGUATION.fullmatch, map(folded, TEMPLATE_NAME.findall(wikitext)))):
        return Article([], [], is_disambiguation=True)
    render = Renderer(namespaces, infoboxes or infobox_pattern())
    sections = []
    for heading, text in split_by_headings(wikitext, render):
        if blocks := blocks_of(render.tidy(parse(text))):
            sections.append(Section(heading, blocks))
    return Article(sections, [*filter(None, render.infoboxes)], left_out=render.left_out)


def parse(wikitext: str) -> mwparserfromhell.wikicode.Wikicode:
    """Parse, but keep the quotes of bold and italics: in wikitext they end with the line, in the parser they do not."""
    return mwparserfromhell.parse(wikitext, skip_style_tags=True)


def split_by_headings(wikitext: str, render: "Renderer") -> Iterator[tuple[str, str]]:
    """Headings, preceded by those above them, with the wikitext below them; without skipped sections."""
    first, *rest = HEADING.split(wikitext)
    yield "", first
    above: list[tuple[int, str]] = []
    for signs, heading, text in batched(rest, 3):
        path = heading_path(above, len(signs), " ".join(render.tidy(parse(heading)).split()))
        if skipped := [title for _, title in above if title.lower() in SKIPPED_SECTIONS]:
            render.left_out["sections of references and links", f"== {skipped[0]} =="] += 1
        else:
            yield path, text


def folded(name: str) -> str:
    """The name of a template in lower case, with spaces for underscores and without the namespace."""
    return " ".join(name.replace("_", " ").split()).lower().removeprefix("template:")


class Renderer:
    """Renders the parser's nodes as text. List items become lines with `* `; other line ends are kept.

    Attributes:
        infoboxes: the entries of each infobox that was met.
        left_out: how often something was left out, by kind and name.
    """

    def __init__(self, namespaces: Iterable[str], infobox_names: re.Pattern[str]):
        self.skipped_links = {name.lower() for name in namespaces} | SKIPPED_LINKS
        self.infobox_names = infobox_names
        self.infoboxes: list[list[str]] = []
        self.left_out: Counter[tuple[str, str]] = Counter()

    def __call__(self, code: Any) -> str:
        """The text of a piece of wikitext; empty for None."""
        return "".join(map(self.node, code.nodes)) if code is not None else ""

    def tidy(self, code: Any) -> str:
        """The text without what is left over after removals: empty brackets, commas after nothing, runs of spaces."""
        text = self(code)
        for pattern, replacement in TIDY:
            text, times = pattern.subn(replacement, text)
            if pattern is BROKEN and times:
                self.left_out["tables, files and references that are not closed", ""] += times
        return text

    def leave_out(self, kind: str, name: str) -> str:
        self.left_out[kind, name] += 1
        return ""

    def node(self, node: nodes.Node) -> str:
        match node:
            case nodes.Text():
                return node.value
            case nodes.HTMLEntity():
                return html.unescape(str(node)).replace("\xa0", " ")
            case nodes.Wikilink():
                return self.link(node)
            case nodes.ExternalLink():
                return self(node.title) if node.title is not None else self.leave_out("addresses of web pages", "")
            case nodes.Tag():
                return self.tag(node)
            case nodes.Template():
                return self.template(node)
            case nodes.Argument():
                return self(node.default)
            case nodes.Heading():
                return self.leave_out("headings inside other markup", "")
        return ""  # comments

    def link(self, link: nodes.Wikilink) -> str:
        target = str(link.title).strip()
        namespace = target.partition(":")[0].strip().lower().replace("_", " ")
        if namespace in self.skipped_links:
            return self.leave_out("files and categories", f"[[{namespace}:]]")
        if link.text is None and INTERLANGUAGE.match(target):
            return self.leave_out("links to other pages and projects", f"[[{namespace}:]]")
        return self(link.title).strip().removeprefix(":") if link.text is None else self(link.text)

    def tag(self, tag: nodes.Tag) -> str:
        name = str(tag.tag).strip().lower()
        if name in SKIPPED_TAGS:
            return self.leave_out(SKIPPED_TAGS[name], f"<{name}>")
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
        return superscript(inside) if name == "sup" else inside

    def template(self, template: nodes.Template) -> str:
        typed = self(template.name).strip()
        name = folded(typed)
        if self.infobox_names.fullmatch(name):
            self.infoboxes.append(entries := [])  # before those inside it
            entries += self.entries(template)
            return ""
        function = FUNCTION.match(name)
        name = function[0] if function else name
        rule = COUNTRIES.get(typed) or TEMPLATES.get(PREFIX.sub(r"\1", name) if name not in TEMPLATES else name)
        said = None
        if rule is not None:
            arguments = {str(parameter.name).strip(): self(parameter.value).strip() for parameter in template.params}
            said = apply(rule, as_function(typed[len(name) :].strip(), arguments) if function else arguments)
        if said is None:
            kinds = (kind for kind, names in WORDLESS.items() if names.fullmatch(name))
            return self.leave_out(next(kinds, UNKNOWN), f"{{{{{name:.80}}}}}")
        return said

    def entries(self, box: nodes.Template) -> Iterator[str]:
        """The entries `name: value` of an infobox, without empty ones and those that only concern the layout."""
        for parameter in box.params:
            name = " ".join(str(parameter.name).strip().split())
            lines = self.tidy(parameter.value).split("\n")
            values = [words for line in lines if (words := " ".join(line.lstrip("* ").split()).rstrip(",;"))]
            words = re.findall(r"[^\W\d_]+", name.lower())
            if values and words and not LAYOUT & set(words) and not FILE_NAME.search(values[0]):
                yield f"{name.replace('_', ' ')}: {', '.join(values)}"
            elif values:
                self.leave_out("captions and layout of infoboxes", f"|{name}=")


def as_function(first: str, arguments: Arguments) -> Arguments:
    """The parameters of a function of the wiki, `{{formatnum:1|R}}`: what follows the colon is the first."""
    numbered = {str(int(name) + 1): value for name, value in arguments.items() if name.isdecimal()}
    return {"1": first} | {name: value for name, value in arguments.items() if not name.isdecimal()} | numbered
