"""Losses and gold scores against slow versions written straight from the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from src.atlas import Atlas, TrainingTensors, evaluating
from src.inputs import Inputs
from src.losses import distillation_loss, retriever_scores
from src.reader import load_reader
from src.retriever import load_retriever
from src.signals import SIGNALS
from src.tokenization import load_reader_tokenizer, load_retriever_tokenizer
from tests.kit import read_jsonl, world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    models = world() / "models"
    reader = load_reader(str(models / "reader"), dropout=0.0).eval()
    retriever = load_retriever(str(models / "retriever"), query_side=False, dropout=0.0).eval()
    tokenizers = load_reader_tokenizer(str(models / "reader")), load_retriever_tokenizer(str(models / "retriever"))
    return reader, retriever, tokenizers


def inputs(tokenizers, **settings):
    return Inputs(*tokenizers, device=CPU, text_maxlength=64, **settings)


def batch(b, k, ragged=False):
    passages = read_jsonl(world() / "passages.jsonl")
    examples = read_jsonl(world() / "train.jsonl")[:b]
    queries = [f"question: {e['question']} answer: <extra_id_0>" for e in examples]
    targets = [f"<extra_id_0> {e['target']}" for e in examples]
    found = [passages[7 * i : 7 * i + (k - 1 if ragged and i == 1 else k)] for i in range(b)]
    return queries, targets, found


def test_distillation_loss_by_hand():
    scores, gold = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, math.log(3.0)]])
    p, q = [0.25, 0.75], [1 / (1 + math.e), math.e / (1 + math.e)]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2  # the mean over all elements
    loss = distillation_loss(scores, gold, temperature_score=1.0, temperature_gold=1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    assert distillation_loss(scores, scores, temperature_score=0.5, temperature_gold=0.5) < 1e-6
    sharper = distillation_loss(scores / 10, gold / 10, temperature_score=0.1, temperature_gold=0.1)
    assert sharper.item() == pytest.approx(expected, abs=1e-7)


def test_distillation_has_no_gradient_into_the_gold_scores():
    scores, gold = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(scores, gold, temperature_score=1.0, temperature_gold=1.0).backward()
    assert scores.grad is not None and gold.grad is None


def test_retriever_scores():
    q, p = torch.randn(2, 16), torch.randn(2, 3, 16)
    slow = [[(q[b] @ p[b, k]).item() / 4 for k in range(3)] for b in range(2)]
    assert torch.allclose(retriever_scores(q, p), torch.tensor(slow), atol=1e-6)


@pytest.mark.parametrize("prompt", [None, "{query} is "])
@pytest.mark.parametrize(("b", "k"), [(1, 1), (1, 6), (3, 1), (3, 6)])
@pytest.mark.parametrize("mode", ["ppmean", "pdist"])
def test_perplexity_equals_the_formula(parts, b, k, prompt, mode):
    reader, _, tokenizers = parts
    make = inputs(tokenizers, decoder_prompt_format=prompt)
    queries, targets, passages = batch(b, k)
    ids, mask = make.reader(queries, passages)
    wanted = make.targets(queries, targets)
    with torch.no_grad():
        hidden = reader.encode(ids, mask).view(b, k, ids.shape[2], -1)
        fast = SIGNALS[mode](reader, hidden, mask, wanted)
        for i in range(b):
            prompt_ids = make.prompts(queries)[i] if prompt else []
            target_ids = tokenizers[0].encode([targets[i]])[0]
            for j in range(k):
                alone, alone_mask = make.reader(queries[i : i + 1], [[passages[i][j]]])  # no padding at all
                decoder_ids = torch.tensor([[0, *prompt_ids, *target_ids[:-1]]])
                logits = reader.logits(reader.encode(alone, alone_mask), alone_mask.flatten(1), decoder_ids)[0]
                log_p = F.log_softmax(logits, -1)[len(prompt_ids) :]
                slow = sum(log_p[t, token].item() for t, token in enumerate(target_ids)) / len(target_ids)
                assert fast[i, j].item() == pytest.approx(slow, abs=1e-4)


def test_loss_equals_the_formula_and_ignores_padding(parts):
    reader, _, tokenizers = parts
    make = inputs(tokenizers)
    queries, targets, passages = batch(3, 4, ragged=True)
    ids, mask = make.reader(queries, passages)
    assert mask.any(-1).sum(1).tolist() == [4, 3, 4]
    atlas = Atlas(reader, None, n_context=4)
    wanted = make.targets(queries, targets)
    loss = atlas(TrainingTensors(ids, mask, wanted)).reader
    total, count = 0.0, 0
    for i in range(3):
        own = make.reader(queries[i : i + 1], passages[i : i + 1])
        one = make.targets(queries[i : i + 1], targets[i : i + 1])
        n = one.lengths.item()
        total, count = total + n * atlas(TrainingTensors(*own, one)).reader.item(), count + n
    assert loss.item() == pytest.approx(total / count, abs=1e-5)
    wider = F.pad(ids, (0, 9)), F.pad(mask, (0, 9))
    assert atlas(TrainingTensors(*wider, wanted)).reader.item() == pytest.approx(loss.item(), abs=1e-5)
    with torch.no_grad():
        short = reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=12)
        long = reader.write(reader.encode(*wider), wider[1].flatten(1), max_length=12)
    assert short == long


def test_the_decoders_prompt_is_no_part_of_the_loss(parts):
    reader, _, tokenizers = parts
    make = inputs(tokenizers, decoder_prompt_format="{query} is ", target_maxlength=2)
    queries, targets, _ = batch(2, 1)
    wanted = make.targets(queries, targets)
    assert wanted.lengths.tolist() == [2, 2]  # the cut is of the target alone
    prompts = make.prompts(queries)
    for row, prompt in enumerate(prompts):
        assert (wanted.labels[row, : len(prompt)] == -100).all()
        assert wanted.decoder_ids[row, 1 : len(prompt) + 1].tolist() == prompt


def test_targets(parts):
    _, _, tokenizers = parts
    tokenizer = tokenizers[0]
    plain = inputs(tokenizers).targets(["q"], ["<extra_id_0> ba"])
    row = tokenizer.encode(["<extra_id_0> ba"])[0]
    assert plain.labels[0].tolist() == row and row[-1] == tokenizer.eos_id
    assert plain.decoder_ids[0].tolist() == [0, *row[:-1]]
    assert inputs(tokenizers).targets(["q"], ["<extra_id_0> ba</s>"]).labels.tolist() == plain.labels.tolist()
    cut = inputs(tokenizers, target_maxlength=2).targets(["q"], ["<extra_id_0> ba"])
    assert cut.labels[0].tolist() == row[:2]
    uncut = inputs(tokenizers, target_maxlength=-1).targets(["q"], ["<extra_id_0> ba"])
    assert uncut.labels.tolist() == plain.labels.tolist()
    formatted = inputs(tokenizers, decoder_format="ko {target}").targets(["q"], ["ba"])
    assert formatted.labels[0].tolist() == tokenizer.encode(["ko ba"])[0]


def test_gradients_reach_what_is_trained(parts):
    reader, _, tokenizers = parts
    make = inputs(tokenizers)
    queries, targets, passages = batch(2, 3)
    ids, mask = make.reader(queries, passages)
    for query_side in (False, True):
        retriever = load_retriever(str(world() / "models/retriever"), query_side=query_side, dropout=0.0)
        atlas = Atlas(reader, retriever, n_context=3, signal=SIGNALS["pdist"], temperature_gold=1, temperature_score=1)
        atlas.zero_grad()
        flat = [passage for of_query in passages for passage in of_query]
        passage_ids, passage_mask = make.passages(flat)
        tensors = TrainingTensors(
            ids, mask, make.targets(queries, targets), *make.queries(queries), passage_ids, passage_mask
        )
        losses = atlas(tensors)
        losses.retriever.backward()
        assert all(p.grad is None for p in reader.parameters())
        for name, parameter in retriever.named_parameters():
            trained = not name.startswith("passage_contriever")
            assert (parameter.grad is not None) == trained, name
        from_index = retriever.embed_passages(passage_ids, passage_mask).view(2, 3, -1).detach()
        with_embeddings = TrainingTensors(
            ids, mask, tensors.targets, tensors.query_ids, tensors.query_mask, passage_embeddings=from_index
        )
        assert atlas(with_embeddings).retriever.item() == pytest.approx(losses.retriever.item(), rel=1e-5)


def test_evaluating_restores_each_module():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    module[1].eval()
    with evaluating(module):
        assert not module[0].training
    assert module[0].training and not module[1].training
