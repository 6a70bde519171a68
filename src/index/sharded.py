"""The index over all ranks: every rank holds and searches a range of its rows, everybody gets the same answers."""

from typing import Any, NamedTuple, Protocol

import torch

from src import distributed
from src.index.flat import FlatIndex, measure_largest_norm
from src.jsonl import JsonlCorpus


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


class ShardedIndex:
    """N passages and their embeddings, this rank's rows in memory.

    Attributes:
        passages: the corpus of all N passages, random access by row.
        size: N.
        dimension: D.
        rows: the rows of this rank.
        embeddings: `(len(rows), D)` of this rank. Whoever writes new values into it makes a new `ShardedIndex` of it.
    """

    def __init__(self, passages: JsonlCorpus, embeddings: torch.Tensor, local: LocalIndex | None = None) -> None:
        """Collective: every rank brings the same corpus and the embeddings of `shard_rows` of it.

        Args:
            embeddings: `(n, D)`, fp16 as a rule, on the device that is to search; memory-mapped is fine.
            local: searches this rank's rows; by default exactly.

        Raises:
            ValueError: on all ranks when, on any of them, the number of rows is another or a value is not finite.
        """
        self.passages, self.size = passages, len(passages)
        self.rows = shard_rows(self.size, distributed.rank(), distributed.world_size())
        self.embeddings, self.dimension = embeddings, embeddings.shape[-1]
        error = None
        if len(embeddings) != len(self.rows):
            error = ValueError(f"{len(embeddings)} embeddings for the {len(self.rows)} passages of this rank")
        else:
            try:
                norm = None if local else measure_largest_norm(embeddings, self.rows.start)
                self.local = local or FlatIndex(embeddings, largest_norm=norm)
            except ValueError as bad_embeddings:
                error = bad_embeddings
        distributed.raise_anywhere(error)

    def search(self, queries: torch.Tensor, k: int) -> Hits:
        """The best min(k, N) passages of each query, whatever rank holds them: `(b, D) -> Hits` on the queries' device.

        Collective. Ranks may bring different b, 0 included, but the same k. Only queries, scores and ids travel. For an
        exact local index the result is the same, bit for bit, at every world size.

        Raises:
            ValueError: k below 1, queries of another D, or values that are not finite.
        """
        k = min(k, self.size) if k > 0 else k
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
        local = all_ids - self.rows.start
        owned = (local >= 0) & (local < len(self.rows))  # each id on exactly one rank, so the sum adds zeros only
        filled = torch.zeros((*all_ids.shape, self.dimension), dtype=torch.float32, device=ids.device)  # (B, k, D)
        filled[owned] = self.embeddings[local[owned].to(self.embeddings.device)].to(ids.device, torch.float32)
        first = sum(sizes[: distributed.rank()])
        return distributed.sum_over_ranks(filled)[first : first + len(ids)]
