"""The index over all ranks: every rank holds and searches a range of its rows, everybody gets the same answers."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from atlas.files.jsonl import JsonlCorpus
from atlas.index.files import WRITE_BYTES, Description
from atlas.index.flat import FlatIndex, fixed_inner_products, measure_largest_norm
from atlas.index.quantized import (
    Compression,
    QuantizedIndex,
    Quantizer,
    all_cores,
    explain_nprobe,
    train,
    training_rows,
)
from atlas.runtime import distributed

log = logging.getLogger("atlas")
Progress = Callable[[str, int, int | None], None]


class Hits(NamedTuple):
    """What was found for b queries, best first; equal scores by id ascending."""

    scores: torch.Tensor  # (b, k) fp32
    ids: torch.Tensor  # (b, k) int64: rows of the whole corpus


class LocalIndex(Protocol):
    """How one rank searches its n rows: exactly (`FlatIndex`), or in a compressed form."""

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(b, D) fp32 -> scores (b, min(k, n)) fp32, rows (b, min(k, n)) int64`, by score descending, then row."""


def shard_rows(n: int, rank: int, world_size: int) -> range:
    """The rows of n that this rank owns: contiguous, in the order of the ranks, sizes that differ by at most 1."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


class Stored(NamedTuple):
    """The saved index that embeddings come from."""

    directory: Path
    description: Description


class ShardedIndex:
    """N passages, and this rank's rows of their embeddings, their codes, or both.

    Attributes:
        passages: the corpus of all N passages, random access by row.
        size: N.
        dimension: D.
        rows: the rows of this rank.
        embeddings: `(len(rows), D)` of this rank, or None where a compressed index does without them. Whoever writes
            new values into it makes a new `ShardedIndex` of it.
        local: searches this rank's rows.
        stored: the files that hold the same embeddings (or, without any, the same codes); None when there are none.
    """

    def __init__(
        self,
        passages: JsonlCorpus,
        embeddings: torch.Tensor | None,
        local: LocalIndex | None = None,
        *,
        refine_factor: int = 1,
        stored: Stored | None = None,
    ) -> None:
        """Collective: every rank brings the same corpus and the embeddings of `shard_rows` of it.

        Args:
            embeddings: `(n, D)`, fp16 as a rule; memory-mapped is fine. On the device that is to search, unless `local`
                does that.
            local: searches this rank's rows; by default exactly.
            refine_factor: of a compressed index: so many times k candidates are scored again with their embeddings.

        Raises:
            ValueError: on all ranks when, on any of them, the number of rows is another, a value is not finite, or
                there are no embeddings to refine with.
        """
        self.passages, self.size = passages, len(passages)
        self.rows = shard_rows(self.size, distributed.rank(), distributed.world_size())
        self.embeddings, self.refine_factor, self.stored = embeddings, refine_factor, stored
        error = None
        try:
            if embeddings is not None and len(embeddings) != len(self.rows):
                raise ValueError(f"{len(embeddings)} embeddings for the {len(self.rows)} passages of this rank")
            if local is None:
                local = FlatIndex(embeddings, largest_norm=measure_largest_norm(embeddings, self.rows.start))
            if refine_factor > 1 and embeddings is None:
                raise ValueError(
                    f"--refine_factor {refine_factor} needs the embeddings, and this index holds codes alone: leave "
                    "the flag out, or save the index without --save_index_codes_only"
                )
        except ValueError as found:
            error = found
        distributed.raise_anywhere(error)
        self.local = local
        self.compressed = local if isinstance(local, QuantizedIndex) else None
        self.dimension = self.compressed.quantizer.dimension if self.compressed else embeddings.shape[-1]
        if self.compressed and self.compressed.list_sizes is not None:
            distributed.sum_over_ranks(self.compressed.list_sizes)

    @property
    def has_embeddings(self) -> bool:
        """Whether `embeddings_of` can answer: a compressed index may hold codes alone."""
        return self.embeddings is not None

    @property
    def type(self) -> str:
        """`flat`, or the Faiss factory string of its codes."""
        return self.compressed.quantizer.factory if self.compressed else "flat"

    def search(self, queries: torch.Tensor, k: int) -> Hits:
        """The best min(k, N) passages of each query, whatever rank holds them: `(b, D) -> Hits` on the queries' device.

        Collective. Ranks may bring different b, 0 included, but the same k. Only queries, scores and ids travel. The
        result is the same, bit for bit, at every world size.

        Raises:
            ValueError: k below 1, queries of another D, or values that are not finite.
        """
        k = min(k, self.size) if k > 0 else k
        if self.compressed is None or self.refine_factor == 1:
            return self._search(queries, k)
        return self._refine(queries, self._search(queries, min(self.refine_factor * k, self.size)), k)

    def _search(self, queries: torch.Tensor, k: int) -> Hits:
        mine = len(queries)
        all_queries, sizes = distributed.all_gather_rows(queries.float())  # (B, D), B = Σb
        local_scores, local_rows = self.local.search(all_queries, k)
        found = local_scores.shape[1]  # fewer than k in a small shard
        scores = queries.new_full((len(all_queries), k), -torch.inf, dtype=torch.float32)
        ids = torch.full_like(scores, self.size, dtype=torch.int64)
        scores[:, :found] = local_scores
        ids[:, :found] = local_rows + self.rows.start
        pairs = torch.stack([scores.view(torch.int32).long(), ids], dim=-1)  # (B, k, 2): both in one message, exactly
        pairs = distributed.all_gather_rows(pairs)[0].view(len(sizes), len(all_queries), k, 2)
        first = sum(sizes[: distributed.rank()])
        pairs = pairs[:, first : first + mine].transpose(0, 1).reshape(mine, len(sizes) * k, 2)  # (b, W·k, 2)
        # Ranks own ascending rows and sort their ties by row, so a stable sort leaves ties in ascending order.
        best = pairs[..., 0].int().view(torch.float32).sort(dim=1, descending=True, stable=True)
        return Hits(best.values[:, :k], pairs[..., 1].gather(1, best.indices[:, :k]))

    def _refine(self, queries: torch.Tensor, hits: Hits, k: int) -> Hits:
        """The best k of the hits by their embeddings: each rank scores those that it owns. Collective."""
        ids = hits.ids.sort(dim=1).values  # so that ties stay in ascending order
        all_queries, sizes = distributed.all_gather_rows(queries.float())
        all_ids, _ = distributed.all_gather_rows(ids)  # (B, r·k)
        owned, embeddings = self._owned(all_ids)
        scores = torch.zeros_like(all_ids, dtype=torch.float32)  # each id is on one rank: the sum adds zeros only
        scores[owned] = fixed_inner_products(all_queries[owned.nonzero()[:, 0]], embeddings)
        first = sum(sizes[: distributed.rank()])
        best = distributed.sum_over_ranks(scores)[first : first + len(ids)].sort(dim=1, descending=True, stable=True)
        return Hits(best.values[:, :k], ids.gather(1, best.indices[:, :k]))

    def _owned(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the ids (b, k) are this rank's, and the embeddings of those (m, D) in fp32 on the ids' device."""
        local = ids - self.rows.start
        owned = (local >= 0) & (local < len(self.rows))
        return owned, self.embeddings[local[owned].to(self.embeddings.device)].to(ids.device, torch.float32)

    def passages_of(self, ids: torch.Tensor) -> list[list[dict[str, Any]]]:
        """The passages with these ids, `(b, k) -> b lists of k`; each is looked up once, and is the caller's own."""
        unique = sorted(set(ids.flatten().tolist()))
        passages = dict(zip(unique, self.passages[unique], strict=True))
        return [[dict(passages[i]) for i in row] for row in ids.tolist()]

    def embeddings_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of passages anywhere in the index, `(b, k) -> (b, k, D)` fp32, on the device of the ids.

        Collective. Ranks may bring different b, but the same k. For a frozen passage encoder: what it embedded once
        needs no second pass.
        """
        all_ids, sizes = distributed.all_gather_rows(ids)  # (B, k)
        owned, embeddings = self._owned(all_ids)  # each id on exactly one rank, so the sum adds zeros only
        filled = torch.zeros((*all_ids.shape, self.dimension), dtype=torch.float32, device=ids.device)  # (B, k, D)
        filled[owned] = embeddings
        first = sum(sizes[: distributed.rank()])
        return distributed.sum_over_ranks(filled)[first : first + len(ids)]


def compress(
    index: ShardedIndex,
    compression: Compression,
    *,
    device: torch.device | None = None,
    quantizer: Quantizer | None = None,
    progress: Progress = lambda what, done, of: None,
) -> ShardedIndex:
    """An index of another kind made of the embeddings of this one, with which it shares them. Collective.

    Args:
        device: that is to search; by default that of the embeddings.
        quantizer: to encode with; by default one is trained, on rank 0, on rows that depend on the seed alone.
        progress: told what is going on, how much of it is done, and of how much (None: nobody knows).

    Raises:
        ValueError: the kind cannot be made for this D (a flag is named), an embedding is not finite.
    """
    factory = quantizer.factory if quantizer else compression.factory(index.size, index.dimension)
    device = device or index.embeddings.device
    if factory == "flat":
        return ShardedIndex(index.passages, copy_to(index.embeddings, device), stored=index.stored)
    quantizer = quantizer or train_quantizer(index, factory, compression, progress)
    codes, largest_norm = encode(quantizer, index, progress)
    return index_of_codes(
        index.passages, index.embeddings, quantizer, codes, largest_norm, compression, device, stored=index.stored
    )


def index_of_codes(
    passages: JsonlCorpus,
    embeddings: torch.Tensor | None,
    quantizer: Quantizer,
    codes: np.ndarray,
    largest_norm: float,
    compression: Compression,
    device: torch.device,
    stored: Stored | None = None,
) -> ShardedIndex:
    """An index over codes `(n, code_size)` of this rank's rows; `largest_norm` bounds their norms. Collective."""
    local = QuantizedIndex(
        quantizer,
        codes,
        largest_norm=max(distributed.gather_objects(largest_norm)),
        nprobe=compression.nprobe,
        device=device,
        heartbeat=distributed.progress,
    )
    distributed.wait_for_all("filling the index")
    if explanation := explain_nprobe(quantizer.lists, compression.nprobe):
        log.info(explanation)
    return ShardedIndex(passages, embeddings, local, refine_factor=compression.refine_factor, stored=stored)


def encode(
    quantizer: Quantizer, index: ShardedIndex, progress: Progress = lambda what, done, of: None
) -> tuple[np.ndarray, float]:
    """Codes `(n, code_size)` of this rank's embeddings and what bounds the norms of what they stand for. Collective."""
    codes, largest_norm, error = np.empty((len(index.rows), quantizer.code_size), np.uint8), 0.0, None
    try:
        for start, part, norm in encode_parts(quantizer, index, progress):
            codes[start : start + len(part)] = part
            largest_norm = max(largest_norm, norm)
    except ValueError as bad_embedding:
        error = bad_embedding
    distributed.wait_for_all("encoding the passages")
    distributed.raise_anywhere(error)
    return codes, largest_norm


def encode_parts(
    quantizer: Quantizer, index: ShardedIndex, progress: Progress = lambda what, done, of: None
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Codes of this rank's embeddings part by part: its first row, codes `(m, code_size)`, what bounds their norms.

    Raises:
        ValueError: an embedding is not finite.
    """
    n, step = len(index.rows), 2**14
    for start in range(0, n, step):
        yield start, *quantizer.encode(index.embeddings[start : start + step], index.rows.start + start)
        progress("encoding", min(start + step, n), n)
        distributed.progress()


def copy_to(embeddings: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The embeddings on a device: as they are if they are there, else copied piece by piece."""
    if embeddings.device.type == device.type:
        return embeddings
    copy = torch.empty(embeddings.shape, dtype=embeddings.dtype, device=device)
    step = max(1, WRITE_BYTES // max(1, embeddings.element_size() * embeddings.shape[1]))
    for start in range(0, len(embeddings), step):
        copy[start : start + step] = embeddings[start : start + step]
        distributed.progress()
    return copy


def train_quantizer(index: ShardedIndex, factory: str, compression: Compression, progress: Progress) -> Quantizer:
    """Train on rank 0 on a sample of all ranks' rows, and give every rank the same quantizer. Collective.

    Raises:
        ValueError: on every rank, an embedding in the sample is not finite.
    """
    rows = training_rows(factory, index.dimension, index.size, compression.train_size, compression.seed)
    sample = np.empty((len(rows) if distributed.is_main() else 0, index.dimension), np.float32)
    step = max(1, WRITE_BYTES // (2 * index.dimension))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        mine = torch.from_numpy(part[(part >= index.rows.start) & (part < index.rows.stop)] - index.rows.start)
        parts = distributed.gather_on_main(index.embeddings[mine.to(index.embeddings.device)].to("cpu", torch.float16))
        if distributed.is_main():
            sample[start : start + len(part)] = torch.cat(parts).numpy()
        progress("gathering a sample", min(start + step, len(rows)), len(rows))
    content = error = None
    if distributed.is_main():
        log.info("Training the quantizer %s on %d of %d passages", factory, len(rows), index.size)
        started = time.monotonic()
        try:
            if not np.isfinite(sample).all():
                bad = rows[np.flatnonzero(~np.isfinite(sample).all(1))[0]]
                raise ValueError(f"the embedding of passage {bad} is not finite: has the training diverged?")
            with (
                _every_second(lambda: progress("training the quantizer", round(time.monotonic() - started), None)),
                all_cores(),
            ):
                content = train(factory, sample, all_rows=compression.train_size is not None).serialize()
            log.info("Trained the quantizer in %.1f s", time.monotonic() - started)
        except ValueError as found:
            error = found
    distributed.wait_for_all("training the quantizer")
    distributed.raise_anywhere(error)
    return Quantizer.load(distributed.from_main(content), factory, index.dimension)


@contextlib.contextmanager
def _every_second(report: Callable[[], None]) -> Iterator[None]:
    """Report, and tell the other ranks that this one is alive, while something runs that cannot say so itself."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(1.0):
            report()
            distributed.progress()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
