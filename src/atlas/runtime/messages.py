"""What ranks tell each other, as bytes: JSON, and behind it the numbers of arrays. Nothing is unpickled.

    8 bytes: length of the JSON    JSON    content of the first array, of the second, ...

JSON has no bytes, tuples, paths, arrays and tensors: each is an object with one key, such as `{"$tuple": [1, 2]}`. An
object that has such a key itself is written as `{"$dict": [[key, value], ...]}`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas.files.jsonl import DataError

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_ARRAYS = {name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "uint64", "uint8")}
# Of an error that another rank has, the first class of its ancestry that is here.
_ERRORS = {
    kind.__name__: kind
    for kind in (DataError, ValueError, FileNotFoundError, PermissionError, ConnectionError, OSError, RuntimeError)
}


def pack(value: Any) -> bytes:
    """The value as bytes.

    Args:
        value: None, booleans, numbers, text, bytes, paths, arrays, CPU tensors, and lists, tuples and dicts of such
            values; the keys of dicts are text.

    Raises:
        TypeError: there is something else in it.
    """
    parts: list[memoryview] = []
    text = json.dumps(_to_json(value, parts)).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def unpack(message: bytes | memoryview) -> Any:
    """The value that `pack` got. Arrays and tensors can be written to."""
    start = 8 + int.from_bytes(message[:8], "little")
    rest = memoryview(message)[start:]

    def take(length: int) -> memoryview:
        nonlocal rest
        taken, rest = rest[:length], rest[length:]
        return taken

    return _from_json(json.loads(bytes(message[8:start])), take)


def pack_error(error: Exception | None) -> list[str] | None:
    """The kind of an error and what it says."""
    if error is None:
        return None
    kind = next((kind.__name__ for kind in type(error).__mro__ if kind in _ERRORS.values()), "RuntimeError")
    return [kind, str(error)]


def unpack_error(packed: list[str] | None) -> Exception | None:
    """An error of that kind that says the same."""
    return None if packed is None else _ERRORS[packed[0]](packed[1])


def _to_json(value: Any, parts: list[memoryview]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_to_json(item, parts) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [_to_json(item, parts) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        pairs = [[key, _to_json(item, parts)] for key, item in value.items()]
        return {"$dict": pairs} if any(key.startswith("$") for key in value) else dict(pairs)
    if isinstance(value, bytes):
        parts.append(memoryview(value))
        return {"$bytes": len(value)}
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, np.ndarray) and value.dtype.name in _ARRAYS:
        parts.append(_bytes_of(value))
        return {"$array": [value.dtype.name, *value.shape]}
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype in _DTYPES.values():
        content = value.detach().contiguous().reshape(-1)
        parts.append(_bytes_of(content.view(torch.uint8).numpy()))
        return {"$tensor": [str(value.dtype).removeprefix("torch."), *value.shape]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to another rank: {value!r:.60}")


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _from_json(value: Any, take: Callable[[int], memoryview]) -> Any:
    """In the order of `_to_json`, so that every part is taken by its value."""
    if isinstance(value, list):
        return [_from_json(item, take) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items() if len(value) == 1 else [("", None)]
    if kind not in _KINDS:
        return {key: _from_json(item, take) for key, item in value.items()}
    return _KINDS[kind](content, take)


def _array(content: list, take: Callable[[int], memoryview]) -> np.ndarray:
    name, *shape = content
    array = np.empty(shape, _ARRAYS[name])
    array.reshape(-1).view(np.uint8)[:] = take(array.nbytes)
    return array


def _tensor(content: list, take: Callable[[int], memoryview]) -> torch.Tensor:
    name, *shape = content
    tensor = torch.empty(shape, dtype=_DTYPES[name])
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).numpy()[:] = take(tensor.nbytes)
    return tensor


_KINDS: dict[str, Callable[[Any, Callable[[int], memoryview]], Any]] = {
    "$tuple": lambda items, take: tuple(_from_json(item, take) for item in items),
    "$dict": lambda pairs, take: {key: _from_json(item, take) for key, item in pairs},
    "$bytes": lambda length, take: bytes(take(length)),
    "$path": lambda text, take: Path(text),
    "$array": _array,
    "$tensor": _tensor,
}
