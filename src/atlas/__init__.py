"""Atlas: a dense retriever and a Fusion-in-Decoder reader, trained jointly over a sharded index in the training loop.

Folders, from the bottom up: `runtime` (ranks, devices, logs) and `files` know nothing of the method; `model` is reader
and retriever, from text to losses; `index` stores and searches passages; `tasks` turns lines of data into examples;
`training` and `evaluation` are the two loops, `report` shows what they did, `asking` answers questions with what they
leave. Public names load on first use, so `import atlas` is instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "load": "atlas.asking.loading",
    "AnsweringModel": "atlas.asking.model",
    "Answer": "atlas.asking.answers",
    "Passage": "atlas.asking.answers",
    "parse_config": "atlas.command_line",
    "load_checkpoint": "atlas.checkpoint",
    "Retrieval": "atlas.retrieval",
    "open_index": "atlas.index.store",
    "save_index": "atlas.index.store",
    "update_index": "atlas.update",
    "load_reader": "atlas.model.reader",
    "load_retriever": "atlas.model.retriever",
    "TASKS": "atlas.tasks",
    "Task": "atlas.tasks.base",
    "Example": "atlas.tasks.base",
}
__all__ = ["__version__", *_PUBLIC]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'atlas' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
