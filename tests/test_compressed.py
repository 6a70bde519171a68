"""Compressed search over the codes of one shard: in the order of the type's own score, and as a plain Faiss index."""

import gc
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from atlas.index import codec, compressed
from atlas.index.build import IndexBuilder
from atlas.index.codec import Codec, Compression, make_empty, train, training_rows
from atlas.index.compressed import CompressedIndex
from atlas.index.passages import open_passages
from benchmarks.search import process_memory
from tests.indices import write_corpus
from tests.kit import slow
from tests.test_flat import assert_same, made_up

D = 24
ROOT = Path(__file__).resolve().parent.parent
# One for every class of quantizer, with and without lists and transforms
FAST = ["PQ12x4fs", "IVF3,PQ12x4fs", "RR24,PQ6x4fs", "OPQ6_12,IVF3,PQ6x4fs"]
TYPES = ["pq", "ivfpq", "ivfsq", "ivfflat", "OPQ8_16,PQ8", "RR24,IVF3,PQ8", "PCAR16,SQ8", "IVF2,SQfp16", "SQ4"]
BITS = ["RR24,RaBitQ", "IVF3,RaBitQ"]
TYPES += ["PQ8x4", "IVF3,PQ8x4", *FAST, *BITS]
SMALL = [kind for kind in TYPES if "OPQ" not in kind]  # which takes a second to train


@pytest.fixture(autouse=True)
def the_same_threads():
    """Beside a GPU, Faiss takes all cores of this process for good: also for torch, and for the tests that follow."""
    threads = faiss.omp_get_max_threads()
    yield
    faiss.omp_set_num_threads(threads)


def ask(kind, **settings):
    return Compression(kind, code_size=8 if kind in ("pq", "ivfpq") else None, **settings)


def embeddings_of(n, ties=True):
    embeddings, queries = made_up(n, D, 8)
    if ties:
        embeddings[n // 2 :] = embeddings[: n - n // 2].clone()
    return embeddings, queries


@cache
def trained(kind, n, ties=True):
    embeddings, _ = embeddings_of(n, ties)
    factory = ask(kind).factory(n, D)
    rows = training_rows(factory, D, n, None, 0)
    quantizer = train(factory, embeddings[rows].float().numpy())
    return quantizer, *quantizer.encode(embeddings, 0)


def make_index(kind, n, ties=True, **settings):
    quantizer, codes, largest_norm = trained(kind, n, ties)
    return CompressedIndex(quantizer, codes, largest_norm=largest_norm, **settings)


def plain_faiss(quantizer):
    """Faiss's own index of the same quantizer, to be filled in one go; looks into all lists."""
    index = faiss.deserialize_index(np.frombuffer(quantizer.serialize(), np.uint8))
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = inner.nlist
    return index


def own_scores(kind, n, queries, ties=True):
    """The score (b, n) that the type gives every row, and by how much (b, 1) a search may round it differently."""
    quantizer, codes, _ = trained(kind, n, ties)
    if quantizer.fast_scan or kind in BITS:  # tables, or estimates that depend on the query
        scores, rows = quantizer.searchable(codes).search(quantizer.rotate(queries).numpy(), n)
        return torch.from_numpy(np.take_along_axis(scores, rows.argsort(1), 1)), torch.zeros(len(queries), 1)
    decoded, rotated = torch.from_numpy(quantizer.decode(codes)), quantizer.rotate(queries)
    rounding = 4e-6 * rotated.norm(dim=1, keepdim=True) * decoded.norm(dim=1).max()
    return (rotated.double() @ decoded.double().T).float(), rounding


def assert_best(found, scores, rounding, k):
    """Rows in the order of their scores, ties by row, and none left out that scores more than the k-th."""
    k = min(k, scores.shape[1])
    assert found[0].shape == found[1].shape == (len(scores), k)
    assert ((found[0] - scores.gather(1, found[1])).abs() <= rounding).all()
    steps, next_row = found[0].diff(dim=1), found[1].diff(dim=1)
    assert ((steps < 0) | ((steps == 0) & (next_row > 0))).all()
    left_out = scores.scatter(1, found[1], -torch.inf)
    assert all(len(set(row)) == k for row in found[1].tolist())
    assert (left_out <= found[0][:, -1:] + 2 * rounding).all()


@pytest.mark.parametrize(("kind", "n"), [(kind, n) for kind in SMALL for n in (1, 2, 7, 200, 1000)] + [(TYPES[4], 300)])
def test_rows_come_in_the_order_of_the_types_own_score(kind, n):
    """With ties, k above n and fewer rows than centroids; for one query and for many."""
    index, (_, queries) = make_index(kind, n), embeddings_of(n)
    for k in (1, 5, n, n + 3):
        for few in (queries, queries[:1]):
            assert_best(index.search(few, k), *own_scores(kind, n, few), k)


@pytest.mark.parametrize("kind", FAST)
def test_fast_scan_scores_are_those_of_the_codes_but_for_their_tables(kind):
    """A table of 16 numbers for each of m parts, rounded to 255 steps between its lowest and highest."""
    n = 300
    quantizer, codes, _ = trained(kind, n)
    queries = quantizer.rotate(embeddings_of(n)[1])
    m = quantizer.inner.pq.M
    centroids = torch.from_numpy(faiss.vector_to_array(quantizer.inner.pq.centroids)).view(m, 16, -1)
    tables = torch.einsum("bmd,mcd->bmc", queries.view(len(queries), m, -1), centroids)
    step = (tables.amax(2) - tables.amin(2)).amax(1, keepdim=True) / 255
    exact = queries @ torch.from_numpy(quantizer.decode(codes)).T
    scores, _ = own_scores(kind, n, embeddings_of(n)[1])
    assert ((scores - exact).abs() <= m * step).all() and not torch.allclose(scores, exact, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FAST])
def test_equals_a_plain_faiss_index_built_in_one_go(kind):
    index, (embeddings, queries) = make_index(kind, 300, ties=False), embeddings_of(300, ties=False)
    plain = plain_faiss(trained(kind, 300, ties=False)[0])
    plain.add(embeddings.float().numpy())
    scores, rows = plain.search(queries.numpy(), 300)
    found = index.search(queries, 300)
    np.testing.assert_allclose(found[0].numpy(), scores, atol=1e-4)
    differ = found[1].numpy() != rows  # passages of nearly one score may change places
    by_row = np.take_along_axis(scores, np.argsort(rows, axis=1), 1)
    there = np.take_along_axis(by_row, found[1].numpy(), 1)
    assert np.abs(there - scores)[differ].max(initial=0) < 1e-4


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("n", [300, 37])
def test_fast_scan_equals_what_faiss_packs(kind, n):
    """Faiss packs a filled plain index in one go; ours is packed from codes, and exported with its transforms."""
    quantizer, codes, _ = trained(kind, n)
    queries = embeddings_of(n)[1]
    plain = plain_faiss(quantizer)
    plain.add(embeddings_of(n)[0].float().numpy())
    inner = faiss.downcast_index(plain.index) if isinstance(plain, faiss.IndexPreTransform) else plain
    packed = (faiss.IndexIVFPQFastScan if quantizer.lists else faiss.IndexPQFastScan)(inner)
    if quantizer.lists:
        packed.nprobe = packed.nlist
    expected, _ = packed.search(quantizer.rotate(queries).numpy(), n)
    assert np.array_equal(make_index(kind, n).search(queries, n)[0].numpy(), expected)
    exported = faiss.deserialize_index(faiss.serialize_index(quantizer.filled(codes)))
    assert exported.ntotal == n
    np.testing.assert_allclose(exported.search(queries.numpy(), n)[0], expected, atol=1e-2)


def test_ivfflat_finds_what_exact_search_finds():
    embeddings, queries = embeddings_of(300)
    scores = (queries.double() @ embeddings.double().T).float()
    assert_best(make_index("ivfflat", 300).search(queries, 20), scores, 1e-5 * scores.abs().amax(1, keepdim=True), 20)


@pytest.mark.parametrize("kind", ["pq", "OPQ8_16,PQ8"])
def test_torch_and_faiss_find_the_same(monkeypatch, kind):
    """Whichever searches, which depends on the number of queries."""
    _, queries = embeddings_of(200)
    for many in (0, 100):
        monkeypatch.setattr(compressed, "_MANY_QUERIES", many)
        assert_best(make_index(kind, 200).search(queries, 9), *own_scores(kind, 200, queries), 9)


@pytest.mark.parametrize("kind", ["pq", "ivfsq", "ivfpq", "PQ12x4fs", "IVF3,PQ12x4fs"])
@pytest.mark.parametrize("many", [0, 100])
def test_one_code_for_all_passages(monkeypatch, kind, many):
    embeddings = made_up(1, D, 0)[0].expand(400, D)
    monkeypatch.setattr(compressed, "_MANY_QUERIES", many)
    quantizer = trained(kind, 200)[0]
    codes, norm = quantizer.encode(embeddings, 0)
    scores, rows = CompressedIndex(quantizer, codes, largest_norm=norm).search(made_up(1, D, 3)[1], 7)
    assert (scores == scores[:, :1]).all() and (rows.diff(dim=1) > 0).all()


@pytest.mark.parametrize("kind", TYPES)
def test_codes_do_not_depend_on_how_the_rows_are_cut(monkeypatch, kind):
    embeddings, _ = embeddings_of(300)
    quantizer = trained(kind, 300)[0]
    monkeypatch.setattr(codec, "_BLOCK_ROWS", 64)  # in blocks of another shape some codes may differ
    whole, norm = quantizer.encode(embeddings, 0)
    for size in (1, 37, 64, 150):
        parts = [quantizer.encode(embeddings[i : i + size], i) for i in range(0, 300, size)]
        assert np.array_equal(np.concatenate([codes for codes, _ in parts]), whole)
        assert max(n for _, n in parts) == norm
    assert norm >= np.linalg.norm(quantizer.decode(whole), axis=1).max()


@pytest.mark.parametrize("kind", TYPES)
def test_codes_come_back_in_the_order_of_the_passages(kind):
    """Also where the last block of packed codes is not full, and where some lists are empty."""
    quantizer, codes, norm = trained(kind, 300)
    for n in (300, 256, 37, 1):
        assert np.array_equal(CompressedIndex(quantizer, codes[:n], largest_norm=norm).codes(), codes[:n])
        assert quantizer.filled(codes[:n]).ntotal == n


@pytest.mark.parametrize("kind", TYPES)
def test_a_quantizer_survives_being_saved(kind):
    quantizer, codes, _ = trained(kind, 300)
    again = Codec.load(quantizer.serialize(), quantizer.factory, D)
    embeddings, queries = embeddings_of(300)
    assert np.array_equal(again.encode(embeddings, 0)[0], codes)
    assert np.array_equal(again.decode(codes), quantizer.decode(codes))
    assert torch.equal(again.rotate(queries), quantizer.rotate(queries))


def test_codes_outlive_their_index():
    codes = make_index("pq", 300).codes()
    gc.collect()
    assert np.array_equal(codes, trained("pq", 300)[1])


def test_a_quantizer_of_another_kind_is_refused():
    content = trained("pq", 200)[0].serialize()
    for factory, dimension in (("PQ4", D), ("PQ8", 48), ("IVF2,PQ8", D), ("OPQ8,PQ8", D), ("SQ8", D)):
        with pytest.raises(ValueError, match="not an empty trained index"):
            Codec.load(content, factory, dimension)
    for other in (b"", b"nonsense" * 50, content[:100], content[:-1]):
        with pytest.raises(ValueError, match="Faiss cannot read it") as refused:
            Codec.load(other, "PQ8", D)
        assert "\n" not in str(refused.value)
    filled = plain_faiss(trained("pq", 200)[0])
    filled.add(np.zeros((1, D), np.float32))
    with pytest.raises(ValueError, match="not an empty trained index"):
        Codec.load(faiss.serialize_index(filled).tobytes(), "PQ8", D)


# Lists


@pytest.mark.parametrize("nprobe", [1, 2, 5, 14])
def test_nprobe_looks_into_the_nearest_lists(nprobe):
    quantizer, codes, _ = trained("ivfpq", 200)
    assert quantizer.lists == 14
    _, queries = embeddings_of(200)
    index = make_index("ivfpq", 200, nprobe=nprobe)
    numbers = codes[:, 0]
    centroids = quantizer.centroids_of_lists()
    scores, rounding = own_scores("ivfpq", 200, queries)
    found = index.search(queries, 4)
    for i, query in enumerate(queries):
        nearest = (centroids @ query).argsort(descending=True)
        probed = next(p for p in range(nprobe, 15) if np.isin(numbers, nearest[:p]).sum() >= 4)
        inside = torch.from_numpy(np.isin(numbers, nearest[:probed]))[None]
        of_query = scores[i : i + 1].masked_fill(~inside, -1e9)
        for rows in (index.search(query[None], 4), (found[0][i : i + 1], found[1][i : i + 1])):
            assert_best(rows, of_query, rounding[i : i + 1], 4)


def test_near_ties_of_lists_are_decided_exactly(monkeypatch):
    """The same lists on every rank, although each rank's first look at them rounds."""
    _, queries = embeddings_of(200)
    index = make_index("ivfpq", 200, nprobe=3)
    expected = [set(row) for row in index._nearest.search(queries, 3)[1].tolist()]
    for error in (0.0, 1e9):  # never and always in doubt
        monkeypatch.setattr(compressed, "error_bound", lambda q, norm, error=error: torch.full((len(q), 1), error))
        assert [set(row) for row in index._probes(queries, 1)[0].tolist()] == expected


@pytest.mark.parametrize("k", [1, 50, 200])
def test_more_lists_are_searched_where_nprobe_holds_fewer_than_k(k):
    _, queries = embeddings_of(200)
    scores, rows = make_index("ivfpq", 200, nprobe=1).search(queries, k)
    assert scores.isfinite().all() and (rows < 200).all()
    assert all(len(set(row)) == k for row in rows.tolist())


def test_codes_of_a_list_that_does_not_exist_are_refused():
    quantizer, codes, norm = trained("ivfpq", 200)
    codes = codes.copy()
    codes[7, 0] = 14
    with pytest.raises(ValueError, match="passage 7 of this rank names a list that does not exist"):
        CompressedIndex(quantizer, codes, largest_norm=norm)


def _resident_per_byte(factory):
    """Memory of an index in a process that lets go of the codes, as a multiple of their bytes."""
    n, rng = 300_000, np.random.default_rng(0)
    quantizer = train(factory, rng.normal(size=(2000, 128)).astype(np.float32))
    few = quantizer.encode(torch.from_numpy(rng.normal(size=(2000, 128))).half(), 0)[0]
    CompressedIndex(quantizer, few, largest_norm=1.0).search(torch.randn(2, 128), 3)  # loads libraries
    gc.collect()
    before = process_memory("VmRSS")
    codes = few[rng.integers(len(few), size=n)]
    index = CompressedIndex(quantizer, codes, largest_norm=1.0)
    size = codes.nbytes
    del codes
    gc.collect()
    grown = process_memory("VmRSS") - before
    assert index.search(torch.randn(2, 128), 3)[0].shape == (2, 3)
    return grown / size


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process")
@pytest.mark.parametrize(
    "most",
    [
        {"PQ64": 1.1},
        slow({"IVF100,PQ128x4fs": 1.2, "PQ128x4fs": 1.1, "SQ4": 1.1, "IVF100,PQ64": 1.2}),
    ],
    ids=", ".join,
)
def test_an_index_holds_little_more_than_its_codes(most):
    """One copy. Lists keep 8 bytes a passage for its row, of which the bytes that name a code's list are saved."""
    command = f"from tests.test_compressed import _resident_per_byte; print(*map(_resident_per_byte, {list(most)}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # frees go to the system
    words = [sys.executable, "-c", command]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    found = dict(zip(most, map(float, done.stdout.split()), strict=True))
    assert all(0.98 < found[factory] < most[factory] for factory in most), found


@pytest.mark.parametrize(
    ("lists", "nprobe", "probes"),
    [(0, None, 0), (1, None, 1), (14, None, 14), (100, None, 16), (512, None, 16), (6400, None, 200)]
    + [(100, 3, 3), (100, 100, 100), (100, 1000, 100)],
)
def test_lists_that_a_query_looks_into(lists, nprobe, probes):
    assert Compression(nprobe=nprobe).probes(lists) == probes
    explanation = compressed.explain_probes(lists, probes)
    assert explanation is None if probes == lists else f"{probes} of the index's {lists} lists" in explanation


# What is asked for


@pytest.mark.parametrize(
    ("compression", "size", "factory"),
    [
        (Compression(), 10, "flat"),
        (Compression("flat"), 10, "flat"),
        (Compression("Flat"), 10, "flat"),
        (Compression("pq", 8), 10, "PQ8"),
        (Compression("ivfpq", 8), 1000, "IVF31,PQ8"),
        (Compression("ivfpq", 8), 1, "IVF1,PQ8"),
        (Compression("ivfpq", 8, nlist=5), 1000, "IVF5,PQ8"),
        (Compression("ivfpq", 8, nlist=5), 3, "IVF3,PQ8"),
        (Compression("ivfsq"), 1000, "IVF31,SQ4"),
        (Compression("ivfflat"), 1000, "IVF31,Flat"),
        (Compression("OPQ8_16,PQ8"), 10, "OPQ8_16,PQ8"),
        (Compression("IVF7,PQ8", nlist=7), 10, "IVF7,PQ8"),
        (Compression("PQ8x4"), 10, "PQ8x4"),
        (Compression("PQ8x4fs"), 10, "PQ8x4fs"),
        (Compression("OPQ8_16,IVF4,PQ8x4fs"), 10, "OPQ8_16,IVF4,PQ8x4fs"),
    ],
)
def test_factory_strings(compression, size, factory):
    assert compression.factory(size, D) == factory


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        (Compression("pq"), "--faiss_index_type pq needs --faiss_code_size"),
        (Compression("pq", 7), "--faiss_code_size 7 does not divide the embedding size 24; try 6 or 8"),
        (Compression("ivfpq", 64), "--faiss_code_size 64 does not divide the embedding size 24; try 24"),
        (Compression("PQ7"), "nor a Faiss factory string that fits embeddings of size 24"),
        (Compression("nonsense"), "--faiss_index_type nonsense: neither one of flat, ivfflat, ivfsq, ivfpq, pq nor"),
        (Compression("PQ7x4fs"), "nor a Faiss factory string that fits embeddings of size 24"),
        (Compression("PQ8x4fs_64"), "makes an index of class IndexPQFastScan"),
        (Compression("IVF4,PQ8x4fsr"), "makes an index of class IndexIVFPQFastScan"),
        (Compression("PQ8x6"), "makes product quantizer codes of 6 bits"),
        (Compression("HNSW32"), "makes an index of class IndexHNSWFlat"),
        (Compression("IVF4,RaBitQfs"), "makes an index of class IndexIVFRaBitQFastScan"),
        (Compression("IDMap,PQ8"), "makes an index of class IndexIDMap"),
        (Compression("IVF40_HNSW8,PQ8"), "makes lists that are not searched exactly"),
        (Compression("OPQ5_16,PQ8"), "the 16 numbers that OPQ5 rotates to are not a multiple of 5"),
        (Compression("IVF4,PQ8", nlist=5), "says 4 lists and --faiss_nlist 5"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(compression, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        compression.factory(1000, D)
    assert "\n" not in str(refused.value)


def test_the_sample_depends_on_size_and_seed_alone():
    rows = training_rows("PQ8", D, 10**6, 500, 3)
    assert len(set(rows)) == 500 and (np.diff(rows) > 0).all() and rows[-1] > 9e5
    assert np.array_equal(rows, training_rows("IVF9,SQ4", D, 10**6, 500, 3))
    assert not np.array_equal(rows, training_rows("PQ8", D, 10**6, 500, 4))
    assert len(training_rows("PQ8", D, 10**6, None, 0)) == 256 * 256
    assert len(training_rows("IVF1000,PQ8", D, 10**6, None, 0)) == 256 * 1000
    assert training_rows("PQ8", D, 3, None, 0).tolist() == [0, 1, 2]


def test_training_prints_nothing(capfd):
    train("IVF3,PQ8", np.random.default_rng(0).normal(size=(40, D)).astype(np.float32))
    assert capfd.readouterr() == ("", "")


def test_scaled_embeddings_are_found_as_well():
    """Recall of an inverted file does not change with the length of the embeddings."""
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(12, D)) * rng.uniform(0.5, 2, size=(12, 1))  # of different lengths
    embeddings = (0.64 / D**0.5 * (groups[rng.integers(12, size=2000)] + 0.5 * rng.normal(size=(2000, D)))).astype("f")
    queries = torch.from_numpy(embeddings[:60] + 0.02 * rng.normal(size=(60, D)).astype("f"))
    best = (queries @ torch.from_numpy(embeddings).T).topk(10).indices
    recalls = []
    for scale in (0.6, 1.0, 1.7):
        quantizer = train("IVF8,PQ8", scale * embeddings)
        codes, norm = quantizer.encode(torch.from_numpy(scale * embeddings), 0)
        rows = CompressedIndex(quantizer, codes, largest_norm=norm).search(scale * queries, 10)[1]
        recalls.append((rows[:, :, None] == best[:, None]).any(2).float().mean().item())
    assert max(recalls) - min(recalls) < 0.02 and min(recalls) > 0.5, recalls


def test_lists_of_exact_vectors_take_half_of_faiss_memory():
    assert make_empty("IVF3,Flat", D).code_size == 2 * D


# Values


def test_an_embedding_that_is_not_finite_is_named():
    embeddings, _ = embeddings_of(200)
    embeddings[70, 3] = torch.inf
    with pytest.raises(ValueError, match="the embedding of passage 1270 is not finite"):
        trained("pq", 200)[0].encode(embeddings, 1200)


@pytest.mark.parametrize("kind", ["pq", "ivfsq"])
@pytest.mark.parametrize("few", [1, 8])
def test_queries_are_checked(kind, few):
    index, (_, queries) = make_index(kind, 200), embeddings_of(200)
    with pytest.raises(ValueError, match="at least 1"):
        index.search(queries[:few], 0)
    with pytest.raises(ValueError, match="of size 24, the queries are"):
        index.search(queries[:few, :5], 3)
    with pytest.raises(ValueError, match="not finite"):
        index.search(queries[:few] * torch.nan, 3)


@pytest.mark.parametrize("kind", TYPES[:4])
def test_nothing_to_search_or_to_ask(kind):
    quantizer, codes, norm = trained(kind, 200)
    empty = CompressedIndex(quantizer, codes[:0], largest_norm=norm)
    for b in (0, 1, 8):
        scores, rows = empty.search(embeddings_of(200)[1][:b], 3)
        assert scores.shape == rows.shape == (b, 0)
    scores, rows = make_index(kind, 200).search(torch.zeros(0, D), 3)
    assert scores.shape == rows.shape == (0, 3) and empty.codes().shape == (0, quantizer.code_size)


# On a GPU, as far as that shows without one


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("atlas"), "propagate", True)
    return caplog


CUDA = torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Faiss may well copy the index to the GPU that is there")
@pytest.mark.parametrize("kind", ["ivfpq", "ivfsq", "ivfflat"])
def test_what_faiss_cannot_put_on_a_gpu_is_searched_by_the_cpu(told, kind):
    _, queries = embeddings_of(200)
    assert_same(make_index(kind, 200, device=CUDA).search(queries, 9), make_index(kind, 200).search(queries, 9))
    assert "Faiss cannot put the index on the GPU, the CPU searches it: " in told.text


def test_the_limits_of_a_gpu_are_told(told, monkeypatch):
    """In place of the GPU's copy there is one on the CPU, which is asked in the same way."""
    asked = []

    class OnGpu:
        def __init__(self, index, device):
            self.index, self.nprobe = faiss.clone_index(index), 0

        def search_preassigned(self, queries, k, lists, scores):
            asked.append((self.nprobe, k))
            self.index.nprobe = self.nprobe
            return self.index.search_preassigned(queries, k, lists, scores)

    monkeypatch.setattr(compressed, "_copy_to_gpu", OnGpu)
    monkeypatch.setattr(compressed, "_MOST_ON_GPU", 15)
    _, queries = embeddings_of(200)
    for kind, nprobe in (("ivfpq", None), ("ivfsq", 3), ("ivfflat", 5)):
        index, expected = (make_index(kind, 200, nprobe=nprobe, device=device) for device in (CUDA, None))
        assert_same(index.search(queries, 9), expected.search(queries, 9))
        assert asked.pop() == (nprobe or 14, 9) and not told.text
        asked.clear()
        for _ in range(2):
            assert_same(index.search(queries, 20), expected.search(queries, 20))
        assert not asked and told.text.count("on a GPU Faiss finds at most 15 passages a query") == 1
        told.clear()
    monkeypatch.setattr(compressed, "_MOST_ON_GPU", 13)
    assert_same(make_index("ivfpq", 200, device=CUDA).search(queries, 2), make_index("ivfpq", 200).search(queries, 2))
    assert not asked and "looks into at most 13 lists a query, --faiss_nprobe is 14" in told.text
    assert_same(make_index("SQ4", 200, device=CUDA).search(queries, 2), make_index("SQ4", 200).search(queries, 2))
    assert "The CPU searches the index: Faiss has no SQ4 without lists for a GPU" in told.text
    assert_same(
        make_index("PQ12x4fs", 200, device=CUDA).search(queries, 2), make_index("PQ12x4fs", 200).search(queries, 2)
    )
    assert "The CPU searches the index: Faiss has no fast scan for a GPU" in told.text


@pytest.mark.skipif(not hasattr(faiss, "GpuClonerOptions"), reason="a Faiss without GPUs")
@pytest.mark.parametrize(("kind", "in_fp16"), [("IVF4,PQ48", False), ("IVF4,PQ96", True), ("IVF4,SQ8", False)])
def test_tables_that_a_gpu_has_no_room_for_in_fp32_are_in_fp16(told, monkeypatch, kind, in_fp16):
    told.set_level("INFO")
    index = faiss.index_factory(96, kind, faiss.METRIC_INNER_PRODUCT)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, number, index, options: options.useFloat16)
    assert compressed._copy_to_gpu(index, CUDA) == in_fp16
    assert ("in fp16 only" in told.text) == in_fp16


def test_beside_gpus_faiss_has_all_cores_of_the_rank(monkeypatch):
    """Under torchrun a process has one thread, and with GPUs its cores are idle otherwise."""
    before, asked = faiss.omp_get_max_threads(), []
    monkeypatch.setattr(compressed.distributed, "cores", lambda: 4)
    monkeypatch.setattr(faiss, "omp_set_num_threads", asked.append)
    make_index("SQ4", 200)
    assert 4 not in asked
    make_index("SQ4", 200, device=CUDA)
    assert 4 in asked and faiss.omp_get_max_threads() == before


@pytest.mark.parametrize(("device", "threads"), [(torch.device("cpu"), 3), (CUDA, 4)])
def test_another_thread_encodes_with_as_many_as_the_rank_has(monkeypatch, tmp_path, device, threads):
    """OpenMP's number of threads is that of the calling thread, and it is another one that encodes at a refresh."""
    monkeypatch.setattr(compressed.distributed, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    workers = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, most, **settings):
            workers.append(most)
            super().__init__(most, **settings)

    monkeypatch.setattr(codec, "ThreadPoolExecutor", Pool)
    embeddings, _ = embeddings_of(200)
    passages = open_passages(write_corpus(tmp_path / "corpus.jsonl", 200), -1)
    first = IndexBuilder(passages, D, ask("SQ4"), device)
    first.add(0, embeddings)
    index = first.finish()
    assert set(workers) == {threads}
    again = IndexBuilder(passages, D, ask("SQ4"), device, previous=index, codec=index.compressed.codec)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(faiss.omp_set_num_threads, 1).result()
        thread.submit(again.add, 0, embeddings).result()
    assert set(workers) == {threads} and np.array_equal(again.finish().compressed.codes(), index.compressed.codes())


# Without Faiss


@pytest.mark.processes
def test_a_flat_index_needs_no_faiss():
    command = """
import sys
sys.modules["faiss"] = None  # an import of it fails
import torch
from atlas.index.codec import Codec, Compression
from atlas.index.sharded import ShardedIndex
hits = ShardedIndex(range(5), torch.eye(5).half()).search(torch.eye(5)[3:4], 1)
print(hits.ids.tolist())
for ask in (lambda: Compression("pq", 5).factory(5, 5), lambda: Codec.load(b"", "PQ5", 5)):
    try:
        ask()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    needs = "--index_mode faiss needs Faiss: pip install faiss-cpu or faiss-gpu"
    assert done.stdout.splitlines() == ["[[3]]", needs, needs], done.stderr
