"""Waiting without a guess at how fast the machine is: for an event, with a time-out that only catches a hang."""

import random
import socket
import time
from collections.abc import Callable

# Long enough for anything that these tests start, also for whole runs on a machine that does ten other things.
HANG_SECONDS = 1200


def wait_until(happened: Callable[[], object], what: str, alive: Callable[[], bool] = lambda: True) -> None:
    """Return as soon as `happened()` is true.

    Args:
        what: is named in the message.
        alive: whether that which is to make it happen still runs.

    Raises:
        AssertionError: it ended before, or nothing happened for `HANG_SECONDS`.
    """
    end = time.monotonic() + HANG_SECONDS
    while not happened():
        assert alive() or happened(), f"ended before {what}"
        assert time.monotonic() < end, f"waited {HANG_SECONDS:.0f} s for {what}"
        time.sleep(0.01)


def free_port(first: int = 0, last: int = 0) -> int:
    """A port of this machine that nobody listens to: one between the two, or any that the system offers."""
    for port in random.SystemRandom().sample(range(first, last + 1), k=min(100, last + 1 - first)):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return s.getsockname()[1]
    raise OSError(f"no free port from {first} to {last}")
