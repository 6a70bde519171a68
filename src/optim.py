"""Two optimizers that move together: learning rates over time, clipping, steps that are skipped."""

from collections.abc import Iterable

import torch
from torch import nn

FLOOR = 0.1  # share of the learning rate at which the schedules start or end


def schedule_factor(kind: str, finished: int, warmup: int, total: int) -> float:
    """Share of the learning rate for an update that begins after `finished` steps.

    Args:
        kind: "linear" rises from the floor and falls to it; "cosine" rises from 0 and falls along a quarter of a cosine
            to the floor; "fixed" rises from 0 and stays.
        warmup: steps of rising; total: length of the whole schedule, beyond which nothing changes.
    """
    u = min(finished, total)
    after = (u - warmup) / max(1, total - warmup)
    if kind == "linear":
        return (1 - FLOOR) * u / max(1, warmup) + FLOOR if u < warmup else max(0.0, 1 + (FLOOR - 1) * after)
    if u < warmup:
        return u / warmup
    if kind == "cosine":
        return FLOOR + (1 - FLOOR) * torch.cos(torch.tensor(0.5 * torch.pi * after, dtype=torch.float64)).item()
    if kind == "fixed":
        return 1.0
    raise ValueError(f"--scheduler {kind}: expected linear, cosine or fixed")


class Optimizers:
    """AdamW for the reader and for the retriever, clipped by their common gradient norm.

    Args:
        groups: name -> (named parameters that are trained, learning rate). A group without parameters is left out.
    """

    def __init__(
        self,
        groups: dict[str, tuple[Iterable[tuple[str, nn.Parameter]], float]],
        *,
        weight_decay: float,
        epsilon: float,
        beta2: float,
        clip: float,
        scheduler: str,
        warmup_steps: int,
        total_steps: int,
        loss_scaling: bool = False,
    ) -> None:
        self.clip = clip or float("inf")
        self.skipped = 0
        self._schedule = (scheduler, warmup_steps, total_steps)
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._optimizers: dict[str, torch.optim.AdamW] = {}
        self._lr: dict[str, float] = {}
        for name, (parameters, lr) in groups.items():
            if named := dict(parameters):
                self._parameters[name] = named
                self._lr[name] = lr
                self._optimizers[name] = torch.optim.AdamW(
                    named.values(), lr=lr, betas=(0.9, beta2), eps=epsilon, weight_decay=weight_decay, fused=True
                )
        # fp16 gradients underflow without it; bf16 and fp32 have the range
        device = next(iter(next(iter(self._parameters.values())).values())).device.type
        self._scaler = torch.amp.GradScaler(device, enabled=loss_scaling)

    def learning_rate(self, finished: int) -> float:
        """Learning rate of the first group (the reader, where it is trained) after `finished` steps."""
        return next(iter(self._lr.values())) * schedule_factor(self._schedule[0], finished, *self._schedule[1:])

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to those that wait."""
        self._scaler.scale(loss).backward()

    def step(self, finished: int) -> bool:
        """Move the weights along the waiting gradients, or skip when these are not all finite.

        Data parallelism has left the same gradients on every rank, so all ranks decide alike.

        Args:
            finished: steps finished before the ones whose gradients wait; sets the learning rate.

        Returns:
            Whether the weights moved. Reading that is the step's only wait for the device.
        """
        for optimizer in self._optimizers.values():
            self._scaler.unscale_(optimizer)
        parameters = [p for named in self._parameters.values() for p in named.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip, foreach=True)
        moved = bool(torch.isfinite(norm).item())
        factor = schedule_factor(self._schedule[0], finished, *self._schedule[1:])
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._lr[name] * factor
            if moved:
                optimizer.step()  # gradients are already unscaled and finite
            optimizer.zero_grad(set_to_none=True)
        self._scaler.update()
        self.skipped += not moved
        return moved

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and counters by the names of their parameters: `{group}/{parameter}/{exp_avg, exp_avg_sq, step}`.

        And `skipped` and `loss_scale`, which belong to no parameter.
        """
        moments = {
            f"{group}/{name}/{key}": value
            for group, named in self._parameters.items()
            for name, parameter in named.items()
            for key, value in self._optimizers[group].state.get(parameter, {}).items()
        }
        return moments | {
            "skipped": torch.tensor(self.skipped),
            "loss_scale": torch.tensor(self._scaler.get_scale()),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: it belongs to other parameters.
        """
        state = dict(state)
        self.skipped = int(state.pop("skipped", torch.tensor(0)))
        scale = state.pop("loss_scale", None)
        if scale is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": float(scale)})
        known = {f"{group}/{name}" for group, named in self._parameters.items() for name in named}
        if unknown := sorted({key.rsplit("/", 1)[0] for key in state} - known):
            raise ValueError(
                f"the saved optimizer has moments for {unknown[0]} (and {len(unknown) - 1} more), which this run does "
                "not train: use the flags of the saved run, or --restart"
            )
        for group, named in self._parameters.items():
            for name, parameter in named.items():
                prefix = f"{group}/{name}/"
                found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                if found:
                    self._optimizers[group].state[parameter] = {
                        key: value.to(parameter.device, copy=True) for key, value in found.items()
                    }
