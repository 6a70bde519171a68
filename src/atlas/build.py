"""From a configuration to a run: the only place that sees all of it."""

import dataclasses
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from atlas.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint, set_aside
from atlas.config import TOKENIZING_TASKS, Config, Index, evaluation_name, refresh_schedule
from atlas.evaluation.evaluator import Evaluator
from atlas.files.jsonl import JsonlCorpus
from atlas.index.codec import Compression
from atlas.index.passages import check_passages, count_duplicates, open_passages
from atlas.index.sharded import shard_rows
from atlas.index.storage import open_index, save_index
from atlas.model.atlas import Atlas
from atlas.model.inputs import Inputs
from atlas.model.reader import FusionInDecoder, load_reader, load_reader_state
from atlas.model.retriever import DualEncoder, fingerprint, load_retriever, load_retriever_state, state_is_untied
from atlas.model.signals import MODES
from atlas.model.tokenization import ReaderTokenizer, load_reader_tokenizer, load_retriever_tokenizer
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import full_tensors_on_main, shard_weights
from atlas.runtime.tracking import ProgressBars, TensorBoard, log, progress_bar, start_log, tell_error
from atlas.tasks import TASKS, Task
from atlas.tasks.data import Data
from atlas.training.optim import Optimizers
from atlas.training.trainer import Plan, Trainer

T = TypeVar("T")


def run(config: Config, job: Callable[[Config, torch.device, Path], bool]) -> None:
    """Start the ranks and do a job; a mistake of the user's ends it with one sentence and status 1.

    ValueError, OSError, a full GPU and a lost rank are such mistakes; anything else is a bug and shows its traceback.
    Tracebacks of both kinds go to the rank's log. A rank that ends so leaves the process group as it is: taking it down
    alone could wait for the others for ever. A job that was stopped by a signal ends with status 143, which tells
    schedulers and torchrun to start it again.
    """
    device = devices.pick_device(distributed.local_rank())
    directory = Path(config.run.checkpoint_dir) / config.run.name
    try:
        distributed.start(device.type)
        start_log(directory)
        transformers_logging.set_verbosity_error()  # its advice is about its own trainer
        transformers_logging.disable_progress_bar()
        devices.seed_everything(config.run.seed)
        stopped = job(config, device, directory)
        distributed.wait_for_all("the end of the run")
    except (ValueError, OSError, torch.OutOfMemoryError, distributed.LostRankError) as error:
        tell_error(error, _sentence(error))
        sys.exit(1)
    except Exception as error:
        tell_error(error, f"{type(error).__name__}: {error}")
        raise
    distributed.stop()
    if stopped:
        sys.exit(128 + signal.SIGTERM)


def _sentence(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: lower --per_gpu_batch_size, --n_context, --text_maxlength or "
            "--per_gpu_embedder_batch_size, or use --use_gradient_checkpoint_reader and --precision bf16 "
            f"({str(error).splitlines()[0]})"
        )
    return str(error)


def evaluate(config: Config, device: torch.device, directory: Path) -> bool:
    """`evaluate.py`: measure a model on every evaluation file."""
    _refuse(config, device)
    path = config.run.model_path
    checkpoint = load_checkpoint(path) if path != "none" else _own_checkpoint(directory)
    step = checkpoint.step if checkpoint and path == "none" else 0
    _write_options(config, directory / ("opt.evaluate.log" if (directory / "checkpoint").exists() else "opt.log"))
    tokenizer = _load_reader_tokenizer(config)
    data = _open_data(config, config.run.eval_data, tokenizer)
    model = _build_model(config, device, checkpoint, tokenizer, training=False)
    retrieval = _build_retrieval(config, device, directory, model)
    if retrieval is not None and retrieval.index is None:
        retrieval.build()
    tensorboard = TensorBoard(directory)
    _evaluator(config, device, directory, model, retrieval, tensorboard, data)(step)
    tensorboard.close()
    log.info("Done: %s", _what_is_where(config, directory, step))
    return False


def train(config: Config, device: torch.device, directory: Path) -> bool:
    """`train.py` and `finetune_qa.py`: train, evaluate on the way, save; or go on where a run of this name stopped."""
    _refuse(config, device)
    path, training, optimisation = config.run.model_path, config.retriever_training, config.optimisation
    own = None if optimisation.restart else _own_checkpoint(directory)
    checkpoint = own or (load_checkpoint(path) if path != "none" else None)
    finished = own.step if own else 0
    if finished >= optimisation.total_steps:
        log.info("This run is finished: %s holds step %d. Begin anew with --restart.", directory, finished)
        return False
    _write_options(config, directory / "opt.log")
    tokenizer = _load_reader_tokenizer(config)
    data = _open_data(config, config.run.eval_data, tokenizer)
    training_data = _make_data(config, _open_corpus(config.run.train_data), tokenizer, training=True)
    _check_data(training_data)
    model = _build_model(config, device, checkpoint, tokenizer, training=True)
    optimizers = _optimizers(config, device, model)
    if own:
        log.info("Going on after step %d of %s", finished, own.path)
        optimizers.load_state(own.optimizer_state() or {})
        if own.examples is not None:
            training_data.resume(finished, own.examples)
    retrieval = _build_retrieval(config, device, directory, model)
    tensorboard = TensorBoard(directory)
    atlas = Atlas(
        model.reader,
        model.retriever,
        n_context=1 if config.model.closed_book else config.model.n_context,
        mode=MODES[training.gold_score_mode] if training.train_retriever else None,
        temperature_gold=training.temperature_gold,
        temperature_score=training.temperature_score,
        correlate=training.compute_crossattention_stats,
    )
    trainer = Trainer(
        atlas,
        optimizers,
        retrieval,
        model.inputs,
        training_data,
        _plan(config),
        device=device,
        precision=optimisation.precision,
        seed=config.run.seed,
        n_retrieve=config.model.retriever_n_context if config.retrieves else config.model.n_context,
        train_retriever=training.train_retriever,
        evaluate=_evaluator(config, device, directory, model, retrieval, tensorboard, data),
        save=partial(_save, config, directory, model, optimizers, retrieval, training_data),
        own_passages=config.model.use_file_passages,
        tensorboard=tensorboard,
    )
    if optimisation.restart and distributed.is_main() and (aside := set_aside(directory)):
        log.info("--restart: the checkpoints of the earlier run are in %s now", aside)
    if own and (encoder := own.index_encoder()) and not trainer.refresh_is_due(finished):
        retrieval.build_with(encoder)
    stopped = trainer.train(finished, evaluation_due=own is not None and own.evaluation_due)
    tensorboard.close()
    if not stopped:
        log.info("Done: %s", _what_is_where(config, directory, optimisation.total_steps))
    return stopped


@dataclass(frozen=True)
class _Model:
    """Both halves with their tokenizers; a half is None where this run does without it."""

    reader: FusionInDecoder | None
    retriever: DualEncoder | None
    inputs: Inputs
    # the retriever's weights and config, to be saved again, where this run does without it
    passed_on: dict[str, torch.Tensor]
    passed_on_config: dict[str, Any] | None


def _own_checkpoint(directory: Path) -> Checkpoint | None:
    """The latest checkpoint of this run: rank 0 looks for it, so that all go on from the same."""
    path = distributed.from_main(latest_checkpoint(directory) if distributed.is_main() else None)
    error, checkpoint = None, None
    if path is not None:
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as found:
            error = found
    distributed.raise_on_all_ranks(error)
    return checkpoint


def _write_options(config: Config, path: Path) -> None:
    if distributed.is_main():
        path.write_text(config.describe() + "\n", encoding="utf-8")


def _refuse(config: Config, device: torch.device) -> None:
    """What only the device or this version can tell. Raises: ValueError."""
    devices.check_precision(device, config.optimisation.precision, "--precision")
    devices.check_precision(device, _embedder_precision(config, device), "--embedder_precision")
    if config.optimisation.precision == "bf16" and device.type == "cpu" and not devices.cpu_prefers_bf16(device):
        log.warning("--precision bf16: this CPU only emulates it; --precision fp32 is many times as fast here")
    if config.tasks.task not in TASKS:
        raise ValueError(f"--task {config.tasks.task} is unknown: give one of {', '.join(TASKS)}")
    training = config.retriever_training
    if training.compute_crossattention_stats and not training.train_retriever:
        log.info("--compute_crossattention_stats has no effect without --train_retriever: there are no gold scores")
    if config.index.save_index_n_shards != Index.save_index_n_shards:
        log.info("--save_index_n_shards has no effect: an index of ours has no shards, any number of ranks opens it")
    ways = ("faiss_index_type", "faiss_code_size", "faiss_nlist", "faiss_train_size")
    unused = [f"--{name}" for name in ways if getattr(config.index, name) != getattr(Index, name)]
    if unused and config.index.index_mode == "flat":
        log.warning("Without --index_mode faiss there is no effect of %s", ", ".join(unused))
    if config.retrieves and config.model.n_context > config.model.retriever_n_context and config.run.train_data:
        log.warning(
            "--n_context %d is above --retriever_n_context %d: in training the reader reads the %d retrieved",
            config.model.n_context,
            config.model.retriever_n_context,
            config.model.retriever_n_context,
        )


def _load_reader_tokenizer(config: Config) -> ReaderTokenizer | None:
    """Before the data are looked at, because some tasks make their queries with it."""
    if config.model.retrieve_only and config.tasks.task not in TOKENIZING_TASKS:
        return None
    return load_reader_tokenizer(config.model.reader_model_type)


def _open_corpus(paths: tuple[str, ...]) -> JsonlCorpus:
    with distributed.main_first(f"opening {', '.join(paths)}"):  # rank 0 unpacks and finds the lines once
        return JsonlCorpus(paths)


def _make_data(config: Config, corpus: JsonlCorpus, tokenizer: ReaderTokenizer | None, *, training: bool) -> Data:
    task: Task = TASKS[config.tasks.task](
        **dataclasses.asdict(config.tasks),
        tokenizer=tokenizer,
        text_maxlength=config.model.text_maxlength,
        answers_needed=not config.model.retrieve_only,
        passages_needed=config.model.use_file_passages,
        training=training,
    )
    return Data(
        corpus,
        task,
        seed=config.run.seed,
        batch_size=config.run.per_gpu_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _open_data(config: Config, paths: tuple[str, ...], tokenizer: ReaderTokenizer | None) -> dict[str, Data]:
    """Evaluation data by the name of its file."""
    files = {}
    for path in paths:
        data = _make_data(config, _open_corpus((path,)), tokenizer, training=False)
        _check_data(data)
        files[evaluation_name(path)] = data
    return files


def _check_data(data: Data) -> None:
    """Find a bad line, and a file of which nothing is left, before anything expensive starts."""
    used = sum(distributed.gather_objects(_read_shares("reading the data", len(data), "lines", data.check)))
    name = ", ".join(map(str, data.corpus.paths))
    if used == 0:
        raise ValueError(f"{name}: nothing is left of it, because the task skips {data.task.skips}")
    if used < len(data):
        log.info("%s: %d of %d lines are skipped (%s)", name, len(data) - used, len(data), data.task.skips)


def _read_shares(what: str, n: int, unit: str, read: Callable[[range, Callable[[int], object]], T]) -> T | None:
    """Let each rank read its share of n rows, with a bar; an error of any rank ends all.

    Args:
        read: takes the rows and what is to be told how many more have been read.
    """
    error = result = None
    rows = shard_rows(n, distributed.rank(), distributed.world_size())
    try:
        with progress_bar(what, len(rows), unit) as bar:
            result = read(rows, lambda more: (bar.update(more), distributed.progress()))
    except ValueError as found:
        error = found
    distributed.wait_for_all(what)
    distributed.raise_on_all_ranks(error)
    return result


def _build_model(
    config: Config,
    device: torch.device,
    checkpoint: Checkpoint | None,
    reader_tokenizer: ReaderTokenizer | None,
    *,
    training: bool,
) -> _Model:
    with distributed.busy():  # ranks may read large files at very different speeds
        model = _load_model(config, device, checkpoint, reader_tokenizer, training=training)
    distributed.wait_for_all("loading the model")
    return model


def _load_model(
    config: Config,
    device: torch.device,
    checkpoint: Checkpoint | None,
    reader_tokenizer: ReaderTokenizer | None,
    *,
    training: bool,
) -> _Model:
    """Load configs, the retriever's tokenizer and weights; the weights come from the checkpoint where there is one."""
    dropout = config.optimisation.dropout
    reader = retriever = retriever_tokenizer = None
    passed_on: dict[str, torch.Tensor] = {}
    passed_on_config = None
    settings = {
        "pooling": config.model.retriever_pooling,
        "normalize": config.model.retriever_normalize,
        "query_prefix": config.model.retriever_query_prefix,
        "passage_prefix": config.model.retriever_passage_prefix,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    if not config.model.retrieve_only:
        weights = checkpoint is None or not checkpoint.reader
        reader = load_reader(
            config.model.reader_model_type,
            dropout=dropout,
            weights=weights,
            gradient_checkpointing=config.optimisation.use_gradient_checkpoint_reader,
        )
        if not weights:
            _load_half(load_reader_state, reader, checkpoint.reader, checkpoint)
        if training and config.optimisation.shard_grads and distributed.world_size() > 1:
            shard_weights(
                reader,
                reader.blocks,
                device,
                block_dtype=devices.compute_dtype(config.optimisation.precision),
                forward_methods=("encode",),
            )
            log.info("Each of %d ranks keeps its part of the reader", distributed.world_size())
        else:
            reader = reader.to(device)
        if not training and (dtype := devices.compute_dtype(config.optimisation.precision)):
            for block in reader.blocks:  # nothing is learnt: the numbers that are computed with are enough
                block.to(dtype)
    if config.retrieves:
        weights = checkpoint is None or not checkpoint.retriever
        retriever_tokenizer = load_retriever_tokenizer(config.model.retriever_model_path)
        retriever = load_retriever(
            config.model.retriever_model_path,
            query_side=config.retriever_training.query_side_retriever_training
            or (not weights and state_is_untied(checkpoint.retriever)),
            dropout=dropout,
            weights=weights,
            gradient_checkpointing=config.optimisation.use_gradient_checkpoint_retriever,
            overrides=settings if weights else checkpoint.retriever_config | settings,
        )
        if not weights:
            _load_half(load_retriever_state, retriever, checkpoint.retriever, checkpoint)
        retriever = retriever.to(device)
        if not (training and config.retriever_training.train_retriever):
            retriever.requires_grad_(False)
    elif checkpoint and checkpoint.retriever:
        passed_on = {f"retriever.{name}": tensor for name, tensor in checkpoint.retriever.items()}
        passed_on_config = checkpoint.retriever_config
    inputs = Inputs(
        reader_tokenizer,
        retriever_tokenizer,
        device=device,
        text_maxlength=config.model.text_maxlength,
        target_maxlength=config.model.target_maxlength,
        encoder_format=config.model.encoder_format,
        retriever_format=config.model.retriever_format,
        decoder_format=config.model.decoder_format,
        decoder_prompt_format=config.model.decoder_prompt_format,
        decoder_start_id=reader.config.decoder_start_token_id if reader is not None else 0,
        retriever_positions=retriever.max_length if retriever is not None else config.model.text_maxlength,
        query_prefix=retriever.query_prefix if retriever is not None else "",
        passage_prefix=retriever.passage_prefix if retriever is not None else "",
        pad_multiple=devices.pad_multiple(device),
    )
    return _Model(reader, retriever, inputs, passed_on, passed_on_config)


def _load_half(load: Callable, module: torch.nn.Module, state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    try:
        load(module, state)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def _embedder_precision(config: Config, device: torch.device) -> str:
    return devices.embedder_precision(device, config.run.embedder_precision)


def _build_retrieval(config: Config, device: torch.device, directory: Path, model: _Model) -> Retrieval | None:
    """With the index opened, if there is a saved one; else it is still to be built."""
    if not config.retrieves:
        return None
    settings, training = config.index, config.retriever_training
    compression = _compression(config)
    wanted = compression.factory(1, model.retriever.dim)  # refuses what cannot be made, before anything is embedded
    index = None
    if settings.load_index_path is not None:
        with ProgressBars() as progress:
            index = open_index(
                Path(settings.load_index_path),
                device=device,
                dimension=model.retriever.dim,
                retriever_fingerprint=fingerprint(model.retriever.passage_encoder),
                converted=directory / "index",
                compression=compression,
                progress=progress,
            )
        passages = index.passages
        log.info("Opened the index %s: %d passages", settings.load_index_path, len(passages))
    else:
        passages = _open_passages(settings.passages, settings.max_passages)
    kind, codes_only = index.type if index else wanted, settings.save_index_codes_only
    if settings.refine_factor > 1 and kind == "flat":
        log.info("--refine_factor has no effect: the search of a flat index is exact")
    if settings.faiss_nprobe is not None and "IVF" not in kind:
        log.info("--faiss_nprobe has no effect: an index of type %s has no lists", kind)
    if codes_only and settings.save_index_path is not None and kind == "flat":
        raise ValueError(
            "--save_index_codes_only: a flat index has no codes; ask for --index_mode faiss, or leave it out"
        )
    retrieval = Retrieval(
        model.retriever,
        model.inputs,
        passages,
        device=device,
        embedder_precision=_embedder_precision(config, device),
        embedder_batch_size=config.run.per_gpu_embedder_batch_size,
        rerank=training.n_to_rerank_with_retrieve_with_rerank if training.retrieve_with_rerank else 0,
        overretrieve=training.filtering_overretrieve_ratio,
        compression=compression,
        retrain=settings.faiss_retrain,
        keep_embeddings=settings.save_index_path is not None and not codes_only,
    )
    retrieval.index = index
    retrieval.keep_builder = training.train_retriever and not model.retriever.query_side
    if settings.save_index_path is not None:
        save = partial(save_index, Path(settings.save_index_path), codes_only=codes_only)
        retrieval.on_build = lambda built: save(
            built, retriever_fingerprint=fingerprint(model.retriever.passage_encoder)
        )
        if index is not None and index.type != index.stored.description.type:  # of another kind than what was loaded
            save(index, retriever_fingerprint=index.stored.description.retriever)
            log.info("Saved the index %s, of type %s", settings.save_index_path, index.type)
        elif index is not None:
            log.info("--save_index_path: an index that is loaded is saved only when it is built anew")
    return retrieval


def _compression(config: Config) -> Compression:
    settings = config.index
    return Compression(
        kind=settings.faiss_index_type if settings.index_mode == "faiss" else None,
        code_size=settings.faiss_code_size,
        nlist=settings.faiss_nlist,
        nprobe=settings.faiss_nprobe,
        train_size=settings.faiss_train_size,
        seed=config.run.seed,
        refine_factor=settings.refine_factor,
    )


def _open_passages(paths: tuple[str, ...], max_passages: int) -> JsonlCorpus:
    """The corpus, every line of which has been read once: each rank looks at its share."""
    with distributed.main_first(f"opening {', '.join(paths)}"):
        passages = open_passages(paths, max_passages)
    if len(passages) == 0:
        raise ValueError(f"--passages {' '.join(paths)}: there is no passage in it")
    hashes = _read_shares("reading the corpus", len(passages), "passages", partial(check_passages, passages))
    if of_ranks := distributed.gather_on_main(hashes):
        duplicates = count_duplicates(np.concatenate(of_ranks))
        if duplicates:
            log.warning("%d passages have an id that another passage before them has", duplicates)
    return passages


def _optimizers(config: Config, device: torch.device, model: _Model) -> Optimizers:
    settings = config.optimisation
    groups = {"reader": (_trained(model.reader), settings.lr)}
    if model.retriever is not None:
        groups["retriever"] = (_trained(model.retriever), settings.lr_retriever)
    return Optimizers(
        groups,
        weight_decay=settings.weight_decay,
        epsilon=settings.epsilon,
        beta2=settings.beta2,
        clip=settings.clip,
        scheduler=settings.scheduler,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.scheduler_steps or settings.total_steps,
        loss_scaling=settings.precision == "fp16",
        shard=settings.shard_optim and distributed.world_size() > 1,
    )


def _trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _plan(config: Config) -> Plan:
    return Plan(
        total_steps=config.optimisation.total_steps,
        accumulation_steps=config.optimisation.accumulation_steps,
        log_freq=config.run.log_freq,
        eval_freq=config.run.eval_freq,
        save_freq=config.run.save_freq,
        freeze_retriever_steps=config.retriever_training.freeze_retriever_steps,
        shuffle=config.run.shuffle,
        refresh=refresh_schedule(config.index.refresh_index),
    )


def _evaluator(
    config: Config,
    device: torch.device,
    directory: Path,
    model: _Model,
    retrieval: Retrieval | None,
    tensorboard: TensorBoard,
    files: dict[str, Data],
) -> Callable[[int], None]:
    """A function that evaluates every file after a step."""
    evaluator = Evaluator(
        model.reader,
        retrieval,
        model.inputs,
        device=device,
        precision=config.optimisation.precision,
        n_context=config.model.n_context,
        own_passages=config.model.use_file_passages,
        generation={
            "max_length": config.model.generation_max_length,
            "min_length": config.model.generation_min_length,
            "num_beams": config.model.generation_num_beams,
            "length_penalty": config.model.generation_length_penalty,
        },
        results=directory if config.run.write_results else None,
        write_passages=not config.run.dont_write_passages,
        tensorboard=tensorboard,
    )

    def evaluate_all(step: int) -> None:
        for name, data in files.items():
            evaluator.evaluate(name, data, step)

    return evaluate_all


def _save(
    config: Config,
    directory: Path,
    model: _Model,
    optimizers: Optimizers,
    retrieval: Retrieval | None,
    data: Data,
    step: int,
    *,
    evaluation_due: bool,
) -> None:
    """Rank 0 writes what it has or gathers, the others wait for it."""
    halves = {name: half for name, half in vars(model).items() if name in ("reader", "retriever") and half}
    weights = {f"{half}.{name}": p.detach() for half, part in halves.items() for name, p in part.named_parameters()}
    weights, moments = full_tensors_on_main(weights), optimizers.state()
    if distributed.is_main():
        configs = {"retriever": model.passed_on_config} if model.passed_on_config else {}
        if model.reader is not None:
            configs["reader"] = model.reader.config.to_dict()
        if model.retriever is not None:
            configs["retriever"] = model.retriever.passage_encoder.config.to_dict()
        with distributed.busy():
            path = save_checkpoint(
                directory,
                step,
                model=model.passed_on | weights,
                optimizer=moments,
                index_encoder=retrieval.built_by if retrieval is not None else None,
                options=dataclasses.asdict(config),
                configs=configs,
                examples=data.examples_after(step),
                evaluation_due=evaluation_due,
                keep_optimizers=config.optimisation.save_optimizer,
                keep_checkpoints=config.optimisation.keep_checkpoints,
            )
        log.info("Saved %s", path)
    distributed.wait_for_all("saving")


def _what_is_where(config: Config, directory: Path, step: int) -> str:
    """The last line of a run: where to look."""
    places = [f"log in {directory / 'run.log'}"]
    if config.run.train_data and (latest := latest_checkpoint(directory)):
        places.append(f"model in {directory / 'checkpoint' / latest.name}")
    if config.run.write_results:
        names = map(evaluation_name, config.run.eval_data)
        places += [f"results in {directory / f'{name}-step-{step}.jsonl'}" for name in names]
    return ", ".join(places)
