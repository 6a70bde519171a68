"""The memory calculator against memory that was measured: real tensors, real gradients, real moments, real ranks."""

from pathlib import Path

import pytest
import torch
from torch.profiler import profile
from transformers import BertConfig

from benchmarks.memory import (
    GIB,
    PASSAGE_BYTES,
    PASSAGES,
    READERS,
    SHARDINGS,
    LiveMemory,
    Settings,
    batch_of,
    build,
    held,
    held_by,
    main,
    reader_config,
    update,
    wait_for_gradients,
    working,
)
from tests.ranks import run_on_ranks

DOCS = (Path(__file__).resolve().parent.parent / "docs/training.md").read_text(encoding="utf-8")
SHAPE = (192, 512, 3, 3)  # d_model, d_ff, layers, heads
RETRIEVER = BertConfig(
    vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
)
STEP = Settings(n_context=6, text_maxlength=96, target_maxlength=16)
SHARDED = [{}, {"shard_optim": True}, {"shard_grads": True}, {"shard_optim": True, "shard_grads": True}]


def allocated_at_peak(function):
    """By the account of the allocator, which sees scratch space inside of operations as well."""
    with profile(profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_live_memory():
    with LiveMemory() as live:
        a = torch.zeros(1000)
        view, b = a[:10].view(2, 5), torch.zeros(500, dtype=torch.float64)
        assert live.now == live.peak == 8000
        del a
        assert live.now == 8000  # the view keeps it
        del view
        assert (live.now, live.peak) == (4000, 8000)
        b.untyped_storage().resize_(0)
        assert live.now == 0
        b.untyped_storage().resize_(16000)
        b.add_(1)
        assert (live.now, live.peak) == (16000, 16000)
    del b
    assert live.now == 0
    storage = torch.zeros(1).untyped_storage()
    storage.resize_(8)
    assert live.peak == 16000  # nothing is counted outside the block


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpoint": False},
        {"precision": "fp32", "dropout": 0.0},
        {"per_gpu_batch_size": 2, "target_maxlength": 48},
    ],
)
def test_a_fake_step_takes_what_a_real_one_takes(changes):
    settings = STEP._replace(**changes)
    config = reader_config(SHAPE, settings.dropout)
    atlas, optimizers = build(config, RETRIEVER, settings)
    batch = batch_of(settings, RETRIEVER.vocab_size, RETRIEVER.hidden_size)

    def step():
        update(atlas, optimizers, batch, settings.precision)

    step()
    wait_for_gradients(atlas)
    with LiveMemory() as live:
        step()
    wait_for_gradients(atlas)
    allocated = allocated_at_peak(step)
    fake = working(config, RETRIEVER, settings, world_size=1, cuda=False)
    assert fake == pytest.approx(live.peak, rel=0.01)
    assert fake == pytest.approx(allocated, rel=0.05)


def _memory_of_a_rank(flags):
    """(held, working): what this rank really has after a backward pass, and what a step took beside it."""
    torch.manual_seed(0)
    settings = STEP._replace(**flags)
    atlas, optimizers = build(reader_config(SHAPE, settings.dropout), RETRIEVER, settings)
    batch = batch_of(settings, RETRIEVER.vocab_size, RETRIEVER.hidden_size)
    update(atlas, optimizers, batch, settings.precision)
    wait_for_gradients(atlas)
    between = held_by(atlas, optimizers)
    with LiveMemory() as live:
        update(atlas, optimizers, batch, settings.precision)
    return tuple(between), live.peak


@pytest.mark.parametrize("flags", SHARDED, ids=" ".join)
def test_two_ranks_hold_what_is_counted(flags):
    settings, config = STEP._replace(**flags), reader_config(SHAPE, STEP.dropout)
    counted = held(config, RETRIEVER, settings, 2)
    fake = working(config, RETRIEVER, settings, 2, cuda=False)
    ranks = run_on_ranks(2, _memory_of_a_rank, flags)
    for part in range(3):
        of_ranks = [between[part] for between, _ in ranks]
        assert max(of_ranks) == pytest.approx(counted[part], rel=0.02), Settings._fields
    assert max(peak for _, peak in ranks) == pytest.approx(fake, rel=0.02)


@pytest.mark.parametrize("size", READERS)
def test_the_documented_parts(size):
    for name, flags in SHARDINGS.items():
        parts = held(reader_config(size, 0.1), BertConfig(vocab_size=30522), Settings(**flags), 8)
        assert f"| {size} | 8, {name} | " + " | ".join(f"{part / GIB:.1f}" for part in parts) in DOCS


@pytest.mark.slow
def test_the_documented_tables(capsys):
    """The docs show what the script prints, and XL with the presets of finetune_qa.py leaves room on a GPU of 80 GB."""
    main(["--sizes", "base", "xl"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) > 15 and all(line in DOCS for line in lines)
    presets = next(line for line in lines if line.startswith("| xl | 8, `--shard_optim --shard_grads` |"))
    total = float(presets.split("|")[-2]) + PASSAGES * PASSAGE_BYTES["flat (fp16)"] / 8 / GIB
    assert total < 0.75 * 80e9 / GIB
