"""Five updates and an evaluation behind them, however they are run; tests/trajectories/README.md says more."""

import json
from pathlib import Path

import pytest
import torch

from atlas.checkpoint import load_checkpoint
from tests.kit import logged, read_jsonl, run, run_on, slow, world, write_jsonl

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "tests/trajectories"
UPDATES, BATCH = 5, 4  # examples of an update, over all ranks and accumulated steps
EQUAL = 2e-5  # 1e-5, and as much again because the log has six digits
QUERY_SIDE = {"train_retriever": True, "query_side_retriever_training": True, "gold_score_mode": "ppmean"}
RUNS = {
    "qa": QUERY_SIDE,
    "mlm": {"task": "mlm", "train_retriever": True, "gold_score_mode": "pdist", "refresh_index": 2},
    "pq": QUERY_SIDE | {"index_mode": "faiss", "faiss_index_type": "pq", "faiss_code_size": 16},
}


def flags(name: str, directory: Path, steps: int = 1) -> dict[str, object]:
    """What changes in `kit.command_line`: a run whose updates are of so many steps each on every rank.

    Losses are means over the tokens of a rank's targets, so all targets are cut to the same number of tokens.
    """
    changes = {
        "reader_model_type": ROOT / "models/tiny/reader",
        "retriever_model_path": ROOT / "models/tiny/retriever",
        "target_maxlength": 3,
        "generation_max_length": 12,
        "lr": 1e-4,
        "lr_retriever": 1e-4,
    } | RUNS[name]
    if changes.get("task") == "mlm":
        passages = read_jsonl(world() / "passages.jsonl")
        changes["train_data"] = write_jsonl(directory / "train.jsonl", passages[:20])
        changes["eval_data"] = write_jsonl(directory / "dev.jsonl", passages[100:108])
    if "refresh_index" in changes:
        changes["refresh_index"] *= steps
    return changes | {"total_steps": UPDATES * steps, "accumulation_steps": steps, "log_freq": steps}


def straight(name: str, directory: Path) -> Path:
    """One process that sees all examples of an update at once."""
    return run(directory, name="straight", per_gpu_batch_size=BATCH, **flags(name, directory))


def trajectory(directory: Path) -> dict[str, object]:
    """Losses of the five updates, and the answers with the passages they were read from."""
    (results,) = directory.glob("dev-step-*.jsonl")
    rows = read_jsonl(results)
    return {
        "losses": {half: logged(directory, f"loss/{half}_loss") for half in ("reader", "retriever")},
        "answers": [row["generation"] for row in rows],
        "passages": [[passage["id"] for passage in row["passages"]] for row in rows],
    }


def assert_same(found: dict, expected: dict, within: float) -> None:
    for half, losses in expected["losses"].items():
        assert len(losses) == UPDATES and found["losses"][half] == pytest.approx(losses, abs=within), half
    assert (found["answers"], found["passages"]) == (expected["answers"], expected["passages"])


@pytest.fixture(scope="module", params=RUNS)
def one(request, tmp_path_factory):
    """The name of a run, and the directory of it on one process."""
    return request.param, straight(request.param, tmp_path_factory.mktemp(request.param))


def test_as_recorded(one, pytestconfig):
    name, directory = one
    file = RECORDED / f"{name}.json"
    if pytestconfig.getoption("--record"):
        file.write_text(json.dumps(trajectory(directory), indent=1) + "\n", encoding="utf-8")
        pytest.skip(f"{file} is written")
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert_same(trajectory(directory), recorded, within=1e-3)
    assert len(set(recorded["answers"])) > 3 and len({tuple(ids) for ids in recorded["passages"]}) > 3


@pytest.mark.parametrize("one", ["qa", slow("mlm"), slow("pq")], indirect=True)
def test_resumed_is_straight_to_the_bit(one, tmp_path):
    name, directory = one
    line = {"name": "resumed", "per_gpu_batch_size": BATCH}
    run(tmp_path, **flags(name, tmp_path) | line | {"total_steps": 3, "eval_data": None})
    resumed = run(tmp_path, **flags(name, tmp_path) | line)
    assert trajectory(resumed) == trajectory(directory)
    for half in ("reader", "retriever"):
        found, expected = (getattr(load_checkpoint(place), half) for place in (resumed, directory))
        assert found.keys() == expected.keys() and found
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("one", ["qa", slow("mlm"), slow("pq")], indirect=True)
def test_accumulation_is_one_batch(one, tmp_path):
    name, directory = one
    accumulated = run(tmp_path, per_gpu_batch_size=1, **flags(name, tmp_path, steps=BATCH))
    assert_same(trajectory(accumulated), trajectory(directory), within=EQUAL)


@pytest.mark.parametrize("one", ["qa", slow("mlm"), slow("pq")], indirect=True)
def test_two_ranks_are_two_accumulated_steps_with_dropout_too(one, tmp_path):
    name, directory = one
    line = {"per_gpu_batch_size": BATCH // 2, "dropout": 0.1}
    accumulated = run(tmp_path, **flags(name, tmp_path, steps=2) | line, name="accumulated")
    two = run_on(2, tmp_path, **flags(name, tmp_path) | line, name="two")
    assert_same(trajectory(two), trajectory(accumulated), within=EQUAL)
    without, losses = trajectory(directory)["losses"]["reader"], trajectory(two)["losses"]["reader"]
    assert losses != pytest.approx(without, abs=1e-3)  # there was dropout


@pytest.mark.parametrize("one", ["qa", "mlm", slow("pq")], indirect=True)
def test_two_ranks_are_one(one, tmp_path):
    name, directory = one
    two = run_on(2, tmp_path, per_gpu_batch_size=BATCH // 2, **flags(name, tmp_path))
    assert_same(trajectory(two), trajectory(directory), within=EQUAL)
