"""Multiple choice: orders of the options, the prompt, the choice averaged over them, at any number of ranks."""

import itertools
import math
import random

import pytest
import torch

from atlas.config import Model
from atlas.files.jsonl import JsonlCorpus
from atlas.model.inputs import Inputs
from atlas.model.reader import load_reader
from atlas.model.tokenization import load_reader_tokenizer
from atlas.tasks.data import Data
from tests.kit import (
    choice_questions,
    last_metrics,
    lettered_models,
    make_task,
    read_jsonl,
    recorded,
    run,
    run_on,
    slow,
    world,
    write_jsonl,
)

LINE = {"question": "who?", "options": {"A": "Ada", "B": "Bob", "C": "Cy"}, "answer": "B", "id": 7, "dataset": "x_test"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_reader_tokenizer(str(lettered_models() / "reader"))


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(permutations="cyclic", num_options=4, text_maxlength=512, **others):
        return make_task(
            "multiple_choice",
            tokenizer=tokenizer,
            text_maxlength=text_maxlength,
            multiple_choice_num_options=num_options,
            multiple_choice_train_permutations=permutations,
            multiple_choice_eval_permutations=permutations,
            **others,
        )

    return make


def examples(task, line):
    found = [task.example(line, random.Random(0), number) for number in range(task.examples_per_line)]
    return [example for example in found if example is not None]


def test_an_example(make, tokenizer):
    example = make().process(LINE, random.Random(0))
    assert example.query == "question: who? options: (A) Ada (B) Bob (C) Cy answer: <extra_id_0>"
    assert (example.target, example.answers, example.id, example.first_of_line) == ("<extra_id_0> B", ["B"], 7, True)
    uid = example.metadata["uid"]
    assert example.metadata == LINE | {"is_original": True, "uid": uid} and len(uid) == 16
    assert list(example.choices) == ["A", "B", "C"]
    for letter, token in example.choices.items():
        assert tokenizer.encode([f"<extra_id_0> {letter}"])[0] == [tokenizer.sentinel_ids[0], token, tokenizer.eos_id]
    assert make().score("B", example) == {"accuracy": 1.0} and make().score("b", example) == {"accuracy": 0.0}
    assert (
        make().process(LINE | {"options": {"C": "Cy", "B": "Bob", "A": "Ada"}}, random.Random(0)).query == example.query
    )


@pytest.mark.parametrize("n_options", [2, 3, 4, 5])
@pytest.mark.parametrize("permutations", ["single", "cyclic", "all"])
def test_orders(make, permutations, n_options):
    texts = ["Ada", "Bob", "Cy", "Di", "Ed"][:n_options]
    line = LINE | {"options": dict(zip("ABCDE", texts, strict=False))}
    task = make(permutations, num_options=5)
    assert task.examples_per_line == {"single": 1, "cyclic": 5, "all": 120}[permutations]
    found = examples(task, line)
    orders = [tuple(example.metadata["options"].values()) for example in found]
    expected = {
        "single": [tuple(texts)],
        "cyclic": [tuple(texts[i:] + texts[:i]) for i in range(n_options)],
        "all": list(itertools.permutations(texts)),
    }
    assert orders == expected[permutations]
    assert [example.metadata["is_original"] for example in found] == [True] + [False] * (len(found) - 1)
    assert [example.first_of_line for example in found] == [True] + [False] * (len(found) - 1)
    assert len({example.metadata["uid"] for example in found}) == 1
    for example in found:
        (letter,) = example.answers
        assert example.metadata["answer"] == letter and example.metadata["options"][letter] == "Bob"
        assert example.target == f"<extra_id_0> {letter}" and f"({letter}) Bob" in example.query


def test_in_training_every_line_gives_as_many_examples(make, tmp_path):
    """An epoch has each order of 4 options once; a line of 3 has its first order twice; of 2, both."""
    lines = [LINE, LINE | {"options": dict(zip("ABCD", "wxyz", strict=True))}]
    lines += [LINE | {"options": {"A": "Ada", "B": "Bob"}}]
    task = make("cyclic", training=True)
    data = Data(
        JsonlCorpus([write_jsonl(tmp_path / "a.jsonl", lines)]), task, seed=0, batch_size=4, rank=0, world_size=1
    )
    batches = [[tuple(e.metadata["options"].values()) for e in data.training_batch(step, False)] for step in (1, 2, 3)]
    assert batches == [
        [("Ada", "Bob", "Cy"), ("Bob", "Cy", "Ada"), ("Cy", "Ada", "Bob"), ("Ada", "Bob", "Cy")],
        [("w", "x", "y", "z"), ("x", "y", "z", "w"), ("y", "z", "w", "x"), ("z", "w", "x", "y")],
        [("Ada", "Bob"), ("Bob", "Ada")] * 2,
    ]
    shuffled = [e.query for step in (4, 5, 6) for e in data.training_batch(step, True)]
    plain = [e.query for step in (1, 2, 3) for e in data.training_batch(step, False)]
    assert sorted(shuffled) == sorted(plain) and shuffled != plain


def test_a_long_question_is_cut_from_the_left(make, tokenizer):
    words = "what is the river of the bird and the trade of the founder in the month " * 40
    question = words + "or so?"
    for text_maxlength, limit in ((512, 356), (64, 63)):
        query = make(text_maxlength=text_maxlength).process(LINE | {"question": question}, random.Random(0)).query
        begin, end = "question: ", " options: (A) Ada (B) Bob (C) Cy answer: <extra_id_0>"
        kept = query.removeprefix(begin).removesuffix(end)
        assert query == begin + kept + end and question.endswith(kept) and len(kept) < len(question)
        longer = begin + question[-len(kept) - 1 :] + end
        fits, too_long = (len(tokenizer.encode([text], eos=False)[0]) for text in (query, longer))
        assert fits == limit < too_long
    options = {"A": words[: len(words) // 2], "B": "none"}  # they leave no room in 356 tokens, but in 511
    assert make().process(LINE | {"options": options}, random.Random(0)).query.startswith("question: who? options: ")
    options = {"A": words, "B": "none"}  # nothing of the question is left then
    assert (
        make().process(LINE | {"options": options}, random.Random(0)).query.startswith("question:  options: (A) what")
    )


def test_cut_questions_are_counted(make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    lines = [
        LINE,
        LINE | {"question": "what is the river " * 400},
        LINE | {"options": {"A": "of a bird " * 400, "B": ""}},
    ]
    path = write_jsonl(tmp_path / "long.jsonl", lines)
    Data(JsonlCorpus([path]), make(), seed=0, batch_size=1, rank=0, world_size=1)._check_all()
    cut = f"{path}: 2 of 3 lines have a question that does not fit into 356 tokens with its options, which is cut"
    assert [record.getMessage() for record in caplog.records if "cut" in record.getMessage()] == [cut]


def test_joining_by_hand(make):
    """Two orders of A: x, B: y; the softmax of 0 and log 3 is 1/4 and 3/4. What was generated does not matter."""
    rows = [
        {"query": "q", "generation": "river", "metadata": {"options": {"A": "x", "B": "y"}, "answer": "B"}},
        {"query": "r", "generation": "A", "metadata": {"options": {"A": "y", "B": "x"}, "answer": "A"}},
    ]
    rows[0]["choice_logits"] = {"A": 5.0, "B": 5.0 + math.log(3)}
    rows[1]["choice_logits"] = {"A": 0.0, "B": 0.0}
    joined, values = make().join(rows)
    assert joined == {
        "query": "q",
        "generation": "B",
        "metadata": rows[0]["metadata"],
        "choice_probs": {"A": pytest.approx(0.375), "B": pytest.approx(0.625)},
        "all_probs": {"A": pytest.approx([0.25, 0.5]), "B": pytest.approx([0.75, 0.5])},
        "permutations": rows,
    }
    assert values == {"debiased_accuracy": 1.0}
    wrong = [row | {"metadata": row["metadata"] | {"answer": letter}} for row, letter in zip(rows, "AB", strict=True)]
    assert make().join(wrong)[1] == {"debiased_accuracy": 0.0}
    bare = [{key: value for key, value in row.items() if key != "choice_logits"} for row in rows]
    assert make().join(bare) == (bare[0] | {"permutations": bare}, {})  # with --retrieve_only nothing is read


@pytest.mark.parametrize("permutations", ["cyclic", "all"])
def test_a_liking_for_a_letter_averages_out(make, permutations):
    """Logits are the merit of a text plus a liking for the letter that is far larger."""
    liking, merit = {"A": 9.0, "B": 0.0, "C": -4.0, "D": 1.0}, {"w": 0.0, "x": 0.1, "y": 0.5, "z": 0.2}
    line = LINE | {"options": dict(zip("ABCD", "wxyz", strict=True)), "answer": "C"}
    for orders, right in ((permutations, 1.0), ("single", 0.0)):
        rows = []
        for example in examples(make(orders), line):
            logits = {letter: liking[letter] + merit[text] for letter, text in example.metadata["options"].items()}
            rows.append({"choice_logits": logits, "metadata": example.metadata})
        joined, values = make().join(rows)
        assert values == {"debiased_accuracy": right}
        assert sum(joined["choice_probs"].values()) == pytest.approx(1.0)


def test_options_of_the_same_text_share(make):
    rows = [
        {
            "choice_logits": {"A": 0.0, "B": math.log(2), "C": 0.0},
            "metadata": LINE | {"options": {"A": "x", "B": "y", "C": "x"}},
        }
    ]
    probabilities = make().join(rows)[0]["choice_probs"]
    assert probabilities == pytest.approx({"A": 0.25, "B": 0.5, "C": 0.25})
    rows[0]["metadata"] |= {"answer": "C"}
    rows[0]["choice_logits"]["A"] = 9.0
    assert make().join(rows)[1] == {"debiased_accuracy": 1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "no `question`: expected `question`.*`options`.*`answer`.*found question, options"),
        ({"options": None}, "no `options`: expected `question`"),
        ({"options": ["a", "b"]}, r"`options` must be an object of strings by letter, found \['a', 'b'\]"),
        ({"options": {"A": "a", "B": 2}}, "`options` must be an object of strings by letter"),
        ({"options": {"A": "a", "C": "c"}}, "`options` must be lettered A, B, and so on, at least two; found 'A, C'"),
        ({"options": {"A": "a"}}, "at least two; found 'A'"),
        ({"options": {"a": "a", "b": "b"}}, "found 'a, b'"),
        ({"options": dict.fromkeys("ABCDE", "x")}, "5 `options` are more than --multiple_choice_num_options 4"),
        ({"answer": "D"}, "`answer` must be one of A, B, C, found 'D'"),
        ({"answer": None}, "no `answer`"),
    ],
)
def test_bad_lines(make, change, reason):
    for read in (make().check, lambda line: make().process(line, random.Random(0))):
        with pytest.raises(ValueError, match=reason):
            read(LINE | change)
    if "answer" in change and change["answer"] is None:
        example = make(answers_needed=False).process(LINE | change, random.Random(0))
        assert (example.target, example.answers) == ("", [])


def test_a_vocabulary_without_letters_is_refused():
    with pytest.raises(ValueError, match="vocabulary has no token for every letter from A to D"):
        make_task(
            "multiple_choice",
            tokenizer=load_reader_tokenizer(str(world() / "models/reader")),
            text_maxlength=64,
            multiple_choice_num_options=4,
            multiple_choice_train_permutations="single",
            multiple_choice_eval_permutations="single",
        )


def flags(tmp_path, **changes):
    rows = choice_questions(7, n_options=lambda i: 3 + i % 3)
    return {
        "task": "multiple_choice",
        "train_data": None,
        "eval_data": write_jsonl(tmp_path / "dev.jsonl", rows + rows[:1]),  # the same question once more
        "reader_model_type": lettered_models() / "reader",
        "multiple_choice_num_options": 5,
        "multiple_choice_eval_permutations": "cyclic",
    } | changes


def rounded(value):
    """Numbers to a few digits: the others change with the shapes of matrix products. Passages are their ids."""
    if isinstance(value, dict):
        return {
            key: [p["id"] for p in item] if key == "passages" else rounded(item)
            for key, item in value.items()
            if key != "score"
        }
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.processes
@pytest.mark.parametrize("batch_size", [slow(1), 2])
def test_three_ranks_equal_one(tmp_path, batch_size):
    changes = flags(tmp_path, per_gpu_batch_size=batch_size)
    one = run(tmp_path / "one", "evaluate", **changes)
    three = run_on(3, tmp_path / "three", "evaluate", **changes)
    rows, lines = read_jsonl(one / "dev-step-0.jsonl"), read_jsonl(changes["eval_data"])
    assert rounded(rows) == rounded(read_jsonl(three / "dev-step-0.jsonl"))
    assert last_metrics(one) == pytest.approx(last_metrics(three), abs=1e-3)
    assert [row["id"] for row in rows] == [line["id"] for line in lines]  # one line a question, in order
    hits = debiased = 0
    for row, line in zip(rows, lines, strict=True):
        keys = ["query", "answers", "generation", "passages", "metadata", "id"]
        assert list(row) == [*keys, "choice_probs", "all_probs", "permutations"]
        assert row["metadata"] == line | {"is_original": True, "uid": row["metadata"]["uid"]}
        assert len(row["permutations"]) == len(line["options"])
        for of_order in row["permutations"]:
            assert list(of_order) == [*keys, "choice_logits"] and len(of_order["passages"]) == 4
            hits += of_order["generation"] == of_order["answers"][0]
        chosen = max(row["choice_probs"], key=row["choice_probs"].get)
        first = row["permutations"][0] | {"generation": chosen}
        assert {key: first[key] for key in keys} == {key: row[key] for key in keys}
        debiased += chosen == line["answer"]
    orders = sum(len(line["options"]) for line in lines)
    metrics = last_metrics(one)
    assert list(metrics) == ["accuracy", "eval_loss", "debiased_accuracy"]
    assert metrics["debiased_accuracy"] == pytest.approx(100 * debiased / len(lines), abs=1e-3)
    assert metrics["accuracy"] == pytest.approx(100 * hits / orders, abs=1e-3)
    assert [line["examples"] for line in recorded(three, "evaluation")] == [orders]


@pytest.mark.processes
def test_debiased_accuracy_without_results(tmp_path):
    changes = flags(tmp_path, closed_book=True, passages=None)
    written = run(tmp_path / "written", "evaluate", **changes)
    bare = run_on(2, tmp_path / "bare", "evaluate", **changes | {"write_results": False})
    assert last_metrics(bare) == pytest.approx(last_metrics(written), abs=1e-3)
    assert not list(bare.glob("*-step-*.jsonl"))


def test_choice_logits_are_those_of_a_decoder_that_said_the_sentinel(tmp_path, tokenizer):
    """Against a pass of its own for each order; the decoder's prompt stands before the sentinel."""
    prompt = "the bird"
    changes = flags(tmp_path, closed_book=True, passages=None, decoder_prompt_format=prompt, text_maxlength=200)
    rows = read_jsonl(run(tmp_path, "evaluate", **changes) / "dev-step-0.jsonl")
    reader = load_reader(str(lettered_models() / "reader"), dropout=0)
    inputs = Inputs(Model(text_maxlength=200), tokenizer, None, device=torch.device("cpu"))
    said = [reader.config.decoder_start_token_id, *tokenizer.encode([prompt], eos=False)[0], tokenizer.sentinel_ids[0]]
    for row in [of_order for joined in rows for of_order in joined["permutations"]]:
        ids, mask, _ = inputs.reader([row["query"]], None)
        with torch.no_grad():
            hidden = reader.encode(ids, mask)
            logits = reader.logits(hidden, mask.flatten(1), torch.tensor([said]))[0, -1]
        for letter, logit in row["choice_logits"].items():
            token = tokenizer.encode([f"<extra_id_0> {letter}"])[0][1]
            assert logit == pytest.approx(logits[token].item(), abs=1e-4)


def test_a_target_without_room_for_the_letter(tmp_path, capfd):
    with pytest.raises(SystemExit):
        run(tmp_path, "evaluate", **flags(tmp_path, closed_book=True, passages=None, target_maxlength=1))
    assert "--target_maxlength leaves no room for the letter" in capfd.readouterr().err


def test_retrieval_alone(tmp_path):
    changes = flags(tmp_path, retrieve_only=True)
    write_jsonl(changes["eval_data"], [{k: v for k, v in row.items() if k != "answer"} for row in choice_questions(3)])
    rows = read_jsonl(run(tmp_path, "evaluate", **changes) / "dev-step-0.jsonl")
    assert [len(row["permutations"]) for row in rows] == [4, 4, 4] and "choice_probs" not in rows[0]
    assert all(len(row["passages"]) == 4 and row["answers"] == [] for row in rows)
