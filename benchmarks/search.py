"""Search of every type of index against Faiss's own: milliseconds, recall against exact search, and memory.

    python -m benchmarks.search                      all of it; with --threads 1, as Faiss's tables are made
    python -m benchmarks.search --types flat PQ64    some types only
    python -m benchmarks.search --norms 0.6 1 1.7    recall of an inverted file for embeddings of these lengths, alone

Made-up embeddings with topics, of one length. Times are medians over rounds in which every way runs once, so that what
else the machine does hits all of them alike; read the ratios, not the milliseconds. Faiss's figure is that of an index
with the same codes that is searched without this project, refined by its `IndexRefine`.
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
from typing import NamedTuple

import faiss
import numpy as np
import torch

from atlas.index.build import compress
from atlas.index.codec import Codec, Compression, all_cores, train, training_rows
from atlas.index.flat import FlatIndex
from atlas.index.sharded import ShardedIndex


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


class Way(NamedTuple):
    """A type of index, and how it is searched."""

    kind: str
    nprobe: int | None = None
    refine_factor: int = 1
    by_torch: bool = False  # compared with torch's product of all embeddings, in fp32, in the place of Faiss

    def __str__(self) -> str:
        probes = f" nprobe {self.nprobe}" if self.nprobe else ""
        torchs = ", in the place of Faiss `(queries @ embeddings.T).topk(k)`" if self.by_torch else ""
        return self.kind + probes + (f" refine {self.refine_factor}" if self.refine_factor > 1 else "") + torchs


WAYS = [
    Way("flat"),
    Way("flat", by_torch=True),
    Way("PQ64"),
    Way("PQ128x4fs"),
    Way("PQ128x4fs", refine_factor=4),
    Way("IVF512,PQ64", nprobe=64),
    Way("IVF512,PQ128x4fs", nprobe=64),
    Way("IVF512,PQ128x4fs", nprobe=64, refine_factor=4),
    Way("ivfsq", nprobe=64),
]


def topical(n: int, dimension: int, norm: float, seed: int = 0) -> torch.Tensor:
    """(n, D) fp16 of about this length: 1,000 topics and 64 directions, the same for every seed."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    topics = torch.randn(1000, dimension, generator=shared)
    directions = torch.randn(64, dimension, generator=shared) / torch.arange(1, 65)[:, None] ** 0.5
    embeddings = torch.empty(n, dimension, dtype=torch.float16)
    for part in embeddings.split(2**14):
        of_topic = topics[torch.randint(1000, (len(part),), generator=own)]
        inside = torch.randn(len(part), 64, generator=own) @ directions
        vectors = of_topic + inside + 0.7 * torch.randn(part.shape, generator=own)
        part.copy_(norm * vectors / (len(directions) ** 0.5 * dimension**0.5 / 4))
    return embeddings


def recall(found: torch.Tensor, best: torch.Tensor) -> float:
    """The part of the best rows (b, k) that was found (b, k)."""
    return (best[:, :, None] == found[:, None]).any(2).float().mean().item()


def trained(way: Way, embeddings: torch.Tensor, train_size: int) -> Codec:
    factory = Compression(way.kind).factory(*embeddings.shape)
    rows = training_rows(factory, embeddings.shape[1], len(embeddings), train_size, seed=0)
    with all_cores():
        return train(factory, embeddings[rows].float().numpy(), all_rows=True)


def in_fp16(embeddings: torch.Tensor) -> faiss.Index:
    """Faiss's index of the embeddings (n, D) as they are."""
    exact = faiss.IndexScalarQuantizer(embeddings.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    exact.is_trained = True
    exact.add_sa_codes(embeddings.numpy().view(np.uint8))
    return exact


def faiss_search(
    way: Way, index: ShardedIndex, embeddings: torch.Tensor
) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Faiss's own search of the same codes, or torch's of the embeddings."""
    if way.by_torch:
        rows = embeddings.float()
        return lambda queries, k: tuple(part.numpy() for part in (torch.from_numpy(queries) @ rows.T).topk(k))
    if index.compressed is None:
        flat = faiss.IndexFlatIP(index.dimension)
        for part in embeddings.split(2**14):
            flat.add(part.float().numpy())
        return flat.search
    filled = index.compressed.codec.filled(index.compressed.codes())
    if way.nprobe:
        faiss.extract_index_ivf(filled).nprobe = way.nprobe
    if way.refine_factor == 1:
        return filled.search
    refined = faiss.IndexRefine(filled, in_fp16(embeddings))
    refined.k_factor = way.refine_factor
    return refined.search


def compare_speed(ways: list[Way], options: argparse.Namespace) -> None:
    """Print a Markdown table, one line for each way."""
    embeddings, k = topical(options.size, options.dimension, 0.64), options.k
    queries = {b: topical(b, options.dimension, 0.64, seed=b).float() for b in options.batch}
    exact = FlatIndex(embeddings)
    best = exact.search(queries[options.batch[-1]], k)[1]
    flat = ShardedIndex(range(len(embeddings)), embeddings, exact)
    codecs: dict[str, Codec] = {}
    head = [f"{b} queries: ours, ms | Faiss, ms | ours / Faiss" for b in options.batch]
    print(f"\n| type | {' | '.join(head)} | recall@{k} | Faiss's recall@{k} |")
    print("|---|" + "---:|" * (3 * len(head) + 2))
    for way in ways:
        index = flat
        if way.kind != "flat":
            codecs.setdefault(way.kind, trained(way, embeddings, options.train_size))
            asked = Compression(way.kind, nprobe=way.nprobe, refine_factor=way.refine_factor)
            index = compress(flat, asked, codec=codecs[way.kind])
        own = faiss_search(way, index, embeddings)
        cells = []
        for asked in queries.values():
            both = {"ours": partial(index.search, asked, k), "faiss": partial(own, asked.numpy(), k)}
            times = seconds(both, options.rounds)
            cells += [f"{1000 * times[name]:.2f}" for name in both] + [f"{times['ours'] / times['faiss']:.2f}"]
        asked = queries[options.batch[-1]]
        cells.append(f"{recall(index.search(asked, k).ids, best):.3f}")
        cells.append(f"{recall(torch.from_numpy(own(asked.numpy(), k)[1]), best):.3f}")
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def compare_norms(norms: list[float], options: argparse.Namespace) -> None:
    """Print the recall of an inverted file for the same embeddings at several lengths."""
    for norm in norms:
        embeddings = topical(options.size, options.dimension, norm)
        queries = topical(100, options.dimension, norm, seed=1).float()
        flat = ShardedIndex(range(len(embeddings)), embeddings)
        way = Way("IVF512,PQ64")
        index = compress(flat, Compression(way.kind), codec=trained(way, embeddings, options.train_size))
        found, best = (each.search(queries, options.k).ids for each in (index, flat))
        length = embeddings[:1000].float().norm(dim=1).mean()
        print(f"{way}, embeddings of length {length:.2f}: recall@{options.k} {recall(found, best):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--types", nargs="+", help=f"of {', '.join(dict.fromkeys(way.kind for way in WAYS))}; default: all"
    )
    parser.add_argument("--norms", type=float, nargs="+", help="only compare the recall at these lengths")
    parser.add_argument("--size", type=int, default=200_000, help="passages, for the speed")
    parser.add_argument("--dimension", type=int, default=768, help="D, for the speed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="queries; the memory is that of the last")
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train_size", type=int, default=15_000, help="rows that codecs are trained on")
    parser.add_argument("--chunk_rows", type=int, help="passages compared at a time; by default what suits the device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory_sizes",
        type=int,
        nargs="*",
        default=[10_000, 1_000_000],
        help="passages, for the memory",
    )
    parser.add_argument("--memory_dimension", type=int, default=128)
    parser.add_argument("--peak_only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.peak_only is not None:
        print(peak_of_a_search(options.peak_only, options.dimension, options.batch[-1], options.k, options.chunk_rows))
        return
    if options.norms:
        compare_norms(options.norms, options)
        return
    ways = [way for way in WAYS if not options.types or way.kind in options.types]
    if not options.types:
        peaks = [peak_in_a_new_process(n, options) for n in options.memory_sizes]
        for n, peak in zip(options.memory_sizes, peaks, strict=True):
            print(f"memory of an exact search in {n} x {options.memory_dimension}: {peak / 2**20:.2f} MiB", end=" ")
            print("beyond the embeddings")
    compare_speed(ways, options)


if __name__ == "__main__":
    main()
