"""Every collective of the project. With one process each is the identity, so callers need not distinguish.

Processes are started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment), or there is a single plain process
(none of them set). NCCL transfers tensors on a GPU, gloo transfers tensors on the CPU and Python objects.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# How long a rank waits for another one that sends nothing before it gives up with a message.
TIMEOUT_SECONDS = float(os.environ.get("ATLAS_TIMEOUT_SECONDS", "600"))
HEARTBEAT_SECONDS = 5.0

T = TypeVar("T")
_store: dist.Store | None = None  # also carries the heartbeats of `progress`
_last_heartbeat = 0.0
_waits = 0


class LostRankError(RuntimeError):
    """Another rank has ended or hangs, so this one cannot continue."""


def start(device_type: str) -> None:
    """Join the process group described by the environment; does nothing in a single plain process.

    Args:
        device_type: "cuda" adds NCCL for tensors on GPUs; gloo is used for everything else.

    Raises:
        ConnectionError: the environment is not complete, the port is in use, or a rank does not come.
    """
    global _store
    if "RANK" not in os.environ or dist.is_initialized():
        return
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        raise ConnectionError(
            f"rank {os.environ['RANK']} cannot meet the other ranks at {place} ({' '.join(str(error).split())})"
        ) from error
    store.set_timeout(timeout)
    # torchrun's store survives a restart: without a prefix, ranks would find the addresses of dead processes in it.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout
    )
    _store = dist.PrefixStore("progress", store)


def stop() -> None:
    """Leave the process group, if there is one."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank() -> int:
    """Number of this process in the job, from 0. Before `start` it is read from the environment."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, which selects the GPU; where nobody says it, that in the job."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def local_world_size() -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0 of the job, the one that writes the results and talks to the screen."""
    return rank() == 0


def shard_rows(n: int, rank: int, world_size: int) -> range:
    """The rows of n that a rank owns: contiguous, in the order of the ranks, sizes that differ by at most 1."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


@contextlib.contextmanager
def _lost_rank_errors(what: str) -> Iterator[None]:
    """Turn the errors that gloo and NCCL raise when a rank is lost into a LostRankError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {rank()} of {world_size()} could not finish {what}: another rank has ended or has not responded for "
            f"{TIMEOUT_SECONDS:.0f} s; look for the first error in the ranks' logs ({error})"
        ) from error


def all_gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The rows of all ranks, in rank order: `(n, …) -> ((Σn, …), [n of rank 0, n of rank 1, …])`.

    Each rank's n may differ and may be 0; the other dimensions, dtype and device type must agree.
    """
    if world_size() == 1:
        return rows, [len(rows)]
    sizes = gather_objects(len(rows))
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    with _lost_rank_errors("all_gather_rows"):
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of the ranks' tensors, in place; shapes, dtypes and device types must agree."""
    if world_size() > 1:
        with _lost_rank_errors("sum_over_ranks"):
            dist.all_reduce(tensor)
    return tensor


def broadcast_from_owners(tensors: Sequence[torch.Tensor], owners: Sequence[int]) -> None:
    """Overwrite each tensor with the values it has on the rank that owns it; all broadcasts run at the same time."""
    if world_size() > 1:
        with _lost_rank_errors("broadcast_from_owners"):
            broadcasts = [dist.broadcast(t, owner, async_op=True) for t, owner in zip(tensors, owners, strict=True)]
            for broadcast in broadcasts:
                broadcast.wait()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _lost_rank_errors("gather_objects"):
        dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on rank 0; an empty list elsewhere. For large values."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    with _lost_rank_errors("gather_on_main"):
        dist.gather_object(value, values)
    return values or []


def send_to_main(value: Any, owner: int) -> Any:
    """The value of the rank `owner`, on rank 0; None elsewhere. All ranks call it, but only these two communicate."""
    box = [value]
    if owner != 0 and rank() in (0, owner):
        with _lost_rank_errors("send_to_main"):
            dist.recv_object_list(box, src=owner) if is_main() else dist.send_object_list(box, dst=0)
    return box[0] if is_main() else None


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with _lost_rank_errors("from_main"):
        dist.broadcast_object_list(box)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank gets the same answer."""
    return bool(sum_over_ranks(torch.tensor(int(flag))).item())


def sum_statistics(statistics: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Add up `name -> (sum, weight)` over ranks, which may have different names."""
    totals: dict[str, tuple[float, float]] = {}
    for of_rank in gather_objects(statistics):
        for name, (value, weight) in of_rank.items():
            total_value, total_weight = totals.get(name, (0.0, 0.0))
            totals[name] = (total_value + value, total_weight + weight)
    return totals


def progress() -> None:
    """Send a heartbeat at most every few seconds. Call it often inside long work between collectives."""
    global _last_heartbeat
    if _store is not None and time.monotonic() - _last_heartbeat > HEARTBEAT_SECONDS / 2:
        _last_heartbeat = time.monotonic()
        _store.add(f"heartbeat/{rank()}", 1)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep sending heartbeats from a thread while the block does long work that cannot call `progress` itself."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            progress()

    thread = threading.Thread(target=beat, daemon=True)
    if _store is not None:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if _store is not None:
            thread.join()


def wait_for_all(what: str) -> None:
    """A barrier that ranks may reach hours apart, as long as those still working call `progress`.

    An ordinary collective would time out when one rank has much more to embed or write than another.

    Args:
        what: the name of the work, for the error message.

    Raises:
        LostRankError: a rank has neither arrived nor made progress for `TIMEOUT_SECONDS`.
    """
    global _waits
    if _store is None:
        return
    _waits += 1
    key = f"arrived/{_waits}"
    with _lost_rank_errors(what):
        _store.set(f"{key}/{rank()}", "here")
        missing = list(range(world_size()))
        last_beats, last_change, pause = [0] * len(missing), time.monotonic(), 0.001
        while missing := [r for r in missing if not _store.check([f"{key}/{r}"])]:
            beats = [_store.add(f"heartbeat/{r}", 0) for r in missing]
            if beats != last_beats:
                last_beats, last_change = beats, time.monotonic()
            if time.monotonic() - last_change > TIMEOUT_SECONDS:
                raise RuntimeError(f"no heartbeat from rank {', '.join(map(str, missing))}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    any_rank(False)  # no rank leaves, which may end the store, before all ranks know that all have arrived


@contextlib.contextmanager
def main_first(what: str) -> Iterator[None]:
    """Let rank 0 run the block first (to write a cache, for example), then the other ranks the same block."""
    if not is_main():
        wait_for_all(what)
    with busy():
        yield
    if is_main():
        wait_for_all(what)


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error: its own, or else that of the first rank that has one.

    Otherwise a rank that stops alone (because of a bad line in its share of the data) would leave the others waiting.
    """
    errors = gather_objects(error)
    first = next((e for e in errors if e is not None), None)
    if error is not None:
        raise error
    if first is not None:
        raise first


def on_every_rank(what: str, work: Callable[[], T]) -> T:
    """Do long work, without collectives, on every rank; a ValueError or OSError of one ends all."""
    result = error = None
    with busy():
        try:
            result = work()
        except (ValueError, OSError) as found:
            error = found
    wait_for_all(what)
    raise_on_all_ranks(error)
    return result


def on_main(what: str, work: Callable[[], T]) -> T:
    """Do long work, without collectives, on rank 0; every rank gets the result, or the error."""
    return from_main(on_every_rank(what, lambda: work() if is_main() else None))


@contextlib.contextmanager
def held_on_main(what: str, context: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Enter a context, such as a lock, on rank 0 for the time of the block; an error of it reaches every rank."""
    with contextlib.ExitStack() as stack:
        on_main(what, lambda: stack.enter_context(context()) and None)
        yield


def main_failed_too(error: Exception, within_seconds: float = 3.0) -> bool:
    """Whether rank 0 reports an error of its own. Called by every rank that is about to end because of an error."""
    if is_main():
        if _store is not None:
            _store.set("main has failed", "")
        return False
    until = time.monotonic() + within_seconds
    try:
        while _store is not None and time.monotonic() < until:
            if _store.check(["main has failed"]):
                return True
            time.sleep(0.05)
    except RuntimeError:  # the store has ended with rank 0, which has reported its error or has been killed
        return not isinstance(error, LostRankError)
    return False
