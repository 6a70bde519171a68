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

import export_huggingface
import finetune_qa
import update_index
from atlas.command_line import parse_config
from benchmarks import evidence
from example_scripts import demo, demo_pretrain, demo_update

pytestmark = pytest.mark.processes


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that are called, from a root where the corpus is there; those that write results write some."""
    commands: list[list[str]] = []
    for module in (demo, demo_pretrain, demo_update, evidence):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    questions = [
        {"id": f"city-{i}-river", "question": "Which?", "answers": [str(i % 3)], "relation": f"city.{i % 2}"}
        for i in range(40)
    ]
    corpora = [Path(base) / "data" for base in ("demo", "demo/evidence")]
    for directory in corpora:
        directory.mkdir(parents=True)
        for name in ("pretrain", "train.16-shot", "train.64-shot", "train.256-shot"):
            (directory / f"{name}.jsonl").touch()
        passages = [
            {"id": f"city-{i}-census-0", "title": f"City {i}", "text": f"City {i} is near City {i + 1}."}
            for i in range(40)
        ]
        train = [row | {"id": f"city-{i + 100}-river", "answers": ["1"]} for i, row in enumerate(questions * 8)]
        for name, rows in {
            "test": questions,
            "train": train,
            "passages": passages,
            "passages.train": passages[:10],
        }.items():
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

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


def prepared(flags, questions):
    """The corpus is there."""


def trained(flags, questions):
    config = parse_config(flags, program="train")
    run = Path(config.run.checkpoint_dir) / config.run.name / "checkpoint"
    for step in (500, config.optimisation.total_steps):
        (run / f"step-{step}").mkdir(parents=True, exist_ok=True)


def exported(flags, questions):
    options = export_huggingface.parse_options(flags)
    for name in ("reader", "retriever"):
        (options.output_directory / name).mkdir(parents=True)
        (options.output_directory / name / "model.safetensors").touch()


def built(flags, questions):
    output = Path(flags[flags.index("--output_directory") + 1])
    for name in ("reader", "retriever"):
        (output / name).mkdir(parents=True)
        (output / name / "tokenizer_config.json").touch()
        (output / name / "model.safetensors").touch()


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
    for path in config.run.eval_data:
        (directory / f"{Path(path).stem}-step-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def updated(flags, questions):
    options = update_index.parse_options(flags)
    assert options.index.is_dir() and len(options.passages[0].read_text().splitlines()) == 0  # no fact is in a passage


SCRIPTS = {
    "prepare_demo.py": prepared,
    "train.py": trained,
    "make_tiny_models.py": built,
    "export_huggingface.py": exported,
    "finetune_qa.py": tuned,
    "evaluate.py": evaluated,
    "update_index.py": updated,
}


@pytest.mark.parametrize(("gpus", "started"), [(0, 2), (1, 1), (2, 2), (6, 4), (8, 8), (32, 16)])
def test_the_demo_starts_a_process_for_each_gpu_or_two_on_a_cpu(monkeypatch, gpus, started):
    """A power of two, so that its batches divide."""
    monkeypatch.setattr(demo.torch.cuda, "device_count", lambda: gpus)
    assert demo.processes.__wrapped__() == started


def pretrain(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["demo_pretrain.py", *flags])
    demo_pretrain.main()


def test_pretraining_is_a_few_ordinary_commands(commands, monkeypatch, capsys):
    pretrain(monkeypatch)
    names = [next(word for word in words if word.endswith(".py")) for words in commands]
    assert names == [
        "preprocessing/prepare_demo.py",
        "preprocessing/make_tiny_models.py",
        "train.py",
        "train.py",
        "preprocessing/export_huggingface.py",
    ]
    configs = [parse_config(words[words.index("train.py") + 1 :]) for words in commands[2:4]]
    assert not configs[0].retriever_training.train_retriever and configs[1].retriever_training.train_retriever
    assert configs[1].run.model_path == "demo/pretraining/reader"
    for config in configs:
        assert config.run.train_data == ("demo/data/pretrain.jsonl",)
        assert config.index.passages == ("demo/data/passages.train.jsonl",)
        assert not config.run.eval_data
    commands.clear()
    pretrain(monkeypatch)  # what is there is used again; train.py goes on, or finds that it is done
    names = [Path(next(word for word in words if word.endswith(".py"))).name for words in commands]
    assert names == ["prepare_demo.py", "train.py", "train.py"]


def test_another_seed_of_pretraining_goes_elsewhere(commands, monkeypatch):
    pretrain(monkeypatch)
    pretrain(monkeypatch, "--seed", "1")
    assert Path("demo/pretraining-1/models/reader").exists() and len(commands) == 10


@pytest.fixture
def written(commands, monkeypatch, tmp_path):
    """The commands of a page of evidence that was written."""
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("the plot needs matplotlib")
    (tmp_path / "docs").mkdir()
    pretrain(monkeypatch)
    commands.clear()
    monkeypatch.setattr(sys, "argv", ["evidence.py"])
    evidence.main()
    return commands


def test_the_page_of_evidence(written, tmp_path):
    commands = written
    names = [words[words.index("--name") + 1] for words in commands if "--name" in words]
    assert names.count("reader") == 2 * len(evidence.PRETRAINING_SEEDS)  # the first stage; both ways share it
    stages = {"reader", "joint", "without-distillation"}
    runs = [name for name in names if name not in stages]
    assert len(runs) == len(set(runs)) > 50
    page = (tmp_path / "docs/evidence.md").read_text()
    assert "40 test questions over 2 relations" in page and "would be right for 32.5 %" in page
    assert re.search(r"\| exact match after 64 examples: 60 or more \| [2-4]\d\.\d \| \*\*does not hold\*\* \|", page)
    assert re.search(r"\| recall@5 after 64 examples: 90 or more \| \d+\.\d \| ", page)
    assert "such as the country of a city: 11 questions." in page
    assert (tmp_path / "docs/evidence.png").stat().st_size > 10_000
    for row in ("book closed", "not pretrained", "without distillation", "loop", "both, index refreshed", "OPQ-32"):
        assert f"\n| {row} | " in page
    commands.clear()
    evidence.main()
    assert {words[words.index("--name") + 1] for words in commands if "--name" in words} <= stages
    assert (tmp_path / "docs/evidence.md").read_text() == page
    (tmp_path / "demo/pretraining/models/reader/model.safetensors").write_text("others")
    with pytest.raises(SystemExit, match="demo/evidence was made of other data or models: remove it"):
        evidence.main()


def test_every_run_of_the_page_searches_its_own_index(written):
    """That of the models it starts from; its own where the passage encoder has changed; none if the book is closed."""
    for words in written:
        script = next((word for word in words if word in ("finetune_qa.py", "evaluate.py")), None)
        if script is None:
            continue
        name, models = (words[words.index(flag) + 1] for flag in ("--name", "--retriever_model_path"))
        loads = words[words.index("--load_index_path") + 1] if "--load_index_path" in words else None
        if name.startswith("closed"):
            assert loads is None and "--passages" not in words
        elif name.startswith("index-"):
            assert words[words.index("--save_index_path") + 1].endswith("/" + "-".join(Path(models).parts[-4:-1]))
        elif re.match(r"both|refreshed|pretrained-(?!500|1000)\d", name):
            own = re.sub("-(read|search)$", "", name)
            assert ("--passages" in words) == (not name.endswith("-search"))
            if script == "evaluate.py":
                place = loads if name.endswith("-search") else words[words.index("--save_index_path") + 1]
                assert place == f"demo/evidence/indices/{own}"
        else:
            assert loads == f"demo/evidence/indices/{'-'.join(Path(models).parts[-4:-1])}" and "--passages" not in words


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


def test_facts_are_exchanged_in_questions_and_passages():
    """Within a relation, and where they end a sentence; a thing of which two facts are the same keeps them."""
    asked = [("country-1-capital", "Rom"), ("country-2-capital", "Romulus"), ("country-3-capital", "Oslo")]
    asked += [("country-3-city", "Oslo"), ("country-1-city", "Bari"), ("country-2-city", "Bari")]
    before = [{"id": i, "answers": [answer], "relation": f"country.{i.split('-')[2]}"} for i, answer in asked]
    after = demo_update.exchanged(before)
    assert {row["id"]: row["answers"] for row in after} == {
        "country-1-capital": ["Romulus"],
        "country-2-capital": ["Rom"],
    }
    texts = ["The capital of Rome is Rom. Bari is a city of Rom.", "Its capital is Romulus.", "The capital is Oslo."]
    passages = [{"id": f"country-{i}-government-0", "text": text} for i, text in enumerate(texts, 1)]
    assert [passage["text"] for passage in demo_update.rewritten(passages, before, after)] == [
        "The capital of Rome is Romulus. Bari is a city of Romulus.",
        "Its capital is Rom.",
    ]


def test_the_index_is_updated_and_asked_before_and_after(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo_update"])
    (tmp_path / "demo/index").mkdir()
    (model := tmp_path / "demo/experiments/after").mkdir(parents=True)
    (model / "state.json").touch()
    (model / "options.json").write_text('{"model": {"reader_model_type": "models/tiny/reader"}}')
    demo_update.main()
    update, before, after = (" ".join(command) for command in commands)
    assert "preprocessing/update_index.py demo/index-updated --passages demo/data/changed.jsonl" in update
    assert "--load_index_path demo/index " in before and "--load_index_path demo/index-updated " in after
    assert "with the updated index" in capsys.readouterr().out
