"""A model that is asked in Python and in a terminal: the numbers of evaluate.py, pieces, lists, mistakes."""

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import atlas
import export_huggingface
from atlas.asking.answers import Answer, Passage, marks, printable
from atlas.asking.command import parse
from atlas.asking.model import Cancelled
from atlas.asking.settings import config_for, find_saved
from atlas.asking.terminal import prompt
from atlas.evaluation.results import six_digits
from atlas.model.inputs import Targets
from atlas.model.signals import MODES, Mode, Reading, judgements
from tests.kit import read_jsonl, run, world, write_jsonl
from tests.patience import HANG_SECONDS
from tests.test_checkpoint import published

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {"train_retriever": True, "query_side_retriever_training": True, "total_steps": 2, "per_gpu_batch_size": 3}


def let_go_of_the_log():
    """A run takes it for itself."""
    log = logging.getLogger("atlas")
    log.propagate = True
    log.handlers.clear()


def snapshot(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run without evaluations, and its result file by evaluate.py."""
    home = tmp_path_factory.mktemp("asked")
    run(home, eval_data=None, save_index_path=home / "index", **TRAINING)
    model = {"reader_model_type": None, "retriever_model_path": None, "n_context": None, "passages": None}
    model |= {"text_maxlength": None, "target_maxlength": None, "generation_max_length": None}
    found = {"model_path": home / "run", "load_index_path": home / "index"}
    found["write_evidence"] = True
    run(home, "evaluate", name="measured", query_side_retriever_training=True, **model, **found)
    return home


@pytest.fixture(scope="module")
def model(trained):
    let_go_of_the_log()
    before = snapshot(trained)
    model = atlas.load(trained / "run")
    assert snapshot(trained) == before  # nothing is written
    return model


@pytest.fixture(scope="module")
def questions():
    return [row["question"] for row in read_jsonl(world() / "dev.jsonl")]


@pytest.mark.processes
def test_answers_are_those_of_evaluate(trained, model, questions):
    """Bit for bit: passages, their scores, what was generated, and the reader's judgements."""
    rows = read_jsonl(trained / "measured/dev-step-0.jsonl")
    answers = model.ask(questions)
    assert len(rows) == len(answers) == 11 and model.k == model.batch_size == 4
    assert [answer.query for answer in answers] == [row["query"] for row in rows]
    assert [answer.text for answer in answers] == [row["generation"] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        for expected, passage in zip(row["passages"], answer.passages, strict=True):
            numbers = {"score": six_digits(passage.score), "judgement": six_digits(passage.judgement)}
            assert dict(passage.fields) | numbers == expected
    found = model.search(questions)
    assert [[p.id for p in of_one] for of_one in found] == [[p.id for p in answer.passages] for answer in answers]
    lines = model.ask(read_jsonl(world() / "dev.jsonl"))  # lines of data are asked as they are
    assert [line.to_dict() | {"seconds": {}} for line in lines] == [a.to_dict() | {"seconds": {}} for a in answers]


@pytest.mark.processes
def test_the_lines_of_the_readme(trained, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import atlas\n.*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code.replace("demo/experiments/after", str(trained / "run")), {})
    assert "judgement" in capsys.readouterr().out


@pytest.mark.processes
def test_one_question(model, questions):
    answer = model.ask(questions[0], k=7)
    assert answer.question == questions[0] and len(answer.passages) == 7 and 0 < answer.score < 1
    assert list(answer.seconds) == ["embed", "search", "read", "judge"]
    for name in ("judgement", "attention"):
        values = [getattr(passage, name) for passage in answer.passages]
        assert min(values) >= 0 and sum(values) == pytest.approx(1, abs=1e-5)
    plain = model.ask(questions[0], k=7, judge=False)
    assert (plain.text, plain.score, plain.passages[0].judgement) == (answer.text, None, None)
    assert [p.score for p in plain.passages] == [p.score for p in answer.passages]
    assert len(model.ask(questions[0], k=10**6).passages) == model.passages == 300
    printed = str(answer).splitlines()
    assert printed[0].startswith(answer.text) and "judgement" in printed[1] and answer.passages[0].id in printed[1]
    assert len(model.examples(3)) == 3 and model.examples(3)[0] == read_jsonl(world() / "train.jsonl")[0]["question"]


@pytest.mark.processes
def test_the_pieces_of_a_stream_are_the_answer(model, questions):
    for question in questions[:3]:
        stream = model.ask(question, stream=True)
        assert "".join(stream) == stream.answer.text == model.ask(question).text
        assert list(stream) == []
    with pytest.raises(ValueError, match="single question"):
        model.ask(questions, stream=True)


@pytest.mark.processes
def test_an_error_in_the_thread_reaches_whoever_reads_the_stream(model, questions, monkeypatch):
    monkeypatch.setattr(model._answering, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.ask(questions[0], stream=True))


@pytest.mark.processes
def test_the_judgement_is_the_target_of_the_distillation(model, questions):
    """The obvious way: how likely each passage alone makes the answer, as the reader would have been taught by it."""
    answer = model.ask(questions[0], k=3)
    reader, inputs = model.model.reader, model.model.inputs
    tokens, likelihoods = reader_tokens(model, answer), []
    for passage in answer.passages:
        ids, mask, _ = inputs.reader([answer.query], [[passage.fields]])
        with torch.no_grad():
            hidden = reader.encode(ids, mask)
            logits = reader.logits(hidden, mask.flatten(1), torch.tensor([[0, *tokens[:-1]]]))
        likelihoods.append(logits.log_softmax(-1)[0, torch.arange(len(tokens)), tokens].mean())
    temperature = model.config.retriever_training.temperature_gold
    expected = (torch.stack(likelihoods) / temperature).softmax(0)
    assert temperature == 0.1
    assert_close(torch.tensor([p.judgement for p in answer.passages]), expected, atol=1e-4, rtol=1e-3)


def reader_tokens(model, answer):
    """The tokens of an answer as they were generated, with `</s>` if it ended."""
    ids, mask, _ = model.model.inputs.reader([answer.query], [[p.fields for p in answer.passages]])
    reader, longest = model.model.reader, model.config.model.generation_max_length
    with torch.no_grad():
        (tokens,) = reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=longest)
    return tokens + [1] * (1 + len(tokens) < longest)


@pytest.mark.parametrize("per_token", [False, True])
def test_judgements_by_hand(per_token):
    """Two passages and a place without one; likelihoods of single tokens are averaged and have their temperature."""
    mask = torch.tensor([[[True], [True], [False]], [[False], [False], [False]]])
    labels = torch.tensor([[5, 1, -100], [5, 1, -100]])
    gold = torch.tensor([[-1.0, -1.2, 9.0], [1.0, 1.0, 1.0]])
    values = torch.stack([gold, gold, torch.zeros(2, 3)], dim=-1) / 0.5 if per_token else gold
    reading = Reading(None, torch.zeros(2, 3, 1, 1), mask, Targets(labels, labels), temperature_gold=0.5)
    found = judgements(Mode(lambda _: values, None), reading)
    assert_close(found, torch.tensor([[0.598688, 0.401312, 0.0], [0.0, 0.0, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.processes
def test_every_gold_score_mode_judges(model, questions, monkeypatch):
    for mode in MODES:
        learning = replace(model.config.retriever_training, gold_score_mode=mode)
        monkeypatch.setattr(model, "config", replace(model.config, retriever_training=learning))
        judged = [passage.judgement for passage in model.ask(questions[0]).passages]
        assert sum(judged) == pytest.approx(1, abs=1e-5), mode


@pytest.mark.processes
def test_embeddings_are_those_that_are_searched_with(model, questions):
    vectors = model.embed(questions)
    best = model.search(questions[0], k=3)
    assert vectors.shape == (11, 64) and model.embed([]).shape == (0, 64)
    assert_close(model.embed(questions[0]), vectors[0], atol=1e-5, rtol=1e-5)
    products = model.embed_passages([passage.fields for passage in best]) @ vectors[0]
    assert_close(products, torch.tensor([passage.score for passage in best]), atol=2e-3, rtol=2e-3)  # the index is fp16


@pytest.mark.processes
def test_exported_models_answer_the_same(trained, model, questions, tmp_path):
    flags = ["--model_path", str(trained / "run"), "--output_directory", str(tmp_path / "export")]
    export_huggingface.main(flags)
    exported = atlas.load(tmp_path / "export", index=trained / "index", per_gpu_batch_size=3)
    assert exported.k == model.k and exported.name == "export"
    assert [a.text for a in exported.ask(questions)] == [a.text for a in model.ask(questions)]
    assert str(world()) not in (tmp_path / "export/options.json").read_text()


@pytest.mark.processes
def test_a_published_checkpoint_needs_an_index_and_may_need_names(trained, model, questions, tmp_path):
    weights = load_file(trained / "run/checkpoint/latest/model.safetensors")
    flags = {name: model.config.flags()[name] for name in ("n_context", "text_maxlength", "generation_max_length")}
    options = argparse.Namespace(name="x", retriever_model_path="/there/is/none", **flags)
    checkpoint = published(tmp_path / "published", weights, opt=options)
    names = {"reader_model_type": world() / "models/reader", "retriever_model_path": world() / "models/retriever"}
    names |= {"retriever_pooling": "average", "per_gpu_batch_size": 3}
    loaded = atlas.load(checkpoint, trained / "index", allow_other_index=True, **names)
    assert loaded.k == 4 and loaded.task.question_field({}) == "question"
    assert len(loaded.ask(questions[0]).passages) == 4
    with pytest.raises(ValueError, match="does not say what to search in"):
        atlas.load(checkpoint, **names)
    with pytest.raises(ValueError, match="--reader_model_type is missing"):
        atlas.load(checkpoint, trained / "index")


@pytest.mark.processes
def test_without_a_saved_index_the_corpus_is_embedded(trained, model, questions, caplog):
    """Also where the index is of an encoder that has learned since, unless that index was asked for."""
    built = atlas.load(trained / "run", passages=[world() / "passages.jsonl"])
    assert "Embedding 300 passages" in caplog.text and "would keep it" in caplog.text
    assert [p.id for p in built.search(questions[0])] == [p.id for p in model.search(questions[0])]
    reader = atlas.load(trained / "run", closed_book=True)
    assert reader.ask(questions[0]).passages == [] and reader.passages == 0
    with pytest.raises(ValueError, match="without a search"):
        reader.search(questions[0])
    searcher = atlas.load(trained / "run", retrieve_only=True)
    assert [p.id for p in searcher.search(questions[0])] == [p.id for p in model.search(questions[0])]
    with pytest.raises(ValueError, match="no reader"):
        searcher.ask(questions[0])


@pytest.mark.processes
def test_an_index_of_an_earlier_encoder_is_embedded_again(trained, questions, tmp_path, caplog):
    retriever = {"retriever_model_path": world() / "models/retriever", "query_side_retriever_training": False}
    run(tmp_path, eval_data=None, save_index_path=tmp_path / "index", **TRAINING | retriever | {"lr_retriever": 0.1})
    let_go_of_the_log()
    model = atlas.load(tmp_path / "run")
    assert "by an earlier passage encoder of the run: its passages are embedded again" in caplog.text
    best = model.search(questions[0], k=3)
    products = model.embed_passages([passage.fields for passage in best]) @ model.embed(questions[0])
    assert_close(products, torch.tensor([passage.score for passage in best]), atol=2e-2, rtol=2e-3)
    with pytest.raises(ValueError, match="was made by the passage encoder"):
        atlas.load(tmp_path / "run", index=tmp_path / "index")


def saved_run(directory, **options):
    """What `find_saved` looks at, of a run that was started in `directory` as `runs/mine`."""
    checkpoint = directory / "runs/mine/checkpoint/step-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    flags = {"checkpoint_dir": "./runs", "name": "mine", "reader_model_type": "t5", "n_context": 7} | options
    (checkpoint / "options.json").write_text(json.dumps({"all": flags}))
    (checkpoint.parent / "latest").symlink_to("step-2")
    return directory / "runs/mine"


def test_the_flags_of_a_run_reach_its_files_from_anywhere(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index/index.json").touch()
    write_jsonl(tmp_path / "dev.jsonl", [{"question": "q"}])
    saved = find_saved(saved_run(tmp_path, load_index_path="index", eval_data=["dev.jsonl"], train_data=["gone.jsonl"]))
    config = config_for(saved, None, {})
    assert config.index.load_index_path == str(tmp_path / "index") and saved.example_files == [tmp_path / "dev.jsonl"]
    assert (config.model.n_context, config.tasks.task, config.model.reader_model_type) == (7, "qa", "t5")
    assert config.run.train_data == () and not config.retriever_training.train_retriever
    closed = find_saved(saved_run(tmp_path / "closed", closed_book=True))
    other = config_for(closed, tmp_path, {"n_context": 3})
    assert other.index.load_index_path == str(tmp_path) and other.model.n_context == 3 and other.model.retrieves


def test_what_is_searched_and_not_is_refused(tmp_path):
    saved = find_saved(saved_run(tmp_path))
    with pytest.raises(ValueError, match=r"--closed_book does without an index \(--index\): give one of both"):
        config_for(saved, tmp_path, {"closed_book": True})
    with pytest.raises(ValueError, match=r"--use_file_passages does without a corpus \(--passages\): give one of both"):
        config_for(saved, None, {"use_file_passages": True, "passages": ["p.jsonl"]})


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({}, {}, "does not say what to search in: give an index (--index) or a corpus (--passages)"),
        ({"load_index_path": "gone"}, {}, "--load_index_path: there is no directory gone"),
        ({"closed_book": True}, {"n_contexts": 3}, "there is no flag --n_contexts"),
        ({"closed_book": True}, {"n_context": 0}, "--n_context 0 is too small: it must be at least 1"),
        ({"closed_book": True}, {"n_context": "3"}, "what is given: --n_context is '3' there, and must be an integer"),
        ({"closed_book": True, "n_context": -1}, {}, "--n_context comes from the checkpoint"),
        ({"load_index_path": 3, "passages": 4, "eval_data": 5}, {}, "--load_index_path is 3 there"),
    ],
)
def test_wrong_flags(tmp_path, options, flags, message):
    saved = find_saved(saved_run(tmp_path, **options))
    with pytest.raises(ValueError) as caught:
        config_for(saved, None, flags)
    assert message in " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="holds no model: give a run"):
        atlas.load(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        atlas.load(tmp_path / "gone")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("question", "k", "message"),
    [
        (" ", None, "`question` is empty"),
        ({"query": "q"}, None, "no `question`"),
        (3, None, "a question is a text"),
        ([None], None, "a question is a text"),
        ("q", 0, "k is 0"),
        ("q", True, "k is True"),
    ],
)
def test_bad_questions(model, question, k, message):
    with pytest.raises(ValueError, match=message):
        model.ask(question if not isinstance(question, int) else [question], k)


@pytest.mark.parametrize(
    ("text", "answer", "marked"),
    [
        ("He met J.R.R. Tolkien.", "j.r.r tolkien", ["J.R.R. Tolkien"]),
        ("Paris, and Parisians in Paris", "Paris", ["Paris", "Paris"]),
        ("The Seine in Paris", "Paris of the Seine", ["The", "Seine", "Paris"]),
        ("a b c", "d", []),
        ("1 of 2", "2", ["2"]),
        ("x", "?!", []),
        ("(a|b)* costs 5", "(a|b)*", ["a|b"]),
    ],
)
def test_marks(text, answer, marked):
    assert [text[start:end] for start, end in marks(text, answer)] == marked


def test_a_terminal_gets_texts_and_no_commands():
    evil = "\x1b]0;title\x07"
    shown = str(Answer(evil, evil, evil, 0.5, [Passage({"id": evil, "title": evil, "text": evil * 2}, 1.0)], {}))
    assert not set(shown) & set("\x1b\x07") and shown.count("]0;title") == 5
    written = "می\u200cخواهم 10\u00a0000\u3000km\r\nso\u00adft\u2028\u202e"
    assert printable(written) == "می\u200cخواهم 10 000 km \nso\u00adft \N{REPLACEMENT CHARACTER}"


def test_numbers_without_a_value_are_null_in_json():
    nan = float("nan")
    found = Answer(
        "q", "q", "a", nan, [Passage({"id": 1, "title": "", "text": "a"}, 1.0, nan, float("inf"))], {}
    ).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["score"] is None
    assert (found["passages"][0]["judgement"], found["passages"][0]["attention"]) == (None, None)


def test_notebooks_get_texts_and_no_html():
    evil = "<script>alert('&')</script>"
    passage = Passage({"id": evil, "title": evil, "text": f"{evil} {evil}"}, 1.0, 0.5, None)
    shown = Answer(evil, evil, evil, 0.5, [passage], {})._repr_html_()
    assert "<script" not in shown and "alert(&#x27;&amp;&#x27;)" in shown and "<mark>script" in shown
    assert "50%" in shown and "0.50" in shown


@pytest.mark.processes
def test_an_answer_that_nobody_waits_for_is_given_up(model, questions, monkeypatch):
    go, write = threading.Event(), model._answering.write

    def late(*arguments):
        assert go.wait(HANG_SECONDS)
        return write(*arguments)

    monkeypatch.setattr(model._answering, "write", late)
    stream = model.ask(questions[0], stream=True)
    stream.cancel()
    go.set()
    with pytest.raises(Cancelled):
        list(stream)


@pytest.fixture
def type_lines(monkeypatch, tmp_path):
    """Type into the prompt at a terminal; what is raised in place of a line is what a key does."""
    import readline

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    readline.clear_history()

    def typed(model, lines, **settings):
        waiting = iter([*lines, EOFError])

        def type_line(prompt):
            line = next(waiting)
            if not isinstance(line, str):
                raise line
            if line:
                readline.add_history(line)
            return line

        monkeypatch.setattr("builtins.input", type_line)
        prompt(model, **settings)
        return tmp_path / "state/atlas/questions"

    return typed


@pytest.mark.processes
def test_the_prompt(model, questions, type_lines, capsys):
    """Ctrl-C takes back a line, Ctrl-D ends; what was typed is there again the next time."""
    lines = ["/passages", "/k 3", "/help", KeyboardInterrupt, questions[0], "/passages", "/nothing", "", "/k x", "/k 0"]
    history = type_lines(model, lines)
    answer, said = model.ask(questions[0], k=3), capsys.readouterr().out
    assert f"{answer.text}   ({answer.score:.2f})" in said and said.count("judgement") == 3
    assert "nothing was asked yet" in said and "/k N" in said and "there is no /nothing" in said
    assert said.count("/k is followed by a number of passages, at least 1; it is 3") == 2
    typed = [line for line in lines if isinstance(line, str) and line]
    assert history.read_text().splitlines()[-len(typed) :] == typed and history.stat().st_mode & 0o077 == 0
    type_lines(model, [questions[1]])
    assert history.read_text().splitlines()[-1] == questions[1]
    history.unlink()
    history.mkdir()
    type_lines(model, ["/k 2"])
    assert "What is typed is not kept" in capsys.readouterr().err


@pytest.mark.processes
def test_a_question_without_memory_leaves_the_prompt(model, questions, type_lines, capsys, monkeypatch):
    def encode(self, *arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr("atlas.evaluation.answering.Answering.encode", encode)
        type_lines(model, [questions[0]])
    type_lines(model, [questions[0]])
    said = capsys.readouterr().out
    assert (
        "the memory is not enough: lower" in said
        and "allocate 9 bytes" in said
        and model.ask(questions[0]).text in said
    )


@pytest.mark.processes
def test_the_prompt_answers_programs_with_json(model, questions, type_lines, capsys):
    type_lines(model, [questions[0], " ", "/help", questions[1]], as_json=True)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["question"] for answer in answers] == questions[:2]
    assert answers[0]["answer"] == model.ask(questions[0]).text


@pytest.mark.processes
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_spoils_itself_alone(trained, tmp_path, errors):
    questions = [row["question"].encode() for row in read_jsonl(world() / "dev.jsonl")[:2]]
    words = [sys.executable, ROOT / "ask.py", trained / "run", "--json", "--device", "cpu"]
    ended = subprocess.run(
        list(map(str, words)),
        input=b"\n".join([questions[0], b"caf\xe9?", questions[1]]),
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": f"utf-8:{errors}"},
    )
    assert [json.loads(line)["question"].encode() for line in ended.stdout.splitlines()] == questions, ended.stderr
    assert b"the question is not text in UTF-8" in ended.stderr and b"Traceback" not in ended.stderr


@pytest.mark.processes
def test_the_command(trained, tmp_path):
    """One question as JSON, with nothing in the run's directory, nor in the one that it is started in."""
    question = read_jsonl(world() / "dev.jsonl")[0]["question"]
    before = snapshot(trained)
    words = [sys.executable, ROOT / "ask.py", trained / "run", question, "--json", "--k", "2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    settings = {"capture_output": True, "text": True, "timeout": HANG_SECONDS, "cwd": tmp_path}
    done = subprocess.run([*map(str, words)], env=environment, **settings)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["question"] == question and len(answer["passages"]) == 2 and answer["answer"]
    assert snapshot(trained) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "argument --k: 0 is too small: it must be at least 1"),
        (["--k", "x"], "argument --k: invalid number value: 'x'"),
        (["--host", "::1"], "--host has no effect without --serve"),
        (["--port", "80"], "--port has no effect without --serve"),
        (["--serve", "--port", "65536"], "--port 65536 is too large"),
        (["--serve", "--json"], "--json has no effect with --serve"),
        (["what?", "--serve"], "QUESTION has no effect with --serve"),
        (["--index", "i", "--passages", "p"], "--index has no effect with --passages"),
        (["--k", "3", "--closed_book"], "--k has no effect on a run that is closed-book"),
        (["--index", "gone"], "there is no index gone: give the directory of one that was saved"),
        (["--text_maxlength", "1"], "--text_maxlength 1 is too small"),
        (["what", "is"], "unrecognized arguments: is"),
    ],
)
def test_wrong_words(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        parse([str(saved_run(tmp_path, closed_book=True)), *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_words_become_flags(tmp_path):
    run = saved_run(tmp_path, passages=[str(world() / "passages.jsonl")])
    options, flags = parse([str(run), "--k", "9", "--device", "cpu", "--serve"])
    assert flags == {"n_context": 9, "device": "cpu"} and (options.host, options.port) == ("127.0.0.1", 8000)
