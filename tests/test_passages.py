import csv
import gzip
import hashlib
import json
import pickle

import numpy as np
import pytest

from atlas.files.jsonl import DataError
from atlas.index.passages import (
    check_passages,
    count_duplicates,
    is_verbatim,
    open_passages,
    parse_passage,
    saved_lines,
    titles_joined,
)


@pytest.mark.parametrize(
    "record, passage",
    [
        ({"id": "a", "title": "T", "text": "x"}, {"id": "a", "title": "T", "text": "x"}),
        ({"id": 7, "text": ""}, {"id": "7", "title": "", "text": ""}),
        ({"id": 0, "text": "x", "title": None}, {"id": "0", "title": "", "text": "x"}),
        (
            {"id": "a", "title": "T", "section": "S", "text": "x", "year": [1]},
            {"id": "a", "title": "T: S", "section": "S", "text": "x", "year": [1]},
        ),
        (
            {"id": "a", "title": "T", "section": "", "text": "x"},
            {"id": "a", "title": "T", "section": "", "text": "x"},
        ),
        (
            {"id": "a", "title": "T", "section": None, "text": "x"},
            {"id": "a", "title": "T", "section": None, "text": "x"},
        ),
    ],
)
def test_parse_passage(record, passage):
    before = json.dumps(record)
    assert parse_passage(record) == passage
    assert json.dumps(record) == before


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"title": "T", "text": "x"}, "needs an `id`.*found only title, text"),
        ({}, "needs an `id`.*an empty object"),
        ({"id": True, "text": "x"}, "needs an `id`.*found True"),
        ({"id": "", "text": "x"}, "needs an `id`.*found ''"),
        ({"id": 1.5, "text": "x"}, "needs an `id`.*found 1.5"),
        ({"id": "a", "contents": "x"}, "needs a `text`.*found only id, contents"),
        ({"id": "a", "text": None}, "needs a `text`.*found None"),
        ({"id": "a", "text": "x", "title": 3}, "`title`.*found 3"),
        ({"id": "a", "text": "x", "section": ["s"]}, r"`section`.*found \['s'\]"),
    ],
)
def test_what_is_no_passage(record, reason):
    with pytest.raises(ValueError, match=reason):
        parse_passage(record)


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_open_passages(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"id": 1, "title": "T", "section": "S", "text": "x"}, {"id": 2, "text": "y"}])
    b = write(tmp_path / "b.jsonl", [{"id": "3", "title": "U: S", "section": "S", "text": "z"}])
    passages = open_passages([a, b])
    assert [p["title"] for p in passages] == ["T: S", "", "U: S: S"]
    assert [p["title"] for p in pickle.loads(pickle.dumps(passages))] == ["T: S", "", "U: S: S"]
    assert [p["title"] for p in open_passages(b, titles_joined=True)] == ["U: S"]
    assert [p["id"] for p in open_passages([a, b], max_passages=2)] == ["1", "2"]


def test_check_passages_names_the_bad_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": 1, "text": "x"}, {"id": 2, "text": "y"}, {"id": 3}])
    passages = open_passages(path)
    assert check_passages(passages, range(2)).shape == (2,)
    assert check_passages(passages, range(2, 2)).shape == (0,)
    with pytest.raises(DataError, match=f"^{path}, line 3: a passage needs a `text`"):
        check_passages(passages, range(1, 3))


def test_hashes_find_duplicates(tmp_path):
    ids = ["a", "b", "a", "\u4f60", 7, "7", "a"]
    passages = open_passages(write(tmp_path / "a.jsonl", [{"id": i, "text": "x"} for i in ids]))
    hashes = check_passages(passages, range(len(passages)))
    assert hashes.dtype == np.int64
    digests = [hashlib.blake2b(str(i).encode("utf-8"), digest_size=8).digest() for i in ids]
    assert hashes.tolist() == [np.frombuffer(digest, "<i8")[0] for digest in digests]
    assert count_duplicates(hashes) == len(ids) - len({str(i) for i in ids}) == 3
    assert count_duplicates(hashes[:2]) == count_duplicates(hashes[:0]) == 0
    parts = [check_passages(passages, rows) for rows in (range(3), range(3, 7))]
    assert np.concatenate(parts).tolist() == hashes.tolist()


def test_check_passages_tells_of_its_progress(tmp_path):
    passages = open_passages(write(tmp_path / "a.jsonl", [{"id": i, "text": "x"} for i in range(2500)]))
    calls = []
    hashes = check_passages(passages, range(2500), calls.append)
    assert calls == [1000, 1000, 500] and count_duplicates(hashes) == 0
    assert check_passages(passages, range(2500)).tolist() == hashes.tolist()


# other formats

ATLAS = [{"id": "a1", "title": "T", "section": "S", "text": "x"}, {"id": 2, "text": 'say "y"', "year": [1]}]
BEIR = [
    {"_id": "b1", "title": "", "text": "no title", "metadata": {}},
    {"_id": 7, "title": "U", "text": "x\ty", "section": "V", "metadata": {"url": "http://u", "n": 1.5}},
]
DPR = [
    ["1", 'Aaron ( or ; ""Ahärôn"") is a "prophet", \u4f60', '"Weird Al" Yankovic'],
    ["2", "tab\there", ""],
    ["3", "", "only a title"],
]


def write_tsv(path, rows=DPR, header=("id", "text", "title")):
    """As csv writers do: quoted where needed, quotes doubled."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return path


def pack(path):
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", [("atlas", "beir", "dpr"), ("dpr", "atlas", "beir"), ("beir", "dpr", "atlas")])
def test_formats_are_mixed(tmp_path, packed, order):
    files = {
        "atlas": write(tmp_path / "atlas.jsonl", ATLAS),
        "beir": write(tmp_path / "corpus.jsonl", BEIR),
        "dpr": write_tsv(tmp_path / "psgs_w100.tsv"),
    }
    expected = {
        "atlas": [ATLAS[0] | {"title": "T: S"}, ATLAS[1] | {"id": "2", "title": ""}],
        "beir": [
            {"id": "b1", "title": "", "text": "no title", "metadata": {}},
            {"id": "7", "title": "U: V", "text": "x\ty", "section": "V", "metadata": {"url": "http://u", "n": 1.5}},
        ],
        "dpr": [dict(zip(("id", "text", "title"), row, strict=True)) for row in DPR],
    }
    paths = [pack(files[name]) if packed else files[name] for name in order]
    wanted = [passage for name in order for passage in expected[name]]
    corpus = open_passages(paths)
    assert list(corpus) == list(pickle.loads(pickle.dumps(corpus))) == wanted
    assert check_passages(corpus, range(7)).shape == (7,)
    for most in range(9):
        assert list(open_passages(paths, max_passages=most)) == wanted[:most]


def test_the_released_tsv_as_it_stands(tmp_path):
    path = tmp_path / "psgs_w100.tsv"
    path.write_bytes(
        b'id\ttext\ttitle\r\n1\t"Aaron Aaron ( or ; ""Ahar\xc3\xb4n"") is a prophet"\tAaron\r\n'
        b'2\tplain "inside" text\t"""Heroes"" (album)"\r\n'
    )
    assert list(open_passages(path)) == [
        {"id": "1", "text": 'Aaron Aaron ( or ; "Ahar\u00f4n") is a prophet', "title": "Aaron"},
        {"id": "2", "text": 'plain "inside" text', "title": '"Heroes" (album)'},
    ]


@pytest.mark.parametrize(
    ("line", "text", "title"),
    [
        ('1\t"Hello" he said\tT', '"Hello" he said', "T"),
        ('1\the said "Hello"\t"Weird Al" Yankovic', 'he said "Hello"', '"Weird Al" Yankovic'),
        ('1\t"He left\tan "open" quote', '"He left', 'an "open" quote'),
        ('1\t"""Hello"" he said"\t"T"', '"Hello" he said', "T"),
        ('"1"\t"a\tb"\t""', "a\tb", ""),
        ("1\t" + "x" * 200_000 + "\tT", "x" * 200_000, "T"),
        ('1\t"' + 'x""' * 100_000 + '"\tT', 'x"' * 100_000, "T"),
    ],
)
@pytest.mark.parametrize("header", ["id\ttext\ttitle", '"id"\t"text"\t"title"'])
def test_quotes_are_lost_only_where_a_csv_writer_put_them(tmp_path, line, text, title, header):
    path = tmp_path / "a.tsv"
    path.write_text(f"{header}\n{line}\n")
    assert list(open_passages(path)) == [{"id": "1", "text": text, "title": title}]


def test_columns_of_a_tsv_go_by_their_names(tmp_path):
    rows = [["T", "x", "S", "1"]]
    path = write_tsv(tmp_path / "corpus.txt", rows, ("title", "text", "section", "id"))
    assert list(open_passages(path)) == [{"id": "1", "text": "x", "title": "T: S", "section": "S"}]
    path = write_tsv(tmp_path / "two.tsv", [["1", "x"]], ("id", "text"))
    assert list(open_passages(path)) == [{"id": "1", "text": "x", "title": ""}]


TEVATRON = [{"docid": "t1", "title": "T", "text": "x"}, {"docid": 2, "text": "y", "url": "u"}]
FLASHRAG = [
    {"id": "0", "contents": "Evan Morris\nEvan L. Morris\nwas a lobbyist."},
    {"id": 1, "contents": "only a text", "source": "s"},
    {"id": "2", "title": "T", "contents": "a\nb"},
]


@pytest.mark.parametrize(
    ("records", "passages"),
    [
        (TEVATRON, [{"id": "t1", "title": "T", "text": "x"}, {"id": "2", "title": "", "text": "y", "url": "u"}]),
        (
            FLASHRAG,
            [
                {"id": "0", "title": "Evan Morris", "text": "Evan L. Morris\nwas a lobbyist."},
                {"id": "1", "title": "", "text": "only a text", "source": "s"},
                {"id": "2", "title": "T", "text": "a\nb"},
            ],
        ),
    ],
)
def test_corpora_of_other_tools(tmp_path, records, passages):
    corpus = open_passages(write(tmp_path / "corpus.jsonl", records))
    assert list(corpus) == passages and not is_verbatim(corpus)
    (tmp_path / "saved.jsonl").write_bytes(b"\n".join(saved_lines(corpus, range(len(corpus)))))
    assert list(open_passages(tmp_path / "saved.jsonl")) == passages


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (TEVATRON[0], {"id": "1", "text": "x"}, "a passage of a Tevatron corpus needs a `docid`, found only id, text"),
        (FLASHRAG[0], {"id": "1", "text": "x"}, r"a passage of a FlashRAG corpus needs `contents` \(.*found None"),
        (FLASHRAG[0], {"contents": "a\nb"}, "a passage needs an `id`"),
    ],
)
def test_a_line_of_another_format_in_those_corpora(tmp_path, first, second, reason):
    path = write(tmp_path / "corpus.jsonl", [first, second])
    with pytest.raises(DataError, match=f"^{path}, line 2: {reason}"):
        open_passages(path)[1]


@pytest.mark.parametrize("content", ["", "\n", "id\ttext\ttitle\n"])
def test_a_tsv_without_passages(tmp_path, content):
    path = tmp_path / "a.tsv"
    path.write_text(content)
    assert list(open_passages(path)) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"3\tx", r"expected 3 fields \(id, text, title\) on one line, found 2"),
        (b"3\tx\ty\tz", "expected 3 fields .* found 4"),
        (b'3\t"the text goes on', "expected 3 fields .* found 2"),
        (b'3\t"a ""b"" c\td"\t"e" f', "expected 3 fields .* found 4"),
        (b"\tx\ty", "a passage needs an `id`"),
        (b"3\t\xff\ty", r"not UTF-8 \(byte 0xff at position 3\)"),
    ],
)
def test_a_bad_line_of_a_tsv_is_named(tmp_path, line, reason):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"id\ttext\ttitle\n1\tx\ty\n\n" + line + b"\n5\tx\ty\n")
    corpus = open_passages(path)
    assert len(corpus) == 3 and corpus[2]["id"] == "5"
    with pytest.raises(DataError, match=f"^{path}, line 4: {reason}"):
        corpus[1]


def test_a_tsv_without_a_header_and_a_line_of_another_format(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("1\tx\ty\n")
    with pytest.raises(DataError, match=rf"^{path}: a .tsv corpus needs a first line .*\['1', 'x', 'y'\]"):
        open_passages(path)
    mixed = write(tmp_path / "corpus.jsonl", [BEIR[0], ATLAS[0]])
    with pytest.raises(DataError, match=f"^{mixed}, line 2: .* needs an `_id`, found only id, title, section, text"):
        open_passages(mixed)[1]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("nonsense\n")
    with pytest.raises(DataError, match=f"^{broken}, line 1: not JSON"):
        open_passages(broken)[0]


@pytest.mark.parametrize("joined", [False, True])
def test_saved_lines_open_as_the_same_passages(tmp_path, joined):
    atlas = tmp_path / "atlas.jsonl"
    atlas.write_bytes(b"\n".join(b"  " + json.dumps(record).encode() + b"  \r" for record in ATLAS))
    beir, dpr = write(tmp_path / "corpus.jsonl", BEIR), write_tsv(tmp_path / "psgs.tsv")
    for paths in ([atlas], [beir], [dpr], [dpr, atlas, beir], [beir, atlas]):
        corpus = open_passages(paths, titles_joined=joined)
        assert is_verbatim(corpus) == (paths == [atlas]) and titles_joined(corpus) == joined
        lines = list(saved_lines(corpus, range(len(corpus))))
        assert not any(b"\n" in line for line in lines)
        saved = tmp_path / "saved.jsonl"
        saved.write_bytes(b"".join(line + b"\n" for line in lines))
        again = open_passages(saved, titles_joined=joined)
        assert list(again) == list(corpus) and is_verbatim(again)
    assert list(saved_lines(open_passages(atlas), [1])) == [b"  " + json.dumps(ATLAS[1]).encode() + b"  "]


def test_an_id_of_ones_own_beside_another_is_the_id(tmp_path):
    records = [{"id": "1", "_id": "other", "text": "x"}, {"_id": "only", "text": "y"}]
    corpus = open_passages(write(tmp_path / "a.jsonl", records))
    assert corpus[0] == records[0] | {"title": ""} and is_verbatim(corpus)
    with pytest.raises(DataError, match="line 2: a passage needs an `id`"):
        corpus[1]
