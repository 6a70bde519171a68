"""Whole runs of mlm, lm and section, whose lines are passages of the corpus, and lines that they skip."""

import json

import pytest
import torch

from atlas.checkpoint import load_checkpoint
from tests.kit import last_metrics, read_jsonl, run, run_on, slow, world, write_jsonl
from tests.test_training import losses_of

pytestmark = pytest.mark.processes

TIED = {"train_retriever": True}
QUERY_SIDE = {"train_retriever": True, "query_side_retriever_training": True}


def texts(path, first, n, empty=()):
    """So many lines of the corpus; those at the places in `empty` have no text."""
    rows = read_jsonl(world() / "passages.jsonl")[first : first + n]
    return write_jsonl(path, [row | {"text": " "} if i in empty else row for i, row in enumerate(rows)])


def weights_of(directory):
    checkpoint = load_checkpoint(directory)
    return {**checkpoint.reader, **checkpoint.retriever}


def results_of(directory, name):
    """The rows of a result file with the ids of the passages instead of them: scores differ in their last digits."""
    return [row | {"passages": [p["id"] for p in row["passages"]]} for row in read_jsonl(directory / name)]


# Some alone, some one after the other, over the borders of the shares that ranks check.
EMPTY = {2, 3, 5, 12, 13, 14, 15}


@pytest.mark.parametrize(
    ("task", "ranks", "flags"),
    [
        slow("mlm", 2, TIED),
        ("mlm", 3, QUERY_SIDE | {"retrieve_with_rerank": True, "n_to_rerank_with_retrieve_with_rerank": 8}),
        slow("lm", 2, QUERY_SIDE | {"min_lm_context_ratio": 0.2, "max_lm_context_ratio": 0.8}),
        ("section", 3, TIED | {"shuffle": True, "refresh_index": 2}),
        ("section", 2, {}),
    ],
)
def test_ranks_equal_accumulation_with_lines_skipped(tmp_path, task, ranks, flags):
    train = texts(tmp_path / "train.jsonl", 0, 20, EMPTY)
    dev = texts(tmp_path / "dev.jsonl", 100, 9, {0, 1, 4})
    flags = flags | {"task": task, "train_data": train, "eval_data": dev}
    refresh = {"refresh_index": ranks * flags["refresh_index"]} if "refresh_index" in flags else {}
    many = run_on(ranks, tmp_path / "many", total_steps=4, **flags)
    accumulation = {"total_steps": 4 * ranks, "accumulation_steps": ranks, "log_freq": ranks}
    one = run(tmp_path / "one", **flags | refresh | accumulation)
    for name, values in losses_of(one).items():
        assert values == pytest.approx(losses_of(many)[name], abs=2e-5, nan_ok=False), name
    assert losses_of(one)["reader"] and bool(losses_of(one)["retriever"]) == bool(flags.get("train_retriever"))
    for name, tensor in weights_of(one).items():
        assert torch.allclose(weights_of(many)[name], tensor, atol=1e-4), name
    rows = results_of(one, f"dev-step-{4 * ranks}.jsonl")
    assert rows == results_of(many, "dev-step-4.jsonl")
    assert [row["id"] for row in rows] == ["p102", "p103", "p105", "p106", "p107", "p108"]
    assert all(row["id"] not in row["passages"] and len(row["passages"]) == 4 for row in rows)
    metrics = last_metrics(one)
    assert list(metrics) == ["accuracy", "f1", "rouge_1", "rouge_2", "rouge_L", "eval_loss"]
    assert metrics == pytest.approx(last_metrics(many), abs=1e-3)
    log = (many / "run.log").read_text()
    assert "dev.jsonl: 3 of 9 lines are skipped (" in log and "| 6 examples in " in log


@pytest.mark.parametrize("flags", [QUERY_SIDE, slow(TIED), slow({"closed_book": True, "passages": None})])
def test_a_quarter_of_the_lines_skipped_changes_nothing(tmp_path, flags):
    """Batches are as full as without these lines, and hold the same examples."""
    plain = read_jsonl(texts(tmp_path / "plain.jsonl", 0, 6))
    skipped = [row | {"section": None} for row in read_jsonl(texts(tmp_path / "more.jsonl", 50, 2))]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [skipped[0], *plain[:4], skipped[1], *plain[4:]])
    flags = flags | {"task": "section", "eval_data": None, "total_steps": 4}
    without = run(tmp_path, name="without", train_data=tmp_path / "plain.jsonl", **flags)
    among = run(tmp_path, name="among", train_data=mixed, **flags)
    assert losses_of(among) == losses_of(without)
    a, b = weights_of(without), weights_of(among)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "mixed.jsonl: 2 of 8 lines are skipped (lines without a `section`" in (among / "run.log").read_text()


@pytest.mark.parametrize("task", ["mlm", slow("lm"), slow("section")])
def test_evaluation_on_any_number_of_ranks(tmp_path, task):
    dev = texts(tmp_path / "dev.jsonl", 0, 13, {0, 1, 2, 3, 9, 12})
    flags = {"task": task, "train_data": None, "eval_data": dev, "retrieve_with_rerank": True}
    flags |= {"n_to_rerank_with_retrieve_with_rerank": 6}
    one = run(tmp_path / "one", "evaluate", **flags)
    rows, corpus = results_of(one, "dev-step-0.jsonl"), {row["id"]: row for row in read_jsonl(dev)}
    assert [row["id"] for row in rows] == ["p4", "p5", "p6", "p7", "p8", "p10", "p11"]
    for row in rows:
        line = corpus[row["id"]]
        assert row["id"] not in row["passages"]
        assert row["metadata"] == (line if task == "mlm" else {"id": line["id"]})
        (target,) = row["answers"]
        if task == "section":
            assert (row["query"], target) == (f"{line['title']}, {line['section']}", line["text"])
        elif task == "lm":
            assert row["query"] + target == line["text"].rstrip()
        else:
            assert target.startswith("<extra_id_0>") and line["title"] + ":" not in row["query"]
    for ranks in (2, 3):
        many = run_on(ranks, tmp_path / f"{ranks}", "evaluate", **flags)
        assert results_of(many, "dev-step-0.jsonl") == rows
        assert last_metrics(many) == pytest.approx(last_metrics(one), abs=1e-3)


def test_retrieval_alone_for_masked_queries(tmp_path):
    """The reader's tokenizer masks, no reader is loaded; the queries are those of an evaluation with one."""
    dev = texts(tmp_path / "dev.jsonl", 0, 6)
    flags = {"task": "mlm", "train_data": None, "eval_data": dev}
    full = read_jsonl(run(tmp_path, "evaluate", name="full", **flags) / "dev-step-0.jsonl")
    found = read_jsonl(run(tmp_path, "evaluate", name="search", retrieve_only=True, **flags) / "dev-step-0.jsonl")
    assert [row | {"generation": ""} for row in found] == [row | {"generation": ""} for row in full]
    assert all("generation" not in row for row in found)


@pytest.mark.parametrize("task", ["mlm", slow("lm"), slow("section")])
def test_formats_of_the_decoder(tmp_path, task):
    """They change the loss, and the prompt stays out of the answers."""
    flags = {"task": task, "train_data": texts(tmp_path / "train.jsonl", 0, 4), "total_steps": 1}
    flags |= {"eval_data": texts(tmp_path / "dev.jsonl", 9, 3), "generation_max_length": 80}
    plain = run(tmp_path, name="plain", **flags | {"eval_data": None})
    formatted = run(
        tmp_path, name="formatted", decoder_prompt_format="{query} =>", decoder_format="so: {target}", **flags
    )
    assert losses_of(plain)["reader"] != losses_of(formatted)["reader"]
    rows = read_jsonl(formatted / "dev-step-1.jsonl")
    assert len(rows) == 3 and not any(row["query"] in row["generation"] for row in rows)


def test_going_on_with_lines_skipped(tmp_path):
    train = texts(tmp_path / "train.jsonl", 0, 9, {1, 4, 5})
    flags = {"task": "mlm", "train_data": train, "eval_data": None, "scheduler_steps": 8, "shuffle": True} | QUERY_SIDE
    straight = losses_of(run(tmp_path, name="straight", total_steps=8, **flags))
    run(tmp_path, name="stopped", total_steps=5, **flags)
    assert losses_of(run(tmp_path, name="stopped", total_steps=8, **flags)) == straight


def test_going_on_from_a_version_that_counted_lines_that_are_skipped(tmp_path):
    train = texts(tmp_path / "train.jsonl", 0, 9, {1, 4, 5})
    flags = {"task": "lm", "train_data": train, "eval_data": None}
    state_file = run(tmp_path, total_steps=2, **flags) / "checkpoint/latest/state.json"
    state = json.loads(state_file.read_text())
    assert (state["examples"], state.pop("examples_per_epoch")) == (4, 6)
    old = {name: value for name, value in state.items() if name not in ("files", "checksum")}
    state_file.write_text(json.dumps(old | {"examples": 9 + 5}))
    directory = run(tmp_path, total_steps=3, **flags)
    assert "its 14 examples are 9 without them. From here on every batch is full" in (directory / "run.log").read_text()
    state = json.loads((directory / "checkpoint/latest/state.json").read_text())
    assert (state["examples"], state["examples_per_epoch"]) == (9 + 2, 6)


def test_an_examples_own_passage_is_the_last_resort(tmp_path):
    """In a corpus of four passages that are all read; said once, not for every example."""
    four = texts(tmp_path / "four.jsonl", 0, 4)
    flags = {"task": "lm", "passages": four}
    evaluated = run(tmp_path, "evaluate", name="evaluated", train_data=None, eval_data=four, **flags)
    for row in read_jsonl(evaluated / "four-step-0.jsonl"):
        assert len(row["passages"]) == 4 and row["passages"][-1]["id"] == row["id"]
    trained = run(tmp_path, name="trained", train_data=four, eval_data=None, total_steps=3, **flags)
    for directory in (evaluated, trained):
        assert (directory / "run.log").read_text().count("raise --filtering_overretrieve_ratio") == 1
