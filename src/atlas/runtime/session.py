"""The start and the end of a run: ranks, log, seeds, one sentence for a user's mistake, exit status."""

import contextlib
import gc
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from atlas import config
from atlas.files.disk import FullDiskError, writing
from atlas.files.lock import holding
from atlas.options import write_options
from atlas.report.page import NAME, write_report
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.reporting import Reports
from atlas.runtime.tracking import log, open_standard_streams, report_error, start_log
from atlas.runtime.verification import Verification

ECHO_SECONDS = 10.0
CHEAP_RESULTS = 1 << 24  # bytes that are read within seconds: a run that is asked to stop may have no more time


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A run that was asked to stop has saved a checkpoint and ends."""


@dataclass(frozen=True)
class Session:
    """What is there once while a script runs."""

    settings: config.Run
    device: torch.device
    directory: Path | None  # `{checkpoint_dir}/{name}`: log, results, checkpoints; None: nothing is written
    reports: Reports
    verification: Verification
    locks: contextlib.ExitStack  # let go of when the run ends

    def hold(self, lock: Callable[[], AbstractContextManager[object]]) -> None:
        """Hold a lock on rank 0 until the run ends. Collective. Raises: what taking it raises, on every rank."""
        self.locks.enter_context(distributed.held_on_main("locking", lock))

    def write_options(self, name: str, heading: str, text: str) -> None:
        """Write a file of all flags into the directory, on rank 0; those of earlier starts are kept."""
        if distributed.is_main():
            with writing(self.directory / name):
                write_options(self.directory / name, heading, text)

    def log_places(self, step: int) -> None:
        """The last line of a run, after its report: where to look. Collective. Raises: as `Verification.finish`."""
        self.verification.finish()
        places = [f"log in {self.directory / 'run.log'}"]
        places += [f"report in {page}" for page in _write_report(self.directory)]
        latest = self.directory / "checkpoint" / "latest"
        if self.settings.train_data and latest.exists():
            places.append(f"model in {self.directory / 'checkpoint' / latest.resolve().name}")
        if self.settings.write_results:
            names = map(config.evaluation_name, self.settings.eval_data)
            places += [f"results in {self.directory / f'{name}-step-{step}.jsonl'}" for name in names]
        log.info("Done: %s", ", ".join(places))


@contextlib.contextmanager
def library_session(settings: config.Run) -> Iterator[Session]:
    """For a program that calls this library: it says what to compute on, and leaves log, signals and files alone.

    Raises:
        ValueError: as `devices.pick_device`; a file that was opened in the block is damaged.
    """
    device = devices.pick_device(settings.device, distributed.local_rank(), sees_own_gpus=distributed.sees_own_gpus())
    with contextlib.ExitStack() as locks:
        verification = Verification(settings.verify)
        yield Session(settings, device, None, Reports(None), verification, locks)
        verification.finish()


@contextlib.contextmanager
def session(settings: config.Run, work: str) -> Iterator[Session]:
    """Join the other ranks, start the log, and end the process as users and schedulers expect.

    ValueError, OSError, a full GPU and a lost rank are the user's to fix: they end the run with one sentence and status
    1. Anything else is a bug and shows its traceback. Tracebacks of both kinds are in the rank's log. A rank that ends
    with an error does not leave the process group, because that could wait for the other ranks for ever. `Stopped` ends
    the run with status 143, which tells schedulers and torchrun to start it again; Ctrl-C ends it with status 130 and
    two lines.

    Args:
        work: "train" or "evaluate". A run's directory is for one process group at a time that does the same: another
            one is refused before it writes anything there.
    """
    directory = Path(settings.checkpoint_dir) / settings.name
    stopped, locks = False, contextlib.ExitStack()
    _start_screen()
    try:
        with _interruptible():
            device = _join(settings, directory, work, locks)
            with Reports(directory, settings.reporters) as reports:
                try:
                    verification = Verification(settings.verify)
                    yield Session(settings, device, directory, reports, verification, locks)
                    verification.finish()
                except Stopped as stop:
                    stopped = True
                    traceback.clear_frames(stop.__traceback__)
                    _write_report(directory, most_bytes=CHEAP_RESULTS)
            distributed.wait_for_all("the end of the run")
    except KeyboardInterrupt:
        _say_how_to_resume(settings, directory)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if distributed.is_of_lost_rank(error):
            error = distributed.lost_rank("an exchange with the others", error)
        if is_understood(error) or isinstance(error, distributed.LostRankError):
            report_error(error, sentence_of(error))
            sys.exit(1)
        report_error(error, f"{type(error).__name__}: {error}")
        raise
    finally:
        locks.close()
    # A DDP model that outlives the process group may hang in its destructor: gloo's threads wait for Python's lock.
    gc.collect()
    distributed.stop()
    if stopped:
        sys.exit(128 + signal.SIGTERM)


def _write_report(directory: Path, most_bytes: float = math.inf) -> list[Path]:
    """Write report.html on rank 0, and say so in one sentence if that fails. Collective; its path, or nothing.

    Args:
        most_bytes: of the result files; if there are more, no report is written.
    """

    def write() -> list[Path]:
        try:
            if sum(file.stat().st_size for file in directory.glob("*-step-*.jsonl")) > most_bytes:
                return []
            return write_report(directory)[:1]
        except Exception as error:  # the run has done its work, whatever is wrong with its report
            understood = isinstance(error, ValueError | OSError)
            log.warning("%s is not written: %s", directory / NAME, sentence_of(error), exc_info=not understood)
            return []

    return distributed.on_main("writing the report", write)


def _start_screen() -> None:
    """Make it possible to say something before there is a log. Exits with status 1 when the ranks are not set up."""
    open_standard_streams()
    try:
        start_log(None)
    except ValueError as error:  # nobody knows which rank this is
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)


def _join(settings: config.Run, directory: Path, work: str, locks: contextlib.ExitStack) -> torch.device:
    """Join the other ranks, lock the directory and start the log. Raises: ValueError, OSError."""
    device = devices.pick_device(settings.device, distributed.local_rank(), sees_own_gpus=distributed.sees_own_gpus())
    distributed.start(device.type)
    try:
        locks.enter_context(distributed.held_on_main("locking the run", partial(_alone, directory, work)))
        start_log(directory)
    except FullDiskError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"--checkpoint_dir {settings.checkpoint_dir}: nothing can be written to {directory} ({reason}): give a "
            "directory, new or of earlier runs, that you may write to"
        ) from error
    transformers_logging.set_verbosity_error()  # its advice is about its own trainer
    transformers_logging.disable_progress_bar()
    devices.seed_everything(settings.seed)
    return device


def _alone(directory: Path, work: str) -> AbstractContextManager[None]:
    """Keeps out other processes that would write the same files of a run."""
    what = {"train": "a run of this name is active", "evaluate": "an evaluation of this name is active"}[work]
    remedy = "wait until it has ended, or give another --name"
    return holding(directory / f"{work}.lock", f"{directory}: {what}", remedy)


def is_understood(error: Exception) -> bool:
    """Whether an error is the user's to fix, so that `sentence_of` says all."""
    return isinstance(error, ValueError | OSError | torch.OutOfMemoryError) or _is_of_memory(error)


def _is_of_memory(error: Exception) -> bool:
    """Whether the CPU's memory did not suffice. torch has no class for that."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def sentence_of(error: Exception) -> str:
    """What a user is told of an error that is theirs to fix."""
    if _is_of_memory(error):
        size = re.search(r"allocate \S+ .*?(?=\.?( Error|$))", str(error))
        return (
            "the memory is not enough: lower --per_gpu_batch_size, --n_context (--k), --text_maxlength or "
            f"--per_gpu_embedder_batch_size{f' ({size[0]})' if size else ''}"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: lower --per_gpu_batch_size, --n_context, --text_maxlength or "
            "--per_gpu_embedder_batch_size, or use --use_gradient_checkpoint_reader and --precision bf16; "
            f"`python plan.py --card ... {Path(sys.argv[0]).name} ...` with the same flags says what needs how much "
            f"and what helps ({str(error).splitlines()[0]})"
        )
    return config.sentence(error)


def _say_how_to_resume(settings: config.Run, directory: Path) -> None:
    """The two lines after Ctrl-C, of rank 0. The log has them too."""
    latest = directory / "checkpoint" / "latest"
    log.info("Stopped by Ctrl-C: %s", directory)
    if not settings.train_data:
        log.info("Finished evaluations are saved; the same command starts again")
    elif latest.exists():
        log.info("Saved is %s; the same command, without --restart, resumes from there", latest.resolve())
    else:
        log.info("No checkpoint is saved yet; the same command starts from the beginning")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in the block, once: terminals and torchrun send it several times."""
    if threading.current_thread() is not threading.main_thread() or (
        (before := signal.getsignal(signal.SIGINT)) == signal.SIG_IGN  # in the background of a shell
    ):
        yield
        return
    process, received_at = os.getpid(), 0.0

    def interrupt(number: int, frame: object) -> None:
        nonlocal received_at
        if os.getpid() != process:  # a process that was forked from this one, which will end it
            return
        if not received_at:
            received_at = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(process, number)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if not received_at:
            signal.signal(signal.SIGINT, before)


class StopSignals:
    """Notes SIGTERM and SIGUSR1 inside the block instead of ending the process; a second one ends it as usual.

    A signal within `ECHO_SECONDS` of the first is not a second one: schedulers may signal every process of a job, and
    torchrun passes on the signals that it receives.
    """

    def __init__(self) -> None:
        self.received = False
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no handlers
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._received_at = True, time.monotonic()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)
