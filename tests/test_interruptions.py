"""Runs that are stopped, killed and started again: they go on as if nothing had happened, and no checkpoint is lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from atlas.checkpoint import latest_checkpoint, load_checkpoint
from atlas.command_line import parse_config
from atlas.embedding import CorpusEmbedder
from atlas.evaluation.evaluator import Evaluator
from atlas.files.jsonl import JsonlCorpus
from atlas.runtime import distributed, session
from atlas.runtime.session import StopSignals
from atlas.tasks.data import Data
from atlas.training.trainer import Trainer
from tests.kit import command_line, logged, make_task, read_jsonl, recorded, run, run_on, slow, write_jsonl
from tests.patience import HANG_SECONDS, free_port, wait_until
from tests.programs import TORCHRUN, Program
from tests.ranks import run_on_ranks, warm
from train import train

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"train_retriever": True, "query_side_retriever_training": True, "dropout": 0.1, "shuffle": True}


def losses_by_step(directory):
    """Step -> the losses of every line that metrics.jsonl has for it: several where the step was taken again."""
    found: dict[int, set[tuple]] = {}
    for line in recorded(directory, "train"):
        losses = tuple((name, value) for name, value in line.items() if name.startswith(("loss/", "corr/")))
        found.setdefault(line["step"], set()).add(losses)
    return found


@pytest.fixture
def ask_to_stop(monkeypatch):
    """Sends this process a signal when so many steps are finished: the next one is taken, and no more."""

    def after(steps, number):
        refresh = Trainer.refresh_index

        def refresh_and_signal(trainer, step):
            refresh(trainer, step)  # a signal while an index is built ends the run before the step
            if step == steps + 1:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Trainer, "refresh_index", refresh_and_signal)

    return after


SIX_STEPS = {"total_steps": 6, "eval_freq": 4, "save_freq": 100, "per_gpu_eval_batch_size": 2, **FLAGS}


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """A run that nothing interrupts, to compare others with."""
    return run(tmp_path_factory.mktemp("six"), name="straight", **SIX_STEPS)


@pytest.mark.parametrize(("number", "asked", "saved"), [(signal.SIGTERM, 1, 2), slow(signal.SIGUSR1, 3, 4)])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, six_steps, ask_to_stop, monkeypatch, number, asked, saved):
    flags, straight = SIX_STEPS, six_steps
    before = signal.getsignal(number)
    ask_to_stop(asked, number)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, name="stopped", **flags)
    assert ended.value.code == 143 and signal.getsignal(number) == before
    stopped = tmp_path / "stopped"
    assert load_checkpoint(stopped).step == saved
    assert f"Asked to stop: step {saved} is saved" in (stopped / "run.log").read_text().splitlines()[-1]
    assert load_checkpoint(stopped).evaluation_due == (saved % 4 == 0)
    assert not (stopped / f"dev-step-{saved}.jsonl").exists()
    monkeypatch.undo()
    run(tmp_path, name="stopped", **flags)
    assert losses_by_step(stopped) == losses_by_step(straight)
    for step in (4, 6):  # that of step 4 is made up for
        assert read_jsonl(stopped / f"dev-step-{step}.jsonl") == read_jsonl(straight / f"dev-step-{step}.jsonl")


@pytest.mark.slow
def test_stopped_three_times(tmp_path, ask_to_stop):
    """40 steps straight, and with stops after steps 1, 7 and 23: the same numbers and, in the end, the same weights."""
    flags = {"total_steps": 40, "train_retriever": True, "refresh_index": 5, "dropout": 0.1, "shuffle": True}
    straight, stopped = run(tmp_path, name="straight", **flags), tmp_path / "stopped"
    for step, number in ((1, signal.SIGTERM), (7, signal.SIGUSR1), (23, signal.SIGTERM)):
        ask_to_stop(step - 1, number)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, name="stopped", **flags)
        assert ended.value.code == 143 and load_checkpoint(stopped).step == step
    run(tmp_path, name="stopped", **flags)
    assert sorted(losses_by_step(stopped)) == list(range(1, 41))
    assert losses_by_step(stopped) == losses_by_step(straight)
    assert read_jsonl(stopped / "dev-step-40.jsonl") == read_jsonl(straight / "dev-step-40.jsonl")
    for found, expected in zip(weights(stopped), weights(straight), strict=True):
        assert found.keys() == expected.keys() and found
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def weights(directory):
    """Of both halves, and what both optimizers remember."""
    saved = load_checkpoint(directory)
    return saved.reader, saved.retriever, saved.optimizer_state()


def test_a_stop_waits_for_the_update(tmp_path, ask_to_stop):
    ask_to_stop(1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(tmp_path, total_steps=9, accumulation_steps=4, **FLAGS)
    assert load_checkpoint(tmp_path / "run").step == 4
    assert (tmp_path / "run/report.html").is_file()  # of what there is


def test_a_stop_at_the_last_step_leaves_only_its_evaluation(tmp_path, ask_to_stop, monkeypatch):
    straight = run(tmp_path, name="straight", total_steps=3, **FLAGS)
    ask_to_stop(2, signal.SIGTERM)
    nothing_left = run(tmp_path, name="no evaluation", total_steps=3, eval_data=None, **FLAGS)
    assert "Done: " in (nothing_left / "run.log").read_text() and load_checkpoint(nothing_left).step == 3
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=3, **FLAGS)
    assert ended.value.code == 143 and not list((tmp_path / "run").glob("*dev-step-3*"))
    monkeypatch.undo()
    evaluated = run(tmp_path, total_steps=3, **FLAGS)
    assert read_jsonl(evaluated / "dev-step-3.jsonl") == read_jsonl(straight / "dev-step-3.jsonl")
    assert losses_by_step(evaluated) == losses_by_step(straight)
    assert not load_checkpoint(evaluated).evaluation_due
    run(tmp_path, total_steps=3, **FLAGS)
    assert "This run is finished" in (evaluated / "run.log").read_text().splitlines()[-1]


def nth_call(monkeypatch, owner, name, n, happens):
    """Something happens in the n-th call of a method."""
    method, calls = getattr(owner, name), count(1)

    def wrapper(*arguments, **keywords):
        if next(calls) == n:
            happens()
        return method(*arguments, **keywords)

    monkeypatch.setattr(owner, name, wrapper)


def assert_resumes_exactly(directory, straight, evaluations):
    """The losses of every step, the results, and the weights; evaluated so many times in all starts together."""
    assert losses_by_step(directory) == losses_by_step(straight)
    results = sorted(path.name for path in straight.glob("dev-*"))
    assert sorted(path.name for path in directory.glob("dev-*")) == results and not list(directory.glob(".dev*"))
    for name in results:
        assert read_jsonl(directory / name) == read_jsonl(straight / name)
    assert [line["file"] for line in recorded(directory, "evaluation")] == ["dev"] * evaluations
    for found, expected in zip(weights(directory), weights(straight), strict=True):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


BATCHES = 6  # of an evaluation: 11 questions, two at a time


@pytest.mark.parametrize(
    ("changes", "evaluation", "saved", "evaluations"),
    [
        slow({"save_freq": 4}, 1, 4, 2),  # saved before it was evaluated
        ({"save_freq": 100}, 1, 4, 2),  # not saved yet
        slow({"save_freq": 100, "refresh_index": 4, "query_side_retriever_training": False}, 1, 4, 2),
        slow({"save_freq": 100}, 2, 6, 2),  # the last one
        slow({"save_freq": 100, "accumulation_steps": 3}, 1, 3, 2),  # gradients wait for more
    ],
)
def test_a_signal_in_an_evaluation(tmp_path, six_steps, monkeypatch, changes, evaluation, saved, evaluations):
    """It ends within a batch, and the run that resumes evaluates this step, with the index that it had."""
    flags, stopped = SIX_STEPS | changes, tmp_path / "stopped"
    straight = six_steps if changes.keys() == {"save_freq"} else run(tmp_path, name="straight", **flags)
    with monkeypatch.context() as patch:
        batch, calls = (evaluation - 1) * BATCHES + 3, []
        nth_call(patch, Evaluator, "_evaluate_batch", batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        nth_call(patch, Evaluator, "_evaluate_batch", batch + 1, lambda: calls.append("another batch"))
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, name="stopped", **flags)
    assert ended.value.code == 143 and calls == []
    found = load_checkpoint(stopped)
    assert found.step == saved and found.evaluation_due == (saved in (4, 6))
    run(tmp_path, name="stopped", **flags)
    assert_resumes_exactly(stopped, straight, evaluations)


def test_a_crash_in_an_evaluation_loses_nothing(tmp_path, six_steps, monkeypatch):
    flags, crashed = SIX_STEPS | {"save_freq": 4}, tmp_path / "crashed"
    for evaluation, step in ((1, 4), (2, 6)):  # the second one is that of the run that resumes after the first
        with monkeypatch.context() as patch:
            nth_call(patch, Evaluator, "_evaluate_batch", (evaluation - 1) * BATCHES + 3, crash)
            with pytest.raises(ArithmeticError):
                run(tmp_path, name="crashed", **flags)
        assert load_checkpoint(crashed).step == step and load_checkpoint(crashed).evaluation_due
    run(tmp_path, name="crashed", **flags)
    assert_resumes_exactly(crashed, six_steps, 2)
    assert not load_checkpoint(crashed).evaluation_due
    state = json.loads((crashed / "checkpoint/step-4/state.json").read_text())
    assert (state["step"], state["evaluation_due"]) == (4, False)


def crash():
    raise ArithmeticError


def test_a_signal_while_the_first_index_is_built(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        nth_call(patch, CorpusEmbedder, "_embed_window", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, total_steps=2, eval_data=None)
    assert ended.value.code == 143 and latest_checkpoint(tmp_path / "run") is None
    log = (tmp_path / "run/run.log").read_text()
    assert "Asked to stop before a step was saved" in log and "Embedded" not in log  # it ends with the batch
    run(tmp_path, total_steps=2, eval_data=None)


@pytest.mark.parametrize(("accumulation_steps", "saved"), [(1, 4), slow(3, 3)])
def test_a_signal_while_the_index_is_refreshed(tmp_path, monkeypatch, accumulation_steps, saved):
    """What was finished before is saved, up to the last update."""
    flags = {"total_steps": 6, "train_retriever": True, "refresh_index": 4, "save_freq": 100, "eval_freq": 4}
    flags |= {"accumulation_steps": accumulation_steps}
    straight, stopped = run(tmp_path, name="straight", **flags), tmp_path / "stopped"
    with monkeypatch.context() as patch:
        refreshed = []

        def signal_in_the_refresh():
            refreshed.append(os.kill(os.getpid(), signal.SIGUSR1))

        nth_call(patch, CorpusEmbedder, "_embed_window", 2, signal_in_the_refresh)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, name="stopped", **flags)
    assert ended.value.code == 143 and refreshed
    assert load_checkpoint(stopped).step == saved and not load_checkpoint(stopped).evaluation_due
    run(tmp_path, name="stopped", **flags)
    # that of step 4 comes again where the run resumes before it
    assert_resumes_exactly(stopped, straight, 2 if saved == 4 else 3)


def _run_with_a_signal_to_one_rank(arguments, owner, name, call):
    """The status of a rank where rank 1 alone gets a signal in the so-many-th call of a method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop", lambda: None)  # the process group goes on living
        if distributed.rank() == 1:
            nth_call(patch, owner, name, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            train(parse_config(arguments, program="train"))
        except SystemExit as ended:
            return ended.code
    return 0


@pytest.mark.parametrize(
    ("changes", "owner", "name", "saved"),
    [
        ({}, Evaluator, "_evaluate_batch", 2),
        # nothing that ranks do together is in a batch
        ({"closed_book": True, "passages": None, "write_results": False}, Evaluator, "_evaluate_batch", 2),
        ({}, CorpusEmbedder, "_embed_window", None),
    ],
)
def test_a_signal_to_one_of_two_ranks_ends_both(tmp_path, changes, owner, name, saved):
    flags = {"total_steps": 4, "eval_freq": 2, "save_freq": 100, **changes}
    line = command_line(tmp_path, **flags)
    assert run_on_ranks(2, _run_with_a_signal_to_one_rank, line, owner, name, 1) == [143, 143]
    found = latest_checkpoint(tmp_path / "run")
    assert (found and load_checkpoint(found).step) == saved
    run_on(2, tmp_path, **flags)
    assert load_checkpoint(tmp_path / "run").step == 4


def test_the_second_signal_is_not_caught_but_an_echo_of_the_first_is(monkeypatch):
    heard = []
    monkeypatch.setattr(session, "ECHO_SECONDS", float("inf"))
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with StopSignals() as stop:
            assert not stop.received
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):  # SLURM's, and torchrun's for the same
                os.kill(os.getpid(), number)
            assert stop.received and heard == []
            monkeypatch.setattr(session, "ECHO_SECONDS", 0.0)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_order_of_the_data_survives_another_number_of_ranks(tmp_path):
    lines = [{"query": str(i), "target": "t"} for i in range(13)]
    corpus = JsonlCorpus((write_jsonl(tmp_path / "data.jsonl", lines),))

    def queries(steps, world_size, batch_size, resumed=(0, 0, 13)):
        ranks = [
            Data(corpus, make_task("base"), seed=5, batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for data in ranks:
            data.resume(*resumed)
        seen = [example.query for step in steps for data in ranks for example in data.training_batch(step, True)]
        return seen, ranks[0].examples_after(steps[-1])

    straight, _ = queries(range(1, 31), 1, 1)
    first, seen = queries(range(1, 4), 2, 2)
    second, seen = queries(range(4, 8), 3, 1, (3, seen, 13))
    third, seen = queries(range(8, 14), 1, 1, (7, seen, 13))
    assert first + second + third == straight and seen == 30


def test_going_on_with_another_number_of_ranks(tmp_path):
    """2 ranks, and then one that accumulates 2 steps, are one that does so from the start."""
    flags = {"per_gpu_batch_size": 1, "eval_data": None, "train_retriever": True, "refresh_index": 100}
    straight = run(tmp_path, name="straight", total_steps=16, accumulation_steps=2, log_freq=2, **flags)
    run_on(2, tmp_path, name="changed", total_steps=4, **flags)
    changed = run(tmp_path, name="changed", total_steps=12, accumulation_steps=2, log_freq=2, **flags)
    for name in ("reader", "retriever"):
        losses = logged(changed, f"loss/{name}_loss")
        assert len(losses) == 8 and losses == pytest.approx(logged(straight, f"loss/{name}_loss"), abs=2e-5)


def start(*words):
    """A run in the background, as a user starts it; its output goes to where nobody waits for it."""
    return subprocess.Popen(
        [*map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ATLAS_TIMEOUT_SECONDS": str(HANG_SECONDS)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_step(directory):
    return max(losses_by_step(directory), default=0) if (directory / "metrics.jsonl").exists() else 0


def wait_for_step(process, directory, step):
    """Until the log has a line of this step or a later one."""
    wait_until(lambda: last_step(directory) >= step, f"step {step}", lambda: process.poll() is None)


def killed_at_a_random_moment(directory, flags, rng):
    """Start a run or go on with it; whether it was killed before it reached the end by itself."""
    process = warm.Process(target=run, args=(directory.parent,), kwargs=flags | {"name": directory.name})
    step = last_step(directory) + rng.randrange(1, 5)
    process.start()
    wait_until(lambda: last_step(directory) >= step or not process.is_alive(), f"step {step}")
    time.sleep(rng.random() * 0.2)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """40 steps straight, and with ten kills: the same losses at every step, and a good checkpoint at every moment.

    A run that was quicker than its killer is compared as well, and another one begun.
    """
    flags = {"total_steps": 40, "save_freq": 3, "eval_data": None, "keep_checkpoints": 2, **FLAGS}
    straight, rng, kills = run(tmp_path, name="straight", **flags), random.Random(0), 0
    for attempt in count():
        directory = tmp_path / f"killed-{attempt}"
        while kills < 10 and killed_at_a_random_moment(directory, flags, rng):
            kills += 1
            if found := latest_checkpoint(directory):
                saved = load_checkpoint(found)
                assert saved.reader and saved.retriever and saved.optimizer_state()
        run(tmp_path, name=directory.name, **flags)
        assert losses_by_step(directory) == losses_by_step(straight)
        if kills == 10:
            break


@pytest.mark.slow
def test_torchrun_starts_a_run_again_whose_rank_was_killed(tmp_path):
    flags = {"total_steps": 30, "save_freq": 2, **FLAGS}
    straight = run_on(2, tmp_path, name="straight", **flags)
    launcher = [sys.executable, *TORCHRUN, "--standalone", "--nproc_per_node", 2, "--max-restarts", 1]
    for attempt in count():
        directory = tmp_path / f"killed-{attempt}"
        process = start(*launcher, "train.py", *command_line(tmp_path, name=directory.name, **flags))
        wait_for_step(process, directory, 5)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        with contextlib.suppress(IndexError, ProcessLookupError):  # on a busy machine, the run was quicker
            os.kill(int(ranks[-1]), signal.SIGKILL)
        assert process.wait(HANG_SECONDS) == 0, process.stderr.read()
        if "Resuming after step" in (directory / "run.log").read_text():
            break
    assert losses_by_step(directory) == losses_by_step(straight)
    assert read_jsonl(directory / "dev-step-30.jsonl") == read_jsonl(straight / "dev-step-30.jsonl")


@pytest.mark.slow
def test_two_machines_start_again_together(tmp_path):
    """torchrun's count of restarts is 1 where the rank was killed, and 0 on the other machine.

    `--restart` is followed when the run is launched, and not when torchrun starts it again.
    """
    flags = {"total_steps": 30, "save_freq": 2, "restart": True, **FLAGS}
    straight = run_on(2, tmp_path, name="straight", **flags)
    port, line = free_port(), command_line(tmp_path, name="killed", **flags)
    run_on(2, tmp_path, name="killed", **flags | {"total_steps": 1})  # what --restart sets aside
    launcher = [sys.executable, *TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 3, "--rdzv_id", 7]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    launcher += ["--monitor-interval", 0.2]
    agents = [start(*launcher, "train.py", *line) for _ in range(2)]
    for attempt in range(2):
        wait_for_step(agents[0], tmp_path / "killed", 5 + 8 * attempt)
        ranks = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True).stdout.split()
        with contextlib.suppress(IndexError, ProcessLookupError):  # on a busy machine, the run was quicker
            os.kill(int(ranks[-1]), signal.SIGKILL)
    assert [agent.wait(HANG_SECONDS) for agent in agents] == [0, 0], [agent.stderr.read() for agent in agents]
    assert losses_by_step(tmp_path / "killed") == losses_by_step(straight)
    assert read_jsonl(tmp_path / "killed/dev-step-30.jsonl") == read_jsonl(straight / "dev-step-30.jsonl")
    assert [path.name for path in tmp_path.glob("killed/checkpoint.before*")] == ["checkpoint.before-restart"]


@pytest.mark.slow
def test_sigterm_to_torchrun(tmp_path):
    """As SLURM ends a job: every rank saves what it has, and the same ranks go on."""
    flags = {"save_freq": 10**6, "eval_data": None, **FLAGS}
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", 2, "--signals-to-handle", "SIGTERM,SIGUSR1"]
    launcher += ["--shutdown-timeout", HANG_SECONDS]
    line = command_line(tmp_path, total_steps=10**6, **flags)
    endless = Program([*launcher, "train.py", *line], env=os.environ | {"ATLAS_TIMEOUT_SECONDS": str(HANG_SECONDS)})
    wait_for_step(endless, tmp_path / "run", 3)
    endless.terminate()
    assert endless.wait(HANG_SECONDS) != 0
    saved = load_checkpoint(tmp_path / "run").step
    assert saved == last_step(tmp_path / "run")
    run_on(2, tmp_path, total_steps=saved + 5, **flags)
    assert sorted(losses_by_step(tmp_path / "run")) == list(range(1, saved + 6))
