"""Exact search over one shard against the obvious way, in every shape, and bit for bit whatever the chunks."""

import pytest
import torch

from src.index.flat import FlatIndex, _Buffers, _matrix_product, fixed_inner_products


def brute_force(embeddings, queries, k):
    """Score every pair by the fixed sum, sort by score descending and row ascending."""
    pairs = torch.cartesian_prod(torch.arange(len(queries)), torch.arange(len(embeddings)))
    scores = fixed_inner_products(queries[pairs[:, 0]], embeddings[pairs[:, 1]].float())
    best = scores.view(len(queries), -1).sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]


def assert_same(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def made_up(n, dimension, b, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, dimension, generator=generator).to(dtype)
    return embeddings, torch.randn(b, dimension, generator=generator)


@pytest.mark.parametrize("dimension", [1, 2, 3, 48, 129, 768])
def test_fixed_inner_products_are_inner_products(dimension):
    queries, passages = torch.randn(2, 50, dimension)
    expected = (queries.double() * passages.double()).sum(1)
    found = fixed_inner_products(queries, passages)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * dimension**0.5)
    one_by_one = [fixed_inner_products(queries[i : i + 1], passages[i : i + 1]) for i in range(50)]
    assert torch.equal(found, torch.cat(one_by_one))


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 10, 64, 199, 200, 1000])
@pytest.mark.parametrize("k", [1, 7, 200, 500])
def test_equals_brute_force_for_every_chunk_and_k(chunk_rows, k):
    embeddings, queries = made_up(200, 24, 5)
    assert_same(FlatIndex(embeddings, chunk_rows=chunk_rows).search(queries, k), brute_force(embeddings, queries, k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equals_float64(dtype):
    embeddings, queries = made_up(3000, 96, 6, dtype)
    scores, rows = FlatIndex(embeddings).search(queries, 50)
    expected = (queries.double() @ embeddings.double().T).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores.double(), expected.values[:, :50], rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, expected.indices[:, :50])  # this seed has no ties


@pytest.mark.parametrize(("n", "b"), [(0, 3), (5, 0), (0, 0)])
def test_nothing_to_search_or_to_ask(n, b):
    embeddings, queries = made_up(n, 8, b)
    scores, rows = FlatIndex(embeddings).search(queries, 4)
    assert scores.shape == rows.shape == (b, min(4, n))


@pytest.mark.parametrize("chunk_rows", [3, 100, 5000])
def test_duplicates_come_in_the_order_of_their_rows(chunk_rows):
    """Thousands of equal passages: more ties than any fixed slack, and ties across chunks."""
    few, queries = made_up(4, 16, 3)
    embeddings = few[torch.arange(3000) % 4].clone()
    found = FlatIndex(embeddings, chunk_rows=chunk_rows).search(queries, 1200)
    assert_same(found, brute_force(embeddings, queries, 1200))
    best_of_first = (few.float() @ queries[0]).argmax().item()
    assert found[1][0, :750].tolist() == list(range(best_of_first, 3000, 4))


def test_near_ties_do_not_depend_on_the_chunks():
    """Scores that differ in their last bits only: a plain matrix product orders them by the shape of its chunk."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 256, generator=generator)
    embeddings = (base + 1e-6 * torch.randn(2000, 256, generator=generator)).float()
    queries = torch.randn(4, 256, generator=generator)
    expected = brute_force(embeddings, queries, 20)
    for chunk_rows in (1, 16, 100, 333, 2000):
        assert_same(FlatIndex(embeddings, chunk_rows=chunk_rows).search(queries, 20), expected)


def test_best_rows_last_and_first():
    """Ascending scores make every chunk better than all before; descending ones make the first chunk win."""
    embeddings = torch.arange(1, 1001, dtype=torch.float32)[:, None] * torch.ones(1, 4)
    queries = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    scores, rows = FlatIndex(embeddings, chunk_rows=37).search(queries, 3)
    assert rows.tolist() == [[999, 998, 997], [0, 1, 2]]
    assert scores.tolist() == [[1000, 999, 998], [-1, -2, -3]]


@pytest.mark.parametrize("b", [1, 2, 33])
@pytest.mark.parametrize("dimension", [5, 768])
def test_the_error_bound_holds(b, dimension):
    """Both passes differ by less than the bound, with sums that cancel and with sums that only grow."""
    for shift in (0.0, 3.0):
        embeddings, queries = made_up(500, dimension, b)
        embeddings, queries = embeddings + shift, queries + shift
        index = FlatIndex(embeddings)
        first = _matrix_product(queries, embeddings, _Buffers(embeddings, b, 500))
        scores, rows = brute_force(embeddings, queries, 500)
        assert (first.gather(1, rows) - scores).abs().max(1, keepdim=True).values.le(index._error_bound(queries)).all()


def test_the_error_bound_follows_the_precision_that_is_allowed():
    embeddings, queries = made_up(500, 64, 4)
    index = FlatIndex(embeddings)
    bounds = {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            bounds[precision] = index._error_bound(queries)
            assert_same(index.search(queries, 9), brute_force(embeddings, queries, 9))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (bounds["highest"] < bounds["high"]).all() and (bounds["high"] < bounds["medium"]).all()


def test_queries_of_other_types_and_layouts():
    embeddings, queries = made_up(100, 16, 4)
    half = queries.half()
    strided = half.T.contiguous().T
    assert_same(FlatIndex(embeddings).search(strided, 5), brute_force(embeddings, half.float(), 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_embeddings_that_are_not_finite_are_refused_when_the_index_is_built(bad):
    embeddings, _ = made_up(3000, 768, 1)
    embeddings[2345, 17] = bad
    with pytest.raises(ValueError, match="passage 2345 is not finite"):
        FlatIndex(embeddings)


def test_bad_input_is_refused_in_a_sentence():
    embeddings, queries = made_up(10, 8, 2)
    index = FlatIndex(embeddings)
    for k in (0, -1):
        with pytest.raises(ValueError, match="at least 1 passage"):
            index.search(queries, k)
    with pytest.raises(ValueError, match=r"size 8, the queries are \(2, 7\)"):
        index.search(queries[:, :7], 3)
    with pytest.raises(ValueError, match="queries hold values that are not finite"):
        index.search(queries / 0, 3)
    with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
        FlatIndex(embeddings.double())
    with pytest.raises(ValueError, match="chunk_rows"):
        FlatIndex(embeddings, chunk_rows=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damage_in_a_saved_index_is_found_by_the_search(bad):
    embeddings, queries = made_up(300, 8, 2)
    embeddings[150, 3] = bad
    with pytest.raises(ValueError, match="rows 128 to 191 of this rank hold damaged"):
        FlatIndex(embeddings, largest_norm=10.0, chunk_rows=64).search(queries, 3)


def test_many_queries_shorten_the_chunks(monkeypatch):
    monkeypatch.setattr("src.index.flat._MOST_SCORES", 64)
    monkeypatch.setattr("src.index.flat._MOST_PAIRS", 10)
    embeddings, queries = made_up(100, 8, 20)
    lengths = []

    def counting(queries, rows, buffers):
        lengths.append(len(rows))
        return _matrix_product(queries, rows, buffers)

    monkeypatch.setattr("src.index.flat._matrix_product", counting)
    assert_same(FlatIndex(embeddings).search(queries, 6), brute_force(embeddings, queries, 6))
    assert max(lengths) == 3
