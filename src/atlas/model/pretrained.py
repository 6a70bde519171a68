"""Helpers for loading tokenizers, readers and retrievers. torch is imported only where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def pretrained_errors(flag: str, name_or_path: str, wanted: str) -> Iterator[None]:
    """Turn a library's error about a model that cannot be loaded into one sentence that names the flag.

    Raises:
        OSError: the path is not a directory; or in place of an OSError (not found, not reachable), a ValueError
            (another kind of model) or a RuntimeError (weights of other shapes) raised inside the block.
    """
    # A hub id is `name` or `owner/name`; the hub library's message about anything else does not help.
    is_path = name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1
    if is_path and not Path(name_or_path).is_dir():
        raise OSError(f"{flag} {name_or_path}: there is no such directory; give one that holds {wanted}, or a hub id")
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".: ")
        raise OSError(
            f"{flag} {name_or_path}: cannot load {wanted} ({reason}); "
            "give a local directory that holds it or a hub id that can be reached"
        ) from error


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


def set_dropout(module: nn.Module, probability: float) -> None:
    """Set every dropout in `module`: the Dropout modules and the `dropout` numbers of attention layers."""
    from torch import nn

    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = probability
        elif isinstance(getattr(child, "dropout", None), float | int):
            child.dropout = probability


def checkpoint_activations(module: PreTrainedModel) -> None:
    """Recompute the activations of `module` in the backward pass: less memory, more time."""
    # transformers gave the method another name between 5.17 and 5.24
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
