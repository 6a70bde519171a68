"""Tensors in a file, by name."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from atlas.files.disk import usual_permissions, writing


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the tensors must be contiguous.

    Raises:
        FullDiskError: there is no space for it.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with writing(path, needed), usual_permissions(path):
        save_file(dict(tensors), path, metadata)
