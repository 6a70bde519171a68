"""The index over all ranks: every rank holds and searches a range of its rows, everybody gets the same answers."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from atlas.files.jsonl import JsonlCorpus
from atlas.index.compressed import CompressedIndex
from atlas.index.directory import Description
from atlas.index.flat import FlatIndex, best_exact_scores, exact_scores, measure_largest_norm
from atlas.index.live import LiveRows
from atlas.runtime import distributed
from atlas.runtime.distributed import shard_rows


class Hits(NamedTuple):
    """What was found for b queries, best first; equal scores by id ascending."""

    scores: torch.Tensor  # (b, k) fp32
    ids: torch.Tensor  # (b, k) int64: rows of the whole corpus


def best_of_ranks(found: Hits, sizes: Sequence[int], k: int, size: int) -> Hits:
    """The best k for the queries of this rank, of what every rank has found among its rows. Collective.

    Args:
        found: of this rank: scores and ids (B, at most k) for the queries of all ranks, best first, ties by id.
        sizes: how many of the B queries each rank has, in rank order.
        size: N, at least k.
    """
    if len(sizes) == 1:
        return found
    n, width = found.ids.shape  # fewer than k in a small shard
    scores = found.scores.new_full((n, k), -torch.inf)
    ids = torch.full_like(scores, size, dtype=torch.int64)
    scores[:, :width], ids[:, :width] = found
    pairs = torch.stack([scores.view(torch.int32).long(), ids], dim=-1)  # (B, k, 2): both in one message, exactly
    pairs = distributed.all_gather_rows(pairs)[0].view(len(sizes), n, k, 2)
    first, mine = sum(sizes[: distributed.rank()]), sizes[distributed.rank()]
    pairs = pairs[:, first : first + mine].transpose(0, 1).reshape(mine, len(sizes) * k, 2)  # (b, W·k, 2)
    # Ranks own ascending rows and sort their ties by row, so a stable sort leaves ties in ascending order.
    best = pairs[..., 0].int().view(torch.float32).sort(dim=1, descending=True, stable=True)
    return Hits(best.values[:, :k], pairs[..., 1].gather(1, best.indices[:, :k]))


def look_up(passages: JsonlCorpus, ids: torch.Tensor) -> list[list[dict[str, Any]]]:
    """The passages with these ids, `(b, k) -> b lists of k`; each is looked up once, and is the caller's own."""
    unique = sorted(set(ids.flatten().tolist()))
    rows = dict(zip(unique, passages[unique], strict=True))
    return [[dict(rows[i]) for i in of_query] for of_query in ids.tolist()]


class LocalIndex(Protocol):
    """How one rank searches its n rows: exactly (`FlatIndex`), or in a compressed form."""

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(b, D) fp32 -> scores (b, min(k, n)) fp32, rows (b, min(k, n)) int64`, by score descending, then row."""


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
            new values into it makes a new `ShardedIndex` of it. Of an updated index that lies in files they are
            `LiveRows`, of which slices are tensors.
        local: searches this rank's rows.
        stored: the files that hold the same embeddings (or, without any, the same codes); None when there are none.
    """

    def __init__(
        self,
        passages: JsonlCorpus,
        embeddings: torch.Tensor | LiveRows | None,
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
        distributed.raise_on_all_ranks(error)
        self.local = local
        self.compressed = local if isinstance(local, CompressedIndex) else None
        self.dimension = self.compressed.codec.dimension if self.compressed else embeddings.shape[-1]
        if self.compressed and self.compressed.list_sizes is not None:
            distributed.sum_over_ranks(self.compressed.list_sizes)

    def drop_embeddings(self) -> None:
        """Free the memory of a compressed index's embeddings: it is searched by its codes alone from now on."""
        self.embeddings = None

    @property
    def has_embeddings(self) -> bool:
        """Whether `embeddings_of` can answer: a compressed index may hold codes alone."""
        return self.embeddings is not None

    @property
    def type(self) -> str:
        """`flat`, or the Faiss factory string of its codes."""
        return self.compressed.codec.factory if self.compressed else "flat"

    def search(self, queries: torch.Tensor, k: int) -> Hits:
        """The best min(k, N) passages of each query, whatever rank holds them: `(b, D) -> Hits` on the queries' device.

        Collective. Ranks may bring different b, 0 included, but the same k. Only queries, scores and ids travel. Exact
        search finds the same, bit for bit, at every world size. Of a compressed index only rows may change whose score
        equals the k-th; with refinement every score is the exact one, bit for bit, and only candidates may change that
        equal the last one in their score by the codes.

        Raises:
            ValueError: k below 1, queries of another D, or values that are not finite.
        """
        k = min(k, self.size) if k > 0 else k
        if self.compressed is None or self.refine_factor == 1:
            return self._search(queries, k)
        return self._refine(queries, self._search(queries, min(self.refine_factor * k, self.size)), k)

    def _search(self, queries: torch.Tensor, k: int) -> Hits:
        all_queries, sizes = distributed.all_gather_rows(queries.float())  # (B, D), B = Σb
        scores, rows = self.local.search(all_queries, k)
        found = Hits(scores.to(queries.device), (rows + self.rows.start).to(queries.device))
        return best_of_ranks(found, sizes, k, self.size)

    def _refine(self, queries: torch.Tensor, hits: Hits, k: int) -> Hits:
        """The best k of the hits by their embeddings: each rank scores those that it owns. Collective."""
        ids = hits.ids.sort(dim=1).values  # so that ties stay in ascending order
        best = self._scores(queries, ids, partial(best_exact_scores, k=k)).sort(dim=1, descending=True, stable=True)
        return Hits(best.values[:, :k], ids.gather(1, best.indices[:, :k]))

    def scores_of(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The scores (b, k) fp32 of these passages (b, k) by their embeddings, bit for bit those of exact search.

        Collective. Ranks may bring different b, but the same k.
        """
        return self._scores(queries, ids, exact_scores)

    def _scores(self, queries: torch.Tensor, ids: torch.Tensor, score: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Scores (b, k) of passages (b, k): each rank scores those that it owns. Collective."""
        all_queries, sizes = distributed.all_gather_rows(queries.float())
        all_ids, _ = distributed.all_gather_rows(ids)  # (B, k)
        owned = self._owned(all_ids)
        query, rows = owned.nonzero()[:, 0], all_ids[owned] - self.rows.start
        scores = torch.zeros_like(all_ids, dtype=torch.float32)  # each id is on one rank: the sum adds zeros only
        scores[owned] = score(all_queries, query, rows, partial(self._read, device=ids.device))
        first = sum(sizes[: distributed.rank()])
        return distributed.sum_over_ranks(scores)[first : first + len(ids)]

    def _owned(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of the ids are this rank's."""
        return (ids >= self.rows.start) & (ids < self.rows.stop)

    def _read(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Embeddings of rows of this rank, `(m,) -> (m, D)` fp32 on this device."""
        return self.embeddings.index_select(0, rows.to(self.embeddings.device)).to(device, torch.float32)

    def embeddings_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of passages anywhere in the index, `(b, k) -> (b, k, D)` fp32, on the device of the ids.

        Collective. Ranks may bring different b, but the same k. For a frozen passage encoder: what it embedded once
        needs no second pass.
        """
        all_ids, sizes = distributed.all_gather_rows(ids)  # (B, k)
        owned = self._owned(all_ids)  # each id on exactly one rank, so the sum adds zeros only
        filled = torch.zeros((*all_ids.shape, self.dimension), dtype=torch.float32, device=ids.device)  # (B, k, D)
        filled[owned] = self._read(all_ids[owned] - self.rows.start, ids.device)
        first = sum(sizes[: distributed.rank()])
        return distributed.sum_over_ranks(filled)[first : first + len(ids)]
