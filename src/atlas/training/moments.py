"""What an optimizer keeps of each weight between two updates: in fp32 or in 8 bits, on the device or on the CPU."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atlas import config
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import full_tensors_on_main, is_sharded, local_part, owners_of, shard_like, sharded_as

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 32  # values of a moment that share a scale
LEAST_VALUES = 4096  # of a moment in 8 bits; smaller ones stay fp32 (Dettmers et al. 2022)


class Kept(NamedTuple):
    """A tensor that is kept of a weight."""

    shape: torch.Size
    dtype: torch.dtype = torch.float32


def block_size(shape: torch.Size) -> int | None:
    """How many values of a moment of this shape share a scale in 8 bits; None: it stays fp32.

    No block goes over the end of a row, so that a row is the same in 8 bits whichever rank has it.
    """
    block = math.gcd(LARGEST_BLOCK, shape[1:].numel()) if len(shape) > 1 else 1
    return block if block >= SMALLEST_BLOCK and shape.numel() >= LEAST_VALUES else None


def kept_of(optimizer: str, shape: torch.Size) -> dict[str, Kept]:
    """What `--optimizer` keeps of a weight of this shape, beside the number of its updates, `step`."""
    if optimizer == "adafactor":
        if len(shape) < 2:
            return {"variance": Kept(shape)}
        return {"row_var": Kept(shape[:-1] + (1,)), "col_var": Kept(shape[:-2] + (1, shape[-1]))}
    block = block_size(shape) if optimizer == "adamw8bit" else None
    if block is None:
        return {"exp_avg": Kept(shape), "exp_avg_sq": Kept(shape)}
    scales = Kept(torch.Size((shape[0], shape[1:].numel() // block)))
    return {
        **{f"{moment}.codes": Kept(shape, torch.uint8) for moment in ("exp_avg", "exp_avg_sq")},
        **{f"{moment}.scale": scales for moment in ("exp_avg", "exp_avg_sq")},
    }


class RankOptimizer:
    """An optimizer of torch for one half of the model: updates what is this rank's to update.

    That is everything; with FSDP2 this rank's part of each weight; or whole weights that are broadcast to the other
    ranks afterwards (ZeRO stage 1, Rajbhandari et al. 2020), so that no moment exists twice.

    In 8 bits, and on the CPU, moments are kept out of the optimizer's sight: those of one weight after the other become
    fp32 on the weight's device, are updated there, and are put away again. The update itself is the same.

    Attributes: `state` (weight -> what this rank keeps of it), `owner` (weight -> its rank; empty but in ZeRO stage 1).
    """

    def __init__(self, settings: config.Optimisation, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self._name, self._parameters = settings.optimizer, parameters
        spread = settings.shard_optim and distributed.world_size() > 1 and not is_sharded(parameters)
        self.owner = owners_of(parameters) if spread else {}
        self._own = [p for p in self.owner or parameters if self.owner.get(p, distributed.rank()) == distributed.rank()]
        self._optimizer = _optimizer(settings, self._own, lr)
        self._offload, self._memory = settings.offload_optimizer, devices.PinnedMemory()
        self._one_by_one = self._offload or self._name == "adamw8bit"
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {} if self._one_by_one else self._optimizer.state
        self._levels: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights with their gradients. Collective."""
        (group,) = self._optimizer.param_groups
        group["lr"] = lr
        if self._one_by_one:
            for parameter in self._own:
                if parameter.grad is not None:
                    self._update(parameter, group)
            group["params"] = self._own
        else:
            self._optimizer.step()
        distributed.broadcast_from_owners([parameter.data for parameter in self.owner], list(self.owner.values()))

    def zero_grad(self) -> None:
        """Clear the gradients of all weights, not only of those that this rank updates."""
        for parameter in self._parameters:
            parameter.grad = None

    def full_state_on_main(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a weight, whole, on rank 0 (empty before the first update), {} elsewhere. Collective."""
        state = self.state.get(parameter, {})
        if self._offload:
            devices.synchronize(parameter.device)  # nobody has waited for what goes to the CPU
        if self.owner:
            state = {key: value.cpu() for key, value in state.items()}
            return distributed.send_to_main(state, self.owner[parameter]) or {}
        if is_sharded([parameter]):
            state = {key: sharded_as(value.to(parameter.device), parameter) for key, value in state.items()}
        return full_tensors_on_main(state)

    def restore(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Go on with what `full_state_on_main` returned, if this weight is this rank's to update."""
        if self.owner.get(parameter, distributed.rank()) == distributed.rank():
            own = {key: shard_like(value, parameter) for key, value in state.items()}
            if self._name == "adafactor":
                own["step"] = own["step"].cpu()  # where it reads it, without waiting for the device
            self.state[parameter] = self._put_away(own, {}) if self._one_by_one else own

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        before = self.state.get(parameter, {})
        if before:
            self._optimizer.state[parameter] = self._fetch(parameter, before)
        group["params"] = [parameter]
        self._optimizer.step()
        after = self._optimizer.state.pop(parameter)
        block = block_size(parameter.shape) if self._name == "adamw8bit" else None
        if block is not None:
            after = self._quantize(after, block)
        self.state[parameter] = self._put_away(after, before)

    def _put_away(self, state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, where they stay until the next update: on the CPU, in the place of those `before`."""
        own = {key: local_part(value) for key, value in state.items()}
        if not self._offload:
            return own
        return {
            key: devices.copy_to_cpu(value, before.get(key), self._memory) if value.dim() else value
            for key, value in own.items()
        }

    def _fetch(self, parameter: nn.Parameter, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of a weight as the optimizer expects it."""
        device = parameter.device
        state = {key: value.to(device, non_blocking=True) if value.dim() else value for key, value in kept.items()}
        if "exp_avg.codes" in state:
            signed, unsigned = self._levels_on(device)
            first = dequantize(state["exp_avg.codes"], state["exp_avg.scale"], signed)
            root = dequantize(state["exp_avg_sq.codes"], state["exp_avg_sq.scale"], unsigned)
            state = {"step": state["step"], "exp_avg": first, "exp_avg_sq": root.square_()}
        return {key: sharded_as(value, parameter) for key, value in state.items()}

    def _quantize(self, state: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
        first, second = (local_part(state[moment]) for moment in ("exp_avg", "exp_avg_sq"))
        signed, unsigned = self._levels_on(first.device)
        packed = {"step": state["step"]}
        packed["exp_avg.codes"], packed["exp_avg.scale"] = quantize(first, signed, block)
        # The root spans half as many powers of ten: fewer small values become 0, by which the update would be divided.
        packed["exp_avg_sq.codes"], packed["exp_avg_sq.scale"] = quantize(second.sqrt(), unsigned, block)
        return packed

    def _levels_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._levels is None:
            self._levels = dynamic_levels(signed=True).to(device), dynamic_levels(signed=False).to(device)
        return self._levels


def dynamic_levels(signed: bool) -> Tensor:
    """The 256 values that 8 bits stand for, ascending from -1 or 0 to 1 (dynamic tree quantization, Dettmers 2016).

    Seven powers of ten, each with twice as many values as the next smaller one.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        n = 2 ** (exponent if signed else exponent + 1)
        means = [10.0 ** (exponent - 6) * (0.1 + 0.9 * (i + 0.5) / n) for i in range(n)]
        values += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(values))


def quantize(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(R, …) fp32, C values in a row -> (R, …) uint8, the numbers of the nearest levels, and scales (R, C / block)."""
    blocks = values.reshape(len(values), values.shape[1:].numel() // block, block)
    scales = blocks.abs().amax(-1)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo().tiny)[..., None], middles, out_int32=True)
    return codes.to(torch.uint8).view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The reverse: (R, …) uint8, (R, C / block) -> (R, …) fp32."""
    blocks = codes.reshape(*scales.shape, codes.shape[1:].numel() // scales.shape[1])
    return levels[blocks.int()].mul_(scales[..., None]).view(codes.shape)


def _optimizer(settings: config.Optimisation, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters)}]  # a rank may have nothing to update
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=lr,
        betas=(0.9, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
