"""Processes that start with everything imported: ranks, functions, and scripts as programs.

Importing torch and transformers costs ten seconds of a core, so the processes of the tests are forked from one that has
done it (and nothing else). `run_program` and `Program` stand in for `subprocess.run` and `subprocess.Popen` where
how python itself starts is not what is tested; a few tests of every script start it as users do.
"""

import atexit
import faulthandler
import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run"]  # words of a `Program`
# All that a run imports, so that no process of the tests does it again; and pytest, which is looked up in all of them.
IMPORTED = [
    "pytest",
    "atlas.training.trainer",
    "atlas.evaluation.evaluator",
    "atlas.retrieval",
    "atlas.preflight",
    "atlas.index.store",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert",
]


class _Process(ForkServerProcess):
    """It ends when the process that started it has ended, in whatever way that was."""

    def run(self) -> None:
        forkserver._forkserver.ensure_running = lambda: None  # what this process starts comes from the same server
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
        super().run()


class _Warm(ForkServerContext):
    Process = _Process


warm = _Warm()  # its processes start with what is imported here
warm.set_forkserver_preload(IMPORTED)


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def start_server_here() -> None:
    """Import now what this process needs anyway, and fork the server from it, which then need not do so again."""
    for name in IMPORTED:
        importlib.import_module(name)
    resource_tracker.ensure_running()  # the other program that the server starts, if it has to
    with mock.patch.object(util, "spawnv_passfds", _fork_server):
        forkserver.ensure_running()


def _fork_server(_: str, arguments: list[str], passed: list[int]) -> int:
    """As `spawnv_passfds` for the server: a child with these files open only, and without what pytest has changed."""
    if child := os.fork():
        return child
    try:
        faulthandler.disable()
        for number in map(int, os.listdir("/dev/fd")):
            if number > 2 and number not in passed:
                _close(number)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
        forkserver.main(*passed, preload=[])
    finally:
        os._exit(1)


def _close(number: int) -> None:
    try:
        os.close(number)
    except OSError:  # that of the listing itself
        return


class Program:
    """`python SCRIPT ...` or `python -m MODULE ...`, in a process that has imported everything; as `subprocess.Popen`.

    Standard output and errors go to files, which `stdout` and `stderr` read.
    """

    def __init__(
        self,
        words: list[Any],
        *,
        cwd: str | Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
        start_new_session: bool = False,
    ) -> None:
        """
        Args:
            words: the script's path from `cwd`, or -m and a module; and their arguments.
            stdout: path of a file or terminal, a new file by default.
            stderr: the same; `stdout` again has both in one.
        """
        self.args = [*map(str, words)]
        self.paths = [str(path or _new_file()) for path in (stdout, stderr)]
        environment = dict(os.environ if env is None else env)
        arguments = (self.args, str(cwd), environment, self.paths, start_new_session)
        self.process = warm.Process(target=_run, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid
        self.stdout: TextIO
        self.stdout, self.stderr = (open(path, encoding="utf-8") for path in self.paths)  # noqa: SIM115

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = HANG_SECONDS) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float = HANG_SECONDS) -> tuple[str, str]:
        """What it said on standard output and on standard error, when it has ended."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_program(words: list[Any], **settings: Any) -> subprocess.CompletedProcess[str]:
    """A program from its start to its end; the settings are those of `Program`."""
    program = Program(words, **settings)
    said = program.communicate()
    return subprocess.CompletedProcess(program.args, program.returncode, *said)


def _new_file() -> str:
    file, path = tempfile.mkstemp(prefix="atlas-test-")
    os.close(file)
    return path


def _run(words: list[str], cwd: str, environment: dict[str, str], paths: list[str], start_new_session: bool) -> None:
    """Become what a fresh python would be, and end as it would; workers of torchrun are such programs, too."""
    if start_new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _open_streams(paths)
    atexit._clear()  # what the imports have registered is not for a process that does not end them
    atexit.register(logging.shutdown)
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "preprocessing"))]  # pytest's
    try:
        if words[0] == "-m":
            if words[1] == TORCHRUN[1]:
                _fork_workers(paths)
            sys.argv = words[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        raise SystemExit(1) from None
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()


def _fork_workers(paths: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def start(args: tuple[str, ...], env: dict[str, str], start_new_session: bool, **_: None) -> Program:
        python, _, *words = args  # python -u SCRIPT ...
        assert python == sys.executable
        places = {"cwd": os.getcwd(), "stdout": paths[0], "stderr": paths[1]}
        return Program(words, env=env, start_new_session=start_new_session, **places)

    subprocess_handler.Popen = start


def _open_streams(paths: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
