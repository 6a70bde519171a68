"""Where recordings of the published system are, for the tests that compare with them."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def parity_kit() -> Path:
    """The directory of the kit; the calling test is skipped where there is none."""
    kit = Path(os.environ.get("ATLAS_PARITY_KIT") or REPOSITORY.parent / "shared" / "parity")
    if not (kit / "retriever.json").is_file():
        pytest.skip(f"no recordings of the published system in {kit}; set ATLAS_PARITY_KIT to their directory")
    return kit
