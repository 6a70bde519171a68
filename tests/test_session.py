"""How a run starts and ends for its user: Ctrl-C, a screen that is gone, a rank that is lost or late."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from atlas.runtime import distributed, session, tracking
from atlas.runtime.parallel import data_parallel
from atlas.training.trainer import Trainer
from tests.kit import command_line, run
from tests.patience import HANG_SECONDS, free_port, wait_until
from tests.programs import Program
from tests.ranks import rank_environment, warm

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent


def log_of(directory):
    return (directory / "run.log").read_text() if (directory / "run.log").exists() else ""


def interrupted(step, monkeypatch):
    """Ctrl-C comes before this step."""
    refresh = Trainer.refresh_index

    def press_and_refresh(trainer, number):
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # terminals, torchrun and impatient users send it again
        return refresh(trainer, number)

    monkeypatch.setattr(Trainer, "refresh_index", press_and_refresh)


@pytest.mark.parametrize(
    ("step", "second_line"),
    [
        (2, "No checkpoint is saved yet; the same command starts from the beginning"),
        (4, "Saved is {}/run/checkpoint/step-2; the same command, without --restart, resumes from there"),
    ],
)
def test_ctrl_c_says_how_to_resume(tmp_path, monkeypatch, capfd, step, second_line):
    interrupted(step, monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=5, save_freq=2)
    signal.signal(signal.SIGINT, before)
    said = capfd.readouterr()
    assert ended.value.code == 130 and "Traceback" not in said.out + said.err
    for lines in (said.out.splitlines(), log_of(tmp_path / "run").splitlines()):
        assert lines[-2].endswith(f"] Stopped by Ctrl-C: {tmp_path / 'run'}")
        assert lines[-1].endswith("] " + second_line.format(tmp_path)), lines
    if step == 4:
        monkeypatch.undo()
        log = log_of(run(tmp_path, total_steps=5, save_freq=2))
        assert "Resuming after step 2" in log


def test_ctrl_c_in_an_evaluation(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("atlas.evaluation.evaluator.Evaluator.evaluate_all", lambda *_: os.kill(os.getpid(), 2))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "evaluate", train_data=None)
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capfd.readouterr().out.splitlines()[-1].endswith("evaluations are saved; the same command starts again")


def test_a_full_gpu_ends_with_where_advice_is(tmp_path, monkeypatch, capfd):
    def retrieve(trainer, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nSee the documentation")

    monkeypatch.setattr(Trainer, "retrieve", retrieve)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=1)
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1 and "Traceback" not in said and "See the documentation" not in said
    assert "the GPU's memory is full" in said and "`python plan.py --card ... " in said
    assert said.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB)")


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:132] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 216243378240 bytes. Error code 12 (Cannot allocate memory)"), "216243378240 bytes"),
        (MemoryError("Unable to allocate 1.00 TiB for an array with shape (1,) and data type float64"), "1.00 TiB"),
        (MemoryError(), ""),
    ],
)  # fmt: skip
def test_memory_that_is_not_enough_is_one_sentence(tmp_path, monkeypatch, capfd, error, size):
    def retrieve(trainer, step):
        raise error

    monkeypatch.setattr(Trainer, "retrieve", retrieve)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=1)
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1 and "Traceback" not in said and size in said
    assert "the memory is not enough: lower --per_gpu_batch_size, --n_context (--k)" in said


def test_a_second_ctrl_c_after_a_while_ends_at_once_and_one_that_is_ignored_stays_so(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    ended = []
    try:
        monkeypatch.setattr(session, "ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt), session._interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(session.os, "kill", lambda process, number: ended.append((process, number)))
        signal.raise_signal(signal.SIGINT)
        assert ended == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with session._interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_on_two_ranks(tmp_path):
    """As from a terminal: every process gets it; none shows a traceback, one says the two lines."""
    port, flags = free_port(), {"total_steps": 10**6, "save_freq": 2, "eval_data": None}
    line, environment = command_line(tmp_path, **flags), os.environ | {"ATLAS_TIMEOUT_SECONDS": str(HANG_SECONDS)}
    ranks = [Program(["train.py", *line], env=environment | rank_environment(rank, 2, port)) for rank in range(2)]
    alive = lambda: all(rank.poll() is None for rank in ranks)  # noqa: E731
    wait_until(lambda: "step       3/1000000" in log_of(tmp_path / "run"), "the third step", alive)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    said = [rank.communicate(timeout=HANG_SECONDS) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130], said
    assert said[1] == ("", "") and said[0][1] == "", said
    assert "resumes from there" in said[0][0].splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_while_everything_is_imported(tmp_path):
    words = [sys.executable, "train.py", *command_line(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), "torch", lambda: not process.poll())
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in said[1], said


def errors_to(path):
    """What this process says on standard error goes to a file: what started it has not our standard error."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)


def _with_screen(screen, directory):
    """Log three lines to a screen that is closed, or that nobody reads."""
    errors_to(directory / "stderr")
    if screen == "closed":
        os.close(1)
        sys.stdout = None
    else:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    tracking.open_standard_streams()
    tracking.start_log(directory)
    for number in range(3):
        tracking.log.info("line %d", number)
    print("to nobody", flush=True)
    assert os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev  # not a file that was opened since


@pytest.mark.parametrize(("screen", "warnings"), [("closed", 0), ("a pipe without a reader", 1)])
def test_a_run_goes_on_without_a_screen(tmp_path, screen, warnings):
    process = warm.Process(target=_with_screen, args=(screen, tmp_path))
    process.start()
    process.join(HANG_SECONDS)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert process.exitcode == 0 and (tmp_path / "stderr").read_text() == ""
    assert sum("The screen cannot be written to (" in line for line in lines) == warnings
    assert [line.split("] ")[1] for line in lines if "line" in line] == [f"line {n}" for n in range(3)]


def test_a_log_that_cannot_be_written_is_said_once(capfd):
    handler = tracking._File("/dev/full")
    for _ in range(2):
        handler.emit(logging.makeLogRecord({"msg": "x"}))
    handler.stream = None  # closing would flush
    assert capfd.readouterr().err == "lines of the log are missing in /dev/full: [Errno 28] No space left on device\n"


def _rank_of_a_session(rank, port, directory, work, line):
    from atlas.command_line import parse_config

    os.environ.update(rank_environment(rank, 2, port), ATLAS_TIMEOUT_SECONDS=str(HANG_SECONDS))
    errors_to(directory / f"stderr of {rank}")
    torch.set_num_threads(1)
    config = parse_config(line)
    with session.session(config.run, "train"):
        work(rank, directory)


def _end_in_backward(rank, directory):
    model = data_parallel(torch.nn.Linear(3, 3), torch.device("cpu"), some_unused=False)
    if rank == 1:
        model.register_comm_hook(None, lambda state, bucket: os._exit(9))
    model(torch.ones(2, 3)).sum().backward()


def _be_late(rank, directory):
    distributed.HEARTBEAT_SECONDS, distributed.TIMEOUT_SECONDS = 0.1, 1.0
    distributed.any_rank(False)  # a sign of life, after which less time is left
    if rank == 1:
        hang_here(directory)
    distributed.wait_for_all("the work of both")


def hang_here(directory):
    wait_until((directory / "given up").exists, "the end of the other rank's patience")
    os._exit(7)


def two_ranks(directory, work, between=lambda: None):
    """Exit statuses of two ranks; the work on the first has ended when `between` is called."""
    arguments = free_port(), directory, work, command_line(directory, total_steps=1)
    ranks = [warm.Process(target=_rank_of_a_session, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    ranks[0].join(HANG_SECONDS)
    between()
    ranks[1].join(HANG_SECONDS)
    return [rank.exitcode for rank in ranks]


def test_a_rank_that_is_lost_in_backward_is_one_sentence_on_the_others(tmp_path):
    assert two_ranks(tmp_path, _end_in_backward) == [1, 9]
    said = (tmp_path / "stderr of 0").read_text()
    assert "rank 0 of 2 could not finish an exchange with the others: another rank has ended" in said
    assert said.count("\n") == 1, said
    assert "backward()" in log_of(tmp_path / "run")


def test_a_late_rank_leaves_its_stack_in_its_log(tmp_path):
    assert two_ranks(tmp_path, _be_late, (tmp_path / "given up").touch) == [1, 7]
    assert "rank 0 of 2 could not finish the work of both" in log_of(tmp_path / "run")
    assert "hang_here" in (tmp_path / "run/run.rank-1.log").read_text()
    assert "Timeout (" not in log_of(tmp_path / "run")  # who waits is not late


def test_the_heartbeat_of_a_rank_that_has_lost_the_others_ends_quietly(monkeypatch, capfd):
    asked = threading.Event()

    class Gone:
        def add(self, key, amount):
            asked.set()
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(distributed, "_store", Gone())
    monkeypatch.setattr(distributed, "_last_heartbeat", 0.0)
    monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.001)
    with distributed.busy():
        assert asked.wait(HANG_SECONDS)  # its thread may be gone already
    assert not [thread for thread in threading.enumerate() if "beat" in thread.name]
    assert capfd.readouterr().err == ""
