"""Every collective of the project. With one process each is the identity, so callers need not distinguish.

Processes are started by torchrun or by SLURM's srun, which say so in the environment (`launch.py`), or there is one
plain process. NCCL transfers tensors on a GPU, gloo tensors on the CPU; values travel as `messages.py` writes them.
"""

import contextlib
import faulthandler
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist

from atlas.runtime.launch import DEFAULT_TIMEOUT_SECONDS, Launch, read_launch, read_timeout, share_of_cores
from atlas.runtime.messages import pack, pack_error, unpack, unpack_error

# How long a rank waits for another one that sends nothing before it gives up with a message.
TIMEOUT_SECONDS = DEFAULT_TIMEOUT_SECONDS
HEARTBEAT_SECONDS = 5.0
NAME_SECONDS = 60.0  # until the name of a machine that has just started is known everywhere

T = TypeVar("T")
_store: dist.Store | None = None  # also carries the heartbeats of `progress`
_launch_id: str | None = None
_last_heartbeat = 0.0
_waits = 0
_stacks: TextIO | None = None  # where the stack of this rank goes if it gives no sign of life


class LostRankError(RuntimeError):
    """Another rank has ended or hangs, so this one cannot continue."""


def launched() -> Launch | None:
    """What the launcher says about this process; None for a single plain one. Raises: ValueError."""
    return read_launch(os.environ)


def start(device_type: str) -> None:
    """Join the process group described by the environment; does nothing in a single plain process.

    Args:
        device_type: "cuda" adds NCCL for tensors on GPUs; gloo is used for everything else.

    Raises:
        ValueError: the environment is not complete.
        ConnectionError: the host is unknown, the port is in use, or a rank does not come.
    """
    global _store, TIMEOUT_SECONDS
    launch = launched()
    if launch is None or dist.is_initialized():
        return
    TIMEOUT_SECONDS = read_timeout(os.environ)
    try:
        _wait_for_name(launch.address)
        store = _join(launch, device_type)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConnectionError(
            f"rank {launch.rank} of {launch.world_size} cannot meet the other ranks at {launch.address}:{launch.port} "
            f"({_reason(error)}): look at what the other ranks say; MASTER_ADDR and MASTER_PORT name the place"
        ) from error
    _store = dist.PrefixStore("progress", store)


def _join(launch: Launch, device_type: str) -> dist.Store:
    global _launch_id
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port))
    place = f"env://?rank={launch.rank}&world_size={launch.world_size}"
    store, rank, world_size = next(dist.rendezvous(place, timeout=timeout))
    store.set_timeout(timeout)
    _launch_id = store.compare_set("launch", "", uuid.uuid4().hex).decode()
    # torchrun's store survives a restart: without a prefix, ranks would find the addresses of dead processes in it.
    store = dist.PrefixStore(_name_of_start(store, rank, world_size), store)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout
    )
    return store


def _name_of_start(store: dist.Store, rank: int, world_size: int) -> str:
    """The same new name on all ranks, whatever earlier starts have left in the store.

    torchrun's own count of restarts is another one on each machine. Every rank leaves a name that nobody has had. Rank
    0 publishes all that are there, its own first, until each rank has found its own among them.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + TIMEOUT_SECONDS
    store.set(f"name of {rank}", own)
    found = [f"{own} found by {other}" for other in range(1, world_size)]
    while True:
        if rank == 0:
            names = store.multi_get([f"name of {other}" for other in range(world_size)])
            store.set("names", b",".join(names))
            if not found or store.check(found):
                return own
        elif store.check(["names"]):
            names = store.get("names").decode().split(",")
            if own in names:
                store.set(f"{names[0]} found by {rank}", "")
                return names[0]
        if time.monotonic() > end:
            raise RuntimeError(f"{'not all ranks have' if rank == 0 else 'rank 0 has not'} come in {TIMEOUT_SECONDS} s")
        time.sleep(0.05)


def _wait_for_name(host: str) -> None:
    """Return once the host's name is known. torch would ask until the time is up, and print stacks of its own."""
    end = time.monotonic() + min(NAME_SECONDS, TIMEOUT_SECONDS)
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                raise OSError(f"no machine of the name {host} is known: {error}") from error
        time.sleep(0.5)


def stop() -> None:
    """Leave the process group, if there is one."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None
    log_stacks(None)


def rank() -> int:
    """Number of this process in the job, from 0. Before `start` it is read from the environment."""
    if dist.is_initialized():
        return dist.get_rank()
    launch = launched()
    return launch.rank if launch else 0


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine; where nobody says it, that in the job."""
    launch = launched()
    return launch.local_rank if launch else 0


def sees_own_gpus() -> bool:
    """Whether the launcher has hidden the GPUs of the other processes on this machine."""
    launch = launched()
    return launch is not None and launch.sees_own_gpus


def cores() -> int:
    """The cores that this process has for itself, at least one."""
    return share_of_cores(launched())


def is_main() -> bool:
    """Whether this is rank 0 of the job, the one that writes the results and talks to the screen."""
    return rank() == 0


def shard_rows(n: int, rank: int, world_size: int) -> range:
    """The rows of n that a rank owns: contiguous, in the order of the ranks, sizes that differ by at most 1."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def log_stacks(file: TextIO | None) -> None:
    """Where the stack of this rank goes once it neither works nor waits for half of `TIMEOUT_SECONDS`."""
    global _stacks
    faulthandler.cancel_dump_traceback_later()
    _stacks = file
    _watch()


def _watch() -> None:
    """This rank has given a sign of life: from now on it is late if it gives no other one."""
    if _store is not None and _stacks is not None:
        faulthandler.dump_traceback_later(TIMEOUT_SECONDS / 2, file=_stacks)


@contextlib.contextmanager
def _lost_rank_errors(what: str) -> Iterator[None]:
    """Turn the errors that gloo and NCCL raise when a rank is lost into a LostRankError that says what to do."""
    faulthandler.cancel_dump_traceback_later()  # whoever waits is not the late one
    try:
        yield
    except RuntimeError as error:
        raise lost_rank(what, error) from error
    _watch()


def lost_rank(what: str, error: Exception) -> LostRankError:
    """What a rank says that could not finish something because of another one."""
    return LostRankError(
        f"rank {rank()} of {world_size()} could not finish {what}: another rank has ended or has not responded for "
        f"{TIMEOUT_SECONDS:.0f} s; look for the first error in the ranks' logs, where a late one leaves its stack "
        f"({_reason(error)})"
    )


def _reason(error: Exception) -> str:
    """What torch says in one line, without its stack and its advice."""
    return " ".join(re.split("Exception raised from|This is typically", str(error))[0].split())


def is_of_lost_rank(error: Exception) -> bool:
    """Whether torch raised this because another rank is lost, in a collective of its own such as those of backward."""
    said = re.search(r"gloo/|ncclRemoteError|NCCL communicator|Connection (closed|reset) by peer", str(error))
    return world_size() > 1 and (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(said)))


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


def slurm_job() -> str | None:
    """The number of the SLURM job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


def is_requeued() -> bool:
    """Whether SLURM has started this process's job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def launch_id() -> str | None:
    """What no other launch of the ranks is called; torchrun's restarts are of one launch. None: a plain process."""
    return _launch_id


def gather_alike(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order, which have n each: (n, …) -> (W·n, …).

    Gradients flow to the rank that a row is from, which gets the sum of those of all ranks.
    """
    return rows if world_size() == 1 else _Gathering.apply(rows)


class _Gathering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        with _lost_rank_errors("gather_alike"):
            dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(gradient.contiguous()).chunk(world_size())[rank()]


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


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank. Values: what `messages.pack` takes."""
    if world_size() == 1:
        return [value]
    with _lost_rank_errors("gather_objects"):
        padded, sizes = _padded(value)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return [_read(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def gather_on_main(value: T) -> list[T]:
    """The values of all ranks, in rank order, on rank 0; an empty list elsewhere. For large values."""
    if world_size() == 1:
        return [value]
    with _lost_rank_errors("gather_on_main"):
        padded, sizes = _padded(value)
        parts = [torch.empty_like(padded) for _ in sizes] if is_main() else None
        dist.gather(padded, parts)
    return [_read(part[:size]) for part, size in zip(parts or [], sizes, strict=False)]


def send_to_main(value: T, owner: int) -> T | None:
    """The value of the rank `owner`, on rank 0; None elsewhere. All ranks call it, but only these two communicate."""
    if owner == 0:
        return value if is_main() else None
    with _lost_rank_errors("send_to_main"):
        if rank() == owner:
            content = _written(value)
            dist.send(torch.tensor([len(content)]), dst=0)
            dist.send(content, dst=0)
        elif is_main():
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, src=owner)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, src=owner)
            return _read(content)
    return None


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    with _lost_rank_errors("from_main"):
        content = _written(value) if is_main() else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0)
        content = content if is_main() else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0)
    return value if is_main() else _read(content)


def _written(value: Any) -> torch.Tensor:  # (bytes,) uint8
    return torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)


def _read(content: torch.Tensor) -> Any:  # (bytes,) uint8
    return unpack(memoryview(content.numpy()))


def _padded(value: Any) -> tuple[torch.Tensor, list[int]]:
    """A value's bytes, padded to the longest of all ranks, and how many each rank has. Collective."""
    content = _written(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(content)]))
    sizes = torch.cat(lengths).tolist()
    return torch.nn.functional.pad(content, (0, max(sizes) - len(content))), sizes


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
        with _lost_rank_errors("telling the others that it works"):
            _store.add(f"heartbeat/{rank()}", 1)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep sending heartbeats from a thread while the block does long work that cannot call `progress` itself."""
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(LostRankError):  # the next collective says so
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
    first = next((e for e in gather_objects(pack_error(error)) if e is not None), None)
    if error is not None:
        raise error
    if first is not None:
        raise unpack_error(first)


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

        def enter() -> None:
            stack.enter_context(context())

        on_main(what, enter)
        yield


def main_failed_too(error: Exception, within_seconds: float = 3.0) -> bool:
    """Whether rank 0 reports an error of its own. Called by every rank that is about to end because of an error."""
    if is_main():
        with contextlib.suppress(RuntimeError):  # the store has ended with torchrun, and the other ranks with it
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
