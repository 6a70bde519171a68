"""The corpus as embeddings: the same whatever the batches, processes and ranks."""

import random

import pytest
import torch

from src import distributed, retrieval
from src.index.passages import open_passages
from src.index.sharded import shard_rows
from src.inputs import Inputs
from src.retrieval import Retrieval, batches_by_length
from src.retriever import load_retriever
from src.tokenization import load_retriever_tokenizer
from tests.kit import world
from tests.ranks import run_on_ranks


def make(directory, max_tokens=None):
    path = str(directory / "models/retriever")
    inputs = Inputs(None, load_retriever_tokenizer(path), device=torch.device("cpu"), text_maxlength=64)
    found = Retrieval(
        load_retriever(path, query_side=False, dropout=0.1),
        inputs,
        open_passages([directory / "passages.jsonl"]),
        device=torch.device("cpu"),
        embedder_precision="fp32",
        embedder_batch_size=16,
    )
    found.max_tokens = max_tokens or found.max_tokens
    return found


@pytest.fixture(scope="module")
def one_by_one():
    """The slow and obvious way: each passage alone, no padding."""
    plain = make(world())
    plain.retriever.eval()
    with torch.no_grad():
        return torch.cat([plain.retriever.embed_passages(*plain.inputs.passages([p])) for p in plain.passages]).half()


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_batches_change_nothing(one_by_one, max_tokens):
    fast = make(world(), max_tokens)
    fast.retriever.train()
    fast.build()
    assert fast.retriever.training  # as it was
    assert torch.allclose(fast.index.embeddings.float(), one_by_one.float(), atol=2e-3)


def test_worker_processes_change_nothing(monkeypatch, one_by_one):
    monkeypatch.setattr(retrieval, "WINDOW", 64)  # so that there are several windows
    monkeypatch.setattr(retrieval.devices, "tokenizer_processes", lambda local_world_size: 2)
    fast = make(world())
    fast.build()
    assert torch.allclose(fast.index.embeddings.float(), one_by_one.float(), atol=2e-3)


def _build_on_rank(directory, uneven):
    if uneven and distributed.rank() == 0:
        retrieval.WINDOW = 7  # many more windows than the others
    found = make(directory)
    found.build()
    retrieval.WINDOW = 4096
    queries = ["question: what is the bird of Bako? answer: <extra_id_0>"] * (2 * distributed.rank())
    hits = found.search(queries, 3)
    return found.index.embeddings, [[p["id"] for p in row] for row in hits.passages]


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
