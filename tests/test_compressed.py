"""Compressed search over the codes of one shard: equal to scoring every decoded code, and to a plain Faiss index."""

import logging
import re
from functools import cache

import faiss
import numpy as np
import pytest
import torch

from atlas.index import codec, compressed, inverted_file
from atlas.index.codec import Codec, Compression, make_empty, train, training_rows
from atlas.index.compressed import CompressedIndex
from atlas.index.inverted_file import InvertedFile, centroids_of_lists, list_numbers
from tests.test_flat import assert_same, brute_force, made_up

D = 24
# One for every class of quantizer, with and without lists and transforms
TYPES = ["pq", "ivfpq", "ivfsq", "ivfflat", "OPQ8_16,PQ8", "RR24,IVF3,PQ8", "PCAR16,SQ8", "IVF2,SQfp16", "SQ4"]
SMALL = [kind for kind in TYPES if "OPQ" not in kind]  # which takes a second to train


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


def decoded_brute_force(quantizer, codes, queries, k):
    """Decode everything, score every pair by the fixed sum, sort by score descending and row ascending."""
    return brute_force(torch.from_numpy(quantizer.decode(codes)), quantizer.rotate(queries), k)


def plain_faiss(quantizer):
    """Faiss's own index of the same quantizer, to be filled in one go; looks into all lists."""
    index = faiss.deserialize_index(np.frombuffer(quantizer.serialize(), np.uint8))
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = inner.nlist
    return index


@pytest.mark.parametrize(("kind", "n"), [(kind, n) for kind in SMALL for n in (1, 2, 7, 200, 1000)] + [(TYPES[4], 300)])
def test_equals_scoring_every_decoded_code(kind, n):
    """Bit for bit, with ties, k above n and fewer rows than centroids; for one query and for many."""
    quantizer, codes, _ = trained(kind, n)
    index, (_, queries) = make_index(kind, n), embeddings_of(n)
    for k in (1, 5, n, n + 3):
        for few in (queries, queries[:1]):
            assert_same(index.search(few, k), decoded_brute_force(quantizer, codes, few, k))


@pytest.mark.parametrize("kind", TYPES)
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


def test_ivfflat_finds_what_exact_search_finds():
    embeddings, queries = embeddings_of(300)
    assert_same(make_index("ivfflat", 300).search(queries, 20), brute_force(embeddings, queries, 20))


@pytest.mark.parametrize("kind", ["pq", "SQ4", "ivfpq"])
@pytest.mark.parametrize("chunk_bytes", [1, 100])
def test_chunks_change_nothing(monkeypatch, kind, chunk_bytes):
    quantizer, codes, _ = trained(kind, 200)
    _, queries = embeddings_of(200)
    monkeypatch.setattr(inverted_file, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(compressed, "_MANY_QUERIES", 100)  # Faiss instead of torch
    assert_same(make_index(kind, 200).search(queries, 9), decoded_brute_force(quantizer, codes, queries, 9))


@pytest.mark.parametrize("kind", ["pq", "ivfsq", "ivfpq"])
def test_one_code_for_all_passages(monkeypatch, kind):
    """The more candidates Faiss is asked for, the more there are: until they are all."""
    embeddings = made_up(1, D, 0)[0].expand(400, D)
    monkeypatch.setattr(compressed, "_MANY_QUERIES", 100)
    quantizer = trained(kind, 200)[0]
    codes, norm = quantizer.encode(embeddings, 0)
    _, rows = CompressedIndex(quantizer, codes, largest_norm=norm).search(made_up(1, D, 3)[1], 7)
    assert rows.tolist() == [list(range(7))] * 3


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
    assert np.array_equal(make_index(kind, 300).codes(), trained(kind, 300)[1])


@pytest.mark.parametrize("kind", TYPES)
def test_a_quantizer_survives_being_saved(kind):
    quantizer, codes, _ = trained(kind, 300)
    again = Codec.load(quantizer.serialize(), quantizer.factory, D)
    embeddings, queries = embeddings_of(300)
    assert np.array_equal(again.encode(embeddings, 0)[0], codes)
    assert np.array_equal(again.decode(codes), quantizer.decode(codes))
    assert torch.equal(again.rotate(queries), quantizer.rotate(queries))


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
    numbers = list_numbers(quantizer.inner, codes)
    centroids = torch.from_numpy(centroids_of_lists(quantizer.inner))
    for query in queries:
        nearest = (centroids @ query).argsort(descending=True)
        k = 4
        probed = next(p for p in range(nprobe, 15) if np.isin(numbers, nearest[:p]).sum() >= k)
        rows = torch.from_numpy(np.flatnonzero(np.isin(numbers, nearest[:probed])))
        scores, order = decoded_brute_force(quantizer, codes[rows.numpy()], query[None], k)
        assert_same(index.search(query[None], k), (scores, rows[order]))


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


@pytest.mark.parametrize("kind", ["ivfpq", "ivfsq", "IVF2,SQfp16"])
def test_a_copy_for_the_gpu_finds_the_same(kind):
    """Its row numbers are places, which a GPU gives back."""
    quantizer, codes, _ = trained(kind, 200)
    lists = InvertedFile(quantizer.inner, codes, quantizer.lists, None, lambda: None)
    _, queries = embeddings_of(200)
    probes = lists.probes(queries, 9, torch.from_numpy(lists.sizes))
    in_place = lists.candidates(queries.numpy(), 30, probes)
    lists._on_gpu = lists._copied()
    for expected, found in zip(in_place, lists.candidates(queries.numpy(), 30, probes), strict=True):
        assert np.array_equal(expected, found)


@pytest.mark.parametrize(("n", "lists", "more"), [(255, 300, -1), (65_535, 300, 0), (70_000, 300, 1), (70_000, 100, 2)])
def test_an_inverted_file_holds_little_more_than_its_codes(n, lists, more):
    """Bytes a passage beyond those of its code: of its row number, without those that name the list."""
    inner = faiss.index_factory(D, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    inner.train(np.random.default_rng(0).normal(size=(39 * lists, D)).astype(np.float32))
    codes = np.zeros((n, inner.sa_code_size()), np.uint8)
    held = InvertedFile(inner, codes, 1, None, lambda: None)
    arrays = sum(value.nbytes for value in (held._codes, held._rows))
    assert arrays == codes.nbytes + more * n
    assert np.array_equal(held.all(), codes)


def test_explanation_of_nprobe():
    assert "--faiss_nprobe 31 would compare about 1/32" in compressed.explain_nprobe(1000, None)
    for arguments in ((1000, 1000), (0, None), (1, None)):
        assert compressed.explain_nprobe(*arguments) is None


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
        (Compression("PQ8x4fs"), "--faiss_index_type PQ8x4fs makes 4-bit fast-scan codes"),
        (Compression("IVF4,PQ8x4fs"), "makes 4-bit fast-scan codes"),
        (Compression("PQ8x4"), "makes product quantizer codes of 4 bits"),
        (Compression("HNSW32"), "makes an index of class IndexHNSWFlat"),
        (Compression("IVF4,RaBitQ"), "makes an index of class IndexIVFRaBitQ"),
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

    monkeypatch.setattr(inverted_file, "_copy_to_gpu", OnGpu)
    for module in (compressed, inverted_file):
        monkeypatch.setattr(module, "MOST_ON_GPU", 30)
    _, queries = embeddings_of(200)
    for kind, nprobe in (("ivfpq", None), ("ivfsq", 3), ("ivfflat", 5)):
        index, expected = (make_index(kind, 200, nprobe=nprobe, device=device) for device in (CUDA, None))
        assert_same(index.search(queries, 9), expected.search(queries, 9))
        assert asked.pop() == (nprobe or 14, 25) and not told.text
        asked.clear()
        for _ in range(2):
            assert_same(index.search(queries, 20), expected.search(queries, 20))
        assert not asked and told.text.count("on a GPU Faiss finds at most 30 passages a query") == 1
        told.clear()
    for module in (compressed, inverted_file):
        monkeypatch.setattr(module, "MOST_ON_GPU", 13)
    assert_same(make_index("ivfpq", 200, device=CUDA).search(queries, 2), make_index("ivfpq", 200).search(queries, 2))
    assert not asked and "looks into at most 13 lists a query, --faiss_nprobe is 14" in told.text
    assert_same(make_index("SQ4", 200, device=CUDA).search(queries, 2), make_index("SQ4", 200).search(queries, 2))
    assert "The CPU searches the index: Faiss has no IndexScalarQuantizer without lists for a GPU" in told.text
