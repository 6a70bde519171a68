"""Texts that are absent, too long, or fill the reader's input: what the models read, and what is said."""

import random
import tracemalloc

import pytest
import torch

from atlas.command_line import parse_config
from atlas.config import Model
from atlas.model import inputs as inputs_module
from atlas.model import tokenization
from atlas.model.inputs import Inputs, count_filling
from atlas.model.tokenization import LONGEST_TEXT, fill_in, load_reader_tokenizer, load_retriever_tokenizer
from atlas.tasks import data as data_module
from atlas.tasks.data import Data
from tests.kit import command_line, lettered_models, make_task, read_jsonl, run, world, write_jsonl
from tests.ranks import run_on_ranks

PASSAGE = {"id": "p1", "title": "Bako", "section": "River", "text": "The river of Bako is Selnu."}


@pytest.fixture(scope="module")
def tokenizer():
    return load_reader_tokenizer(str(world() / "models/reader"))


@pytest.fixture
def make(tokenizer):
    retriever_tokenizer = load_retriever_tokenizer(str(world() / "models/retriever"))

    def make(**settings):
        settings = Model(**{"text_maxlength": 64} | settings)
        return Inputs(settings, tokenizer, retriever_tokenizer, device=torch.device("cpu"))

    return make


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("template", ["{title} {text}", "{{{title}}} {text!r:>40}{section:.2}", "", "{text}" * 9])
@pytest.mark.parametrize("most", [0, 1, 7, 44, 60, 1000])
def test_a_format_is_filled_in_as_python_does(template, most):
    fields = {"title": "a title", "text": "it's\na text", "section": 3}
    expected = template.format(**fields | {"section": "3"})
    assert fill_in(template, most, **fields) == expected[:most]
    assert (
        fill_in(template, most, **fields | {"title": None})
        == template.format(**fields | {"title": "", "section": "3"})[:most]
    )


def test_a_format_that_repeats_a_long_text_takes_little_memory():
    text = "x" * 1_000_000
    tracemalloc.start()
    filled = fill_in("{text} {title} " * 2000, 1_000_000, text=text, title=text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert filled == text and peak < 8_000_000  # the whole would have 4 GB


@pytest.mark.parametrize("field", ["title", "section", "id", "text"])
def test_a_null_field_of_a_passage_is_empty(make, field):
    formats = {
        "encoder_format": "{query}: {title}, {section}, {id}, {text}",
        "retriever_format": "{title} {section} {id} {text}",
    }
    made = make(**formats)
    for null in (PASSAGE | {field: None}, {key: value for key, value in PASSAGE.items() if key != field}):
        empty = PASSAGE | {field: ""}
        assert made.passage_tokens([null]) == made.passage_tokens([empty]) != made.passage_tokens([PASSAGE])
        assert torch.equal(made.reader(["q"], [[null]]).ids, made.reader(["q"], [[empty]]).ids)


def test_texts_that_are_tokenized_in_parts(tokenizer, monkeypatch):
    texts = [row["text"] for row in read_jsonl(world() / "passages.jsonl")[:20]] + ["", "x"]
    whole = tokenizer.encode(texts, 20)
    monkeypatch.setattr(tokenization, "LONGEST_PASSAGE", 100)
    parts = list(tokenization._parts(texts))
    assert [text for part in parts for text in part] == texts and len(parts) > 5
    assert all(len(part) == 1 or sum(map(len, part)) <= 100 for part in parts)
    assert tokenizer.encode(texts, 20) == whole and tokenizer.encode([]) == []


def test_what_is_too_long_is_cut_and_said_once(make, monkeypatch, warnings):
    monkeypatch.setattr(inputs_module, "LONGEST_PASSAGE", 40)
    monkeypatch.setattr(inputs_module, "LONGEST_FORMATTED", 20)
    made = make(
        retriever_format="{text}", encoder_format="{text}", decoder_format="{target}", decoder_prompt_format="{query}"
    )
    text = "the river and the bird of the founder and the trade of the month"
    longer, passages = text + " are more", [PASSAGE | {"text": text}]
    assert len(made.passage_tokens(passages)[0]) < len(made.retriever_tokenizer.encode([text])[0])
    assert made.passage_tokens(passages) == made.retriever_tokenizer.encode([text[:40]])
    assert made.reader([""], [passages])[0].tolist() == [[made.reader_tokenizer.encode([text[:40]])[0]]]
    assert made.queries([text])[0].tolist() == made.retriever_tokenizer.encode([text[:20]])
    assert made.reader([text], None)[0].tolist() == [made.reader_tokenizer.encode([text[:20]])]
    assert made.prompts([longer]) == made.reader_tokenizer.encode([text[:20]], eos=False)
    labels = made.targets([""], [text]).labels[0]
    assert labels[labels != -100].tolist() == made.reader_tokenizer.encode([text[:20]])[0]
    (said,) = warnings()
    assert said == f"A text of more than 40 characters is cut there before it is tokenized: {text[:41]!r}…"


HUGE = "word " * LONGEST_TEXT
LINES = {
    "base": [{"query": HUGE, "target": "t"}, {"query": "q", "target": HUGE}],
    "qa": [{"question": HUGE, "answers": ["a"]}, {"question": "q", "answers": [HUGE], "target": HUGE}],
    "cloze": [{"query": "<extra_id_0> " + HUGE, "answers": ["a"]}, {"query": "<extra_id_0>", "answers": [HUGE]}],
    "fever": [{"claim": HUGE, "label": "SUPPORTS"}],
    "kilt": [{"input": HUGE, "output": [{"answer": "a"}]}, {"input": "q", "output": [{"answer": HUGE}]}],
    "multiple_choice": [
        {"question": HUGE + "or so?", "options": {"A": "a", "B": "b"}, "answer": "A"},
        {"question": "q", "options": {"A": HUGE, "B": "b"}, "answer": "A"},
    ],
    "mlm": [{"id": 1, "text": HUGE}],
    "lm": [{"id": 1, "text": HUGE}],
    "section": [
        {"id": 1, "title": HUGE, "section": "s", "text": "t"},
        {"id": 1, "title": "", "section": "s", "text": HUGE},
    ],
}


@pytest.mark.parametrize(("task", "line"), [(task, line) for task, lines in LINES.items() for line in lines])
def test_no_task_makes_long_texts(task, line):
    made = make_task(task, tokenizer=load_reader_tokenizer(str(lettered_models() / "reader")), text_maxlength=64)
    assert made.check(line) and made.cuts[f"a text of more than {LONGEST_TEXT} characters"] > 0
    example = made.process(line, random.Random(0))
    for text in (example.query, example.target, *example.answers):
        assert len(text) < LONGEST_TEXT + 200
    if task == "multiple_choice" and len(line["question"]) > 1:
        assert " or so? options: " in example.query  # cut from the left, as always


def test_a_prompt_format_that_repeats_the_question():
    made = make_task("qa", qa_prompt_format="{question}" * 9)
    example = made.process({"question": "x" * (LONGEST_TEXT // 2), "answers": ["a"]}, random.Random(0))
    assert example.query == "x" * LONGEST_TEXT and made.cuts.total() == 1


@pytest.mark.parametrize("encoder_format", [Model.encoder_format, "{query}{text}", "{title} {query} {text}", "{query}"])
@pytest.mark.parametrize("text_maxlength", [1, 2, 12, 40])
def test_which_questions_leave_no_room(tokenizer, encoder_format, text_maxlength):
    """Against the reader's ids: with two passages that differ from the first character they are the same."""
    settings = Model(text_maxlength=text_maxlength, encoder_format=encoder_format)
    words = "the river and the bird of Bako and the trade of the month é中 <extra_id_0> of a founder"
    for n in range(0, len(words) + 1, 3):
        query = words[:n].rstrip()
        rows = [
            tokenizer.encode([encoder_format.format(query=query, title=title, text=title)], text_maxlength)
            for title in ("river " * 9, "bird " * 9)
        ]
        passage_needed = encoder_format != "{query}"
        assert count_filling([query], settings, tokenizer) == (passage_needed and rows[0] == rows[1])
    assert count_filling([], settings, tokenizer) == 0


def test_short_questions_need_no_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, texts, **options: list(texts) and pytest.fail("tokenized")
    )
    assert count_filling(["what is the river of Bako?"] * 9, Model(text_maxlength=64), tokenizer) == 0


def opened(arguments):
    config = parse_config(arguments)
    tokenizer = load_reader_tokenizer(config.model.reader_model_type)
    return len(Data.open(config.run.train_data, config, tokenizer, training=True))


def long_questions(path):
    lines = read_jsonl(world() / "train.jsonl")[:10]
    lines[3]["question"] += " of the river" * 40
    lines[8]["question"] += " of the river" * 40
    lines[9]["question"] = HUGE
    return write_jsonl(path, lines)


def test_long_questions_are_counted(tmp_path, warnings, monkeypatch):
    path = long_questions(tmp_path / "long.jsonl")
    long = f"{path}: 1 of 10 lines have a text of more than 100000 characters, which is cut"
    filling = "{}: {} of {} questions{} fill --text_maxlength 64: their passages are not read; raise it"
    line = command_line(tmp_path, train_data=path, eval_data=None)
    assert opened(line) == 10
    assert warnings() == [long, filling.format(path, 3, 10, "")]
    monkeypatch.setattr(data_module, "MOST_LOOKED_AT", 3)
    opened(line)
    assert warnings()[2:] == [long, filling.format(path, 1, 3, " (one in 4 was looked at)")]
    opened(command_line(tmp_path, train_data=path, eval_data=None, closed_book=True))
    assert warnings()[4:] == [long]


@pytest.mark.processes
def test_ranks_count_together(tmp_path):
    path = long_questions(tmp_path / "long.jsonl")
    directory = run(tmp_path, "evaluate", train_data=None, eval_data=path)
    line = command_line(tmp_path, train_data=path, eval_data=None)
    assert run_on_ranks(3, opened, line) == [10, 10, 10]
    log = (directory / "run.log").read_text()
    assert log.count("3 of 10 questions fill --text_maxlength 64") == log.count("fill --text_maxlength") == 1
