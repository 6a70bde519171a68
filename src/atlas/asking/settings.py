"""Which model is meant, and the flags that it answers with.

Only the standard library is imported here, so that a mistake on the command line is answered at once.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas.command_line import config_to_ask
from atlas.config import Config
from atlas.options import DATA, PUBLISHED_FILE, find_checkpoint, reached, read_options

# Flags of a run that name files: a relative path is relative to where the run was started.


@dataclass(frozen=True)
class Saved:
    """A model on disk."""

    path: Path  # of the checkpoint, or of a directory of exported models
    kind: str  # "ours", "published" or "exported"
    options: Mapping[str, Any]  # flag -> value, unchecked, with paths as they are reached from here

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.options.get("name") or self.path.name)

    @property
    def example_files(self) -> list[Path]:
        """The data that it was evaluated or trained on, as far as it is still there."""
        return [Path(path) for name in DATA for path in _texts(self.options.get(name)) if os.path.isfile(path)]


def find_saved(path: str | os.PathLike) -> Saved:
    """The model at this path: a run or a checkpoint of ours, a published checkpoint, or exported models.

    The options of a published checkpoint cannot be read here: they are empty.

    Raises:
        ValueError: there is none, or its flags cannot be read.
    """
    path = Path(path)
    if checkpoint := find_checkpoint(path):
        return Saved(checkpoint, "ours", reached(read_options(checkpoint), checkpoint))
    if os.path.isfile(path / PUBLISHED_FILE):
        return Saved(path, "published", {})
    halves = [half for half in ("reader", "retriever", "query_encoder") if os.path.isfile(path / half / "config.json")]
    if halves:
        return Saved(path, "exported", read_options(path) | _of_exported(path, halves))
    what = "holds no model" if os.path.isdir(path) else "is no directory"
    raise ValueError(
        f"{path} {what}: give a run or a checkpoint (state.json), a published checkpoint ({PUBLISHED_FILE}), or "
        "exported models (reader/, retriever/)"
    )


def config_for(saved: Saved, index: str | os.PathLike | None, given: Mapping[str, Any]) -> Config:
    """All flags: those `given`, else those that the model was saved with, with the index that belongs to it.

    Args:
        index: the directory of the saved index to search; None: that of the run, else its corpus is embedded.

    Raises:
        ValueError: a flag that does not exist or cannot have this value; nothing to search in.
    """
    given = {name: _plain(value) for name, value in given.items()}
    options = dict(saved.options)
    if index is not None:
        if not os.path.isdir(index):
            raise ValueError(f"there is no index {index}: give the directory of one that was saved")
        given = _searching("an index (--index)", given) | {"load_index_path": str(index)}
    elif "passages" in given:
        given = _searching("a corpus (--passages)", given) | {"load_index_path": None}
    elif "load_index_path" not in given:
        options["load_index_path"] = _own_index(saved)
    flags = options | given
    closed = flags.get("closed_book") or flags.get("use_file_passages")
    if not closed and not flags.get("load_index_path") and not flags.get("passages"):
        raise ValueError(
            f"{saved.path} does not say what to search in: give an index (--index) or a corpus (--passages)"
        )
    # Nothing is written there but the bad lines of a corpus, if the run leaves such lines out.
    elsewhere = {"checkpoint_dir": tempfile.gettempdir(), "name": f"atlas-ask-{os.getpid()}"}
    return config_to_ask(options, saved.path, given | elsewhere | {"write_evidence": True})  # with each answer


def _searching(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are given, and those of a run without retrieval replaced. Raises: ValueError."""
    without = {"closed_book": False, "use_file_passages": False}
    if unsuited := [f"--{name}" for name in without if given.get(name)]:
        raise ValueError(f"{unsuited[0]} does without {what}: give one of both")
    return {**given, **without}


def _texts(value: Any) -> list[str]:
    """The texts of a list; none of anything else, as options are unchecked."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, tuple) else []


def _plain(value: Any) -> Any:
    """A flag's value as the command line would have it."""
    if isinstance(value, os.PathLike):
        return str(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _own_index(saved: Saved) -> str | None:
    """The index of a run, the newer one first; None where there is only its corpus."""
    options, run = saved.options, saved.path.parent.parent
    loaded = options.get("load_index_path")
    # A run converts the published index that it loads into its own directory.
    for place in (options.get("save_index_path"), loaded, run / "index" if loaded else None):
        if isinstance(place, str | Path) and os.path.isfile(Path(place) / "index.json"):
            return str(place)
    passages = _texts(options.get("passages"))
    return None if passages and all(map(os.path.isfile, passages)) else loaded


def _of_exported(path: Path, halves: list[str]) -> dict[str, Any]:
    """The flags that name exported models; without one half, what is possible without it."""
    retriever = next((half for half in halves if half != "reader"), None)
    flags: dict[str, Any] = {"name": path.resolve().name}
    flags |= {"reader_model_type": str(path / "reader")} if "reader" in halves else {"retrieve_only": True}
    return flags | ({"retriever_model_path": str(path / retriever)} if retriever else {"closed_book": True})
