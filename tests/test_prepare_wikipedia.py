"""prepare_wikipedia.py: generated dumps into passages and infoboxes."""

import bz2
import json
import operator
import os
import random
import sys
import tracemalloc
from collections import Counter
from functools import partial
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest

import prepare_wikipedia
from atlas.files.jsonl import DataError
from prepare_wikipedia import DumpReader, Page, cannot_read, in_order, prepare, read_dump, read_pages
from splitting import batched
from tests.kit import read_jsonl
from tests.origin import one_sentence, run_script
from wikitext import read_article

pytestmark = pytest.mark.processes

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="de">
  <siteinfo><sitename>Wikipedia</sitename><namespaces>
    <namespace key="0" case="first-letter" />
    <namespace key="6" case="first-letter">Datei</namespace>
    <namespace key="14" case="first-letter">Kategorie</namespace>
  </namespaces></siteinfo>
"""


def page(number, title, text, namespace=0, redirect=False):
    return (
        f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{namespace}</ns>\n    <id>{number}</id>\n"
        + ('    <redirect title="Elsewhere" />\n' if redirect else "")
        + f"    <revision>\n      <id>{number + 1000}</id>\n      <contributor><id>5</id></contributor>\n"
        + f'      <text xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )


def article(number):
    rng = random.Random(number)

    def sentences(count):
        return " ".join(
            f"The [[x {rng.randrange(99)}|{rng.choice(['red', 'blue'])} ''thing'']] of ünit {i} is {rng.random():.3f}."
            "<ref>{{cite web|url=http://x}}</ref>"
            for i in range(count)
        )

    return (
        f"{{{{Infobox town\n| name = Town {number}\n| population = {rng.randrange(10**6):,}\n| image = x.jpg }}}}\n"
        f"'''Town {number}''' is a town & more. {sentences(rng.randrange(30))}\n\n== History ==\n{sentences(3)}\n"
        f"=== Early ===\n* {sentences(1)}\n* plain\n\n== References ==\n{{{{reflist}}}}\n[[Kategorie:Town]]"
    )


def pages(articles=40):
    yield page(1, "Moved", "#REDIRECT [[Elsewhere]]", redirect=True)
    yield page(2, "Moved before 2008", " #redirect [[Elsewhere]]")
    yield page(3, "Talk:Town", "Not an article.", namespace=1)
    yield page(4, "Mercury", "'''Mercury''' may be:\n* [[a]]\n{{disambiguation|geo}}")
    yield page(5, "Town (disambiguation)", "* [[b]]")
    yield page(6, "Nothing", "{{stub}}\n== References ==\nx")
    yield from (page(i, f"Town {i}", article(i)) for i in range(100, 100 + articles))


def write_dump(path, some_pages=None):
    text = (HEAD + "".join(pages() if some_pages is None else some_pages) + "</mediawiki>\n").encode()
    path.write_bytes(bz2.compress(text) if path.suffix == ".bz2" else text)
    return path


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return write_dump(tmp_path_factory.mktemp("dump") / "pages-articles.xml.bz2")


def test_the_script(dump, tmp_path):
    done = run_script("prepare_wikipedia", dump, "--output_directory", tmp_path, "--processes", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    texts, boxes = read_jsonl(tmp_path / "text-list-100-sec.jsonl"), read_jsonl(tmp_path / "infobox.jsonl")
    assert f"{len(texts)} passages of 40 articles" in done.stdout and f"{len(boxes)} passages" in done.stdout
    assert (
        "left out: articles without text 1, disambiguation pages 2, pages that are not articles 1, redirects 2"
        in done.stdout
    )
    assert all(list(row) == ["id", "title", "section", "text"] for row in texts + boxes)
    assert [row["title"] for row in boxes] == [f"Town {i}" for i in range(100, 140)]
    assert boxes[0]["id"] == "100-infobox-0" and boxes[0]["text"].startswith("name: Town 100; population: ")
    assert len({row["id"] for row in texts + boxes}) == len(texts + boxes)
    assert {row["section"] for row in texts} == {"", "History", "History: Early"}
    first = [row for row in texts if row["title"] == "Town 100"]
    assert first[0]["id"] == "100-0" and first[0]["text"].startswith("Town 100 is a town & more. The ")
    assert first[-1]["text"].endswith("plain") and first[-1]["section"] == "History: Early"
    assert all(len(row["text"].split()) <= 100 and not set("[]{}<>'") & set(row["text"]) for row in texts)
    assert {path.name for path in tmp_path.iterdir()} == {"text-list-100-sec.jsonl", "infobox.jsonl"}


def test_the_same_whatever_the_processes_and_the_container(dump, tmp_path, capsys):
    plain = write_dump(tmp_path / "dump.xml")
    halves = [
        write_dump(tmp_path / "a.xml", list(pages())[:20]),
        write_dump(tmp_path / "b.xml.bz2", list(pages())[20:]),
    ]
    made = []
    for name, dumps, processes in (("1", [dump], 1), ("3", [dump], 3), ("plain", [plain], 1), ("halves", halves, 1)):
        prepare(dumps, tmp_path / name, 50, processes, None)
        made.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert len(made[0]) == 2 and made.count(made[0]) == 4
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(said) == 4 and len(set(said)) == 1


def test_pages_are_those_of_the_tree(dump):
    """Whatever the pieces, the same as by the whole tree in memory."""
    text = bz2.decompress(dump.read_bytes())
    tree, space = ElementTree.fromstring(text), {"m": "http://www.mediawiki.org/xml/export-0.10/"}
    expected = []
    for element in tree.findall("m:page", space):
        fields = (element.findtext(f"m:{name}", namespaces=space) for name in ("id", "title", "ns"))
        wikitext = element.findtext("m:revision/m:text", namespaces=space)
        is_redirect = element.find("m:redirect", space) is not None or wikitext.lower().startswith(" #redirect")
        expected.append(Page(*fields, is_redirect, wikitext))
    for size in (1, 7, 1000, len(text)):
        reader = DumpReader()
        found = [page for start in range(0, len(text), size) for page in reader.feed(text[start : start + size], False)]
        assert reader.feed(b"", True) == [] and found == expected
        assert reader.file_namespaces == ["Datei", "Kategorie"]


def test_reading_holds_little_memory(tmp_path):
    peaks = []
    for articles in (20, 2000):
        path = write_dump(tmp_path / f"{articles}.xml", (page(i, f"T {i}", "word " * 2000) for i in range(articles)))
        tracemalloc.start()
        assert sum(1 for _ in read_dump(path, lambda size: None)) == articles
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 20e6 and peaks[1] < 1.5 * peaks[0] < 3e6


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_are_given_a_few_batches_ahead(processes):
    taken = []

    def numbers():
        for number in range(500):
            taken.append(number)
            yield number

    results = []
    for result in in_order(operator.mul, batched(numbers(), 10), 3, processes, None):  # three times the list
        results.append(result)
        assert len(taken) - 10 * len(results) <= 10 * (prepare_wikipedia.AHEAD * processes + 1)
    assert results == [3 * list(range(start, start + 10)) for start in range(0, 500, 10)]


class EndsTheProcess:
    """Whatever process it is sent to."""

    def __reduce__(self):
        return os._exit, (9,)


def test_what_ends_a_process_is_given_up_and_the_rest_is_done():
    items = [EndsTheProcess() if number in (2, 6, 7, 40) else number for number in range(50)]
    found = in_order(operator.mul, batched(items, 8), 1, 2, lambda item: [type(item).__name__])
    expected = [item if isinstance(item, int) else "EndsTheProcess" for item in items]
    assert [item for items in found for item in items] == expected


STRANGE = (" ", " \n", "( ", "=", "; ", "* ", "|", "[[", "''")
BOMB = '<?xml version="1.0"?>\n<!DOCTYPE m [<!ENTITY a "' + "a" * 1000 + '"><!ENTITY b "' + "&a;" * 1000 + '">]>\n'


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("d.xml.bz2", lambda packed, text: packed[: len(packed) // 2], "truncated"),
        ("d.xml.bz2", lambda packed, text: packed[:20], "truncated"),
        ("d.xml.bz2", lambda packed, text: packed[:500] + b"\0" * 50 + packed[550:], "damaged"),
        ("d.xml.bz2", lambda packed, text: bz2.compress(text[: len(text) // 2]), "line [0-9,]+: not well-formed"),
        ("d.xml", lambda packed, text: text[: len(text) // 2], "line [0-9,]+: not well-formed XML .*fetch it again"),
        ("d.xml", lambda packed, text: text.replace(b"<title>Town 110", b"<title"), "not well-formed"),
        ("d.xml", lambda packed, text: text.replace(b"Town 110", b"Town \xff"), "not well-formed"),
        ("d.xml", lambda packed, text: b"", "no element found"),
        ("d.xml", lambda packed, text: b"<html></html>", "the first element is <html>"),
        ("d.xml", lambda packed, text: BOMB.encode() + text.replace(b"more", b"&b;"), "line 2: a document type"),
        ("d.xml", lambda packed, text: text.replace(b"more", b"&b;"), "undefined entity"),
        ("d.xml", lambda packed, text: text.replace(b"<id>110</id>", b""), "a page without <id>"),
        ("d.xml", lambda packed, text: text.replace(b"more", b"x" * (1 << 24)), "a text of more than 16,777,216 char"),
        ("d.xml", lambda packed, text: HEAD.encode() + b"</mediawiki>", "contains no article"),
    ],
)
def test_a_bad_dump_leaves_nothing_behind(dump, tmp_path, name, change, words):
    packed = dump.read_bytes()
    bad = tmp_path / name
    bad.write_bytes(change(packed, bz2.decompress(packed)))
    output = tmp_path / "made"
    output.mkdir()
    (output / "infobox.jsonl").write_text("of an earlier run")
    with pytest.raises(DataError, match=f"^{bad}.*{words}"):
        prepare([bad], output, 100, 1, None)
    assert [path.read_text() for path in output.iterdir()] == ["of an earlier run"]


def test_mistakes_get_one_sentence(dump, tmp_path, monkeypatch):
    cut = tmp_path / "cut.xml.bz2"
    cut.write_bytes(dump.read_bytes()[:-100])
    said = one_sentence(run_script("prepare_wikipedia", cut, "--output_directory", tmp_path / "made"))
    assert f"{cut}: truncated" in said and not list((tmp_path / "made").iterdir())
    absent = run_script("prepare_wikipedia", dump, tmp_path / "absent", "--output_directory", tmp_path / "made")
    assert "absent does not exist" in one_sentence(absent)
    monkeypatch.setattr(prepare_wikipedia.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["prepare_wikipedia.py", str(dump), "--output_directory", str(tmp_path)])
    with pytest.raises(SystemExit, match="mwparserfromhell; run: pip install mwparserfromhell"):
        prepare_wikipedia.main()


def test_pages_that_the_parser_cannot_read_are_named(dump, monkeypatch):
    def fail(wikitext, namespaces):
        raise RecursionError

    monkeypatch.setattr("wikitext.read_article", fail)
    made = read_pages([(Page("1", "Deep", "0", False, "x"), [])], 100)
    assert made == prepare_wikipedia.Parsed([], [], Counter(), ["Deep"])


def text_of(wikitext, namespaces=()):
    return "|".join(block for section in read_article(wikitext, namespaces).sections for block in section.blocks)


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' ''italic'' '''''both''''' it's", "Bold italic both it's"),
        ("a [[link]], a [[target|''shown'']], [[pipe (trick)|pipe]]s", "a link, a shown, pipes"),
        ("[[:Category:Foo]] [[wikt:word|word]] [[fr:Ville]] [[Category:X]]", "Category:Foo word"),
        ("x [[File:a.jpg|thumb|A ''caption'' with [[links]]]] y [[image:b.png]]", "x y"),
        ("x<ref>gone {{cite|a}}</ref> y<ref name=a /> z<!-- gone -->.", "x y z."),
        ("see [http://a.b the site] and [http://c.d] and http://e.f now", "see the site and and now"),
        ("before\n{| class=wikitable\n|-\n! a !! b\n|-\n| 1 || {{x|2}}\n|}\nafter", "before|after"),
        ("<gallery>\nFile:a.jpg|x\n</gallery>\ntext", "text"),
        ("10<sup>3</sup> CO<sub>2</sub> 1&nbsp;km&mdash;&amp; &lt;x&gt;", "10^3 CO2 1 km—& <x>"),
        ("a<br>b<br />c <math>x^2 &lt; 1</math> <nowiki>[[raw]]</nowiki>", "a b c x^2 < 1 [[raw]]"),
        ("'''Q''' (; {{IPA|kju}}, {{x}}) is ( ) the {{unknown|thing}} .", "Q is the."),
        ("'''Rome''' ({{lang-it|Roma}}; {{IPA|x}}) is", "Rome (Roma) is"),
        ("{{convert|10|km|mi}}, {{convert|3|to|5|m|ft|abbr=on}}, {{val|5|e=3|u=m}}", "10 km, 3 to 5 m, 5×10^3 m"),
        (
            "{{birth date|df=yes|1809|2|12}} {{death date and age|1865|4|15|1809|2|12}}",
            "12 February 1809 15 April 1865",
        ),
        (
            "{{birth date|MDY}} {{start date|1999}} {{as of|2010|7}} {{as of|2010|lc=y}}",
            "MDY 1999 As of July 2010 as of 2010",
        ),
        ("{{lang|de|{{nowrap|so ''so''}}}} {{chem|H|2|O}} {{frac|1|2}} {{'}}{{ndash}}{{nbsp}}.", "so so H2O 1/2 ' –."),
        ("{{nowrap}} {{lang}} {{convert}} {{circa|1500}} {{birth date}} x", "c. 1500 x"),
        (
            "One:\n* a [[b]]\n** c.\n# d\n\nTwo\n: indented\n; term : meaning",
            "One:|a b;|c.|d.|Two indented|term: meaning",
        ),
        ("x\n; term\n: meaning\n;Sub:\ny\n::: deep", "x|term: meaning|Sub: y deep"),
        ("''Iliad'''s '''bold and ''more\n\nnext", "Iliad's bold and more|next"),
        ("x<ref>{{cite|a\ny <small>z", "x y z"),
        ("<ul><li>a</li><li>b</li></ul>end", "a;|b.|end"),
        ("__NOTOC__ a\n\n----\n\nb {{DEFAULTSORT:X}}", "a|b"),
        ("{{#if:x|y|z}} {{{1|default}}} <blockquote>Quoted.</blockquote>", "default|Quoted."),
        ("unclosed '''bold and [[link\n\n{{template | and <ref>ref", None),
        ("&#xD800; &#0; x", None),
        ("[[" * 3000 + "{{" * 3000, None),
    ],
)
def test_wikitext(wikitext, text):
    found = text_of(wikitext)
    json.dumps(found, ensure_ascii=False).encode()
    if text is not None:
        assert found == text


@pytest.mark.slow
def test_strange_pages_do_not_end_a_run():
    """Some of them end the process that parses them, some take it for ever: they are named, and the others are read."""
    texts = ["a", "{{a|" * 20_000, "= " * 100_000 + "x", "b", *(text * 10_000 + "x" for text in STRANGE), "Ordinary."]
    strange = [(Page(str(i), f"Page {i}", "0", False, text), []) for i, text in enumerate(texts)]
    made = list(in_order(partial(read_pages, seconds=1), batched(strange, 4), 100, 1, cannot_read))
    counts, failures = sum((m.counts for m in made), Counter()), [title for m in made for title in m.failures]
    assert counts.total() + len(failures) == len(texts) and {"Page 1", "Page 2"} <= {*failures}
    assert [made[0].passages[0]["text"], made[-1].passages[-1]["text"]] == ["a", "Ordinary."]


def test_namespaces_of_other_languages():
    wikitext = "x [[Datei:a.jpg|mini|Text]] [[Kategorie:Y]] [[Haus: Z]]"
    assert text_of(wikitext, ["Datei", "Kategorie"]) == "x Haus: Z" and "Datei" not in text_of(wikitext, ["Datei"])


def test_sections():
    found = read_article(
        "top\n== A ==\n=== ''B'' {{x}}===\nb\n== See also ==\n* x\n=== in it ===\ny\n== C & D ==\nc\n== E ==\n"
    )
    assert [(section.heading, section.blocks) for section in found.sections] == [
        ("", ["top"]),
        ("A: B", ["b"]),
        ("C & D", ["c"]),
    ]


def test_infoboxes():
    found = read_article(
        "{{Infobox person<!-- x -->\n| birth_name = Ann ''B''\n| image = a.jpg\n| caption = Ann\n| empty =\n"
        "| birth_date = {{birth date and age|1950|1|2}}<ref>x</ref>\n| occupation = {{hlist|a|b}}\n"
        "| spouse = C<br/>D\n| children = {{unbulleted list|E|F}}\n}}\n'''Ann''' is.\n"
        "{{Taxobox\n| genus = ''Orycteropus''\n| color = pink }}{{navbox|infobox = x}}"
    )
    assert found.infoboxes == [
        ["birth name: Ann B", "birth date: 2 January 1950", "occupation: a, b", "spouse: C, D", "children: E, F"],
        ["genus: Orycteropus"],
    ]
    assert [section.blocks for section in found.sections] == [["Ann is."]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("disambiguation", True),
        ("Disambig", True),
        ("dab", True),
        ("hndis|Smith, J.", True),
        ("Airport disambiguation", True),
        ("disambiguation needed", False),
        ("other uses", False),
        ("DAB radio", False),
    ],
)
def test_disambiguation(template, expected):
    assert read_article(f"x\n{{{{{template}}}}}").is_disambiguation is expected
