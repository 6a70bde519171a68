"""Matrices in 8 bits, to evaluate and ask a reader: half of the memory that 16 bits take, and almost its answers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 127  # of each sign


class Int8Linear(nn.Module):
    """A linear layer whose weights are integers from -127 to 127, times a scale for each row.

    Rows are scaled by their largest weight. Activations are not rounded: the integers become numbers of their
    precision, which hold them exactly, and the scale is multiplied to what comes out.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo().tiny) / LEVELS  # (out, 1)
        # T5's own code looks at the type of `weight`, and leaves activations alone where it is int8
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:  # (…, in) -> (…, out)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        product = F.linear(hidden.to(dtype), self.weight.to(dtype)) * self.scale.to(dtype)
        return product if self.bias is None else product + self.bias.to(dtype)


@torch.no_grad()
def round_to_int8(blocks: Iterable[nn.Module]) -> None:
    """Replace all linear layers of these modules, one after the other."""
    for block in blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
