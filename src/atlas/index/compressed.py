"""Search among the codes of one rank, by Faiss or, where that is faster, by torch.

Rows come in the order of the type's own score: the inner product with what a code stands for, for 4-bit fast scan the
sum in its look-up tables, for RaBitQ an estimate. How rows are cut into ranks does not change the score of any.
"""

import numpy as np
import torch
import torch.nn.functional as F

from atlas.index.codec import Codec, faiss
from atlas.index.flat import FlatIndex, checked_queries, error_bound, fixed_inner_products
from atlas.index.pq_search import ProductQuantizerSearch
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import log

_MANY_QUERIES = 6  # from which on torch searches product quantizer codes faster than Faiss, on a CPU
_MORE_LISTS = 16  # compared beyond nprobe: usually enough to see that no other list can be among the nearest
_MOST_ON_GPU = 2048  # Faiss's limit of nprobe and k
_SHARED_MEMORY = 48 * 1024  # bytes that Faiss uses of a GPU's, for the look-up tables of a product quantizer


class CompressedIndex:
    """Searches the codes of n passages, in memory of its own.

    Codes of an 8-bit product quantizer without lists are searched by torch where a GPU does it, or where several
    queries make it the faster way; all others by Faiss, those of an inverted file on the GPU where it can. 4-bit
    fast-scan codes are packed, and only that copy is kept.

    Attributes:
        codec, largest_norm (bounds the norms of the decoded codes).
        list_sizes: `(lists,)` int64, passages in each list; of all ranks where there are several, so that a query with
            `nprobe` looks into the same lists everywhere. None without lists.
    """

    def __init__(
        self,
        codec: Codec,
        codes: np.ndarray,
        *,
        largest_norm: float,
        nprobe: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Args:
            codes: `(n, code_size)` uint8; copied, unless torch can search them where they are.
            nprobe: lists searched per query; by default all. More where these hold fewer than k passages.
            device: that is to search; by default the CPU.

        Raises:
            ValueError: codes of another size, or of a list that does not exist.
        """
        if codes.shape[1] != codec.code_size:
            raise ValueError(f"codes of {codes.shape[1]} bytes for a codec that makes {codec.code_size}")
        self.codec, self.largest_norm, self._n = codec, largest_norm, len(codes)
        self._nprobe = min(nprobe or codec.lists, codec.lists)
        gpu = device if device is not None and device.type != "cpu" else None
        if gpu is not None:
            faiss.omp_set_num_threads(devices.cpu_threads(gpu, distributed.cores()))
        centroids = codec.centroids()
        if gpu is not None and (reason := _why_not_on_gpu(codec, self._nprobe)):
            log.warning("The CPU searches the index: %s", reason)
            gpu = None
        # The one copy of the codes: on a CPU in Faiss's index, which torch looks into.
        self._index = codec.searchable(codes) if gpu is None or centroids is None else None
        self._plain = codes if self._index is None else None
        self._product, self._many = None, _MANY_QUERIES if gpu is None else 0
        if centroids is not None:
            self._product = ProductQuantizerSearch(torch.from_numpy(self.codes()).to(gpu or "cpu"), centroids)
        self.list_sizes: torch.Tensor | None = None
        self._on_gpu = None
        if codec.lists:
            sizes = [self._index.invlists.list_size(number) for number in range(codec.lists)]
            self.list_sizes = torch.tensor(sizes)
            self._nearest = FlatIndex(codec.centroids_of_lists())
            self._on_gpu = _copy_to_gpu(self._index, gpu) if gpu is not None else None

    def codes(self) -> np.ndarray:
        """`(n, code_size)` uint8 in the order of the passages."""
        return self._plain if self._index is None else self.codec.codes_in(self._index)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the best scores, by score descending, then by row ascending.

        Args:
            queries: `(b, D)`, any floating-point type and device; b may be 0.
            k: at least 1; above n it means n.

        Returns:
            scores `(b, min(k, n))` fp32 and rows `(b, min(k, n))` int64, on the queries' device. Cutting the rows into
            several indices changes no row but those whose score equals the k-th. With fewer than all lists searched
            there may be fewer hits; the rest is -inf with row n.

        Raises:
            ValueError: k below 1, queries of another D, or values that are not finite.
        """
        rotated = self.codec.rotate(checked_queries(queries, k, self.codec.dimension, torch.device("cpu")))
        if not rotated.isfinite().all():
            raise ValueError("queries hold values that are not finite: has the training diverged?")
        if self._product is not None and len(queries) >= self._many:
            scores, rows = self._product.search(rotated, k)
            return scores.to(queries.device), rows.to(queries.device)
        found = min(k, self._n)
        if not len(queries) or not found:
            empty = queries.new_empty((len(queries), found), dtype=torch.float32)
            return empty, empty.long()
        if self.codec.lists:
            scores, rows = self._search_lists(rotated, found, *self._probes(rotated, k))
        else:
            scores, rows = self._index.search(rotated.numpy(), found)
        if not self.codec.lists and (rows < 0).any() or not np.isfinite(scores[rows >= 0]).all():
            raise ValueError("the index holds damaged codes, their scores are not finite: build it anew")
        scores[rows < 0], rows[rows < 0] = -np.inf, self._n
        order = np.lexsort((rows, -scores))
        scores, rows = (torch.from_numpy(np.take_along_axis(part, order, 1)) for part in (scores, rows))
        return scores.to(queries.device), rows.to(queries.device)

    def _search_lists(
        self, queries: torch.Tensor, k: int, numbers: torch.Tensor, scores: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows (b, k) among these lists (b, p); row -1 where they hold fewer."""
        index, p = self._index, numbers.shape[1]
        if self._on_gpu is not None and max(p, k) <= _MOST_ON_GPU:
            index = self._on_gpu
        elif self._on_gpu is not None:
            log.warning("The CPU searches the index: on a GPU Faiss finds at most %d passages a query", _MOST_ON_GPU)
            self._on_gpu = None
        index.nprobe = p
        return index.search_preassigned(queries.numpy(), k, numbers.numpy(), scores.numpy())

    def _probes(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`nprobe` lists for each query, and more until they hold k passages: numbers and scores (b, p), -1 for none.

        They are the same on every rank: where rounding could choose another list, the exact search decides.
        """
        p, lists, centroids = self._nprobe, self.codec.lists, self._nearest.embeddings
        scores, numbers = (queries @ centroids.T).topk(min(p + _MORE_LISTS, lists))
        if p == lists:
            return numbers, scores
        error = error_bound(queries, self._nearest.largest_norm)
        last = scores[:, p - 1 : p]
        near = (scores - last).abs() <= 2 * error  # lists that may belong on the other side of the p-th
        rest = (scores[:, -1] >= last[:, 0] - 2 * error[:, 0]) & (numbers.shape[1] < lists)  # more may be near
        near &= near.sum(1, keepdim=True) > 1
        if near.any():
            query, place = near.nonzero().unbind(1)
            exact = fixed_inner_products(queries[query], centroids[numbers[query, place]])
            scores = scores.index_put((query, place), exact)
            numbers, order = numbers.sort(dim=1)  # so that ties stay in the order of their numbers
            scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
            numbers = numbers.gather(1, order)
        scores, numbers = scores[:, :p].contiguous(), numbers[:, :p].contiguous()
        rest |= self.list_sizes[numbers].sum(1) < k
        if rest.any():
            exact, exact_numbers = self._exact_probes(queries[rest], k)
            more = (0, exact.shape[1] - p)
            scores, numbers = F.pad(scores, more), F.pad(numbers, more, value=-1)
            scores[rest], numbers[rest] = exact, exact_numbers
        return numbers, scores

    def _exact_probes(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers of lists as `_probes` chooses them."""
        p, lists = self._nprobe, self.codec.lists
        while True:
            scores, numbers = self._nearest.search(queries, p)
            held = self.list_sizes[numbers].cumsum(1)
            if p == lists or bool((held[:, -1] >= k).all()):
                break
            p = min(2 * p, lists)
        before = held - self.list_sizes[numbers]
        needed = (torch.arange(p) < self._nprobe) | (before < k)
        return scores, torch.where(needed, numbers, -1)


def _why_not_on_gpu(codec: Codec, nprobe: int) -> str | None:
    """What keeps such an index from being searched on a GPU, by torch or by Faiss; None where nothing is known."""
    if nprobe > _MOST_ON_GPU:
        return f"on a GPU Faiss looks into at most {_MOST_ON_GPU} lists a query, --faiss_nprobe is {nprobe}"
    if codec.fast_scan:
        return "Faiss has no fast scan for a GPU"
    if not codec.lists and codec.centroids() is None:
        return f"Faiss has no {codec.factory} without lists for a GPU"
    return None


def _copy_to_gpu(index: "faiss.IndexIVF", device: torch.device) -> "faiss.Index | None":
    """Faiss's copy of an inverted file on the GPU, or None where it cannot make one, with the reason in the log."""
    try:
        options, pq = faiss.GpuClonerOptions(), getattr(index, "pq", None)
        options.use_cuvs = False  # cuVS has no search in lists that are given, `search_preassigned`
        if pq is not None and 4 * pq.M * pq.ksub > _SHARED_MEMORY:
            options.useFloat16 = True
            log.info("Look-up tables of %d bytes a passage fit a GPU in fp16 only: scores are rounded to it", pq.M)
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index, options)
    except (RuntimeError, AttributeError) as error:  # a code size it does not know, no memory; a Faiss without GPUs
        log.warning("Faiss cannot put the index on the GPU, the CPU searches it: %s", " ".join(str(error).split()))
        return None


def explain_probes(lists: int, probes: int) -> str | None:
    """What share of an index with lists a query looks into, for the log; None where it is everything."""
    if probes >= lists:
        return None
    return (
        f"A query looks into {probes} of the index's {lists} lists, about 1/{lists / probes:.0f} of the passages: more "
        f"(--faiss_nprobe, up to {lists}) are slower and miss fewer of the best"
    )
