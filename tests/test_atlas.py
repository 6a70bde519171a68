"""Losses and gold scores against slow versions written straight from the formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from atlas.config import Model
from atlas.model.atlas import Atlas, TrainingTensors
from atlas.model.inputs import Inputs
from atlas.model.losses import distillation_loss, emdr_loss, retriever_scores
from atlas.model.pretrained import evaluating
from atlas.model.reader import load_reader
from atlas.model.retriever import load_retriever
from atlas.model.signals import MODES, Mode, Reading
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer
from tests.kit import logged, read_jsonl, run, run_on, world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    models = world() / "models"
    reader = load_reader(str(models / "reader"), dropout=0.0).eval()
    retriever = load_retriever(str(models / "retriever"), query_side=False, dropout=0.0).eval()
    tokenizers = load_reader_tokenizer(str(models / "reader")), load_retriever_tokenizer(str(models / "retriever"))
    return reader, retriever, tokenizers


def inputs(tokenizers, **settings):
    return Inputs(Model(text_maxlength=64, **settings), *tokenizers, device=CPU)


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


def test_loss_equals_the_formula_and_ignores_padding(parts):
    reader, _, tokenizers = parts
    make = inputs(tokenizers)
    queries, targets, passages = batch(3, 4, ragged=True)
    ids, mask, lengths = make.reader(queries, passages)
    assert mask.any(-1).sum(1).tolist() == [4, 3, 4]
    atlas = Atlas(reader, None, n_context=4)
    wanted = make.targets(queries, targets)
    loss = atlas(TrainingTensors(ids, mask, lengths, wanted)).reader
    total, count = 0.0, 0
    for i in range(3):
        own = make.reader(queries[i : i + 1], passages[i : i + 1])
        one = make.targets(queries[i : i + 1], targets[i : i + 1])
        n = one.lengths.item()
        total, count = total + n * atlas(TrainingTensors(*own, one)).reader.item(), count + n
    assert loss.item() == pytest.approx(total / count, abs=1e-5)
    wider = F.pad(ids, (0, 9)), F.pad(mask, (0, 9))
    assert atlas(TrainingTensors(*wider, None, wanted)).reader.item() == pytest.approx(loss.item(), abs=1e-5)
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


def tensors_of(make, queries, targets, passages, embeddings=None):
    """All that a step needs; the passages' embeddings, or their tokens."""
    flat = [passage for of_query in passages for passage in of_query]
    anew = (None, None, None) if embeddings is not None else make.passages(flat)
    reader = make.reader(queries, passages)
    return TrainingTensors(*reader, make.targets(queries, targets), *make.queries(queries), *anew, embeddings)


@pytest.mark.parametrize("query_side", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_retrievers_loss_reaches_what_is_trained_and_nothing_else(parts, mode, query_side):
    reader, _, tokenizers = parts
    make = inputs(tokenizers)
    retriever = load_retriever(str(world() / "models/retriever"), query_side=query_side, dropout=0.0)
    atlas = Atlas(reader, retriever, n_context=3, mode=MODES[mode], temperature_gold=1, temperature_score=1)
    atlas.zero_grad()
    queries, targets, passages = batch(2, 3)
    losses = atlas(tensors_of(make, queries, targets, passages))
    losses.retriever.backward()
    assert all(parameter.grad is None for parameter in reader.parameters())
    for name, parameter in retriever.named_parameters():
        if name.startswith("passage_contriever"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    with torch.no_grad():
        embeddings = retriever.embed_passages(*make.passages(sum(passages, []))).view(2, 3, -1)
    from_index = atlas(tensors_of(make, queries, targets, passages, embeddings)).retriever
    assert from_index.item() == pytest.approx(losses.retriever.item(), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_tied_retriever_learns_from_both_sides(parts, mode):
    """Its gradient is that of the queries alone and that of the passages alone together."""
    reader, _, tokenizers = parts
    make, (queries, targets, passages) = inputs(tokenizers), batch(2, 3)
    retriever = load_retriever(str(world() / "models/retriever"), query_side=False, dropout=0.0)
    atlas = Atlas(reader, retriever, n_context=3, mode=MODES[mode], temperature_gold=1, temperature_score=1)
    tensors = tensors_of(make, queries, targets, passages)
    with torch.no_grad():
        hidden = reader.encode(tensors.reader_ids, tensors.reader_mask).unflatten(1, tensors.reader_ids.shape[1:])
        reading = Reading(reader, hidden, tensors.reader_mask, tensors.targets)
        gold = MODES[mode].signal(reading)

    def gradients(loss):
        retriever.zero_grad()
        loss.backward()
        return {name: parameter.grad for name, parameter in retriever.named_parameters()}

    def loss_of(queries_learn, passages_learn):
        q = retriever.embed_queries(tensors.query_ids, tensors.query_mask)
        p = retriever.embed_passages(tensors.passage_ids, tensors.passage_mask).view(2, 3, -1)
        scores = retriever_scores(q if queries_learn else q.detach(), p if passages_learn else p.detach())
        return MODES[mode].loss(scores, gold, reading, 1.0)

    both, of_queries = gradients(atlas(tensors).retriever), gradients(loss_of(True, False))
    of_passages = gradients(loss_of(False, True))
    for name, gradient in both.items():
        assert torch.allclose(gradient, of_queries[name] + of_passages[name], rtol=1e-3, atol=1e-6), name
        # what is added to every passage alike changes no distribution over them
        assert name.endswith("layer.0.output.LayerNorm.bias") or of_passages[name].any(), name


def test_without_its_tensors_the_retriever_gets_nothing(parts):
    reader, retriever, tokenizers = parts
    make, (queries, targets, passages) = inputs(tokenizers), batch(2, 3)
    atlas = Atlas(reader, retriever, n_context=3)
    atlas.zero_grad()
    losses = atlas(TrainingTensors(*make.reader(queries, passages), make.targets(queries, targets)))
    assert losses.retriever is None and losses.total is losses.reader
    losses.total.backward()
    assert all(parameter.grad is None for parameter in retriever.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in reader.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_passages_are_encoded_once_where_that_can_be(parts, mode, monkeypatch):
    """Those that the reader reads serve the gold scores too, unless dropout has spoilt them."""
    _, retriever, tokenizers = parts
    make, (queries, targets, passages) = inputs(tokenizers), batch(2, 5)
    tensors = tensors_of(make, queries, targets, passages)
    read_all = None
    for dropout, n_context, expected in ((0.0, 5, [5]), (0.0, 2, [2, 3]), (0.3, 5, [5, 5]), (0.3, 2, [2, 5])):
        reader = load_reader(str(world() / "models/reader"), dropout=dropout)
        encoded, encode = [], reader.encode
        monkeypatch.setattr(reader, "encode", lambda ids, *more: encoded.append(ids.shape[1]) or encode(ids, *more))  # noqa: B023
        atlas = Atlas(reader, retriever, n_context=n_context, mode=MODES[mode], temperature_gold=1, temperature_score=1)
        atlas.reader.train()
        loss = atlas(tensors).retriever.item()
        assert encoded == expected
        assert reader.training
        read_all = loss if read_all is None else read_all
        # the difference of numbers near 1, which fp32 rounds by 1e-7; for attention, which hardly differs, it is 1e-5
        assert loss == pytest.approx(read_all, rel=1e-4, abs=1.2e-7)


@pytest.mark.parametrize("mode", MODES)
def test_an_example_without_target_tokens_counts_nowhere(parts, mode):
    reader, retriever, tokenizers = parts
    make, (queries, targets, passages) = inputs(tokenizers), batch(3, 4)
    atlas = Atlas(reader, retriever, n_context=4, mode=MODES[mode], temperature_gold=1, temperature_score=1)
    both = tensors_of(make, queries, targets, passages)
    both.targets.labels[1] = -100
    rest = tensors_of(make, queries[::2], targets[::2], passages[::2])
    for with_nothing, without in zip(atlas(both)[:2], atlas(rest)[:2], strict=True):
        assert with_nothing.item() == pytest.approx(without.item(), rel=1e-4)
    both.targets.labels[:] = -100
    atlas.zero_grad()
    nothing = atlas(both)
    assert nothing.reader.item() == 0 and nothing.retriever.item() == 0
    nothing.total.backward()
    assert all(not parameter.grad.any() for parameter in retriever.parameters())


def test_evaluating_restores_each_module():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    module[1].eval()
    with evaluating(module):
        assert not module[0].training
    assert module[0].training and not module[1].training


# ---- in-batch negatives


@pytest.mark.parametrize("mode", ["ppmean", "emdr"])
def test_the_passages_of_other_queries_take_a_part_of_the_retrievers_distribution(mode):
    scores, others = torch.tensor([[0.3, 0.1], [0.2, 0.4]]), torch.tensor([[0.5, -torch.inf], [0.0, 0.7]])
    gold = torch.tensor([[-1.0, -2.0], [-2.0, -1.5]])
    q = torch.tensor(
        [
            [math.exp(score / 0.1) / sum(math.exp(s / 0.1) for s in [*own, *more]) for score in own]
            for own, more in zip(scores.tolist(), others.tolist(), strict=True)
        ]
    )
    if mode == "ppmean":
        p = (gold / 0.5).softmax(-1)
        loss = distillation_loss(scores, gold, None, others, temperature_score=0.1, temperature_gold=0.5)
        expected = (p * (p / q).log()).sum() / 4
    else:
        likelihoods, labels = gold[..., None].expand(2, 2, 3), torch.tensor([[4, 5, -100], [6, -100, -100]])
        loss = emdr_loss(scores, likelihoods, labels, None, others, temperature_score=0.1)
        mixture = (gold.exp() * q).sum(-1).log()
        expected = -(2 * mixture[0] + mixture[1]) / 3
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_query_is_not_taught_that_its_own_passages_are_useless():
    retriever, embeddings = SimpleNamespace(embed_queries=lambda ids, mask: ids), torch.randn(2, 2, 4)
    queries, found = torch.randn(2, 4), torch.tensor([[7, 3], [3, 9]])
    batch = TrainingTensors(*[None] * 4, queries, passage_embeddings=embeddings, found=found, own=found)
    mode = Mode(lambda reading: None, lambda *scores: None)
    (alone,) = Atlas(None, retriever, n_context=1, mode=mode)._retriever_scores(batch)
    mode = mode._replace(gather=lambda rows: rows)
    scores, others = Atlas(None, retriever, n_context=1, mode=mode)._retriever_scores(batch)
    assert torch.equal(scores, alone) and torch.isinf(others).tolist() == [
        [True, True, True, False],
        [False, True, True, True],
    ]
    assert others[0, 3].item() == pytest.approx((queries[0] @ embeddings[1, 1]).item() / 2, abs=1e-6)
    assert others[1, 0].item() == pytest.approx((queries[1] @ embeddings[0, 0]).item() / 2, abs=1e-6)


@pytest.mark.processes
def test_negatives_are_those_of_all_ranks(tmp_path):
    """Two ranks with half a batch each move both encoders as one rank does. The reader's loss would differ."""
    flags = {"train_retriever": True, "freeze_reader": True, "eval_data": None, "clip": 0, "total_steps": 3}
    one = run(tmp_path, name="one", **flags, in_batch_negatives=True, per_gpu_batch_size=4)
    two = run_on(2, tmp_path, name="two", **flags, in_batch_negatives=True, per_gpu_batch_size=2)
    without = run(tmp_path, name="without", **flags, per_gpu_batch_size=4)
    losses = [logged(directory, "loss/retriever_loss") for directory in (one, two, without)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and losses[0][0] > losses[2][0] + 0.01
    kept = [load_file(directory / "checkpoint/latest/model.safetensors") for directory in (one, two)]
    assert_close(*kept, atol=1e-5, rtol=0)
