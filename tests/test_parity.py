"""Against recordings of the published system: the same flags give the same losses, passages and answers."""

import json
import shlex
import shutil

import pytest

from atlas.checkpoint import load_checkpoint
from atlas.command_line import parse_config
from evaluate import evaluate
from tests.kit import last_metrics, logged, read_jsonl
from tests.parity import parity_kit
from train import train


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """A copy of the kit to run in: its flags name files relative to it."""
    home = tmp_path / "kit"
    home.mkdir()
    for source in parity_kit().iterdir():
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, home / source.name)
    monkeypatch.chdir(home)
    return home


def play(recording, kit, *more):
    """Run a recording's flags as they stand; the run's directory."""
    script, *flags = shlex.split(recording["flags"].replace(" OUT ", f" {kit}/out "))
    config = parse_config([*flags, *more], program=script.removesuffix(".py"))
    evaluate(config) if script == "evaluate.py" else train(config)
    return kit / "out" / config.run.name


def expected(kit, name):
    return json.loads((kit / "expected.json").read_text())[name]


def test_training(kit):
    recording = expected(kit, "train_pdist")
    directory = play(recording, kit)
    for statistic, key in (
        ("loss/reader_loss", "reader_loss"),
        ("loss/retriever_loss", "retriever_loss"),
        ("lr", "lr"),
    ):
        assert logged(directory, statistic) == pytest.approx([s[key] for s in recording["steps"]], rel=1e-3), key
    metrics = last_metrics(directory)
    for name in ("exact_match", "f1"):
        assert metrics[name] == pytest.approx(recording["evals"][0][name], rel=1e-5)


def test_evaluation(kit):
    recording = expected(kit, "evaluate")
    directory = play(recording, kit)
    rows = read_jsonl(directory / "dev-step-0.jsonl")
    metrics = last_metrics(directory)
    for name in ("exact_match", "f1"):
        assert metrics[name] == pytest.approx(recording["evals"][0][name], rel=1e-5)
    for row, wanted in zip(rows, recording["results"], strict=True):
        assert (row["query"], row["generation"]) == (wanted["query"], wanted["generation"])
        assert [passage["id"] for passage in row["passages"]] == wanted["passages"]


def test_published_checkpoint_and_index(kit):
    """Both load as they are, and the index finds what embedding the corpus with that checkpoint finds."""
    recording = expected(kit, "evaluate")
    common = ("--model_path", "published", "--name")
    built = read_jsonl(play(recording, kit, *common, "built") / "dev-step-0.jsonl")
    loaded_run = play(recording, kit, *common, "loaded", "--load_index_path", "published_index")
    loaded = read_jsonl(loaded_run / "dev-step-0.jsonl")
    assert "Converting the published index" in (loaded_run / "run.log").read_text()
    for a, b in zip(built, loaded, strict=True):
        scores_a = {p["id"]: p["score"] for p in a["passages"]}
        scores_b = {p["id"]: p["score"] for p in b["passages"]}
        for identifier in scores_a.keys() ^ scores_b.keys():  # only passages that score alike may change places
            score = scores_a.get(identifier, scores_b.get(identifier))
            assert score == pytest.approx(min(scores_a.values()), rel=2e-3)
        for identifier in scores_a.keys() & scores_b.keys():
            assert scores_a[identifier] == pytest.approx(scores_b[identifier], rel=2e-3)
    assert load_checkpoint("published").step == 3
