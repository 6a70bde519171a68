"""How useful was each passage to the reader? One mode per value of --gold_score_mode: a signal and its loss.

A signal looks at a reading of the passages and tells how useful each was, without gradient. For most modes that is a
gold score (B, K), higher for a more useful passage, which the retriever learns by distillation. EMDR² has no such
distribution over passages: its signal is how likely each passage makes each token, and its loss marginalises over them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from atlas.model.inputs import Targets
from atlas.model.losses import distillation_loss, emdr_loss
from atlas.model.reader import FusionInDecoder, token_log_probabilities

# How many passages `leave_one_out` leaves out in one call of the decoder, one by one: more take more memory and fewer
# projections of keys and values. Whatever the target's length: where weights are sharded, ranks must make equal calls.
LEFT_OUT_AT_ONCE = 10
PUBLISHED_SCALE = 256  # by which the published attention scores are divided; temperatures are tuned to that


class Reading(NamedTuple):
    """A batch as a signal sees it, with the reader in evaluation mode."""

    reader: FusionInDecoder
    hidden: torch.Tensor  # (B, K, L, d): encodings of each passage
    mask: torch.Tensor  # (B, K, L) bool; a row without any token holds no passage
    targets: Targets
    temperature_gold: float = 1.0

    @property
    def counts(self) -> torch.Tensor:
        """(B, K): where there is a passage, and a target to judge it by."""
        return self.mask.any(-1) & (self.targets.lengths > 0)[:, None]


Signal = Callable[[Reading], torch.Tensor]


def token_log_likelihoods(reading: Reading, temperature: float) -> torch.Tensor:
    """Log P(token | query, passage k alone) with the vocabulary's scores divided by `temperature`.

    Returns:
        (B, K, T), 0 where the label is -100.
    """
    hidden, mask, targets = reading.hidden, reading.mask, reading.targets
    k = hidden.shape[1]
    labels = targets.labels.repeat_interleave(k, dim=0)  # (B·K, T)
    decoder_ids = targets.decoder_ids.repeat_interleave(k, dim=0)
    logits = reading.reader.logits(hidden.flatten(0, 1), mask.flatten(0, 1), decoder_ids)  # (B·K, T, V)
    return token_log_probabilities(logits.float().div_(temperature), labels).unflatten(0, (-1, k))


def perplexity(reading: Reading) -> torch.Tensor:
    """Perplexity distillation (Izacard et al. 2022, section 2.2): how likely each passage alone makes the target.

    Returns:
        (B, K): mean over the target's tokens of log P(token | query, passage k).
    """
    return _mean_over_tokens(token_log_likelihoods(reading, temperature=1.0), reading.targets)


def attention(reading: Reading) -> torch.Tensor:
    """Attention distillation (Izacard & Grave 2021; Izacard et al. 2022): what the decoder takes from each passage.

    Returns:
        (B, K): attention probability times norm of the value vector, over all passages read together, summed over the
        passage's tokens, averaged over heads, layers and the target's tokens, over 256.
    """
    return attention_statistics(reading)["adist"]


def leave_one_out(reading: Reading) -> torch.Tensor:
    """Leave-one-out distillation (Izacard et al. 2022, section 2.2): how unlikely the target is without passage k.

    All targets of an example stand one behind the other in one decoder row, each blind to the others and to its own
    passage: as positions in T5 are relative that equals K rows, but keys and values are projected once, not K times.

    Returns:
        (B, K): minus the mean over the target's tokens of log P(token | query, all passages but k). 0 for the only
        passage of a query, without which there is nothing to read; a distribution over one passage is always (1).
    """
    mask, targets = reading.mask, reading.targets
    k, t = mask.shape[1], targets.labels.shape[1]
    hidden = reading.hidden.flatten(1, 2)  # (B, K·L, d)
    others = ~torch.eye(k, dtype=torch.bool, device=mask.device)
    seen = (mask[:, None] & others[:, :, None]).flatten(2)  # (B, K, K·L): row k sees all passages but k
    scores = []
    for of_some in seen.split(LEFT_OUT_AT_ONCE, dim=1):  # (B, n, K·L)
        n = of_some.shape[1]
        position = torch.arange(n * t, device=mask.device)
        before = (position[:, None] >= position) & (position[:, None] // t == position // t)  # (n·T, n·T)
        logits = reading.reader.logits(
            hidden, of_some.repeat_interleave(t, dim=1), targets.decoder_ids.repeat(1, n), decoder_mask=before[None]
        )  # (B, n·T, V)
        log_likelihoods = token_log_probabilities(logits, targets.labels.repeat(1, n)).unflatten(1, (n, t))
        scores.append(-_mean_over_tokens(log_likelihoods, targets))
    alone = mask.any(-1).sum(-1, keepdim=True) <= 1  # (B, 1)
    return torch.cat(scores, dim=1).masked_fill(alone, 0.0)


def attention_statistics(reading: Reading) -> dict[str, torch.Tensor]:
    """Cross-attention of the decoder to each passage while it reads all of them for the target.

    Returns:
        Each (B, K), over the target's tokens and the passage's tokens, both without padding:
        `attention`: probability, summed over the passage, averaged over heads, layers and the target;
        `value_norm`: L2 norm of the value vectors, averaged over the passage, heads and layers;
        `adist`: probability times norm, summed and averaged as `attention`, over 256.
    """
    targets, mask = reading.targets, reading.mask.flatten(1)  # (B, K·L)
    wanted = (targets.labels != -100).float()  # (B, T)
    sums = torch.zeros(3, *mask.shape, device=mask.device)

    def watch(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:  # (B, heads, T or K·L, d_kv)
        with torch.autocast(mask.device.type, enabled=False):
            scores = queries.float() @ keys.float().transpose(2, 3)  # (B, heads, T, K·L); T5 does not scale them
            scores = scores.masked_fill_(~mask[:, None, None], torch.finfo(scores.dtype).min)
            probability = torch.einsum("bhts,bt->bhs", scores.softmax(-1), wanted)
            norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)  # (B, heads, K·L)
            sums.add_(torch.stack([probability, norm, probability * norm]).mean(2))  # over the heads

    with reading.reader.observing_cross_attention(watch):
        reading.reader.logits(reading.hidden.flatten(1, 2), mask, targets.decoder_ids)
    layers = reading.reader.config.num_decoder_layers
    sums = sums.masked_fill(~mask, 0.0).unflatten(2, reading.mask.shape[1:]).sum(-1) / layers  # (3, B, K)
    tokens = targets.lengths.clamp(min=1)[:, None]
    passage_tokens = reading.mask.sum(-1).clamp(min=1)
    return {
        "attention": sums[0] / tokens,
        "value_norm": sums[1] / passage_tokens,
        "adist": sums[2] / tokens / PUBLISHED_SCALE,
    }


class Mode(NamedTuple):
    """What the reader says of the passages, and the loss by which the retriever learns it.

    `loss` takes the retriever's scores (B, K), what the signal gave, the reading and `temperature_score`.
    """

    signal: Signal
    loss: Callable[[torch.Tensor, torch.Tensor, Reading, float], torch.Tensor]


def _distil(scores: torch.Tensor, gold: torch.Tensor, reading: Reading, temperature_score: float) -> torch.Tensor:
    temperatures = {"temperature_score": temperature_score, "temperature_gold": reading.temperature_gold}
    return distillation_loss(scores, gold, reading.counts, **temperatures)


def _tempered_log_likelihoods(reading: Reading) -> torch.Tensor:
    return token_log_likelihoods(reading, reading.temperature_gold)


def _marginalise(scores: torch.Tensor, gold: torch.Tensor, reading: Reading, temperature_score: float) -> torch.Tensor:
    return emdr_loss(scores, gold, reading.targets.labels, reading.counts, temperature_score=temperature_score)


MODES: dict[str, Mode] = {
    "ppmean": Mode(perplexity, _distil),
    "pdist": Mode(perplexity, _distil),
    "evalnormsum": Mode(attention, _distil),
    "adist": Mode(attention, _distil),
    "loop": Mode(leave_one_out, _distil),
    "emdr": Mode(_tempered_log_likelihoods, _marginalise),
}


class Correlation(NamedTuple):
    """Scalars on the device: the mean over those examples where it is defined, and how many these are."""

    mean: torch.Tensor
    examples: torch.Tensor


def correlations(reading: Reading, gold: torch.Tensor) -> dict[str, Correlation]:
    """How what a signal gave agrees with the `attention_statistics`.

    Args:
        gold: (B, K), or (B, K, T) per token, which is averaged over the target first.
    """
    gold = gold if gold.dim() == 2 else _mean_over_tokens(gold, reading.targets)
    statistics = attention_statistics(reading)
    return {name: pearson(gold, statistic, reading.counts) for name, statistic in statistics.items()}


def pearson(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> Correlation:
    """Pearson's correlation over the K passages of each example, averaged over the examples.

    Examples of which fewer than two passages count, or all that do have the same value, have none and are left out.

    Args:
        a, b, mask: (B, K); `mask` says which passages count.
    """
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    # in fp64 the mean of equal fp32 numbers is exactly that number, so that what does not vary is seen to be constant
    a, b = (x.double().masked_fill(~mask, 0.0) for x in (a, b))
    a, b = ((x - x.sum(-1, keepdim=True) / n).masked_fill(~mask, 0.0) for x in (a, b))
    spread = (a.square().sum(-1) * b.square().sum(-1)).sqrt()  # (B,)
    defined = spread > 0
    values = (a * b).sum(-1) / spread.masked_fill(~defined, 1.0)
    examples = defined.sum()
    return Correlation(values.sum() / examples.clamp(min=1), examples)


def _mean_over_tokens(values: torch.Tensor, targets: Targets) -> torch.Tensor:  # (B, K, T) -> (B, K)
    return values.sum(-1) / targets.lengths.clamp(min=1)[:, None]
