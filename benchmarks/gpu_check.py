"""Is this project right and fast on this GPU? One table to paste into a report; status 1 if something is wrong.

    make gpu-check
    PYTHONPATH=src python -m benchmarks.gpu_check      on a bare machine: torch, transformers, no Faiss, no network

*Right*: whatever a run computes is computed by the CPU in fp32 as well, and compared. *Fast*: every figure stands
beside the card's limit, which is measured first: a large matrix product, and a large copy. The operations of a step
include those that checkpointing computes again. A speed below its goal is marked, but is not wrong. Without a GPU, and
with --short, all sizes are tiny: that form shows that the check itself works, and its speeds mean nothing.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch

from atlas.runtime import device as devices
from benchmarks import gpu_fast, gpu_options, gpu_right, gpu_search
from benchmarks.gpu_bench import CPU, FULL, MODELS, ROOT, SHORT, Bench, Check, Row, World, free, has_module
from benchmarks.gpu_ranks import several_ranks
from benchmarks.memory import table

COLUMNS = ("check", "expected", "measured", "share of the card's limit")
WRONG, BELOW = "**wrong**", "**below the goal**"
RIGHT = (*gpu_right.CHECKS, *gpu_options.CHECKS, *gpu_search.CHECKS)
CHECKS = (gpu_fast.limits, *RIGHT, *gpu_fast.CHECKS, several_ranks)


def output_of(*words: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version_of(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not there"


def machine(device: torch.device) -> str:
    """The card, its driver, and the versions of everything."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        card = f"{torch.cuda.device_count()} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        card += f", driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}"
    else:
        card = f"CPU, {torch.get_num_threads()} threads"
    faiss = version_of("faiss-gpu", "faiss-cpu") if has_module("faiss") else "not there"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version_of('transformers')}"
    )
    return (
        f"{card}; {versions}, Faiss {faiss}; commit {output_of('git', 'describe', '--always', '--dirty') or 'unknown'}"
    )


def rows_of(check: Check, bench: Bench) -> Iterator[Row]:
    """The rows of one check; one that fails does not hide the others."""
    started = time.monotonic()
    try:
        yield from check(bench)
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip() or "no message").splitlines()[0][:200]
        yield Row(check.__name__, "no error", f"{type(error).__name__}: {reason}", ok=False)
    free(bench.device)
    print(f"[{check.__name__}: {time.monotonic() - started:.1f} s]", file=sys.stderr, flush=True)


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    marks = [mark for mark, fine in ((WRONG, row.ok), (BELOW, row.reached)) if not fine]
    measured = ": ".join([*marks, row.measured])
    return [cell.replace("|", "/") for cell in (row.check, row.expected, measured, row.share)]


def main(arguments: list[str] | None = None) -> None:
    """Check everything and print the table.

    Raises:
        SystemExit: with status 1 if something is wrong.
    """
    names = [check.__name__ for check in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="tiny sizes, as on a machine without a GPU")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK", help=", ".join(names))
    parser.add_argument("--demo_data", type=Path, default=ROOT / "demo/data", help="made by the demo, if it was run")
    options = parser.parse_args(arguments)
    started, device = time.monotonic(), devices.pick_device("auto", 0)
    sizes = SHORT if options.short or device == CPU else FULL
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        world = World(MODELS, Path(scratch), sizes)
        bench = Bench(device, sizes, gpu_fast.measure_limits(device, sizes), world, options.demo_data.resolve())
        rows = [row for check in CHECKS if check.__name__ in options.only for row in rows_of(check, bench)]
    wrong, below = sum(not row.ok for row in rows), sum(not row.reached for row in rows)
    form = "short form" if sizes is SHORT else "full form"
    counts = f"{wrong} of {len(rows)} wrong, {below} below their goal"
    print(f"{machine(device)}; {form}, {time.monotonic() - started:.0f} s; {counts}\n")
    print(table(COLUMNS, map(cells, rows)).replace("---:", "---"))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
