"""Less of what is computed is padding: rows of similar length are encoded together, and passages fused without any."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from atlas.runtime import device as devices

_MOST_CUTS = 128  # places tried for a cut, however many rows there are


class Fused(NamedTuple):
    """The hidden states of each query's passages, one after the other: what the decoder attends to."""

    hidden: torch.Tensor  # (B, S, d)
    passage: torch.Tensor  # (B, S) int64: the number of each state's passage; -1 is padding

    @property
    def mask(self) -> torch.Tensor:
        """(B, S) bool, false for padding."""
        return self.passage >= 0


def fuse(hidden: torch.Tensor, mask: torch.Tensor, lengths: np.ndarray | None) -> Fused:
    """Put the passages of each query together. S is the number of tokens of the query that has the most.

    Args:
        hidden: (B, K·L, d).
        mask: (B, K, L) bool, true for a passage's first tokens.
        lengths: (B, K) tokens of each passage, on the CPU so that nobody waits for the device. None: the padding stays.
    """
    (b, k, longest), device = mask.shape, mask.device
    if lengths is not None:
        totals, multiple = lengths.sum(1), devices.pad_multiple(device)
        width = -(-max(1, totals.max()) // multiple) * multiple
    if lengths is None or width >= k * longest:
        number = torch.arange(k, device=device)[:, None]
        return Fused(hidden, torch.where(mask, number, -1).flatten(1))
    query, passage, token = (np.arange(longest) < lengths[..., None]).nonzero()
    column = np.arange(len(query)) - np.repeat(totals.cumsum() - totals, totals)
    rows, passages = np.zeros((b, width), np.int64), np.full((b, width), -1)  # padding repeats the first state
    rows[query, column], passages[query, column] = (query * k + passage) * longest + token, passage
    rows, passages = (devices.move(torch.from_numpy(part), device) for part in (rows, passages))
    return Fused(hidden.flatten(0, 1).index_select(0, rows.flatten()).view(b, width, -1), passages)


def encode_by_length(
    encoder: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor,
    lengths: np.ndarray | None,
) -> torch.Tensor:
    """What `encoder` returns for ids and mask (n, L), from up to three calls with fewer padded tokens.

    Args:
        encoder: (n, L), (n, L) -> (n, D) or (n, L, d); what it returns for padding does not matter, and is zero here.
        lengths: (n,) tokens of each row, on the CPU so that nobody waits for the device. None: one call for all.

    Returns:
        (n, D) or (n, L, d).
    """
    n, longest = ids.shape
    groups = [] if lengths is None else length_groups(lengths, devices.tokens_of_a_call(ids.device))
    if len(groups) < 2:
        return encoder(ids, mask)
    order = np.concatenate(groups)
    place = devices.move(torch.from_numpy(np.argsort(order)), ids.device)
    rows = devices.move(torch.from_numpy(order), ids.device).split([len(group) for group in groups])
    parts = []
    for group, of_group in zip(groups, rows, strict=True):
        width = _width(lengths[group], longest, ids.device)
        encoded = encoder(ids[of_group, :width], mask[of_group, :width])
        parts.append(F.pad(encoded, (0, 0, 0, longest - width)) if encoded.dim() == 3 else encoded)
    return torch.cat(parts)[place]


def calls_by_length(
    rows: np.ndarray, lengths: np.ndarray | None, most: int, longest: int, device: torch.device
) -> Iterator[tuple[np.ndarray, int]]:
    """Which rows of a batch to compute in one call, with how many tokens each; together, all of them.

    Args:
        rows: (m,) numbers of rows.
        lengths: (n,) tokens of every row of the batch. None: the rows as they are, padded as they are, so that the
            number of calls depends on nothing else.
        most: rows of a call.
        longest: tokens that the batch is padded to.
    """
    if lengths is not None:
        rows = rows[np.argsort(lengths[rows], kind="stable")]
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        if lengths is None:
            yield some, longest
            continue
        for group in length_groups(lengths[some], devices.tokens_of_a_call(device)):
            yield some[group], _width(lengths[some[group]], longest, device)


def _width(lengths: np.ndarray, longest: int, device: torch.device) -> int:
    """What rows of these lengths are padded to."""
    multiple = devices.pad_multiple(device)
    return min(longest, -(-max(1, lengths.max()) // multiple) * multiple)


def length_groups(lengths: np.ndarray, overhead: int) -> list[np.ndarray]:
    """Cut rows into at most three groups with the fewest tokens, where each group is padded to its longest row.

    Args:
        lengths: (n,) tokens of each row.
        overhead: tokens that a further group has to save.

    Returns:
        The numbers of each group's rows, shortest rows first.
    """
    order, n = np.argsort(lengths, kind="stable"), len(lengths)
    cuts = np.unique(np.linspace(0, n, min(n, _MOST_CUTS) + 1).astype(np.int64))
    longest = np.concatenate([[0], lengths[order]])[cuts]  # of the rows before each cut
    # Rows before the first cut (down), between the cuts, and after the second (across); empty groups cost nothing.
    down, across = cuts[:, None], cuts[None]
    tokens = down * longest[:, None] + (across - down) * longest[None] + (n - across) * longest[-1]
    tokens = tokens + overhead * ((down > 0).astype(np.int64) + (across > down) + (across < n))
    first, second = np.unravel_index(np.where(across >= down, tokens, np.iinfo(np.int64).max).argmin(), tokens.shape)
    return [order[a:b] for a, b in pairwise((0, cuts[first], cuts[second], n)) if a < b]
