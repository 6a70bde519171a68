"""The optimizers of reader and retriever: learning rate schedules, common clipping, skipped updates."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from atlas import config
from atlas.checkpoint import Checkpoint, check_tensors
from atlas.runtime import distributed
from atlas.runtime.parallel import agree_on_norm, local_part
from atlas.runtime.tracking import log
from atlas.training.moments import RankOptimizer, kept_of

FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000  # of the loss in fp16, as is usual
FLOOR = 0.1  # the schedules start or end at this share of the learning rate


def schedule_factor(kind: str, finished: int, warmup: int, total: int) -> float:
    """The factor of the learning rate for an update that starts after `finished` steps.

    Args:
        kind: "linear" rises from the floor and falls to it; "cosine" rises from 0 and falls along a quarter of a cosine
            to the floor; "fixed" rises from 0 and stays.
        warmup: steps during which it rises; total: steps of the whole schedule, after which it is constant.
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


class Update(NamedTuple):
    """The common decision of all ranks."""

    moved: bool  # whether the weights were updated: not if a gradient is not finite
    stop: bool  # whether a rank was asked to stop


class Optimizers:
    """One optimizer for the reader and one for the retriever, clipped by the norm of all their gradients together.

    With `--shard_optim` the moments are distributed over ranks; those of sharded weights are always on the ranks of
    these weights. With fp16 the loss is scaled, so that small gradients do not underflow.

    Args:
        halves: `reader` and `retriever` -> a module, or its named parameters. Frozen parameters are left out.
    """

    def __init__(
        self, settings: config.Optimisation, halves: Mapping[str, nn.Module | Iterable[tuple[str, nn.Parameter]] | None]
    ) -> None:
        self.name = settings.optimizer
        self.clip = settings.clip or float("inf")
        self.skipped = self.skipped_in_a_row = 0  # updates; the second number is that since the start of the process
        # Only fp16 needs loss scaling: the range of bf16 and fp32 is large enough.
        self._scaling, self._since_scaled = settings.precision == "fp16", 0
        self.scale = FIRST_SCALE if self._scaling else 1.0
        total_steps = settings.scheduler_steps or settings.total_steps
        self._schedule = (settings.scheduler, settings.warmup_steps, total_steps)
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._optimizers: dict[str, RankOptimizer] = {}
        self._lr: dict[str, float] = {}
        for name, half in halves.items():
            named = half.named_parameters() if isinstance(half, nn.Module) else half or ()
            if named := {key: parameter for key, parameter in named if parameter.requires_grad}:
                self._parameters[name] = named
                self._lr[name] = settings.lr_retriever if name == "retriever" else settings.lr
                self._optimizers[name] = RankOptimizer(settings, list(named.values()), self._lr[name])

    def learning_rate(self, finished: int) -> float:
        """Learning rate of the first group (the reader, if it is trained) after `finished` steps."""
        return next(iter(self._lr.values())) * schedule_factor(self._schedule[0], finished, *self._schedule[1:])

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the loss's gradients."""
        (loss * self.scale if self._scaling else loss).backward()

    def step(self, finished: int, stop: bool = False) -> Update:
        """Update the weights with the accumulated gradients, or skip the update if one of them is not finite.

        All ranks make the same decision: one collective gives the norm of all gradients and whether any rank wants to
        stop. Reading its result is the only time in a training step that waits for the device.

        Args:
            finished: steps finished before those whose gradients were accumulated; sets the learning rate.
            stop: whether this rank was asked to stop.
        """
        parameters = [p for named in self._parameters.values() for p in named.values() if p.grad is not None]
        norm, stopping = agree_on_norm(parameters, stop).tolist()
        moved = math.isfinite(norm)
        factor = schedule_factor(self._schedule[0], finished, *self._schedule[1:])
        if moved:
            coefficient = min(1.0, self.clip / (norm / self.scale + 1e-6)) / self.scale
            if coefficient != 1.0:
                torch._foreach_mul_([local_part(p.grad) for p in parameters], coefficient)
        for name, optimizer in self._optimizers.items():
            if moved:
                optimizer.step(self._lr[name] * factor)
            optimizer.zero_grad()
        self.skipped += not moved
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        self._rescale(moved)
        return Update(moved, stop=bool(stopping))

    def _rescale(self, moved: bool) -> None:
        """Halve the scale after an overflow, double it after many updates without one (Micikevicius et al. 2018)."""
        if not self._scaling:
            return
        self._since_scaled = self._since_scaled + 1 if moved else 0
        if not moved or self._since_scaled == GROWTH_STEPS:
            self.scale *= 2.0 if moved else 0.5
            self._since_scaled = 0

    def state(self) -> dict[str, torch.Tensor]:
        """What `kept_of` names and step counts, `{group}/{parameter}/{key}`, `skipped` and `loss_scale`.

        `loss_scale` exists only if the loss is scaled. Collective; the moments are on rank 0 only.
        """
        moments = {
            f"{group}/{name}/{key}": value
            for group, named in self._parameters.items()
            for name, parameter in named.items()
            for key, value in self._optimizers[group].full_state_on_main(parameter).items()
        }
        counters = {"skipped": torch.tensor(self.skipped)}
        if self._scaling:  # otherwise a run resumed in fp16 would start with the scale 1 of another precision
            counters["loss_scale"] = torch.tensor([self.scale, self._since_scaled])
        return moments | counters

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue with the moments that a run saved. Collective.

        Raises:
            ValueError: they were not kept, or do not belong to what is trained, or to another optimizer.
        """
        state = distributed.on_every_rank("reading the optimizers' state", checkpoint.optimizer_state)
        if state is None:
            raise ValueError(
                f"{checkpoint.file('optimizer')} is missing, so training cannot resume from there: point "
                "checkpoint/latest at a step that has one (the newest has, and with --save_optimizer all have), give "
                f"another --name to a run that starts from the weights alone (--model_path {checkpoint.path}), or "
                "--restart"
            )
        options = checkpoint.options
        if (saved := options.get("optimizer", "adamw")) != self.name:  # earlier versions had no other
            raise ValueError(
                f"{checkpoint.file('optimizer')} has the moments of --optimizer {saved}, and --optimizer {self.name} "
                f"cannot go on with them: use --optimizer {saved}, give another --name to a run that starts from the "
                f"weights alone (--model_path {checkpoint.path}), or --restart"
            )
        frozen_until = max(0, options.get("freeze_retriever_steps", 0))
        learnt = [] if options.get("freeze_reader") else ["reader"]
        learnt += ["retriever"] if options.get("train_retriever") and checkpoint.step > frozen_until else []
        for group in learnt if not state.get("skipped", torch.tensor(0)).any() else ():
            if group in self._parameters and not any(key.startswith(f"{group}/") for key in state):
                raise ValueError(f"{checkpoint.file('optimizer')} has no moments of the {group}, which has learnt")
        self.load_state(state, checkpoint.file("optimizer"))

    def load_state(self, state: dict[str, torch.Tensor], file: Path) -> None:
        """Restore the result of `state`, which was read from a file.

        A half that has not learnt yet has no moments; it starts with fresh ones, and the log says so.

        Raises:
            ValueError: a tensor is missing, belongs to other parameters, or has another shape or dtype.
        """
        state = dict(state)
        skipped, scale = state.pop("skipped", torch.tensor(0)), state.pop("loss_scale", torch.zeros(0))
        known = {f"{group}/{name}" for group, named in self._parameters.items() for name in named}
        if unknown := sorted({key.rsplit("/", 1)[0] for key in state} - known):
            raise ValueError(
                f"{file}: it has moments for {unknown[0]} (and {len(unknown) - 1} more), which this run does not "
                "train: use the flags of the saved run, or --restart"
            )
        learnt = {group for group in self._parameters if any(key.startswith(f"{group}/") for key in state)}
        check_tensors(file, state | {"skipped": skipped}, self._expected(learnt) | {"skipped": torch.tensor(0)})
        if scale.dtype != torch.float32 or scale.shape not in [(), (0,), (2,)]:  # a single number in older checkpoints
            raise ValueError(f"{file}: loss_scale is {tuple(scale.shape)} {scale.dtype}, not (2,) torch.float32")
        self.skipped = int(skipped)
        if self._scaling and scale.numel():
            self.scale, self._since_scaled = scale.flatten()[0].item(), int(scale.flatten()[1:].sum())
        for group in sorted(self._parameters.keys() - learnt):
            log.info("%s: the %s has no moments yet, so it starts with fresh ones", file, group)
        for group in learnt:
            for name, parameter in self._parameters[group].items():
                keys = ("step", *kept_of(self.name, parameter.shape))
                self._optimizers[group].restore(parameter, {key: state[f"{group}/{name}/{key}"] for key in keys})

    def _expected(self, groups: Iterable[str]) -> dict[str, torch.Tensor]:
        """For each tensor of these groups in a checkpoint an empty one of its shape (the whole one's) and dtype."""
        expected: dict[str, torch.Tensor] = {}
        for group in groups:
            for name, parameter in self._parameters[group].items():
                for key, kept in kept_of(self.name, parameter.shape).items():
                    expected[f"{group}/{name}/{key}"] = torch.empty(kept.shape, dtype=kept.dtype, device="meta")
                expected[f"{group}/{name}/step"] = torch.zeros(())
        return expected
