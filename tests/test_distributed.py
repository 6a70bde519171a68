"""The collectives on real groups of 2 and 3 ranks, and as the identity in one process."""

import os
import time
from types import SimpleNamespace

import pytest
import torch

from atlas.runtime import distributed
from tests.patience import HANG_SECONDS, free_port, wait_until
from tests.programs import Program
from tests.ranks import rank_environment, run_on_ranks

pytestmark = pytest.mark.processes


def _gather_uneven(sizes):
    mine = torch.full((sizes[distributed.rank()], 2), float(distributed.rank()))
    return distributed.all_gather_rows(mine)


@pytest.mark.parametrize("sizes", [[3, 1], [0, 2], [0, 0], [2, 0, 5]])
def test_all_gather_rows_of_different_sizes(sizes):
    expected = torch.cat([torch.full((n, 2), float(r)) for r, n in enumerate(sizes)])
    for rows, got_sizes in run_on_ranks(len(sizes), _gather_uneven, sizes):
        assert got_sizes == sizes
        assert torch.equal(rows, expected)


def _talk():
    me = distributed.rank()
    statistics = distributed.sum_statistics({"all": (1.0, 2.0), f"only {me}": (5.0, 1.0)})
    return {
        "gathered": distributed.gather_objects(f"rank {me}"),
        "on main": distributed.gather_on_main(me),
        "from main": distributed.from_main(f"said by {me}"),
        "any": [distributed.any_rank(me == 1), distributed.any_rank(False)],
        "sum": distributed.sum_over_ranks(torch.tensor([1.0, float(me)])).tolist(),
        "statistics": statistics,
    }


def test_every_rank_hears_the_same():
    answers = run_on_ranks(3, _talk)
    assert [a.pop("on main") for a in answers] == [[0, 1, 2], [], []]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == {
        "gathered": ["rank 0", "rank 1", "rank 2"],
        "from main": "said by 0",
        "any": [True, False],
        "sum": [3.0, 3.0],
        "statistics": {"all": (3.0, 6.0), "only 0": (5.0, 1.0), "only 1": (5.0, 1.0), "only 2": (5.0, 1.0)},
    }


def test_one_process_is_the_identity():
    rows = torch.ones(3, 2)
    assert distributed.all_gather_rows(rows)[0] is rows
    assert distributed.gather_objects("x") == ["x"] == distributed.gather_on_main("x")
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.sum_statistics({"a": (1.0, 2.0)}) == {"a": (1.0, 2.0)}
    distributed.wait_for_all("nothing")
    with distributed.main_first("nothing"):
        pass


def _main_goes_first(directory):
    (directory / f"at the door {distributed.rank()}").touch()
    with distributed.main_first("the order"):
        if distributed.is_main():
            wait_until(lambda: len(list(directory.glob("at the door *"))) == 3, "all ranks at the door")
            time.sleep(0.1)  # who does not wait there goes through now
        with open(directory / "order", "a") as f:
            f.write(str(distributed.rank()))
    distributed.wait_for_all("the order")
    return (directory / "order").read_text()


def test_main_first(tmp_path):
    order = run_on_ranks(3, _main_goes_first, tmp_path)[1]
    assert order[0] == "0" and sorted(order) == ["0", "1", "2"]


def _one_rank_fails():
    error = ValueError("bad line") if distributed.rank() == 1 else None
    try:
        distributed.raise_on_all_ranks(error)
    except ValueError as seen:
        return str(seen)
    return None


def test_an_error_of_one_rank_ends_all():
    assert run_on_ranks(2, _one_rank_fails) == ["bad line", "bad line"]


class _ClockOfTheWaiting:
    """Stands in for `time` on a rank that waits: time passes only while it sleeps, and only in step with the other
    rank, 9/10 of the time-out after each sign of life. After the fifth it lets the other one come."""

    def __init__(self, directory, other):
        self.directory, self.key, self.now, self.naps = directory, f"heartbeat/{other}", 0.0, 0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        if self.naps == 5:
            return time.sleep(seconds)
        heard = distributed._store.add(self.key, 0)
        wait_until(lambda: distributed._store.add(self.key, 0) > heard, "a sign of life")
        self.now += 0.9 * distributed.TIMEOUT_SECONDS
        self.naps += 1
        if self.naps == 5:
            (self.directory / "enough").touch()
        return None


def _long_work(directory, worker, with_busy):
    """One rank works for 4.5 times the time-out of the other, which waits; how often the other has napped."""
    enough = directory / "enough"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "HEARTBEAT_SECONDS", 0.01)
        clock = _ClockOfTheWaiting(directory, worker)
        if distributed.rank() != worker:
            patch.setattr(distributed, "time", clock)
        elif with_busy:
            with distributed.busy():
                wait_until(enough.exists, "the end of the work")
        else:
            while not enough.exists():
                distributed.progress()
                time.sleep(0.01)
        distributed.wait_for_all("long work")
        return clock.naps


@pytest.mark.parametrize("with_busy", [False, True])
@pytest.mark.parametrize("worker", [0, 1])
def test_long_uneven_work_does_not_trip_the_timeout(tmp_path, worker, with_busy):
    naps = run_on_ranks(2, _long_work, tmp_path, worker, with_busy)
    assert naps[worker] == 0 and naps[1 - worker] == 5


def _silence(directory):
    """Rank 1 says nothing; what rank 0 says of it, for which time flies."""
    if distributed.rank() == 1:
        wait_until((directory / "given up").exists, "the end of the other's patience")
        distributed.wait_for_all("silence")
        return None
    now = iter(range(1000))
    clock = SimpleNamespace(monotonic=lambda: next(now) * 0.3 * distributed.TIMEOUT_SECONDS, sleep=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "time", clock)
        with pytest.raises(distributed.LostRankError) as error:
            distributed.wait_for_all("silence")
    (directory / "given up").touch()
    distributed._waits -= 1  # now wait again, for the other one too
    distributed.wait_for_all("silence")
    return str(error.value)


def test_a_silent_rank_trips_the_timeout(tmp_path):
    said, _ = run_on_ranks(2, _silence, tmp_path)
    assert "rank 0 of 2 could not finish silence" in said and "no heartbeat from rank 1" in said


_FAILS = """
import contextlib, sys
from pathlib import Path
from atlas.runtime import distributed
from atlas.command_line import parse_config
from atlas.runtime.session import session
from tests.patience import wait_until
config = parse_config(["--task", "qa", "--checkpoint_dir", sys.argv[1], "--closed_book", "--reader_model_type", "x",
    "--eval_data", __file__ if "__file__" in globals() else "Makefile"], program="evaluate")
with session(config.run, "train"):
    distributed.any_rank(False)
    ranks, me = sys.argv[2], str(distributed.rank())
    if me in ranks:
        if ranks == "01" and me == "1":
            with contextlib.suppress(RuntimeError):  # the store ends with rank 0
                distributed._store.wait(["main has failed"])
        raise eval(sys.argv[3])
    wait_until((Path(sys.argv[1]) / "rank 1 has ended").exists, "the end of rank 1")
    distributed.TIMEOUT_SECONDS = 0.5
    distributed.wait_for_all("the other rank")
"""


def _two_ranks(directory, code, *words):
    """Two ranks that run this code, each as a program of its own."""
    script, port = directory / "script.py", free_port()
    script.write_text(code)
    patient = {"ATLAS_TIMEOUT_SECONDS": str(HANG_SECONDS)}
    return [Program([script, *words], env=os.environ | rank_environment(rank, 2, port) | patient) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "error", "said"),
    [
        ("1", "ValueError('a bad row')", "[rank 1] a bad row"),
        ("01", "ValueError('a bad row')", "a bad row"),
        ("1", "ZeroDivisionError('a bug')", "[rank 1] ZeroDivisionError: a bug"),
    ],
)
def test_an_error_is_told_once_and_logged_where_it_happened(tmp_path, ranks, error, said):
    processes = _two_ranks(tmp_path, _FAILS, tmp_path, ranks, error)
    outputs = [processes[1].communicate(timeout=HANG_SECONDS)]
    (tmp_path / "rank 1 has ended").touch()
    outputs = [processes[0].communicate(timeout=HANG_SECONDS), *outputs]
    assert [process.returncode for process in processes] == [1, 1]
    screen = "".join(output + errors for output, errors in outputs)
    told = [line for line in screen.splitlines() if line.endswith(said)]
    assert len(told) == 1, screen
    log = tmp_path / "experiment_name" / "run.rank-1.log"
    assert "Traceback" in log.read_text() and said.removeprefix("[rank 1] ") in log.read_text()


_DIES = """
import os, sys
from atlas.runtime import distributed
import torch
distributed.start("cpu")
distributed.any_rank(False)
if distributed.rank() == 1:
    os._exit(9)
distributed.TIMEOUT_SECONDS = 0.5  # from now on; the start may take as long as it likes
try:
    if sys.argv[1] == "collective":
        distributed.sum_over_ranks(torch.ones(3))
    else:
        distributed.wait_for_all("embedding the corpus")
except distributed.LostRankError as error:
    print(error, flush=True)
    os._exit(3)
"""


@pytest.mark.parametrize("where", ["collective", "wait"])
def test_a_dead_rank_takes_the_others_down_with_a_message(tmp_path, where):
    processes = _two_ranks(tmp_path, _DIES, where)
    output, _ = processes[0].communicate(timeout=HANG_SECONDS)
    processes[1].communicate(timeout=HANG_SECONDS)
    assert [process.returncode for process in processes] == [3, 9]
    assert "rank 0 of 2 could not finish" in output and "another rank has ended" in output
