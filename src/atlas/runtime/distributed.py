"""Every collective of the project. With one process each of them is the identity, so callers never ask.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment) or as one plain process (none of them).
Tensors travel through NCCL when they lie on a GPU and through gloo when they lie on the CPU; Python objects always
through gloo.
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

# How long a rank waits for a silent other one before it gives up with a message.
TIMEOUT_SECONDS = float(os.environ.get("ATLAS_TIMEOUT_SECONDS", "600"))
HEARTBEAT_SECONDS = 5.0

T = TypeVar("T")
_store: dist.Store | None = None  # also carries the heartbeats of `progress`
_last_heartbeat = 0.0
_waits = 0


class LostRankError(RuntimeError):
    """Another rank ended or fell silent, so this one cannot go on."""


def start(device_type: str) -> None:
    """Join the process group described by the environment; nothing happens in one plain process.

    Args:
        device_type: "cuda" adds NCCL for tensors on GPUs; everything else goes through gloo.
    """
    global _store
    if "RANK" not in os.environ or dist.is_initialized():
        return
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # torchrun's store outlives a restart: ranks would find the addresses of the dead in it
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
    """Number of this process in the job, from 0. Before `start`, what the environment says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine: picks the GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


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
    """gloo and NCCL report a dead peer in their own words: say in ours what it means."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {rank()} of {world_size()} could not finish {what}: another rank has ended or has been silent for "
            f"{TIMEOUT_SECONDS:.0f} s; look for the first error in the ranks' logs ({error})"
        ) from error


def all_gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The rows of all ranks, in the order of the ranks: `(n, …) -> ((Σn, …), [n of rank 0, n of rank 1, …])`.

    The ranks' n may differ and be 0; the other dimensions, the dtype and the kind of device must agree.
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
    """The element-wise sum of the ranks' tensors, in place; shapes, dtypes and kinds of device must agree."""
    if world_size() > 1:
        with _lost_rank_errors("sum_over_ranks"):
            dist.all_reduce(tensor)
    return tensor


def broadcast_from_owners(tensors: Sequence[torch.Tensor], owners: Sequence[int]) -> None:
    """Overwrite each tensor with what its owner, a rank, has in it; all are sent at the same time."""
    if world_size() > 1:
        with _lost_rank_errors("broadcast_from_owners"):
            sent = [dist.broadcast(t, owner, async_op=True) for t, owner in zip(tensors, owners, strict=True)]
            for work in sent:
                work.wait()


def gather_objects(value: Any) -> list[Any]:
    """What every rank has to say, on every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _lost_rank_errors("gather_objects"):
        dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any]:
    """What every rank has to say, on rank 0; an empty list elsewhere. For what is too much for every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    with _lost_rank_errors("gather_on_main"):
        dist.gather_object(value, values)
    return values or []


def send_to_main(value: Any, owner: int) -> Any:
    """The value that the rank `owner` has, on rank 0; None elsewhere. Every rank calls, only these two talk."""
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
    """Whether the flag is set on any rank: the same answer everywhere."""
    return bool(sum_over_ranks(torch.tensor(int(flag))).item())


def sum_statistics(statistics: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Add up `name -> (sum, weight)` over ranks; ranks may bring different names."""
    total: dict[str, tuple[float, float]] = {}
    for part in gather_objects(statistics):
        for name, (value, weight) in part.items():
            seen_value, seen_weight = total.get(name, (0.0, 0.0))
            total[name] = (seen_value + value, seen_weight + weight)
    return total


def progress() -> None:
    """Say that this rank is alive: to be called inside long work between collectives, as often as is convenient."""
    global _last_heartbeat
    if _store is not None and time.monotonic() - _last_heartbeat > HEARTBEAT_SECONDS / 2:
        _last_heartbeat = time.monotonic()
        _store.add(f"heartbeat/{rank()}", 1)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep saying that this rank is alive while it does one long thing that cannot call `progress` itself."""
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
    """A barrier that may be reached hours apart, as long as the ranks still at work call `progress`.

    An ordinary collective would run into its time-out when one rank embeds (or writes) much more than another.

    Args:
        what: names the work in the message.

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
        heard, heard_at, pause = [0] * len(missing), time.monotonic(), 0.001
        while missing := [r for r in missing if not _store.check([f"{key}/{r}"])]:
            beats = [_store.add(f"heartbeat/{r}", 0) for r in missing]
            if beats != heard:
                heard, heard_at = beats, time.monotonic()
            if time.monotonic() - heard_at > TIMEOUT_SECONDS:
                raise RuntimeError(f"no sign of life from rank {', '.join(map(str, missing))}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    any_rank(False)  # nobody leaves, and perhaps ends the store, before all have seen that all are here


@contextlib.contextmanager
def main_first(what: str) -> Iterator[None]:
    """Let rank 0 do the work of the block (say, write a cache) before the others go through the same block."""
    if not is_main():
        wait_for_all(what)
    with busy():
        yield
    if is_main():
        wait_for_all(what)


def raise_on_all_ranks(error: Exception | None) -> None:
    """End every rank when any of them has an error to report: its own error, or the first rank's that has one.

    Without it, a rank that stops alone (a bad line in its share of the data) leaves the others waiting.
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


def main_failed_too(error: Exception, within_seconds: float = 3.0) -> bool:
    """Whether rank 0 has met with an error of its own and tells it: asked by ranks that are about to end."""
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
    except RuntimeError:  # the store has gone with rank 0, which has told its error, or has been killed
        return not isinstance(error, LostRankError)
    return False
