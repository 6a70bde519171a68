"""Codecs: a trained Faiss quantizer turns an embedding into a few bytes, and says what the bytes stand for.

What Faiss computes rounds differently with the number of rows in a call. Here codes must not depend on that, nor on the
number of ranks, so rows are encoded in blocks whose place and shape is fixed.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from atlas.index.flat import measure_largest_norm
from atlas.runtime.launch import available_cores

try:
    import faiss
except ImportError:  # a flat index needs none
    faiss = None

_LEARNT = (faiss.PCAMatrix, faiss.ITQTransform) if faiss else ()  # as many numbers as rows and columns at most
KINDS = {"ivfflat": "IVF{lists},Flat", "ivfsq": "IVF{lists},SQ4", "ivfpq": "IVF{lists},PQ{bytes}", "pq": "PQ{bytes}"}
FLAT = ("flat", "Flat")  # exact search
_BLOCK_ROWS = 1024  # encoded at a time
_ROWS_PER_CENTROID = 256
_PROBED_SHARE, _FEWEST_PROBED = 32, 16  # of the lists, one in so many is searched by default, but never fewer than 16
_ENCODERS = tuple(f"Index{lists}{codes}" for lists in ("", "IVF") for codes in ("PQ", "ScalarQuantizer", "RaBitQ"))
_MOST_LISTS, _MOST_NUMBERS = 2**22, 2**16  # in a factory string: Faiss makes room for what it names
_ALWAYS_ALLOWED = 2**24  # bytes that Faiss may take for an array of what it reads, however short that is
_EXACT_LISTS = re.compile(r"(.*IVF\d+),Flat")
_FAST_SCAN = re.compile(r"(.*PQ\d+x4)fs")


@dataclass(frozen=True)
class Compression:
    """Which kind of index is asked for, and how it is searched."""

    kind: str | None = None  # flat, a key of KINDS or a Faiss factory string; None: whatever is there
    code_size: int | None = None  # bytes per passage of pq and ivfpq
    nlist: int | None = None  # lists of an ivf index; by default floor(sqrt(N))
    nprobe: int | None = None  # lists searched per query; by default 1 in 32, but at least 16
    train_size: int | None = None  # rows the quantizer is trained on; by default 256 per centroid
    seed: int = 0  # of the sample it is trained on
    refine_factor: int = 1  # this many times k candidates are scored again with their embeddings

    @property
    def compresses(self) -> bool:
        """Whether codes are asked for."""
        return self.kind is not None and self.kind not in FLAT

    def factory(self, size: int, dimension: int) -> str:
        """The Faiss factory string for N passages of D numbers, or "flat". N may be 1 where it is not known yet.

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
        index = make_empty(text, dimension)
        if size > 1:  # with 1, the passages are still to be counted
            _check_training_rows(text, index, min(size, self.train_size or size))
        return text

    def probes(self, lists: int) -> int:
        """How many of an index's lists a query looks into."""
        return min(self.nprobe or max(_FEWEST_PROBED, lists // _PROBED_SHARE), lists)


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
    """An untrained index for inner products, whose codes can be saved.

    Fast-scan types are made with the codes of the type of the same name without `fs`: they only scan them otherwise.

    Raises:
        ValueError: Faiss does not know the string, what it makes has no codes that can be saved and searched here, or
            there is no Faiss.
    """
    if faiss is None:
        raise ValueError("--index_mode faiss needs Faiss: pip install faiss-cpu or faiss-gpu")
    _check_numbers(factory)
    exact_lists, fast_scan = _EXACT_LISTS.fullmatch(factory), _FAST_SCAN.fullmatch(factory)
    # fp16 codes hold our embeddings exactly, in half the memory of Faiss's fp32 ones
    plain = f"{exact_lists[1]},SQfp16" if exact_lists else fast_scan[1] if fast_scan else factory
    try:
        index = faiss.index_factory(dimension, plain, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"--faiss_index_type {factory}: neither one of flat, {', '.join(KINDS)} nor a Faiss factory string that "
            f"fits embeddings of size {dimension} ({_reason(error)})"
        ) from error
    transforms, inner = _unwrap(index)
    _check_encoder(factory, inner)
    if isinstance(inner, faiss.IndexIVF) and (exact_lists or fast_scan):
        inner.by_residual = False
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix) and transform.d_out % transform.M:
            raise ValueError(
                f"--faiss_index_type {factory}: the {transform.d_out} numbers that OPQ{transform.M} rotates to are "
                f"not a multiple of {transform.M}"
            )
        if isinstance(transform, _LEARNT) and transform.d_out > transform.d_in:
            raise ValueError(
                f"--faiss_index_type {factory}: PCA cannot make {transform.d_out} numbers of {transform.d_in}: ask for "
                f"at most {transform.d_in}"
            )
    return index


def _check_numbers(factory: str) -> None:
    """Raises ValueError if a factory string has a number at which Faiss would crash or take all memory."""
    for kind, digits in re.findall(r"([A-Za-z]*)(\d+)", factory):
        most = _MOST_LISTS if kind == "IVF" else _MOST_NUMBERS
        if len(digits) > 10 or not 0 < int(digits) <= most:
            raise ValueError(f"--faiss_index_type {factory:.100}: {kind}{digits:.20} is not a number from 1 to {most}")


def _check_training_rows(factory: str, index: faiss.Index, rows: int) -> None:
    """Raises ValueError if a transform cannot be learnt from so many passages."""
    rows = max(rows, _centroids(index))  # they are repeated
    for transform in _unwrap(index)[0]:
        if isinstance(transform, _LEARNT) and rows < min(transform.d_in, transform.d_out):
            raise ValueError(
                f"--faiss_index_type {factory}: PCA learns {transform.d_out} numbers from no fewer passages, and there "
                f"are {rows} to train on: ask for fewer numbers, or give more passages (--faiss_train_size)"
            )


def _reason(error: Exception) -> str:
    """What Faiss says, without the place in its source."""
    text = " ".join(str(error).split())
    return text.partition(" at /")[2].partition(": ")[2] or text


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


def train(factory: str, sample: np.ndarray, *, all_rows: bool = False) -> Codec:
    """Train on a sample `(n, D)` fp32; rows are repeated where there are fewer of them than centroids.

    `all_rows`: even where that is more than 256 per centroid.

    Raises:
        ValueError: Faiss cannot train on them.
    """
    index = make_empty(factory, sample.shape[1])
    _check_training_rows(factory, index, len(sample))
    least = _centroids(index)
    if len(sample) < least:
        sample = np.resize(sample, (least, sample.shape[1]))  # repeats from the start
    transforms, inner = _unwrap(index)
    for part in (inner, getattr(inner, "pq", None)):
        if isinstance(part, faiss.IndexIVF | faiss.ProductQuantizer):
            part.cp.min_points_per_centroid = 1  # no warnings on standard output
            part.cp.max_points_per_centroid = len(sample) if all_rows else _ROWS_PER_CENTROID
            part.cp.spherical = False  # Faiss's default for inner products: right for vectors of unit length alone
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix):
            transform.pq = own = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
            own.cp.min_points_per_centroid = 1
            transform.max_train_points = len(sample) if all_rows else transform.max_train_points
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # orders centroids for a search that is not used here
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(
            f"--faiss_index_type {factory} cannot be trained on {len(sample)} embeddings of {sample.shape[1]} numbers "
            f"({_reason(error)})"
        ) from error
    for transform in transforms:
        if isinstance(transform, faiss.OPQMatrix):
            transform.pq = None
    return Codec(index, factory)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let Faiss use all cores in the block: other ranks wait, and results must not depend on how many they are."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(available_cores())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@contextlib.contextmanager
def _limited(content_bytes: int, inner: faiss.Index) -> Iterator[None]:
    """Make Faiss refuse sizes larger than what it reads can hold, where its version can do that."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    before = faiss.get_deserialization_vector_byte_limit()
    most = max(content_bytes, _ALWAYS_ALLOWED)
    if isinstance(inner, faiss.IndexIVFPQ):  # of a table that is only made for distances, but counted
        most = max(most, 4 * (inner.nlist * inner.pq.M * inner.pq.ksub + 1))
    faiss.set_deserialization_vector_byte_limit(most)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


class Codec:
    """A trained Faiss index without rows: encodes embeddings and says what codes stand for.

    Attributes: `factory`, `dimension` D, `code_size` (bytes per passage), `inner` (the Faiss index after its
    transforms), `lists` (their number; 0 unless it is an inverted file), `fast_scan` (whether 4-bit codes are packed
    for Faiss's fast scan when they are searched).
    """

    def __init__(self, index: faiss.Index, factory: str) -> None:
        self._index, self.factory, self.dimension = index, factory, index.d
        self._transforms, self.inner = _unwrap(index)
        self._matrices = [_matrix(transform) for transform in self._transforms]
        self.fast_scan = _FAST_SCAN.fullmatch(factory) is not None
        self.code_size: int = self.inner.sa_code_size()
        self.lists: int = self.inner.nlist if isinstance(self.inner, faiss.IndexIVF) else 0

    @staticmethod
    def load(content: bytes, factory: str, dimension: int) -> Codec:
        """The reverse of `serialize`. A Faiss that knows no limits trusts what it reads: check the bytes before.

        Raises:
            ValueError: they hold no quantizer, or another one; there is no Faiss.
        """
        if faiss and any(int(digits) > len(content) for digits in re.findall(r"\d{1,18}", factory)):
            raise ValueError(f"Faiss cannot read it ({len(content)} bytes are too few for an index {factory:.100})")
        empty = make_empty(factory, dimension)
        expected = _signature(empty)
        try:
            with _limited(len(content), _unwrap(empty)[1]):
                index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
            transforms, inner = _unwrap(index)
            _check_encoder(factory, inner)
            if _signature(index) == expected:
                _try_out(transforms, inner, dimension)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"Faiss cannot read it ({_reason(error)})") from error
        if _signature(index) != expected or not index.is_trained or index.ntotal:
            raise ValueError(f"it holds {_signature(index)}, not an empty trained index {expected}")
        return Codec(index, factory)

    def serialize(self) -> bytes:
        return faiss.serialize_index(self._index).tobytes()

    def encode(self, embeddings: torch.Tensor, first_row: int, threads: int | None = None) -> tuple[np.ndarray, float]:
        """Codes `(n, code_size)` uint8 of embeddings `(n, D)`, and what bounds the norms of the vectors they stand for.

        Args:
            first_row: number of the first row in the whole corpus. With it the codes depend on nothing but the row's
                embedding and number, however the rows are cut into calls.
            threads: that encode; by default those that Faiss has in the calling thread.

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
        threads = threads or faiss.omp_get_max_threads()
        with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            largest = max(pool.map(encode_block, range(-(first_row % _BLOCK_ROWS), n, _BLOCK_ROWS)), default=0.0)
        return codes, largest

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What codes stand for, `(m, code_size) -> (m, D')` fp32, to be compared with what `rotate` gives."""
        return self.inner.sa_decode(np.ascontiguousarray(codes))

    def rotate(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries in the space of the decoded codes, `(b, D) -> (b, D')` fp32."""
        for transform, matrix in zip(self._transforms, self._matrices, strict=True):
            if matrix is None:
                rows = [transform.apply(query[None].numpy()) for query in queries]
                queries = torch.from_numpy(np.concatenate(rows)) if rows else queries.new_empty(0, transform.d_out)
            else:  # in float64, because an fp32 product would round differently with the number of queries
                queries = torch.addmm(matrix[1], queries.double(), matrix[0].T).float()
        return queries

    def searchable(self, codes: np.ndarray) -> faiss.Index:
        """A Faiss index over codes `(n, code_size)`, without the transforms, which searches all lists.

        It holds a copy of the codes, and an inverted file 8 bytes a passage more, less those that name its list.

        Raises:
            ValueError: codes of a list that does not exist.
        """
        index = faiss.clone_index(self.inner)
        if self.lists:
            if self.fast_scan:
                plain, index = index, faiss.IndexIVFPQFastScan(index)
                plain.own_fields, index.own_fields = False, True  # of the centroids
            self._fill_lists(index, codes)
            return index
        index.add_sa_codes(codes)
        return faiss.IndexPQFastScan(index) if self.fast_scan else index

    def _fill_lists(self, index: faiss.IndexIVF | faiss.IndexIVFPQFastScan, codes: np.ndarray) -> None:
        prefix = self.inner.coarse_code_size()
        numbers = _from_little_endian(codes[:, :prefix])
        if len(codes) and numbers.max() >= self.lists:
            bad = int(numbers.argmax())
            raise ValueError(f"the code of passage {bad} of this rank names a list that does not exist")
        order, sizes = numbers.argsort(kind="stable"), np.bincount(numbers, minlength=self.lists)
        for number, rows in enumerate(np.split(order, sizes.cumsum()[:-1])):
            if not len(rows):
                continue
            content = np.ascontiguousarray(codes[rows, prefix:])
            pointer = faiss.swig_ptr(content)
            if self.fast_scan:
                plain = faiss.IndexPQ(self.inner.d, self.inner.pq.M, 4, faiss.METRIC_INNER_PRODUCT)
                plain.is_trained = True  # only its codes are needed
                plain.add_sa_codes(content)
                packed = faiss.IndexPQFastScan(plain)
                pointer = packed.codes.get()
            index.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), pointer)
        index.ntotal, index.nprobe = len(codes), self.lists

    def codes_in(self, index: faiss.Index) -> np.ndarray:
        """The codes `(n, code_size)` that `searchable` was given, in the same order; where it can be, not a copy."""
        n, prefix = index.ntotal, self.inner.coarse_code_size() if self.lists else 0
        width = self.code_size - prefix
        if not self.lists:
            return self._content(index, index.codes.get() if self.fast_scan else index.codes.data(), n, width)
        codes = np.empty((n, self.code_size), np.uint8)
        for number in range(self.lists):
            size = index.invlists.list_size(number)
            if size:
                rows = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
                codes[rows, :prefix] = np.array([number], "<i8").view(np.uint8)[:prefix]
                codes[rows, prefix:] = self._content(index, index.invlists.get_codes(number), size, width)
        return codes

    def _content(self, index: faiss.Index, pointer: object, n: int, width: int) -> np.ndarray:
        """The `n` codes `(n, width)` at an address, unpacked where they are packed for fast scan."""
        if not n:
            return np.empty((0, width), np.uint8)
        if not self.fast_scan:
            return np.asarray(_InIndex(index, faiss.rev_swig_ptr(pointer, n * width).reshape(n, width)))
        packer = index.get_CodePacker()
        blocks = -(-n // packer.nvec)
        packed = faiss.rev_swig_ptr(pointer, blocks * packer.block_size).reshape(blocks, packer.block_size)
        codes = np.empty((blocks, packer.nvec, width), np.uint8)
        for block, into in zip(packed, codes, strict=True):
            packer.unpack_all(faiss.swig_ptr(block), faiss.swig_ptr(into))
        return codes.reshape(-1, width)[:n]

    def centroids_of_lists(self) -> torch.Tensor:
        """`(lists, D')` fp32: those of the codec, not a copy."""
        coarse = faiss.downcast_index(self.inner.quantizer)
        return torch.from_numpy(faiss.rev_swig_ptr(coarse.get_xb(), self.lists * self.inner.d)).view(self.lists, -1)

    def centroids(self) -> torch.Tensor | None:
        """Centroids `(m, 256, d / m)` fp32 of a product quantizer of 8 bits without lists, or None for other codes."""
        if isinstance(self.inner, faiss.IndexPQ) and self.inner.pq.nbits == 8:
            pq = self.inner.pq
            return torch.from_numpy(faiss.vector_to_array(pq.centroids)).view(pq.M, 256, pq.dsub)
        return None

    def filled(self, codes: np.ndarray) -> faiss.Index:
        """A Faiss index of the factory's own kind over codes `(n, code_size)`, for other tools.

        It is as large as what `searchable` gives.

        Raises:
            ValueError: codes of a list that does not exist.
        """
        inner = self.searchable(codes)
        if not self._transforms:
            return inner
        index = faiss.clone_index(self._index)
        faiss.downcast_index(index.index).this.own(True)  # frees the empty one that is replaced
        inner.this.disown()
        index.index, index.ntotal = inner, inner.ntotal
        return index


class _InIndex:
    """An array in the memory of a Faiss index, which lives as long as numpy's arrays of it."""

    def __init__(self, index: faiss.Index, array: np.ndarray) -> None:
        self.index, self.__array_interface__ = index, array.__array_interface__


def _unwrap(index: faiss.Index) -> tuple[list[faiss.VectorTransform], faiss.Index]:
    """The transforms in front of an index, and the index that encodes."""
    if not isinstance(index, faiss.IndexPreTransform):
        return [], index
    transforms = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
    return transforms, faiss.downcast_index(index.index)


def _try_out(transforms: list[faiss.VectorTransform], inner: faiss.Index, dimension: int) -> None:
    """Encode one vector and decode it. Raises RuntimeError where Faiss has read numbers that it cannot compute with."""
    row = np.zeros((1, dimension), np.float32)
    for transform in transforms:
        row = transform.apply(row)
    inner.sa_decode(inner.sa_encode(row))


def _matrix(transform: faiss.VectorTransform) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`(D', D)` and what is added `(D',)`, both float64, where a transform is linear."""
    if not isinstance(transform, faiss.LinearTransform):
        return None
    matrix = torch.from_numpy(faiss.vector_to_array(transform.A)).view(transform.d_out, transform.d_in)
    bias = faiss.vector_to_array(transform.b) if transform.have_bias else np.zeros(transform.d_out, np.float32)
    return matrix.double(), torch.from_numpy(bias).double()


def _from_little_endian(content: np.ndarray) -> np.ndarray:
    """Numbers of a few bytes each, `(m, width) uint8 -> (m,) int32`."""
    numbers = np.zeros((len(content), 4), np.uint8)
    numbers[:, : content.shape[1]] = content
    return numbers.view("<i4")[:, 0]


def _check_encoder(factory: str, inner: faiss.Index) -> None:
    """Raises ValueError unless the codes of this index can be saved apart from it, and searched."""
    if type(inner).__name__ not in _ENCODERS:
        found = f"an index of class {type(inner).__name__}"
    elif getattr(getattr(inner, "pq", None), "nbits", 8) not in (4, 8):
        found = f"product quantizer codes of {inner.pq.nbits} bits"
    elif isinstance(inner, faiss.IndexIVF) and not isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexFlat):
        found = "lists that are not searched exactly"
    else:
        return
    raise ValueError(
        f"--faiss_index_type {factory} makes {found}: use flat, {', '.join(KINDS)}, or a factory string of PQ with 8 "
        "or 4 bits, of 4-bit fast scan, of SQ or of RaBitQ, with transforms and IVF lists as you like, such as "
        "OPQ64_256,PQ64"
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
