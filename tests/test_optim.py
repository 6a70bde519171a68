"""Learning rates over time, the optimizers, and their state there and back."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atlas.checkpoint import Checkpoint
from atlas.config import Optimisation
from atlas.training.moments import dequantize, dynamic_levels, kept_of, quantize
from atlas.training.optim import FIRST_SCALE, Optimizers, schedule_factor

SETTINGS = {"weight_decay": 0.1, "epsilon": 1e-6, "beta2": 0.99, "clip": 1.0, "scheduler": "linear"}
FILE = Path("o.safetensors")  # named by messages


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("total", [4, 20])
def test_schedules(warmup, total):
    for u in range(total + 3):
        x = min(u, total)
        rising = x < warmup
        after = (x - warmup) / max(1, total - warmup)
        linear = 0.9 * x / max(1, warmup) + 0.1 if rising else max(0, 1 - 0.9 * after)
        cosine = x / warmup if rising else 0.1 + 0.9 * math.cos(0.5 * math.pi * after)
        fixed = x / warmup if rising else 1.0
        assert schedule_factor("linear", u, warmup, total) == pytest.approx(linear)
        assert schedule_factor("cosine", u, warmup, total) == pytest.approx(cosine)
        assert schedule_factor("fixed", u, warmup, total) == pytest.approx(fixed)
    with pytest.raises(ValueError, match="--scheduler"):
        schedule_factor("wavy", 5, 0, 10)


def make(lr=0.1, **settings):
    torch.manual_seed(0)
    weights = {"w": torch.nn.Parameter(torch.randn(4)), "v": torch.nn.Parameter(torch.randn(2))}
    halves = {"reader": [("w", weights["w"])], "retriever": [("v", weights["v"])]}
    flags = SETTINGS | {"lr": lr, "lr_retriever": 2 * lr, "warmup_steps": 2, "total_steps": 6} | settings
    return weights, Optimizers(Optimisation(**flags), halves)


def take(weights, optimizers, steps):
    for step in steps:
        optimizers.backward(((weights["w"] - 3) ** 2).sum() + (weights["v"] ** 4).sum())
        assert optimizers.step(step).moved


def test_equals_plain_adamw_with_one_norm_for_both():
    weights, optimizers = make()
    take(weights, optimizers, range(6))
    torch.manual_seed(0)
    w, v = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(2))
    plain = torch.optim.AdamW(
        [{"params": [w], "base": 0.1}, {"params": [v], "base": 0.2}], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
    )
    for step in range(6):
        (((w - 3) ** 2).sum() + (v**4).sum()).backward()
        torch.nn.utils.clip_grad_norm_([w, v], 1.0)
        for group in plain.param_groups:
            group["lr"] = group["base"] * schedule_factor("linear", step, 2, 6)
        plain.step()
        plain.zero_grad()
    assert torch.allclose(weights["w"], w, atol=1e-6) and torch.allclose(weights["v"], v, atol=1e-6)


def test_state_there_and_back():
    weights, optimizers = make()
    take(weights, optimizers, range(3))
    state = {name: tensor.clone() for name, tensor in optimizers.state().items()}
    assert set(state) - {"skipped"} == {
        f"{parameter}/{key}" for parameter in ("reader/w", "retriever/v") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    again, other = make()
    with torch.no_grad():
        for name, weight in again.items():
            weight.copy_(weights[name])
    other.load_state(state, FILE)
    take(weights, optimizers, range(3, 6))
    take(again, other, range(3, 6))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_state_of_other_parameters_is_refused():
    _, optimizers = make()
    with pytest.raises(ValueError, match="moments for reader/x"):
        optimizers.load_state({"reader/x/step": torch.tensor(1.0)}, FILE)


def test_the_loss_scale_is_kept_by_fp16_alone():
    scaling, scaled = make(precision="fp16")[1], make(precision="fp16")[1]
    scaling.load_state(make()[1].state(), FILE)  # of a run in another precision
    assert scaling.scale == FIRST_SCALE
    scaled.scale = 4.0
    scaling.load_state(scaled.state(), FILE)
    assert scaling.scale == 4.0


def damaged(state, change):
    """Saved moments of which one tensor is another."""
    changed = {name: tensor.clone() for name, tensor in state.items()}
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update({"reader/w/exp_avg": torch.zeros(3)}), r"reader/w/exp_avg is \(3,\) .*, not \(4,\)"),
        (lambda s: s.update({"reader/w/exp_avg_sq": torch.zeros(2, 2)}), r"exp_avg_sq is \(2, 2\)"),
        (lambda s: s.update({"reader/w/exp_avg": torch.zeros(4).half()}), r"torch.float16, not \(4,\) torch.float32"),
        (lambda s: s.update({"retriever/v/step": torch.ones(1)}), r"retriever/v/step is \(1,\)"),
        (lambda s: s.update({"skipped": torch.zeros(2)}), "skipped is"),
        (lambda s: s.update({"loss_scale": torch.zeros(5)}), "loss_scale is"),
        (lambda s: s.pop("retriever/v/exp_avg"), "has no retriever/v/exp_avg"),
        (lambda s: [s.pop(f"reader/u/{key}") for key in ("step", "exp_avg", "exp_avg_sq")], "has no reader/u/exp_avg"),
        (lambda s: s.update({"reader/w/max_exp_avg_sq": torch.zeros(4)}), "which has no reader/w/max_exp_avg_sq"),
    ],
)
def test_moments_that_do_not_fit_are_refused_before_a_kernel_sees_them(change, sentence):
    optimizers = with_three_weights()
    for parameter in optimizers.halves.values():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0)
    state = optimizers.state()
    with_three_weights().load_state(damaged(state, lambda same: None), FILE)
    with pytest.raises(ValueError, match=rf"o\.safetensors.*{sentence}") as error:
        with_three_weights().load_state(damaged(state, change), FILE)
    assert "\n" not in str(error.value)


def with_three_weights():
    flags = Optimisation(**SETTINGS, lr=0.1, lr_retriever=0.1, warmup_steps=2, total_steps=6)
    halves = {name: torch.nn.Parameter(torch.randn(n)) for name, n in (("w", 4), ("u", 3), ("v", 2))}
    optimizers = Optimizers(
        flags, {"reader": [("w", halves["w"]), ("u", halves["u"])], "retriever": [("v", halves["v"])]}
    )
    optimizers.halves = halves
    return optimizers


def checkpoint_of(directory, state, **options):
    """A checkpoint of step 4 whose optimizer file holds this; None: there is no such file."""
    if state is not None:
        save_file(state, directory / "optimizer.safetensors")
    return Checkpoint(directory, 4, {}, {}, {}, options, published=False)


def test_a_run_does_not_resume_with_fresh_moments_in_silence(tmp_path, caplog):
    """Neither without the file nor without a half of it; only a half that has not learnt yet starts afresh."""
    weights, optimizers = make()
    take(weights, optimizers, range(2))
    state = optimizers.state()
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is missing.*checkpoint/latest.*--restart"):
        make()[1].resume(checkpoint_of(tmp_path, None))
    reader = {name: tensor for name, tensor in state.items() if not name.startswith("retriever/")}
    with pytest.raises(ValueError, match="no moments of the retriever, which has learnt"):
        make()[1].resume(checkpoint_of(tmp_path, reader, train_retriever=True, freeze_retriever_steps=-1))
    with pytest.raises(ValueError, match="no moments of the reader"):
        make()[1].resume(checkpoint_of(tmp_path, {"skipped": torch.tensor(0)}))
    caplog.set_level("INFO", "atlas")
    make()[1].resume(checkpoint_of(tmp_path, reader, train_retriever=True, freeze_retriever_steps=4))
    assert "the retriever has no moments yet" in caplog.text
    (tmp_path / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors cannot be read"):
        make()[1].resume(checkpoint_of(tmp_path, None))
    other = "has the moments of --optimizer adamw, and --optimizer adafactor cannot go on .*: use --optimizer adamw,"
    for options in ({}, {"optimizer": "adamw"}):  # earlier versions did not save it
        with pytest.raises(ValueError, match=other):
            make(optimizer="adafactor")[1].resume(checkpoint_of(tmp_path, state, **options))


def matrix_and_vector(**settings):
    """As `make`, with a matrix that is kept in 8 bits and a vector that is not, where updates are accumulated."""
    torch.manual_seed(0)
    halves = {"reader": torch.nn.Linear(96, 64), "retriever": torch.nn.Linear(3, 2)}
    flags = SETTINGS | {"lr": 0.01, "lr_retriever": 0.01, "warmup_steps": 2, "total_steps": 8} | settings
    return halves, Optimizers(Optimisation(**flags), halves)


def learn(halves, optimizers, steps):
    for step in steps:
        for part in range(2):
            torch.manual_seed(10 * step + part)
            loss = (halves["reader"](torch.randn(4, 96)) - 1).square().mean() + halves["retriever"](torch.ones(3)).sum()
            optimizers.backward(loss / 2)
        assert optimizers.step(step).moved


def same_weights(one, other):
    pairs = [zip(one[half].parameters(), other[half].parameters(), strict=True) for half in one]
    return all(torch.equal(a, b) for of_half in pairs for a, b in of_half)


KINDS = [
    {"optimizer": "adamw", "offload_optimizer": True},
    {"optimizer": "adamw8bit"},
    {"optimizer": "adamw8bit", "offload_optimizer": True},
    {"optimizer": "adafactor"},
    {"optimizer": "adafactor", "offload_optimizer": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_optimizer_resumes_to_the_last_bit(kind):
    halves, optimizers = matrix_and_vector(**kind)
    learn(halves, optimizers, range(3))
    state = {name: tensor.clone() for name, tensor in optimizers.state().items()}
    for half, module in halves.items():
        for name, parameter in module.named_parameters():
            kept = kept_of(kind["optimizer"], parameter.shape)
            found = {key.rsplit("/")[-1]: tensor for key, tensor in state.items() if key.startswith(f"{half}/{name}/")}
            assert {key: (tensor.shape, tensor.dtype) for key, tensor in found.items() if key != "step"} == kept
    again, other = matrix_and_vector(**kind)
    for half, module in again.items():
        module.load_state_dict(halves[half].state_dict())
    other.load_state(state, FILE)
    weight = next(halves["reader"].parameters())
    weight.grad = torch.full_like(weight, torch.nan)
    assert not optimizers.step(3).moved  # and nothing that is kept has changed
    learn(halves, optimizers, range(3, 6))
    learn(again, other, range(3, 6))
    assert same_weights(halves, again)
    states = [optimizers.state(), other.state()]
    assert states[0].pop("skipped") == 1 and not states[1].pop("skipped")
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_moments_on_the_cpu_change_nothing():
    runs = [matrix_and_vector(offload_optimizer=offload) for offload in (False, True)]
    for halves, optimizers in runs:
        learn(halves, optimizers, range(6))
    assert same_weights(*(halves for halves, _ in runs))


def test_adafactor_is_that_of_torch_with_our_schedule():
    halves, optimizers = matrix_and_vector(optimizer="adafactor", clip=0)
    plain, _ = matrix_and_vector()
    by_torch = torch.optim.Adafactor(plain["reader"].parameters(), weight_decay=0.1)
    learn(halves, optimizers, range(4))
    for step in range(4):
        by_torch.param_groups[0]["lr"] = 0.01 * schedule_factor("linear", step, 2, 8)
        for part in range(2):
            torch.manual_seed(10 * step + part)
            ((plain["reader"](torch.randn(4, 96)) - 1).square().mean() / 2).backward()
        by_torch.step()
        by_torch.zero_grad()
    assert same_weights({"reader": plain["reader"]}, {"reader": halves["reader"]})


def test_adamw_in_8_bits_moves_as_adamw_does():
    start, exact, rounded = (matrix_and_vector(clip=0, optimizer=name) for name in ("adamw", "adamw", "adamw8bit"))
    for halves, optimizers in (exact, rounded):
        learn(halves, optimizers, range(8))
    first, second, third = (halves["reader"].weight for halves, _ in (start, exact, rounded))
    moved = (second - first).norm()
    assert 0 < (third - second).norm() < 0.02 * moved
    assert torch.equal(*(halves["retriever"].weight for halves, _ in (exact, rounded)))  # too small for 8 bits
    sizes = [sum(tensor.nbytes for tensor in optimizers.state().values()) for _, optimizers in (exact, rounded)]
    assert sizes[1] < 0.32 * sizes[0]


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits(signed):
    levels = dynamic_levels(signed)
    assert len(levels) == len(set(levels.tolist())) == 256 and levels.max() == 1 and 0 in levels
    torch.manual_seed(0)
    values = torch.randn(5, 4, 64) * torch.logspace(-6, 2, 5)[:, None, None]  # rows of very different sizes
    values = values if signed else values.abs()
    values[0, 1] = 0
    codes, scales = quantize(values, levels, block=128)
    found = dequantize(codes, scales, levels)
    assert codes.shape == values.shape and scales.shape == (5, 2)
    for row, of_row, scale in zip(values.flatten(1).view(5, 2, 128), found.view(5, 2, 128), scales, strict=True):
        nearest = levels[(row[..., None] / scale[:, None, None] - levels).abs().argmin(-1)] * scale[:, None]
        assert torch.allclose(of_row, nearest, rtol=1e-6, atol=0)
    assert (found[0, 1] == 0).all()
    rows = [quantize(part, levels, block=128) for part in values.split([1, 4])]
    assert torch.equal(torch.cat([part for part, _ in rows]), codes)  # whichever rank has a row
    nothing, of_nothing = quantize(values[:0], levels, block=128)
    assert dequantize(nothing, of_nothing, levels).shape == (0, 4, 64)
