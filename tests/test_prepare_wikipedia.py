"""prepare_wikipedia.py: generated dumps into passages and infoboxes."""

import bz2
import gzip
import json
import lzma
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
from templates import RULES, TEMPLATES, apply
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


PACK = {".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress}


def write_dump(path, some_pages=None):
    text = (HEAD + "".join(pages() if some_pages is None else some_pages) + "</mediawiki>\n").encode()
    path.write_bytes(PACK.get(path.suffix, bytes)(text))
    return path


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return write_dump(tmp_path_factory.mktemp("dump") / "pages-articles.xml.bz2")


def test_the_script(dump, tmp_path):
    done = run_script("prepare_wikipedia", dump, "--output_directory", tmp_path, "--processes", "2", real=True)
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
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("left out", "removed"))]
    assert len(said) == 8 and len(set(said)) == 2


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
    said = one_sentence(run_script("prepare_wikipedia", cut, "--output_directory", tmp_path / "made", real=True))
    assert f"{cut}: truncated" in said and not list((tmp_path / "made").iterdir())
    absent = run_script("prepare_wikipedia", dump, tmp_path / "absent", "--output_directory", tmp_path / "made")
    assert "absent does not exist" in one_sentence(absent)
    monkeypatch.setattr(prepare_wikipedia.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["prepare_wikipedia.py", str(dump), "--output_directory", str(tmp_path)])
    with pytest.raises(SystemExit, match="mwparserfromhell; run: pip install mwparserfromhell"):
        prepare_wikipedia.main()


def test_pages_that_the_parser_cannot_read_are_named(dump, monkeypatch):
    def fail(wikitext, namespaces, infoboxes):
        raise RecursionError

    monkeypatch.setattr("wikitext.read_article", fail)
    made = read_pages([(Page("1", "Deep", "0", False, "x"), [])], 100)
    assert made == prepare_wikipedia.Parsed([], [], Counter(), ["Deep"], Counter())


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
            "12 February 1809 April 15, 1865 (aged 56)",
        ),
        (
            "{{birth date|MDY}} {{start date|1999}} {{as of|2010|7}} {{as of|2010|lc=y}}",
            "MDY 1999 As of July 2010 as of 2010",
        ),
        ("{{lang|de|{{nowrap|so ''so''}}}} {{chem|H|2|O}} {{frac|1|2}} {{'}}{{ndash}}{{nbsp}}.", "so so H2O 1/2 '–."),
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


# By family: what is typed, and what the template shows by its documentation, without the conversion of quantities.
TEMPLATES_AND_WORDS = """
{{convert|6|ft|4|in|cm|0}} => 6 ft 4 in
{{convert|2413|ft|0|abbr=on}} => 2413 ft
{{convert|52419|sqmi|km2|abbr=out|sp=us}} => 52419 sq mi
{{convert|30|-|40|C|F}} => 30–40 °C
{{convert|60|and(-)|80|kg}} => 60 and 80 kg
{{convert|10|x|20|x|30|ft|m}} => 10 × 20 × 30 ft
{{convert|20|+/-|2|km}} => 20 ± 2 km
{{convert|2+1/2|in|mm}} => 2 1/2 in
{{convert|22|e6acre|km2}} => 22×10^6 acre
{{convert|10|ft|m|-long|adj=mid}} bridge => 10 ft-long bridge
{{convert|4|acre|ha|planned|adj=pre}} => 4 planned acre
{{convert|5|mi|abbr=values}} => 5
{{convert|1=5|2=mi|3=km}} => 5 mi
{{val|5|0.2|u=m}} => 5±0.2 m
{{val|5|e=3|u=m}} => 5×10^3 m
{{val|5|3|2|e=6}} => (5 +3/−2)×10^6
{{val|1.234(5)|ul=kg}} => 1.234(5) kg
{{val|10|-|20|u=m|up=s}} => 10–20 m/s
{{val|p=~|5|u=%}} => ~5%
{{val|20|u=degC}} => 20 °C
{{height|ft=5|in=11}} {{height|m=1.80}} => 5 ft 11 in 1.80 m
{{duration|m=3|s=5}} {{duration|1|2|3}} => 3:05 1:02:03
{{frac|1|2}} {{frac|3|1|2}} {{frac|4}} {{sfrac|n + 1|2}} => 1/2 3 1/2 1/4 (n + 1)/2
{{chem|SO|4|2-}} {{chem2|H2O}} {{chem2|SO4(2-)}} => SO4^2- H2O SO4^2-
10{{sup|3}} x{{sup|a}} H{{sub|2}}O 5{{e|-3}} => 10^3 xa H2O 5×10^-3
{{ordinal|3}} {{ordinal|112}} => 3rd 112th
{{formatnum: 3003}} {{formatnum:1234|R}} => 3003 1234
{{uc:ab}} {{lc:AB}} {{ucfirst:ab}} {{#tag:ref|x}} => AB ab Ab
{{US$|5 million}} {{£|3}} {{currency|5|EUR}} {{INRConvert|5|c}} {{£sd|l=5|d=3}} => US$5 million £3 €5 ₹5 crore £5 3d
{{birth date|1990|January|2}} => January 2, 1990
{{birth date|1809|2|12|df=yes}} {{birth date|1809|02|12|mf=yes}} => 12 February 1809 February 12, 1809
{{birth date|-44|3|15}} {{start date|44 BC|Mar}} => March 15, 44 BC March 44 BC
{{birth-date|2 January 1990}} => 2 January 1990
{{start-date|July 16, 1969, 13:32:00|timezone=yes}} => July 16, 1969, 13:32:00
{{start date|1993|02|24|08|30|||Z}} => 08:30, February 24, 1993
{{death date and age|df=yes|1865|4|15|1809|2|12}} => 15 April 1865 (aged 56)
{{death year and age|1865|1809}} {{birth year and age|1950|3}} => 1865 (aged 55–56) 1950
{{film date|1997|1|17|Spain|1998|2||France|df=y}} => 17 January 1997 (Spain), February 1998 (France)
{{age|1969|7|20|1999|7|19}} => 29
{{As of|2010|alt=in 2010}} => in 2010
{{as of|2010|7|5}} {{as of|2010|7|5|df=US|lc=y}} => As of 5 July 2010 as of July 5, 2010
{{as of|2010|since=y|lc=y}} {{as of|2010|bare=y}} {{as of|2010|pre=early|post=,}} => since 2010 2010 As of early 2010,
{{circa|1850|1855}} {{circa}} 1500 {{fl.|1850}} => c. 1850 – 1855 c. 1500 fl. 1850
{{marriage|Ann|1842|1865|end=died}} {{marriage|Bo|1990|2000}} => Ann (m. 1842; died 1865) Bo (m. 1990–2000)
{{OldStyleDate|February 2|1905|January 20}} => February 2 [O.S. January 20] 1905
{{blockquote|text=Words.|author=Ann|source=a book}} => Words. — Ann, a book
{{quote|Words.}} {{cquote|More.||||Book}} => Words.|More. — Book
{{lang|de|Wort}} {{lang|fr|text=mot}} {{rtl-lang|ar|الـ}} => Wort mot الـ
{{transl|ar|al-alif}} {{transl|ar|DIN|al-bā}} => al-alif al-bā
{{lang-ru|слово|slovo|lit=word}} {{langx|ru|слово|slovo}} => слово, slovo, lit. 'word' слово, slovo
{{nihongo|Aikido|合気道|aikidō}} {{nihongo||合気道}} => Aikido (合気道, aikidō) 合気道
{{nihongo3|English|字|ji}} => ji (字, English)
{{zh|s=北京|p=Běijīng|l=capital}} => simplified Chinese: 北京; pinyin: Běijīng; lit. 'capital'
{{script/Arabic|ﷲ}} {{nastaliq|ملي|fa}} => ﷲ ملي
{{nowrap|1=a=b}} {{small|b}} {{abbr|c|meaning}} {{resize|90%|d}} {{color|red|e}} => a=b b c d e
{{vanchor|f|g}} {{angbr|a}} {{sic|teh}} {{sic|hide=y|teh}} => f ⟨a⟩ teh [sic] teh
{{ubl|a|b}} => a;|b
{{ordered list|start=2|a|b}} => a;|b
{{collapsible list|title=T|1=a|2=b}} => T;|a;|b
{{URL|http://a.b|A}} {{ill|Ann|de|Anna}} {{ill|de|Ann|Anna}} {{ill|Ann|de|lt=her}} => A Ann Ann her
{{flag|FRA}} {{FRA}} {{flagcountry|Peru}} => France France Peru
{{USS|Hornet|CV-12}} {{USS|Hornet|CV-12|6}} {{HMS|Ajax|22|2}} => USS Hornet (CV-12) Hornet HMS Ajax
{{bibleverse|1|John|3:16|KJV}} {{bibleref|Mark|3:25|9}} => 1 John 3:16 Mark 3:25
{{coord|57|18|22|N|4|27|W|type:isle}} {{coord|44.1|-87.9}} => 57°18′22″N 4°27′W 44.1°N 87.9°W
{{coord|57|N|4|W|display=title}} A{{music|flat}}4 {{music|time|3|4}} => A♭4 3/4
a{{ndash}}b{{snd}}c{{mdash}}d {{yes}} {{no|Not yet}} => a–b – c—d Yes Not yet
{{fossil range|370|0}} {{track gauge|1435mm}} => 370–0 million years ago 1435 mm
"""


@pytest.mark.parametrize("line", TEMPLATES_AND_WORDS.strip().splitlines())
def test_templates(line):
    wikitext, words = line.split(" => ")
    article = read_article(wikitext)
    assert "|".join(block for section in article.sections for block in section.blocks) == words
    assert not [name for kind, name in article.left_out if kind.startswith("templates")]


@pytest.mark.parametrize(
    "wikitext",
    [
        *("{{#if:x|y|z}}", "{{currentyear}}", "{{:An article}}", "{{thing|words}}", "{{nowrap|none=x}}"),
        *("{{convert|30|C|F|disp=output number only}}", "{{age|1969|7|20}}", "{{birth date|1990|Smarch|2}}"),
        *("{{USS|Hornet|CV-12|4}}", "{{music|treble}}", "{{coord|1|2|3}}", "{{currency|5|XYZ}}", "{{ordinal|n}}"),
    ],
)
def test_what_a_template_says_is_known_or_counted(wikitext):
    article = read_article(f"a {wikitext} b {wikitext}")
    ((kind, name),) = article.left_out
    assert article.sections[0].blocks == ["a b"]
    assert kind == "templates whose words are not known" and article.left_out[kind, name] == 2
    assert wikitext.lower().startswith(name.removesuffix("}}"))


def test_no_rule_fails_whatever_is_typed():
    rng = random.Random(0)
    typed = (
        "",
        "0",
        "-",
        "–3",
        "1/2",
        "²",
        "٣",
        "e9",
        "x" * 50,
        "1990",
        "Feb",
        "31",
        "-44",
        "N",
        "to",
        "ft",
        "{1}<{2}>",
        "=",
    )
    for name, rule in TEMPLATES.items():
        for count in range(30):
            arguments = {str(number): rng.choice(typed) for number in range(1, rng.randrange(1, 9))}
            arguments |= {rng.choice(("df", "adj", "disp", "e", "u", "9", "999", "h", "lt")): rng.choice(typed)}
            assert isinstance(apply(rule, arguments), str | None), (name, arguments, count)


def test_a_template_has_one_rule():
    assert sum(len(names.split("; ")) for _, names in RULES) == len(TEMPLATES)


def test_what_is_left_out_is_counted_by_kind():
    found = read_article(
        "a<ref>x</ref>{{sfn|b|1999}}{{#tag:ref|c}} {{citation needed}} {{IPA|kju}} {{main|Other}}\n"
        "{| class=wikitable\n| 1\n|}\n[[File:a.jpg]] [[Kategorie:X]] [[fr:Ville]] [http://a.b] "
        "<gallery>\nb.jpg\n</gallery>\n{{Infobox a|image=x|name=n}} {{navbox|a}} "
        "<syntaxhighlight>x</syntaxhighlight>\n== See also ==\n* x\n",
        ["Kategorie"],
    )
    kinds = Counter()
    for (kind, _), number in found.left_out.items():
        kinds[kind] += number
    assert kinds.pop("references") == 3
    assert [kind for kind, number in sorted(kinds.items()) if number == 2] == [
        "files and categories",
        "links to other pages and projects",
    ]
    assert [kind for kind, number in sorted(kinds.items()) if number == 1] == [
        "addresses of web pages",
        "captions and layout of infoboxes",
        "images, diagrams and recordings",
        "listings of programs",
        "notes above a section",
        "pronunciations",
        "requests to editors",
        "sections of references and links",
        "tables",
    ]


def test_broken_markup_that_is_lost_is_counted():
    found = read_article("x<ref>{{cite|a\ny\n{| class=wikitable\nz")
    assert found.left_out == {("tables, files and references that are not closed", ""): 2}


@pytest.mark.slow
def test_strange_pages_do_not_end_a_run():
    """Some of them end the process that parses them, some take it for ever: they are named, and the others are read."""
    texts = ["a", "{{a|" * 20_000, "= " * 100_000 + "x", "b", *(text * 10_000 + "x" for text in STRANGE), "Ordinary."]
    strange = [(Page(str(i), f"Page {i}", "0", False, text), []) for i, text in enumerate(texts)]
    made = list(in_order(partial(read_pages, seconds=1), batched(strange, 4), 100, 1, cannot_read))
    counts, failures = sum((m.counts for m in made), Counter()), [title for m in made for title in m.failures]
    assert counts.total() + len(failures) == len(texts) and {"Page 1", "Page 2"} <= {*failures}
    assert [made[0].passages[0]["text"], made[-1].passages[-1]["text"]] == ["a", "Ordinary."]


NO_BOX, ONLY_BOX, OTHER_BOX = (
    "Some text.",
    "{{Infobox a|name=Ann}}",
    "{{Карточка персонажа|имя=Анна}} {{Bio\n|Nome=Anna}} a",
)


def test_a_dump_without_an_infobox_or_with_nothing_else(tmp_path, capsys):
    for text, lines in ((NO_BOX, (1, 0)), (ONLY_BOX, (0, 1))):
        prepare([write_dump(tmp_path / "d.xml", [page(1, "A", text)])], tmp_path / "made", 100, 1, None)
        paths = [tmp_path / "made" / name for name in ("text-list-100-sec.jsonl", "infobox.jsonl")]
        assert tuple(len(read_jsonl(path)) for path in paths) == lines
        said = capsys.readouterr().out
        assert f"{paths[0]}: {lines[0]} passages of 1 articles\n{paths[1]}: {lines[1]} passages\n" in said
        assert ("no infobox was found" in said and "--infobox_names" in said) is not bool(lines[1])


def test_the_flags_for_infoboxes_and_templates(tmp_path, capsys, monkeypatch):
    text = OTHER_BOX + "{{thing}} {{Thing|2}} {{cite web}}" + "".join(f"{{{{t{i}}}}}" for i in range(9))
    dump, made = write_dump(tmp_path / "d.xml", [page(1, "A", text)]), tmp_path / "made"
    flags = [str(dump), "--output_directory", str(made), "--processes", "1", "--list_templates"]
    monkeypatch.setattr(sys, "argv", ["prepare_wikipedia.py", *flags, "--infobox_names", "карточка", "Bio"])
    prepare_wikipedia.main()
    assert [row["text"] for row in read_jsonl(made / "infobox.jsonl")] == ["имя: Анна", "Nome: Anna"]
    said = capsys.readouterr().out
    assert "left out: 11 templates whose words are not known, of 10 names, most often {{thing}} 2, {{t0}} 1" in said
    assert "removed from the articles: references 1\n" in said
    listed = [line.split() for line in said.splitlines() if line.startswith("   ")]
    assert [line[:2] for line in listed] == [
        ["2", "{{thing}}"],
        ["1", "{{cite"],
        *(["1", f"{{{{t{i}}}}}"] for i in range(9)),
    ]


@pytest.mark.parametrize("suffix", [".xml", ".bz2", ".gz", ".xz"])
def test_packed_dumps_are_read_by_their_content(tmp_path, suffix):
    named = write_dump(tmp_path / f"dump{suffix}")
    path = named.rename(tmp_path / "dump")
    assert [page.id for page, _ in read_dump(path, lambda size: None)][:3] == ["1", "2", "3"]
    if suffix != ".xml":
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=f"^{path}: (truncated|damaged) .*fetch it again"):
            list(read_dump(path, lambda size: None))


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"Rar!\x1a", "rar")],
)
def test_dumps_that_cannot_be_unpacked_say_so(dump, tmp_path, start, name):
    (tmp_path / "d").write_bytes(start + b"x" * 100)
    with pytest.raises(DataError, match=f"d: packed by {name}, .*unpack it first"):
        prepare([dump, tmp_path / "d"], tmp_path / "made", 100, 1, None)
    assert not (tmp_path / "made").exists()


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
        ["birth name: Ann B", "birth date: January 2, 1950", "occupation: a, b", "spouse: C, D", "children: E, F"],
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
