"""Search among codes against decoding all of them, and against Faiss; bit for bit whatever the chunks and shards."""

import warnings

import faiss
import numpy as np
import pytest
import torch

from atlas.index.pq_search import ProductQuantizerSearch
from tests.test_flat import assert_same, brute_force


@pytest.fixture(params=[False, True], ids=["", "as on a GPU"], autouse=True)
def way(request, monkeypatch):
    """Every test also in the way that waits for the device only once."""
    monkeypatch.setattr("atlas.runtime.device.waits_cost_much", lambda device: request.param)


def random_quantizer(m, width, n, seed=0):
    """Codes (n, m) and centroids (m, 256, width)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, m), generator=generator, dtype=torch.uint8)
    return codes, torch.randn(m, 256, width, generator=generator)


def random_queries(b, dimension, seed=1):
    return torch.randn(b, dimension, generator=torch.Generator().manual_seed(seed))


def decode(codes, centroids):
    parts = [centroids[j][codes[:, j].long()] for j in range(codes.shape[1])]
    return torch.cat(parts, dim=1)


def assert_same_as_faiss(found, index, queries, k):
    """Scores to 1e-4; ids wherever the neighbouring scores are further apart than that."""
    scores, rows = index.search(queries.numpy(), k + 1)
    torch.testing.assert_close(found[0], torch.from_numpy(scores[:, :k]), rtol=0, atol=1e-4)
    gaps = -np.diff(scores, prepend=np.inf, axis=1)  # (b, k + 1), to the one before
    clear = torch.from_numpy((gaps[:, :k] > 2e-4) & (gaps[:, 1:] > 2e-4))
    assert clear.float().mean() > 0.5
    assert torch.equal(found[1][clear], torch.from_numpy(rows[:, :k])[clear])


@pytest.mark.parametrize("m", [8, 48, 64, 96, 192])
def test_equals_faiss_for_every_code_size(m):
    codes, centroids = random_quantizer(m, 768 // m, 3000)
    centroids /= 768**0.5
    index = faiss.IndexPQ(768, m, 8, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(centroids.numpy().ravel(), index.pq.centroids)
    index.is_trained = True
    index.add_sa_codes(codes.numpy())
    queries = random_queries(5, 768)
    assert_same_as_faiss(ProductQuantizerSearch(codes, centroids).search(queries, 20), index, queries, 20)


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 65, 333, 1000])
@pytest.mark.parametrize("k", [1, 9, 400])
def test_equals_decoding_everything_for_every_chunk_and_k(chunk_rows, k):
    codes, centroids = random_quantizer(6, 4, 333)
    queries = random_queries(5, 24)
    found = ProductQuantizerSearch(codes, centroids, chunk_rows=chunk_rows).search(queries, k)
    assert_same(found, brute_force(decode(codes, centroids), queries, k))


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_give_the_same_bits(shards):
    """Equal codes, hence equal scores, on several shards: the order is that of the rows."""
    codes, centroids = random_quantizer(4, 3, 50)
    codes = codes[torch.arange(400) % 50]
    queries = random_queries(40, 12)
    whole = ProductQuantizerSearch(codes, centroids).search(queries, 30)
    bounds = [len(codes) * i // shards for i in range(shards + 1)]
    scores, rows = [], []
    for start, end in zip(bounds, bounds[1:], strict=False):
        found = ProductQuantizerSearch(codes[start:end], centroids).search(queries, 30)
        scores.append(found[0])
        rows.append(found[1] + start)
    best = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
    assert_same((best.values[:, :30], torch.cat(rows, 1).gather(1, best.indices)[:, :30]), whole)


@pytest.mark.parametrize("b", [1, 31, 32, 33, 70])
def test_queries_do_not_influence_each_other(b):
    codes, centroids = random_quantizer(8, 3, 500)
    queries = random_queries(b, 24)
    search = ProductQuantizerSearch(codes, centroids)
    found = search.search(queries, 5)
    alone = [search.search(query[None], 5) for query in queries]
    assert_same(found, (torch.cat([scores for scores, _ in alone]), torch.cat([rows for _, rows in alone])))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_equals_decoding_everything_at_every_precision_of_products(precision):
    codes, centroids = random_quantizer(8, 8, 400)
    queries = random_queries(4, 64)
    torch.set_float32_matmul_precision(precision)
    try:
        found = ProductQuantizerSearch(codes, centroids).search(queries, 9)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(found, brute_force(decode(codes, centroids), queries, 9))


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_error_bound_holds(shift):
    codes, centroids = random_quantizer(16, 48, 500)
    centroids, queries = centroids + shift, random_queries(9, 768) + shift
    first_pass = ProductQuantizerSearch(codes, centroids)._first_pass(queries)
    approximate = torch.empty(9, 500)
    first_pass.score(0, 500, approximate)
    scores, rows = brute_force(decode(codes, centroids), queries, 500)
    assert ((approximate.gather(1, rows) - scores).abs() <= first_pass.error).all()


@pytest.mark.processes
def test_codes_may_be_a_read_only_file(tmp_path):
    codes, centroids = random_quantizer(8, 4, 300)
    np.save(tmp_path / "codes.npy", codes.numpy())
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
    with warnings.catch_warnings():  # torch has no read-only tensors, and says so once a process
        warnings.simplefilter("ignore", UserWarning)
        codes_in_file = torch.from_numpy(mapped)
    queries = random_queries(3, 32)
    search = ProductQuantizerSearch(codes_in_file, centroids)
    assert search.codes.data_ptr() == mapped.ctypes.data
    assert_same(search.search(queries, 7), brute_force(decode(codes, centroids), queries, 7))


@pytest.mark.parametrize(("n", "b"), [(0, 3), (5, 0), (0, 0)])
def test_nothing_to_search_or_to_ask(n, b):
    codes, centroids = random_quantizer(2, 4, n)
    scores, rows = ProductQuantizerSearch(codes, centroids).search(torch.randn(b, 8), 4)
    assert scores.shape == rows.shape == (b, min(4, n))


def test_bad_input_is_refused_in_a_sentence():
    codes, centroids = random_quantizer(2, 4, 10)
    with pytest.raises(ValueError, match=r"codes must be \(n, 2\) in uint8, found \(10, 1\)"):
        ProductQuantizerSearch(codes[:, :1], centroids)
    with pytest.raises(ValueError, match="codes must be"):
        ProductQuantizerSearch(codes.int(), centroids)
    with pytest.raises(ValueError, match=r"centroids must be \(m, 256, d / m\)"):
        ProductQuantizerSearch(codes, centroids[:, :16])
    with pytest.raises(ValueError, match="centroids must be"):
        ProductQuantizerSearch(codes, centroids.double())
    with pytest.raises(ValueError, match="not all finite"):
        ProductQuantizerSearch(codes, centroids / 0)
    with pytest.raises(ValueError, match="chunk_rows"):
        ProductQuantizerSearch(codes, centroids, chunk_rows=0)
    search = ProductQuantizerSearch(codes, centroids)
    with pytest.raises(ValueError, match="at least 1 passage"):
        search.search(torch.randn(2, 8), 0)
    with pytest.raises(ValueError, match=r"size 8, the queries are \(2, 9\)"):
        search.search(torch.randn(2, 9), 3)
    with pytest.raises(ValueError, match="queries hold values that are not finite"):
        search.search(torch.randn(2, 8) / 0, 3)
