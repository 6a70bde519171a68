"""Programs in forked processes say, and end as, what python itself would start."""

import os
import signal
import subprocess
import sys

import pytest

from tests.patience import HANG_SECONDS, wait_until
from tests.programs import Program, run_program

pytestmark = pytest.mark.processes


def write(path, code):
    path.write_text(code)
    return path


@pytest.mark.parametrize(
    "code",
    [
        "import atexit, sys; atexit.register(print, 'bye'); print(sys.argv[1:], __name__, sys.path[0])",
        "import os; print(os.getcwd(), os.environ['SAID']); print(input())",
        "import sys; sys.exit('a sentence')",
        "import sys; print('x', file=sys.stderr); sys.exit(3)",
        "raise ValueError('no')",
        "import signal, time; signal.raise_signal(signal.SIGTERM)",
        "raise KeyboardInterrupt",
        "import beside",
    ],
)
def test_like_python(tmp_path, code):
    write(tmp_path / "beside.py", "print('found beside the script')")
    settings = {"cwd": tmp_path, "env": os.environ | {"SAID": "ü"}}
    words = [write(tmp_path / "script.py", code), "one", "two"]
    real = subprocess.run(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        **settings,
    )
    done = run_program(words, **settings)
    assert (done.returncode, done.stdout) == (real.returncode, real.stdout)
    assert done.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]  # a traceback has other frames


def test_ctrl_c(tmp_path):
    program = Program([write(tmp_path / "script.py", "import time; print('here', flush=True); time.sleep(10_000)")])
    wait_until(program.stdout.read, "its line", lambda: program.poll() is None)
    program.send_signal(signal.SIGINT)
    assert program.communicate()[1].splitlines()[-1] == "KeyboardInterrupt"
    assert program.returncode == -signal.SIGINT


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """However that ended: the ranks of tests that are killed do not stay behind."""
    code = """
import time
from tests.programs import warm
process = warm.Process(target=time.sleep, args=(10_000,))
process.start()
print(process.pid, flush=True)
process.join()
"""
    program, said = Program([write(tmp_path / "script.py", code)]), []
    wait_until(lambda: said.append(program.stdout.read()) or said[-1], "its line", lambda: program.poll() is None)
    started = int("".join(said))
    os.kill(started, 0)
    program.kill()

    def gone():
        try:
            os.kill(started, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(gone, "the end of the process that it had started")
