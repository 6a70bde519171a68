"""Exact inner-product search over the embeddings of one rank, and the top k that every search of ours is made of.

Matrix products of different shapes round differently, so the order of near-ties would change with the chunk size and
the number of ranks. Therefore two passes over every chunk: an approximate one finds all rows that could be among the
top k, given the largest error it can have; these pairs are then scored by one fixed sequence of operations. Since the
second pass decides, the first may be as coarse as is fast: the 16 bits of the rows on GPUs, bf16 on CPUs made for it,
fp32 elsewhere. A GPU first keeps a few more rows than are wanted, and looks closer only where these cannot tell.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from atlas.index.live import LiveRows
from atlas.runtime import device as device_choices

_EMBEDDING_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative error of the inputs of an fp32 matrix product, by torch.get_float32_matmul_precision(): none, TF32 (which may
# cut off what does not fit), bf16.
_INPUT_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-8}
_MOST_SCORES = 2**24  # scores held at a time, whatever the number of queries
_FEWEST_SCORES = 2**16  # below, a chunk's fixed cost is more than that of its products
_TILE = 64  # neighbouring scores that are compared by their largest first
_MOST_PAIRS = 2**18  # pairs merged at a time: only many near-ties are more
_SPARE = 64  # rows kept beyond the k best, at least
# On CPUs: up to _FEW queries, products with fp16 rows as they are take less time than converting the rows; from _MANY
# on, where bf16 is fast, products in bf16 save more time than converting to bf16 takes. (Measured with D = 768 on
# AVX512-BF16, and the first on AVX2.)
_FEW_QUERIES, _MANY_QUERIES = 2, 16
_LARGEST_FP16_SCORE = 2.0**15  # half of what fp16 can hold


class FirstPass(NamedTuple):
    """An approximate way to score all rows."""

    score: Callable[[int, int, torch.Tensor], None]  # (start, end, out (b, end - start) fp32), fills `out`
    error: torch.Tensor  # (b, 1): most by which it differs from the second pass


class FlatIndex:
    """All rows are compared to every query; memory beyond the embeddings does not grow with their number."""

    def __init__(
        self, embeddings: torch.Tensor | LiveRows, *, largest_norm: float | None = None, chunk_rows: int | None = None
    ) -> None:
        """Keeps the tensor as it is: no copy, so it may be a memory-mapped file, or the live rows of several.

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
        self.embeddings = embeddings
        self.chunk_rows = checked_chunk_rows(chunk_rows)
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
        queries = checked_queries(queries, k, dimension, self.embeddings.device)
        passes = [self._fp32_pass(queries)]
        if dtype := self._half_precision(queries):
            passes.insert(0, self._half_pass(queries, dtype))
        return top_k(queries, k, n, passes, lambda rows: self.embeddings.index_select(0, rows).float(), self.chunk_rows)

    def _fp32_pass(self, queries: torch.Tensor) -> FirstPass:
        """Rows become fp32 block by block, each small enough for a CPU's caches."""
        block = cache(lambda: self._block(torch.float32))  # where nothing is scored, it takes no memory

        def score(start: int, end: int, out: torch.Tensor) -> None:
            for part, into in self._blocks(start, end, out):
                torch.mm(queries, block()[: len(part)].copy_(part).T, out=into)

        return FirstPass(score, error_bound(queries, self.largest_norm))

    def _half_precision(self, queries: torch.Tensor) -> torch.dtype | None:
        """The 16-bit numbers that make the first pass faster than fp32 does, if any do."""
        stored = self.embeddings.dtype
        if device_choices.sums_half_products_in_fp32(self.embeddings.device):
            return stored if stored != torch.float32 else None
        few = stored == torch.float16 and len(queries) <= _FEW_QUERIES
        if few and device_choices.cpu_multiplies_fp16(self.embeddings.device):
            small = (queries.norm(dim=1) * self.largest_norm < _LARGEST_FP16_SCORE).all()
            return torch.float16 if small else None
        if not device_choices.cpu_prefers_bf16(self.embeddings.device):
            return None
        return torch.bfloat16 if stored == torch.bfloat16 or len(queries) >= _MANY_QUERIES else None

    def _half_pass(self, queries: torch.Tensor, dtype: torch.dtype) -> FirstPass:
        """Products of 16-bit numbers, summed in fp32."""
        stored, rounded = self.embeddings.dtype, queries.to(dtype)
        convert = stored != dtype
        block, half_block = (self._block(torch.float32), self._block(dtype)) if convert else (None, None)

        def score(start: int, end: int, out: torch.Tensor) -> None:
            for part, into in self._blocks(start, end, out):
                if convert:  # by way of fp32: straight from fp16 to bf16 takes four times as long
                    part = half_block[: len(part)].copy_(block[: len(part)].copy_(part))
                device_choices.half_products(rounded, part, into)

        # With q = q' + r and p = p' + s, primes for what is rounded to `dtype`, the product q'·p' rounded as well:
        # q·p - fl(q'·p') = r·p + q'·s + (q'·p' - fl(q'·p')), and |s| <= unit |p|. 1.05 is for unit² and the norms.
        in_fp32 = device_choices.sums_half_products_in_fp32(self.embeddings.device)
        unit = torch.finfo(dtype).eps / 2
        rounded_norm = rounded.float().norm(dim=1, keepdim=True)
        residual_norm = (queries - rounded.float()).norm(dim=1, keepdim=True)
        roundings = convert + (not in_fp32)  # of rows, and of products
        error = 1.05 * self.largest_norm * (residual_norm + roundings * unit * rounded_norm)
        flushed = torch.finfo(torch.float32).tiny * queries.shape[1] * (rounded_norm + self.largest_norm)  # inputs
        flushed = flushed + torch.finfo(dtype).tiny  # and the product
        summing = error_bound(queries, self.largest_norm) * (2 if in_fp32 else 1)  # tensor cores cut off, not round
        return FirstPass(score, error + flushed + summing)

    def _block(self, dtype: torch.dtype) -> torch.Tensor:
        rows = min(block_rows(self.embeddings), len(self.embeddings))
        return self.embeddings.new_empty((rows, self.embeddings.shape[1]), dtype=dtype)

    def _blocks(self, start: int, end: int, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows start to end and their columns of `out`, cut to the size of a block."""
        rows = block_rows(self.embeddings)
        for first, into in zip(range(start, end, rows), out.split(rows, dim=1), strict=True):
            yield self.embeddings[first : first + into.shape[1]], into


def top_k(
    queries: torch.Tensor,
    k: int,
    n: int,
    passes: Sequence[FirstPass],
    read: Callable[[torch.Tensor], torch.Tensor],
    chunk_rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of largest inner product with `fixed_inner_products`, by score descending, then by row ascending.

    Args:
        queries: `(b, D)` fp32; b may be 0.
        k: at least 1; above n it means n.
        n: number of rows.
        passes: first passes, the fastest first. Where one leaves too many rows, the next takes over.
        read: the vectors of these rows, `(m,) int64 -> (m, D)` fp32.
        chunk_rows: rows compared at a time; by default what suits the device.

    Returns:
        scores `(b, min(k, n))` fp32 and rows `(b, min(k, n))` int64, on the device of the queries.

    Raises:
        ValueError: scores that are not finite.
    """
    b, k = len(queries), min(k, n)
    if not b * k:
        return queries.new_empty(b, k), torch.empty(b, k, dtype=torch.int64, device=queries.device)
    chunk_rows = chunk_rows or max(device_choices.search_chunk_rows(queries.device), _FEWEST_SCORES // b)
    step = min(n, max(1, min(chunk_rows, _MOST_SCORES // b)))
    if device_choices.waits_cost_much(queries.device):
        found = _top_k_of_a_few_more(queries, k, n, passes[0], read, step)
        if found is not None:
            return found
        passes = passes[-1:]  # the finest
    return _top_k_by_chunks(queries, k, n, passes, read, step)


def _top_k_of_a_few_more(
    queries: torch.Tensor,
    k: int,
    n: int,
    first_pass: FirstPass,
    read: Callable[[torch.Tensor], torch.Tensor],
    step: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The top k of the rows that the first pass finds best; None if rows that it passed over could be among them.

    Waits for the device once, at the end.
    """
    b, kept = len(queries), min(n, max(2 * k, k + _SPARE))
    scores = queries.new_full((b, kept), -torch.inf)
    rows = torch.zeros_like(scores, dtype=torch.int64)
    total = queries.new_zeros(())  # not finite if any score is not
    tiles = queries.new_empty(b, -(-step // _TILE), _TILE)
    for start in range(0, n, step):
        end = min(start + step, n)
        total = total + _score(first_pass, start, end, tiles).sum()
        best, column = _best_by_tiles(tiles, min(kept, end - start))
        column = column.clamp(max=end - start - 1)  # padding is found only beside scores that are not finite
        scores, place = torch.cat([scores, best], dim=1).topk(kept, dim=1)
        rows = torch.cat([rows, column + start], dim=1).gather(1, place)
    rows = rows.sort(dim=1).values
    query = torch.arange(b, device=queries.device).repeat_interleave(kept)
    exact = exact_scores(queries, query, rows.flatten(), read).view(b, kept)
    exact, order = exact.sort(dim=1, descending=True, stable=True)  # equal scores stay in the order of their rows
    sure = exact[:, k - 1] > scores[:, -1] + first_pass.error[:, 0]
    certain = total.isfinite() & (sure.all() if kept < n else first_pass.error.isfinite().all())
    return (exact[:, :k], rows.gather(1, order[:, :k])) if certain else None


def _score(first_pass: FirstPass, start: int, end: int, tiles: torch.Tensor) -> torch.Tensor:
    """Approximate scores of these rows, (b, end - start), in the memory of tiles (b, t, _TILE); its rest is -inf."""
    approximate = tiles.flatten(1)[:, : end - start]
    tiles.flatten(1)[:, end - start :] = -torch.inf
    first_pass.score(start, end, approximate)
    return approximate


def _best_by_tiles(tiles: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scores of each row of (b, t, _TILE), and their columns of (b, t · _TILE): (b, kept) each.

    They are in the tiles whose best is among the best of all tiles: so most scores are read once.
    """
    number = tiles.amax(2).topk(min(kept, tiles.shape[1])).indices  # (b, m)
    scores, place = tiles.gather(1, number[..., None].expand(-1, -1, _TILE)).flatten(1).topk(kept)
    return scores, number.gather(1, place // _TILE) * _TILE + place % _TILE


def _top_k_by_chunks(
    queries: torch.Tensor,
    k: int,
    n: int,
    passes: Sequence[FirstPass],
    read: Callable[[torch.Tensor], torch.Tensor],
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `top_k`: all rows that could be among the top k, chunk by chunk, however many they are."""
    b = len(queries)
    scores = queries.new_full((b, k), -torch.inf)
    rows = torch.full_like(scores, n, dtype=torch.int64)
    if not all(first_pass.error.isfinite().all() for first_pass in passes):
        raise ValueError("queries hold values that are not finite (or overflow fp32): has the training diverged?")
    tiles = queries.new_empty(b, -(-step // _TILE), _TILE)
    for start in range(0, n, step):
        end = min(start + step, n)
        query, row = _candidates(passes[0], start, end, scores, tiles)
        # A pair takes some fifty times as long in the second pass as in an fp32 product.
        while len(passes) > 1 and len(query) > 2 * b * k + b * (end - start) / 64:
            passes = passes[1:]
            query, row = _candidates(passes[0], start, end, scores, tiles)
        for some_queries, some_rows in zip(query.split(_MOST_PAIRS), row.split(_MOST_PAIRS), strict=True):
            exact = exact_scores(queries, some_queries, some_rows, read)
            scores, rows = _merge(scores, rows, some_queries, some_rows, exact)
    return scores, rows


def _candidates(
    first_pass: FirstPass, start: int, end: int, scores: torch.Tensor, tiles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a query and one of these rows that could be among the top k, given the top k so far.

    Args:
        scores: `(b, k)`, of the top k so far.
        tiles: memory `(b, t, _TILE)` for the approximate scores of these rows.

    Returns:
        queries' numbers `(m,)` and rows `(m,)`, by query, then by row.
    """
    k, error = scores.shape[1], first_pass.error
    approximate = _score(first_pass, start, end, tiles)  # (b, c)
    if not approximate.sum().isfinite():
        raise ValueError(f"rows {start} to {end - 1} of this rank hold damaged embeddings: build the index anew")
    # Few rows qualify, so whole tiles are passed over by their best. No padding qualifies: it is below every number.
    lowest = (scores[:, -1:] - error).clamp_min(torch.finfo(torch.float32).min)  # (b, 1)
    best_of_tile = tiles.amax(2)  # (b, t)
    hit = best_of_tile >= lowest
    if hit.sum() * _TILE > 8 * scores.numel() and k <= end - start:
        # the k best of this chunk alone are all at least so good
        kth = approximate.topk(k, sorted=False).values.amin(dim=1, keepdim=True)
        lowest = torch.maximum(lowest, kth - 2 * error)
        hit = best_of_tile >= lowest
    number = hit.flatten().nonzero()[:, 0]  # (h,)
    query, first_row = number // tiles.shape[1], number % tiles.shape[1] * _TILE + start
    found, column = (tiles.flatten(0, 1).index_select(0, number) >= lowest[query]).nonzero().unbind(1)
    return query[found], first_row[found] + column


def exact_scores(
    queries: torch.Tensor, query: torch.Tensor, row: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Second pass: the scores (m,) of pairs of a query's number (m,) and a row's number (m,)."""
    step = max(1, block_rows(queries) // 4)  # several blocks are alive at a time here
    parts = [
        fixed_inner_products(queries.index_select(0, q), read(r))
        for q, r in zip(query.split(step), row.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else queries.new_empty(0)


def best_exact_scores(
    queries: torch.Tensor, query: torch.Tensor, row: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor], k: int
) -> torch.Tensor:
    """As `exact_scores`, but only of pairs that can be among the k best of their query; the others get -inf.

    An fp32 sum finds those pairs, in a fraction of the time that the fixed one takes for all.

    Args:
        query: in ascending order.
    """
    if not len(query):
        return queries.new_empty(0)
    approximate, largest = torch.empty_like(row, dtype=torch.float32), queries.new_zeros(())
    step = max(1, block_rows(queries) // 4)  # as above
    for q, r, into in zip(query.split(step), row.split(step), approximate.split(step), strict=True):
        vectors = read(r)
        torch.sum(queries.index_select(0, q) * vectors, dim=1, out=into)
        largest = torch.maximum(largest, vectors.norm(dim=1).amax())
    sizes = query.bincount(minlength=len(queries))
    place = torch.arange(len(query), device=query.device) - (sizes.cumsum(0) - sizes)[query]
    of_query = approximate.new_full((len(queries), max(k, int(sizes.max()))), -torch.inf)
    of_query[query, place] = approximate
    largest_norm = largest.item() * (1 + 1e-3)  # the norms are rounded too
    lowest = of_query.topk(k).values[:, -1:] - 2 * error_bound(queries, largest_norm)
    close = ~(approximate < lowest[query, 0])  # a damaged row is not passed over
    scores = torch.full_like(approximate, -torch.inf)
    scores[close] = exact_scores(queries, query[close], row[close], read)
    return scores


def error_bound(queries: torch.Tensor, largest_norm: float) -> torch.Tensor:
    """Most by which an inner product summed in fp32 in any order can differ from the fixed sum: (b, D) -> (b, 1).

    A sum of D products in any order is off by at most γ_D · Σ|q_i p_i| (Higham, Accuracy and Stability of Numerical
    Algorithms, 3.1), which is at most γ_D |q| |p| (Cauchy-Schwarz).
    """
    dimension = queries.shape[1]
    relative = 1.05 * (
        2 * _INPUT_ROUNDING[torch.get_float32_matmul_precision()] + (dimension + math.log2(dimension) + 4) * 2.0**-24
    )
    bound = queries.norm(dim=1, keepdim=True) * (relative * largest_norm)
    return bound + dimension * torch.finfo(torch.float32).tiny  # products too small for fp32 may be lost


def fixed_inner_products(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Inner products of matching rows, `(m, D), (m, D) -> (m,)` fp32, rounded in the same way whatever m.

    Element-wise operations only: multiply, then add the second half to the first until one number is left. In float64,
    so that two products trade places only if they are equal in fp32.
    """
    products = queries.double() * passages.double()
    while (width := products.shape[1]) > 1:
        if width % 2:
            products, width = F.pad(products, (0, 1)), width + 1
        products = products[:, : width // 2] + products[:, width // 2 :]
    return products[:, 0].float()


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


def measure_largest_norm(embeddings: torch.Tensor | LiveRows, first_row: int = 0) -> float:
    """A number that no row's L2 norm is above, 0.1 % more than the largest.

    Raises:
        ValueError: a row, counted from `first_row`, is not finite.
    """
    largest = torch.zeros((), device=embeddings.device)
    step = block_rows(embeddings)
    for start in range(0, len(embeddings), step):
        norms = embeddings[start : start + step].float().norm(dim=1)
        largest = torch.maximum(largest, norms.amax())  # carries a NaN on
    if not largest.isfinite():
        bad = next(i for i in range(len(embeddings)) if not embeddings[i : i + 1].float().norm().isfinite())
        raise ValueError(f"the embedding of passage {first_row + bad} is not finite: has the training diverged?")
    return largest.item() * (1 + 1e-3)  # the norms are rounded too


def checked_queries(queries: torch.Tensor, k: int, dimension: int, device: torch.device) -> torch.Tensor:
    """The queries in fp32 on this device; raises ValueError for k below 1 and for queries that are not (b, D)."""
    if k < 1:
        raise ValueError(f"a search must ask for at least 1 passage, not {k}")
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ValueError(f"the index holds embeddings of size {dimension}, the queries are {tuple(queries.shape)}")
    return queries.to(device, torch.float32)


def checked_chunk_rows(chunk_rows: int | None) -> int | None:
    """The same, or ValueError when below 1."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, found {chunk_rows}")
    return chunk_rows


def block_rows(rows: torch.Tensor | LiveRows) -> int:
    """How many such rows (n, D) are unpacked at a time."""
    return max(1, device_choices.unpacked_numbers(rows.device) // max(1, rows.shape[1]))
