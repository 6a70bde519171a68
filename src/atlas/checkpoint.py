"""Checkpoints: ours (safetensors and JSON, written beside and renamed) and the published `model.pth.tar` (read only).

A checkpoint of ours is a directory `step-N` with `model.safetensors` (names as published: `reader.*`, `retriever.*`),
`optimizer.safetensors`, `state.json` (step, format, checksums), `options.json` (all flags), `reader_config.json` and
`retriever_config.json`. `latest` is a symbolic link to the newest one, replaced in one move.

A run with adapters (LoRA) saves what it trains: `reader_adapter` and `query_encoder_adapter` are directories as peft
writes them, and `state.json` says which weights they belong to (`bases`), which `model.safetensors` then lacks.

Other files and directories beside them are the user's, whatever they are called: only a `step-N` whose `state.json`
says N is replaced or removed, and what a killed writer left, which has a mark inside (`UNFINISHED`).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from atlas.files.checksums import Blocks, Recorded, of_fields, write_file
from atlas.files.disk import writing
from atlas.files.jsonl import replacing
from atlas.files.tensors import save_tensors
from atlas.options import (
    PUBLISHED_FILE,
    STEP,
    UNFINISHED,
    find_checkpoint,
    is_step,
    latest_checkpoint,
    read_options,
    saved_steps,
    step_of,
)
from atlas.runtime import distributed
from atlas.runtime.tracking import log

FORMAT, WITH_BASES = 1, 2  # of `state.json`; a program that knows no adapters refuses the second
HALF_OF = {"reader": "reader", "query_encoder": "retriever"}  # what may have an adapter
RESTARTED_BY = "checkpoint.restarted-by"  # the SLURM job that followed --restart here
_PARTIAL = re.compile(rf"({STEP.pattern}|latest)\.[0-9a-f]{{8}}\.partial")
_HALVES = ("reader", "retriever")
_ANOTHER = "use the models and flags of the saved run, copy the checkpoint again, or --restart"
_NOT_ALWAYS_KEPT = ("optimizer.safetensors", "index_encoder.safetensors", "quantizer.safetensors")
_AGAIN = "copy the checkpoint again, use another one, or --verify off to use it as it is"


@dataclass(frozen=True)
class Adapter:
    """What low-rank adapters (LoRA) add to a model, as peft saves it."""

    settings: dict[str, Any]  # adapter_config.json
    weights: dict[str, torch.Tensor]  # adapter_model.safetensors


@dataclass(frozen=True)
class Base:
    """The weights of a half that a checkpoint does not hold itself: it holds an adapter for them, or nothing."""

    model: str  # the T5 or BERT: hub id or directory
    checkpoint: str | None = None  # directory of the one that holds them; None: they are the model's own
    fingerprint: str | None = None  # of the weights; None: they were not loaded


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. The tensors are memory-mapped: the ranks of a machine share one copy."""

    path: Path
    step: int
    reader: dict[str, torch.Tensor]  # state dicts, of a base too; empty where nobody saved the half
    retriever: dict[str, torch.Tensor]
    retriever_config: dict[str, Any]  # what the weights need to be read with, beyond the hub's config
    options: dict[str, Any]  # flag -> value, of the run that made it; empty if unknown
    published: bool
    examples: int | None = None  # of the training data seen so far, by all ranks together
    examples_per_epoch: int | None = None  # None: `examples` counts lines that the task skips as well
    evaluation_due: bool = False  # the run ended before it had evaluated this step
    adapters: dict[str, Adapter] = field(default_factory=dict)  # of `HALF_OF`
    bases: dict[str, Base] = field(default_factory=dict)  # `reader` and `retriever`, where it holds them not itself

    def holds(self, half: str) -> bool:
        """Whether it says what the reader or the retriever is."""
        return bool(getattr(self, half)) or half in self.bases

    def optimizer_state(self) -> dict[str, torch.Tensor] | None:
        """Moments of both optimizers; None if they were not kept, and for published checkpoints."""
        return self._more("optimizer")

    def index_encoder(self) -> dict[str, torch.Tensor] | None:
        """The passage encoder that the run's index was built with, if that is no longer the one in the model."""
        return self._more("index_encoder")

    def quantizer(self) -> dict[str, torch.Tensor] | None:
        """The quantizer of the run's compressed index, by kind: (n,) uint8, as Faiss writes it."""
        return self._more("quantizer")

    def file(self, name: str) -> Path:
        """Where tensors of this kind are: `model`, `optimizer`, `index_encoder`, `quantizer`, or of an adapter."""
        return self.path / (PUBLISHED_FILE if self.published else f"{name}.safetensors")

    def recorded(self) -> list[Recorded]:
        """The files with their checksums, and those of the bases; none where they are not known, as in published ones.

        Raises:
            ValueError: `state.json`, which has the checksums, was edited or damaged.
            OSError: it cannot be read.
        """
        if self.published:
            return []
        bases = sorted({Path(base.checkpoint) for base in self.bases.values() if base.checkpoint is not None})
        of_bases = [file for base in bases if (base / "state.json").is_file() for file in _recorded(base)]
        return _recorded(self.path) + [file for file in of_bases if file.path.name == "model.safetensors"]

    def _more(self, name: str) -> dict[str, torch.Tensor] | None:
        file = self.file(name)
        if self.published or not file.is_file():
            return None
        try:
            return load_file(file)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}): copy the checkpoint again, or --restart") from error


def _recorded(directory: Path) -> list[Recorded]:
    path = directory / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not {"files", "checksum"} & state.keys():  # saved by an earlier version
            return []
        if state.pop("checksum") != of_fields(state):
            raise ValueError("its checksum does not fit")
        blocks = {name: Blocks(**fields) for name, fields in state["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was edited or damaged ({error}): {_AGAIN}") from error
    removed = [name for name in _NOT_ALWAYS_KEPT if not (directory / name).exists()]
    return [Recorded(directory / name, content, _AGAIN) for name, content in blocks.items() if name not in removed]


def check_tensors(file: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, shapes and dtypes: kernels that get other tensors than they expect may end the process.

    Raises:
        ValueError: naming the file and the first tensor that differs.
    """
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{file} does not fit this run: it has no {name}; {_ANOTHER}")
        if name not in expected:
            raise ValueError(f"{file} does not fit this run, which has no {name}; {_ANOTHER}")
        are, wanted = (f"{tuple(of[name].shape)} {of[name].dtype}" for of in (found, expected))
        if are != wanted:
            raise ValueError(f"{file} does not fit this run: {name} is {are}, not {wanted}; {_ANOTHER}")


def _is_leftover(path: Path) -> bool:
    """Whether a writer that was killed left this: a directory with its mark (or not even that), or a link."""
    if path.is_symlink():
        return _PARTIAL.fullmatch(path.name) is not None and STEP.fullmatch(os.readlink(path)) is not None
    if not path.is_dir():
        return False
    partial_name = _PARTIAL.fullmatch(path.name) is not None
    marked = (path / UNFINISHED).is_file() and (partial_name or STEP.fullmatch(path.name) is not None)
    return marked or (partial_name and not any(path.iterdir()))


def check_way(run_directory: Path, steps: range) -> None:
    """Look whether checkpoints after these steps can be saved, before a run takes the first of them.

    Raises:
        ValueError: something of the user's has the name of such a checkpoint, or `latest` is not a link.
    """
    directory = run_directory / "checkpoint"
    link = directory / "latest"
    if link.exists() and not link.is_symlink():
        raise ValueError(
            f"{link} is not a link to a checkpoint, as it has to be: rename it to the step that its state.json says, "
            "and make a link to that (mv latest step-N && ln -s step-N latest), or --restart"
        )
    for path in directory.iterdir() if directory.is_dir() else ():
        if STEP.fullmatch(path.name) and step_of(path) in steps and not (is_step(path) or _is_leftover(path)):
            raise ValueError(
                f"{path} is where a checkpoint is to be saved, and is not one of step {step_of(path)}: "
                "move it away or rename it"
            )


def own_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The latest checkpoint in a run's directory, the same on all ranks. Collective. Raises: as `load_checkpoint`."""
    path = distributed.on_main("finding the checkpoint", partial(latest_checkpoint, run_directory))
    return None if path is None else open_checkpoint(path)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """As `load_checkpoint`, the same on all ranks, also where `path` is a run that saves more. Collective."""
    path = Path(path)

    def find() -> str:
        found = find_checkpoint(path)
        # Links may lead elsewhere on another machine, so the path is kept as it was given.
        places = (path.parent, path, path / "checkpoint") if found else ()
        return str(next((place / found.name for place in places if (place / found.name).resolve() == found), path))

    found = distributed.on_main("finding the checkpoint", find)
    return distributed.on_every_rank("reading the checkpoint", partial(load_checkpoint, found))


def already_restarted(run_directory: Path) -> bool:
    """Whether SLURM or torchrun starts this job again after it has followed its --restart. Collective."""

    def known() -> bool:
        note, job = run_directory / RESTARTED_BY, distributed.slurm_job() if distributed.is_requeued() else None
        followed = note.read_text(encoding="utf-8").split("\n") if note.is_file() else []
        return any(start in followed for start in (job, distributed.launch_id()) if start)

    if again := distributed.on_main("looking whether this job has started over", known):
        log.info("--restart: this job has followed it before it was started again, so the run resumes")
    return again


def set_aside(run_directory: Path) -> None:
    """Move the checkpoints of an earlier run to `checkpoint.before-restart`, or -2, -3, … if that is taken. Collective.

    Raises:
        OSError: they cannot be moved.
    """

    def move() -> None:
        old = run_directory / "checkpoint"
        if old.exists():
            names = ("checkpoint.before-restart" + (f"-{n}" if n > 1 else "") for n in count(1))
            aside = next(run_directory / name for name in names if not os.path.lexists(run_directory / name))
            old.rename(aside)
            log.info("--restart: the checkpoints of the earlier run are in %s now", aside)
        if starts := list(filter(None, (distributed.slurm_job(), distributed.launch_id()))):
            (run_directory / RESTARTED_BY).write_text("\n".join(starts), encoding="utf-8")

    distributed.on_main("setting the earlier checkpoints aside", move)


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint directory of either format.

    Args:
        path: the directory of a checkpoint, or of a run of ours (its latest checkpoint is taken).

    Raises:
        ValueError: there is no checkpoint, or it cannot be read, or it holds what is not data.
    """
    path = Path(path)
    if ours := find_checkpoint(path):
        return _load_ours(ours)
    if (path / PUBLISHED_FILE).is_file():
        return _load_published(path)
    others = " (--reader_model_type and --retriever_model_path take a model of transformers)"
    raise ValueError(
        f"{path} holds no checkpoint: neither {PUBLISHED_FILE} nor state.json and model.safetensors"
        f"{others if (path / 'config.json').is_file() else ''}"
    )


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint."""

    step: int
    model: dict[str, torch.Tensor]  # state dict with the prefixes `reader.` and `retriever.`
    optimizer: dict[str, torch.Tensor]
    options: dict[str, Any]  # section -> flag -> value
    configs: dict[str, dict[str, Any]]  # "reader" and "retriever" -> their configs
    examples: int  # as in `Checkpoint`
    examples_per_epoch: int | None = None  # as in `Checkpoint`
    evaluation_due: bool = False  # as in `Checkpoint`
    index_encoder: dict[str, torch.Tensor] | None = None  # what `Checkpoint.index_encoder` is to return
    quantizer: dict[str, torch.Tensor] | None = None  # what `Checkpoint.quantizer` is to return
    adapters: dict[str, Adapter] = field(default_factory=dict)  # as in `Checkpoint`
    bases: dict[str, Base] = field(default_factory=dict)  # as in `Checkpoint`


def save_checkpoint(
    run_directory: Path, contents: Contents, *, keep_optimizers: bool, keep_checkpoints: int | None
) -> Path:
    """Write `checkpoint/step-N`, point `latest` at it, and remove what is no longer wanted. For one rank only.

    Killed at any moment, `latest` is a whole checkpoint: the old one or the new one. If it fails, it leaves nothing.

    Args:
        keep_optimizers: keep the optimizer's state in older checkpoints.
        keep_checkpoints: how many to keep, None for all.

    Raises:
        FullDiskError: naming the file, the bytes needed and those free.
        ValueError: as `check_way`.
    """
    directory = run_directory / "checkpoint"
    directory.mkdir(parents=True, exist_ok=True)
    check_way(run_directory, range(contents.step, contents.step + 1))
    _remove_leftovers(directory)
    final = directory / f"step-{contents.step}"
    beside = directory / _partial_name(final.name)
    try:
        with writing(final):
            _write(beside, contents)
    except BaseException:
        if beside.exists():
            _remove(beside)
        raise
    if final.exists():  # of a run that went back to an earlier step
        _remove(final)
    beside.rename(final)
    link = directory / _partial_name("latest")
    link.symlink_to(final.name)
    link.replace(directory / "latest")
    (final / UNFINISHED).unlink()
    _tidy(directory, final, keep_optimizers, keep_checkpoints)
    return final


def note_evaluation(run_directory: Path, step: int) -> None:
    """Note in the checkpoint of this step, in one move, that it has been evaluated. For one rank only."""
    path = run_directory / "checkpoint" / f"step-{step}"
    if is_step(path):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        with replacing(path / "state.json") as beside:
            has_checksum = state.pop("checksum", None) is not None
            state["evaluation_due"] = False
            _write_state(beside, state) if has_checksum else _write_json(beside, state)


def _remove_leftovers(directory: Path) -> None:
    latest = (directory / "latest").resolve()
    for path in filter(_is_leftover, list(directory.iterdir())):
        if path.resolve() == latest and not path.is_symlink():  # whole: its writer was killed at the very end
            (path / UNFINISHED).unlink(missing_ok=True)
        elif path.is_symlink():
            path.unlink()
        else:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint or what there is of one; killed on the way, what is left is known as a leftover."""
    if (checkpoint / "state.json").exists() and not (checkpoint / UNFINISHED).exists():
        (checkpoint / "state.json").rename(checkpoint / UNFINISHED)  # takes no space: the disk may be full
    if not _PARTIAL.fullmatch(checkpoint.name):
        checkpoint = checkpoint.rename(checkpoint.with_name(_partial_name(checkpoint.name)))
    for path in checkpoint.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()
    (checkpoint / UNFINISHED).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # on NFS, a file that is open here leaves another: the next start removes it
        checkpoint.rmdir()


def _partial_name(name: str) -> str:
    """A name that nothing else has, so that nothing is in the way."""
    return f"{name}.{uuid.uuid4().hex[:8]}.partial"


def _write(directory: Path, contents: Contents) -> None:
    directory.mkdir()
    (directory / UNFINISHED).touch()
    tensors = {"model": _without_aliases(contents.model), "optimizer": contents.optimizer}
    more = {"index_encoder": contents.index_encoder, "quantizer": contents.quantizer}
    tensors |= {name: part for name, part in more.items() if part is not None}
    written = {
        f"{name}.safetensors": save_tensors(directory / f"{name}.safetensors", part) for name, part in tensors.items()
    }
    objects = {"options": contents.options} | {f"{half}_config": config for half, config in contents.configs.items()}
    for name, adapter in contents.adapters.items():
        file = f"{name}_adapter/adapter_model.safetensors"
        (directory / file).parent.mkdir()
        written[file] = save_tensors(directory / file, adapter.weights, {"format": "pt"})
        objects[f"{name}_adapter/adapter_config"] = adapter.settings
    written |= {f"{name}.json": _write_json(directory / f"{name}.json", value) for name, value in objects.items()}
    facts = {name: getattr(contents, name) for name in ("step", "examples", "examples_per_epoch", "evaluation_due")}
    bases = {"bases": {half: asdict(base) for half, base in contents.bases.items()}} if contents.bases else {}
    files = {name: asdict(blocks) for name, blocks in written.items()}
    number = WITH_BASES if bases else FORMAT
    _write_state(directory / "state.json", {"format": number} | facts | bases | {"files": files})


def _tidy(directory: Path, newest: Path, keep_optimizers: bool, keep_checkpoints: int | None) -> None:
    older = [path for path in saved_steps(directory) if step_of(path) < step_of(newest)]
    for checkpoint in older if not keep_optimizers else []:
        for name in _NOT_ALWAYS_KEPT:
            (checkpoint / name).unlink(missing_ok=True)
    if keep_checkpoints is not None:
        for checkpoint in older[: max(0, len(older) + 1 - keep_checkpoints)]:
            _remove(checkpoint)


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
        state = _read_object(path / "state.json")
        if state["format"] not in (FORMAT, WITH_BASES):
            raise ValueError(f"format {state['format']} instead of {WITH_BASES}: written by another version")
        halves = dict(zip(_HALVES, _split(load_file(path / "model.safetensors"), path), strict=True))
        adapters = {name: adapter for name in HALF_OF if (adapter := _read_adapter(path / f"{name}_adapter"))}
        bases = _bases_of(state, adapters)
        config_file = path / "retriever_config.json"
        retriever_config = _read_object(config_file) if config_file.is_file() else {}
        options = read_options(path)
        counts = ("step", "examples", "examples_per_epoch")
        if not all(_is_count(state[name]) for name in counts if name == "step" or state.get(name) is not None):
            raise ValueError(f"state.json has a value of {', '.join(counts)} that is no count")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path}: the checkpoint cannot be read ({error})") from error
    # a norm that is not mentioned is the standard one, whatever the directory of the retriever says
    retriever_config = {"uncentered_layer_norm": False} | retriever_config
    halves |= {half: _of_base(path, half, base.checkpoint) for half, base in bases.items() if base.checkpoint}
    return Checkpoint(
        path,
        state["step"],
        **halves,
        retriever_config=retriever_config,
        options=options,
        published=False,
        examples=state.get("examples"),
        examples_per_epoch=state.get("examples_per_epoch"),
        evaluation_due=bool(state.get("evaluation_due")),
        adapters=adapters,
        bases=bases,
    )


def _bases_of(state: dict[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, Base]:
    """Raises: ValueError, TypeError, AttributeError."""
    bases = {half: Base(**fields) for half, fields in state.get("bases", {}).items()}
    texts = {value for base in bases.values() for value in asdict(base).values() if value is not None}
    if not bases.keys() <= set(_HALVES) or not all(isinstance(text, str) for text in texts):
        raise ValueError("state.json does not say which weights it belongs to")
    if lost := {HALF_OF[name] for name in adapters} - bases.keys():
        raise ValueError(f"state.json does not say to which {min(lost)} its adapter belongs")
    return bases


def _of_base(path: Path, half: str, base: str) -> dict[str, torch.Tensor]:
    """The weights of a half from the checkpoint that has them for another one. Raises: ValueError."""
    if os.path.isfile(Path(base) / PUBLISHED_FILE):
        found = getattr(_load_published(Path(base)), half)
    else:
        file = Path(base) / "model.safetensors"
        try:
            found = _split(load_file(file), file)[_HALVES.index(half)]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} belongs to the {half} in {file}, which cannot be read ({error}): put that checkpoint back, or "
                "a link to it"
            ) from error
    if not found:
        raise ValueError(f"{path} belongs to the {half} in {base}, which holds none: put the right checkpoint back")
    return found


def _read_adapter(directory: Path) -> Adapter | None:
    if not directory.is_dir():
        return None
    weights = load_file(directory / "adapter_model.safetensors")
    return Adapter(_read_object(directory / "adapter_config.json"), weights)


def _read_object(file: Path) -> dict[str, Any]:
    """An object of JSON. Raises: ValueError, OSError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds {json.dumps(value):.40} instead of an object")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _load_published(path: Path) -> Checkpoint:
    file = path / PUBLISHED_FILE
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        step, tensors, options = int(saved["step"]), dict(saved["model"]), saved.get("opt")
    except Exception as error:  # whatever torch finds wrong with a file that anybody may have made
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} is not a published checkpoint that is safe to load: {_found(error, reason)}"
        ) from error
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()):
        raise ValueError(f"{file}: its `model` holds something else than tensors with names")
    return Checkpoint(
        path,
        step,
        *_split(tensors, file),
        retriever_config={"uncentered_layer_norm": True},
        options=vars(options) if isinstance(options, argparse.Namespace) else {},
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
    _write_json(path, fields | {"checksum": of_fields(fields)})


def _write_json(path: Path, value: Any) -> Blocks:
    content = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    with writing(path, len(content)):
        return write_file(path, [content])
