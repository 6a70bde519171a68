"""Exact search over one shard against the obvious way, in every shape, and bit for bit whatever the chunks."""

import pytest
import torch
import torch.nn.functional as F

from atlas.index import flat
from atlas.index.flat import FlatIndex, error_bound, fixed_inner_products


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


@pytest.fixture(params=["fp32 first", "16 bits first", "as on a GPU"], autouse=True)
def way(request, monkeypatch):
    """Every test with the first passes of every device, and with few queries enough for bf16."""
    for choice in ("cpu_prefers_bf16", "cpu_multiplies_fp16"):
        monkeypatch.setattr(f"atlas.runtime.device.{choice}", lambda device: request.param == "16 bits first")
    monkeypatch.setattr("atlas.index.flat._MANY_QUERIES", 3)
    if request.param == "as on a GPU":
        monkeypatch.setattr("atlas.runtime.device.waits_cost_much", lambda device: True)
        monkeypatch.setattr("atlas.runtime.device.sums_half_products_in_fp32", lambda device: True)
        monkeypatch.setattr("atlas.runtime.device.half_products", lambda q, p, out: out.copy_(q.float() @ p.float().T))
    return request.param


def every_first_pass(index, queries):
    return [index._fp32_pass(queries), *(index._half_pass(queries, d) for d in (torch.float16, torch.bfloat16))]


def test_few_rows_are_looked_at_closely_and_only_doubt_takes_a_second_look(monkeypatch, way):
    """A GPU keeps some rows more than are wanted: enough but for many near-ties, or scores that fp16 cannot hold."""
    again, by_chunks = [], flat._top_k_by_chunks
    monkeypatch.setattr("atlas.index.flat._top_k_by_chunks", lambda *a: again.append(a) or by_chunks(*a))
    embeddings, queries = made_up(3000, 64, 5)
    ties = embeddings[:1] + 1e-6 * made_up(3000, 64, 0, torch.float32)[0]
    for rows, asked, doubtful in (
        (embeddings, queries, False),
        (embeddings[:30], queries, False),
        (ties, queries, True),
        (ties[:30], queries, False),
        (embeddings, queries * 1e6, True),
        (embeddings[:30], queries * 1e6, True),
    ):
        for chunk_rows in (7, 500, 3000):
            again.clear()
            found = FlatIndex(rows, chunk_rows=chunk_rows).search(asked, 10)
            assert_same(found, brute_force(rows, asked, 10))
            assert len(again) == (doubtful or way != "as on a GPU")


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("kept", [1, 20, 1000])
def test_the_best_scores_are_in_the_best_tiles(n, kept):
    kept = min(kept, n)
    scores = torch.randint(0, 50, (3, n), generator=torch.Generator().manual_seed(n)).float()
    tiles = F.pad(scores, (0, -n % 64), value=-torch.inf).unflatten(1, (-1, 64))
    best, columns = flat._best_by_tiles(tiles, kept)
    assert torch.equal(best, scores.topk(kept).values) and torch.equal(scores.gather(1, columns), best)
    assert all(len(set(row)) == kept for row in columns.tolist())


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
    """Both passes differ by less than the bound: sums that cancel, that only grow, that are too small for fp16."""
    for shift, scale in ((0.0, 1.0), (3.0, 1.0), (0.0, 2.0**-13)):
        embeddings, queries = made_up(500, dimension, b)
        embeddings, queries = (embeddings + shift) * scale, (queries + shift) * scale
        index = FlatIndex(embeddings)
        scores, rows = brute_force(embeddings, queries, 500)
        for first_pass in every_first_pass(index, queries):
            approximate = torch.empty(b, 500)
            first_pass.score(0, 500, approximate)
            assert ((approximate.gather(1, rows) - scores).abs() <= first_pass.error).all()


def test_the_error_bound_follows_the_precision_that_is_allowed():
    embeddings, queries = made_up(500, 64, 4)
    index = FlatIndex(embeddings)
    bounds = {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            bounds[precision] = error_bound(queries, index.largest_norm)
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


@pytest.mark.parametrize("way", ["fp32 first", "16 bits first"], indirect=True)
def test_many_queries_shorten_the_chunks(monkeypatch):
    monkeypatch.setattr("atlas.index.flat._MOST_SCORES", 64)
    monkeypatch.setattr("atlas.index.flat._MOST_PAIRS", 10)
    embeddings, queries = made_up(100, 8, 20)
    lengths = []
    score = flat._candidates

    def counting(first_pass, start, end, *rest):
        lengths.append(end - start)
        return score(first_pass, start, end, *rest)

    monkeypatch.setattr("atlas.index.flat._candidates", counting)
    assert_same(FlatIndex(embeddings).search(queries, 6), brute_force(embeddings, queries, 6))
    assert max(lengths) == 3


def test_fp32_takes_over_where_16_bits_tell_too_little(monkeypatch):
    """Rows that differ by less than bf16 rounds would nearly all need the second pass."""
    base, queries = torch.randn(2, 1, 64).expand(2, 4, 64)
    embeddings = base[:1] + 1e-4 * made_up(5000, 64, 0, torch.float32)[0]
    scored = []
    exact_scores = flat.exact_scores
    monkeypatch.setattr(
        "atlas.index.flat.exact_scores",
        lambda q, query, *rest: scored.append(len(query)) or exact_scores(q, query, *rest),
    )
    assert_same(FlatIndex(embeddings, chunk_rows=1000).search(queries, 10), brute_force(embeddings, queries, 10))
    assert sum(scored) < 0.1 * len(queries) * len(embeddings)


def test_scores_that_fp16_cannot_hold():
    embeddings, queries = made_up(500, 16, 1)
    for factor in (1e3, 1e6, 1e12):
        large = queries * factor
        assert_same(FlatIndex(embeddings * 100).search(large, 9), brute_force(embeddings * 100, large, 9))


def test_the_best_exact_scores_are_those_of_all_pairs():
    """Whatever the number of pairs of a query, none included: the k best are scored, and in the same way."""
    embeddings, queries = made_up(n=400, dimension=48, b=5)
    generator = torch.Generator().manual_seed(0)
    query = torch.tensor([0] * 90 + [1] * 3 + [3] * 40 + [4] * 1)
    row = torch.randint(400, (len(query),), generator=generator)

    def read(rows):
        return embeddings[rows].float()

    everything = flat.exact_scores(queries, query, row, read)
    best = flat.best_exact_scores(queries, query, row, read, k=7)
    scored = best > -torch.inf
    assert torch.equal(best[scored], everything[scored])
    for number in range(5):
        of_query = everything[query == number]
        expected = of_query.topk(min(7, len(of_query))).values
        assert torch.equal(best[query == number].topk(len(expected)).values, expected)
    assert 1 + 3 + 14 <= scored.sum() < 60
    none = torch.zeros(0, dtype=torch.int64)
    assert len(flat.best_exact_scores(queries, none, none, read, k=7)) == 0
