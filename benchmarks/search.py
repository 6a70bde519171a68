"""Exact search: its memory against the number of passages, and its speed and ids against Faiss.

    python -m benchmarks.search

Random embeddings. Speeds are medians over rounds in which every way runs once, so that what else the machine does
hits all of them alike; read the ratios, not the seconds.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import torch

from atlas.index.flat import FlatIndex


def random_embeddings(n: int, dimension: int) -> torch.Tensor:
    """(n, D) fp16, made piece by piece."""
    embeddings = torch.empty(n, dimension, dtype=torch.float16)
    for part in embeddings.split(2**14):
        part.copy_(torch.randn(part.shape))
    return embeddings


def process_memory(what: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; Linux only."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_of_a_search(n: int, dimension: int, batch: int, k: int, chunk_rows: int | None) -> int:
    """Bytes that a search needs beyond what was there before it, embeddings included."""
    FlatIndex(random_embeddings(8, dimension)).search(
        torch.randn(batch, dimension), k
    )  # loads libraries, starts threads
    index = FlatIndex(random_embeddings(n, dimension), chunk_rows=chunk_rows)
    queries = torch.randn(batch, dimension)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = process_memory("VmRSS")
    index.search(queries, k)
    return process_memory("VmHWM") - before


def peak_in_a_new_process(n: int, arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.search", "--peak_only", str(n)]
    command += [
        "--dimension",
        str(arguments.memory_dimension),
        "--batch",
        str(arguments.batch[-1]),
        "--k",
        str(arguments.k),
    ]
    command += ["--threads", str(arguments.threads)]
    if arguments.chunk_rows:
        command += ["--chunk_rows", str(arguments.chunk_rows)]
    # What is freed goes back to the system at once, so that the peak is that of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each way, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for counts in [False] + [True] * rounds:
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if counts:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(measured) for name, measured in times.items()}


def best_by_float64(embeddings: torch.Tensor, queries: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of these rows (b, K) for each query, by inner products in float64, ties by row: (b, k)."""
    best = []
    for query, candidates in zip(queries, rows, strict=True):
        candidates = candidates.unique()
        order = (embeddings[candidates].double() @ query.double()).sort(descending=True, stable=True).indices
        best.append(candidates[order[:k]])
    return torch.stack(best)


def compare_speed(n: int, dimension: int, batches: list[int], k: int, rounds: int, chunk_rows: int | None) -> None:
    embeddings = random_embeddings(n, dimension)
    index = FlatIndex(embeddings, chunk_rows=chunk_rows)
    reference = faiss.IndexFlatIP(dimension)
    for part in embeddings.split(2**14):
        reference.add(part.float().numpy())
    for batch in batches:
        queries = torch.randn(batch, dimension)
        measured = seconds(
            {
                "ours": partial(index.search, queries, k),
                "faiss": partial(reference.search, queries.numpy(), k),
            },
            rounds,
        )
        ours = index.search(queries, k)[1]
        theirs = torch.from_numpy(reference.search(queries.numpy(), k)[1])
        right = best_by_float64(embeddings, queries, torch.cat([ours, theirs], dim=1), k)
        print(
            f"{n} x {dimension}, batch {batch}, k {k}: {batch / measured['ours']:.1f} queries/s, "
            f"{measured['faiss'] / measured['ours']:.2f} times as many as faiss.IndexFlatIP; "
            f"ids as by float64: ours {(ours == right).float().mean():.3%}, "
            f"Faiss {(theirs == right).float().mean():.3%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[200_000], help="passages, for the speed")
    parser.add_argument("--dimension", type=int, default=768, help="D, for the speed")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 32], help="queries; the memory is that of the last"
    )
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk_rows", type=int, help="passages compared at a time; by default what suits the device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory_sizes", type=int, nargs="*", default=[10_000, 1_000_000], help="passages, for the memory"
    )
    parser.add_argument("--memory_dimension", type=int, default=128)
    parser.add_argument("--peak_only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    torch.manual_seed(0)
    k, chunk_rows = arguments.k, arguments.chunk_rows
    if arguments.peak_only is not None:
        print(peak_of_a_search(arguments.peak_only, arguments.dimension, arguments.batch[-1], k, chunk_rows))
        return
    peaks = [peak_in_a_new_process(n, arguments) for n in arguments.memory_sizes]
    for n, peak in zip(arguments.memory_sizes, peaks, strict=True):
        print(f"memory of a search in {n} x {arguments.memory_dimension}: {peak / 2**20:.2f} MiB beyond the embeddings")
    if peaks:
        print(f"  growth from the first to the last: {(peaks[-1] - peaks[0]) / 2**20:.2f} MiB")
    for n in arguments.sizes:
        compare_speed(n, arguments.dimension, arguments.batch, k, arguments.rounds, chunk_rows)


if __name__ == "__main__":
    main()
