"""What holds for every task: ranks do not change the numbers, own passages can be read, a bad line is named."""

import random

import pytest

from atlas.config import TASK_NAMES
from atlas.tasks import TASKS
from tests.kit import (
    choice_questions,
    last_metrics,
    lettered_models,
    make_task,
    read_jsonl,
    run,
    run_on,
    world,
    write_jsonl,
)
from tests.test_pretraining import results_of
from tests.test_training import losses_of

pytestmark = pytest.mark.processes

VERDICTS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
METRICS = {
    "base": ["accuracy"],
    "qa": ["exact_match", "f1"],
    "cloze": ["exact_match", "f1"],
    "mlm": ["accuracy", "f1", "rouge_1", "rouge_2", "rouge_L"],
    "lm": ["accuracy", "f1", "rouge_1", "rouge_2", "rouge_L"],
    "section": ["accuracy", "f1", "rouge_1", "rouge_2", "rouge_L"],
    "multiple_choice": ["accuracy"],
    "fever": ["accuracy"],
    "kilt": ["accuracy", "exact_match", "f1"],
}


def lines_of(task, n):
    """So many lines of a task's form, each with three passages of its own, which only --use_file_passages reads."""
    questions, texts = read_jsonl(world() / "train.jsonl")[:n], read_jsonl(world() / "passages.jsonl")
    if task in ("mlm", "lm", "section"):
        lines = texts[:n]
    elif task == "multiple_choice":
        lines = choice_questions(n)
    else:
        lines = [
            {
                "base": {"query": row["question"], "target": row["target"]},
                "qa": {"question": row["question"], "answers": row["answers"]},
                "cloze": {"query": f"{row['question']} <extra_id_0>", "answers": row["answers"]},
                "fever": {"claim": f"{row['question']} {row['target']}", "label": VERDICTS[i % 3]},
                "kilt": {"input": row["question"], "output": [{"answer": a} for a in row["answers"]] + [{"meta": 1}]},
            }[task]
            | {"id": row["id"]}
            for i, row in enumerate(questions)
        ]
    return [line | {"passages": texts[3 * i : 3 * i + 3]} for i, line in enumerate(lines)]


def flags(tmp_path, task, **changes):
    lines = lines_of(task, 12)
    return {
        "task": task,
        "train_data": write_jsonl(tmp_path / "train.jsonl", lines[:7]),
        "eval_data": write_jsonl(tmp_path / "dev.jsonl", lines[7:]),
        "reader_model_type": lettered_models() / "reader",
        "multiple_choice_train_permutations": "cyclic",
        "multiple_choice_eval_permutations": "cyclic",
    } | changes


def test_every_task_is_here():
    assert set(TASKS) == set(TASK_NAMES) == set(METRICS)


def comparable(row):
    """Without numbers, whose last digits change with the shapes of matrix products."""
    row = {key: value for key, value in row.items() if key not in ("choice_probs", "all_probs", "choice_logits")}
    if "permutations" in row:
        row["permutations"] = [
            comparable(r) | {"passages": [p["id"] for p in r["passages"]]} for r in row["permutations"]
        ]
    return row


@pytest.mark.slow
@pytest.mark.parametrize("task", TASK_NAMES)
def test_ranks_do_not_change_the_numbers(tmp_path, task):
    """Evaluation, and three steps of training with an evaluation behind them."""
    changes = flags(tmp_path, task)
    training = {"train_retriever": True}
    one = run(tmp_path / "one", total_steps=6, accumulation_steps=2, log_freq=2, **training, **changes)
    two = run_on(2, tmp_path / "two", total_steps=3, **training, **changes)
    for name, values in losses_of(one).items():
        assert len(values) == 3 and values == pytest.approx(losses_of(two)[name], abs=2e-5), name
    changes |= {"train_data": None, "name": "evaluated"}
    runs = [(one, two, "dev-step-6.jsonl", "dev-step-3.jsonl")]
    one, two = run(tmp_path / "one", "evaluate", **changes), run_on(2, tmp_path / "two", "evaluate", **changes)
    runs += [(one, two, "dev-step-0.jsonl", "dev-step-0.jsonl")]
    for one, two, of_one, of_two in runs:
        rows = results_of(one, of_one)
        assert [row["id"] for row in rows] == [line["id"] for line in read_jsonl(tmp_path / "dev.jsonl")]
        assert list(map(comparable, rows)) == list(map(comparable, results_of(two, of_two)))
        metrics = last_metrics(one)
        measured = [name for name in metrics if name != "mrr" and not name.startswith("recall@")]
        joined = ["debiased_accuracy"] if task == "multiple_choice" else []
        assert measured == [*METRICS[task], "eval_loss", *joined]
        assert ("recall@1" in metrics) == (task in ("qa", "cloze", "kilt"))
        assert metrics == pytest.approx(last_metrics(two), abs=2e-3)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_passages_that_stand_in_the_data(tmp_path, task):
    """Trained and evaluated on them, no corpus given; without them, the line is named."""
    changes = flags(tmp_path, task, use_file_passages=True, passages=None, n_context=2)
    directory = run(tmp_path, total_steps=3, **changes)
    lines = read_jsonl(tmp_path / "dev.jsonl")
    rows = results_of(directory, "dev-step-3.jsonl")
    assert [row["passages"] for row in rows] == [[p["id"] for p in line["passages"][:2]] for line in lines]
    given = write_jsonl(tmp_path / "bare.jsonl", [lines[0], {k: v for k, v in lines[1].items() if k != "passages"}])
    assert_refused(tmp_path, "bare.jsonl, line 2: no `passages`", **changes | {"eval_data": given})


NEEDED = {
    "base": ("query", "target"),
    "qa": ("question", "answers"),
    "cloze": ("query", "answers"),
    "mlm": ("id", "text"),
    "lm": ("id", "text"),
    "section": ("id", "title", "text"),
    "multiple_choice": ("question", "options", "answer"),
    "fever": ("claim", "label"),
    "kilt": ("input", "output"),
}


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_wrong_field_name_is_told(tmp_path, capfd, task):
    lines = lines_of(task, 3)
    expected = make_task(task, **options()).fields
    for field in NEEDED[task]:
        assert f"`{field}`" in expected
        wrong = {("wrong" if key == field else key): value for key, value in lines[1].items()}
        file = write_jsonl(tmp_path / "wrong.jsonl", [lines[0], wrong, lines[2]])
        assert_refused(tmp_path, None, **flags(tmp_path, task, train_data=file))
        said = capfd.readouterr().err
        assert f"wrong.jsonl, line 2: no `{field}`: expected {expected}, found {', '.join(wrong)}" in said


def options():
    """All that a task's factory may ask for."""
    from dataclasses import asdict

    from atlas.config import Tasks
    from atlas.model.tokenization import load_reader_tokenizer

    tokenizer = load_reader_tokenizer(str(lettered_models() / "reader"))
    return {**asdict(Tasks()), "tokenizer": tokenizer, "text_maxlength": 64}


def assert_refused(tmp_path, sentence, **changes):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, **changes | {"name": "refused"})
    assert ended.value.code == 1
    assert sentence is None or sentence in (tmp_path / "refused/run.log").read_text()


@pytest.mark.parametrize("task", TASK_NAMES)
def test_metadata_is_an_object_of_the_line(task):
    given = (
        make_task(task, **options())
        .process(lines_of(task, 1)[0] | {"metadata": {"year": 1}}, random.Random(0))
        .metadata
    )
    if task in ("qa", "cloze", "fever", "kilt"):
        assert given["year"] == 1
        with pytest.raises(ValueError, match="`metadata` must be an object, found 3"):
            make_task(task, **options()).process(lines_of(task, 1)[0] | {"metadata": 3}, random.Random(0))
