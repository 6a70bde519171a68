"""One thread per process: the machines that run the tests are small, and results do not depend on it."""

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fresh_log():
    """A run takes the log for itself; the next test gets it as it was."""
    log = logging.getLogger("atlas")
    log.propagate = True
    log.handlers.clear()
