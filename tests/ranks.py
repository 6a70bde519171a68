"""Pools of real gloo ranks for the tests: started once, they take any picklable function again and again.

Starting a process group costs a second, so the pools are shared by the whole test run.
"""

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from tests.patience import HANG_SECONDS, free_port
from tests.programs import warm

SHARED = "ATLAS_TESTS_SHARED"  # the environment's name of a directory that all processes of these tests share

_pools: dict[int, "_Pool"] = {}


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` at the same time on each rank of a gloo group; the results in the order of the ranks.

    The function must be importable (top level of a test module). An exception on any rank is raised here.
    """
    try:
        return _pool(world_size).run(function, arguments)
    except Exception:
        _pools.pop(world_size).close()  # after an error the ranks may be out of step
        raise


def _pool(world_size: int) -> "_Pool":
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    return _pools[world_size]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would put into the environment of this rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _serve(rank: int, world_size: int, port: int, connection: Any) -> None:
    os.environ.update(rank_environment(rank, world_size, port), OMP_NUM_THREADS="1")
    os.environ["ATLAS_TIMEOUT_SECONDS"] = str(HANG_SECONDS)
    import torch

    from atlas.runtime import distributed

    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)
    distributed.start("cpu")
    while (job := connection.recv()) is not None:
        function, arguments = job
        try:
            connection.send((function(*arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
    distributed.stop()


class _Pool:
    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            mine, theirs = warm.Pipe()
            # not daemons: the ranks start worker processes of their own
            process = warm.Process(target=_serve, args=(rank, world_size, port, theirs))
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[int, tuple[Any, str | None]] = {}
        while len(answers) < len(self.pipes):
            failed = any(error for _, error in answers.values())
            open_pipes = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            # a rank that fails alone leaves the others waiting for it
            ready = wait(open_pipes, 10 if failed else 2 * HANG_SECONDS)
            for pipe in ready:
                answers[self.pipes.index(pipe)] = pipe.recv()
            if not ready:
                break
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(answers.items()) if error]
        silent = [f"rank {rank} did not answer" for rank in range(len(self.pipes)) if rank not in answers]
        if errors or silent:
            raise AssertionError("\n".join(errors + silent))
        return [answers[rank][0] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                process.terminate()
            pipe.close()
            process.join(10)


def close_all() -> None:
    """End all ranks."""
    while _pools:
        _pools.popitem()[1].close()


def scratch_directory() -> str:
    """A directory that all ranks of one call can share; it goes with the last test (tests/conftest.py)."""
    return tempfile.mkdtemp(prefix="atlas-test-")
