"""BM25 against its formula, the fusion of two rankings, any number of ranks, and whole runs with both."""

import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas import config, preflight
from atlas.command_line import parse_config
from atlas.files import jsonl
from atlas.index import bm25
from atlas.index.bm25 import best_rows, fuse, open_word_index
from atlas.index.passages import open_passages
from atlas.index.sharded import Hits
from atlas.retrieval import Retrieval
from atlas.runtime import distributed
from atlas.runtime.device import import_bm25s
from tests.indices import make_index
from tests.kit import command_line, read_jsonl, run, world, write_jsonl
from tests.ranks import run_on_ranks
from tests.test_flat import made_up
from tests.test_judgements import SEARCH
from tests.test_retrieval import make

STOP = {"the", "of", "is", "and", "a", "what"}  # of English's, those that the texts here have
TEXTS = [
    "The bird of Bako is Selnu. The bird of Bako is Selnu.",
    "",
    "The trade of Bako, a TOWN; trade and trade, under_scored 42",
    "é É x y 7",
    "Überall naïve 北京大学 Bako",
    "the of is and",
    *(f"town{i % 7} bird{i % 3} {'river ' * (i % 5)}month" for i in range(60)),
]
QUERIES = ["What is the bird of Bako?", "trade trade TOWN", "nothing here", "", "the of", "river town3 month bird1 é"]


def words(text, stopwords):
    found = re.findall(r"\b\w\w+\b", text.lower())
    return [word for word in found if stopwords == "none" or word not in STOP]


def plain_bm25(texts, query, k1=0.9, b=0.4, stopwords="en"):
    """The score of every text, by the formula of Lucene's variant."""
    texts = [words(text, stopwords) for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for word in words(query, stopwords):
            having, times = sum(word in other for other in texts), text.count(word)
            idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            score += idf * times / (times + k1 * (1 - b + b * len(text) / mean)) if times else 0
        scores.append(score)
    return scores


def opened(directory, texts=TEXTS, **flags):
    """The index of words of these texts."""
    path = directory / "corpus.jsonl"
    if not path.exists():
        write_jsonl(path, [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)])
    return open_word_index(open_passages(path), config.Index(**flags), lambda passage: passage["text"], "{text}")


@pytest.mark.parametrize(
    "how", [{}, {"k1": 1.5, "b": 0.75}, {"k1": 0.0}, {"b": 0.0}, {"b": 1.0}, {"stopwords": "none"}], ids=str
)
@pytest.mark.parametrize("chunk", [4096, 5])
def test_every_score_is_that_of_the_formula(tmp_path, monkeypatch, how, chunk):
    monkeypatch.setattr(bm25, "CHUNK", chunk)
    index = opened(tmp_path, **{f"bm25_{name}": value for name, value in how.items()})
    hits = index.search(QUERIES, len(TEXTS) + 10)
    assert hits.ids.shape == (len(QUERIES), len(TEXTS))
    for query, scores, ids in zip(QUERIES, *hits, strict=True):
        plain = plain_bm25(TEXTS, query, **how)
        assert scores.tolist() == pytest.approx([plain[i] for i in ids.tolist()], rel=1e-6)
        assert sorted(ids.tolist()) == list(range(len(TEXTS)))
        order = sorted(range(len(TEXTS)), key=lambda i: (-round(plain[i], 5), i))
        assert ids.tolist() == order  # ties by row
    assert torch.equal(index.search(QUERIES, 3).ids, hits.ids[:, :3])


def test_texts_without_words_and_no_queries(tmp_path):
    index = opened(tmp_path, ["", "x", "the"])
    hits = index.search(["the x", "word"], 2)
    assert hits.ids.tolist() == [[0, 1]] * 2 and not hits.scores.any()
    assert index.search([], 2).ids.shape == (0, 2)


def test_words_with_marks_however_they_are_written(tmp_path):
    """Accents composed or not, and scripts whose vowels are marks on letters."""
    texts = ["Le cafe\u0301 de Ni\u0302mes", "Le caf\u00e9 de Paris", "हिन्दी भाषा", "தமிழ் மொழி", "हिन भाष"]
    hits = opened(tmp_path, texts).search(["caf\u00e9 N\u00eemes", "cafe\u0301 Paris", "हिन्दी भाषा", "மொழி", "cafe"], 5)
    assert hits.ids[:4, 0].tolist() == [0, 1, 2, 3]
    assert (hits.scores > 0).sum(1).tolist() == [2, 2, 1, 1, 0]


def test_words_without_marks_are_those_of_bm25s():
    texts = [*TEXTS, "It's a 2nd_try, x y2 — größe, naïve; 東京 １２", "a b  cd\n\u200bef"]
    theirs = pytest.importorskip("bm25s").tokenize(texts, stopwords=None, return_ids=False, show_progress=False)
    assert bm25._tokenize(texts, "none", return_ids=False) == theirs


def test_the_best_rows_are_those_of_a_sort():
    chance = np.random.default_rng(0)
    for n in range(1, 40):
        scores = chance.integers(0, 1 + n // 4, n).astype(np.float32) * chance.integers(0, 2, n)
        for k in {0, 1, n // 2, n}:
            best, rows = best_rows(scores, k)
            assert rows.tolist() == sorted(range(n), key=lambda i: (-scores[i], i))[:k]  # noqa: B023
            assert np.array_equal(best, scores[rows])


def plain_fusion(dense, by_words, weight, k):
    """Lists of ids, best first; of those by words only such that have one."""
    scores: Counter = Counter(dict.fromkeys(dense, 0.0))
    for ids, share in ((dense, 1 - weight), (by_words, weight)):
        for rank, i in enumerate(ids, 1):
            scores[i] += share / (60 + rank)
    return sorted(scores, key=lambda i: (-scores[i], i))[:k]


def test_fusion_is_that_of_the_formula():
    chance = random.Random(0)
    for weight in (0.1, 0.5, 0.5, 0.99):
        rankings, n_found, k = [], [], chance.randint(1, 12)
        for _ in range(9):
            rankings.append((chance.sample(range(30), 12), chance.sample(range(30), 12)))
            n_found.append(chance.randint(0, 12))
        dense, by_words = (torch.tensor(ids) for ids in zip(*rankings, strict=True))
        has_word = (torch.arange(12) < torch.tensor(n_found)[:, None]).float()
        found = fuse(Hits(torch.zeros(9, 12), dense), Hits(has_word, by_words), weight, k)
        wanted = [plain_fusion(d, w[:n], weight, k) for (d, w), n in zip(rankings, n_found, strict=True)]
        assert found.tolist() == wanted


def _search_on_ranks(directory, weight):
    """Rank 0 of several has no query. Embeddings are made up: those of an encoder round differently by batch."""
    found = make(directory, bm25_weight=weight)
    embeddings, queries = made_up(len(found.passages), found.retriever.dim, 6)
    found.index = make_index(found.passages, embeddings)
    others = max(1, distributed.world_size() - 1)
    mine = distributed.shard_rows(len(queries), distributed.rank() - (distributed.world_size() > 1), others)
    mine = mine if mine.start >= 0 else range(0)
    found.embed = lambda texts: queries[mine.start : mine.stop]
    texts = [passage["text"] for passage in found.passages[mine.start : mine.stop]]
    results = [found.search(texts, 7, exclude) for exclude in (None, [f"p{i}" for i in mine])]
    return [(result.ids, result.scores) for result in results], tuple(found.words.search(texts, 200))


@pytest.mark.processes
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_one_two_and_three_ranks_find_the_same(weight):
    (((all_found, excluding), hits),) = run_on_ranks(1, _search_on_ranks, world(), weight)
    assert not torch.equal(all_found[0], excluding[0])
    assert all(i not in row for i, row in enumerate(excluding[0].tolist()))
    for world_size in (2, 3):
        _, *parts = run_on_ranks(world_size, _search_on_ranks, world(), weight)
        for number, alone in enumerate((all_found, excluding)):
            for which in (0, 1):  # ids, scores
                assert torch.equal(torch.cat([results[number][which] for results, _ in parts]), alone[which])
        for which in (0, 1):
            assert torch.equal(torch.cat([of_rank[which] for _, of_rank in parts]), hits[which])


@torch.no_grad()
@pytest.mark.parametrize("rerank", [0, 20])
def test_a_small_corpus_is_found_once(tmp_path, rerank):
    """Also where more passages are asked for than there are."""
    passages = open_passages([write_jsonl(tmp_path / "corpus.jsonl", read_jsonl(world() / "passages.jsonl")[:9])])
    found = make(world(), passages=passages, bm25_weight=0.5, rerank=rerank)
    found.build()
    result = found.search(["The bird of Bako is", "trade"], 12, exclude=["p0", None])
    assert [sorted(row) for row in result.ids.tolist()] == [[*range(9)]] * 2


@torch.no_grad()
def test_fused_passages_have_their_scores_by_embeddings():
    questions = [row["question"] for row in read_jsonl(world() / "dev.jsonl")]
    found = make(world(), bm25_weight=0.5)
    found.build()
    result = found.search(questions, 5)
    vectors = found.embed(questions)
    dense, by_words = found.index.search(vectors, 300), found.words.search(questions, 100)
    all_scores = torch.zeros_like(dense.scores).scatter(1, dense.ids, dense.scores)
    assert torch.equal(result.scores, all_scores.gather(1, result.ids))
    for ids, of_dense, of_words, scores in zip(result.ids, dense.ids, *by_words[::-1], strict=True):
        n = int((scores > 0).sum())
        assert ids.tolist() == plain_fusion(of_dense[:100].tolist(), of_words[:n].tolist(), 0.5, 5)
    new = set(map(tuple, result.ids.tolist())) - set(map(tuple, dense.ids[:, :5].tolist()))
    assert new and found.search(questions, 5, step=1).ids.equal(result.ids)
    codes = make(world(), bm25_weight=0.5, index_mode="faiss", faiss_index_type="pq", faiss_code_size=1)
    codes.build()
    assert not codes.index.has_embeddings
    fresh = codes.search(questions, 5)
    assert torch.allclose(fresh.scores, all_scores.gather(1, fresh.ids), atol=2e-2)


@torch.no_grad()
def test_reranking_sorts_what_bm25_finds():
    questions = [row["question"] for row in read_jsonl(world() / "dev.jsonl")]
    found = make(world(), bm25_weight=1.0, rerank=20)
    result = found.search(questions, 5)  # without an index of embeddings
    candidates = found.words.search(questions, 20).ids
    for ids, of_words in zip(result.ids.tolist(), candidates.tolist(), strict=True):
        assert set(ids) <= set(of_words)
    assert result.scores.equal(result.scores.sort(dim=1, descending=True).values)


def entries(directory):
    return sorted(path.name for path in (directory / ".atlas-cache").iterdir())


def test_the_index_of_a_large_corpus_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CACHE_FROM", 0)
    hits = opened(tmp_path).search(QUERIES, 9)
    build, kept = bm25._build, [name for name in entries(tmp_path) if "bm25" in name]
    assert len(kept) == 1 and re.fullmatch(r"corpus\.jsonl\.\w{16}-\w{16}\.bm25\.0-66\.safetensors", kept[0])
    monkeypatch.setattr(bm25, "_build", None)  # calling it fails
    again = opened(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.search(QUERIES, 9), hits, strict=True))
    assert kept[0] in Path("/proc/self/maps").read_text()  # not read into memory
    for flags in ({"bm25_k1": 1.5}, {"bm25_b": 0.5}, {"bm25_stopwords": "none"}):
        with pytest.raises(TypeError):
            opened(tmp_path, **flags)
    monkeypatch.setattr(bm25, "_build", build)
    opened(tmp_path, bm25_k1=1.5)
    others = [name for name in entries(tmp_path) if "bm25" in name]
    assert len(others) == 1 and others != kept  # it replaces the one before
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "0", "title": "", "text": "Bako"}] * len(TEXTS))
    assert (opened(tmp_path, bm25_k1=1.5).search(["Bako"], 66).scores > 0).all()


def test_an_index_that_cannot_be_kept_is_used(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(jsonl, "CACHE_FROM", 0)
    monkeypatch.setattr(bm25, "cached", refuse)
    with caplog.at_level("INFO", "atlas"):
        assert opened(tmp_path).search(["Bako"], 1).scores > 0
    assert "The index of words is not kept for the next run: no space" in caplog.text


@pytest.mark.processes
def test_the_first_steps_of_a_training(tmp_path, monkeypatch):
    """Training searches with BM25 in the first steps, evaluations always; the retriever learns from its own scores."""
    seen = []
    search = Retrieval._search
    monkeypatch.setattr(Retrieval, "_search", lambda self, *args: seen.append(args[-1]) or search(self, *args))
    directory = run(
        tmp_path, train_retriever=True, bm25_weight=1, bm25_steps=2, total_steps=4, eval_freq=4, refresh_index="2"
    )
    assert seen[:4] == [1, 1, 0, 0] and set(seen[4:]) == {1}
    assert "Refreshing the index" in (directory / "run.log").read_text()


@pytest.mark.processes
def test_bm25_alone_embeds_nothing_and_reads_no_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(Retrieval, "build", None)
    flags = SEARCH | {"qa_prompt_format": config.Tasks.qa_prompt_format}
    directory = run(tmp_path, "evaluate", **flags, bm25_weight=1, bm25_steps=3, n_context=3)
    log = (directory / "run.log").read_text()
    assert "--bm25_weight 1: BM25 alone ranks the passages, nothing is embedded" in log
    assert log.count("--bm25_steps has no effect") == 1
    passages = read_jsonl(world() / "passages.jsonl")
    texts = [f"{p['title']}: {p['section']} {p['text']}" for p in passages]
    for row, question in zip(
        read_jsonl(directory / "dev-step-0.jsonl"), read_jsonl(world() / "dev.jsonl"), strict=True
    ):
        plain = plain_bm25(texts, question["question"])
        best = sorted(range(len(texts)), key=lambda i: (-round(plain[i], 5), i))[:3]
        assert [int(p["id"][1:]) for p in row["passages"]] == best
        assert [float(p["score"]) for p in row["passages"]] == pytest.approx([plain[i] for i in best], rel=1e-5)


def test_without_bm25s(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    needs = r"^--bm25_weight 0\.5 needs bm25s: pip install atlas-retrieval\[bm25\]$"
    with pytest.raises(ValueError, match=needs):
        preflight.check(parse_config(command_line(tmp_path, bm25_weight=0.5)), torch.device("cpu"))
    preflight.check(parse_config(command_line(tmp_path)), torch.device("cpu"))


def test_jax_is_kept_off_the_gpu(monkeypatch):
    """bm25s computes something with it when it is imported."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    import_bm25s()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
