"""The page about real text without its models: commands that parse, what becomes of their results, and its bar."""

import json
import random
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.command_line import parse_config
from atlas.model import signals
from atlas.model.prompts import PromptInputs
from benchmarks import from_labels, judge, real_bench, real_text
from benchmarks.real_bench import Asked, Bench, Kept, Row
from tests.indices import save, write_corpus
from tests.kit import language_model, logged, read_jsonl, run, world
from tests.test_causal import read_with

TOWNS = [f"Town_{i}" for i in range(12)]


@pytest.fixture
def home(tmp_path):
    """A directory in which the texts are."""
    data = tmp_path / "data"
    data.mkdir()
    corpus = [
        {"id": f"{town}-0", "title": town, "text": f"{town} lies near {TOWNS[i - 1]}."} for i, town in enumerate(TOWNS)
    ]
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    for number, split in enumerate(("train", "dev", "test")):
        lines = [
            {
                "id": f"{split}-{i}",
                "question": f"What is near {town} ({split})?",
                "answers": [TOWNS[i - 1], "there"],
                "metadata": {"passage": f"{town}-0", "article": town},
            }
            for i, town in enumerate(TOWNS[4 * number :][:4])
        ] * 30
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


@pytest.fixture
def commands(home, monkeypatch):
    """What would be run, with results that find a question's paragraph by chance, sooner if that was learnt."""
    called = []

    def run_once(log, done, *words, threads):
        words = [str(word) for word in words]
        if log.exists() and log.read_text().startswith(f"$ {words}\n"):
            return 1.0
        called.append(words)
        if words[0] in ("train.py", "evaluate.py") or words[1:2] == ["benchmarks.from_labels"]:
            program = "evaluate" if words[0] == "evaluate.py" else "train"
            given = words[2 if words[0] == "-m" else 1 :]
            models = [i for i, word in enumerate(given) if word == "--model_path"]
            assert all((Path(given[i + 1]) / "trained").exists() for i in models)
            given = [word for i, word in enumerate(given) if not {i, i - 1} & set(models)]
            parsed = parse_config(given, program=program)
            assert done.is_relative_to(Path(parsed.run.checkpoint_dir) / parsed.run.name)
            if parsed.index.save_index_path:
                save_index(parsed.index.save_index_path)
            if program == "evaluate":
                write_results(parsed, done, knows=bool(models))
            else:
                done.parents[1].mkdir(parents=True)  # no name stands for two commands
                (done.parents[1] / "trained").touch()
                write_losses(done.parents[1] / "metrics.jsonl")
        elif words[1:2] == ["benchmarks.judge"]:
            write_judgements(Path(words[2]), done)
        log.parent.mkdir(exist_ok=True)
        log.write_text(f"$ {words}\n\nseconds: 3600.0")
        return 1.0

    monkeypatch.setattr(real_bench, "run_once", run_once)
    return called


def save_index(path):
    Path(path).parent.mkdir(exist_ok=True)
    corpus = Path(path).with_suffix(".jsonl")  # of its own: two may be saved at a time
    save(Path(path), write_corpus(corpus, 3), torch.zeros(3, 8))


def write_losses(path):
    """Half as large in the second pass over the examples."""
    lines = [{"kind": "start"}, *({"kind": "train", "loss/retriever_loss": loss} for loss in (0.5, 0.3, 0.2, 0.2))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_judgements(results, done):
    """The question is most likely behind its own paragraph, the answer behind all alike."""
    lines = read_jsonl(results)
    own = {line["id"]: line["metadata"]["passage"] for line in lines}
    pairs = [(line["id"], passage["id"]) for line in lines for passage in line["passages"][:8]]
    judged = [
        {"id": key, "passage": passage, "question": -1.0 - (own[key] != passage), "answer": -2.0}
        for key, passage in pairs
    ]
    assert done == results.with_suffix(".judged")
    done.write_text("".join(json.dumps(pair) + "\n" for pair in judged))


def write_results(parsed, done, knows):
    (asked,) = parsed.run.eval_data
    rng, rows = random.Random(0), []
    for line in read_jsonl(Path(asked)):
        found = [{"id": f"{town}-0", "text": town} for town in TOWNS]
        rng.shuffle(found)
        if knows:
            found.sort(key=lambda passage: passage["id"] != line["metadata"]["passage"])
        said = {} if parsed.model.retrieve_only else {"generation": rng.choice(line["answers"])}
        rows.append(line | {"query": line["question"], "passages": found} | said)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_headline(home, commands):
    text = real_text.headline(Bench(home, Asked(500, 500, 100)), jobs=2)
    assert "BM25 alone: recall@1, 5 and 20 of " in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| BM25", "| MiniLM", "| both"))]
    start, trained, bm25, *reranked = rows
    assert float(bm25[1]) < 30 and reranked[1] == ["| both, from the question alone", "100.0", "100.0", "< 0.0001 |"]
    assert reranked[0][0] == "| MiniLM as it is" and len(reranked) == 2  # of what is asked for, and no row more
    assert float(start[2]) < 30 and trained[2:5] == ["100.0"] * 3 and trained[-1] == "< 0.0001 |"
    assert "| book closed, 64 examples | " in text and "| the first passage, 64 examples | " in text
    assert sum(words[0] == "train.py" for words in commands) == 4  # the retriever, and the reader in three ways


def test_the_page(home, commands):
    results = home / "results.json"

    def page(jobs=2, seeds=3, **kept):
        return real_text.page(Bench(home, Asked(1000, 500, 300), kept=Kept(results, **kept)), jobs, seeds)

    text = page()
    for group in real_text.GROUPS:
        assert f"## {group.title}" in text
        assert all(f"\n| {row.name} | " in text for row in group.rows)
    aims = text.split("## What was aimed at")[1].split("\n\n")[1].splitlines()[2:]
    assert len(aims) == 12 and all(line.split(" | ")[2].startswith(("reached", "missed")) for line in aims)
    assert "| +0.0 (250 questions, p 1: not shown) | reached |" in "\n".join(aims)  # labels: both find everything
    assert "| likelihood of the question behind the passage | 100.0 |\n| both, 1 to 3 | 100.0 |" in text
    (found, answer) = (
        line.split(" | ")[1] for line in text.splitlines() if line.startswith(("| BM25 and", "| likelihood of the a"))
    )
    assert found == answer and float(found.rstrip(" |")) < 40  # it knows no better
    words = " ".join(text.split())
    assert "picks it for 100.0 %" in words
    assert "first for 100.0 % (of 500 questions; BM25 " in words
    assert "is 0.400 on average when the questions come first, 0.200 when they come again" in words
    _, of_own = words.split("it finds the right paragraph first for 100.0 % (")  # of what it learnt from
    before, _ = of_own.split(" % before)")
    assert 0 < float(before) < 40
    assert " ± " in text and text.rstrip().endswith("core-hours.") and text.startswith("# What a language model")
    trained = [words for words in commands if words[0] == "train.py" or "benchmarks.from_labels" in words]
    names = [words[words.index("--name") + 1] for words in trained]
    by_name = dict(zip(names, trained, strict=True))
    assert len(trained) == len(by_name) > 30
    assert sum("-1000-questions" in name for name in by_name) == 3  # on one seed, whatever is compared with whatever
    commands.clear()
    assert page(jobs=1) == page(only=True) == text  # nothing is run again, wherever its runs are
    assert not commands and results.stat().st_size > 1000
    kept = json.loads(results.read_text())
    kept["figures"] = {recipe: one for recipe, one in kept["figures"].items() if not one["name"].startswith("answers")}
    results.write_text(json.dumps(kept))
    part = page(only=True)  # the rest of the page is the same, and nothing is run for it
    assert not commands and "| book closed, " not in part
    (more,) = set(part.splitlines()) - set(text.splitlines())
    assert more.startswith("Not measured yet: book closed, no examples (Answers); ")
    unordered = kept | {"figures": {i: one for i, one in kept["figures"].items() if "reranked" not in one}}
    (home / "unordered.json").write_text(json.dumps(unordered))
    part = real_text.page(Bench(home, Asked(1000, 500, 300), kept=Kept(home / "unordered.json", only=True)), 1, 3)
    assert "Not measured yet: MiniLM as it is (reranked); " in part  # and no row of retrieval
    assert f"\n| {real_text.TRAINED.name} | 3 | 100.0 ± 0.0 | " in part and "| without any label, reranked" not in part
    none = real_text.page(Bench(home, Asked(1000, 500, 300), kept=empty_but_bm25(results, home / "bm25.json")), 1, 3)
    assert "Not measured yet: MiniLM as it is (What is learnt, and from what); both encoders, from" in none
    for directory in ("runs", "logs", "indices"):
        shutil.rmtree(home / directory)
    assert page() == text and commands  # on another machine, what answers need is made again


def empty_but_bm25(results, path):
    kept = json.loads(results.read_text())
    figures = {recipe: one for recipe, one in kept["figures"].items() if one["name"] == "bm25"}
    path.write_text(json.dumps(kept | {"figures": figures}))
    return Kept(path, only=True)


def test_ranks_and_what_is_made_of_them():
    lines = [
        {"metadata": {"passage": "b"}, "passages": [{"id": name} for name in found]} for found in ("abc", "bc", "ac")
    ]
    ranks = np.array([real_bench.rank_in(line) for line in lines])
    assert ranks.tolist() == [2, 1, 0]
    assert real_bench.recall(ranks, 1).tolist() == [0, 1, 0] and real_bench.recall(ranks, 2).tolist() == [1, 1, 0]
    assert real_bench.ndcg(ranks).tolist() == pytest.approx([1 / np.log2(3), 1, 0])
    assert real_bench.ndcg(ranks, 1).tolist() == [0, 1, 0]
    assert real_bench.contained("It was the Nile.", ["nile"]) and not real_bench.contained("Niles", ["nile"])


def test_questions_are_those_that_the_seed_draws(home, commands):
    bench = Bench(home, Asked(5, 4, 3))
    bench.prepare()
    drawn = [read_jsonl(bench.examples(Row("", questions=6), seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(lines) == 6 for lines in drawn)
    for line in drawn[0]:
        assert line["target"] == line["answers"][0] and line["passages"][0]["id"] == line["metadata"]["passage"]
    assert len(read_jsonl(home / "test-5.jsonl")) == 5 and len(read_jsonl(home / "test-3.jsonl")) == 3
    one = Row("a, b", judged=real_bench.BOTH, questions=7, flags=("--refresh_index", "-1"))
    assert one.key(2) == "minilm-gold_score_mode-question-gold_question_weight-0-75-7-questions-refresh_index-1-2"
    assert replace(one, name="c").key(2) == one.key(2) and Row("a, b").key(2) == "minilm"
    others = {"seed": one.key(3)} | {
        str(change): replace(one, **change).key(2)
        for change in (
            {"labels": True},
            {"cloze": "train"},
            {"cloze": "all"},
            {"judged": ()},
            {"start": "x"},
            {"questions": 8},
            {"flags": ()},
        )
    }
    assert len({one.key(2), *others.values()}) == 1 + len(others)


def test_sentences_are_those_of_training_articles_or_of_all(home, commands):
    bench = Bench(home, Asked(5, 4, 3))
    texts = {town: f"This is {town} and it has been there for the last 1,200 years." for town in TOWNS}
    corpus = [{"id": f"{town}-0", "title": town, "text": text} for town, text in texts.items()]
    real_bench.write(home / "data/corpus.jsonl", corpus)
    of = {which: read_jsonl(bench.examples(Row("", cloze=which, questions=100), 0)) for which in ("", "train", "all")}
    towns = {which: {line["metadata"]["passage"].removesuffix("-0") for line in lines} for which, lines in of.items()}
    assert towns[""] == towns["train"] == set(TOWNS[:4]) and towns["all"] == set(TOWNS)
    assert len(of["train"]) == 4 and len(of["all"]) == 12
    assert all(line["target"] == line["answers"][0] and "___" in line["question"] for line in of["all"])


def test_a_cloze_question_is_a_sentence_without_a_name_or_number():
    text = (
        "In the end the river Nile flows past the town of Luxor. It is short. But in 1,200 years much changes, he says."
    )
    lines = real_bench.cloze({"id": "p", "text": text}, random.Random(0))
    asked = [line["question"].replace("___", line["answers"][0]) for line in lines]
    assert asked == [text.split(". ")[0] + ".", text.split(". ")[2]]
    assert lines[0]["answers"][0] in ("Nile", "Luxor") and lines[1]["answers"] == ["1,200"]
    assert [line["metadata"]["passage"] for line in lines] == ["p", "p"] and lines[0]["id"] != lines[1]["id"]


def test_a_failed_run_ends_what_waits_and_tasks_run_side_by_side():
    both = threading.Barrier(2, timeout=300)
    real_bench.all_at_once(2, [both.wait, both.wait])
    done = []

    def fail():
        raise SystemExit("train.py failed")

    with pytest.raises(SystemExit, match="failed"):
        real_bench.all_at_once(1, [partial(done.append, 0), fail, partial(done.append, 1)])
    assert done == [0]


def test_labels_teach_the_right_paragraph_and_nothing_where_it_is_not_found(tmp_path, monkeypatch):
    """The reader is not asked: what is learnt depends on the labels alone."""
    search = {"train_data": None, "retrieve_only": True, "reader_model_type": None, "n_context": 2}
    search |= {"retriever_model_path": world() / "models/retriever", "qa_prompt_format": "{question}"}
    found = run(tmp_path, "evaluate", name="found", **search, eval_data=world() / "train.jsonl") / "train-step-0.jsonl"
    gold = {line["query"]: line["passages"][1]["id"] for line in read_jsonl(found)}
    monkeypatch.setattr(PromptInputs, "judging", PromptInputs.judging)
    monkeypatch.setitem(signals.PROMPT_MODES, "ppmean", signals.PROMPT_MODES["ppmean"])
    flags = read_with(train_retriever=True, freeze_reader=True, total_steps=3, eval_data=None)
    losses = {}
    for name, labels in (("right", gold), ("nowhere", dict.fromkeys(gold, "nothing"))):
        labelled = from_labels.Labelled(labels)
        labelled.install()
        losses[name] = logged(run(tmp_path, name=name, **flags), "loss/retriever_loss")
    assert set(losses["nowhere"]) == {0.0} and max(losses["right"]) > 0


def test_what_is_judged_beforehand_is_what_training_asks_for(tmp_path, monkeypatch):
    questions, kept = tmp_path / "asked.jsonl", tmp_path / "known.sqlite"
    lines = [
        line | {"id": f"q{i}", "target": line["answers"][0], "metadata": {"passage": "?"}}
        for i, line in enumerate(read_jsonl(world() / "dev.jsonl"))
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = {"retriever_model_path": world() / "models/retriever", "qa_prompt_format": "{question}"}
    search = {"train_data": None, "retrieve_only": True, "reader_model_type": None, "n_context": 5} | model
    found = run(tmp_path, "evaluate", name="found", **search, eval_data=questions) / "asked-step-0.jsonl"
    flags = read_with(train_retriever=True, freeze_reader=True, gold_score_mode="question", gold_question_weight=0.7)
    flags |= {"retriever_n_context": 3, "train_data": questions, "eval_data": None, "total_steps": 4}
    words = [
        "--task",
        "qa",
        "--passages",
        str(world() / "passages.jsonl"),
        "--name",
        "judge",
        "--train_data",
        str(questions),
    ]
    words += ["--reader_model_type", str(language_model()), "--qa_prompt_format", "{question}", "--n_context", "2"]
    words += ["--freeze_reader", "--train_retriever", "--gold_score_mode", "question", "--cache_judgements", str(kept)]
    words += ["--gold_question_weight", "0.7"]
    words += ["--text_maxlength", "64", "--retriever_model_path", str(world() / "models/retriever")]
    monkeypatch.setattr("sys.argv", ["judge.py", str(found), "5", *words])
    judge.main()
    judged = read_jsonl(found.with_suffix(".judged"))
    pairs = {(line["id"], passage["id"]) for line in read_jsonl(found) for passage in line["passages"][:5]}
    assert {(pair["id"], pair["passage"]) for pair in judged} == pairs and len(judged) == len(pairs) > 5
    assert all(pair["question"] < 0 and pair["answer"] < 0 for pair in judged)
    assert len({pair["answer"] for pair in judged}) > 5
    before = kept.read_bytes()
    run(tmp_path, name="learns", **flags, lr_retriever=0, cache_judgements=kept)
    assert kept.read_bytes() == before  # nothing had to be computed
