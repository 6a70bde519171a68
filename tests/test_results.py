import json
import os

import numpy as np
import pytest

from atlas.evaluation.results import result_row, results_writer
from atlas.tasks import Example

PASSAGES = [{"id": "p1", "title": "T", "text": "x", "year": 1}, {"id": "p0", "title": "", "text": "y"}]


def test_rows_are_one_json_object_a_line(tmp_path):
    path = tmp_path / "run" / "dev-step-5.jsonl"
    rows = [{"query": "caf\u00e9 \u4f60 \U0001f600", "answers": ["a\nb"]}, {"query": "\u2028"}]
    with results_writer(path) as write:
        for row in rows:
            write(row)
        assert not path.exists()
    content = path.read_bytes()
    assert "caf\u00e9 \u4f60 \U0001f600".encode() in content and content.endswith(b"\n") and b"\r" not in content
    assert [json.loads(line) for line in content.decode().split("\n")[:-1]] == rows
    assert os.listdir(path.parent) == ["dev-step-5.jsonl"]


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), results_writer(path) as write:
        write({"query": "q"})
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.jsonl"]
    with pytest.raises(TypeError), results_writer(path) as write:
        write({"query": object()})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.jsonl"]


def test_row_of_an_evaluation():
    example = Example("q", "t", ["a"], metadata={}, id="7")
    row = result_row(example, "gen", PASSAGES, np.array([2.5, -1], np.float32), write_passages=True)
    assert list(row) == ["query", "answers", "generation", "passages", "metadata", "id"]
    assert json.loads(json.dumps(row)) == {
        "query": "q",
        "answers": ["a"],
        "generation": "gen",
        "passages": [PASSAGES[0] | {"score": 2.5}, PASSAGES[1] | {"score": -1.0}],
        "metadata": {},
        "id": "7",
    }
    assert "score" not in PASSAGES[0]
    assert list(result_row(example, "gen", PASSAGES, [1.0, 0.0], write_passages=False)) == [
        "query", "answers", "generation", "metadata", "id"
    ]  # fmt: skip


def test_row_without_generation_passages_or_scores():
    example = Example("q", "", [])
    assert result_row(example, None, PASSAGES, None) == {"query": "q", "answers": [], "passages": PASSAGES}
    assert result_row(example, "", None, None) == {"query": "q", "answers": [], "generation": ""}
    assert result_row(example, "g", [], []) == {"query": "q", "answers": [], "generation": "g", "passages": []}
    with pytest.raises(ValueError):
        result_row(example, "g", PASSAGES, [1.0])
