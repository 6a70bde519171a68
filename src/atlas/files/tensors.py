"""Writing safetensors, with the checksums of what is written."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from atlas.files.checksums import Blocks, write_file
from atlas.files.disk import writing

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Blocks:
    """Write a safetensors file, tensor by tensor: none is copied unless it is on a GPU or not contiguous.

    The library's own function takes no checksums, and first copies all of them.

    Raises:
        FullDiskError: there is no space for it.
        OSError: it cannot be written.
    """
    # the widest numbers first, so that each begins at a multiple of its size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with writing(path, needed):
        return write_file(path, _parts({name: tensors[name] for name in names}, metadata))


def _parts(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> Iterator[memoryview | bytes]:
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
