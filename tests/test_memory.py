"""The memory calculator against memory that was measured: real tensors, real gradients, real moments, real ranks."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig

from benchmarks.memory import (
    GIB,
    PASSAGE_BYTES,
    PASSAGES,
    READERS,
    SHARDINGS,
    FusedNorm,
    Held,
    LiveMemory,
    Settings,
    batch_of,
    build,
    fake_step,
    held,
    held_by,
    main,
    memory_per_gpu,
    update,
    wait_for_gradients,
    working,
)
from tests.kit import slow
from tests.patience import HANG_SECONDS
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs/training.md").read_text(encoding="utf-8")
SHAPE = (192, 512, 3, 3)  # d_model, d_ff, layers, heads
RETRIEVER = BertConfig(
    vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
)
STEP = Settings(n_context=6, text_maxlength=96, target_maxlength=16)
SHARDED = [{}, {"shard_optim": True}, {"shard_grads": True}, {"shard_optim": True, "shard_grads": True}]


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


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_added_in_place_unless_something_holds_them(hooked):
    size = 4 * 100_000
    weight, gradients = torch.zeros(100_000, requires_grad=True), []
    weight.grad = torch.zeros_like(weight)
    with LiveMemory() as live:
        first, second = weight.view(-1), weight.view(-1)  # whose gradients add up to the weight's
        if hooked:
            for each in (first, second):
                each.register_hook(gradients.append)
        losses = F.embedding(torch.arange(3), first[:, None]), F.embedding(torch.arange(3), second[:, None])
        sum(loss.sum() for loss in losses).backward()
    tensors = 3 if hooked else 2
    assert tensors * size <= live.peak < tensors * size + 1000


def test_a_norm_keeps_what_the_kernel_of_cuda_keeps():
    """Beside what it is given and what it gives, one number for each row."""
    hidden, weight = torch.zeros(64, 256, requires_grad=True), torch.ones(256, requires_grad=True)
    with LiveMemory() as live:
        normed = FusedNorm.apply(hidden, weight, 1e-6)
        assert live.now == normed.nbytes + 64 * 4
        normed.sum().backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)


@pytest.mark.processes
@pytest.mark.slow
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
    atlas, optimizers = build(SHAPE, RETRIEVER, settings)
    batch = batch_of(settings, RETRIEVER.vocab_size, RETRIEVER.hidden_size)
    update(atlas, optimizers, batch, settings.precision)
    wait_for_gradients(atlas)
    with LiveMemory() as live:
        update(atlas, optimizers, batch, settings.precision)
    assert working(SHAPE, RETRIEVER, settings, world_size=1, cuda=False) == pytest.approx(live.peak, rel=0.01)


def _growth_of_the_process(shape, settings):
    """(bytes by which this process grew during a step, what `LiveMemory` says of the next one)."""
    atlas, optimizers = build(shape, RETRIEVER, settings)
    batch = batch_of(settings, RETRIEVER.vocab_size, RETRIEVER.hidden_size)

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    update(atlas, optimizers, batch, settings.precision)
    wait_for_gradients(atlas)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    update(atlas, optimizers, batch, settings.precision)
    grown = resident("VmHWM") - before
    wait_for_gradients(atlas)
    with LiveMemory() as live:
        update(atlas, optimizers, batch, settings.precision)
    return grown, live.peak


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process")
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        # long enough that activations are most of it, as in the large models
        pytest.param((256, 512, 3, 4), Settings(n_context=20, text_maxlength=128, target_maxlength=16), id="long"),
        pytest.param(SHAPE, STEP, id="narrow"),  # the vocabulary is most of it, of embeddings and of scores
    ],
)
def test_a_process_grows_by_what_is_counted(shape, settings):
    names = "Settings, _growth_of_the_process"
    command = f"from tests.test_memory import {names}; print(*_growth_of_the_process({shape}, {settings!r}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # frees go to the system
    words = [sys.executable, "-c", command]
    settings = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(words, check=True, timeout=HANG_SECONDS, **settings)
    grown, counted = map(int, done.stdout.split())
    assert grown == pytest.approx(counted, rel=0.05)


def _memory_of_a_rank(flags):
    """(held, working): what this rank really has after a backward pass, and what a step took beside it."""
    torch.manual_seed(0)
    settings = STEP._replace(**flags)
    atlas, optimizers = build(SHAPE, RETRIEVER, settings)
    batch = batch_of(settings, RETRIEVER.vocab_size, RETRIEVER.hidden_size)
    update(atlas, optimizers, batch, settings.precision)
    wait_for_gradients(atlas)
    between = held_by(atlas, optimizers)
    with LiveMemory() as live:
        update(atlas, optimizers, batch, settings.precision)
    return tuple(between), live.peak


@cache
def memory_of_two_ranks(number):
    """What `_memory_of_a_rank` says of both, with the flags of this number in `SHARDED`."""
    return run_on_ranks(2, _memory_of_a_rank, SHARDED[number])


@pytest.mark.processes
@pytest.mark.parametrize("number", [0, *map(slow, range(1, len(SHARDED)))])
def test_two_ranks_hold_what_is_counted(number):
    counted = held(SHAPE, RETRIEVER, STEP._replace(**SHARDED[number]), 2)
    for part, expected in enumerate(counted):
        most = max(between[part] for between, _ in memory_of_two_ranks(number))
        assert most == pytest.approx(expected, rel=0.02), Held._fields[part]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 3])
def test_fake_ranks_take_what_real_ones_take(number):
    fake = working(SHAPE, RETRIEVER, STEP._replace(**SHARDED[number]), 2, cuda=False)
    assert max(peak for _, peak in memory_of_two_ranks(number)) == pytest.approx(fake, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_every_optimizer_keeps_what_is_counted(optimizer):
    settings = STEP._replace(optimizer=optimizer)
    atlas, optimizers = build(SHAPE, RETRIEVER, settings)
    wait_for_gradients(atlas)
    optimizers.step(0)
    wait_for_gradients(atlas)
    assert held_by(atlas, optimizers) == held(SHAPE, RETRIEVER, settings, 1)
    assert held(SHAPE, RETRIEVER, settings._replace(offload_optimizer=True), 1).moments == 0
    exact = held(SHAPE, RETRIEVER, STEP, 1).moments
    assert held(SHAPE, RETRIEVER, settings, 1).moments < (0.3 if optimizer == "adamw8bit" else 0.02) * exact


@pytest.mark.parametrize("size", READERS)
def test_the_documented_parts(size):
    for name, flags in SHARDINGS.items():
        parts = held(size, BertConfig(vocab_size=30522), Settings(**flags), 8)
        assert f"| {size} | 8, {name} | " + " | ".join(f"{part / GIB:.1f}" for part in parts) in DOCS


@pytest.mark.slow
def test_the_documented_tables(capsys):
    """The docs show what the script prints, and XL with the presets of finetune_qa.py leaves room on a GPU of 80 GB."""
    main(["--sizes", "base"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) > 12 and all(line in DOCS for line in lines)
    presets = "`--shard_optim --shard_grads`"
    total = sum(memory_per_gpu("xl", Settings(**SHARDINGS[presets]), 8).values())
    (line,) = (line for line in DOCS.splitlines() if line.startswith(f"| xl | 8, {presets} |"))
    assert line.split("|")[-2] == f" {total / GIB:.1f} "
    assert total + PASSAGES * PASSAGE_BYTES["flat (fp16)"] / 8 < 0.75 * 80e9


@pytest.mark.processes
def test_an_evaluation_reads_the_target_too():
    settings = STEP._replace(training=False, train_retriever=False, precision="bf16")
    short, long = (
        fake_step(SHAPE, RETRIEVER, settings._replace(target_maxlength=n), 1, cuda=False).flops for n in (16, 32)
    )
    assert short < long
