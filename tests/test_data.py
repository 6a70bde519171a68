"""Who gets which lines, and that chance depends on nothing but seed, epoch and line."""

import numpy as np
import pytest

from atlas.files.jsonl import DataError, JsonlCorpus
from atlas.model.tokenization import load_reader_tokenizer
from atlas.tasks import Example, Task, TaskSetup
from atlas.tasks.data import Data, _shortest
from tests.kit import make_task, read_jsonl, world, write_jsonl


def make(tmp_path, n=7, batch_size=2, rank=0, world_size=1, seed=0, rows=None, task=None, checked=False):
    rows = rows or [{"question": f"q{i}", "answers": [f"a{i}", f"b{i}", f"c{i}"]} for i in range(n)]
    corpus = JsonlCorpus([write_jsonl(tmp_path / "data.jsonl", rows)])
    task = task or make_task("qa", qa_prompt_format="{question}")
    data = Data(corpus, task, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)
    if checked:
        data.keep(data.check(range(len(corpus)), lambda n: None))
    return data


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
    options = {"rows": rows, "task": mlm, "checked": True}
    alone = make(tmp_path, batch_size=1, **options)
    ranks = [make(tmp_path, rank=r, world_size=world_size, **options) for r in range(world_size)]
    seen = []
    for step in range(1, 10):
        together = [example for data in ranks for example in data.training_batch(step, shuffle)]
        first = (step - 1) * 2 * world_size
        assert together == [e for s in range(2 * world_size) for e in alone.training_batch(first + s + 1, shuffle)]
        seen += together
    longest = max(rows, key=lambda row: len(row["text"]))
    queries = [example.query for example in seen if example.id == longest["id"]]
    assert len(queries) > 1 and len(set(queries)) == len(queries)  # anew in every epoch
    fresh = make(tmp_path, rank=1, world_size=world_size, **options)  # as after a restart
    assert fresh.training_batch(7, shuffle) == ranks[1].training_batch(7, shuffle)


SKIPPED = {0, 1, 3, 7}
LEFT = [f"p{i}" for i in range(13) if i not in SKIPPED]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_lines_that_are_skipped_leave_no_holes(tmp_path, mlm, world_size, shuffle):
    options = {"rows": texts(SKIPPED), "task": mlm, "checked": True, "world_size": world_size}
    ranks = [make(tmp_path, rank=r, **options) for r in range(world_size)]
    batches = [data.training_batch(step, shuffle) for step in range(1, 13) for data in ranks]
    assert {len(batch) for batch in batches} == {2}
    seen = [example.id for batch in batches for example in batch]
    epochs = [seen[start : start + len(LEFT)] for start in range(0, len(seen) - len(LEFT) + 1, len(LEFT))]
    assert len(epochs) > 1 and all(sorted(epoch) == sorted(LEFT) for epoch in epochs)
    assert (epochs[0] == LEFT) != shuffle and (epochs[0] == epochs[1]) != shuffle
    if shuffle:
        order = np.random.default_rng([0, 1]).permutation(len(LEFT))
        assert epochs[1] == [LEFT[i] for i in order]
    evaluated = [batch for round in zip(*(d.evaluation_batches() for d in ranks), strict=True) for batch in round]
    assert [example.id for batch in evaluated for example in batch] == LEFT
    assert [len(batch) for batch in evaluated][: len(LEFT) // 2] == [2] * (len(LEFT) // 2)


def test_examples_are_those_of_their_line_in_the_file(tmp_path, mlm):
    """Skipping a line changes nothing in the noise of the others."""
    whole = make(tmp_path, rows=texts({}), task=mlm, batch_size=13, checked=True).training_batch(1, False)
    rest = make(tmp_path, rows=texts(SKIPPED), task=mlm, batch_size=9, checked=True).training_batch(1, False)
    assert rest == [example for example in whole if example.id in LEFT]


def test_checking_says_which_lines_count(tmp_path, mlm):
    told = []
    counts = make(tmp_path, rows=texts(SKIPPED), task=mlm).check(range(1, 13), told.append)
    assert counts.tolist() == [i not in SKIPPED for i in range(1, 13)]
    assert sum(told) == 12
    with pytest.raises(DataError, match="line 2: no `text`: expected `id` and `text` .strings., found id, title"):
        make(tmp_path, rows=[texts({})[0], {"id": "x", "title": "t"}], task=mlm).check(range(2), told.append)


def test_shuffling_is_that_of_a_plain_permutation(tmp_path):
    data = make(tmp_path, n=50, batch_size=50)
    order = np.random.default_rng([0, 2]).permutation(50)
    assert [example.query for example in data.training_batch(3, True)] == [f"q{i}" for i in order]


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    full = write_jsonl(tmp_path / "full.jsonl", [{}])
    for paths in ([tmp_path / "empty.jsonl"], [full, tmp_path / "empty.jsonl"]):
        with pytest.raises(ValueError, match="empty.jsonl: there is no line"):
            Data(JsonlCorpus(paths), make_task("base"), seed=0, batch_size=1, rank=0, world_size=1)


def test_a_file_of_which_no_line_is_left_is_refused(tmp_path, mlm):
    some = write_jsonl(tmp_path / "some.jsonl", texts({1}))
    none = write_jsonl(tmp_path / "none.jsonl", texts(range(13)))
    for paths in ([none], [some, none]):
        data = Data(JsonlCorpus(paths), mlm, seed=0, batch_size=1, rank=0, world_size=1)
        with pytest.raises(
            ValueError, match="none.jsonl: no line is left, because the task skips texts that are empty"
        ):
            data.keep(data.check(range(len(data)), lambda n: None))


def test_few_bytes_are_kept_of_each_line(tmp_path, mlm):
    data = make(tmp_path, rows=texts({1}), task=mlm)
    data.keep(np.ones(13, bool))
    assert data._kept is None
    data.keep(np.arange(13) != 1)
    assert data._kept.dtype == np.int32 and len(data) == data.places == 12


@pytest.mark.parametrize(("examples", "converted"), [(0, 0), (1, 0), (3, 1), (4, 1), (5, 2), (13, 9), (13 * 3 + 7, 31)])
def test_resuming_a_version_that_counted_skipped_lines(tmp_path, mlm, caplog, monkeypatch, examples, converted):
    monkeypatch.setattr("atlas.tasks.data.log.propagate", True)
    data = make(tmp_path, rows=texts(SKIPPED), task=mlm, checked=True)
    data.resume(5, examples, None)
    assert data.examples_after(5) == data.first_example(6) == converted
    assert f"its {examples} examples are {converted} without them" in caplog.text
    # the next line of the old count that the task does not skip
    line = next(n % 13 for n in range(examples, examples + 13) if n % 13 not in SKIPPED)
    assert data.training_batch(6, False)[0].id == f"p{line}"


def test_resuming_is_exact_where_nothing_was_skipped(tmp_path, mlm, caplog, monkeypatch):
    monkeypatch.setattr("atlas.tasks.data.log.propagate", True)
    make(tmp_path, rows=texts({}), task=mlm, checked=True).resume(5, 20, None)
    data = make(tmp_path, rows=texts(SKIPPED), task=mlm, checked=True)
    data.resume(5, 20, data.places)
    assert data.examples_after(5) == 20 and "checkpoint" not in caplog.text
    data.resume(5, 20, 13)
    assert data.examples_after(5) == 20
    assert "An epoch has 9 examples now, and had 13 when the checkpoint was saved" in caplog.text


def test_a_task_that_skips_a_line_by_chance_is_reported(tmp_path):
    class Unsure(Task):
        def process(self, record, rng):
            return super().process(record, rng) if rng.random() < 0.9 else None

    rows = [{"query": f"q{i}", "target": "t"} for i in range(40)]
    task = Unsure(TaskSetup())
    data = make(tmp_path, rows=rows, task=task, batch_size=40, checked=True)
    with pytest.raises(DataError, match=r"data.jsonl, line \d+: the task Unsure makes no example of this line"):
        data.training_batch(1, False)


def test_the_shortest_answer_begins_as_the_target_does():
    for target, answers, shortest in (
        ("<extra_id_0> Ada Lovelace", ["Ada Lovelace", "Ada"], "<extra_id_0> Ada"),
        ("<extra_id_0> a <extra_id_1>.", ["<extra_id_0> a <extra_id_1>."], "<extra_id_0> a <extra_id_1>."),
        ("Ada", ["Ada"], "Ada"),
        ("", [], ""),
    ):
        assert _shortest(Example("q", target, answers)) == shortest
