"""Training one model on several ranks: parallelism is applied from outside, and the model code knows nothing about it.

Each rank holds all weights (DDP), all weights but only some optimizer moments (ZeRO 1), or a part of the reader's
weights (FSDP2).
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

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
    """Move a model to the device, keeping 1/W of its weights, gradients and moments on each rank (FSDP2).

    A block's weights are gathered for its forward pass and kept until its backward pass, after which each rank has its
    part of the gradients. This is ZeRO stage 2, except that the weights are sharded too between the steps. Blocks move
    to the device one by one, so the whole model is never on it.

    Args:
        blocks: parts of the model that are gathered one by one; the rest is gathered together.
        block_dtype: the precision in which the blocks compute; the shards and the sum of the gradients stay fp32.
        forward_methods: names of the model's methods, besides `forward`, that run it.
    """
    # The encoder's output is such a view. Nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
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
    """Keep the weights of a sharded model gathered on every rank inside the block. Entering it is a collective.

    Inside the block, ranks do not wait for each other and may run the model different numbers of times (evaluation,
    generation).
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
    """Wrap the model so that gradients are averaged over ranks after every backward pass (DDP).

    Returns the model itself in a single process, or if a part of it is sharded.

    Args:
        some_unused: whether some trained weights are not used in some steps (a retriever that is frozen at first).
    """
    if distributed.world_size() == 1 or _has_shards(model):
        return model
    devices = [device.index] if device.type == "cuda" else None
    # The buffers are constants (BERT's position ids). torch 2.11 has only the older name of this option.
    options = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=devices,
        find_unused_parameters=some_unused,
        gradient_as_bucket_view=True,
        **{sync: False},
    )


def local_gradients(model: nn.Module, local: bool) -> AbstractContextManager:
    """Do not average gradients over ranks inside the block if `local`, because more are to be accumulated.

    Gradients of sharded weights are summed over ranks regardless: whole ones would take the memory that sharding saves.
    """
    if local and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def finish_gradients(model: nn.Module) -> None:
    """Average the gradients that no backward pass has averaged: those of whole weights in a partly sharded model."""
    if isinstance(model, DistributedDataParallel) or distributed.world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.sum_over_ranks(flat).div_(distributed.world_size())
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def agree_on_norm(parameters: Sequence[nn.Parameter], stop: bool) -> torch.Tensor:
    """The norm of all gradients, and the number of ranks where `stop` is set: (2,), equal on all ranks. Collective.

    Gradients of whole weights must already be the same on every rank.
    """
    sharded = [p.grad.to_local() for p in parameters if isinstance(p, DTensor)]
    whole = [p.grad for p in parameters if not isinstance(p, DTensor)]
    device = (sharded or whole)[0].device
    norm = torch.zeros((), device=device)
    if sharded:
        norm = torch.nn.utils.get_total_norm(sharded, foreach=True).float()
    message = torch.stack([norm.square(), torch.full_like(norm, float(stop))])
    squared, stopping = distributed.sum_over_ranks(message)
    if whole:
        norm_of_whole = torch.nn.utils.get_total_norm(whole, foreach=True)
        norm = torch.sqrt(squared + norm_of_whole.square()) if sharded else norm_of_whole
    else:
        norm = squared.sqrt()
    return torch.stack([norm, stopping])


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of these parameters is sharded over ranks (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensors_on_main(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The full tensors on rank 0, an empty dict elsewhere. Sharded ones are gathered one by one into CPU memory.

    Collective. All ranks must pass the same names in the same order.
    """
    full = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if distributed.is_main() else tensor
        if distributed.is_main():
            full[name] = tensor
    return full


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a full tensor that belongs to a parameter (a moment), on its device and sharded like it.

    A number is the same on every rank.
    """
    tensor = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def sharded_as(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that has as many rows as a parameter, as a tensor that is sharded like it.

    A number is the same on every rank, and a tensor that is sharded already stays as it is.
    """
    if isinstance(local, DTensor) or not isinstance(parameter, DTensor) or local.dim() == 0:
        return local
    shape = torch.Size((parameter.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def owners_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Spread parameters over the ranks: largest first, each to the rank that has the least so far."""
    owner: dict[nn.Parameter, int] = {}
    load = [0] * distributed.world_size()
    for parameter in sorted(parameters, key=torch.numel, reverse=True):  # a stable sort: the same on all ranks
        owner[parameter] = load.index(min(load))
        load[owner[parameter]] += parameter.numel()
    return owner


def _has_shards(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())
