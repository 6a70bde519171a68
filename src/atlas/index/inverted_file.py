"""An inverted file over the codes of n passages, in memory that is little more than that of the codes."""

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise

import faiss
import numpy as np
import torch

from atlas.index.flat import FlatIndex

log = logging.getLogger("atlas")

_CHUNK_BYTES = 2**20  # codes copied at a time
MOST_ON_GPU = 2048  # Faiss's limit of nprobe and k


class Probes:
    """Lists to look into, (b, p) int64 with -1 for none, and the scores of their centroids (b, p) fp32."""

    def __init__(self, lists: np.ndarray, scores: np.ndarray) -> None:
        self.lists, self.scores = lists, scores

    def of(self, queries: torch.Tensor) -> "Probes":
        return Probes(*(np.ascontiguousarray(part[queries.numpy()]) for part in (self.lists, self.scores)))


class InvertedFile:
    """Codes list after list; the place of a passage is where its code is among them.

    The bytes that name a code's list are left out, and row numbers take as few bytes as n allows. With 257 to 65,536
    lists n codes take 1 byte a passage more than in their file below 2^24 rows, and 2 below 2^32; with fewer lists one
    more. So this is within 10 % of the codes from 10, 20 or 30 bytes a passage on.

    Attributes: `sizes` `(lists,)` int64, passages in each list.
    """

    def __init__(
        self,
        inner: faiss.IndexIVF,
        codes: np.ndarray,
        nprobe: int,
        gpu: torch.device | None,
        heartbeat: Callable[[], None],
    ) -> None:
        """Args:
            inner: trained, without rows; the caller keeps it, and what it is a part of, alive.
            codes: `(n, code_size)` uint8; copied.
            nprobe: lists searched per query; more where these hold fewer than k passages.
            gpu: that is to search.
            heartbeat: called now and then while lists are filled.

        Raises:
            ValueError: codes of a list that does not exist.
        """
        self._inner, self._nprobe = inner, min(nprobe, inner.nlist)
        self.sizes = list_sizes(inner, codes, heartbeat)
        self._starts = np.concatenate([[0], self.sizes.cumsum()])  # first places of the lists, and the end
        self._prefix = prefix = inner.coarse_code_size()
        n, row_bytes = len(codes), -(-len(codes).bit_length() // 8)
        self._codes = np.empty((n, inner.sa_code_size() - prefix), np.uint8)
        self._rows = np.empty((n, row_bytes), np.uint8)
        free = self._starts[:-1].copy()  # first places that are not taken
        for start, chunk in chunks(codes):
            numbers = list_numbers(inner, chunk)
            order = numbers.argsort(kind="stable")
            counts = np.bincount(numbers, minlength=inner.nlist)
            places = np.arange(len(chunk)) + (free - counts.cumsum() + counts).repeat(counts)
            self._codes[places] = chunk[order, prefix:]
            self._rows[places] = _little_endian(start + order, row_bytes)
            free += counts
            heartbeat()
        self._index = self._searchable()
        self._centroids = torch.from_numpy(centroids_of_lists(inner))
        self._nearest = FlatIndex(self._centroids)
        self._on_gpu = _copy_to_gpu(self._copied(), gpu) if gpu is not None else None

    def _searchable(self) -> faiss.IndexIVF:
        """An index that reads our codes where they are, and knows no row numbers.

        To Faiss they are lists in a mapped file, by pointer and offsets. It expects row numbers after the codes
        of each list, but does not read them in a search for positions.
        """
        width, where, one = self._codes.shape[1], faiss.OnDiskOneListVector(), faiss.OnDiskOneList()
        for start, end in pairwise(self._starts.tolist()):
            one.size, one.capacity, one.offset = end - start, end - start, start * width
            where.push_back(one)
        lists = faiss.OnDiskInvertedLists(self._inner.nlist, width, "")
        lists.lists, lists.ptr = where, faiss.swig_ptr(self._codes)
        lists.prefetch_nthread = 0  # or it would read row numbers ahead
        lists.this.own(False)  # never freed (24 bytes a list): it would unmap our memory
        index = faiss.clone_index(self._inner)
        index.replace_invlists(lists, False)
        index.quantizer.this.own(True)  # frees the copy of the centroids
        index.quantizer, index.own_fields = self._inner.quantizer, False
        return index

    def _copied(self) -> faiss.IndexIVF:
        """An index with a copy of the codes, and their places for row numbers."""
        index = faiss.clone_index(self._inner)
        for number, (start, end) in enumerate(pairwise(self._starts.tolist())):
            places, codes = np.arange(start, end), self._codes[start:end]
            index.invlists.add_entries(number, end - start, faiss.swig_ptr(places), faiss.swig_ptr(codes))
        index.ntotal = len(self._codes)
        return index

    def all(self) -> np.ndarray:
        """Codes `(n, code_size)` in the order of the rows."""
        codes = np.empty((len(self._codes), self._prefix + self._codes.shape[1]), np.uint8)
        for start, chunk in chunks(self._codes):
            places = np.arange(start, start + len(chunk))
            codes[self.rows(places)] = self.at(places)
        return codes

    def at(self, places: np.ndarray) -> np.ndarray:
        """Codes at these places, `(m,) -> (m, code_size)`."""
        numbers = self._starts.searchsorted(places, side="right") - 1
        return np.concatenate([_little_endian(numbers, self._prefix), self._codes[places]], axis=1)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Row numbers at these places, `(m,) -> (m,)` int64."""
        return _numbers(self._rows[places])

    def probes(self, queries: torch.Tensor, k: int, list_sizes: torch.Tensor) -> Probes:
        """`nprobe` lists for each query, and more until they hold k passages."""
        lists = len(self._centroids)
        if self._nprobe == lists:
            return Probes(np.tile(np.arange(lists), (len(queries), 1)), (queries @ self._centroids.T).numpy())
        p = self._nprobe
        while True:
            scores, numbers = self._nearest.search(queries, p)
            held = list_sizes[numbers].cumsum(1)
            if p == lists or bool((held[:, -1] >= k).all()):
                break
            p = min(2 * p, lists)
        before = held - list_sizes[numbers]
        needed = (torch.arange(p) < self._nprobe) | (before < k)
        return Probes(torch.where(needed, numbers, -1).numpy(), scores.numpy())

    def candidates(self, queries: np.ndarray, c: int, probes: Probes) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places (b, c), best first; -inf and -1 where the lists hold fewer."""
        b, p = probes.lists.shape
        if self._on_gpu is not None and max(p, c) <= MOST_ON_GPU:
            self._on_gpu.nprobe = p
            return self._on_gpu.search_preassigned(queries, c, probes.lists, probes.scores)
        scores, found = np.empty((b, c), np.float32), np.empty((b, c), np.int64)
        x, lists, coarse, d, labels = map(faiss.swig_ptr, (queries, probes.lists, probes.scores, scores, found))
        self._index.nprobe = p
        self._index.search_preassigned_c(b, x, c, lists, coarse, d, labels, True)  # True: list · 2^32 + position in it
        scores[found < 0] = -np.inf
        return scores, np.where(found < 0, -1, self._starts[found >> 32] + (found & 0xFFFFFFFF))


def list_numbers(inner: faiss.IndexIVF, codes: np.ndarray) -> np.ndarray:
    """The lists that codes belong to, `(m, code_size) -> (m,)` int64."""
    return _numbers(codes[:, : inner.coarse_code_size()])


def list_sizes(inner: faiss.IndexIVF, codes: np.ndarray, heartbeat: Callable[[], None] = lambda: None) -> np.ndarray:
    """How many of the codes `(n, code_size)` belong to each list, `(lists,)` int64.

    Raises:
        ValueError: codes of a list that does not exist.
    """
    sizes = np.zeros(inner.nlist, np.int64)
    for start, chunk in chunks(codes):
        numbers = list_numbers(inner, chunk)
        if numbers.max() >= inner.nlist:
            bad = start + int(numbers.argmax())
            raise ValueError(f"the code of passage {bad} of this rank names a list that does not exist")
        sizes += np.bincount(numbers, minlength=inner.nlist)
        heartbeat()
    return sizes


def centroids_of_lists(inner: faiss.IndexIVF) -> np.ndarray:
    """Of the lists, `(lists, D')` fp32: those of the index, not a copy, and valid only as long as it."""
    coarse = faiss.downcast_index(inner.quantizer)
    return faiss.rev_swig_ptr(coarse.get_xb(), inner.nlist * inner.d).reshape(inner.nlist, inner.d)


def _copy_to_gpu(index: faiss.IndexIVF, device: torch.device) -> faiss.Index | None:
    """Faiss's copy of an inverted file on the GPU, or None where it cannot make one, with the reason in the log."""
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    except (RuntimeError, AttributeError) as error:  # a code size it does not know, no memory; a Faiss without GPUs
        log.warning("Faiss cannot put the index on the GPU, the CPU searches it: %s", " ".join(str(error).split()))
        return None


def chunks(codes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """First rows and contiguous parts of codes, of bounded size."""
    step = max(1, _CHUNK_BYTES // max(1, codes.shape[1]))
    for start in range(0, len(codes), step):
        yield start, np.ascontiguousarray(codes[start : start + step])


def _little_endian(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers (m,) int64 in so many bytes, (m, width) uint8."""
    return numbers.astype("<i8")[:, None].view(np.uint8)[:, :width]


def _numbers(little_endian: np.ndarray) -> np.ndarray:
    """The reverse, (m, width) uint8 -> (m,) int64."""
    padded = np.zeros((len(little_endian), 8), np.uint8)
    padded[:, : little_endian.shape[1]] = little_endian
    return padded.view("<i8")[:, 0]
