"""What a run writes for programs and for people: metrics.jsonl, the curves of libraries, the lines of run.log."""

import json
import math
import os
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atlas import checks
from atlas.command_line import parse_config
from atlas.config import REPORTERS, Config
from atlas.evaluation.evaluator import _listed
from atlas.runtime.reporting import LIBRARIES, Reports
from atlas.runtime.tracking import training_line
from tests.kit import command_line, recorded, run, run_on

CLOSED = {"closed_book": True, "passages": None, "total_steps": 2}


@pytest.fixture
def flags():
    """A function: the flags of a run, with changes."""
    return lambda **changes: parse_config(command_line("there", **changes))


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_line_of_metrics(tmp_path):
    reports = Reports(tmp_path)
    numbers = {"exact_match": 45.123456789, "f1": math.nan, "rouge_1": -math.inf}
    reports.record("evaluation", 20, {"file": "dév", "examples": 500, "metrics": numbers, "results": None})
    (line,) = lines_of(tmp_path)
    assert line.pop("time") > 0
    metrics = {"exact_match": 45.1235}  # what is not finite is left out
    expected = {"kind": "evaluation", "step": 20, "file": "dév", "examples": 500, "metrics": metrics, "results": None}
    assert line == expected


def test_a_line_that_was_cut_off_stays_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start"}\n{"kind": "tr')
    for step in (1, 2):
        Reports(tmp_path).record("train", step, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"kind": "tr' and [json.loads(line)["step"] for line in lines[2:]] == [1, 2]


def test_a_command_line_of_other_bytes(tmp_path):
    Reports(tmp_path).record("start", 0, {"command": ["train.py", "--name", os.fsdecode(b"\xe9t\xe9")]})
    assert lines_of(tmp_path)[0]["command"][2] == os.fsdecode(b"\xe9t\xe9")


def test_a_full_disk_is_said_once_and_there_may_be_room_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    reports = Reports(tmp_path)
    for step in range(3):
        reports.record("train", step, {})
    (tmp_path / "metrics.jsonl").unlink()
    reports.record("train", 3, {})
    assert caplog.text.count(f"Lines are missing in {tmp_path}/metrics.jsonl: [Errno 28]") == 1
    assert [line["step"] for line in lines_of(tmp_path)] == [3]


class FakeLibrary(SimpleNamespace):
    """wandb and trackio in one, as far as they are used; everything that is called is noted."""

    def __init__(self, broken=()):
        super().__init__(calls=[], broken=broken, Settings=dict)

    def _note(self, called, /, *given, **named):
        self.calls.append((called, given, named))
        if called in self.broken:
            raise RuntimeError("the server is away")

    def init(self, *given, **named):
        self._note("init", *given, **named)
        return self

    def define_metric(self, *given, **named):
        self._note("define_metric", *given, **named)

    def log(self, *given, **named):
        self._note("log", *given, **named)

    def finish(self, *given, **named):
        self._note("finish", *given, **named)

    def of(self, name):
        return [(*given, named) if named else given for called, given, named in self.calls if called == name]


def start_run(directory, library, config: Config, values, step=1):
    with Reports(directory, [library]) as reports:
        reports.start(config, torch.device("cpu"), step - 1)
        reports.draw(values, step)


def test_wandb_goes_on_with_its_run(tmp_path, flags, monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start_run(tmp_path, "wandb", flags(name="mine"), {"loss/train_loss": 2.5})
    start_run(tmp_path, "wandb", flags(name="mine"), {"loss/train_loss": 2.0}, step=2)
    start_run(tmp_path, "wandb", flags(name="mine", restart=True), {"loss/train_loss": 3.0})
    (first,), (second,), (again,) = fake.of("init")
    assert first["id"] == second["id"] != again["id"] and first["resume"] == "allow" and first["name"] == "mine"
    assert first["dir"] == tmp_path and first["config"] == flags(name="mine").flags()
    assert fake.of("define_metric")[0] == ("*", {"step_metric": "step"})  # its own steps cannot go back
    points = [({"step": step, "loss/train_loss": loss},) for step, loss in ((1, 2.5), (2, 2.0), (1, 3.0))]
    assert fake.of("log") == points and fake.of("finish") == [({"exit_code": 0},)] * 3


def test_trackio_goes_on_with_its_run(tmp_path, flags, monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for changes in ({}, {}, {"restart": True}):
        start_run(tmp_path, "trackio", flags(name="mine", **changes), {"lr": 0.1}, step=3)
    assert [(project, named["resume"]) for project, named in fake.of("init")] == [
        ("atlas", resume) for resume in ("never", "allow", "never")
    ]
    assert fake.of("log") == [({"lr": 0.1}, {"step": 3})] * 3 and len(fake.of("finish")) == 3


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_an_error_of_a_library_ends_its_curves_and_not_the_run(tmp_path, flags, monkeypatch, caplog, broken):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    fake = FakeLibrary(broken=[broken])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Reports(tmp_path, ["wandb"]) as reports:
        reports.start(flags(), torch.device("cpu"), 0)
        for step in range(3):
            reports.draw({"lr": 0.1}, step)
    assert caplog.text.count("No more curves for wandb are written") == 1 and "the server is away" in caplog.text
    assert len(fake.of(broken)) == 1 and fake.calls[-1][0] == broken  # it is left alone afterwards


def test_an_error_of_the_run_is_told(tmp_path, flags, monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ArithmeticError), Reports(tmp_path, ["wandb"]) as reports:
        reports.start(flags(), torch.device("cpu"), 0)
        raise ArithmeticError
    assert fake.of("finish") == [({"exit_code": 1},)]


def test_every_library_is_known_in_both_places():
    assert list(LIBRARIES) == list(REPORTERS)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("wandb", "--report_to wandb: it is not installed here: pip install wandb, or leave it out"),
        ("tensorboard, trackio", "--report_to trackio: it is not installed here: pip install trackio"),
        ("none,tensorboard", "--report_to none,tensorboard: none stands alone"),
        ("mlflow", "--report_to 'mlflow' is unknown: give some of tensorboard, wandb, trackio, or none"),
        ("tensorboard,", "--report_to '' is unknown"),
    ],
)
def test_a_library_that_is_not_there_is_told_before_the_start(monkeypatch, capsys, given, sentence):
    specs = {"tensorboard": ModuleSpec("tensorboard", None, origin="there"), "trackio": None}
    specs["wandb"] = ModuleSpec("wandb", None)  # a directory that is called so
    monkeypatch.setattr(checks, "find_spec", specs.get)
    with pytest.raises(SystemExit) as ended:
        parse_config(command_line("there", report_to=given))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("\n") == 1


def test_the_default_library_may_be_missing(tmp_path, flags, monkeypatch, caplog):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    assert flags().run.reporters == ["tensorboard"] and flags(report_to="none").run.reporters == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level("INFO", "atlas"):
        start_run(tmp_path, "tensorboard", flags(), {"lr": 0.1})
    assert "tensorboard is not installed, so no curves are written: pip install tensorboard" in caplog.text


@pytest.mark.processes
@pytest.mark.slow
def test_the_real_libraries(tmp_path, monkeypatch):
    """Offline; a run that resumes goes on with the same curves, and its losses are those of a run without them."""
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("TRACKIO_DIR", str(tmp_path / "trackio")),
    ):
        monkeypatch.setenv(name, value)
    pytest.importorskip("wandb")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    for total_steps in (2, 4):
        with_them = run(tmp_path, **CLOSED | {"total_steps": total_steps, "report_to": "wandb,trackio", "save_freq": 2})
    assert "No more curves" not in (with_them / "run.log").read_text()
    identifiers = {path.name.rsplit("-", 1)[1] for path in (with_them / "wandb").glob("offline-run-*")}
    assert identifiers == {(with_them / "wandb.id").read_text()}
    points = storage.get_logs("atlas", "run")
    without = run(tmp_path, name="without", **CLOSED | {"total_steps": 4, "report_to": "none"})
    losses = [line["loss/train_loss"] for line in recorded(without, "train")]
    assert [line["loss/train_loss"] for line in recorded(with_them, "train")] == losses
    drawn = {point["step"]: point["loss/train_loss"] for point in points if "loss/train_loss" in point}
    assert list(drawn.values()) == pytest.approx(losses, rel=1e-5) and list(drawn) == [1, 2, 3, 4]


@pytest.mark.processes
def test_the_lines_of_a_run(tmp_path):
    """Two starts: every kind, in order, with a rate that counts tokens and passages without their padding."""
    for total_steps in (2, 3):
        directory = run(tmp_path, total_steps=total_steps, report_to="none", write_evidence=True)
    lines = lines_of(directory)
    assert [(line["kind"], line["step"]) for line in lines] == [
        *[("start", 0), ("refresh", 0), ("train", 1), ("train", 2), ("evaluation", 2)],
        *[("start", 2), ("refresh", 2), ("train", 3), ("evaluation", 3)],
    ]
    start, refresh, train, evaluation = lines[0], lines[1], lines[2], lines[4]
    assert start["command"][:3] == ["train.py", "--name", "run"] and start["ranks"] == 1 and not start["restart"]
    assert start["versions"].keys() == {"atlas", "torch", "transformers", "python", "faiss"}
    assert refresh["passages"] == 300 and refresh["seconds"] > 0
    assert train["passages_per_second"] * train["runtime/train_step"] == pytest.approx(2 * 4, rel=1e-4)
    assert train["tokens_per_second"] > 5 * train["passages_per_second"]
    assert {"lr", "skipped_steps", "peak_memory_gib", "loss/reader_loss", "runtime/retrieve"} <= train.keys()
    assert (evaluation["file"], evaluation["examples"], evaluation["results"]) == ("dev", 11, "dev-step-2.jsonl")
    assert {"exact_match", "f1", "eval_loss", "recall@1", "mrr"} == evaluation["metrics"].keys()
    assert not list(directory.glob("events*"))
    log = (directory / "run.log").read_text()
    assert (
        len(re.findall(r"\] step \d/\d \| loss [\d.]+ \| lr 1\.00e-03 \| [\d.]+ s/step \(retrieve [\d.]+\) \|", log))
        == 3
    )
    assert re.search(
        r"\] dev, step 2: exact match \d+\.\d\d, F1 .* \| 11 examples in [\d.]+ s: .*dev-step-2\.jsonl\n", log
    )


@pytest.mark.processes
def test_rates_are_those_of_all_ranks_together(tmp_path):
    two = run_on(2, tmp_path / "two", per_gpu_batch_size=1, total_steps=1, eval_data=None)
    one = run(tmp_path / "one", per_gpu_batch_size=2, total_steps=1, eval_data=None)
    (of_two,), (of_one,) = recorded(two, "train"), recorded(one, "train")  # written by rank 0 alone
    for rate in ("tokens_per_second", "passages_per_second"):
        of_step = [line[rate] * line["runtime/train_step"] for line in (of_two, of_one)]
        assert of_step[0] == pytest.approx(of_step[1], rel=1e-4)


def test_a_line_of_training():
    values = {"loss/train_loss": 2.413, "lr": 4e-5, "runtime/train_step": 1.349, "runtime/retrieve": 0.41}
    values |= {"tokens_per_second": 5230.0, "passages_per_second": 30.0, "peak_memory_gib": 1.414, "skipped_steps": 0}
    plain = "| lr 4.00e-05 | 1.349 s/step (retrieve 0.410) | 5.2k tokens/s | 1.41 GiB"
    assert training_line(5, 60, values) == f"step  5/60 | loss 2.413 {plain}"
    values |= {"loss/reader_loss": 1.902, "loss/retriever_loss": 0.00004, "skipped_steps": 2}
    values |= {"corr/attention": 0.5, "corr/value_norm": -0.25, "corr/adist": 0.125, "tokens_per_second": 812.3}
    assert training_line(20, 60, values) == (
        "step 20/60 | loss 2.413 (reader 1.902, retriever 4e-05) | correlation attention 0.500, value_norm -0.250, "
        "adist 0.125 | lr 4.00e-05 | 1.349 s/step (retrieve 0.410) | 812 tokens/s | 1.41 GiB | 2 skipped"
    )


def test_a_line_of_an_evaluation():
    metrics = {"recall@5": 92.0, "mrr": 0.51, "judged_ndcg@10": 40.5, "judged_mrr": 0.25, "exact_match": 45.2, "f1": 51}
    metrics |= {"within_ten": 7.0, "rouge_1": 12.3, "eval_loss": 1.2345}
    assert _listed(metrics) == (
        "exact match 45.20, F1 51.00, within ten 7.00, ROUGE 1 12.30, loss 1.234, "
        "recall@5 92.00, MRR 0.510, judged nDCG@10 40.50, judged MRR 0.250"
    )
    assert _listed({}) == "nothing measured"
