"""The start and the end of a run: ranks, log, seeds, one sentence for a user's mistake, exit status."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from atlas import config
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import TensorBoard, log, report_error, start_log
from atlas.runtime.verification import Verification

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
    verification: Verification

    def write_options(self, name: str, text: str) -> None:
        """Write a file of all flags into the directory, on rank 0."""
        if distributed.is_main():
            (self.directory / name).write_text(text + "\n", encoding="utf-8")

    def log_places(self, step: int) -> None:
        """The last line of a run: where to look. Collective. Raises: as `Verification.finish`."""
        self.verification.finish()
        places = [f"log in {self.directory / 'run.log'}"]
        latest = self.directory / "checkpoint" / "latest"
        if self.settings.train_data and latest.exists():
            places.append(f"model in {self.directory / 'checkpoint' / latest.resolve().name}")
        if self.settings.write_results:
            names = map(config.evaluation_name, self.settings.eval_data)
            places += [f"results in {self.directory / f'{name}-step-{step}.jsonl'}" for name in names]
        log.info("Done: %s", ", ".join(places))


@contextlib.contextmanager
def session(settings: config.Run) -> Iterator[Session]:
    """Join the other ranks, start the log, and end the process as users and schedulers expect.

    ValueError, OSError, a full GPU and a lost rank are the user's to fix: they end the run with one sentence and status
    1. Anything else is a bug and shows its traceback. Tracebacks of both kinds are in the rank's log. A rank that ends
    with an error does not leave the process group, because that could wait for the other ranks for ever. `Stopped` ends
    the run with status 143, which tells schedulers and torchrun to start it again.
    """
    directory = Path(settings.checkpoint_dir) / settings.name
    stopped = False
    start_log(None)  # for what goes wrong before there is a file
    try:
        device = devices.pick_device(settings.device, distributed.local_rank())
        distributed.start(device.type)
        start_log(directory)
        transformers_logging.set_verbosity_error()  # its advice is about its own trainer
        transformers_logging.disable_progress_bar()
        devices.seed_everything(settings.seed)
        with contextlib.closing(TensorBoard(directory)) as tensorboard:
            try:
                verification = Verification(settings.verify)
                yield Session(settings, device, directory, tensorboard, verification)
                verification.finish()
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
    # A DDP model that outlives the process group may hang in its destructor: gloo's threads wait for Python's lock.
    gc.collect()
    distributed.stop()
    if stopped:
        sys.exit(128 + signal.SIGTERM)


def _sentence(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: lower --per_gpu_batch_size, --n_context, --text_maxlength or "
            "--per_gpu_embedder_batch_size, or use --use_gradient_checkpoint_reader and --precision bf16 "
            f"({str(error).splitlines()[0]})"
        )
    return str(error)


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
