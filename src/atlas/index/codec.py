"""Codecs: a trained Faiss quantizer turns an embedding into a few bytes, and says what the bytes stand for.

What Faiss computes rounds differently with the number of rows in a call. Here codes must not depend on that, nor on the
number of ranks, so rows are encoded in blocks whose place and shape is fixed.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
import torch

from atlas.index.flat import fixed_inner_products, measure_largest_norm
from atlas.index.inverted_file import chunks, list_sizes

log = logging.getLogger("atlas")
KINDS = {"ivfflat": "IVF{lists},Flat", "ivfsq": "IVF{lists},SQ4", "ivfpq": "IVF{lists},PQ{bytes}", "pq": "PQ{bytes}"}
FLAT = ("flat", "Flat")  # exact search
_BLOCK_ROWS = 1024  # encoded at a time
_ROWS_PER_CENTROID = 256
_ENCODERS = (faiss.IndexPQ, faiss.IndexScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)


@dataclass(frozen=True)
class Compression:
    """Which kind of index is asked for, and how it is searched."""

    kind: str | None = None  # flat, a key of KINDS or a Faiss factory string; None: whatever is there
    code_size: int | None = None  # bytes per passage of pq and ivfpq
    nlist: int | None = None  # lists of an ivf index; by default floor(sqrt(N))
    nprobe: int | None = None  # lists searched per query; by default all
    train_size: int | None = None  # rows the quantizer is trained on; by default 256 per centroid
    seed: int = 0  # of the sample it is trained on
    refine_factor: int = 1  # this many times k candidates are scored again with their embeddings

    @property
    def compresses(self) -> bool:
        """Whether codes are asked for."""
        return self.kind is not None and self.kind not in FLAT

    def factory(self, size: int, dimension: int) -> str:
        """The Faiss factory string for N passages of D numbers, or "flat".

        Raises:
            ValueError: such an index cannot be made; the flag and what to do are named.
        """
        if not self.compresses:
            return "flat"
        if self.kind not in KINDS:
            text = self.kind
            if self.nlist is not None and (found := re.search(r"IVF(\d+)", text)) and int(found[1]) != self.nlist:
                raise ValueError(f"--faiss_index_type {text} says {found[1]} lists and --faiss_nlist {self.nlist}")
        else:
            if "{bytes}" in KINDS[self.kind]:
                check_code_size(self.kind, self.code_size, dimension)
            lists = min(self.nlist or math.isqrt(size), size)
            text = KINDS[self.kind].format(lists=max(1, lists), bytes=self.code_size)
        make_empty(text, dimension)
        return text


def check_code_size(kind: str, code_size: int | None, dimension: int) -> None:
    """Raises ValueError unless each of the `code_size` bytes can stand for an equal part of the embedding."""
    if code_size is None:
        raise ValueError(f"--faiss_index_type {kind} needs --faiss_code_size (bytes per passage)")
    if dimension % code_size:
        divisors = [i for i in range(1, dimension + 1) if dimension % i == 0]
        best = {max(i for i in divisors if i < code_size), min((i for i in divisors if i > code_size), default=1)}
        raise ValueError(
            f"--faiss_code_size {code_size} does not divide the embedding size {dimension}; "
            f"try {' or '.join(map(str, sorted(best - {1}) or [1]))}"
        )


def make_empty(factory: str, dimension: int) -> faiss.Index:
    """An untrained index for inner products.

    Raises:
        ValueError: Faiss does not know the string, or what it makes has no codes that can be saved and searched here.
    """
    # fp16 codes hold our embeddings exactly, in half the memory of Faiss's fp32 ones
    exact_lists = re.fullmatch(r"(.*IVF\d+),Flat", factory)
    try:
        index = faiss.index_factory(
            dimension, f"{exact_lists[1]},SQfp16" if exact_lists else factory, faiss.METRIC_INNER_PRODUCT
        )
    except RuntimeError as error:
        raise ValueError(
            f"--faiss_index_type {factory}: neither one of flat, {', '.join(KINDS)} nor a Faiss factory string that "
            f"fits embeddings of size {dimension} ({str(error).partition(' at /')[2].partition(': ')[2] or error})"
        ) from error
    transforms, inner = _unwrap(index)
    _check_encoder(factory, inner)
    if exact_lists:
        inner.by_residual = False
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix) and transform.d_out % transform.M:
            raise ValueError(
                f"--faiss_index_type {factory}: the {transform.d_out} numbers that OPQ{transform.M} rotates to are "
                f"not a multiple of {transform.M}"
            )
    return index


def code_size(factory: str, dimension: int) -> int:
    """Bytes per passage of such an index."""
    if factory == FLAT[0]:
        return 0
    index = make_empty(factory, dimension)  # has to live on while the part of it is looked at
    return _unwrap(index)[1].sa_code_size()


def training_rows(factory: str, dimension: int, size: int, train_size: int | None, seed: int) -> np.ndarray:
    """Numbers of the rows to train on, ascending: they depend on N and the seed alone."""
    wanted = train_size or _ROWS_PER_CENTROID * _centroids(make_empty(factory, dimension))
    if wanted >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).choice(size, wanted, replace=False, shuffle=False))


def train(factory: str, sample: np.ndarray, *, all_rows: bool = False) -> "Codec":
    """Train on a sample `(n, D)` fp32; rows are repeated where there are fewer of them than centroids.

    `all_rows`: even where that is more than 256 per centroid.
    """
    index = make_empty(factory, sample.shape[1])
    least = _centroids(index)
    if len(sample) < least:
        sample = np.resize(sample, (least, sample.shape[1]))  # repeats from the start
    transforms, inner = _unwrap(index)
    for part in (inner, getattr(inner, "pq", None)):
        if isinstance(part, faiss.IndexIVF | faiss.ProductQuantizer):
            part.cp.min_points_per_centroid = 1  # no warnings on standard output
            part.cp.max_points_per_centroid = len(sample) if all_rows else _ROWS_PER_CENTROID
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix):
            transform.pq = own = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
            own.cp.min_points_per_centroid = 1
            transform.max_train_points = len(sample) if all_rows else transform.max_train_points
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # orders centroids for a search that is not used here
    index.train(sample)
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix):
            transform.pq = None
    return Codec(index, factory)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let Faiss use all cores in the block: other ranks wait, and results must not depend on how many they are."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


class Codec:
    """A trained Faiss index without rows: encodes embeddings and says what codes stand for.

    Attributes: `factory`, `dimension` D, `code_size` (bytes per passage), `inner` (the Faiss index after its
    transforms), `lists` (their number; 0 unless it is an inverted file).
    """

    def __init__(self, index: faiss.Index, factory: str) -> None:
        self._index, self.factory, self.dimension = index, factory, index.d
        self._transforms, self.inner = _unwrap(index)
        self._matrices = [_matrix(transform) for transform in self._transforms]
        self.code_size: int = self.inner.sa_code_size()
        self.lists: int = self.inner.nlist if isinstance(self.inner, faiss.IndexIVF) else 0

    @staticmethod
    def load(content: bytes, factory: str, dimension: int) -> "Codec":
        """The reverse of `serialize`. Faiss trusts what it reads: check that the bytes are whole before.

        Raises:
            ValueError: they hold no quantizer, or another one.
        """
        try:
            index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
            _check_encoder(factory, _unwrap(index)[1])
        except RuntimeError as error:
            raise ValueError(f"Faiss cannot read it ({' '.join(str(error).split())})") from error
        expected = _signature(make_empty(factory, dimension))
        if _signature(index) != expected or not index.is_trained or index.ntotal:
            raise ValueError(f"it holds {_signature(index)}, not an empty trained index {expected}")
        return Codec(index, factory)

    def serialize(self) -> bytes:
        return faiss.serialize_index(self._index).tobytes()

    def encode(self, embeddings: torch.Tensor, first_row: int) -> tuple[np.ndarray, float]:
        """Codes `(n, code_size)` uint8 of embeddings `(n, D)`, and what bounds the norms of the vectors they stand for.

        Args:
            first_row: number of the first row in the whole corpus. With it the codes depend on nothing but the row's
                embedding and number, however the rows are cut into calls.

        Raises:
            ValueError: an embedding is not finite.
        """
        n = len(embeddings)
        codes = np.empty((n, self.code_size), np.uint8)

        def encode_block(start: int) -> float:
            low, high = max(start, 0), min(start + _BLOCK_ROWS, n)
            block = np.zeros((_BLOCK_ROWS, self.dimension), np.float32)
            block[low - start : high - start] = embeddings[low:high].to("cpu", torch.float32).numpy()
            if not np.isfinite(block).all():
                bad = int(np.flatnonzero(~np.isfinite(block).all(1))[0])
                raise ValueError(
                    f"the embedding of passage {first_row + start + bad} is not finite: has the training diverged?"
                )
            for transform in self._transforms:
                block = transform.apply(block)
            codes[low:high] = self.inner.sa_encode(block)[low - start : high - start]
            return measure_largest_norm(torch.from_numpy(self.decode(codes[low:high])))

        # Matrix products round differently with the number of threads, too: one for each block.
        threads = faiss.omp_get_max_threads()
        with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            largest = max(pool.map(encode_block, range(-(first_row % _BLOCK_ROWS), n, _BLOCK_ROWS)), default=0.0)
        return codes, largest

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What codes stand for, `(m, code_size) -> (m, D')` fp32, to be compared with what `rotate` gives."""
        return self.inner.sa_decode(np.ascontiguousarray(codes))

    def rotate(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries in the space of the decoded codes, `(b, D) -> (b, D')` fp32; one by one, so rounded in one way."""
        rotated = queries.new_empty(len(queries), self.inner.d)
        for query, into in zip(queries, rotated, strict=True):
            for transform, matrix in zip(self._transforms, self._matrices, strict=True):
                if matrix is None:
                    query = torch.from_numpy(transform.apply(query[None].numpy()))[0]
                else:  # Faiss's product depends on where its arguments lie in memory
                    query = fixed_inner_products(query[None], matrix[0]) + matrix[1]
            into.copy_(query)
        return rotated

    def filled(self, codes: np.ndarray) -> faiss.Index:
        """A Faiss index of its own kind over codes `(n, code_size)`, for other tools, which searches all lists.

        It holds a copy of the codes, and an inverted file 8 bytes a passage more.

        Raises:
            ValueError: codes of a list that does not exist.
        """
        index = faiss.clone_index(self._index)
        _, inner = _unwrap(index)
        # Take what is needed, at once and no more.
        if self.lists:
            inner.nprobe = self.lists
            for number, size in enumerate(list_sizes(inner, codes).tolist()):
                inner.invlists.resize(number, size)
                inner.invlists.resize(number, 0)
        else:
            inner.codes.resize(codes.size)
            inner.codes.resize(0)
        for start, chunk in chunks(codes):
            inner.add_sa_codes(chunk, np.arange(start, start + len(chunk)))
        index.ntotal = inner.ntotal
        return index


def _unwrap(index: faiss.Index) -> tuple[list[faiss.VectorTransform], faiss.Index]:
    """The transforms in front of an index, and the index that encodes."""
    if not isinstance(index, faiss.IndexPreTransform):
        return [], index
    transforms = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
    return transforms, faiss.downcast_index(index.index)


def _matrix(transform: faiss.VectorTransform) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`(D', D)` and what is added `(D',)`, where a transform is linear."""
    if not isinstance(transform, faiss.LinearTransform):
        return None
    matrix = torch.from_numpy(faiss.vector_to_array(transform.A)).view(transform.d_out, transform.d_in)
    bias = faiss.vector_to_array(transform.b) if transform.have_bias else np.zeros(transform.d_out, np.float32)
    return matrix, torch.from_numpy(bias)


def _check_encoder(factory: str, inner: faiss.Index) -> None:
    """Raises ValueError unless Faiss scores codes of this index as it decodes them, one passage at a time."""
    if "FastScan" in type(inner).__name__:
        found = "4-bit fast-scan codes, which cannot be saved and loaded apart from the index"
    elif not isinstance(inner, _ENCODERS):
        found = f"an index of class {type(inner).__name__}"
    elif getattr(getattr(inner, "pq", None), "nbits", 8) != 8:
        found = f"product quantizer codes of {inner.pq.nbits} bits"
    elif isinstance(inner, faiss.IndexIVF) and not isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexFlat):
        found = "lists that are not searched exactly"
    else:
        return
    raise ValueError(
        f"--faiss_index_type {factory} makes {found}: use flat, {', '.join(KINDS)}, or a factory string of 8-bit PQ or "
        "of SQ, with transforms and IVF lists as you like, such as OPQ64_256,PQ64"
    )


def _centroids(index: faiss.Index) -> int:
    """The largest number of centroids that are trained together."""
    _, inner = _unwrap(index)
    return max(256, inner.nlist if isinstance(inner, faiss.IndexIVF) else 0)


def _signature(index: faiss.Index) -> str:
    """What must agree before an index that was read is used."""
    transforms, inner = _unwrap(index)
    parts = [f"{t.d_in} to {t.d_out}" for t in transforms]
    parts.append(f"{type(inner).__name__} of {inner.sa_code_size()} bytes for {inner.d} numbers")
    if isinstance(inner, faiss.IndexIVF):
        parts.append(f"{inner.nlist} lists")
    return f"{index.d} numbers: {', '.join(parts)}, metric {index.metric_type}"
