"""Pools of real gloo ranks for the tests: started once, they take any picklable function again and again.

Starting Python, torch and a process group costs seconds, so the pools are shared by the whole test run.
"""

import atexit
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

_pools: dict[int, "_Pool"] = {}


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` at the same time on each rank of a gloo group; the results in the order of the ranks.

    The function must be importable (top level of a test module). An exception on any rank is raised here.
    """
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    try:
        return _pools[world_size].run(function, arguments)
    except Exception:
        _pools.pop(world_size).close()  # after an error the ranks may be out of step
        raise


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    os.environ.update(rank_environment(rank, world_size, port), OMP_NUM_THREADS="1", ATLAS_TIMEOUT_SECONDS="60")
    import torch

    from atlas.runtime import distributed

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
        context, port = get_context("spawn"), _free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            # not daemons: the ranks start worker processes of their own
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs))
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(300):
                raise TimeoutError(f"rank {rank} did not answer within 300 s")
            answers.append(pipe.recv())
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for result, _ in answers]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                process.terminate()
            pipe.close()
            process.join(10)


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()


def scratch_directory() -> str:
    """A directory that all ranks of one call can share."""
    return tempfile.mkdtemp(prefix="atlas-test-")
