"""The start and the end of a run: ranks, log, seeds, one sentence for a user's mistake, exit status."""

import contextlib
import gc
import os
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
from atlas.files.disk import writing
from atlas.files.lock import holding
from atlas.options import write_options
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import TensorBoard, log, report_error, start_log

ECHO_SECONDS = 10.0


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A run that was asked to stop has saved a checkpoint and ends."""


@dataclass(frozen=True)
class Session:
    """What is there once while a script runs."""

    settings: config.Run
    device: torch.device
    directory: Path  # `{checkpoint_dir}/{name}`: log, results, checkpoints
    tensorboard: TensorBoard
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
        """The last line of a run: where to look."""
        places = [f"log in {self.directory / 'run.log'}"]
        latest = self.directory / "checkpoint" / "latest"
        if self.settings.train_data and latest.exists():
            places.append(f"model in {self.directory / 'checkpoint' / latest.resolve().name}")
        if self.settings.write_results:
            names = map(config.evaluation_name, self.settings.eval_data)
            places += [f"results in {self.directory / f'{name}-step-{step}.jsonl'}" for name in names]
        log.info("Done: %s", ", ".join(places))


@contextlib.contextmanager
def session(settings: config.Run, work: str) -> Iterator[Session]:
    """Join the other ranks, start the log, and end the process as users and schedulers expect.

    ValueError, OSError, a full GPU and a lost rank are the user's to fix: they end the run with one sentence and status
    1. Anything else is a bug and shows its traceback. Tracebacks of both kinds are in the rank's log. A rank that ends
    with an error does not leave the process group, because that could wait for the other ranks for ever. `Stopped` ends
    the run with status 143, which tells schedulers and torchrun to start it again.

    Args:
        work: "train" or "evaluate". A run's directory is for one process group at a time that does the same: another
            one is refused before it writes anything there.
    """
    directory = Path(settings.checkpoint_dir) / settings.name
    stopped, locks = False, contextlib.ExitStack()
    start_log(None)  # for what goes wrong before there is a file
    try:
        device = devices.pick_device(settings.device, distributed.local_rank())
        distributed.start(device.type)
        locks.enter_context(distributed.held_on_main("locking the run", partial(_alone, directory, work)))
        start_log(directory)
        transformers_logging.set_verbosity_error()  # its advice is about its own trainer
        transformers_logging.disable_progress_bar()
        devices.seed_everything(settings.seed)
        with contextlib.closing(TensorBoard(directory)) as tensorboard:
            try:
                yield Session(settings, device, directory, tensorboard, locks)
            except Stopped as stop:
                stopped = True
                traceback.clear_frames(stop.__traceback__)
        distributed.wait_for_all("the end of the run")
    except (ValueError, OSError, torch.OutOfMemoryError, distributed.LostRankError) as error:
        report_error(error, _sentence(error))
        sys.exit(1)
    except Exception as error:
        report_error(error, f"{type(error).__name__}: {error}")
        raise
    finally:
        locks.close()
    # A DDP model that outlives the process group may hang in its destructor: gloo's threads wait for Python's lock.
    gc.collect()
    distributed.stop()
    if stopped:
        sys.exit(128 + signal.SIGTERM)


def _alone(directory: Path, work: str) -> AbstractContextManager[None]:
    """Keeps out other processes that would write the same files of a run."""
    what = {"train": "a run of this name is active", "evaluate": "an evaluation of this name is active"}[work]
    remedy = "wait until it has ended, or give another --name"
    return holding(directory / f"{work}.lock", f"{directory}: {what}", remedy)


def _sentence(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: lower --per_gpu_batch_size, --n_context, --text_maxlength or "
            "--per_gpu_embedder_batch_size, or use --use_gradient_checkpoint_reader and --precision bf16 "
            f"({str(error).splitlines()[0]})"
        )
    return config.sentence(error)


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
