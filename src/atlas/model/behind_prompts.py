"""How likely tokens are behind many prompts: what is known is not computed, and what prompts share is computed once."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atlas.model.causal import CausalReader
from atlas.model.grouping import calls_by_length, length_groups
from atlas.model.likelihoods import KnownLikelihoods
from atlas.model.losses import IGNORE
from atlas.model.reader import token_log_probabilities
from atlas.runtime import device as devices

AT_ONCE = 64  # prompts
LOGITS = 2**28  # most numbers of the logits of a call, (m, T, V): 1 GiB
SHARED = 1.5  # answers to a prompt, on average, from which on prompts are computed first, and then what follows them


class Rows(NamedTuple):
    """n prompts, and the tokens behind each.

    `lengths` (n,) are tokens of the prompts, on the CPU. None: unknown, so that all calls are padded alike, and their
    number depends on n alone. `repeated`: whether several of the prompts may be the same.
    """

    ids: Tensor  # (n, L, 1)
    mask: Tensor  # (n, L) bool, true for the first tokens
    labels: Tensor  # (n, T), -100 where nothing is to be judged
    decoder_ids: Tensor  # (n, T): the tokens, shifted right by one position
    lengths: np.ndarray | None
    repeated: bool

    def at(self, rows: np.ndarray, width: int) -> "Rows":
        """Some of them, (m,), with so many tokens of their prompts."""
        at = devices.move(torch.from_numpy(rows), self.ids.device)
        parts = self.ids[at, :width], self.mask[at, :width], self.labels[at], self.decoder_ids[at]
        return Rows(*parts, None if self.lengths is None else self.lengths[rows], self.repeated)


def log_likelihoods(
    reader: CausalReader, rows: Rows, temperature: float, known: KnownLikelihoods | None = None
) -> Tensor:
    """Log P(token | prompt, the tokens before), with the logits divided by `temperature`.

    Returns:
        (n, T) fp32, 0 where the label is -100.
    """
    device, n, longest = rows.ids.device, len(rows.ids), rows.ids.shape[1]
    found, left, keys = torch.zeros(rows.labels.shape, device=device), np.arange(n), []
    if known is not None:
        parts = (part.cpu().numpy() for part in (rows.ids[..., 0], rows.mask, rows.labels, rows.decoder_ids))
        keys = [known.key(*parts_of_row, temperature) for parts_of_row in zip(*parts, strict=True)]
        recalled, left = known.recall(keys, rows.labels.shape[1])
        found = devices.move(torch.from_numpy(recalled), device)
        if not len(left):
            return found
    same, most = _same(rows), AT_ONCE
    if rows.lengths is not None:  # else ranks wait for each other in every call
        most = max(1, min(most, LOGITS // (rows.labels.shape[1] * reader.config.vocab_size)))
    for some, width in calls_by_length(left[np.argsort(same[left])], rows.lengths, most, longest, device):
        of_call = rows.at(some, width)
        _, first, which = np.unique(same[some], return_index=True, return_inverse=True)
        if rows.lengths is None or len(first) > len(some) / SHARED:
            logits = reader.logits(*of_call[:2], of_call.decoder_ids)  # (m, T, V)
            computed = token_log_probabilities(logits.float().div_(temperature), of_call.labels)
        else:
            computed = _behind_shared(reader, of_call, first, which, temperature)
        found[devices.move(torch.from_numpy(some), device)] = computed
    if known is not None:
        known.keep([keys[row] for row in left], found[left].cpu().numpy())
    return found


def _same(rows: Rows) -> np.ndarray:  # (n,)
    """A number for each prompt, the same for equal ones."""
    if not rows.repeated:
        return np.arange(len(rows.ids))
    prompts = rows.ids[..., 0].masked_fill(~rows.mask, -1).cpu().numpy()
    return np.unique(prompts, axis=0, return_inverse=True)[1].reshape(-1)


def _behind_shared(
    reader: CausalReader, rows: Rows, first: np.ndarray, which: np.ndarray, temperature: float
) -> Tensor:  # (m, T)
    """The prompts of the rows `first`, (u,), are computed; then what is behind each, (m,), by its length."""
    device, found = rows.ids.device, torch.zeros(rows.labels.shape, device=rows.ids.device)
    prompts = devices.move(torch.from_numpy(first), device)
    begun = reader.begin(rows.ids[prompts], rows.mask[prompts])
    lengths = _lengths(rows.labels)
    for group in length_groups(lengths, devices.tokens_of_a_call(device)):
        at, of_each = (devices.move(torch.from_numpy(part), device) for part in (group, which[group]))
        width = max(1, lengths[group].max())
        logits = reader.logits_behind(begun, of_each, rows.decoder_ids[at, :width])
        computed = token_log_probabilities(logits.float().div_(temperature), rows.labels[at, :width])
        found[at, :width] = computed
    return found


def _lengths(labels: Tensor) -> np.ndarray:
    """How many tokens there are up to the last that is judged, (n,)."""
    judged = (labels != IGNORE).cpu().numpy()
    return np.where(judged.any(1), judged.shape[1] - judged[:, ::-1].argmax(1), 0)
