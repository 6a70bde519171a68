"""`make demo-pretrain` and the page of evidence, without their training: commands that parse, what becomes of them."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import finetune_qa
from benchmarks import evidence
from example_scripts import demo, demo_pretrain
from preprocessing import export_huggingface
from src.config import parse_config


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that are called, from a root where the corpus is there; those that write results write some."""
    commands: list[list[str]] = []
    for module in (demo, demo_pretrain, evidence):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    questions = [
        {"id": f"city-{i}-river", "question": "Which?", "answers": [str(i % 3)], "relation": f"city.{i % 2}"}
        for i in range(40)
    ]
    corpora = [Path(base) / "data" for base in ("demo", "demo/evidence")]
    for directory in corpora:
        directory.mkdir(parents=True)
        for name in ("passages", "passages.train", "pretrain", "train.16-shot", "train.64-shot", "train.256-shot"):
            (directory / f"{name}.jsonl").touch()
        (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    run = subprocess.run

    def called(words, **settings):
        scripts = [str(word) for word in words if Path(word).name in SCRIPTS]
        if not scripts:  # matplotlib asks for fonts
            return run(words, **settings)
        (script,) = scripts
        commands.append([str(word) for word in words])
        SCRIPTS[Path(script).name](commands[-1][commands[-1].index(script) + 1 :], questions)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", called)
    return commands


def trained(flags, questions):
    config = parse_config(flags, program="train")
    run = Path(config.run.checkpoint_dir) / config.run.name / "checkpoint"
    for step in (250, config.optimisation.total_steps):
        (run / f"step-{step}").mkdir(parents=True, exist_ok=True)


def exported(flags, questions):
    options = export_huggingface.parse_options(flags)
    for name in ("reader", "retriever"):
        (options.output_directory / name).mkdir(parents=True)


def built(flags, questions):
    output = Path(flags[flags.index("--output_directory") + 1])
    for name in ("reader", "retriever"):
        (output / name).mkdir(parents=True)
        (output / name / "tokenizer_config.json").touch()


def tuned(flags, questions):
    config = parse_config(flags, program="finetune_qa", **finetune_qa.PRESET)
    step = f"step-{config.optimisation.total_steps}"
    (Path(config.run.checkpoint_dir) / config.run.name / "checkpoint" / step).mkdir(parents=True)


def evaluated(flags, questions):
    config = parse_config(flags, program="evaluate")
    directory = Path(config.run.checkpoint_dir) / config.run.name
    directory.mkdir(parents=True)
    if config.index.save_index_path:
        Path(config.index.save_index_path).mkdir(parents=True)
        (Path(config.index.save_index_path) / "index.json").touch()
    rng = random.Random(config.run.name)
    rows = [
        {"query": row["question"], "answers": row["answers"], "generation": str(rng.randrange(3))}
        | {"passages": [{"id": str(k), "title": "", "text": str(rng.randrange(40))} for k in range(20)]}
        for row in questions
    ]
    (directory / "test-step-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SCRIPTS = {
    "train.py": trained,
    "make_tiny_models.py": built,
    "export_huggingface.py": exported,
    "finetune_qa.py": tuned,
    "evaluate.py": evaluated,
}


def pretrain(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo_pretrain.py"])
    demo_pretrain.main()


def test_pretraining_is_a_few_ordinary_commands(commands, monkeypatch, capsys):
    pretrain(monkeypatch)
    names = [next(word for word in words if word.endswith(".py")) for words in commands]
    assert names == [
        "preprocessing/make_tiny_models.py",
        "train.py",
        "train.py",
        "preprocessing/export_huggingface.py",
    ]
    configs = [parse_config(words[words.index("train.py") + 1 :]) for words in commands[1:3]]
    assert not configs[0].retriever_training.train_retriever and configs[1].retriever_training.train_retriever
    assert configs[1].run.model_path == "demo/pretraining/reader"
    for config in configs:
        assert config.run.train_data == ("demo/data/pretrain.jsonl",)
        assert config.index.passages == ("demo/data/passages.train.jsonl",)
        assert not config.run.eval_data
    commands.clear()
    pretrain(monkeypatch)  # what is there is used again; train.py goes on, or finds that it is done
    assert [Path(next(word for word in words if word.endswith(".py"))).name for words in commands] == ["train.py"] * 2


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the plot needs matplotlib")
def test_the_page_of_evidence(commands, monkeypatch, tmp_path):
    for name in ("reader", "retriever"):
        (tmp_path / demo.MODELS / name).mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    pretrain(monkeypatch)
    commands.clear()
    monkeypatch.setattr(sys, "argv", ["evidence.py"])
    evidence.main()
    names = [words[words.index("--name") + 1] for words in commands if "--name" in words]
    names.remove("reader")  # the first stage, which both ways of the second share
    assert len(names) == len(set(names)) > 50
    page = (tmp_path / "docs/evidence.md").read_text()
    assert "40 test questions over 2 relations" in page and "would be right for 35.0 %" in page
    assert re.search(r"\| exact match after 64 examples: 60 or more \| [2-4]\d\.\d \| \*\*does not hold\*\* \|", page)
    assert re.search(r"\| recall@5 after 64 examples: 90 or more \| \d+\.\d \| ", page)
    assert (tmp_path / "docs/evidence.png").stat().st_size > 10_000
    for row in ("book closed", "not pretrained", "without distillation", "loop", "both, index refreshed", "OPQ-32"):
        assert f"\n| {row} | " in page
    commands.clear()
    evidence.main()
    assert {words[words.index("--name") + 1] for words in commands if "--name" in words} <= {"reader", "joint"} | {
        "without-distillation"
    }
    assert (tmp_path / "docs/evidence.md").read_text() == page


def test_significance():
    rng = np.random.default_rng(0)
    same = [rng.integers(0, 2, 200).astype(float) for _ in range(3)]
    assert evidence.significance(same, same) == 1.0
    better = [np.maximum(one, rng.random(200) < 0.2) for one in same]
    assert evidence.significance(better, same) < 0.001
    # one question of four differs: two of the 16 patterns of signs are as far from 0 as what was seen, times 8
    one, other = np.array([1.0, 0, 1, 1]), np.array([0.0, 0, 1, 1])
    assert evidence.significance([one], [other]) == 1.0
    # three of three differ the same way: 2 of 8 patterns are as far
    assert evidence.significance([np.ones(3)], [np.zeros(3)]) == pytest.approx(0.25, abs=0.01)
