"""The collectives on real groups of 2 and 3 ranks, and as the identity in one process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from atlas.runtime import distributed
from tests.ranks import _free_port, rank_environment, run_on_ranks

ROOT = Path(__file__).resolve().parent.parent


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


def _main_goes_first(path):
    with distributed.main_first("the order"):
        if distributed.is_main():
            time.sleep(0.3)
        with open(path, "a") as f:
            f.write(str(distributed.rank()))
    distributed.wait_for_all("the order")
    return Path(path).read_text()


def test_main_first(tmp_path):
    order = run_on_ranks(3, _main_goes_first, str(tmp_path / "order"))[1]
    assert order[0] == "0" and sorted(order) == ["0", "1", "2"]


def _one_rank_fails():
    error = ValueError("bad line") if distributed.rank() == 1 else None
    try:
        distributed.raise_anywhere(error)
    except ValueError as seen:
        return str(seen)
    return None


def test_an_error_of_one_rank_ends_all():
    assert run_on_ranks(2, _one_rank_fails) == ["bad line", "bad line"]


def _work_longer_than_the_timeout():
    distributed.TIMEOUT_SECONDS, distributed.HEARTBEAT_SECONDS = 1.0, 0.1
    if distributed.rank() == 1:
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            distributed.progress()
            time.sleep(0.05)
    distributed.wait_for_all("uneven work")
    distributed.TIMEOUT_SECONDS, distributed.HEARTBEAT_SECONDS = 60.0, 5.0
    return "done"


def test_long_uneven_work_does_not_trip_the_timeout():
    assert run_on_ranks(2, _work_longer_than_the_timeout) == ["done", "done"]


def _one_long_thing():
    distributed.TIMEOUT_SECONDS, distributed.HEARTBEAT_SECONDS = 1.0, 0.1
    if distributed.rank() == 0:
        with distributed.busy():
            time.sleep(2.5)
    distributed.wait_for_all("one long thing")
    distributed.TIMEOUT_SECONDS, distributed.HEARTBEAT_SECONDS = 60.0, 5.0
    return "done"


def test_one_long_thing_does_not_trip_the_timeout_either():
    assert run_on_ranks(2, _one_long_thing) == ["done", "done"]


_FAILS = """
import sys
from pathlib import Path
from atlas.runtime import distributed
from atlas.config import parse_config
from atlas.runtime.session import session
config = parse_config(["--task", "qa", "--checkpoint_dir", sys.argv[1], "--closed_book", "--reader_model_type", "x",
    "--eval_data", __file__ if "__file__" in globals() else "Makefile"], program="evaluate")
with session(config.run):
    distributed.any_rank(False)
    if str(distributed.rank()) in sys.argv[2]:
        raise eval(sys.argv[3])
    distributed.wait_for_all("the other rank")
"""


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
    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _FAILS, str(tmp_path), ranks, error],
            env={**os.environ, **rank_environment(rank, 2, port), "ATLAS_TIMEOUT_SECONDS": "6"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    screen = "".join(output + errors for output, errors in outputs)
    told = [line for line in screen.splitlines() if line.endswith(said)]
    assert len(told) == 1, screen
    log = tmp_path / "experiment_name" / "run.rank-1.log"
    assert "Traceback" in log.read_text() and said.removeprefix("[rank 1] ") in log.read_text()


_DIES = """
import os, sys, time
from atlas.runtime import distributed
import torch
distributed.start("cpu")
distributed.any_rank(False)
if distributed.rank() == 1:
    os._exit(9)
try:
    if sys.argv[1] == "collective":
        distributed.sum_over_ranks(torch.ones(3))
    else:
        distributed.wait_for_all("embedding the corpus")
except distributed.LostRankError as error:
    print(error)
    os._exit(3)
"""


@pytest.mark.parametrize("where", ["collective", "wait"])
def test_a_dead_rank_takes_the_others_down_with_a_message(where):
    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _DIES, where],
            env={**os.environ, **rank_environment(rank, 2, port), "ATLAS_TIMEOUT_SECONDS": "4"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 3 and processes[1].wait(60) == 9
    assert "rank 0 of 2 could not finish" in output and "another rank has ended" in output
