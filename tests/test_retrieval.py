"""The corpus as embeddings: the same whatever the batches, processes and ranks."""

import random

import pytest
import torch

from atlas import config, embedding, retrieval
from atlas.embedding import batches_by_length, passage_embedder
from atlas.index.flat import FlatIndex
from atlas.index.passages import open_passages
from atlas.index.sharded import look_up, shard_rows
from atlas.model.inputs import Inputs
from atlas.model.load import Model
from atlas.model.retriever import load_retriever, use_uncentered_layer_norm
from atlas.model.tokenization import load_retriever_tokenizer
from atlas.retrieval import Retrieval
from atlas.runtime import distributed
from tests.kit import read_jsonl, world, write_jsonl
from tests.ranks import run_on_ranks


def make(directory, max_tokens=None, *, passages=None, rerank=0, overretrieve=2, **index):
    """A retrieval over the passages of a directory; `index` are flags of the section Index."""
    path = str(directory / "models/retriever")
    retriever = load_retriever(path, query_side=False, dropout=0.1)
    inputs = Inputs(config.Model(text_maxlength=64), None, load_retriever_tokenizer(path), device=torch.device("cpu"))
    training = config.RetrieverTraining(
        retrieve_with_rerank=rerank > 0,
        n_to_rerank_with_retrieve_with_rerank=rerank,
        filtering_overretrieve_ratio=overretrieve,
    )
    found = Retrieval(
        Model(None, retriever, inputs),
        passages or open_passages([directory / "passages.jsonl"]),
        config.Index(**index),
        config.Run(embedder_precision="fp32", per_gpu_embedder_batch_size=16),
        training,
        torch.device("cpu"),
    )
    found.embedder.max_tokens = max_tokens or found.embedder.max_tokens
    return found


@pytest.fixture(scope="module")
def one_by_one():
    """The slow and obvious way: each passage alone, no padding."""
    plain = make(world())
    plain.retriever.eval()
    with torch.no_grad():
        return torch.cat([plain.retriever.embed_passages(*plain.inputs.passages([p])) for p in plain.passages]).half()


@pytest.mark.parametrize("windows_at_fault", [[0], [2, 3], [9]])
def test_a_window_that_cannot_be_stored_ends_the_build(monkeypatch, windows_at_fault):
    """Windows are stored by another thread: its first error arrives, and little is embedded after it."""
    monkeypatch.setattr(embedding, "WINDOW", 30)
    monkeypatch.setattr("atlas.runtime.device.tokenizer_processes", lambda ranks: 0)
    broken, asked = make(world()), []  # 300 passages, 10 windows
    embed_window = broken.embedder._embed_window

    def at_fault(window, embed, embedded):
        asked.append(len(asked))
        return embed_window(window, embed, embedded).fill_(float("nan") if asked[-1] in windows_at_fault else 1.0)

    monkeypatch.setattr(broken.embedder, "_embed_window", at_fault)
    first = 30 * windows_at_fault[0]
    with pytest.raises(ValueError, match=f"the embedding of passage {first} is not finite"):
        broken.build()
    assert broken.index is None and len(asked) <= windows_at_fault[0] + embedding.MOST_WAITING + 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 29, 30, 300])
def test_windows_end_where_those_of_the_whole_corpus_do(monkeypatch, n, world_size):
    """So the blocks that a quantizer encodes are whole ones, whatever a rank's share."""
    monkeypatch.setattr(embedding, "WINDOW", 30)
    found = []
    for rank in range(world_size):
        rows = distributed.shard_rows(n, rank, world_size)
        windows = embedding.Windows([], rows, None, 100)
        spans = [range(rows.start + start, rows.start + end) for start, end in windows.spans]
        assert all(span.stop % 30 == 0 or span.stop == rows.stop for span in spans)
        assert windows.passages_left == len(rows) and all(1 <= len(span) <= 30 for span in spans)
        found += [row for span in spans for row in span]
    assert found == list(range(n))


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_batches_change_nothing(one_by_one, max_tokens):
    fast = make(world(), max_tokens)
    fast.retriever.train()
    fast.build()
    assert fast.retriever.training  # as it was
    assert torch.allclose(fast.index.embeddings.float(), one_by_one.float(), atol=2e-3)


def test_a_cpu_that_is_faster_in_bf16_says_so_where_it_matters(monkeypatch, caplog):
    caplog.set_level("INFO", "atlas")
    hint = "--embedder_precision bf16 would take little more than half of the time on this CPU"
    for fast, many, said in ((True, 300, True), (True, 301, False), (False, 300, False)):
        monkeypatch.setattr("atlas.runtime.device.cpu_prefers_bf16", lambda device, fast=fast: fast)
        monkeypatch.setattr(embedding, "MINUTES", many)
        caplog.clear()
        make(world()).build()
        assert "Embedding 300 passages" in caplog.text and (hint in caplog.text) == said


def test_passages_that_are_cut_are_counted(caplog):
    caplog.set_level("INFO", "atlas")
    for most, said in ((64, False), (16, True)):
        found = make(world())
        found.inputs.retriever_maxlength = most
        found.build()
        assert (f"% of them fill the {most} tokens of --text_maxlength: what is behind is cut" in caplog.text) == said


@pytest.mark.parametrize("uncentered", [False, True])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-6), ("fp16", 3e-3), ("bf16", 2e-2)])
def test_embedders_of_every_precision(uncentered, precision, error):
    found = make(world())
    encoder = found.retriever.passage_encoder.eval()
    if uncentered:
        use_uncentered_layer_norm(encoder)
    batch = found.inputs.passages(found.passages[:20])[:2]
    with torch.no_grad():
        exact, embedded = encoder(*batch), passage_embedder(encoder, torch.device("cpu"), precision)(*batch)
    assert embedded.dtype == torch.float32
    assert (embedded - exact).norm() < error * exact.norm()
    assert torch.equal(embedded, exact) == (precision == "fp32")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in encoder.parameters())


@pytest.mark.processes
def test_worker_processes_change_nothing(monkeypatch, one_by_one):
    monkeypatch.setattr(embedding, "WINDOW", 64)  # so that there are several windows
    monkeypatch.setattr(embedding.devices, "tokenizer_processes", lambda cores: 2)
    fast = make(world())
    fast.build()
    assert torch.allclose(fast.index.embeddings.float(), one_by_one.float(), atol=2e-3)


def _build_on_rank(directory, uneven):
    if uneven and distributed.rank() == 0:
        embedding.WINDOW = 7  # many more windows than the others
    found = make(directory)
    found.build()
    embedding.WINDOW = 4096
    queries = ["question: what is the bird of Bako? answer: <extra_id_0>"] * (2 * distributed.rank())
    hits = found.search(queries, 3)
    return found.index.embeddings, [[p["id"] for p in row] for row in hits.passages]


@pytest.mark.processes
@pytest.mark.parametrize("uneven", [False, True])
def test_ranks_embed_their_share(one_by_one, uneven):
    parts = run_on_ranks(3, _build_on_rank, world(), uneven)
    whole = torch.cat([embeddings for embeddings, _ in parts])
    assert [len(e) for e, _ in parts] == [len(shard_rows(len(whole), r, 3)) for r in range(3)]
    assert torch.allclose(whole.float(), one_by_one.float(), atol=2e-3)
    assert [len(found) for _, found in parts] == [0, 2, 4]
    assert all(row == parts[1][1][0] for _, found in parts for row in found)


def test_batches_by_length():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(0, 60))]
        budget = rng.choice([1, 30, 100, 10**6])
        batches = list(batches_by_length(lengths, budget))
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_reranking_makes_up_for_coarse_codes(one_by_one):
    """With every passage among those to rerank, one byte a passage finds what the exact search finds."""
    pq = {"index_mode": "faiss", "faiss_index_type": "pq", "faiss_code_size": 1}
    found = make(world(), **pq)
    found.build()
    assert not found.index.has_embeddings
    exact = FlatIndex(one_by_one)
    vectors = found.retriever.eval().embed_queries(*found.inputs.queries(QUERIES)).detach()
    wanted = [
        [p["id"] for p in row] for row in look_up(found.index.passages, exact.search(vectors, 5)[1])
    ]  # distinct scores, so there is one order
    assert [[p["id"] for p in row] for row in found.search(QUERIES, 5).passages] != wanted
    reranking = make(world(), rerank=len(found.passages), **pq)
    reranking.build()
    again = reranking.search(QUERIES, 5)
    assert [[p["id"] for p in row] for row in again.passages] == wanted
    assert torch.allclose(again.scores, exact.search(vectors, 5)[0], atol=2e-2)


def excluding(tmp_path, rerank=0, overretrieve=2, passages=None):
    """A retrieval that may exclude passages, over all of the world's or the given ones."""
    if passages is not None:
        passages = open_passages([write_jsonl(tmp_path / "corpus.jsonl", passages)])
    found = make(world(), passages=passages, rerank=rerank, overretrieve=overretrieve)
    found.build()
    return found


def plain_search(found, query, k, own, ratio):
    """One query at a time, lists only: ids of the passages, own ones last and only where there are too few others."""
    hits = found.index.search(found.retriever.embed_queries(*found.inputs.queries([query])), ratio * k)
    ids = [passage["id"] for passage in look_up(found.index.passages, hits.ids)[0]]
    return ([i for i in ids if i != own] + [i for i in ids if i == own])[:k]


QUERIES = ["The bird of Bako is", "trade", "month of", "The river of Kori is Nusel."]


@pytest.mark.parametrize("rerank", [0, 20])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@torch.no_grad()
def test_excluded_passages_are_not_found(tmp_path, ratio, rerank):
    """With an unchanged encoder reranking finds the same, whatever was cut off before it."""
    found = excluding(tmp_path, rerank, ratio)
    found.retriever.eval()
    best = [plain_search(found, query, 5, None, 1) for query in QUERIES]
    own = [best[0][0], best[1][4], "nowhere", None]
    result = found.search(QUERIES, 5, exclude=own)
    for query, ids, exclude, passages in zip(QUERIES, result.ids, own, result.passages, strict=True):
        names = [passage["id"] for passage in passages]
        assert names == [found.passages[int(row)]["id"] for row in ids]
        if ratio > 1 or rerank:
            assert exclude not in names
            wanted = plain_search(found, query, 5, exclude, 4)
        else:
            wanted = plain_search(found, query, 5, exclude, 1)
        assert names == wanted if not rerank else sorted(names) == sorted(wanted)
    scores = found.index.embeddings_of(result.ids) @ found.retriever.embed_queries(
        *found.inputs.queries(QUERIES)
    ).unsqueeze(-1)
    assert torch.allclose(result.scores, scores.squeeze(-1), atol=1e-2)  # they go with their passages


@pytest.mark.parametrize("rerank", [0, 2, 9])
def test_what_is_excluded_comes_last_where_there_is_too_little_else(tmp_path, rerank, monkeypatch):
    warnings = []
    monkeypatch.setattr(retrieval.log, "warning", lambda *words: warnings.append(words))
    passages = [p | {"id": i} for i, p in enumerate(read_jsonl(world() / "passages.jsonl")[:6])]
    passages[4]["id"] = 3  # both of this id are left out
    found = excluding(tmp_path, rerank, 3, passages)
    five = found.search(QUERIES[:2], 5, exclude=[3, "0"])
    assert [[p["id"] for p in row][4:] for row in five.passages] == [["3"], [five.passages[1][4]["id"]]]
    assert "0" not in [p["id"] for p in five.passages[1]]
    assert len(warnings) == 1
    four = found.search(QUERIES[:2], 4, exclude=["3", 0])
    assert all(p["id"] != "3" for p in four.passages[0]) and all(p["id"] != "0" for p in four.passages[1])
    six = found.search(QUERIES[:2], 6, exclude=["3", 0])
    assert [p["id"] for p in six.passages[0]][4:] == ["3", "3"] and six.passages[1][5]["id"] == "0"
    assert len(warnings) == 1  # once a run


def test_what_was_to_be_left_out_stays_last_in_another_order():
    passages = [[{"id": i} for i in range(4)], [{"id": i} for i in range(4, 8)]]
    own = torch.tensor([[False, False, True, True], [False, False, False, True]])
    found = retrieval.Found(passages, torch.arange(8).view(2, 4), torch.zeros(2, 4), own)
    judged = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 1.0]])
    assert found.sorted_by(judged, 4).ids.tolist() == [[1, 0, 2, 3], [5, 6, 4, 7]]
    assert [[p["id"] for p in row] for row in found.sorted_by(judged, 2).passages] == [[1, 0], [5, 6]]


def test_a_query_knows_its_own_passages_among_those_of_others():
    passages = [[{"id": "a"}, {"id": "b"}], [{"id": "c"}, {"id": 7}], [{"id": "a"}, {"id": "d"}]]
    found = retrieval.Found(passages, torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))

    def known(exclude):
        names, own = found.names(exclude)
        return (own[..., None] == names.flatten()).any(1).int().tolist()

    assert known(["c", None, "7"]) == [[1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]]
    assert known(None) == [[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]]


def test_nothing_is_said_of_a_corpus_that_is_merely_small(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval.log, "warning", None)  # calling it fails
    found = excluding(tmp_path, passages=read_jsonl(world() / "passages.jsonl")[:3])
    assert len(found.search(QUERIES[:1], 5, exclude=["elsewhere"]).passages[0]) == 3


def _exclude_on_rank(directory, rerank):
    found = make(directory, rerank=rerank)
    found.build()
    n = [0, 1, 3][distributed.rank()]
    own = [found.passages[i]["id"] for i in range(n)]
    result = found.search([found.passages[i]["text"] for i in range(n)], 4, exclude=own)
    return [[p["id"] for p in row] for row in result.passages]


@pytest.mark.processes
@pytest.mark.parametrize("rerank", [0, 10])
def test_ranks_exclude_alike(rerank):
    """Also when one of them has no query."""
    none, one, three = run_on_ranks(3, _exclude_on_rank, world(), rerank)
    (alone,) = run_on_ranks(1, _exclude_alone, world(), rerank)
    assert none == [] and one == alone[:1] and three == alone
    assert all(f"p{i}" not in row and len(row) == 4 for i, row in enumerate(three))


def _exclude_alone(directory, rerank):
    found = make(directory, rerank=rerank)
    found.build()
    texts = [found.passages[i]["text"] for i in range(3)]
    return [[p["id"] for p in row] for row in found.search(texts, 4, exclude=["p0", "p1", "p2"]).passages]
