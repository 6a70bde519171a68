"""Helpers for loading tokenizers, readers and retrievers. torch is imported only where it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

READER_FLAG, RETRIEVER_FLAG = "--reader_model_type", "--retriever_model_path"
LARGEST_SIZE, MOST_LAYERS = 2**24, 1000
LONGEST_REASON = 500
CAUSAL_TYPES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "smollm3")  # decoder-only language models, to read with
POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins


@contextmanager
def pretrained_errors(flag: str, name_or_path: str, wanted: str) -> Iterator[None]:
    """Turn a library's error about a model that cannot be loaded into one sentence that names the flag.

    Raises:
        OSError: the path is not a directory; or in place of whatever was raised inside the block: files may be missing,
            damaged or of another kind, and the libraries that read them fail in every way there is.
    """
    try:
        # A hub id is `name` or `owner/name`; the hub library's message about anything else does not help.
        is_path = name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1
        absent = is_path and not Path(name_or_path).is_dir()
        if not absent:
            yield
    except Exception as error:
        reason = _pointer_file(Path(name_or_path)) or _first_sentence(error)
        raise OSError(
            f"{flag} {name_or_path}: cannot load {wanted} ({reason}); "
            "give a local directory that holds it or a hub id that can be reached"
        ) from error
    if absent:
        raise OSError(f"{flag} {name_or_path}: there is no such directory; give one that holds {wanted}, or a hub id")


def _first_sentence(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, KeyError | TypeError | AttributeError) or not text:  # says little without its kind
        text = f"{type(error).__name__}: {text}"
    sentence = text.splitlines()[0].split(". ")[0].rstrip(".: ")
    return sentence if len(sentence) <= LONGEST_REASON else f"{sentence[:LONGEST_REASON]}..."


def _pointer_file(directory: Path) -> str | None:
    """Which file of a directory stands in for one that Git LFS has not fetched; None if there is none."""
    with suppress(OSError):  # a directory that may not be read
        for path in filter(Path.is_file, sorted(directory.glob("*"))):
            with open(path, "rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    return f"{path.name} is the pointer of a file that was not fetched: run `git lfs pull` there"
    return None


def check_sizes(config: PretrainedConfig) -> None:
    """Raises ValueError if a number in a config.json cannot be a size: to try would take all memory, or for ever."""
    for name, value in config.to_dict().items():
        most = MOST_LAYERS if name.endswith("_layers") else LARGEST_SIZE
        if isinstance(value, int | float) and not value <= most:
            raise ValueError(f"its config.json says {name} {value:.4g}, and at most {most} makes sense")


def check_memory(module: nn.Module) -> None:
    """Raises ValueError if a module (of the meta device) is larger, in fp32, than the memory of this machine."""
    needed = 4 * sum(parameter.numel() for parameter in module.parameters())
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(f"its config.json describes a model of {needed / 1e9:.0f} GB, more than this machine's memory")


def add_weights(digest: _Hash, state: Mapping[str, Tensor]) -> None:
    """Feed names, shapes, a sample and a checksum of weights to a hash; it is the same on every device."""
    import torch

    for name, tensor in sorted(state.items()):
        bits = tensor.detach().float().flatten().view(torch.int32)
        sample = bits[:: max(1, bits.numel() // 64)]
        # Integer sums: floating-point sums depend on the number of threads.
        digest.update(f"{name} {tuple(tensor.shape)} {bits.sum(dtype=torch.int64).item()} {sample.tolist()}".encode())


@contextmanager
def quiet_loading(name_or_path: str) -> Iterator[None]:
    """Silence transformers' warnings (the loaders check for themselves), and show bars only for downloads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if Path(name_or_path).is_dir():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block; every submodule gets its own mode back afterwards."""
    was_training = {part: part.training for part in module.modules()} if module is not None else {}
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for part, training in was_training.items():
            part.training = training


def set_dropout(module: nn.Module, probability: float) -> None:
    """Set every dropout in `module`: the Dropout modules and the numbers that attention layers keep."""
    from torch import nn

    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = probability
            continue
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(child, name, None), float | int):
                setattr(child, name, probability)


def checkpoint_activations(module: PreTrainedModel, every: int = 1) -> None:
    """Recompute activations of every N-th layer of `module` in the backward pass: less memory, more time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers gave the method another name between 5.17 and 5.24
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a reader's weights are those that are expected, by name and shape."""
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected or shapes:
        raise ValueError(f"these weights do not fit the reader: {difference(missing, unexpected, shapes)}")


def difference(missing: Iterable[str], unexpected: Iterable[str], shapes: Sequence[str]) -> str:
    """What is wrong with the names and shapes of weights, as a part of a sentence: a few of each kind."""
    parts = [f"missing {_few(missing)}"] if missing else []
    parts += [f"unexpected {_few(unexpected)}"] if unexpected else []
    return "; ".join([*parts, *([_few(shapes)] if shapes else [])])


def _few(texts: Iterable[str], most: int = 3) -> str:
    texts = sorted(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
