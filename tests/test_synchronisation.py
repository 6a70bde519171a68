"""A training step waits for the device once. Kernels are queued; a program that asks for a number must wait for it."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atlas.model.signals import MODES
from atlas.training.trainer import Trainer
from tests.kit import read_jsonl, run, slow, world, write_jsonl

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
READS = ("tolist", "cpu", "numpy", "__array__")  # on a CPU they pass no dispatcher


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or the shape of it, the host must know before it can go on."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counted, self.paused = Counter(), False
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))

    def _counting(self, name, method):
        def counting(tensor, *args, **kwargs):
            self.counted[name] += not self.paused
            return method(tensor, *args, **kwargs)

        return counting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = not WAITS.isdisjoint(function.tags)
        if function is torch.ops.aten.index.Tensor:  # only where a mask picks the elements
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        self.counted[function._schema.name] += waits and not self.paused
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits_of_steps(monkeypatch):
    """A list to which every step of a run adds its counts, from the moment the batch is there."""
    steps, forward_backward, update = [], Trainer.forward_backward, Trainer.update
    waits = Waits(monkeypatch)
    waits.paused = True

    def watched_forward_backward(trainer, *args):
        waits.paused = False
        with waits:
            return forward_backward(trainer, *args)

    def watched_update(trainer, *args):
        with waits:
            update(trainer, *args)
        waits.paused = True
        steps.append({name: n for name, n in waits.counted.items() if n})
        waits.counted.clear()

    monkeypatch.setattr(Trainer, "forward_backward", watched_forward_backward)
    monkeypatch.setattr(Trainer, "update", watched_update)
    return steps


@pytest.mark.parametrize(
    ("mode", "precision", "dropout", "query_side"),
    [
        *((mode, "fp32", 0.1, True) for mode in MODES),
        ("ppmean", "bf16", 0.0, False),
        *(slow(mode, "bf16", 0.0, False) for mode in MODES if mode != "ppmean"),
    ],
)
def test_a_step_waits_once(tmp_path, waits_of_steps, mode, precision, dropout, query_side):
    few = read_jsonl(world() / "passages.jsonl")[:12]  # embedding is not what is watched, and in bf16 it is slow here
    run(
        tmp_path,
        passages=write_jsonl(tmp_path / "few.jsonl", few),
        train_retriever=True,
        query_side_retriever_training=query_side,
        gold_score_mode=mode,
        precision=precision,
        compute_crossattention_stats=True,
        use_gradient_checkpoint_reader=True,
        use_gradient_checkpoint_retriever=True,
        dropout=dropout,
        n_context=3,
        decoder_prompt_format="{query} ",
        total_steps=2,
        eval_data=None,
    )
    assert waits_of_steps == [{"tolist": 1}] * 2  # the norm of all gradients, and whether a rank is to stop


def test_waits_are_noticed(monkeypatch):
    x = torch.tensor([1.0, 0.0, 2.0])
    for wait in (
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.where(x > 0),
        lambda: bool(x[0]),
        lambda: float(x.sum()),
        lambda: x.unique(),
        lambda: x.masked_select(x > 0),
        lambda: torch.equal(x, x),
        lambda: x.repeat_interleave(x.long()),
        lambda: x.tolist(),
        lambda: x.cpu(),
    ):
        with Waits(monkeypatch) as waits:
            wait()
        assert waits.counted.total() > 0
    with Waits(monkeypatch) as waits:
        _ = x[torch.tensor([0, 2, 1])] + x.repeat_interleave(1) + x.masked_fill(x > 0, 1.0)[:2].sum()
    assert waits.counted.total() == 0
