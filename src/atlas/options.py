"""Where a run's checkpoints are, and its options on disk: `options.json` of a checkpoint of ours, and `opt.log`.

Only the standard library is imported here, because the command line reads a checkpoint's options.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PUBLISHED_FILE = "model.pth.tar"  # a published checkpoint
PATHS = ("reader_model_type", "retriever_model_path", "load_index_path", "save_index_path", "passages")
DATA = ("eval_data", "train_data")
UNFINISHED = "unfinished"  # an empty file in a directory that is being written or removed: created first, removed last
STEP = re.compile(r"step-(0|[1-9][0-9]*)")  # the name of a checkpoint


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint of ours that a path means: its own directory, or that of the run (the latest one); else None."""
    for candidate in (path, path / "latest", path / "checkpoint" / "latest"):
        if os.path.isfile(candidate / "state.json"):  # Path.is_file raises an error for names that are too long
            return candidate.resolve()
    return None


def latest_checkpoint(run_directory: Path) -> Path | None:
    """The checkpoint that a run left in its directory, if any.

    Raises:
        ValueError: `latest` is missing though there are checkpoints, or points at nothing.
    """
    directory = run_directory / "checkpoint"
    link = directory / "latest"
    if os.path.islink(link) and not os.path.exists(link):
        raise ValueError(f"{link} points at {os.readlink(link)}, which is gone: point it at a checkpoint, or --restart")
    if os.path.exists(link):
        return link.resolve()
    if saved := [path.name for path in saved_steps(directory) if not (path / UNFINISHED).exists()]:
        raise ValueError(
            f"{directory} holds {', '.join(saved)}, but no link `latest` to the one to resume from: make it "
            f"(ln -s {saved[-1]} {link}), or --restart"
        )
    return None


def saved_steps(directory: Path) -> list[Path]:
    """The checkpoints of ours in a directory, by step. Copies under other names are the user's."""
    steps = [path for path in directory.iterdir() if is_step(path)] if os.path.isdir(directory) else []
    return sorted(steps, key=step_of)


def step_of(path: Path) -> int:
    """N of a path `step-N`."""
    return int(path.name.removeprefix("step-"))


def is_step(path: Path) -> bool:
    """Whether this is `step-N` with a `state.json` that says N."""
    if not STEP.fullmatch(path.name) or path.is_symlink() or not (path / "state.json").is_file():
        return False
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))["step"] == step_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_options(checkpoint: Path) -> dict[str, Any]:
    """Flag -> value, of the run that made a checkpoint of ours: unchecked. Empty if there is no `options.json`.

    Raises:
        ValueError: the file cannot be read, or is something else.
    """
    file = checkpoint / "options.json"
    if not os.path.isfile(file):
        return {}
    try:
        sections = json.loads(file.read_text(encoding="utf-8"))
        named = [pair for section in sections.values() for pair in section.items()]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} does not hold the flags of a run by section ({error}); without the file they count as unknown"
        ) from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named}


def write_options(file: Path, heading: str, options: str) -> None:
    """Write the flags of a start, below a line `# heading`, unless they are those of the start before.

    The files of earlier starts are kept: `opt.log` becomes `opt.1.log`, the next one `opt.2.log`, and so on.
    """
    if file.exists():
        earlier = file.read_text(encoding="utf-8", errors="replace")
        if re.sub(r"\A#.*\n", "", earlier) == f"{options}\n":
            return
        kept = re.compile(rf"{re.escape(file.stem)}\.(\d+){re.escape(file.suffix)}")
        numbers = [int(found[1]) for path in file.parent.iterdir() if (found := kept.fullmatch(path.name))]
        file.rename(file.with_name(f"{file.stem}.{max(numbers, default=0) + 1}{file.suffix}"))
    beside = file.with_name(f"{file.name}.partial")
    beside.write_text(f"# {heading}\n{options}\n", encoding="utf-8")
    beside.replace(file)


def reached(options: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Options with the paths as they are reached from here, where a run was started in another directory."""
    run = checkpoint.parent.parent
    there = Path(str(options.get("checkpoint_dir", "")), str(options.get("name", "")))
    home = run
    for part in reversed(there.parts):  # `/a/b/experiments/run` of `experiments/run` was started in /a/b
        if home.name != part:
            return dict(options)
        home = home.parent

    def from_here(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(from_here, value))
        return str(home / value) if isinstance(value, str) and os.path.exists(home / value) else value

    return {name: from_here(value) if name in (*PATHS, *DATA) else value for name, value in options.items()}
