"""Runs of the scripts whose results are kept: the same command is not run again."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_once(log: Path, done: Path, *words: object, threads: int = 1) -> float:
    """Run a script, unless `done` exists and comes from the same command, which the log says in its first line.

    Returns:
        The seconds that it took, or had taken.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, *map(str, words)]
    line = f"$ {shlex.join(command).replace(sys.executable, 'python')}\n"
    text, _, took = log.read_text().rpartition("\nseconds: ") if log.exists() else ("", "", "")
    if done.exists() and text.startswith(line):
        return float(took)
    print(line, end="", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        print(line, end="", file=output, flush=True)
        environment, started = os.environ | {"OMP_NUM_THREADS": str(threads)}, time.monotonic()
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode:
            raise SystemExit(f"{words[0]} failed: see {log}")
        seconds = time.monotonic() - started
        print(f"\nseconds: {seconds:.1f}", file=output)
    return seconds
