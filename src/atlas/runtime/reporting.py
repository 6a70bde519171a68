"""What a run measures, for programs: metrics.jsonl, and the curves of the libraries that --report_to names.

Only this file knows these libraries. What cannot be written is said once, and the run goes on.
"""

import json
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch
import transformers

import atlas
from atlas.config import REPORTERS, Config
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import log

PROJECT = "atlas"  # what trackio, which must be told one, puts all runs under


class Reports:
    """metrics.jsonl and curves, of rank 0; other ranks, and a run without a directory, write nothing.

    Args:
        libraries: names of `LIBRARIES`.
    """

    def __init__(self, directory: Path | None, libraries: Sequence[str] = ()) -> None:
        writes = directory is not None and distributed.is_main()
        self._file = _MetricsFile(directory / "metrics.jsonl") if writes else None
        self._curves = [LIBRARIES[name](directory) for name in libraries] if writes else []

    def start(self, config: Config, device: torch.device, step: int) -> None:
        """A start of this run after so many finished steps: a line, and the libraries begin. Collective."""
        restarts = config.optimisation.restart
        continues = self._file is not None and self._file.path.exists() and not restarts
        facts = {"command": config.command, "restart": restarts, "versions": versions()}
        self.record("start", step, facts | {"device": devices.describe(device), "ranks": distributed.world_size()})

        def begin() -> None:
            for curves in self._curves:
                curves.start(config, continues)

        distributed.on_main("starting the curves", begin)

    def record(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. Numbers have six digits there, as in result files; NaN and infinity are left out."""
        if self._file is not None:
            line = {"kind": kind, "time": round(time.time(), 3), "step": step}
            self._file.append({**line, **_written(fields)})

    def draw(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve."""
        for curves in self._curves:
            curves.add(values, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write and send what is still buffered."""
        with distributed.busy():
            for curves in self._curves:
                curves.close(failed=kind is not None)


class _MetricsFile:
    """Appends lines, each with a write of its own: what a kill or a full disk cuts off is one line and no more."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, False

    def append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path, "ab+") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    text = text if file.read(1) == b"\n" else f"\n{text}"
                file.write(text.encode(errors="backslashreplace"))  # a word of a command line need not be UTF-8
        except OSError as error:
            if not self.said:
                self.said = True
                log.warning("Lines are missing in %s: %s", self.path, error)


class _Curves:
    """What one library draws. Its errors, of whatever class, end its curves and not the run."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory, self.given_up = directory, False

    def start(self, config: Config, continues: bool) -> None:
        """Begin; or go on with the curves of an earlier start of this run, where the library can."""
        self._try(partial(self._start, config, continues))

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._try(partial(self._add, values, step))

    def close(self, failed: bool) -> None:
        """The end of the run; `failed`: with an error."""
        self._try(partial(self._close, failed))

    def _try(self, work: Callable[[], object]) -> None:
        if self.given_up:
            return
        try:
            work()
        except Exception as error:
            self.given_up = True
            log.warning("No more curves for %s are written (%s): %s", self.name, self.directory, error)


class TensorBoard(_Curves):
    """Event files in the run's directory; the first point starts one."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._writer: Any = None
        self._report_of_threads = threading.excepthook

    def _start(self, config: Config, continues: bool) -> None:
        """Nothing: a run that ends before its first point leaves no file."""

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter  # slow to import
            except ImportError:
                log.info("tensorboard is not installed, so no curves are written: %s", REPORTERS[self.name])
                self.given_up = True
                return
            threading.excepthook = self._report
            self._writer = SummaryWriter(self.directory)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        super().close(failed)
        threading.excepthook = self._report_of_threads

    def _close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _report(self, failed: threading.ExceptHookArgs) -> None:
        """Print no traceback of tensorboard's thread: the next `add`, or `close`, gets its error."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self._report_of_threads(failed)


class WeightsAndBiases(_Curves):
    """A run of wandb. Its id is kept in the run's directory, so that a run that resumes goes on with its curves."""

    name = "wandb"

    def _start(self, config: Config, continues: bool) -> None:
        import wandb

        file = self.directory / "wandb.id"
        if not continues or not file.exists():
            file.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run = wandb.init(
            name=config.run.name,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            dir=self.directory,
            config=config.flags(),
            settings=wandb.Settings(console="off"),  # the screen stays as it is
        )
        # Its own steps cannot go back, as those of a run do that resumes from an older checkpoint.
        self._run.define_metric("*", step_metric="step")

    def _add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def _close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio(_Curves):
    """A run of trackio."""

    name = "trackio"

    def _start(self, config: Config, continues: bool) -> None:
        import trackio

        resume = "allow" if continues else "never"  # the last run of this name
        self._run = trackio.init(PROJECT, name=config.run.name, resume=resume, config=config.flags(), embed=False)

    def _add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def _close(self, failed: bool) -> None:
        self._run.finish()


LIBRARIES: dict[str, type[_Curves]] = {kind.name: kind for kind in (TensorBoard, WeightsAndBiases, Trackio)}


def versions() -> dict[str, str | None]:
    """Of what a run's results may depend on; None where it is not installed."""
    return {
        "atlas": atlas.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "faiss": next(filter(None, map(_installed, ("faiss-gpu", "faiss-cpu", "faiss"))), None),
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def six_digits(number: float) -> float:
    """Rounded to six digits: further digits change with the shapes of matrix products, and nobody reads them."""
    return float(f"{number:.6g}")


def _written(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they stand in metrics.jsonl."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found[name] = _written(value)
        elif not isinstance(value, float):
            found[name] = value
        elif math.isfinite(value):
            found[name] = six_digits(value)
    return found
