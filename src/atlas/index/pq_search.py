"""Search among product-quantized passages on any device, from the codes alone.

A code's score is the sum of m numbers looked up in a table of every sub-query against every centroid (Jégou et al.
2011, Product Quantization for Nearest Neighbor Search, section 3). `embedding_bag` makes that sum for all queries of a
table at once, which takes a third to a sixth of the time of decoding the codes for a matrix product. As in the flat
index this is a first pass, and its best rows are decoded and scored again by one fixed sequence of operations.
"""

import math

import torch
import torch.nn.functional as F

from atlas.index.flat import (
    FirstPass,
    block_rows,
    checked_chunk_rows,
    checked_queries,
    error_bound,
    top_k,
)

_QUERIES_PER_TABLE = 32  # 128 bytes for each centroid: more no longer fit a CPU's caches


class ProductQuantizerSearch:
    """All codes are compared to every query; memory beyond the codes does not grow with their number."""

    def __init__(
        self,
        codes: torch.Tensor,
        centroids: torch.Tensor,
        *,
        chunk_rows: int | None = None,
    ) -> None:
        """Keeps the codes as they are: no copy, so they may be a memory-mapped file.

        Args:
            codes: `(n, m)` uint8, on the device that is to search.
            centroids: `(m, 256, d / m)` fp32, for embeddings of size d.
            chunk_rows: codes compared at a time; by default what suits the device.

        Raises:
            ValueError: shapes or types that do not fit each other, or centroids that are not finite.
        """
        if centroids.ndim != 3 or centroids.shape[1] != 256 or centroids.dtype != torch.float32:
            raise ValueError(f"centroids must be (m, 256, d / m) in fp32, found {_describe(centroids)}")
        if codes.ndim != 2 or codes.dtype != torch.uint8 or codes.shape[1] != len(centroids):
            raise ValueError(f"codes must be (n, {len(centroids)}) in uint8, found {_describe(codes)}")
        self.codes = codes
        self.centroids = centroids.to(codes.device)
        self.dimension = len(centroids) * centroids.shape[2]
        self.chunk_rows = checked_chunk_rows(chunk_rows)
        longest = self.centroids.square().sum(2).amax(1).sum().sqrt().item()  # of all vectors that codes can stand for
        if not math.isfinite(longest):
            raise ValueError("the centroids of the quantizer are not all finite: train it again")
        self._largest_norm = longest * (1 + 1e-3)
        self._first_centroid = 256 * torch.arange(len(centroids), dtype=torch.int32, device=codes.device)  # (m,)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of largest inner product with what their codes stand for, by score descending, then row ascending.

        Args:
            queries: `(b, d)`, any floating-point type and device; b may be 0.
            k: at least 1; above n it means n.

        Returns:
            scores `(b, min(k, n))` fp32 and rows `(b, min(k, n))` int64, on the codes' device. They are the same, bit
            for bit, for every chunk size and for every way of cutting the rows into several indices.

        Raises:
            ValueError: k below 1, queries of another d, or values that are not finite.
        """
        queries = checked_queries(queries, k, self.dimension, self.codes.device)
        parts = queries.chunk(max(1, math.ceil(len(queries) / _QUERIES_PER_TABLE)))
        found = [
            top_k(part, k, len(self.codes), [self._first_pass(part)], self._decode, self.chunk_rows) for part in parts
        ]
        return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])

    def _first_pass(self, queries: torch.Tensor) -> FirstPass:
        m, _, width = self.centroids.shape
        sub_queries = queries.view(-1, m, width).permute(1, 2, 0)  # (m, d / m, b)
        table = torch.bmm(self.centroids, sub_queries).flatten(0, 1)  # (m · 256, b)

        def score(start: int, end: int, out: torch.Tensor) -> None:
            step = block_rows(self.codes)
            for codes, into in zip(self.codes[start:end].split(step), out.split(step, dim=1), strict=True):
                into.copy_(F.embedding_bag(self._centroid_numbers(codes), table, mode="sum").T)

        return FirstPass(score, error_bound(queries, self._largest_norm))

    def _decode(self, rows: torch.Tensor) -> torch.Tensor:  # (m,) -> (m, d)
        return F.embedding(
            self._centroid_numbers(self.codes.index_select(0, rows)), self.centroids.flatten(0, 1)
        ).flatten(1)

    def _centroid_numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """(c, m) uint8 -> (c, m) int32, rows of the centroids' (m · 256, d / m)."""
        return codes.int() + self._first_centroid


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
