"""Several ranks train one model: parallelism applied from outside, so that the model knows nothing of it.

Every rank holds all weights (DDP), or a part of the reader's (FSDP2), or all weights and the moments of some (ZeRO 1).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from atlas.runtime import distributed


def shard_weights(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    device: torch.device,
    *,
    block_dtype: torch.dtype | None,
    forward_methods: Sequence[str],
) -> None:
    """Move a model to the device and leave each rank 1/W of its weights, gradients and moments (FSDP2).

    A block's weights are gathered when it runs forward and stay until its backward pass, which leaves each rank its
    part of the gradients: ZeRO stage 2, with the weights themselves cut as well between the steps. Blocks move to the
    device one by one, so the whole model is on it at no time.

    Args:
        blocks: parts that are gathered one by one; the rest is gathered as a whole.
        block_dtype: the blocks compute in it; what is cut stays fp32, and so does the sum of the gradients.
        forward_methods: names of methods of the model, beside `forward`, that run it.
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=block_dtype, reduce_dtype=torch.float32 if block_dtype else None, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name in forward_methods:
        register_fsdp_forward_method(model, name)


@contextlib.contextmanager
def gathered_weights(model: nn.Module | None) -> Iterator[None]:
    """Keep the weights of a sharded model gathered inside the block, on every rank. Collective at its beginning.

    So ranks may run it different numbers of times (evaluation, generation): nothing in the block waits for the others.
    """
    sharded = [module for module in (model.modules() if model is not None else ()) if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def data_parallel(model: nn.Module, device: torch.device, *, some_unused: bool) -> nn.Module:
    """Average gradients over ranks after every backward; the model itself in one process or where a part is sharded.

    Args:
        some_unused: some trained weights have no part in some steps (the retriever while it is frozen).
    """
    if distributed.world_size() == 1 or _has_shards(model):
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=devices,
        find_unused_parameters=some_unused,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # they are constants: the positions of BERT
    )


def local_gradients(model: nn.Module, local: bool) -> AbstractContextManager:
    """Leave gradients on their rank inside the block, while more are to be accumulated.

    Those of sharded weights are added up over ranks all the same: whole ones would take the memory that sharding saves.
    """
    if local and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def finish_gradients(model: nn.Module) -> None:
    """Average what no backward has averaged: the gradients of whole weights beside sharded ones."""
    if isinstance(model, DistributedDataParallel) or distributed.world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.sum_over_ranks(flat).div_(distributed.world_size())
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def agree_on_norm(parameters: Sequence[nn.Parameter], stop: bool) -> torch.Tensor:
    """Norm of all gradients together, and on how many ranks `stop` is set: (2,), the same on every rank. Collective.

    Gradients of whole weights must be the same everywhere already.
    """
    sharded = [p.grad.to_local() for p in parameters if isinstance(p, DTensor)]
    whole = [p.grad for p in parameters if not isinstance(p, DTensor)]
    device = (sharded or whole)[0].device
    norm = torch.zeros((), device=device)
    if sharded:
        norm = torch.nn.utils.get_total_norm(sharded, foreach=True).float()
    message = torch.stack([norm.square(), torch.full_like(norm, float(stop))])
    squared, asked = distributed.sum_over_ranks(message)
    if whole:
        of_whole = torch.nn.utils.get_total_norm(whole, foreach=True)
        norm = torch.sqrt(squared + of_whole.square()) if sharded else of_whole
    else:
        norm = squared.sqrt()
    return torch.stack([norm, asked])


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether these are parts of weights, which only a gathering makes whole."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensors_on_main(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors on rank 0, nothing elsewhere: sharded ones are gathered one by one, into the CPU's memory.

    Collective. All ranks bring the same names in the same order.
    """
    whole = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if distributed.is_main() else tensor
        if distributed.is_main():
            whole[name] = tensor
    return whole


def full_moments_on_main(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """The whole moments of a parameter on rank 0 (empty before the first update), nothing elsewhere. Collective."""
    moments = optimizer.state.get(parameter, {})
    if isinstance(optimizer, ShardedAdamW):
        return distributed.send_to_main({key: m.cpu() for key, m in moments.items()}, optimizer.owner[parameter]) or {}
    return full_tensors_on_main(moments)


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor that goes with a parameter (a moment), on its device and cut as it is cut."""
    tensor = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose moments are spread over ranks (ZeRO stage 1, Rajbhandari et al. 2020).

    Each rank keeps the moments of some parameters, moves these, and sends them to the others.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        self.owner: dict[nn.Parameter, int] = {}  # largest first, each to the rank that has least
        load = [0] * distributed.world_size()
        for parameter in sorted(parameters, key=torch.numel, reverse=True):  # a stable sort: the same on all ranks
            self.owner[parameter] = load.index(min(load))
            load[self.owner[parameter]] += parameter.numel()
        own = [parameter for parameter, owner in self.owner.items() if owner == distributed.rank()]
        super().__init__([{"params": own}], **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move this rank's parameters and take over the others'. Collective."""
        super().step(closure)
        distributed.broadcast_from_owners([parameter.data for parameter in self.owner], list(self.owner.values()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all parameters, whoever moves them."""
        for parameter in self.owner:
            parameter.grad = None


def _has_shards(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())
