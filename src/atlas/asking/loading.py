"""`atlas.load`: a model to ask, from what a run, an export or a download left on disk."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from atlas.asking.model import AnsweringModel
from atlas.asking.settings import Saved, config_for, find_saved
from atlas.checkpoint import Checkpoint, load_checkpoint
from atlas.command_line import saved_flags
from atlas.config import TO_ASK, TOKENIZING_TASKS, Config
from atlas.index.directory import has_index, read_description
from atlas.model.load import Model
from atlas.model.retriever import PASSAGE, QUERY, TIED, fingerprint
from atlas.model.tokenization import AnyReaderTokenizer, load_reader_tokenizer
from atlas.preflight import check_reader
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from atlas.runtime.session import Session, library_session
from atlas.runtime.tracking import log
from atlas.tasks import TASKS, Task, TaskSetup
from atlas.tasks.text import TextTask


def load(
    path: str | os.PathLike, index: str | os.PathLike | None = None, *, device: str = "auto", **flags: Any
) -> AnsweringModel:
    """Load a model to ask. Nothing is written, no signal is handled, and no process group is needed. It sets how exact
    this process multiplies fp32 matrices (`torch.set_float32_matmul_precision`), as exact search depends on it.

    What a run was trained with is what it answers with: reader, retriever, formats, lengths, number of passages, and
    the index. Where the index was not saved, or the passage encoder has learned since, the corpus is embedded first,
    which the log says.

    Args:
        path: a run or a checkpoint of ours, a published checkpoint, or a directory of exported models.
        index: a saved index to search; by default that of the run.
        device: "auto" (a GPU if there is one), "cuda" or "cpu".
        flags: others of `evaluate.py` in place of the run's, such as `n_context=40`, `passages=["corpus.jsonl"]` or
            `save_index_path="index"`.

    Raises:
        ValueError: there is no such model, flag or index, or they do not fit together.
        OSError: a file cannot be read, or a model cannot be reached.
    """
    saved = find_saved(path)
    checkpoint = _exported(saved) if saved.kind == "exported" else load_checkpoint(saved.path)
    if saved.kind == "published":
        # They name paths on the machine that they were trained on.
        options = saved_flags(checkpoint.options, saved.path)
        saved = replace(saved, options={name: options[name] for name in options if name != "retriever_model_path"})
    config = config_for(saved, index, flags | {"device": device})
    with library_session(config.run) as session, config.origin.explaining(TO_ASK):
        config = _on_this_device(config, session.device)
        if saved.kind == "ours":
            session.verification.check(str(checkpoint.path), checkpoint.recorded)
        name = config.model.reader_model_type
        tokenizer = load_reader_tokenizer(name) if name and config.model.uses_reader else None
        check_reader(config, tokenizer)
        learning = config.retriever_training
        model = Model.load(
            config.model, learning, config.optimisation, checkpoint, tokenizer, session.device, training=False
        )
        retrieval = _retrieval(config, model, session, own_index=index is None)
        task = _task(config, tokenizer)
    return AnsweringModel(config, model, retrieval, task, session.device, saved.name, saved.example_files)


def _on_this_device(config: Config, device: torch.device) -> Config:
    """With precisions that the device computes in; one that was asked for is not replaced. Raises: ValueError."""
    asked = {"precision": config.optimisation.precision, "embedder_precision": config.run.embedder_precision}
    for name, precision in asked.items():
        if precision is None:
            continue
        if name in config.origin.given:
            devices.check_precision(device, precision, f"--{name}")
        elif (here := devices.precision_here(device, precision)) != precision:
            log.info("--%s %s is that of the run; on %s it is %s", name, precision, devices.describe(device), here)
            asked[name] = here
    devices.set_matmul_precision(asked["precision"])
    run = replace(config.run, embedder_precision=asked["embedder_precision"])
    return replace(config, run=run, optimisation=replace(config.optimisation, precision=asked["precision"]))


def _retrieval(config: Config, model: Model, session: Session, own_index: bool) -> Retrieval | None:
    """What is searched: an index that was saved, or one that is built here. Raises: as `Retrieval.open`."""
    settings, place = config.index, config.index.load_index_path
    stale = False
    if model.retriever is not None and place is not None and own_index and has_index(Path(place)):
        made_by = read_description(Path(place)).retriever
        stale = made_by not in (None, fingerprint(model.retriever.passage_encoder))
    if stale:
        log.warning("%s was made by an earlier passage encoder of the run: its passages are embedded again", place)
        settings = replace(settings, allow_other_index=True)
    retrieval = Retrieval.open(settings, config.run, config.retriever_training, model, session)
    if retrieval is not None:
        if retrieval.index is None and settings.save_index_path is None:
            log.info("No index was saved, so the corpus is embedded; save_index_path (--save_index_path) would keep it")
        retrieval.refresh(due=stale)
    return retrieval


def _task(config: Config, tokenizer: AnyReaderTokenizer | None) -> Task:
    """How questions are put. Raises: ValueError for a task that does not exist."""
    name = config.tasks.task
    if name not in TASKS:
        raise ValueError(f"--task {name} is unknown: give one of {', '.join(TASKS)}")
    if issubclass(TASKS[name], TextTask):
        log.info(
            "The model was trained by --task %s: it is asked with --task base, which gives it a text as it is", name
        )
        name = "base"
    setup = TaskSetup(
        flags=config.tasks,
        tokenizer=tokenizer if name in TOKENIZING_TASKS else None,
        text_maxlength=config.model.text_maxlength,
        answers_needed=False,
        passages_needed=config.model.use_file_passages,
    )
    return TASKS[name](setup)


def _exported(saved: Saved) -> Checkpoint:
    """What preprocessing/export_huggingface.py wrote, as the checkpoint that it was made of."""
    read = partial(_weights, saved.path)
    encoders = read("query_encoder", QUERY) | read("passage_encoder", PASSAGE) or read("retriever", TIED)
    reader = read("reader", "")
    return Checkpoint(saved.path, 0, reader, encoders, {}, dict(saved.options), published=False)


def _weights(directory: Path, half: str, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of one exported model, by the names that they have in a checkpoint; none if it is not there."""
    file = directory / half / "model.safetensors"
    if not file.is_file():
        return {}
    return {f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}
