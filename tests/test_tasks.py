import os
import random
import subprocess
import sys

import pytest

from atlas.tasks import Example, Judged, Task, example_rng
from tests.kit import make_task

PROMPT = "question: {question} answer: <extra_id_0>"
LINE = {"question": "who?", "answers": ["Ada", "Ada Lovelace"]}


def test_base_example():
    task = make_task("base")
    example = task.process({"query": "a query", "target": "a target", "id": 3, "other": 1}, random.Random(0))
    assert example == Example("a query", "a target", ["a target"], metadata=None, id=3, passages=None)
    assert task.score("a target", example) == {"accuracy": 1.0} and task.score("A target", example) == {"accuracy": 0.0}
    assert task.retrieval_answers(example) is None


def test_qa_reads_the_finished_query_of_a_result_file():
    row = {"query": PROMPT.format(question="who?"), "answers": ["Ada"], "generation": "Bob", "passages": []}
    task = make_task("qa")
    assert task.process(row, random.Random(0)).query == row["query"]
    found = {name: value for name, value in row.items() if name != "generation"}  # of --retrieve_only
    assert task.process(found, random.Random(0)).words_to_find == "who?"
    assert task.process(row | {"question": "when?"}, random.Random(0)).query == PROMPT.format(question="when?")
    with pytest.raises(ValueError, match="no `question`"):
        task.process({"query": "who?", "answers": ["Ada"]}, random.Random(0))


def test_qa_example():
    task = make_task("qa")
    example = task.process(LINE | {"target": "Countess Ada", "id": "q7"}, random.Random(0))
    assert example.query == "question: who? answer: <extra_id_0>"
    assert example.target == "<extra_id_0> Countess Ada"
    assert example.answers == ["Ada", "Ada Lovelace"] == task.retrieval_answers(example)
    assert (example.metadata, example.id, example.passages) == ({}, "q7", None)
    scores = task.score("the Ada Byron", example)
    assert scores == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert task.score("lovelace, ada.", example)["exact_match"] == 0.0
    assert task.score("ada lovelace.", example) == {"exact_match": 1.0, "f1": 1.0}


def test_qa_metadata_is_that_of_the_line():
    task = make_task("qa")
    assert task.process(LINE | {"metadata": {"year": 1843}}, random.Random(0)).metadata == {"year": 1843}
    assert task.process(LINE | {"metadata": None}, random.Random(0)).metadata == {}


def test_qa_target_is_drawn_from_the_answers():
    task = make_task("qa")
    targets = [task.process(LINE, example_rng(0, 0, line)).target for line in range(200)]
    assert set(targets) == {"<extra_id_0> Ada", "<extra_id_0> Ada Lovelace"}
    assert 60 < targets.count("<extra_id_0> Ada") < 140
    assert targets == [task.process(LINE, example_rng(0, 0, line)).target for line in range(200)]
    assert targets != [task.process(LINE, example_rng(0, 1, line)).target for line in range(200)]
    assert targets != [task.process(LINE, example_rng(1, 0, line)).target for line in range(200)]


def test_qa_target_alone_is_its_own_answer():
    example = make_task("qa").process({"question": "who?", "target": "Ada"}, random.Random(0))
    assert (example.target, example.answers) == ("<extra_id_0> Ada", ["Ada"])


@pytest.mark.parametrize(
    ("record", "question", "answers", "identifier", "unread"),
    [
        # NQ-open
        ({"question": "who?", "answer": ["Ada", "A."]}, "who?", ["Ada", "A."], None, set()),
        ({"question": "who?", "answer": "Ada"}, "who?", ["Ada"], None, set()),
        # FlashRAG
        (
            {"id": "test_0", "question": "who?", "golden_answers": ["Ada"], "metadata": {}, "choices": ["x"]},
            *("who?", ["Ada"], "test_0", {"choices"}),
        ),
        ({"question": "who?", "answers": ["Ada"], "answer": ["A."], "x": None}, "who?", ["Ada"], None, {"answer"}),
        ({"question": "who?", "answers": None, "answer": ["A."]}, "who?", ["A."], None, set()),
        # BEIR
        ({"_id": 7, "text": "who?", "metadata": {}}, "who?", [], 7, set()),
        ({"_id": "7", "text": "t", "question": "who?", "id": "8"}, "who?", [], "8", {"_id", "text"}),
    ],
)
def test_questions_of_other_formats(record, question, answers, identifier, unread):
    task = make_task("qa", answers_needed=False, qa_prompt_format="{question}")
    example = task.process(record, random.Random(0))
    assert (example.query, example.answers, example.id) == (question, answers, identifier)
    assert set(task.unread(record)) == unread


def test_provenance_of_kilt_is_a_judgement_of_pages():
    pages = [{"wikipedia_id": "5", "title": "T"}, {"wikipedia_id": 7}, {"title": "of no page"}]
    output = [
        {"answer": "a", "provenance": pages[:1]},
        {"provenance": pages[1:]},
        {"answer": "b", "meta": {"score": 1}},
    ]
    record = {"id": "x", "input": "q", "output": output, "meta": {}}
    task = make_task("kilt")
    example = task.process(record, random.Random(0))
    assert example.judged == Judged({"5": 1, "7": 1}, "wikipedia_id") and example.answers == ["a", "b"]
    assert set(task.unread(record)) == {"meta", "output.meta", "output.provenance.title"}
    assert task.process({"input": "q", "output": [{"answer": "a"}]}, random.Random(0)).judged is None
    with pytest.raises(ValueError, match="`provenance` must be a list of objects, found 'page 5'"):
        task.check({"input": "q", "output": [{"answer": "a", "provenance": "page 5"}]})


@pytest.mark.processes
def test_example_rng_is_the_same_in_every_process():
    values = [example_rng(*key).random() for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 2, 3), (12, 3, 0))]
    assert len(set(values)) == len(values)
    assert values[4] == 0.531301946682319
    code = "from atlas.tasks import example_rng; print(repr(example_rng(1, 2, 3).random()))"
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
        assert float(run.stdout) == values[4]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({}, "no `query`: expected `query` and `target`.*found no field at all"),
        ({"question": "q", "answers": []}, "no `query`.*found question, answers"),
        ({"query": "q"}, "no `target`.*found query"),
        ({"query": 3, "target": "t"}, "`query` must be a string, found 3"),
        ({"query": " \n", "target": "t"}, "`query` is empty"),
        ({"query": "q", "target": ["t"]}, "`target` must be a string"),
    ],
)
def test_bad_lines_of_base(record, reason):
    with pytest.raises(ValueError, match=reason):
        make_task("base").process(record, random.Random(0))


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"query": "q", "target": "t"}, "no `question`: expected `question`.*`answers`.*found query, target"),
        ({"question": "", "answers": ["a"]}, "`question` is empty"),
        ({"question": None, "answers": ["a"]}, "no `question`"),
        ({"question": "q"}, "no `answers`.*found question"),
        ({"question": "q", "reply": ["a"]}, "no `answers`.*found question, reply$"),
        ({"question": "q", "golden_answers": "a"}, "`golden_answers` must be a list of strings, found 'a'"),
        ({"question": "q", "answer": {"value": "a"}}, "`answer` must be a list of strings, found {'value'"),
        ({"_id": "1", "text": ""}, "`text` is empty"),
        ({"question": "q", "answers": []}, "`answers` is empty"),
        ({"question": "q", "answers": "a"}, "`answers` must be a list of strings, found 'a'"),
        ({"question": "q", "answers": ["a", 1999]}, r"`answers` must be a list of strings, found \['a', 1999\]"),
        ({"question": "q", "answers": ["a"], "target": 3}, "`target` must be a string, found 3"),
        ({"question": "q", "answers": ["a"], "target": ""}, "`target` is empty"),
        ({"question": "q", "answers": [""]}, r"`answers` has an empty string in it: \[''\]"),
        ({"question": "q", "answers": ["a", " "], "target": "a"}, r"`answers` has an empty string in it: \['a', ' '\]"),
    ],
)
def test_bad_lines_of_qa(record, reason):
    with pytest.raises(ValueError, match=reason):
        make_task("qa").process(record, random.Random(0))


def test_lines_without_answers_are_enough_to_retrieve():
    task = make_task("qa", answers_needed=False)
    for record in ({"question": "who?"}, {"question": "who?", "answers": []}, {"question": "who?", "answers": None}):
        example = task.process(record, random.Random(0))
        assert (example.target, example.answers, task.retrieval_answers(example)) == ("", [], None)
    assert task.process(LINE, random.Random(0)).answers == LINE["answers"]
    with pytest.raises(ValueError, match="list of strings"):
        task.process({"question": "who?", "answers": "Ada"}, random.Random(0))
    example = make_task("base", answers_needed=False).process({"query": "a query"}, random.Random(0))
    assert (example.target, example.answers) == ("", [])


@pytest.mark.parametrize("name, record", [("base", {"query": "q", "target": "t"}), ("qa", LINE)])
def test_passages_of_the_line(name, record):
    options = {"qa_prompt_format": PROMPT, "mlm_noise_density": 0.15}
    given = [{"id": "1", "text": "x", "score": 3.0}, {"title": "T", "text": ""}]
    free, strict = make_task(name, **options), make_task(name, **options, passages_needed=True)
    assert free.process(record, random.Random(0)).passages is None
    assert free.process(record | {"passages": given}, random.Random(0)).passages == given
    assert strict.process(record | {"passages": given}, random.Random(0)).passages == [
        {"id": "1", "title": "", "text": "x", "score": 3.0},
        {"title": "T", "text": ""},
    ]
    for passages, reason in [
        (None, "no `passages`.*--use_file_passages"),
        ([], "no `passages`"),
        ("text", "no `passages`"),
        ([*given, "text"], "passage 3 of `passages` has no `text`"),
        ([{"title": "T"}], "passage 1 of `passages` has no `text`"),
        ([{"title": 5, "text": "x"}], "passage 1 of `passages`: `title` must be a string, found 5"),
    ]:
        with pytest.raises(ValueError, match=reason):
            strict.process(record | {"passages": passages}, random.Random(0))


def test_registry_takes_the_values_of_all_flags():
    assert make_task("qa", qa_prompt_format="{question}?").process(LINE, random.Random(0)).query == "who??"
    assert make_task("qa", qa_prompt_format=PROMPT, answers_needed=False).answers_needed is False
    assert type(make_task("base", qa_prompt_format=PROMPT)) is Task


@pytest.mark.parametrize(("label", "said"), [("SUPPORTS", "true"), ("REFUTES", "false"), ("NOT ENOUGH INFO", "maybe")])
def test_fever_example(label, said):
    task = make_task("fever")
    line = {"id": 3, "claim": "Ada wrote.", "label": label, "evidence": [[[1, 2, "Ada", 0]]], "metadata": {"year": 1}}
    example = task.process(line, random.Random(0))
    assert (example.query, example.target) == ("question: Ada wrote. answer: <extra_id_0>", f"<extra_id_0> {said}")
    assert (example.answers, example.metadata, example.id) == ([said], {"year": 1, "clean_target": said}, 3)
    assert task.score(said, example) == {"accuracy": 1.0} and task.score(said.title(), example) == {"accuracy": 0.0}
    assert task.retrieval_answers(example) is None
    without = {key: value for key, value in line.items() if key != "label"}
    for wrong, reason in (
        (line | {"label": "TRUE"}, "one of SUPPORTS, REFUTES, NOT"),
        (without, "no `label`: expected"),
    ):
        with pytest.raises(ValueError, match=reason):
            task.process(wrong, random.Random(0))
    example = make_task("fever", answers_needed=False).process(
        without, random.Random(0)
    )  # FEVER's test set: enough to retrieve
    assert (example.target, example.answers) == ("", [])


def test_cloze_example():
    line = {"id": "p1", "query": "The river of Bako is <extra_id_0>.", "answers": ["Selnu"]}
    task = make_task("cloze")
    example = task.process(line, random.Random(0))
    assert task.filters_by_id and example.id == "p1"
    assert (example.query, example.target, example.answers) == (line["query"], "<extra_id_0> Selnu", ["Selnu"])
    assert task.score("selnu", example) == {"exact_match": 1.0, "f1": 1.0}
    assert task.retrieval_answers(example) == ["Selnu"]
    with pytest.raises(ValueError, match="has no <extra_id_0> in place of the answer: 'The river of Bako"):
        task.process(line | {"query": "The river of Bako is"}, random.Random(0))


def test_kilt_example():
    task = make_task("kilt")
    output = [{"answer": "Ada", "provenance": [{"wikipedia_id": "1"}]}, {"provenance": []}, {"answer": "Ada Lovelace"}]
    line = {"id": "k1", "input": "who?", "output": output, "meta": {}, "filename": "nq-dev-kilt.jsonl"}
    found = [task.process(line, example_rng(0, 0, n)) for n in range(50)]
    assert {example.target for example in found} == {"<extra_id_0> Ada", "<extra_id_0> Ada Lovelace"}
    for example in found:
        assert (example.query, example.id) == ("question: who? answer: <extra_id_0>", "k1")
        assert example.answers == ["Ada", "Ada Lovelace"] == task.retrieval_answers(example)
        assert f"<extra_id_0> {example.metadata['clean_target']}" == example.target
    scores = task.score("the ada lovelace", found[0])
    assert scores == {"accuracy": 0.0, "exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize(("verdict", "said"), [("SUPPORTS", "true"), ("REFUTES", "false"), ("maybe", "false")])
def test_fever_inside_kilt(verdict, said):
    line = {"input": "Ada wrote.", "output": [{"answer": verdict}]}
    example = make_task("kilt").process(line | {"filename": "fever-dev-kilt.jsonl"}, random.Random(0))
    assert (example.target, example.answers) == (f"<extra_id_0> {said}", [said])
    assert make_task("kilt").retrieval_answers(example) is None  # no passage is the better for holding "true"
    example = make_task("kilt").process(line | {"filename": "nq-dev-kilt.jsonl"}, random.Random(0))
    assert example.answers == [verdict] == make_task("kilt").retrieval_answers(example)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": None}, "no `input`: expected `input`.*`output`.*found input, output"),
        ({"output": None}, "no `output`: expected `input`"),
        ({"output": "Ada"}, "`output` must be a list of objects, found 'Ada'"),
        ({"output": ["Ada"]}, "`output` must be a list of objects"),
        ({"output": [{"answer": 3}]}, r"`answer` in `output` must be a string, found \[3\]"),
        ({"output": [{"provenance": []}]}, "no `answer` in `output`: expected `input`"),
        ({"filename": 3}, "`filename` must be a string, found 3"),
        ({"output": [{"answer": "Ada"}, {"answer": ""}]}, r"`output` has an empty string in it: \['Ada', ''\]"),
    ],
)
def test_bad_lines_of_kilt(change, reason):
    line = {"input": "who?", "output": [{"answer": "Ada"}]} | change
    with pytest.raises(ValueError, match=reason):
        make_task("kilt").process(line, random.Random(0))
    if "no `" in reason and "input" not in change:
        assert make_task("kilt", answers_needed=False).process(line, random.Random(0)).answers == []
