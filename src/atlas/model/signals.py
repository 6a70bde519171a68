"""How useful was each passage to the reader? Each value of --gold_score_mode is a mode: a signal and its loss.

A signal measures how useful each passage was when the reader read it; no gradient flows through it. In most modes it is
a gold score (B, K), higher for a more useful passage, which is distilled into the retriever. EMDR² has no distribution
over passages as its target: its signal is the likelihood of each token given each passage, and its loss marginalises
over the passages.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from atlas import config
from atlas.model.behind_prompts import Rows, log_likelihoods
from atlas.model.grouping import Fused, fuse
from atlas.model.inputs import JudgingRows, Targets
from atlas.model.interface import Reader
from atlas.model.likelihoods import KnownLikelihoods
from atlas.model.losses import IGNORE, distillation_loss, emdr_loss
from atlas.model.reader import token_log_probabilities

# `leave_one_out` scores this many passages in one call of the decoder. More of them take more memory but need fewer
# projections of keys and values. It must not depend on the data: where weights are sharded, all ranks must call the
# decoder equally often.
LEFT_OUT_AT_ONCE = 10
# The same for the passages of a query that are scored one by one: what they take is mostly logits, (B, n, T, V).
SCORED_AT_ONCE = 10
PUBLISHED_SCALE = 256  # the published attention scores are divided by it, and temperatures are tuned to that


class Reading(NamedTuple):
    """What a signal is computed from: a batch and the reader in evaluation mode."""

    reader: Reader
    hidden: torch.Tensor  # (B, K, L, d): encodings of each passage
    mask: torch.Tensor  # (B, K, L) bool; a row without any token is not a passage
    targets: Targets
    temperature_gold: float = 1.0
    lengths: np.ndarray | None = None  # (B, K) tokens, on the CPU; None: unknown
    together: Fused | None = None  # what `fused` is, where that is there already
    asked: torch.Tensor | None = None  # (B, T) bool: the targets' tokens that are the question
    known: KnownLikelihoods | None = None  # of a reader that does not learn

    @property
    def counts(self) -> torch.Tensor:
        """(B, K): where there is a passage, and a target to score it by."""
        return self.mask.any(-1) & (self.targets.lengths > 0)[:, None]

    def fused(self) -> Fused:
        """All passages of a query together: (B, S, d)."""
        return self.together or fuse(self.hidden.flatten(1, 2), self.mask, self.lengths)


def reading_of(
    reader: Reader, judged: JudgingRows, temperature_gold: float, known: KnownLikelihoods | None = None
) -> Reading:
    """A reading of what `Inputs.judging` made."""
    rows, targets, asked = judged
    hidden = reader.encode(rows.ids, rows.mask).unflatten(1, rows.ids.shape[1:])  # (B, K·L, d) -> (B, K, L, d)
    return Reading(reader, hidden, rows.mask, targets, temperature_gold, rows.lengths, asked=asked, known=known)


Signal = Callable[[Reading], torch.Tensor]


def token_log_likelihoods(reading: Reading, temperature: float) -> torch.Tensor:
    """Log P(token | query, passage k alone), with the logits divided by `temperature`.

    Returns:
        (B, K, T), 0 where the label is -100.
    """
    if not reading.reader.fuses:
        return _behind_prompts(reading, temperature)
    targets, found = reading.targets, []
    passages = zip(reading.hidden.split(SCORED_AT_ONCE, dim=1), reading.mask.split(SCORED_AT_ONCE, dim=1), strict=True)
    for hidden, mask in passages:  # (B, n, L, d), (B, n, L)
        n = hidden.shape[1]
        labels = targets.labels.repeat_interleave(n, dim=0)  # (B·n, T)
        decoder_ids = targets.decoder_ids.repeat_interleave(n, dim=0)
        logits = reading.reader.logits(hidden.flatten(0, 1), mask.flatten(0, 1), decoder_ids)  # (B·n, T, V)
        found.append(token_log_probabilities(logits.float().div_(temperature), labels).unflatten(0, (-1, n)))
    return torch.cat(found, dim=1)


def _behind_prompts(reading: Reading, temperature: float) -> torch.Tensor:  # (B, K, T)
    """`token_log_likelihoods` of a reader that judges by prompts."""
    b, k, _ = reading.mask.shape
    labels, decoder_ids = (part.repeat_interleave(k, dim=0) for part in reading.targets)  # (B·K, T)
    rows = Rows(
        ids=reading.hidden.flatten(0, 1),
        mask=reading.mask.flatten(0, 1),
        labels=labels,
        decoder_ids=decoder_ids,
        lengths=None if reading.lengths is None else reading.lengths.flatten(),
        repeated=reading.asked is not None,  # a prompt is a passage then, and the question follows
    )
    return log_likelihoods(reading.reader, rows, temperature, reading.known).unflatten(0, (b, k))


def perplexity(reading: Reading) -> torch.Tensor:
    """Perplexity distillation (Izacard et al. 2022, section 2.2): how likely the target is given each passage alone.

    Returns:
        (B, K): mean over the target's tokens of log P(token | query, passage k).
    """
    return _mean_over_tokens(token_log_likelihoods(reading, temperature=1.0), reading.targets)


def attention(reading: Reading) -> torch.Tensor:
    """Attention distillation (Izacard & Grave 2021; Izacard et al. 2022): how much the decoder attends to each passage.

    Returns:
        (B, K): attention probability times norm of the value vector, with all passages read together, summed over the
        passage's tokens, averaged over heads, layers and the target's tokens, divided by 256.
    """
    return attention_statistics(reading)["adist"]


def leave_one_out(reading: Reading) -> torch.Tensor:
    """Leave-one-out distillation (Izacard et al. 2022, section 2.2): how unlikely the target is without passage k.

    A decoder row holds several copies of the target, one after the other. Each copy leaves out one passage and does not
    attend to the other copies. T5's positions are relative, so this equals a row per copy, but keys and values are
    projected once and not once per copy.

    Returns:
        (B, K): minus the mean over the target's tokens of log P(token | query, all passages but k). 0 if the query has
        only one passage, because nothing is left to read; its score does not matter in a distribution over one passage.
    """
    mask, targets, fused = reading.mask, reading.targets, reading.fused()
    k, t = mask.shape[1], targets.labels.shape[1]
    left_out = torch.arange(k, device=mask.device)[:, None] == fused.passage[:, None]  # (B, K, S)
    seen = fused.mask[:, None] & ~left_out  # row k sees all passages but k
    scores = []
    for of_some in seen.split(LEFT_OUT_AT_ONCE, dim=1):  # (B, n, S)
        n = of_some.shape[1]
        position = torch.arange(n * t, device=mask.device)
        before = (position[:, None] >= position) & (position[:, None] // t == position // t)  # (n·T, n·T)
        of_some, decoder_ids = of_some.repeat_interleave(t, dim=1), targets.decoder_ids.repeat(1, n)
        logits = reading.reader.logits(fused.hidden, of_some, decoder_ids, decoder_mask=before[None])  # (B, n·T, V)
        log_likelihoods = token_log_probabilities(logits, targets.labels.repeat(1, n)).unflatten(1, (n, t))
        scores.append(-_mean_over_tokens(log_likelihoods, targets))
    alone = mask.any(-1).sum(-1, keepdim=True) <= 1  # (B, 1)
    return torch.cat(scores, dim=1).masked_fill(alone, 0.0)


def prompts_without(reading: Reading) -> torch.Tensor:
    """`leave_one_out` of a reader that judges by prompts, of which each has all passages but one."""
    alone = reading.mask.any(-1).sum(-1, keepdim=True) <= 1  # (B, 1)
    return (-perplexity(reading)).masked_fill(alone, 0.0)


def attention_statistics(reading: Reading) -> dict[str, torch.Tensor]:
    """The decoder's cross-attention to each passage, when it reads all of them and is given the target.

    Returns:
        Each (B, K), over the target's tokens and the passage's tokens without padding:
        `attention`: probability, summed over the passage's tokens, averaged over heads, layers and the target's tokens;
        `value_norm`: L2 norm of the value vectors, averaged over the passage's tokens, heads and layers;
        `adist`: probability times norm, summed and averaged as `attention`, divided by 256.
    """
    return watched_logits(reading)[1]


def watched_logits(reading: Reading) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the decoder makes of the target, (B, T, V), and where it looked: the `attention_statistics` of that pass.

    There are none of a reader that does not fuse.
    """
    targets, fused = reading.targets, reading.fused()
    mask = fused.mask  # (B, S)
    if not reading.reader.fuses:
        return reading.reader.logits(fused.hidden, mask, targets.decoder_ids), {}
    has_label = (targets.labels != IGNORE).float()  # (B, T)
    sums = torch.zeros(3, *mask.shape, device=mask.device)

    def watch(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:  # (B, heads, T or S, d_kv)
        with torch.autocast(mask.device.type, enabled=False):
            scores = queries.float() @ keys.float().transpose(2, 3)  # (B, heads, T, S); T5 does not scale them
            scores = scores.masked_fill_(~mask[:, None, None], torch.finfo(scores.dtype).min)
            probability = torch.einsum("bhts,bt->bhs", scores.softmax(-1), has_label)
            norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)  # (B, heads, S)
            sums.add_(torch.stack([probability, norm, probability * norm]).mean(2))  # mean over the heads

    with reading.reader.observing_cross_attention(watch):
        logits = reading.reader.logits(fused.hidden, mask, targets.decoder_ids)
    layers = reading.reader.config.num_decoder_layers
    of_passage = fused.passage[..., None] == torch.arange(reading.mask.shape[1], device=mask.device)  # (B, S, K)
    sums = torch.where(of_passage, sums[..., None], 0.0).sum(2) / layers  # (3, B, S) -> (3, B, K)
    tokens = targets.lengths.clamp(min=1)[:, None]
    passage_tokens = reading.mask.sum(-1).clamp(min=1)
    return logits, {
        "attention": sums[0] / tokens,
        "value_norm": sums[1] / passage_tokens,
        "adist": sums[2] / tokens / PUBLISHED_SCALE,
    }


class Mode(NamedTuple):
    """How the reader scores the passages, and the loss that teaches the retriever.

    `loss` takes the retriever's scores (B, K), the signal's result, the reading, `temperature_score`, and perhaps its
    scores of the passages of other queries (B, M): there are these with `gather`, which puts the rows of all ranks
    together, (n, …) -> (W·n, …), with gradients. Without it a query is compared with its own passages alone.
    """

    signal: Signal
    loss: Callable[..., torch.Tensor]
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    known: KnownLikelihoods | None = None  # of a reader that does not learn


def _distil(
    scores: torch.Tensor,
    gold: torch.Tensor,
    reading: Reading,
    temperature_score: float,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    temperatures = {"temperature_score": temperature_score, "temperature_gold": reading.temperature_gold}
    return distillation_loss(scores, gold, reading.counts, others, **temperatures)


def _tempered_log_likelihoods(reading: Reading) -> torch.Tensor:
    return token_log_likelihoods(reading, reading.temperature_gold)


def _marginalise(
    scores: torch.Tensor,
    gold: torch.Tensor,
    reading: Reading,
    temperature_score: float,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    labels = reading.targets.labels
    return emdr_loss(scores, gold, labels, reading.counts, others, temperature_score=temperature_score)


MODES: dict[str, Mode] = {
    "ppmean": Mode(perplexity, _distil),
    "pdist": Mode(perplexity, _distil),
    "evalnormsum": Mode(attention, _distil),
    "adist": Mode(attention, _distil),
    "loop": Mode(leave_one_out, _distil),
    "emdr": Mode(_tempered_log_likelihoods, _marginalise),
}


def likelihoods_of_question_and_answer(reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """How likely the question is behind each passage (UPR, Sachan et al. 2022, arXiv 2204.07496), and the answer.

    Returns:
        (B, K): the mean over the question's tokens of log P(token | passage k).
        (B, K): the mean over the answer's tokens of log P(token | passage k, question). Both are of one pass.
    """
    found, asked = token_log_likelihoods(reading, temperature=1.0), reading.asked  # (B, K, T), (B, T)
    answered = (reading.targets.labels != IGNORE) & ~asked
    question, answer = (
        found.masked_fill(~part[:, None], 0.0).sum(-1) / part.sum(-1).clamp(min=1)[:, None]
        for part in (asked, answered)
    )
    return question, answer


def likelihood_of_question(reading: Reading, weight: float = 1.0) -> torch.Tensor:
    """`weight` times the likelihood of the question, and the rest of the weight times that of the answer: (B, K)."""
    question, answer = likelihoods_of_question_and_answer(reading)
    return weight * question + (1 - weight) * answer


# The same for a reader that does not fuse: it is given each passage alone, or all but one, in a prompt.
PROMPT_MODES: dict[str, Mode] = {
    **{name: MODES[name] for name in ("ppmean", "pdist", "emdr")},
    "loop": Mode(prompts_without, _distil),
    "question": Mode(likelihood_of_question, _distil),
}


def mode_of(settings: config.RetrieverTraining, reader: Reader) -> Mode:
    """How this reader scores passages. `preflight` has refused the modes that it has not."""
    mode = (MODES if reader.fuses else PROMPT_MODES)[settings.gold_score_mode]
    if mode.signal is likelihood_of_question:
        mode = mode._replace(signal=partial(mode.signal, weight=settings.gold_question_weight))
    return mode


def judgements(mode: Mode, reading: Reading) -> torch.Tensor:
    """The reader's distribution over the passages: softmax of gold score / temperature, which `distillation_loss`
    teaches the retriever. Likelihoods of single tokens (EMDR², with the temperature in them) are averaged first.

    Returns:
        (B, K) fp32; 0 where there is no passage. Rows sum to 1, or to 0 without a passage or a target.
    """
    gold = mode.signal(reading).float()
    gold = gold / reading.temperature_gold if gold.dim() == 2 else _mean_over_tokens(gold, reading.targets)
    counts = reading.counts
    return gold.masked_fill(~counts, torch.finfo(gold.dtype).min).softmax(-1).masked_fill(~counts, 0.0)


class Correlation(NamedTuple):
    """Scalars on the device: the mean over the examples for which it is defined, and the number of these examples."""

    mean: torch.Tensor
    examples: torch.Tensor


def correlations(reading: Reading, gold: torch.Tensor) -> dict[str, Correlation]:
    """Correlation of a signal's result with each of the `attention_statistics`.

    Args:
        gold: (B, K), or (B, K, T) per token, which is averaged over the target's tokens first.
    """
    gold = gold if gold.dim() == 2 else _mean_over_tokens(gold, reading.targets)
    statistics = attention_statistics(reading)
    return {name: pearson(gold, statistic, reading.counts) for name, statistic in statistics.items()}


def pearson(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> Correlation:
    """Pearson's correlation over the K passages of each example, averaged over the examples.

    Examples with fewer than two passages in the mask, or with the same value for all of them, are left out.

    Args:
        a, b, mask: (B, K); `mask` is true for the passages to use.
    """
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    # In fp64 the mean of equal fp32 numbers is exact, so that constant values have a deviation of exactly 0.
    a, b = (x.double().masked_fill(~mask, 0.0) for x in (a, b))
    a, b = ((x - x.sum(-1, keepdim=True) / n).masked_fill(~mask, 0.0) for x in (a, b))
    deviation = (a.square().sum(-1) * b.square().sum(-1)).sqrt()  # (B,)
    defined = deviation > 0
    values = (a * b).sum(-1) / deviation.masked_fill(~defined, 1.0)
    examples = defined.sum()
    return Correlation(values.sum() / examples.clamp(min=1), examples)


def _mean_over_tokens(values: torch.Tensor, targets: Targets) -> torch.Tensor:  # (B, K, T) -> (B, K)
    return values.sum(-1) / targets.lengths.clamp(min=1)[:, None]
