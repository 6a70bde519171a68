"""How useful was each passage to the reader? One function per gold-score mode, all without gradient.

A signal takes the reader in evaluation mode, the encodings `hidden (B, K, L, d)` of each passage with their `mask
(B, K, L)`, and the target; it returns gold scores (B, K), higher for a more useful passage.
"""

from collections.abc import Callable

import torch

from src.inputs import Targets
from src.reader import FusionInDecoder, token_log_probabilities

Signal = Callable[[FusionInDecoder, torch.Tensor, torch.Tensor, Targets], torch.Tensor]


def perplexity(reader: FusionInDecoder, hidden: torch.Tensor, mask: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Perplexity distillation (Izacard et al. 2022, section 2.2): how likely each passage alone makes the target.

    Returns:
        (B, K): mean over the target's tokens of log P(token | query, passage k).
    """
    k = hidden.shape[1]
    labels = targets.labels.repeat_interleave(k, dim=0)  # (B·K, T)
    decoder_ids = targets.decoder_ids.repeat_interleave(k, dim=0)
    logits = reader.logits(hidden.flatten(0, 1), mask.flatten(0, 1), decoder_ids)  # (B·K, T, V)
    log_likelihood = token_log_probabilities(logits, labels).sum(-1) / (labels != -100).sum(-1)
    return log_likelihood.view(-1, k)


SIGNALS: dict[str, Signal] = {"ppmean": perplexity, "pdist": perplexity}
