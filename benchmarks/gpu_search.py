"""Does the device find what a CPU finds? The search half of `benchmarks.gpu_check`."""

from collections.abc import Iterator

import torch

from atlas import config
from atlas.index.build import compress
from atlas.index.codec import Compression
from atlas.index.flat import FlatIndex
from atlas.index.pq_search import ProductQuantizerSearch
from atlas.index.sharded import ShardedIndex
from atlas.index.store import open_index, save_index
from atlas.model.load import Model
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from benchmarks.gpu_bench import CPU, Bench, Row, has_module, products_in

NO_FAISS = "not run: no Faiss"
K = 50
PARTS = 2**14  # rows that are encoded at a time


def found_rows(check: str, found: torch.Tensor, wanted: torch.Tensor, least: float = 1.0) -> Row:
    """Rows that were found, (b, k), beside those that a CPU finds; in the same order if all are expected."""
    if least == 1.0:
        others = int((found.cpu() != wanted).sum())
        measured = f"{others} of {wanted.numel()} places differ" if others else "the same"
        return Row(check, "rows as on the CPU, in this order", measured, ok=not others)
    common = (found.cpu()[:, :, None] == wanted[:, None]).any(2).float().mean().item()
    return Row(check, f"at least {least:.0%} of the CPU's rows", f"{common:.1%}", ok=common >= least)


def flat(bench: Bench) -> Iterator[Row]:
    """Exact search, with ties, in small chunks, and where products are less exact."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(bench.sizes.compared, bench.sizes.dimension, generator=generator).half()
    rows[1000:1100] = rows[0]
    queries = torch.randn(9, bench.sizes.dimension, generator=generator)
    queries[0] = rows[0].float()
    wanted = FlatIndex(rows).search(queries, 110)
    there = rows.to(bench.device)
    kinds = {
        "": (FlatIndex(there), "fp32"),
        ", in chunks of 777": (FlatIndex(there, chunk_rows=777), "fp32"),
        ", fp32 rows in tf32": (FlatIndex(there.float()), "tf32"),
    }
    for name, (index, precision) in kinds.items():
        with products_in(precision):
            scores, found = index.search(queries.to(bench.device), 110)
        row = found_rows(f"flat search of {len(rows)} rows with ties{name}", found, wanted[1])
        off = (scores.cpu() - wanted[0]).abs().max().item()
        yield row._replace(measured=f"{row.measured}, scores {off:.0e} off", ok=row.ok and off < 1e-3)


def train_centroids(sample: torch.Tensor, m: int, rounds: int = 6) -> torch.Tensor:
    """The centroids of a product quantizer by k-means: (n, d) -> (m, 256, d / m)."""
    parts = sample.view(len(sample), m, -1).transpose(0, 1).contiguous()  # (m, n, d / m)
    starts = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:256]
    centroids = parts[:, starts.to(sample.device)].clone()
    for _ in range(rounds):
        nearest = nearest_centroids(parts, centroids)[..., None]  # (m, n, 1)
        sums = torch.zeros_like(centroids).scatter_add_(1, nearest.expand_as(parts), parts)
        counts = torch.zeros_like(centroids[..., :1]).scatter_add_(1, nearest, torch.ones_like(parts[..., :1]))
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def nearest_centroids(parts: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(m, n, d / m), (m, 256, d / m) -> (m, n) int64."""
    products = torch.bmm(parts, centroids.transpose(1, 2))  # (m, n, 256)
    return (centroids.square().sum(2)[:, None] - 2 * products).argmin(2)


def encode(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(n, d) -> (n, m) uint8."""
    parts = rows.view(len(rows), len(centroids), -1).transpose(0, 1)
    return nearest_centroids(parts, centroids).T.to(torch.uint8)


def product_quantizer(bench: Bench) -> Iterator[Row]:
    """Search of codes by torch."""
    n, dimension, m = bench.sizes.compared, bench.sizes.dimension, bench.sizes.code_size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, dimension, generator=generator).to(bench.device)
    queries, exact = torch.randn(40, dimension, generator=generator), rows.half()
    best = FlatIndex(exact).search(queries, K)[1].cpu()
    centroids = train_centroids(rows[:8192], m)
    codes = torch.cat([encode(part, centroids) for part in rows.split(PARTS)])
    wanted = ProductQuantizerSearch(codes.cpu(), centroids.cpu()).search(queries, K)[1]
    found = ProductQuantizerSearch(codes, centroids).search(queries.to(bench.device), K)[1]
    row = found_rows(f"PQ{m} search of {n} codes", found, wanted)
    recall = (found.cpu()[:, :, None] == best[:, None]).any(2).float().mean().item()
    yield row._replace(measured=f"{row.measured}, recall@{K} {recall:.0%}")


def from_text(bench: Bench) -> Iterator[Row]:
    """An index built from texts and searched for questions, as a run does it, with processes that tokenize."""
    ids = {}
    in_runs = devices.embedder_precision(bench.device, None)
    for device, precision in ((CPU, "fp32"), (bench.device, in_runs)):
        retriever = bench.world.retriever().to(device)
        model = Model(None, retriever, bench.world.inputs(device))
        run, learning = config.Run(embedder_precision=precision), config.RetrieverTraining()
        retrieval = Retrieval(model, bench.world.corpus, config.Index(), run, learning, device)
        retrieval.build()
        ids[device] = retrieval.search(bench.world.questions, 10).ids.cpu()
    check = f"search of an index built from {len(bench.world.passages)} texts, {in_runs}"
    yield found_rows(check, ids[bench.device], ids[CPU], least=0.9)


def saved(bench: Bench) -> Iterator[Row]:
    """Indices that are saved and opened again: flat ones, and with Faiss compressed ones."""
    n, dimension, m = len(bench.world.corpus), bench.sizes.dimension, bench.sizes.code_size
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(n, dimension, generator=generator).half()
    queries = torch.randn(16, dimension, generator=generator)
    lists = max(4, n // 100)
    kinds = {
        "flat": Compression("flat"),
        f"PQ{m}": Compression(f"PQ{m}"),
        f"IVF{lists},PQ{m}": Compression(f"IVF{lists},PQ{m}", nprobe=lists // 2),
        f"IVF{lists},PQ{m}, refined": Compression(f"IVF{lists},PQ{m}", nprobe=lists // 2, refine_factor=4),
        f"IVF{lists},Flat": Compression(f"IVF{lists},Flat", nprobe=lists // 2),
    }
    k = min(K, n // 8)
    for name, kind in kinds.items():
        check = f"{name}: trained, searched, saved, opened"
        if kind.compresses and not has_module("faiss"):
            yield Row(check, "rows as on the CPU", NO_FAISS)
            continue
        index = ShardedIndex(bench.world.corpus, embeddings)
        index = compress(index, kind, device=CPU) if kind.compresses else index
        wanted = index.search(queries, k).ids
        save_index(bench.world.scratch / "index", index)
        opened = open_index(bench.world.scratch / "index", device=bench.device, compression=kind)
        found = opened.search(queries.to(bench.device), k).ids
        yield found_rows(check, found, wanted, least=0.95 if kind.compresses else 1.0)


CHECKS = (flat, product_quantizer, from_text, saved)
