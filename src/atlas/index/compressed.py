"""Search among the codes of one rank.

Faiss's scores only pick candidates, which are then scored by one fixed sequence of operations on the vectors that their
codes stand for, so that results do not depend on how rows are cut into ranks.
"""

import logging
from collections.abc import Callable

import faiss
import numpy as np
import torch

from atlas.index.codec import Codec
from atlas.index.flat import checked_queries, error_bound, fixed_inner_products
from atlas.index.inverted_file import MOST_ON_GPU, InvertedFile, Probes, centroids_of_lists, chunks
from atlas.index.pq_search import ProductQuantizerSearch, from_faiss

log = logging.getLogger("atlas")
_MORE = 16  # candidates beyond k: usually enough to see that nothing else can be among the best k
_MANY_QUERIES = 6  # from which on torch searches product quantizer codes faster than Faiss, on a CPU


class CompressedIndex:
    """Searches the codes of n passages.

    Codes of a product quantizer without lists are searched by torch where a GPU does it, or where several queries make
    it the faster way; all others by Faiss, those of an inverted file on the GPU where it can. Codes without lists are
    read where they are, so a memory-mapped file costs no other memory; those of an inverted file are copied once, list
    after list, with 1 or 2 bytes a passage more.

    Attributes:
        quantizer, largest_norm (bounds the norms of the decoded codes).
        list_sizes: `(lists,)` int64, passages in each list; of all ranks where there are several, so that a query with
            `nprobe` looks into the same lists everywhere. None without lists.
    """

    def __init__(
        self,
        quantizer: Codec,
        codes: np.ndarray,
        *,
        largest_norm: float,
        nprobe: int | None = None,
        device: torch.device | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
            codes: `(n, code_size)` uint8, kept as they are.
            nprobe: lists searched per query; by default all. More where these hold fewer than k passages.
            device: that is to search; by default the CPU.
            heartbeat: called now and then while lists are filled.

        Raises:
            ValueError: codes of another size, or of a list that does not exist.
        """
        if codes.shape[1] != quantizer.code_size:
            raise ValueError(f"codes of {codes.shape[1]} bytes for a quantizer that makes {quantizer.code_size}")
        self.quantizer, self.largest_norm, self._n = quantizer, largest_norm, len(codes)
        nprobe = min(nprobe or quantizer.lists, quantizer.lists)
        gpu = device if device is not None and device.type != "cpu" else None
        if gpu is not None and (reason := _why_not_on_gpu(quantizer, nprobe)):
            log.warning("The CPU searches the index: %s", reason)
            gpu = None
        self._told = gpu is None or not quantizer.lists  # that Faiss finds no more than so many on a GPU
        self.list_sizes: torch.Tensor | None = None
        if quantizer.lists:
            self._codes = InvertedFile(quantizer.inner, codes, nprobe, gpu, heartbeat)
            self.list_sizes = torch.from_numpy(self._codes.sizes)
        else:
            self._codes = _Codes(quantizer, codes)
        self._product: ProductQuantizerSearch | None = None
        self._many = _MANY_QUERIES if gpu is None else 0
        if isinstance(quantizer.inner, faiss.IndexPQ):
            centroids, _ = from_faiss(quantizer.inner)
            self._product = ProductQuantizerSearch(torch.from_numpy(codes).to(gpu or "cpu"), centroids)
        coarse = float(np.linalg.norm(centroids_of_lists(quantizer.inner), axis=1).max()) if quantizer.lists else 0.0
        self._norm = 4 * (coarse + largest_norm)  # a centroid's part, the residual's, and room for its own rounding

    def codes(self) -> np.ndarray:
        """`(n, code_size)` uint8 in the order of the passages."""
        return self._codes.all()

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows whose decoded codes have the largest inner product, by score descending, then by row ascending.

        Args:
            queries: `(b, D)`, any floating-point type and device; b may be 0.
            k: at least 1; above n it means n.

        Returns:
            scores `(b, min(k, n))` fp32 and rows `(b, min(k, n))` int64, on the queries' device: the same, bit for
            bit, for every way of cutting the rows into several indices. With fewer than all lists searched there may be
            fewer hits; the rest is -inf with row n.

        Raises:
            ValueError: k below 1, queries of another D, or values that are not finite.
        """
        rotated = self.quantizer.rotate(checked_queries(queries, k, self.quantizer.dimension, torch.device("cpu")))
        if self._product is not None and len(queries) >= self._many:
            scores, rows = self._product.search(rotated, k)
            return scores.to(queries.device), rows.to(queries.device)
        found = min(k, self._n)
        scores = torch.full((len(queries), found), -torch.inf)
        rows = torch.full((len(queries), found), self._n)
        if not rotated.isfinite().all():
            raise ValueError("queries hold values that are not finite: has the training diverged?")
        todo = torch.arange(len(queries) if found else 0)
        probes = self._codes.probes(rotated, k, self.list_sizes) if len(todo) else None
        candidates = min(found + _MORE, self._n)
        if not self._told and candidates > MOST_ON_GPU:
            self._told = True
            log.warning("The CPU searches the index: on a GPU Faiss finds at most %d passages a query", MOST_ON_GPU)
        while len(todo):
            best, best_rows, sure = self._best(rotated[todo], found, candidates, probes and probes.of(todo))
            scores[todo], rows[todo] = best, best_rows
            todo, candidates = todo[~sure], min(4 * candidates, self._n)
        return scores.to(queries.device), rows.to(queries.device)

    def _best(
        self, queries: torch.Tensor, k: int, candidates: int, probes: Probes | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores and rows (b, k) of the best among so many candidates, and for which queries no other can be better."""
        approximate, places = self._codes.candidates(queries.numpy(), candidates, probes)  # (b, c)
        there = torch.from_numpy(places >= 0)
        query = there.nonzero()[:, 0]
        flat = places[places >= 0]
        step = max(1, 2**22 // queries.shape[1])
        parts = [
            fixed_inner_products(
                queries[query[i : i + step]],
                torch.from_numpy(self.quantizer.decode(self._codes.at(flat[i : i + step]))),
            )
            for i in range(0, len(flat), step)
        ]
        scores = torch.full(there.shape, -torch.inf)
        scores[there] = torch.cat(parts) if parts else scores.new_empty(0)
        if scores.isnan().any():
            raise ValueError("the index holds damaged codes, their scores are not finite: build it anew")
        rows = torch.full(there.shape, self._n)
        rows[there] = torch.from_numpy(self._codes.rows(flat))
        by_row = rows.sort(dim=1)
        by_score = scores.gather(1, by_row.indices).sort(dim=1, descending=True, stable=True)
        best, best_rows = by_score.values[:, :k], by_row.values.gather(1, by_score.indices)[:, :k]
        most_of_others = torch.from_numpy(approximate[:, -1]) + error_bound(queries, self._norm)[:, 0]
        # A candidate that is missing means that there were no others.
        sure = (candidates >= self._n) | ~there[:, -1] | (most_of_others < best[:, -1])
        return best, best_rows, sure


class _Codes:
    """Codes without lists, searched by Faiss chunk by chunk; the place of a passage is its row."""

    def __init__(self, quantizer: Codec, codes: np.ndarray) -> None:
        self._codes, self._index = codes, faiss.clone_index(quantizer.inner)

    def all(self) -> np.ndarray:
        return self._codes

    def at(self, places: np.ndarray) -> np.ndarray:
        return self._codes[places]

    def rows(self, places: np.ndarray) -> np.ndarray:
        return places

    def probes(self, queries: torch.Tensor, k: int, list_sizes: torch.Tensor | None) -> None:
        return None

    def candidates(self, queries: np.ndarray, c: int, probes: None) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places (b, c), best first."""
        scores = np.full((len(queries), c), -np.inf, np.float32)
        places = np.full((len(queries), c), -1, np.int64)
        for start, chunk in chunks(self._codes):
            self._index.reset()
            self._index.add_sa_codes(chunk)
            more, positions = self._index.search(queries, min(c, len(chunk)))
            scores = np.concatenate([scores, more], 1)
            places = np.concatenate([places, np.where(positions < 0, -1, positions + start)], 1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :c]
            scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
        self._index.reset()
        return scores, places


def _why_not_on_gpu(quantizer: Codec, nprobe: int) -> str | None:
    """What keeps such an index from being searched on a GPU, by torch or by Faiss; None where nothing is known."""
    if nprobe > MOST_ON_GPU:
        return f"on a GPU Faiss looks into at most {MOST_ON_GPU} lists a query, --faiss_nprobe is {nprobe}"
    if not quantizer.lists and not isinstance(quantizer.inner, faiss.IndexPQ):
        return f"Faiss has no {type(quantizer.inner).__name__} without lists for a GPU"
    return None


def explain_nprobe(lists: int, nprobe: int | None) -> str | None:
    """What fewer lists per query would save, for the log; None where that was chosen already."""
    few = max(1, lists // 32)
    if nprobe is not None or few == lists or not lists:
        return None
    return (
        f"All {lists} lists of the index are searched; --faiss_nprobe {few} would compare about 1/{lists // few} of "
        "the passages, and miss some of the best"
    )
