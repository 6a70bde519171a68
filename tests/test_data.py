"""Who gets which lines, and that chance depends on nothing but seed, epoch and line."""

import numpy as np
import pytest

from atlas.files.jsonl import DataError, JsonlCorpus
from atlas.model.tokenization import load_reader_tokenizer
from atlas.tasks.data import Data
from tests.kit import make_task, read_jsonl, world, write_jsonl


def make(tmp_path, n=7, batch_size=2, rank=0, world_size=1, seed=0, rows=None, task=None):
    rows = rows or [{"question": f"q{i}", "answers": [f"a{i}", f"b{i}", f"c{i}"]} for i in range(n)]
    corpus = JsonlCorpus([write_jsonl(tmp_path / "data.jsonl", rows)])
    task = task or make_task("qa", qa_prompt_format="{question}")
    return Data(corpus, task, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [1, 7, 12])
def test_ranks_see_what_one_rank_accumulates(tmp_path, n, shuffle):
    one = make(tmp_path, n)
    three = [make(tmp_path, n, rank=r, world_size=3) for r in range(3)]
    for step in range(1, 9):
        together = [example for data in three for example in data.training_batch(step, shuffle)]
        alone = [e for s in range(3) for e in one.training_batch(3 * (step - 1) + s + 1, shuffle)]
        assert together == alone and len(together) == 6


def test_shuffling_is_a_permutation_of_each_epoch(tmp_path):
    data = make(tmp_path, n=6)
    epochs = [
        [e.query for step in range(3 * i + 1, 3 * i + 4) for e in data.training_batch(step, True)] for i in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"q{i}" for i in range(6)]
    assert epochs[0] != epochs[1]
    assert [e.query for e in make(tmp_path, n=6, seed=1).training_batch(1, True)] != epochs[0][:2]


def test_the_answer_to_learn_changes_with_the_epoch_and_not_with_the_batch_size(tmp_path):
    data, larger = make(tmp_path, n=4), make(tmp_path, n=4, batch_size=4)
    targets = [
        [e.target for step in (2 * i + 1, 2 * i + 2) for e in data.training_batch(step, False)] for i in range(9)
    ]
    assert targets == [[e.target for e in larger.training_batch(i + 1, False)] for i in range(9)]
    assert len({tuple(epoch) for epoch in targets}) > 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 5, 6, 13])
def test_evaluation_sees_every_line_once_in_order(tmp_path, n, world_size):
    ranks = [list(make(tmp_path, n, rank=r, world_size=world_size).evaluation_batches()) for r in range(world_size)]
    rounds = make(tmp_path, n, world_size=world_size).evaluation_rounds
    assert {len(batches) for batches in ranks} == {rounds}
    order = [example.query for batches in zip(*ranks, strict=True) for batch in batches for example in batch]
    assert order == [f"q{i}" for i in range(n)]


def test_a_bad_line_is_named(tmp_path):
    data = make(tmp_path, rows=[{"question": "q", "answers": ["a"]}, {"query": "q"}])
    with pytest.raises(DataError, match=r"data.jsonl, line 2: no `question`"):
        data.check(range(2), lambda n: None)


@pytest.fixture(scope="module")
def mlm():
    tokenizer = load_reader_tokenizer(str(world() / "models/reader"))
    return make_task(
        "mlm", tokenizer=tokenizer, text_maxlength=64, mlm_noise_density=0.3, mlm_mean_noise_span_length=2.0
    )


def texts(empty):
    passages = read_jsonl(world() / "passages.jsonl")[:13]
    return [row | {"text": " "} if i in empty else row for i, row in enumerate(passages)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_noise_is_the_same_at_every_world_size_and_batch_size(tmp_path, mlm, world_size, shuffle):
    rows = texts(empty={2, 3, 7})
    alone = make(tmp_path, rows=rows, task=mlm, batch_size=1)
    ranks = [make(tmp_path, rows=rows, task=mlm, rank=r, world_size=world_size) for r in range(world_size)]
    seen = []
    for step in range(1, 10):
        together = [example for data in ranks for example in data.training_batch(step, shuffle)]
        first = (step - 1) * 2 * world_size
        assert together == [e for s in range(2 * world_size) for e in alone.training_batch(first + s + 1, shuffle)]
        seen += together
    longest = max(rows, key=lambda row: len(row["text"]))
    queries = [example.query for example in seen if example.id == longest["id"]]
    assert len(queries) > 1 and len(set(queries)) == len(queries)  # anew in every epoch
    fresh = make(tmp_path, rows=rows, task=mlm, rank=1, world_size=world_size)  # as after a restart
    assert fresh.training_batch(7, shuffle) == ranks[1].training_batch(7, shuffle)


def test_skipped_lines_make_batches_smaller(tmp_path, mlm):
    data = make(tmp_path, rows=texts(empty={0, 1, 3}), task=mlm)
    ids = [[example.id for example in data.training_batch(step, False)] for step in range(1, 8)]
    assert ids == [[], ["p2"], ["p4", "p5"], ["p6", "p7"], ["p8", "p9"], ["p10", "p11"], ["p12"]]
    batches = [[example.id for example in batch] for batch in data.evaluation_batches()]
    assert batches == [*ids[:6], ["p12"]]


def test_checking_counts_what_is_left(tmp_path, mlm):
    told = []
    assert make(tmp_path, rows=texts(empty={0, 1, 3}), task=mlm).check(range(1, 13), told.append) == 10
    assert sum(told) == 12
    with pytest.raises(DataError, match="line 2: no `text`: expected `id` and `text` .strings., found id, title"):
        make(tmp_path, rows=[texts({})[0], {"id": "x", "title": "t"}], task=mlm).check(range(2), told.append)


def test_shuffling_is_that_of_a_plain_permutation(tmp_path):
    data = make(tmp_path, n=50, batch_size=50)
    order = np.random.default_rng([0, 2]).permutation(50)
    assert [example.query for example in data.training_batch(3, True)] == [f"q{i}" for i in order]


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.jsonl: there is no line"):
        Data(JsonlCorpus([tmp_path / "empty.jsonl"]), None, seed=0, batch_size=1, rank=0, world_size=1)
