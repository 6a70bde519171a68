"""What a user sees during a run: run.log and the screen, progress bars, means of statistics."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from tqdm import tqdm

from atlas.files.disk import writing
from atlas.runtime import distributed

log = logging.getLogger("atlas")
T = TypeVar("T")
# tqdm's own lock is shared with forked processes: one that is killed while it holds the lock stops all others
tqdm.set_lock(threading.RLock())


class _Screen(logging.Handler):
    """Prints above a progress bar, not through it. Tracebacks are left to the log file."""

    def emit(self, record: logging.LogRecord) -> None:
        shown = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        try:
            tqdm.write(self.format(shown), file=stream)
            stream.flush()
        except OSError as error:  # nobody reads the screen any more: `| head`, or the terminal has gone
            discard(stream)
            log.warning("The screen cannot be written to (%s): from here on, only this file has the log", error)


class _File(logging.FileHandler):
    """Appends to a file. Lines that cannot be written (the disk is full) are missing, which is said once."""

    said = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.place = str(path)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self.said:
            self.said = True
            say(f"lines of the log are missing in {self.place}: {sys.exc_info()[1]}")
        stream, self.stream = self.stream, None  # the next line opens the file again
        if stream is not None:
            distributed.log_stacks(sys.stderr)  # they cannot go to a closed file
            with contextlib.suppress(OSError):  # what is lost has been said
                stream.close()


def say(sentence: str) -> None:
    """Print to the screen alone, for what the log cannot take; where that is full as well, nobody reads it."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def open_standard_streams() -> None:
    """Point standard input, output and error that the caller has closed (`>&-`) at nothing.

    Otherwise the next file that is opened takes their place, and gets what libraries print.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (for good)


def discard(stream: TextIO) -> None:
    """Point a stream that nobody reads at nothing, so that no other write to it fails, nor the last one at the end."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def start_log(directory: Path | None) -> None:
    """Rank 0 logs to the screen and to run.log, every other rank to run.rank-N.log. Files are appended to.

    Raises:
        OSError: the file cannot be written.
    """
    handlers: list[logging.Handler] = [_Screen() if distributed.is_main() else logging.NullHandler()]
    if directory is not None:
        name = "run.log" if distributed.is_main() else f"run.rank-{distributed.rank()}.log"
        with writing(directory / name):
            directory.mkdir(parents=True, exist_ok=True)
            handlers.append(_File(directory / name))
        distributed.log_stacks(handlers[-1].stream)
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%m/%d/%Y %H:%M:%S"))
        log.addHandler(handler)


def report_error(error: Exception, message: str) -> None:
    """Print one sentence, and log the traceback of the current exception.

    Rank 0 prints for all ranks: another rank prints its error only when rank 0 has none of its own.
    """
    log.error("%s", message, exc_info=True)
    reported = distributed.main_failed_too(error)  # on rank 0 this tells the others
    if not distributed.is_main() and not reported:
        print(f"[rank {distributed.rank()}] {message}", file=sys.stderr, flush=True)


class _Bar(tqdm):
    """Every update also tells the other ranks that this one is alive."""

    def update(self, n: float = 1) -> bool | None:
        distributed.progress()
        return super().update(n)


def progress_bar(what: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar on rank 0's terminal, invisible everywhere else; each `update` of it is a heartbeat on every rank."""
    hidden = not distributed.is_main() or not sys.stderr.isatty()
    return _Bar(total=total, desc=what, unit=f" {unit}", initial=initial, disable=hidden, dynamic_ncols=True)


def with_progress(items: Iterable[Any], what: str, total: int, unit: str) -> Iterator[Any]:
    """The items, with a progress bar."""
    with progress_bar(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def read_shares(what: str, n: int, unit: str, read: Callable[[range, Callable[[int], object]], T]) -> T:
    """Let each rank read its share of n rows, with a bar; an error on any rank is raised on all. Collective.

    Args:
        read: gets this rank's rows, and a function to call with the number of rows read since the last call.
    """
    rows = distributed.shard_rows(n, distributed.rank(), distributed.world_size())
    with progress_bar(what, len(rows), unit) as bar:
        return distributed.on_every_rank(what, lambda: read(rows, bar.update))


class Means:
    """Weighted means of named numbers since the last report. Tensors stay on their device until then."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Any, Any]]] = {}

    def add(self, name: str, value: torch.Tensor | float, weight: torch.Tensor | float = 1.0) -> None:
        """`value` and `weight`: numbers, or scalar tensors, which are not waited for."""
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self._values.setdefault(name, []).append((value, weight))

    def report(self) -> dict[str, float]:
        """The means over all ranks since the last report. Collective."""
        sums = {
            name: (sum(float(value * weight) for value, weight in pairs), sum(float(weight) for _, weight in pairs))
            for name, pairs in self._values.items()
        }
        self._values = {}
        totals = distributed.sum_statistics(sums)
        return {name: value / weight for name, (value, weight) in sorted(totals.items()) if weight}


def training_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """What run.log says after a step: `step 20/60 | loss 2.413 (reader 1.902, retriever 0.511) | lr 4.00e-05 | ...`.

    Args:
        values: by the names that metrics.jsonl has for them.
    """

    def listed(prefix: str, names: Iterable[str], ending: str = "") -> str:
        found = {name: values.get(f"{prefix}/{name}{ending}") for name in names}
        return ", ".join(f"{name} {three_decimals(value)}" for name, value in found.items() if value is not None)

    parts = [f"step {step:>{len(str(total))}}/{total}", f"loss {three_decimals(values['loss/train_loss'])}"]
    if "loss/retriever_loss" in values:
        parts[-1] += f" ({listed('loss', ('reader', 'retriever'), '_loss')})"
    if correlations := listed("corr", ("attention", "value_norm", "adist")):
        parts.append(f"correlation {correlations}")
    parts.append(f"lr {values['lr']:.2e}")
    parts.append(f"{three_decimals(values['runtime/train_step'])} s/step ({listed('runtime', ('retrieve',))})")
    parts.append(f"{_thousands(values['tokens_per_second'])} tokens/s")
    parts.append(f"{values['peak_memory_gib']:.2f} GiB")
    if values["skipped_steps"]:
        parts.append(f"{values['skipped_steps']} skipped")
    return " | ".join(parts)


def three_decimals(value: float) -> str:
    """Three decimals; where all are zeros, one digit with its exponent."""
    return f"{value:.0e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


def _thousands(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
