"""Checkpoints: ours (safetensors and JSON, written beside and renamed) and the published `model.pth.tar` (read only).

A checkpoint of ours is a directory `step-N` with `model.safetensors` (names as published: `reader.*`, `retriever.*`),
`optimizer.safetensors`, `state.json` (step, format, checksums), `options.json` (all flags), `reader_config.json` and
`retriever_config.json`. `latest` is a symbolic link to the newest one, replaced in one move.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from atlas.files.checksums import Blocks, Recorded, of_fields, write_file
from atlas.files.tensors import save_tensors
from atlas.runtime import distributed
from atlas.runtime.tracking import log

FORMAT = 1
PUBLISHED_FILE = "model.pth.tar"
_HALVES = ("reader", "retriever")
_NOT_ALWAYS_KEPT = ("optimizer.safetensors", "index_encoder.safetensors")
_AGAIN = "copy the checkpoint again, use another one, or --verify off to use it as it is"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. The tensors are memory-mapped: the ranks of a machine share one copy."""

    path: Path
    step: int
    reader: dict[str, torch.Tensor]  # state dicts; empty where the half was not saved
    retriever: dict[str, torch.Tensor]
    retriever_config: dict[str, Any]  # what the weights need to be read with, beyond the hub's config
    options: dict[str, Any]  # flag -> value, of the run that made it; empty if unknown
    published: bool
    examples: int | None = None  # of the training data seen so far, by all ranks together
    evaluation_due: bool = False  # the run stopped before it could evaluate this step

    def optimizer_state(self) -> dict[str, torch.Tensor] | None:
        """Moments of both optimizers; None if they were not kept, and for published checkpoints."""
        return self._more("optimizer")

    def index_encoder(self) -> dict[str, torch.Tensor] | None:
        """The passage encoder that the run's index was built with, if that is no longer the one in the model."""
        return self._more("index_encoder")

    def recorded(self) -> list[Recorded]:
        """The files with their checksums; none where they are not known, as in published checkpoints.

        Raises:
            ValueError: `state.json`, which has the checksums, was edited or damaged.
            OSError: it cannot be read.
        """
        if self.published:
            return []
        path = self.path / "state.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if not {"files", "checksum"} & state.keys():  # saved by an earlier version
                return []
            if state.pop("checksum") != of_fields(state):
                raise ValueError("its checksum does not fit")
            blocks = {name: Blocks(**fields) for name, fields in state["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} was edited or damaged ({error}): {_AGAIN}") from error
        removed = [name for name in _NOT_ALWAYS_KEPT if not (self.path / name).exists()]
        return [Recorded(self.path / name, content, _AGAIN) for name, content in blocks.items() if name not in removed]

    def _more(self, name: str) -> dict[str, torch.Tensor] | None:
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.is_file() and not self.published else None


def latest_checkpoint(run_directory: Path) -> Path | None:
    """The checkpoint that a run left in its directory, if any.

    Raises:
        ValueError: `latest` points at nothing.
    """
    link = run_directory / "checkpoint" / "latest"
    if link.is_symlink() and not link.exists():
        raise ValueError(f"{link} points at {os.readlink(link)}, which is gone: point it at a checkpoint, or --restart")
    return link.resolve() if link.exists() else None


def own_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The latest checkpoint in a run's directory, the same on all ranks. Collective. Raises: as `load_checkpoint`."""
    path = distributed.on_main("finding the checkpoint", partial(latest_checkpoint, run_directory))
    if path is None:
        return None
    return distributed.on_every_rank("reading the checkpoint", partial(load_checkpoint, path))


def set_aside(run_directory: Path) -> None:
    """Move the checkpoints of an earlier run, if any, to `checkpoint.before-restart`, replacing what is there."""
    old, aside = run_directory / "checkpoint", run_directory / "checkpoint.before-restart"
    if distributed.is_main() and old.exists():
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        log.info("--restart: the checkpoints of the earlier run are in %s now", aside)


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint directory of either format.

    Args:
        path: the directory of a checkpoint, or of a run of ours (its latest checkpoint is taken).

    Raises:
        ValueError: there is no checkpoint, or it cannot be read, or it holds what is not data.
    """
    path = Path(path)
    for candidate in (path, path / "latest", path / "checkpoint" / "latest"):
        if (candidate / "state.json").is_file():
            return _load_ours(candidate.resolve())
    if (path / PUBLISHED_FILE).is_file():
        return _load_published(path)
    raise ValueError(f"{path} holds no checkpoint: neither {PUBLISHED_FILE} nor state.json and model.safetensors")


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint."""

    step: int
    model: dict[str, torch.Tensor]  # state dict with the prefixes `reader.` and `retriever.`
    optimizer: dict[str, torch.Tensor]
    options: dict[str, Any]  # section -> flag -> value
    configs: dict[str, dict[str, Any]]  # "reader" and "retriever" -> their configs
    examples: int  # as in `Checkpoint`
    evaluation_due: bool = False  # as in `Checkpoint`
    index_encoder: dict[str, torch.Tensor] | None = None  # what `Checkpoint.index_encoder` is to return


def save_checkpoint(
    run_directory: Path, contents: Contents, *, keep_optimizers: bool, keep_checkpoints: int | None
) -> Path:
    """Write `checkpoint/step-N`, point `latest` at it, and remove what is no longer wanted. For one rank only.

    Killed at any moment, `latest` is a whole checkpoint: the old one or the new one.

    Args:
        keep_optimizers: keep the optimizer's state in older checkpoints.
        keep_checkpoints: how many to keep, None for all.
    """
    directory = run_directory / "checkpoint"
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    final, beside = directory / f"step-{contents.step}", directory / f"step-{contents.step}.partial"
    _write(beside, contents)
    if final.exists():  # whole, but its writer was killed before `latest` could point at it
        shutil.rmtree(final)
    beside.rename(final)
    link = directory / "latest.partial"
    link.symlink_to(final.name)
    link.replace(directory / "latest")
    _tidy(directory, final, keep_optimizers, keep_checkpoints)
    return final


def _write(directory: Path, contents: Contents) -> None:
    directory.mkdir()
    tensors = {"model": _without_aliases(contents.model), "optimizer": contents.optimizer}
    if contents.index_encoder is not None:
        tensors["index_encoder"] = contents.index_encoder
    written = {
        f"{name}.safetensors": save_tensors(directory / f"{name}.safetensors", part) for name, part in tensors.items()
    }
    objects = {"options": contents.options} | {f"{half}_config": config for half, config in contents.configs.items()}
    written |= {f"{name}.json": _write_json(directory / f"{name}.json", value) for name, value in objects.items()}
    facts = {name: getattr(contents, name) for name in ("step", "examples", "evaluation_due")}
    _write_state(
        directory / "state.json", facts | {"files": {name: asdict(blocks) for name, blocks in written.items()}}
    )
    for file in directory.iterdir():
        _flush(file)


def _tidy(directory: Path, newest: Path, keep_optimizers: bool, keep_checkpoints: int | None) -> None:
    older = sorted((p for p in directory.glob("step-*") if p != newest), key=lambda p: int(p.name.split("-")[1]))
    for checkpoint in older if not keep_optimizers else []:
        for name in _NOT_ALWAYS_KEPT:
            (checkpoint / name).unlink(missing_ok=True)
    if keep_checkpoints is not None:
        for checkpoint in older[: max(0, len(older) + 1 - keep_checkpoints)]:
            shutil.rmtree(checkpoint)


def _without_aliases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each matrix once: T5's `shared` is also the encoder's and decoder's `embed_tokens`."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name in sorted(state, key=lambda name: (not name.endswith("shared.weight"), name)):
        tensor = state[name].detach()
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if identity not in seen:
            seen.add(identity)
            kept[name] = tensor
    return kept


def _load_ours(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']} instead of {FORMAT}: written by another version")
        with safe_open(path / "model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        retriever_config, sections = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            for file in (path / "retriever_config.json", path / "options.json")
        )
        options = {name: value for section in sections.values() for name, value in section.items()}
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path}: the checkpoint cannot be read ({error})") from error
    # a norm that is not mentioned is the standard one, whatever the directory of the retriever says
    retriever_config = {"uncentered_layer_norm": False} | retriever_config
    return Checkpoint(
        path,
        step,
        *_split(tensors, path),
        retriever_config=retriever_config,
        options=options,
        published=False,
        examples=state.get("examples"),
        evaluation_due=bool(state.get("evaluation_due")),
    )


def _load_published(path: Path) -> Checkpoint:
    file = path / PUBLISHED_FILE
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        step, tensors = int(saved["step"]), dict(saved["model"])
    except Exception as error:  # whatever torch finds wrong with a file that anybody may have made
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} is not a published checkpoint that is safe to load: {_found(error, reason)}"
        ) from error
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file}: its `model` holds something else than tensors")
    return Checkpoint(
        path,
        step,
        *_split(tensors, file),
        retriever_config={"uncentered_layer_norm": True},
        options=vars(saved["opt"]) if isinstance(saved.get("opt"), argparse.Namespace) else {},
        published=True,
    )


def _found(error: Exception, reason: str) -> str:
    """The class that torch refused, out of its long explanation."""
    for line in str(error).splitlines():
        if "GLOBAL" in line:
            return line.split("GLOBAL", 1)[1].split("was not")[0].strip() + " is not data; nothing of it was run"
    return reason


def _split(tensors: dict[str, torch.Tensor], file: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`reader.x` and `reader.module.x` -> reader's `x`; the retriever's likewise."""
    halves: dict[str, dict[str, torch.Tensor]] = {half: {} for half in _HALVES}
    for name, tensor in tensors.items():
        half, _, rest = name.partition(".")
        if half not in halves:
            raise ValueError(f"{file}: unknown weight {name}; expected names that begin with reader. or retriever.")
        halves[half][rest.removeprefix("module.")] = tensor
    return halves["reader"], halves["retriever"]


def _write_state(path: Path, fields: dict[str, Any]) -> None:
    state = {"format": FORMAT} | fields
    _write_json(path, state | {"checksum": of_fields(state)})


def _write_json(path: Path, value: Any) -> Blocks:
    return write_file(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


def _flush(path: Path) -> None:
    """Onto the disk before the directory is renamed, so that a power cut leaves no empty file under a good name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
