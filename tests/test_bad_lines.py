"""`--bad_lines skip`: what cannot be read is counted, written down and left out; all else is as without it."""

import pickle
import random

import numpy as np
import pytest

from atlas.config import Index, Run
from atlas.files.jsonl import BadLine, DataError, JsonlCorpus
from atlas.index.passages import check_passages, count_duplicates, is_verbatim, open_passages, saved_lines
from atlas.retrieval import open_corpus
from atlas.runtime.bad_lines import bad_lines_file, report_bad_lines
from atlas.tasks.data import Data
from tests.kit import make_task, read_jsonl, run, run_on, world
from tests.test_training import losses_of


def write_lines(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_a_corpus_without_some_rows(tmp_path, seed):
    """Over several files, with blank lines and a limit: against a plain list."""
    rng = random.Random(seed)
    paths, places = [], []
    for name in ("a", "b", "c"):
        lines = [b"" if rng.random() < 0.3 else b'{"row": %d}' % rng.randrange(99) for _ in range(rng.randrange(1, 9))]
        paths.append(write_lines(tmp_path / f"{name}.jsonl", lines))
        places += [(paths[-1], number) for number, line in enumerate(lines, 1) if line]
    most = rng.choice([-1, len(places) - 2])
    corpus = JsonlCorpus(paths, max_rows=most)
    rows = list(corpus)
    places = places[: len(rows)]
    assert list(corpus.places(range(len(rows)))) == places
    dropped = sorted(rng.sample(range(len(rows)), len(rows) // 2))
    corpus.drop(dropped)
    kept = [i for i in range(len(rows)) if i not in dropped]
    for left in (corpus, pickle.loads(pickle.dumps(corpus))):
        assert list(left) == [rows[i] for i in kept] and len(left) == len(kept)
        assert [left.where(i) for i in range(len(kept))] == [f"{p}, line {n}" for p, n in (places[i] for i in kept)]
        files = [p for p, of_file in zip(paths, left.rows_of_files(), strict=True) for _ in of_file]
        assert files == [places[i][0] for i in kept]
        with pytest.raises(IndexError):
            left[len(kept)]


def qa_lines(bad):
    good = [b'{"question": "q%d", "answers": ["a", "b", "c"]}' % i for i in range(9)]
    return [bad.get(i, line) for i, line in enumerate(good)]


BAD = {0: b'{"question": "x"}', 1: b'{"question": "y", "answers": "a"}', 4: b"nonsense", 8: b"\xff\xfe"}
REASONS = ["no `answers`", "`answers` must be a list", "not JSON", "not UTF-8"]


def open_data(path, bad_lines, batch_size=2, **place):
    place = {"rank": 0, "world_size": 1} | place
    task = make_task("qa", qa_prompt_format="{question}")
    data = Data(JsonlCorpus(path), task, seed=0, batch_size=batch_size, **place)
    data._check_all(bad_lines)
    return data


@pytest.mark.parametrize("shuffle", [False, True])
def test_bad_lines_leave_no_holes_and_change_nothing_in_the_others(tmp_path, shuffle):
    file = tmp_path / "run/bad_lines.train_data.jsonl"
    data = open_data(write_lines(tmp_path / "bad.jsonl", qa_lines(BAD)), file)
    whole = open_data(write_lines(tmp_path / "good.jsonl", qa_lines({})), None)
    assert len(data) == data.places == 5
    batches = [data.training_batch(step, shuffle) for step in range(1, 11)]
    assert {len(batch) for batch in batches} == {2}
    seen = [example for batch in batches for example in batch]
    for epoch in range(4):
        left = [example for i in range(9) if (example := whole.example(i, epoch)) and i not in BAD]
        of_epoch = seen[5 * epoch : 5 * epoch + 5]
        assert sorted(of_epoch, key=lambda e: e.query) == left  # the answers that were drawn included
    again = open_data(tmp_path / "bad.jsonl", file)  # as after a restart
    again.resume(3, 6, data.places)
    assert [again.training_batch(step, shuffle) for step in range(4, 11)] == batches[3:]


def test_what_was_skipped_is_written_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    path, file = write_lines(tmp_path / "bad.jsonl", qa_lines(BAD)), tmp_path / "run/bad_lines.train_data.jsonl"
    open_data(path, file)
    rows = read_jsonl(file)
    assert [(row["file"], row["line"]) for row in rows] == [(str(path), i + 1) for i in BAD]
    assert all(row["reason"].startswith(reason) for row, reason in zip(rows, REASONS, strict=True))
    assert [row["text"] for row in rows] == [line.decode("utf-8", errors="replace") for line in BAD.values()]
    said = f"{path}: 4 of 9 lines are bad and left out, the first is {path}, line 1: no `answers`"
    assert said in caplog.text and f"All are in {file}" in caplog.text and "lines are skipped" not in caplog.text
    write_lines(path, qa_lines({}))
    open_data(path, file)
    assert not file.exists()  # it was of an earlier start
    write_lines(path, [b"nonsense"] * 3)
    with pytest.raises(ValueError, match="bad.jsonl: no line is left, .* and bad lines are left out"):
        open_data(path, file)
    assert len(read_jsonl(file)) == 3


def test_without_the_flag_the_first_bad_line_is_an_error(tmp_path):
    with pytest.raises(DataError, match="bad.jsonl, line 1: no `answers`"):
        open_data(write_lines(tmp_path / "bad.jsonl", qa_lines(BAD)), bad_lines_file(Run(), "train_data"))


def test_a_damaged_file_is_no_bad_line(tmp_path, monkeypatch):
    def damaged(self, row):
        raise DataError("the cache is damaged")

    monkeypatch.setattr(JsonlCorpus, "raw", damaged)
    with pytest.raises(DataError, match="the cache is damaged"):
        open_data(write_lines(tmp_path / "a.jsonl", qa_lines({})), tmp_path / "bad_lines.jsonl")


def test_bad_passages_are_left_out(tmp_path):
    good = [b'{"id": %d, "text": "x"}' % i for i in (0, 1, 1, 2)]
    lines = [good[0], b'{"id": 7}', b"", *good[1:3], b"[]", good[3]]
    path, file = write_lines(tmp_path / "corpus.jsonl", lines), tmp_path / "bad_lines.passages.jsonl"
    bad = []
    hashes = check_passages(open_passages(path), range(6), bad=bad)
    assert [line.row for line in bad] == [1, 4] and len(hashes) == 4 and count_duplicates(hashes) == 1
    passages = open_corpus(Index(passages=(str(path),)), file)
    assert [passage["id"] for passage in passages] == ["0", "1", "1", "2"] and not is_verbatim(passages)
    assert list(saved_lines(passages, range(4))) == good
    assert [row["line"] for row in read_jsonl(file)] == [2, 6]
    write_lines(path, [b"{}"])
    with pytest.raises(ValueError, match="no passage is left, all lines are bad; see .*bad_lines.passages.jsonl"):
        open_corpus(Index(passages=(str(path),)), file)


def test_long_lines_are_cut_in_the_file(tmp_path):
    corpus = JsonlCorpus(write_lines(tmp_path / "a.jsonl", [b"x" * 100_000]))
    assert report_bad_lines(corpus, [BadLine(0, "too long")], tmp_path / "bad") == [0]
    assert read_jsonl(tmp_path / "bad")[0]["text"] == "x" * 10_000


@pytest.mark.processes
def test_a_run_over_bad_lines_is_the_run_over_the_others(tmp_path):
    """Bad passages anywhere; bad questions behind the others, whose lines the answers to learn are drawn by."""
    clean = run(tmp_path, name="clean", save_index_path=tmp_path / "clean-index")
    files = {}
    for name in ("passages", "train", "dev"):
        lines = (world() / f"{name}.jsonl").read_bytes().splitlines()
        lines = [*lines, b"{}"] if name != "passages" else [b"{}", *lines[:9], b'["x"]', *lines[9:]]
        files[name] = write_lines(tmp_path / f"{name}.jsonl", lines)
    flags = {"train_data": files["train"], "eval_data": files["dev"], "passages": files["passages"]}
    dirty = run(tmp_path, name="dirty", bad_lines="skip", save_index_path=tmp_path / "index", **flags)
    assert losses_of(dirty) == losses_of(clean)
    assert (dirty / "dev-step-5.jsonl").read_bytes() == (clean / "dev-step-5.jsonl").read_bytes()
    found = {path.name: len(read_jsonl(path)) for path in dirty.glob("bad_lines.*")}
    assert found == {
        f"bad_lines.{name}.jsonl": n for name, n in (("train_data", 1), ("eval_data.dev", 1), ("passages", 2))
    }
    saved, original = tmp_path / "index/passages.1.jsonl", world() / "passages.jsonl"
    assert saved.read_bytes() == original.read_bytes()
    assert np.array_equal(*(np.load(tmp_path / index / "embeddings.1.npy") for index in ("index", "clean-index")))


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_leave_out_the_same_lines(tmp_path):
    files = {}
    for name in ("passages", "dev"):
        lines = (world() / f"{name}.jsonl").read_bytes().splitlines()
        files[name] = write_lines(tmp_path / f"{name}.jsonl", [b"{}", *lines[:5], b"[", *lines[5:], b"\xff"])
    flags = {"train_data": None, "reader_model_type": None, "retrieve_only": True, "bad_lines": "skip"}
    flags |= {"eval_data": files["dev"], "passages": files["passages"]}
    one = run(tmp_path / "one", "evaluate", **flags)
    run_on(2, tmp_path / "two", "evaluate", **flags)
    for name in ("bad_lines.eval_data.dev.jsonl", "bad_lines.passages.jsonl", "dev-step-0.jsonl"):
        assert (one / name).read_bytes() == (tmp_path / "two/run" / name).read_bytes()
    assert [row["line"] for row in read_jsonl(one / "bad_lines.passages.jsonl")] == [1, 7, 303]
    assert [row["id"] for row in read_jsonl(one / "dev-step-0.jsonl")] == [
        row["id"] for row in read_jsonl(world() / "dev.jsonl")
    ]
