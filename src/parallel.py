"""Several ranks train one model: parallelism applied from outside, so that the model knows nothing of it."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src import distributed


def data_parallel(model: nn.Module, device: torch.device, *, some_unused: bool) -> nn.Module:
    """Average gradients over ranks after every backward; the model itself in one process.

    Args:
        some_unused: some trained weights have no part in some steps (the retriever while it is frozen).
    """
    if distributed.world_size() == 1:
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
    """Leave gradients on their rank inside the block, while more are to be accumulated."""
    if local and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
