"""prepare_corpus.py: folders of documents, and tables, into passages."""

import csv

import pytest

from atlas.files.jsonl import DataError
from documents import Outline, read_html, read_markdown, read_text
from prepare_corpus import prepare
from tests.kit import read_jsonl
from tests.origin import one_sentence, run_script


def sections(outline: Outline, name="name"):
    found = outline.sections()
    return outline.title or name, [(section.heading, "|".join(section.blocks)) for section in found]


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path / "documents",
        **{
            "notes.txt": "First paragraph,\r\ngoes on.\r\n\r\n"
            + "Second sentence of ten words, which is repeated here. " * 30,
            "deep__er__guide.md": "# The gu\xadide\n\nIntro.\n\n## Set&shy;up\n\n- one\n- two\n",
            "page.HTML": "<html><head><title>Site</title></head><body><h1>Page</h1><p>Text.</p></body></html>",
            "empty.txt": " \n\n",
            "only_markup.html": "<script>x()</script>",
            "picture.png": b"\x89PNG\xff",
            ".hidden.txt": "no",
            ".git__config.txt": "no",
            "bom.txt": b"\xef\xbb\xbfWith a mark.",
        },
    )


@pytest.mark.processes
def test_a_folder(folder, tmp_path):
    done = run_script("prepare_corpus", folder, "--output", tmp_path / "corpus.jsonl", "--words", "50")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = read_jsonl(tmp_path / "corpus.jsonl")
    assert done.stdout.splitlines() == [
        f"{tmp_path}/corpus.jsonl: {len(rows)} passages of 4 documents",
        "left out: .png files 1, empty documents 2, hidden files and folders 2",
        "    .png files: picture.png",
        "    empty documents: empty.txt, only_markup.html",
        "    hidden files and folders: .git/, .hidden.txt",
    ]
    assert rows[:4] == [
        {"id": "bom.txt-0", "title": "bom", "section": "", "text": "With a mark."},
        {"id": "deep/er/guide.md-0", "title": "The guide", "section": "", "text": "Intro."},
        {"id": "deep/er/guide.md-1", "title": "The guide", "section": "Setup", "text": "one; two"},
        rows[3],
    ]
    notes = rows[3:-1]
    assert [row["id"] for row in notes] == [f"notes.txt-{i}" for i in range(len(notes))] and len(notes) > 4
    assert notes[0]["text"].startswith("First paragraph, goes on. Second") and notes[0]["text"].endswith("here.")
    assert all(25 <= len(row["text"].split()) <= 50 for row in notes)
    assert rows[-1] == {"id": "page.HTML-0", "title": "Page", "section": "", "text": "Text."}
    first = (tmp_path / "corpus.jsonl").read_bytes()
    prepare(folder, tmp_path / "corpus.jsonl", 50)
    assert (tmp_path / "corpus.jsonl").read_bytes() == first


def test_links_out_of_the_folder_are_followed_only_when_asked(tmp_path, capsys):
    folder = write(tmp_path / "documents", **{"a.txt": "inside", "sub__b.txt": "below"})
    secrets = write(tmp_path / "secrets", **{"key.txt": "secret", "more__x.txt": "more"})
    for link, target in (
        ("out.txt", secrets / "key.txt"),
        ("out", secrets),
        ("again.txt", folder / "a.txt"),
        ("loop", folder),
        ("nowhere.txt", tmp_path / "absent"),
    ):
        (folder / link).symlink_to(target)
    prepare(folder, tmp_path / "x.jsonl", 100)
    assert [row["id"] for row in read_jsonl(tmp_path / "x.jsonl")] == ["a.txt-0", "again.txt-0", "sub/b.txt-0"]
    links = "loop/, out/, nowhere.txt, out.txt"
    assert capsys.readouterr().out.endswith(f"left out: symbolic links 4\n    symbolic links: {links}\n")
    prepare(folder, tmp_path / "x.jsonl", 100, follow_links=True)
    names = [row["id"] for row in read_jsonl(tmp_path / "x.jsonl")]
    assert names == [f"{n}.txt-0" for n in ("a", "again", "out/key", "out/more/x", "out", "sub/b")]
    assert capsys.readouterr().out.endswith(
        "left out: folders read under another name 1, symbolic links 1\n"
        "    folders read under another name: loop/\n    symbolic links: nowhere.txt\n"
    )


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_table(tmp_path, capsys, name):
    rows = [
        ["Text", "title", "id", "section", "year", ""],
        ['She said "yes",\nand\ttwo. ' + "word " * 200_000, "Quoted", "q1", "S", "1", ""],
        ["short\r\n\r\n* item\r\n\r\n中文\r\n中文", "", "", "", "", ""],
        ["", "Empty", "e", "", "", ""],
    ]
    with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",").writerows(rows)
    prepare(tmp_path / name, tmp_path / "made.jsonl", 100)
    made = read_jsonl(tmp_path / "made.jsonl")
    assert made[0]["text"].startswith('She said "yes", and two. word')
    assert {(row["title"], row["section"]) for row in made[:-1]} == {("Quoted", "S")}
    assert made[-1] == {"id": "2-0", "title": "", "section": "", "text": "short item. 中文中文"} and len(made) > 2000
    assert capsys.readouterr().out.endswith(
        "left out: columns 2, empty documents 1\n    columns: year, (without a name)\n    empty documents: e\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.txt", "Größe".encode("latin-1"), r"latin.txt: not UTF-8 \(byte 0xf6 at position 3\); save it as UTF-8"),
        ("d/wide.md", "x".encode("utf-16"), "d: contains no text .*; left out: files that are not UTF-8 1$"),
        ("d/empty.txt", b"", "contains no text"),
        ("d/x.pdf", b"%PDF", "contains no text .*; left out: damaged files 1$"),
        ("x.pdf", b"%PDF", "x.pdf: damaged .PdfStreamError: "),
        ("x.doc", b"", "x.doc: neither a folder nor one of .txt, .text, .md, .*, .docx, .pdf, .csv, .tsv"),
        ("t.csv", b"", "line 0: the first line must name the columns, including `text`"),
        ("t.csv", b"title,body\na,b\n", "line 1: the first line must name .* found 'title, body'"),
        ("t.csv", b"text,title,Text \na,b,c\n", "line 1: two columns are called `text`; rename or remove one"),
        ("t.csv", b"title,text\na,b\nc\n", "line 3: 1 fields, but the header has 2"),
        ("t.csv", b"id,text\n1,b\n1,c\n", "line 3: an earlier row has the same id, 1"),
        ("t.csv", b'id,text\n1,"b\n', "line 2: not csv .unexpected end"),
        ("t.tsv", b"id\ttext\n1\t\xff\n", "t.tsv: not UTF-8 .byte 0xff.; save"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if name.startswith("d/") else path
    with pytest.raises(DataError, match=words):
        prepare(source, tmp_path / "made/corpus.jsonl", 100)
    assert not list(tmp_path.glob("made/*"))


@pytest.mark.processes
def test_an_output_that_would_be_a_document_is_refused(tmp_path):
    source = write(tmp_path, **{"a.csv": "text\nx\n"}) / "a.csv"
    done = run_script("prepare_corpus", source, "--output", source)
    assert (
        done.returncode == 2 and "a.csv would be one of the documents: give a name that ends in .jsonl" in done.stderr
    )
    assert source.read_text() == "text\nx\n"


def test_a_corpus_in_the_folder_is_not_in_the_report(tmp_path, capsys):
    folder = write(tmp_path, **{"a.txt": "x"})
    prepare(folder, folder / "corpus.jsonl", 100)
    assert capsys.readouterr().out.endswith("left out: nothing\n")


@pytest.mark.processes
def test_the_script_says_it_in_one_sentence(tmp_path):
    said = one_sentence(run_script("prepare_corpus", tmp_path / "absent", "--output", tmp_path / "x.jsonl"))
    assert "absent does not exist" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# T\na *b* **c** `d` _e_ f_g_h 2 * 3 * 4\n", ("T", [("", "a b c d e f_g_h 2 * 3 * 4")])),
        (
            "intro\n# T\nx\n## A ##\ny\n### B\nz\n## C\n\nw",
            ("T", [("", "intro"), ("", "x"), ("A", "y"), ("A: B", "z"), ("C", "w")]),
        ),
        ("# A\nx\n# B\ny", ("name", [("A", "x"), ("B", "y")])),
        ("Title\n=====\nx\n\nSub\n---\ny\n\n---\n\nz", ("Title", [("", "x"), ("Sub", "y|z")])),
        (
            "---\ntitle: 'Front: matter'\ntags: x\n---\nx\n- a\n+ b\n1. c\n\n> quoted\n> on",
            ("Front: matter", [("", "x|a;|b;|c.|quoted on")]),
        ),
        ("---\nThis begins with a rule: text.\n\n---\nrest", ("name", [("", "This begins with a rule: text.|rest")])),
        ("---\n# a comment\ntitle: T\ntags:\n- a\n  - b\n\nlang: de\n---\nx", ("T", [("", "x")])),
        ("---\n---\nx", ("name", [("", "x")])),
        ('---\n"a name": x\ndate created: 2024-01-01\ntitle: T\ntags: [a,\nb]\n---\nx', ("T", [("", "x")])),
        ("---\nNo name: then prose.\n\nNothing closes it", ("name", [("", "No name: then prose.|Nothing closes it")])),
        ("\\*\\*kwargs\n\n```\n*p = 5;\n```", ("name", [("", "**kwargs|*p = 5;")])),
        (
            "see [the *docs*](http://x.y 'T'), [ref][1],![alt](a.png) <!-- gone\nno --> end\n\n[1]: http://y.z",
            ("name", [("", "see the docs, ref, end")]),
        ),
        ("```python\n# no heading\n* x\n~~~\n```\n# T\ny", ("T", [("", "# no heading * x ~~~"), ("", "y")])),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", ("name", [("", "a b|1 2")])),
        ("#hashtag is text\n#\ny", ("name", [("", "#hashtag is text|y")])),
        ("about 10<sup>23</sup> H<sub>2</sub>O", ("name", [("", "about 10^23 H2O")])),
        ("# Information\nso\xadft, a\u200bb, 中文\n换行", ("Information", [("", "soft, ab, 中文换行")])),
        ("x\n\n<!DOCTYPE html [ <!ELEMENT\n\n# T\ny", None),
        (
            "# T\nThe <title> element, <Style> and\n<nav>.\n\n<!--x--> z\n<iframe>\n\nw <object>o</object>e",
            ("T", [("", "The <title> element, <Style> and|<nav>. z <iframe>|w e")]),
        ),
        ("", ("name", [])),
    ],
)
def test_markdown(text, expected):
    found = sections(read_markdown(text))
    assert expected is None or found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<!DOCTYPE html><head><title>A &amp; B</title><style>p{}</style></head><body><nav><ul><li>Home</ul></nav>"
            "<h2>One</h2><p>x <b>bold</b>&nbsp;y<br>z<p>next<script>if (a<b) {}</script><h2>Two <i>it</i></h2>w",
            ("A & B", [("One", "x bold y z|next"), ("Two it", "w")]),
        ),
        (
            "<h1>T</h1>intro<h2>A</h2><div>a<div>b</div>c</div><h3>B</h3>d",
            ("T", [("", "intro"), ("A", "a|b|c"), ("A: B", "d")]),
        ),
        ("<ul><li>a</li>\n<li>b <ol><li>c</ol></ul>end", ("name", [("", "a;|b;|c.|end")])),
        ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</table>", ("name", [("", "1 2|3")])),
        (
            "un<b>closed <p>tags &lt;kept&gt; &#233; <!-- gone --> <unknown>x</unknown>",
            ("name", [("", "unclosed|tags <kept> é|x")]),
        ),
        ("<noscript>no<img></noscript><svg><title>no</title></svg>yes</svg>", ("name", [("", "yes")])),
        ("<p>line\n   ends\n  are spaces</p>\n\n* not a list", ("name", [("", "line ends are spaces|not a list")])),
        ("<svg/>a<h2>not <i>closed<p>b</p><h3><div>C</div></h3>d", ("not closed", [("", "a"), ("", "b"), ("C", "d")])),
        ("<h1></h1><h2>  </h2>x", ("name", [("", "x")])),
        ("<" * 1000 + "x", None),
        ("<h3><button>How do I pay?</button></h3>Cash.", ("How do I pay?", [("", "Cash.")])),
        ("<h3><svg><title>i</title></svg> A <button>Copy</button></h3>x", ("A", [("", "x")])),
        ("<h3><svg><title>i</title></svg> <button><b>A</b></button></h3>x", ("A", [("", "x")])),
        ("<dl><dt><button>Pay?</button><dd>Cash.</dl><button>Menu</button>", ("name", [("", "Pay?|Cash.")])),
        (
            "<title>information</title>in\xadfor&shy;mation x&#8203;y &#xfeff;z 1&nbsp;000",
            ("information", [("", "information xy z 1 000")]),
        ),
        ("<p>中文\n  换行</p>a\nb", ("name", [("", "中文换行|a b")])),
        ("<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>字", ("name", [("", "漢(kan)字")])),
        ("a <math alttext='x^{2}'><mi>x</mi><mn>2</mn></math> b", ("name", [("", "a x^{2} b")])),
        ("<?xml version='1.0' encoding='latin-1'?><html><body>é</body></html>", ("name", [("", "é")])),
        ("&#xD800;a&#0;b", ("name", [("", "�a�b")])),
        ("<!-- only this -->", ("name", [])),
    ],
)
def test_html(text, expected):
    found = sections(read_html(text))
    if expected:
        assert found == expected


@pytest.mark.parametrize(
    ("declaration", "text"),
    [
        ("<!DOCTYPE html [ <!ELEMENT x (y)> ]>", "]>|End."),
        ("<!DOCTYPE html [ <!ENTITY x 'y'>", "End."),
        ("<![if !IE]>", "End."),
        ("<![CDATA[x]]>", "End."),
        ("<!foo bar>", "End."),
        ("<?php echo 1 ?>", "End."),
        ("<!", "End."),
    ],
)
def test_a_broken_declaration_is_no_reason_to_stop(declaration, text):
    assert sections(read_html(f"{declaration}<p>End.</p>")) == ("name", [("", text)])


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "10<sup>23</sup>, 10<sup>−3</sup>, 2<sup>2n</sup>, 2<b></b><b><i><sup>n+1</sup></i></b>",
            "10^23, 10^−3, 2^2n, 2^(n+1)",
        ),
        ("x<sup>n</sup>, (a+b)<sup>2</sup>, x<sup>(n)</sup>, 10<sup><i>x</i></sup>", "x^n, (a+b)^2, x^(n), 10^x"),
        ("SO<sub>4</sub><sup>2−</sup>, m<sup>2</sup>, <a>10<sup>3</sup></a>", "SO4^2−, m^2, 10^3"),
        ("2010<sup><a>1</a></sup>, x<a><sup>2</sup></a>, y<sup><a>[3]</a></sup>", "2010[1], x[2], y[3]"),
        ("1<sup>st</sup>, XX<sup>e</sup>, 2<sup>o</sup>, M<sup>me</sup>", "1st, XXe, 2o, Mme"),
        ("so<sup>[1]</sup>, Fan<sup>®</sup>, so<sup>citation needed</sup>", "so[1], Fan®, socitation needed"),
        ("<sup>14</sup>C, end.<sup>1</sup>, a<sup></sup>b", "14C, end.1, ab"),
        ("H<sub>2</sub>O, C<sub>6</sub>H<sub>12</sub>, v<sub>max</sub>, 101<sub>2</sub>", "H2O, C6H12, vmax, 101_2"),
        ("<sub>small print</sub>, log<sub>10</sub>", "small print, log10"),
    ],
)
def test_raised_and_lowered(html, text):
    assert sections(read_html(html)) == ("name", [("", text)])
    assert sections(read_markdown(html)) == ("name", [("", text)])


def test_plain_text():
    assert sections(read_text("a\nb\n\n# c\n* d\n* e")) == ("name", [("", "a b|# c|d;|e")])
