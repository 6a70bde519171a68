"""One thread per process: the machines that run the tests are small, and results do not depend on it."""

import gc
import logging
import multiprocessing.process
import multiprocessing.util
import os
import shutil
import signal
import socketserver
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from tests import programs, ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where Faiss takes more, they do not spin beside other tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as for a shell's background jobs, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

STARTERS = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (os, "fork"),
    (socketserver.BaseServer, "__init__"),
    (ranks, "_pool"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="record tests/trajectories again instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    """What tests and the programs they start leave behind goes with the last test, but for pytest's own directories."""
    if not hasattr(config, "workerinput"):  # the processes of xdist share what this one made
        multiprocessing.util.get_temp_dir()  # removed when this process ends, which is later than the tests
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        tempfile.tempdir = os.environ["TMPDIR"] = os.environ[ranks.SHARED] = tempfile.mkdtemp(prefix="atlas-tests-")
    else:
        programs.start_server_here()


def pytest_unconfigure(config: pytest.Config) -> None:
    ranks.close_all()
    if not hasattr(config, "workerinput") and ranks.SHARED in os.environ:
        shutil.rmtree(os.environ[ranks.SHARED], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: they take longest, and the others fill what is left of the time."""
    longest = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in longest)


def pytest_collection_finish() -> None:
    """What the imports left is there for ever: runs, which collect garbage at their end, need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A unit test, with its fixtures, starts no process and asks no ranks: those that do are marked."""
    with pytest.MonkeyPatch.context() as patch:
        if not (item.get_closest_marker("processes") or item.get_closest_marker("slow")):
            for owner, name in STARTERS:
                patch.setattr(owner, name, _refuse)
        return (yield)


def _refuse(*_: object, **__: object) -> None:
    pytest.fail("this test starts a process, a server or ranks: mark it with @pytest.mark.processes")


@pytest.fixture(autouse=True)
def fresh_log():
    """A run takes the log for itself; the next test gets it as it was."""
    log = logging.getLogger("atlas")
    log.propagate = True
    log.handlers.clear()
