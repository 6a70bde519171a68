"""Search over ranks: the same hits whatever their number, bit for bit when it is exact."""

import dataclasses

import pytest
import torch

from atlas.index.build import compress
from atlas.index.codec import Compression
from atlas.index.flat import FlatIndex
from atlas.index.sharded import ShardedIndex, look_up, shard_rows
from atlas.runtime import distributed
from tests.kit import slow
from tests.ranks import run_on_ranks
from tests.test_flat import assert_same, brute_force, made_up


class Passages(list):
    """A corpus in memory that counts what is read."""

    def __init__(self, n):
        super().__init__({"id": f"p{i}", "title": "", "text": f"text {i}"} for i in range(n))
        self.read = []

    def __getitem__(self, rows):
        self.read += rows
        return [list.__getitem__(self, i) for i in rows]


def make_index(embeddings, chunk_rows=None):
    rows = shard_rows(len(embeddings), distributed.rank(), distributed.world_size())
    mine = embeddings[rows.start : rows.stop].clone()
    return ShardedIndex(Passages(len(embeddings)), mine, FlatIndex(mine, chunk_rows=chunk_rows) if chunk_rows else None)


def my_part(tensor, sizes):
    first = sum(sizes[: distributed.rank()])
    return tensor[first : first + sizes[distributed.rank()]]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shard_rows_cover_every_row_once(n, world_size):
    shards = [shard_rows(n, rank, world_size) for rank in range(world_size)]
    assert [row for shard in shards for row in shard] == list(range(n))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def _search(embeddings, queries, sizes, k, chunk_rows):
    index = make_index(embeddings, chunk_rows)
    hits = index.search(my_part(queries, sizes), k)
    return hits.scores, hits.ids


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [[6], [4, 2], [0, 6], [3, 0, 3], [1, 2, 3]])
@pytest.mark.parametrize(("n", "k"), [(50, 5), (50, 30), (7, 4), (7, 100), (2, 1), (1, 3)])
def test_search_equals_brute_force(sizes, n, k):
    """k above the shard's size, above N, empty shards, ranks without queries, small chunks; all bit for bit."""
    embeddings, queries = made_up(n, 12, sum(sizes))
    embeddings[n // 2 :] = embeddings[: n - n // 2].clone()  # ties across shards
    expected = brute_force(embeddings, queries, k)
    for chunk_rows in (None, 1, 5):
        parts = run_on_ranks(len(sizes), _search, embeddings, queries, sizes, k, chunk_rows)
        assert [len(scores) for scores, _ in parts] == sizes
        assert_same((torch.cat([s for s, _ in parts]), torch.cat([i for _, i in parts])), expected)


@pytest.mark.processes
def test_nobody_asks():
    for scores, ids in run_on_ranks(2, _search, *made_up(9, 4, 0), [0, 0], 3, None):
        assert scores.shape == ids.shape == (0, 3)


def _embeddings_of(embeddings, ids, sizes):
    return make_index(embeddings).embeddings_of(my_part(ids, sizes))


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [[5], [2, 3], [0, 4, 1]])
def test_embeddings_of_equals_indexing(sizes):
    embeddings, _ = made_up(23, 6, 0)
    ids = torch.randint(23, (sum(sizes), 4), generator=torch.Generator().manual_seed(0))
    found = torch.cat(run_on_ranks(len(sizes), _embeddings_of, embeddings, ids, sizes))
    assert found.dtype == torch.float32 and torch.equal(found, embeddings[ids].float())


def test_passages_are_looked_up_once_and_belong_to_the_caller():
    index = make_index(made_up(9, 4, 0)[0])
    found = look_up(index.passages, torch.tensor([[3, 1], [8, 3]]))
    assert [[p["id"] for p in row] for row in found] == [["p3", "p1"], ["p8", "p3"]]
    assert sorted(index.passages.read) == [1, 3, 8]
    found[0][0]["score"] = 1.0
    assert "score" not in found[1][1] and "score" not in index.passages[[3]][0]
    assert look_up(index.passages, torch.zeros(0, 5, dtype=torch.int64)) == []


def _build(embeddings):
    try:
        return make_index(embeddings).size
    except ValueError as error:
        return str(error)


@pytest.mark.processes
def test_an_embedding_that_is_not_finite_ends_every_rank_with_its_number():
    embeddings, _ = made_up(9, 4, 0)
    embeddings[7, 0] = float("nan")
    assert (
        run_on_ranks(2, _build, embeddings)
        == ["the embedding of passage 7 is not finite: has the training diverged?"] * 2
    )


def test_embeddings_must_match_the_passages():
    with pytest.raises(ValueError, match="3 embeddings for the 4 passages"):
        ShardedIndex(Passages(4), torch.zeros(3, 2, dtype=torch.float16))


def test_k_below_1_is_refused():
    embeddings, queries = made_up(9, 4, 2)
    with pytest.raises(ValueError, match="at least 1"):
        make_index(embeddings).search(queries, 0)


# Compressed


def _search_compressed(embeddings, queries, sizes, k, compression):
    index = compress(make_index(embeddings), compression)
    hits = index.search(my_part(queries, sizes), k)
    return hits.scores, hits.ids


def on_ranks(embeddings, queries, sizes, k, compression):
    parts = run_on_ranks(len(sizes), _search_compressed, embeddings, queries, sizes, k, compression)
    scores, ids = torch.cat([scores for scores, _ in parts]), torch.cat([ids for _, ids in parts])
    assert scores.shape == ids.shape == (len(queries), min(k, len(embeddings))) and scores.isfinite().all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    steps, next_id = scores.diff(dim=1), ids.diff(dim=1)
    assert ((steps < 0) | ((steps == 0) & (next_id > 0))).all()  # by score, ties by row
    return scores, ids


KINDS = [
    Compression("pq", 4),
    Compression("pq", 4, train_size=40, seed=5),
    Compression("ivfpq", 4, nprobe=1),
    Compression("ivfsq", nprobe=2),
    Compression("ivfflat", nprobe=2, nlist=6),
    Compression("RR12,IVF3,SQ8", nprobe=2),
    Compression("PQ6x4"),
    Compression("PQ12x4fs"),
    Compression("IVF6,PQ12x4fs", nprobe=2),
    Compression("RR12,RaBitQ"),
    Compression("IVF6,RaBitQ", nprobe=2),
]


@pytest.mark.processes
@pytest.mark.parametrize("compression", KINDS, ids=str)
@pytest.mark.parametrize("n", [slow(1), slow(7), 60])
def test_the_number_of_ranks_changes_no_row_but_ties_with_the_last(n, compression):
    """Ranks with other queries, none, and an empty share; few lists, and too few passages in them for k."""
    embeddings, queries = made_up(n, 12, 6)
    embeddings[n // 2 :] = embeddings[: n - n // 2].clone()  # ties across shards
    for k in (1, 5, 40):
        scores, ids = on_ranks(embeddings, queries, [6], k, compression)
        rounding = 1e-5 * scores.abs().amax(1, keepdim=True)
        for sizes in ([6, 0], [1, 2, 3]):
            other_scores, other_ids = on_ranks(embeddings, queries, sizes, k, compression)
            assert ((other_scores - scores).abs() <= rounding).all()
            inside = scores > scores[:, -1:] + 2 * rounding  # these must be found by both
            for row, among, other in zip(ids, inside, other_ids, strict=True):
                assert torch.isin(row[among], other).all()
                assert torch.equal(row[among], other[: among.sum()])


REFINED = [
    Compression("ivfpq", 4, refine_factor=3),
    Compression("pq", 2, refine_factor=2),
    Compression("PQ6x4fs", refine_factor=4),
    Compression("IVF4,PQ6x4fs", nprobe=2, refine_factor=2),
    Compression("RR12,RaBitQ", refine_factor=4),
    Compression("IVF4,RaBitQ", nprobe=2, refine_factor=4),
]


@pytest.mark.processes
@pytest.mark.parametrize("compression", REFINED, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_refined_scores_are_the_same_on_any_number_of_ranks(compression, ties):
    """Bit for bit the exact ones, and rows too, unless the candidates are cut among equal scores of the codes."""
    n, k = 60, 4
    embeddings, queries = made_up(n, 12, 6)
    if ties:
        embeddings[n // 2 :] = embeddings[: n - n // 2].clone()
    best, order = brute_force(embeddings, queries, n)
    exact = best.gather(1, order.argsort(dim=1))
    cut = compression.refine_factor * k
    rough = dataclasses.replace(compression, refine_factor=1)
    candidates, _ = on_ranks(embeddings, queries, [6], cut + 1, rough)
    clear = candidates[:, -2] - candidates[:, -1] > 1e-5 * candidates.abs().amax(1)
    expected = on_ranks(embeddings, queries, [6], k, compression)
    assert clear.any() or ties
    for sizes in ([6], [6, 0], [1, 2, 3]):
        scores, ids = on_ranks(embeddings, queries, sizes, k, compression)
        assert torch.equal(scores, exact.gather(1, ids))
        assert_same((scores[clear], ids[clear]), (expected[0][clear], expected[1][clear]))


@pytest.mark.processes
@pytest.mark.parametrize("refine_factor", [2, 5, 100])
def test_refined_hits_are_candidates_in_the_order_of_their_embeddings(refine_factor):
    embeddings, queries = made_up(80, 12, 6)
    flat = make_index(embeddings)
    rough = compress(flat, Compression("pq", 2)).search(queries, min(4 * refine_factor, 80))
    found = compress(flat, Compression("pq", 2, refine_factor=refine_factor)).search(queries, 4)
    scores, order = brute_force(embeddings, queries, 80)
    for row, (query_scores, query_order) in enumerate(zip(scores, order, strict=True)):
        kept = torch.isin(query_order, rough.ids[row])
        assert_same((found.scores[row], found.ids[row]), (query_scores[kept][:4], query_order[kept][:4]))
    if refine_factor == 100:  # all are candidates
        assert_same(found, brute_force(embeddings, queries, 4))


def _refuse_to_compress(embeddings, compression):
    try:
        compress(ShardedIndex(Passages(len(embeddings)), *_with_local(embeddings)), compression)
    except ValueError as error:
        return str(error)


def _with_local(embeddings):
    rows = shard_rows(len(embeddings), distributed.rank(), distributed.world_size())
    mine = embeddings[rows.start : rows.stop]
    return mine, FlatIndex(mine, largest_norm=1.0)  # as one that was saved: nobody looks at the values


@pytest.mark.processes
@pytest.mark.parametrize("train_size", [None, 1])
def test_a_bad_embedding_ends_every_rank_with_its_number(train_size):
    """Whether it is in the sample, or seen only when it is encoded."""
    embeddings, _ = made_up(9, 4, 0)
    embeddings[7, 0] = float("inf")
    answers = run_on_ranks(2, _refuse_to_compress, embeddings, Compression("pq", 2, train_size=train_size))
    assert answers == ["the embedding of passage 7 is not finite: has the training diverged?"] * 2


@pytest.mark.processes
def test_what_cannot_be_made_ends_every_rank():
    answers = run_on_ranks(2, _refuse_to_compress, made_up(9, 4, 0)[0], Compression("pq", 3))
    assert answers == ["--faiss_code_size 3 does not divide the embedding size 4; try 2 or 4"] * 2
