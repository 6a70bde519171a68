"""Exact inner-product search over the embeddings of one rank.

Matrix products of different shapes round differently, so the order of near-ties would change with the chunk size and
the number of ranks. Therefore two passes over every chunk: a matrix product finds all rows that could be among the top
k, given the largest error such a product can have; these pairs are then scored by one fixed sequence of operations.
"""

import math

import torch
import torch.nn.functional as F

from src import device as device_choices

_EMBEDDING_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative rounding of the inputs of an fp32 matrix product, by torch.get_float32_matmul_precision(): none, TF32, bf16.
_INPUT_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
_MOST_SCORES = 2**24  # scores held at a time, whatever the number of queries
_MOST_PAIRS = 2**18  # pairs merged at a time: only many near-ties are more


class FlatIndex:
    """All rows are compared to every query; memory beyond the embeddings does not grow with their number."""

    def __init__(
        self, embeddings: torch.Tensor, *, largest_norm: float | None = None, chunk_rows: int | None = None
    ) -> None:
        """Keeps the tensor as it is: no copy, so it may be a memory-mapped file.

        Args:
            embeddings: `(n, D)` fp16, bf16 or fp32, on the device that is to search.
            largest_norm: at least the largest L2 norm of a row, where it is known (a saved index); computed otherwise.
            chunk_rows: rows compared at a time; by default what suits the device.

        Raises:
            ValueError: the embeddings are of another type, or (unless `largest_norm` is given) not all finite.
        """
        if embeddings.ndim != 2 or embeddings.dtype not in _EMBEDDING_DTYPES:
            raise ValueError(
                f"embeddings must be (n, D) in fp16, bf16 or fp32, found {tuple(embeddings.shape)} {embeddings.dtype}"
            )
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, found {chunk_rows}")
        self.embeddings = embeddings
        self.chunk_rows = chunk_rows or device_choices.search_chunk_rows(embeddings.device)
        self.largest_norm = measure_largest_norm(embeddings) if largest_norm is None else largest_norm

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of largest inner product, by score descending, then by row ascending.

        Args:
            queries: `(b, D)`, any floating-point type and device; b may be 0.
            k: at least 1; above n it means n.

        Returns:
            scores `(b, min(k, n))` fp32 and rows `(b, min(k, n))` int64, on the embeddings' device. They are the same,
            bit for bit, for every chunk size and for every way of cutting the rows into several indices.

        Raises:
            ValueError: k below 1, queries of another D, or scores that are not finite.
        """
        n, dimension = self.embeddings.shape
        if k < 1:
            raise ValueError(f"a search must ask for at least 1 passage, not {k}")
        if queries.ndim != 2 or queries.shape[1] != dimension:
            raise ValueError(f"the index holds embeddings of size {dimension}, the queries are {tuple(queries.shape)}")
        queries = queries.to(self.embeddings.device, torch.float32)
        k = min(k, n)
        scores = queries.new_full((len(queries), k), -torch.inf)
        rows = torch.full_like(scores, n, dtype=torch.int64)
        if not scores.numel():
            return scores, rows
        error = self._error_bound(queries)  # (b, 1)
        step = max(1, min(self.chunk_rows, _MOST_SCORES // len(queries)))
        buffers = _Buffers(self.embeddings, len(queries), min(step, n))
        for start in range(0, n, step):
            end = min(start + step, n)
            approximate = _matrix_product(queries, self.embeddings[start:end], buffers)  # (b, c)
            if not approximate.sum().isfinite():
                raise ValueError(
                    f"rows {start} to {end - 1} of this rank hold damaged embeddings: build the index anew"
                )
            candidates = torch.ge(approximate, scores[:, -1:] - error, out=buffers.mask[:, : end - start])
            if candidates.sum() > 2 * scores.numel() and k <= end - start:
                # the k best of this chunk alone are all at least so good
                kth = approximate.topk(k, sorted=False).values.amin(dim=1, keepdim=True)
                torch.ge(approximate, torch.maximum(kth - 2 * error, scores[:, -1:] - error), out=candidates)
            for pairs in candidates.nonzero().split(_MOST_PAIRS):  # (m, 2), by query, then by row
                query, row = pairs[:, 0], pairs[:, 1] + start
                scores, rows = _merge(scores, rows, query, row, self._exact_scores(queries, query, row))
        return scores, rows

    def _exact_scores(self, queries: torch.Tensor, query: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Second pass: the scores (m,) of pairs of a query's number (m,) and a row's number (m,)."""
        step = max(1, _block_rows(self.embeddings) // 4)  # several blocks are alive at a time here
        parts = [
            fixed_inner_products(queries[q], self.embeddings[r].float())
            for q, r in zip(query.split(step), row.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else queries.new_empty(0)

    def _error_bound(self, queries: torch.Tensor) -> torch.Tensor:
        """Most by which the two passes can differ, (b, 1).

        A sum of D products in any order is off by at most γ_D · Σ|q_i p_i| (Higham, Accuracy and Stability of Numerical
        Algorithms, 3.1), which is at most γ_D |q| |p| (Cauchy-Schwarz).
        """
        dimension = queries.shape[1]
        relative = 1.05 * (
            2 * _INPUT_ROUNDING[torch.get_float32_matmul_precision()]
            + (dimension + math.log2(dimension) + 4) * 2.0**-24
        )
        bound = queries.norm(dim=1, keepdim=True) * (relative * self.largest_norm)
        if not bound.isfinite().all():
            raise ValueError("queries hold values that are not finite (or overflow fp32): has the training diverged?")
        return bound + dimension * torch.finfo(torch.float32).tiny  # products too small for fp32 may be lost


def measure_largest_norm(embeddings: torch.Tensor, first_row: int = 0) -> float:
    """A number that no row's L2 norm is above, 0.1 % more than the largest.

    Raises:
        ValueError: a row, counted from `first_row`, is not finite.
    """
    largest = torch.zeros((), device=embeddings.device)
    step = _block_rows(embeddings)
    for start in range(0, len(embeddings), step):
        norms = embeddings[start : start + step].float().norm(dim=1)
        largest = torch.maximum(largest, norms.amax())  # carries a NaN on
    if not largest.isfinite():
        bad = next(i for i, row in enumerate(embeddings) if not row.float().norm().isfinite())
        raise ValueError(f"the embedding of passage {first_row + bad} is not finite: has the training diverged?")
    return largest.item() * (1 + 1e-3)  # the norms are rounded too


class _Buffers:
    """Memory of a search, taken once: b queries, chunks of c rows."""

    def __init__(self, embeddings: torch.Tensor, b: int, c: int) -> None:
        block_rows = min(_block_rows(embeddings), c)
        self.block = embeddings.new_empty((block_rows, embeddings.shape[1]), dtype=torch.float32)
        self.scores = embeddings.new_empty((b, c), dtype=torch.float32)
        self.mask = embeddings.new_empty((b, c), dtype=torch.bool)


def _matrix_product(queries: torch.Tensor, rows: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
    """First pass, (b, D), (c, D) -> (b, c). Rows become fp32 block by block, each small enough for a CPU's caches."""
    scores = buffers.scores[:, : len(rows)]
    for start in range(0, len(rows), len(buffers.block)):
        part = rows[start : start + len(buffers.block)]
        block = buffers.block[: len(part)].copy_(part)
        torch.mm(queries, block.T, out=scores[:, start : start + len(part)])
    return scores


def fixed_inner_products(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Inner products of matching rows, `(m, D), (m, D) -> (m,)` fp32, rounded in the same way whatever m.

    Element-wise operations only: multiply, then add the second half to the first until one number is left.
    """
    products = queries * passages
    while (width := products.shape[1]) > 1:
        if width % 2:
            products, width = F.pad(products, (0, 1)), width + 1
        products = products[:, : width // 2] + products[:, width // 2 :]
    return products[:, 0]


def _merge(
    scores: torch.Tensor, rows: torch.Tensor, query: torch.Tensor, row: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k of the top k so far (b, k) and new pairs (m,), which are in the order of their rows for each query."""
    b, k = scores.shape
    # Stable sorts keep the order of rows among equal scores: the rows so far come before the new ones.
    all_queries = torch.cat([torch.arange(b, device=query.device).repeat_interleave(k), query])
    all_scores = torch.cat([scores.flatten(), score])
    order = all_scores.sort(descending=True, stable=True).indices
    order = order[all_queries[order].sort(stable=True).indices]  # by query, and by score within
    sizes = all_queries.bincount(minlength=b)
    first = (sizes.cumsum(0) - sizes)[:, None] + torch.arange(k, device=query.device)  # (b, k)
    best = order[first]
    return all_scores[best], torch.cat([rows.flatten(), row])[best]


def _block_rows(embeddings: torch.Tensor) -> int:
    """Rows converted to fp32 at a time."""
    elements = 2**26 if embeddings.device.type == "cuda" else 2**20
    return max(1, elements // max(1, embeddings.shape[1]))
