"""Learning rates over time, and AdamW's state there and back."""

import math

import pytest
import torch

from atlas.config import Optimisation
from atlas.training.optim import FIRST_SCALE, Optimizers, schedule_factor

SETTINGS = {"weight_decay": 0.1, "epsilon": 1e-6, "beta2": 0.99, "clip": 1.0, "scheduler": "linear"}


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
    other.load_state(state)
    take(weights, optimizers, range(3, 6))
    take(again, other, range(3, 6))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_state_of_other_parameters_is_refused():
    _, optimizers = make()
    with pytest.raises(ValueError, match="moments for reader/x"):
        optimizers.load_state({"reader/x/step": torch.tensor(1.0)})


def test_the_loss_scale_is_kept_by_fp16_alone():
    scaling, scaled = make(precision="fp16")[1], make(precision="fp16")[1]
    scaling.load_state(make()[1].state())  # of a run in another precision
    assert scaling.scale == FIRST_SCALE
    scaled.scale = 4.0
    scaling.load_state(scaled.state())
    assert scaling.scale == 4.0
