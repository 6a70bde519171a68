"""Bytes, recall, speed and building time of every kind of index, beside Faiss's own and brute force, in one run.

    python -m benchmarks.tradeoff --plot tradeoff.png                     200,000 made-up embeddings of 768 numbers
    python -m benchmarks.tradeoff --passages windows.jsonl --questions questions.jsonl --retriever MODEL
                                                                           of real text by a real encoder, kept in
                                                                           --directory for the next call

Prints a Markdown table. Recall is the share of the best 20 passages of an exact search that are found. Times are
medians over rounds in which every contender runs once, so that what else the machine does hits all of them alike.
`--plot` needs matplotlib: pip install matplotlib
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import torch

from atlas import config
from atlas.embedding import CorpusEmbedder
from atlas.files.jsonl import JsonlCorpus
from atlas.index.build import compress
from atlas.index.codec import Compression, all_cores, code_size
from atlas.index.flat import FlatIndex
from atlas.index.passages import open_passages
from atlas.index.sharded import ShardedIndex
from atlas.model.inputs import Inputs
from atlas.model.retriever import load_retriever
from atlas.model.tokenization import load_retriever_tokenizer
from atlas.runtime.tracking import start_log
from benchmarks.search import Way, in_fp16, recall, seconds, topical

K, QUERIES = 20, 1000  # passages wanted; questions that the recall is measured on
BATCHES = (1, 32)  # queries searched at once
CPU = torch.device("cpu")
Search = Callable[[torch.Tensor], torch.Tensor]  # queries (b, D) fp32 -> rows (b, K)


class Contender(NamedTuple):
    """An index that has been built."""

    maker: str  # "ours", "Faiss" or "torch"
    name: str
    size: float  # bytes per passage in memory
    seconds: float  # that building took, from the embeddings
    search: Search


def ways(dimension: int, lists: int) -> list[Way]:
    """What of ours is compared: a byte for every 6, 4 or 12 numbers where it can be chosen."""
    nibbles = dimension // 6 * 2  # 4 bits each
    probes = max(1, lists // 8)
    return [
        Way("flat"),
        Way("SQ8"),
        Way(f"PQ{dimension // 4}"),
        Way(f"PQ{dimension // 6}"),
        Way(f"PQ{nibbles}x4fs"),
        Way(f"PQ{nibbles}x4fs", refine_factor=4),
        Way(f"PQ{nibbles // 2}x4fs", refine_factor=4),
        Way(f"RR{dimension},RaBitQ", refine_factor=4),
        Way(f"IVF{lists},SQfp16", nprobe=probes),
        Way(f"IVF{lists},PQ{dimension // 6}", nprobe=probes),
        Way(f"IVF{lists},PQ{nibbles}x4fs", nprobe=probes, refine_factor=4),
        Way(f"RR{dimension},IVF{lists},RaBitQ", nprobe=probes, refine_factor=4),
    ]


def ours(embeddings: torch.Tensor, lists: int) -> Iterator[Contender]:
    dimension = embeddings.shape[1]
    flat = ShardedIndex(range(len(embeddings)), embeddings, FlatIndex(embeddings))
    for way in ways(dimension, lists):
        begin = time.perf_counter()
        asked = Compression(way.kind, nprobe=way.nprobe, refine_factor=way.refine_factor)
        index = compress(flat, asked)
        took, size = time.perf_counter() - begin, code_size(way.kind, dimension) or 2 * dimension
        yield Contender("ours", str(way), size, took, lambda queries, index=index: index.search(queries, K).ids)


class Peer(NamedTuple):
    """An index of Faiss's own making."""

    factory: str
    size: float
    nprobe: int | None = None
    ef: int | None = None
    refine_factor: int = 1

    def __str__(self) -> str:
        probes = f" nprobe {self.nprobe}" if self.nprobe else f" ef {self.ef}" if self.ef else ""
        return self.factory + probes + (f" refine {self.refine_factor}" if self.refine_factor > 1 else "")


def peers(dimension: int, lists: int) -> list[Peer]:
    """Types that we do not have, and the fastest that we have."""
    nibbles, probes, bits = dimension // 6 * 2, max(1, lists // 8), dimension / 8 + 8
    rotation = f"RR{dimension}"
    return [
        Peer("Flat", 4 * dimension),
        Peer("HNSW32,SQfp16", 2 * dimension + 4 * 64, ef=64),
        Peer("HNSW32,SQfp16", 2 * dimension + 4 * 64, ef=256),
        Peer(f"PQ{nibbles}x4fs", nibbles / 2, refine_factor=4),
        Peer(f"IVF{lists},PQ{nibbles}x4fs", nibbles / 2 + 8, nprobe=probes, refine_factor=4),
        Peer(f"{rotation},RaBitQ", bits, refine_factor=4),
        Peer(f"{rotation},RaBitQfs", bits, refine_factor=4),
        Peer(f"{rotation},RaBitQfs", bits, refine_factor=8),
        Peer(f"{rotation},IVF{lists},RaBitQfs", bits + 8, nprobe=probes, refine_factor=4),
    ]


def of_faiss(embeddings: torch.Tensor, lists: int) -> Iterator[Contender]:
    dimension, rows = embeddings.shape[1], embeddings.float().numpy()
    exact = in_fp16(embeddings)
    built: dict[str, tuple[faiss.Index, float]] = {}
    for peer in peers(dimension, lists):
        begin = time.perf_counter()
        if peer.factory not in built:
            index = faiss.index_factory(dimension, peer.factory, faiss.METRIC_INNER_PRODUCT)
            with all_cores():
                index.train(rows[:: max(1, len(rows) // (256 * max(256, lists)))])
                index.add(rows)
            built[peer.factory] = index, time.perf_counter() - begin
        index, took = built[peer.factory]
        yield Contender("Faiss", str(peer), peer.size, took, search_of(peer, index, exact))


def search_of(peer: Peer, index: faiss.Index, exact: faiss.Index) -> Search:
    searched = faiss.IndexRefine(index, exact) if peer.refine_factor > 1 else index
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index

    def search(queries: torch.Tensor) -> torch.Tensor:
        if peer.nprobe:
            faiss.extract_index_ivf(index).nprobe = peer.nprobe
        if peer.ef:
            inner.hnsw.efSearch = peer.ef
        if peer.refine_factor > 1:
            searched.k_factor = peer.refine_factor
        return torch.from_numpy(searched.search(queries.numpy(), K)[1])

    return search


def brute_force(embeddings: torch.Tensor) -> Contender:
    rows = embeddings.float()
    return Contender(
        "torch", "matmul, topk", 4 * rows.shape[1], 0.0, lambda queries: (queries @ rows.T).topk(K, dim=1).indices
    )


def real_embeddings(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (n, D) fp16 of the passages, and of questions (q, D) fp32; made once."""
    files = [options.directory / name for name in ("passages.npy", "questions.npy")]
    if not all(file.exists() for file in files):
        options.directory.mkdir(parents=True, exist_ok=True)
        retriever = load_retriever(str(options.retriever), query_side=False, dropout=None)
        flags = config.Model(text_maxlength=128, retriever_format="{title} {text}")
        tokenizer = load_retriever_tokenizer(str(options.retriever))
        inputs = Inputs(flags, None, tokenizer, device=CPU, retriever=retriever)
        embed(retriever, inputs, open_passages(options.passages, options.size), files[0])
        asked = [row["question"] for row in JsonlCorpus(options.questions)[:QUERIES]]
        with torch.no_grad():
            np.save(files[1], retriever.eval().embed_queries(*inputs.queries(asked)).float().numpy())
    return tuple(torch.from_numpy(np.load(file)) for file in files)


def embed(retriever: torch.nn.Module, inputs: Inputs, passages: JsonlCorpus, file: Path) -> None:
    into = torch.empty(len(passages), retriever.dim, dtype=torch.float16)
    embedder = CorpusEmbedder(retriever.eval(), inputs, CPU, "fp32", batch_size=64)
    embedder.embed_rows(passages, range(len(passages)), lambda at, part: into[at : at + len(part)].copy_(part))
    np.save(file, into.numpy())


def describe(embeddings: torch.Tensor) -> str:
    """How many, their norms, and how much of their variance lies in how few directions."""
    some = embeddings[:: max(1, len(embeddings) // 20_000)].float()
    norms = some.norm(dim=1)
    spectrum = torch.linalg.svdvals(some - some.mean(0)) ** 2
    share = (spectrum.cumsum(0) / spectrum.sum()).tolist()
    parts = ", ".join(f"{100 * share[n - 1]:.0f} % in {n}" for n in (16, 64, 256) if n <= len(share))
    size = f"{len(embeddings):,} passages of {embeddings.shape[1]} numbers"
    return f"{size}, norms {norms.mean():.2f} ± {norms.std():.2f}, variance by directions: {parts}"


def measure(contenders: list[Contender], queries: torch.Tensor, rounds: int) -> list[tuple[Contender, float, list]]:
    """Each with its recall and its queries a second, for each size of a batch."""
    best = contenders[0].search(queries)  # the exact one
    recalls = [recall(contender.search(queries), best) for contender in contenders]
    speeds = []
    for batch in BATCHES:
        parts = queries[: batch * (len(queries) // batch)].split(batch)[:8]
        all_of_them = {str(i): partial(each, contender.search, parts) for i, contender in enumerate(contenders)}
        times = seconds(all_of_them, rounds)
        speeds.append([batch * len(parts) / times[name] for name in all_of_them])
    return list(zip(contenders, recalls, [list(of_one) for of_one in zip(*speeds, strict=True)], strict=True))


def each(search: Search, parts: Sequence[torch.Tensor]) -> None:
    for part in parts:
        search(part)


def table(measured: list[tuple[Contender, float, list]]) -> str:
    heads = [f"queries/s, {batch} at once" for batch in BATCHES]
    lines = [f"| | | bytes a passage | build, s | recall@{K} | {' | '.join(heads)} |", "|---|---|" + "---:|" * 5]
    for contender, found, speeds in measured:
        cells = [f"{contender.size:.0f}", f"{contender.seconds:.0f}", f"{found:.3f}", *(f"{s:.0f}" for s in speeds)]
        lines.append(f"| {contender.maker} | {contender.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(measured: list[tuple[Contender, float, list]], about: str, file: Path) -> None:
    """Queries a second over recall, a panel for each size of a batch; up and to the right is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"ours": "#1f5fa8", "Faiss": "#c4561c", "torch": "#555555"}
    figure, axes = pyplot.subplots(len(BATCHES), 1, figsize=(9.5, 5.2 * len(BATCHES)), sharex=True)
    lowest = min(found for _, found, _ in measured)
    for axis, batch, place in zip(axes, BATCHES, range(len(BATCHES)), strict=True):
        axis.set(yscale="log", xlim=(lowest - 0.02, 1.0 + 0.3 * (1.02 - lowest)), ylabel="queries a second")
        axis.set_xticks([tenth / 10 for tenth in range(11) if tenth / 10 > lowest - 0.02])
        axis.set_title(f"{batch} {'query' if batch == 1 else 'queries'} at once", loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        for maker, colour in colours.items():
            points = [(found, speeds[place]) for contender, found, speeds in measured if contender.maker == maker]
            axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=6, label=maker)
        for contender, found, height, above in labels(measured, place):
            text = f"{contender.name}, {contender.size:.0f} B"
            axis.annotate(
                text,
                (found, height),
                (found + 0.012 * (1.02 - lowest), above),
                fontsize=7,
                va="center",
                color=colours[contender.maker],
            )
    axes[0].legend(loc="lower left", frameon=False)
    axes[-1].set_xlabel(f"recall@{K} against exact search")
    figure.suptitle(about, fontsize=8, x=0.01, ha="left")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def labels(
    measured: list[tuple[Contender, float, list]], place: int
) -> Iterator[tuple[Contender, float, float, float]]:
    """Contender, recall, speed, and at which height its label lies so that labels near each other do not overlap."""
    speeds = [speeds[place] for _, _, speeds in measured]
    least = (max(speeds) / min(speeds)) ** (1 / 34)  # between two labels
    set_down: list[tuple[float, float]] = []
    width = 0.35 * (1.0 - min(found for _, found, _ in measured))
    for contender, found, of_batches in sorted(measured, key=lambda one: one[2][place]):
        above = of_batches[place]
        for other, height in set_down:
            if abs(other - found) < width and above < height * least:
                above = height * least
        set_down.append((found, above))
        yield contender, found, of_batches[place], above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", nargs="+", help="a corpus to embed (default: made-up embeddings)")
    parser.add_argument("--questions", help="jsonl with a `question` in each line")
    parser.add_argument("--retriever", help="the encoder: a directory or the name of a model")
    parser.add_argument("--directory", type=Path, default=Path("tradeoff"), help="where real embeddings are kept")
    parser.add_argument("--size", type=int, default=200_000, help="passages at most")
    parser.add_argument("--dimension", type=int, default=768, help="D of made-up embeddings")
    parser.add_argument("--lists", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, help="write a picture of speed over recall")
    options = parser.parse_args()
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if bool(options.passages) != bool(options.retriever) or bool(options.passages) != bool(options.questions):
        parser.error("--passages, --questions and --retriever belong together")
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    start_log(None)
    if options.passages:
        embeddings, queries = real_embeddings(options)
    else:
        embeddings = topical(options.size, options.dimension, 0.64)
        queries = topical(QUERIES, options.dimension, 0.64, seed=1).float()
    contenders = [*ours(embeddings, options.lists), *of_faiss(embeddings, options.lists), brute_force(embeddings)]
    measured = measure(contenders, queries, options.rounds)
    print(f"\n{describe(embeddings)}; {options.threads} threads, k = {K}\n\n{table(measured)}")
    if options.plot:
        draw(measured, describe(embeddings), options.plot)


if __name__ == "__main__":
    sys.exit(main())
