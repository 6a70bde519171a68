"""Every gold-score mode against a slow version written straight from its formula, passage by passage."""

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config

from atlas.config import GOLD_SCORE_MODES
from atlas.model import signals
from atlas.model.inputs import Targets
from atlas.model.losses import distillation_loss, emdr_loss
from atlas.model.reader import FusionInDecoder, load_reader, token_log_probabilities
from atlas.model.signals import MODES, PROMPT_MODES, Reading, attention_statistics, correlations, pearson
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer
from tests.kit import logged, run, run_on, world
from tests.test_atlas import batch, inputs

SIZES = [(1, 1), (1, 6), (3, 1), (3, 6)]
PROMPTS = [None, "{query} is "]
DISTRIBUTIONS = [name for name in MODES if name != "emdr"]


@pytest.fixture(scope="module")
def reader():
    return load_reader(str(world() / "models/reader"), dropout=0.0)


@pytest.fixture(scope="module")
def tokenizers():
    models = world() / "models"
    return load_reader_tokenizer(str(models / "reader")), load_retriever_tokenizer(str(models / "retriever"))


class Case:
    """A batch whose passages and targets have different lengths, and its examples one by one without any padding."""

    def __init__(self, reader, tokenizers, b, k, prompt=None, ragged=False):
        self.reader, self.b, self.k = reader, b, k
        self.make = inputs(tokenizers, decoder_prompt_format=prompt)
        self.queries, targets, self.passages = batch(b, k, ragged)
        self.ids, self.mask, self.lengths = self.make.reader(self.queries, self.passages)
        self.targets = self.make.targets(self.queries, targets)
        prompts = self.make.prompts(self.queries) or [[]] * b
        self.prompt_lengths = [len(row) for row in prompts]
        self.target_ids = [tokenizers[0].encode([target])[0] for target in targets]
        self.decoder_ids = [torch.tensor([[0, *p, *t[:-1]]]) for p, t in zip(prompts, self.target_ids, strict=True)]
        assert b == 1 or not self.mask.all()

    def reading(self, temperature_gold=1.0):
        hidden = self.reader.encode(self.ids, self.mask, self.lengths).unflatten(1, self.ids.shape[1:])
        return Reading(self.reader, hidden, self.mask, self.targets, temperature_gold, self.lengths)

    def encoded(self, i, which):
        """Encodings (1, n, d) of some of the passages of example i, each encoded alone."""
        rows = [self.make.reader([self.queries[i]], [[self.passages[i][j]]])[:2] for j in which]
        return torch.cat([self.reader.encode(ids, mask) for ids, mask in rows], dim=1)

    def log_likelihoods(self, i, which, temperature=1.0):
        """Of the tokens of target i, read with some of its passages."""
        hidden = self.encoded(i, which)
        logits = self.reader.logits(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool), self.decoder_ids[i])[0]
        log_p = F.log_softmax(logits / temperature, -1)[self.prompt_lengths[i] :]
        return [log_p[t, token].item() for t, token in enumerate(self.target_ids[i])]


def mean(values):
    return sum(values) / len(values)


def slow_perplexity(case, i, j):
    return mean(case.log_likelihoods(i, [j]))


def slow_leave_one_out(case, i, j):
    others = [other for other in range(len(case.passages[i])) if other != j]
    return -mean(case.log_likelihoods(i, others)) if others else 0.0


def slow_cross_attention(reader, hidden, decoder_ids):
    """Eager attention from the decoder's weights: per layer probabilities (heads, T, S) and values (heads, S, d)."""
    config = reader.config

    def norm(layer, x):
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * layer.layer_norm.weight

    def heads(projection, x):  # (n, d_model) -> (heads, n, d_kv)
        return (x @ projection.weight.T).view(len(x), config.num_heads, config.d_kv).transpose(0, 1)

    states, ids, seen = hidden[0], decoder_ids[0], []
    x = reader.shared.weight[ids]  # (T, d_model)
    first = reader.decoder.block[0].layer[0].SelfAttention
    bias = first.compute_bias(len(ids), len(ids))[0] + torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for block in reader.decoder.block:
        own, cross, feed_forward = block.layer
        for layer, attention, source, added in (
            (own, own.SelfAttention, None, bias),
            (cross, cross.EncDecAttention, states, 0.0),
        ):
            normed = norm(layer, x)
            source = normed if source is None else source
            q = heads(attention.q, normed)
            k, v = heads(attention.k, source), heads(attention.v, source)
            probability = (q @ k.transpose(1, 2) + added).softmax(-1)
            x = x + (probability @ v).transpose(0, 1).flatten(1) @ attention.o.weight.T
        seen.append((probability, v))
        x = x + feed_forward.DenseReluDense(norm(feed_forward, x))
    return seen


def slow_attention(case, i, j):
    """Sum over layers, mean over heads, sum over the tokens of target and passage; all passages are read together."""
    of_passages = [case.encoded(i, [k]) for k in range(len(case.passages[i]))]
    start = sum(part.shape[1] for part in of_passages[:j])
    end = start + of_passages[j].shape[1]
    total, targets = 0.0, range(case.prompt_lengths[i], case.decoder_ids[i].shape[1])
    layers = slow_cross_attention(case.reader, torch.cat(of_passages, dim=1), case.decoder_ids[i])
    for probability, values in layers:
        for head in range(case.reader.config.num_heads):
            norms = [values[head, s].norm().item() for s in range(start, end)]
            for t in targets:
                row = probability[head, t, start:end].tolist()
                total += sum(p * n for p, n in zip(row, norms, strict=True)) / case.reader.config.num_heads
    return total / (256 * len(layers) * len(targets))


SLOW = {"ppmean": slow_perplexity, "pdist": slow_perplexity, "loop": slow_leave_one_out}
SLOW |= {"adist": slow_attention, "evalnormsum": slow_attention}


def test_every_mode_of_the_flag_is_there():
    assert tuple(dict.fromkeys([*MODES, *PROMPT_MODES])) == GOLD_SCORE_MODES


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("b", "k"), SIZES)
@pytest.mark.parametrize("mode", DISTRIBUTIONS)
def test_gold_scores_equal_the_formula(reader, tokenizers, mode, b, k, prompt):
    case = Case(reader, tokenizers, b, k, prompt, ragged=k > 1)
    gold = MODES[mode].signal(case.reading())
    assert gold.shape == (b, k) and gold.isfinite().all()
    for i in range(b):
        slow = [SLOW[mode](case, i, j) for j in range(len(case.passages[i]))]
        assert gold[i, : len(slow)].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-4 if mode != "adist" else 1e-7)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "limit"), [("loop", "LEFT_OUT_AT_ONCE"), ("pdist", "SCORED_AT_ONCE"), ("emdr", "SCORED_AT_ONCE")]
)
def test_some_passages_at_a_time(reader, tokenizers, monkeypatch, mode, limit):
    reading = Case(reader, tokenizers, 3, 7, ragged=True).reading()
    at_once, calls, logits = MODES[mode].signal(reading), [], reader.logits
    monkeypatch.setattr(signals, limit, 3)
    monkeypatch.setattr(reader, "logits", lambda *a, **k: calls.append(1) or logits(*a, **k))
    assert torch.allclose(MODES[mode].signal(reading), at_once, atol=1e-5) and len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("b", "k"), SIZES)
def test_emdr_equals_the_formula(reader, tokenizers, b, k, prompt):
    """Per token: the likelihood by each passage alone, weighted by the retriever."""
    case, temperature_gold, temperature_score = Case(reader, tokenizers, b, k, prompt, ragged=k > 1), 1.7, 0.6
    scores = torch.randn(b, k, generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    for i in range(b):
        n = len(case.passages[i])
        weights = [math.exp(s / temperature_score) for s in scores[i, :n].tolist()]
        of_passages = [case.log_likelihoods(i, [j], temperature_gold) for j in range(n)]
        for t in range(len(case.target_ids[i])):
            likelihood = sum(w * math.exp(row[t]) for w, row in zip(weights, of_passages, strict=True)) / sum(weights)
            total, count = total - math.log(likelihood), count + 1
    reading = case.reading(temperature_gold)
    log_likelihoods = MODES["emdr"].signal(reading)
    assert log_likelihoods.shape == (b, k, case.targets.labels.shape[1])
    loss = MODES["emdr"].loss(scores, log_likelihoods, reading, temperature_score)
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_emdr_loss_by_hand():
    """Two passages, q = (1/4, 3/4); the second token is padding."""
    scores = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    likelihoods = torch.tensor([[[0.5, 0.9], [0.1, 0.9]]], requires_grad=True)  # (B, K, T)
    labels = torch.tensor([[5, -100]])
    loss = emdr_loss(scores, likelihoods.log(), labels, temperature_score=1.0)
    assert loss.item() == pytest.approx(-math.log(0.25 * 0.5 + 0.75 * 0.1), abs=1e-6)
    loss.backward()
    posterior = 0.25 * 0.5 / 0.2  # of the first passage; the gradient is prior minus posterior
    assert scores.grad[0].tolist() == pytest.approx([0.25 - posterior, posterior - 0.25], abs=1e-6)
    assert likelihoods.grad is None
    more = torch.tensor([[0.0, math.log(3.0), 4.0]]), F.pad(likelihoods.log(), (0, 0, 0, 1)), labels
    masked = emdr_loss(*more, torch.tensor([[True, True, False]]), temperature_score=1.0)
    assert masked.item() == pytest.approx(loss.item(), abs=1e-6)
    assert emdr_loss(scores, likelihoods, torch.full((1, 2), -100), temperature_score=1.0).item() == 0


def test_distillation_leaves_out_what_is_masked():
    scores, gold = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    temperatures = {"temperature_score": 0.01, "temperature_gold": 0.01}
    short = distillation_loss(scores[:1, :2], gold[:1, :2], **temperatures)
    full = distillation_loss(scores[1:], gold[1:], **temperatures)
    loss = distillation_loss(scores, gold, mask, **temperatures)
    assert loss.item() == pytest.approx((2 * short + 3 * full).item() / 5, rel=1e-5)
    loss.backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 2] == 0
    nothing = distillation_loss(scores, gold, torch.zeros_like(mask), **temperatures)
    nothing.backward()
    assert nothing.item() == 0 and scores.grad.isfinite().all()


def widened(reading, length, tokens, passages):
    """The same batch with more padding of every kind, full of what must not matter."""
    hidden = F.pad(reading.hidden, (0, 0, 0, length, 0, passages), value=3.0)
    labels, decoder_ids = (
        F.pad(part, (0, tokens), value=value) for part, value in zip(reading.targets, (-100, 7), strict=True)
    )
    return reading._replace(
        hidden=hidden, mask=F.pad(reading.mask, (0, length, 0, passages)), targets=Targets(labels, decoder_ids)
    )


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(reader, tokenizers, mode):
    reading = Case(reader, tokenizers, 3, 5, PROMPTS[1], ragged=True).reading()
    wide = widened(reading, 7, 3, 2)
    signal, loss, *_ = MODES[mode]
    scores = torch.randn(3, 7)
    narrow, padded = signal(reading), signal(wide)
    assert padded.isfinite().all()
    there = reading.mask.any(-1)
    if mode == "emdr":
        padded = padded[:, :, :-3]
    assert torch.allclose(padded[:, :5][there], narrow[there], atol=1e-5)
    losses = [loss(s, signal(r), r, 0.5).item() for s, r in ((scores[:, :5], reading), (scores, wide))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_one_passage_teaches_nothing_but_hurts_nothing(reader, tokenizers, mode):
    """With K = 1 every distribution over passages is the same one, and so is the mixture: no gradient, no NaN."""
    with torch.no_grad():
        reading = Case(reader, tokenizers, 3, 1).reading(temperature_gold=0.01)
        gold = MODES[mode].signal(reading)
    scores = torch.randn(3, 1, requires_grad=True)
    loss = MODES[mode].loss(scores, gold, reading, 0.01)
    loss.backward()
    assert loss.isfinite() and not scores.grad.any()
    assert mode == "emdr" or loss.item() == 0


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_checkpointing(reader, tokenizers, mode):
    signal = MODES[mode].signal
    case = Case(reader, tokenizers, 3, 6, ragged=True)
    reading = case.reading()
    exact = signal(reading)
    there = reading.mask.any(-1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = signal(case.reading())
    assert rounded.dtype == torch.float32
    atol = 0 if mode in ("adist", "evalnormsum") else 0.03
    assert torch.allclose(rounded[there], exact[there], rtol=0.03, atol=atol)
    assert not torch.equal(rounded, exact)
    checkpointed = load_reader(str(world() / "models/reader"), dropout=0.0, gradient_checkpointing=True).train()
    assert torch.equal(signal(reading._replace(reader=checkpointed)), exact)


@torch.no_grad()
def test_observing_leaves_no_trace(reader, tokenizers):
    reading = Case(reader, tokenizers, 1, 3).reading()
    before = reader.logits(reading.hidden.flatten(1, 2), reading.mask.flatten(1), reading.targets.decoder_ids)
    with pytest.raises(ZeroDivisionError), reader.observing_cross_attention(lambda *projections: 1 / 0):
        reader.logits(reading.hidden.flatten(1, 2), reading.mask.flatten(1), reading.targets.decoder_ids)
    attention_statistics(reading)
    assert not any(module._forward_hooks for module in reader.decoder.modules())
    assert reader.config._attn_implementation == "sdpa"
    after = reader.logits(reading.hidden.flatten(1, 2), reading.mask.flatten(1), reading.targets.decoder_ids)
    assert torch.equal(before, after)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that was made, and of all that were alive at once, without the weights."""

    largest = most = alive = 0

    def __init__(self, reader):
        super().__init__()
        self._known = weakref.WeakSet(parameter.untyped_storage() for parameter in reader.parameters())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                n = storage.nbytes() // tensor.element_size()
                self._known.add(storage)
                self.alive += n
                self.largest, self.most = max(self.largest, n), max(self.most, self.alive)
                weakref.finalize(storage, self._free, n)
        return result

    def _free(self, n):
        self.alive -= n


def random_reading(layers, b=1, k=12, length=40, t=5):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1}
    reader = FusionInDecoder(T5Config(num_decoder_layers=layers, decoder_start_token_id=0, **sizes)).eval()
    labels = torch.randint(3, 50, (b, t))
    targets = Targets(labels, labels.roll(1, 1))
    return Reading(reader, torch.randn(b, k, length, 32), torch.ones(b, k, length, dtype=torch.bool), targets)


@torch.no_grad()
def test_attention_is_looked_at_layer_by_layer():
    """What is alive at the same time does not grow with the layers: nothing is kept of any."""
    most = []
    for layers in (2, 8):
        reading = random_reading(layers)
        with Sizes(reading.reader) as sizes:
            MODES["adist"].signal(reading)
        most.append(sizes.most)
    one_layer = 5 * 4 * 12 * 40  # T · heads · K·L probabilities
    assert most[0] > one_layer
    assert most[1] < most[0] + one_layer / 2


@torch.no_grad()
def test_leaving_out_repeats_no_encodings():
    """Neither the encodings nor their keys and values are there K times, nor even twice."""
    reading = random_reading(2)
    with Sizes(reading.reader) as sizes:
        MODES["loop"].signal(reading)
    assert sizes.largest < 2 * reading.hidden.numel()


# correlations


def test_pearson_equals_numpy():
    torch.manual_seed(0)
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    slow = [np.corrcoef(a[i][mask[i]], b[i][mask[i]])[0, 1] for i in range(4)]
    found = pearson(a, b, mask)
    assert found.examples.item() == 4
    assert found.mean.item() == pytest.approx(mean(slow), abs=1e-6)
    assert pearson(a, 3 * a + 1, mask).mean.item() == pytest.approx(1, abs=1e-6)
    assert pearson(a, -a, mask).mean.item() == pytest.approx(-1, abs=1e-6)


def test_pearson_leaves_out_where_nothing_varies():
    a = torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.7, 0.1], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    b = torch.tensor([[0.2, 0.3, 0.9], [0.7, 0.7, 0.7], [2.0, 1.0, 9.0], [1.0, 2.0, 4.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [True, True, False]])
    found = pearson(a, b, mask)
    assert (found.mean.item(), found.examples.item()) == (pytest.approx(1), 1)
    none = pearson(a[:1], b[:1], mask[:1])
    assert (none.mean.item(), none.examples.item()) == (0, 0)
    one = pearson(torch.randn(3, 1), torch.randn(3, 1), torch.ones(3, 1, dtype=torch.bool))
    assert (one.mean.item(), one.examples.item()) == (0, 0)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_correlations_equal_slow_statistics(reader, tokenizers, mode):
    case = Case(reader, tokenizers, 2, 4, PROMPTS[1], ragged=True)
    reading = case.reading()
    gold = MODES[mode].signal(reading)
    found = correlations(reading, gold)
    slow = {"attention": [], "value_norm": [], "adist": []}
    for i in range(2):
        rows = [(part, part.shape[1]) for part in (case.encoded(i, [j]) for j in range(len(case.passages[i])))]
        layers = slow_cross_attention(reader, torch.cat([part for part, _ in rows], dim=1), case.decoder_ids[i])
        statistics = {name: [] for name in slow}
        start = 0
        for _, n in rows:
            own = slice(start, start := start + n)
            probabilities = [p[:, case.prompt_lengths[i] :, own] for p, _ in layers]
            norms = [v[:, own].norm(dim=-1) for _, v in layers]
            statistics["attention"].append(sum(p.sum().item() for p in probabilities))
            statistics["value_norm"].append(mean([x.mean().item() for x in norms]))
            weighted = (p * x[:, None] for p, x in zip(probabilities, norms, strict=True))
            statistics["adist"].append(sum(x.sum().item() for x in weighted))
        wanted = gold[i, : len(rows)]
        if mode == "emdr":
            wanted = wanted.sum(-1) / len(case.target_ids[i])
        for name, values in statistics.items():
            slow[name].append(np.corrcoef(wanted.numpy(), values)[0, 1])
    for name, values in slow.items():
        assert found[name].examples == 2
        assert found[name].mean.item() == pytest.approx(mean(values), abs=1e-3), name


@pytest.mark.parametrize("mode", MODES)
def test_correlations_are_logged(tmp_path, mode):
    flags = {"train_retriever": True, "gold_score_mode": mode, "total_steps": 4, "log_freq": 2, "eval_data": None}
    with_them = run(tmp_path, name="with", compute_crossattention_stats=True, **flags)
    for name in ("attention", "value_norm", "adist"):
        values = logged(with_them, f"corr/{name}")
        assert len(values) == 2 and all(-1 <= value <= 1 for value in values)
        if mode in ("adist", "evalnormsum") and name == "adist":
            assert values == pytest.approx([1, 1], abs=1e-6)
    without = run(tmp_path, name="without", **flags)
    assert "corr/" not in (without / "metrics.jsonl").read_text()
    assert logged(with_them, "loss/retriever_loss") == logged(without, "loss/retriever_loss")
    assert all(math.isfinite(value) for value in logged(without, "loss/retriever_loss"))


def test_correlations_of_one_passage_are_left_out(tmp_path):
    flags = {"train_retriever": True, "compute_crossattention_stats": True, "total_steps": 2, "eval_data": None}
    one = run(tmp_path, name="one", retriever_n_context=1, n_context=1, **flags)
    assert logged(one, "loss/retriever_loss") == [0, 0] and "corr/" not in (one / "metrics.jsonl").read_text()
    assert "nan" not in (one / "run.log").read_text()
    untrained = run(tmp_path, name="untrained", **flags | {"train_retriever": False})
    assert "--compute_crossattention_stats has no effect" in (untrained / "run.log").read_text()


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["adist", "loop", "emdr"])
def test_two_ranks_equal_accumulation(tmp_path, mode):
    flags = {"train_retriever": True, "gold_score_mode": mode, "compute_crossattention_stats": True, "eval_data": None}
    two = run_on(2, tmp_path / "two", total_steps=3, **flags)
    one = run(tmp_path / "one", total_steps=6, accumulation_steps=2, log_freq=2, **flags)
    for name in ("loss/reader_loss", "loss/retriever_loss", "corr/attention"):
        assert logged(one, name) == pytest.approx(logged(two, name), abs=1e-4), name


def test_the_slow_log_likelihood_is_the_readers(reader, tokenizers):
    """The references above lean on `logits`: which token they look at is checked against the labels here."""
    case = Case(reader, tokenizers, 2, 1, PROMPTS[1])
    with torch.no_grad():
        logits = reader.logits(reader.encode(case.ids, case.mask), case.mask.flatten(1), case.targets.decoder_ids)
        log_likelihoods = token_log_probabilities(logits, case.targets.labels).sum(-1)
        slow = [sum(case.log_likelihoods(i, [0])) for i in range(2)]
    assert log_likelihoods.tolist() == pytest.approx(slow, rel=1e-4)
