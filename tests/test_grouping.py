"""Rows of similar length in one call, and passages fused without padding: the same results from fewer tokens."""

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atlas.model.grouping import encode_by_length, fuse, length_groups


def padded_tokens(lengths, groups, overhead):
    return sum(len(group) * lengths[group].max() + overhead for group in groups)


@pytest.mark.parametrize("overhead", [0, 7, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_cut_takes_fewer_tokens(seed, overhead):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, rng.integers(1, 12))
    groups = length_groups(lengths, overhead)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    order = np.argsort(lengths, kind="stable")
    cuts = combinations_with_replacement(range(len(lengths) + 1), 2)
    others = [[order[a:b] for a, b in pairwise((0, *cut, len(lengths))) if a < b] for cut in cuts]
    least = min(padded_tokens(lengths, other, overhead) for other in others)
    assert padded_tokens(lengths, groups, overhead) == least
    assert overhead < 1000 or len(groups) == 1


def test_many_rows_are_cut_nearly_as_well():
    lengths = np.random.default_rng(0).integers(10, 384, 3000)
    groups = length_groups(lengths, 64)
    assert len(groups) == 3 and sorted(np.concatenate(groups).tolist()) == list(range(3000))
    assert padded_tokens(lengths, groups, 64) < 0.78 * lengths.max() * 3000  # three equal steps: 2/3


class Encoder(nn.Module):
    """Each row's result depends on its real tokens alone; `calls` has the shapes it was called with."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        self.table, self.pools, self.calls = nn.Embedding(50, 4), pools, []

    def forward(self, ids, mask):
        self.calls.append(tuple(ids.shape))
        hidden = self.table(ids) * mask[..., None] + 7.0 * ~mask[..., None]
        return (hidden * mask[..., None]).sum(1) if self.pools else hidden


@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("lengths", [[90, 3, 0, 88, 4, 200, 5], [0, 0, 300], [100, 100], [1]])
def test_equals_one_call_for_all(pools, lengths):
    torch.manual_seed(0)
    lengths, encoder = np.array(lengths), Encoder(pools)
    mask = torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None]
    ids = torch.randint(1, 50, mask.shape)
    one, many = encoder(ids, mask), encode_by_length(encoder, ids, mask, lengths)
    first, *calls = encoder.calls
    assert sum(n * longest for n, longest in calls) <= first[0] * first[1] and len(calls) <= 3
    assert (len(calls) > 1) == (len(set(lengths.tolist())) > 1)
    real = 1 if pools else mask[..., None]
    assert torch.equal(one * real, many * real) and many.shape == one.shape
    gradients = [torch.autograd.grad((part * real).square().sum(), encoder.table.weight)[0] for part in (one, many)]
    assert torch.allclose(*gradients)
    encoder.calls.clear()
    assert torch.equal(encode_by_length(encoder, ids, mask, None), one) and len(encoder.calls) == 1


@pytest.mark.parametrize("lengths", [[[3, 0, 7], [2, 5, 1]], [[4, 1, 2]], [[0, 3, 3]], [[6, 6], [1, 6]]])
def test_fused_passages_are_their_real_states_in_order(lengths):
    lengths, longest = np.array(lengths), 7
    mask = torch.arange(longest) < torch.from_numpy(lengths)[..., None]  # (B, K, L)
    hidden = torch.randn(len(lengths), mask[0].numel(), 5, requires_grad=True)
    fused = fuse(hidden, mask, lengths)
    assert fused.hidden.shape[:2] == fused.passage.shape == (len(lengths), lengths.sum(1).max())
    for b, own in enumerate(lengths):
        real = fused.mask[b]
        assert real[: own.sum()].all() and not real[own.sum() :].any()
        assert torch.equal(fused.hidden[b][real], hidden[b][mask[b].flatten()])
        assert fused.passage[b][real].tolist() == np.repeat(np.arange(len(own)), own).tolist()
    (gradient,) = torch.autograd.grad((fused.hidden * fused.mask[..., None]).sum(), hidden)
    assert torch.equal(gradient, mask.flatten(1)[..., None].expand_as(hidden).float())


@pytest.mark.parametrize("known", [False, True])
def test_where_nothing_is_known_or_nothing_is_padding_states_are_not_copied(known):
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    lengths = mask.sum(-1).numpy() if known else None
    mask[0, 1, 2:] = known
    hidden = torch.randn(2, 12, 5)
    fused = fuse(hidden, mask, lengths)
    assert fused.hidden is hidden and torch.equal(fused.mask, mask.flatten(1))
    assert torch.equal(fused.passage[1], torch.arange(3).repeat_interleave(4))


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert not waits, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def test_fusing_never_waits_for_the_device():
    lengths = np.array([[3, 0, 7], [2, 5, 1]])
    mask = torch.arange(7) < torch.from_numpy(lengths)[..., None]
    hidden = torch.randn(2, 21, 5, requires_grad=True)
    with NoWait():
        fused = fuse(hidden, mask, lengths)
        (fused.hidden * fused.mask[..., None]).sum().backward()
