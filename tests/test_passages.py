import hashlib
import json
import pickle

import numpy as np
import pytest

from src.index.passages import check_passages, count_duplicates, open_passages, parse_passage
from src.jsonl import DataError


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
