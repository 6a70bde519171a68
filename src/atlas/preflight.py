"""What only a run can check: what the device can compute, which tasks there are, which flags have no effect.

The bounds of a flag are beside its default in `config.py`, and combinations of flags are checked there when the command
line is read. `retrieval.py` adds what depends on the kind of an index that was saved.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atlas.config import (
    FIELDS,
    OF_THE_JUDGEMENT,
    OF_THE_MODEL,
    TASK_NAMES,
    TOKENIZING_TASKS,
    Config,
    Index,
    Model,
    say,
)
from atlas.model.inputs import Inputs
from atlas.model.prompts import PromptInputs
from atlas.model.signals import MODES, PROMPT_MODES
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import log, read_shares
from atlas.tasks import TASKS
from atlas.tasks.data import Data

if TYPE_CHECKING:
    from atlas.model.tokenization import AnyReaderTokenizer


# Flags that have no effect where nothing is retrieved, generated, trained, or learnt by the retriever.
SEARCHED = (
    *("passages", "load_index_path", "allow_other_index", "save_index_path", "index_mode", "faiss_nprobe"),
    *("refine_factor", "per_gpu_embedder_batch_size", "retriever_format", "retrieve_with_rerank", "rerank_by_reader"),
    *("bm25_weight", "leave_out_own_passage", "train_retriever"),
)
GENERATING = (
    *("generation_min_length", "generation_num_beams", "generation_length_penalty", "decoder_format"),
    "decoder_prompt_format",
)
OF_TASKS = {
    "mlm": ("mlm_noise_density", "mlm_mean_noise_span_length"),
    "lm": ("min_lm_context_ratio", "max_lm_context_ratio"),
    "multiple_choice": tuple(name for name in FIELDS if name.startswith("multiple_choice_")),
}
OF_TRAINING = (
    *("train_data", "shuffle", "save_freq", "eval_freq", "log_freq", "restart", "retriever_n_context"),
    *("train_retriever", "query_side_retriever_training", "temperature_score", "freeze_retriever_steps"),
    *("freeze_reader", "in_batch_negatives"),
    *("total_steps", "warmup_steps", "scheduler", "scheduler_steps", "lr", "lr_retriever", "optimizer"),
    *("offload_optimizer", "weight_decay", "epsilon", "beta2", "clip", "dropout", "accumulation_steps"),
    *("frozen_precision", "shard_optim", "shard_grads", "save_optimizer", "keep_checkpoints"),
    *("use_gradient_checkpoint_reader", "use_gradient_checkpoint_retriever", "gradient_checkpoint_every"),
)
OF_DISTILLATION = (
    *("lr_retriever", "temperature_score", "freeze_retriever_steps", "in_batch_negatives"),
    "use_gradient_checkpoint_retriever",
)


def check(config: Config, device: torch.device) -> None:
    """Refuse what cannot work here, and report flags without effect. Raises: ValueError."""
    embedder_precision = devices.embedder_precision(device, config.run.embedder_precision)
    n, backend = distributed.world_size(), "gloo and NCCL" if device.type == "cuda" else "gloo"
    log.info(
        "%s on %s, torch %s, --precision %s, --embedder_precision %s",
        f"{n} processes ({backend}), each" if n > 1 else "One process",
        devices.describe(device),
        torch.__version__,
        config.optimisation.precision,
        embedder_precision,
    )
    devices.check_precision(device, config.optimisation.precision, "--precision")
    devices.check_precision(device, embedder_precision, "--embedder_precision")
    devices.set_matmul_precision(config.optimisation.precision)
    if config.optimisation.precision == "bf16" and device.type == "cpu" and not devices.cpu_prefers_bf16(device):
        log.warning("--precision bf16: this CPU only emulates it; --precision fp32 is many times as fast here")
    if config.tasks.task not in TASKS:
        raise ValueError(f"--task {config.tasks.task} is unknown: give one of {', '.join(TASKS)}")
    if config.model.retrieves and config.index.bm25_weight and find_spec("bm25s") is None:
        raise ValueError(f"--bm25_weight {config.index.bm25_weight:g} needs bm25s: pip install atlas-retrieval[bm25]")
    if config.optimisation.optimizer == "adafactor" and config.optimisation.shard_grads and n > 1:
        raise ValueError(
            "--optimizer adafactor needs whole matrices, and --shard_grads cuts them: use --no-shard_grads (with "
            "--shard_optim), or --optimizer adamw8bit"
        )
    for line in config.origins():
        log.info("%s", line)
    _report_without_effect(config, device)


def check_reader(config: Config, tokenizer: "AnyReaderTokenizer | None") -> None:
    """Refuse what a decoder-only reader cannot do, and report the flags that are for the other kind of reader.

    Raises:
        ValueError: a task or a gold-score mode that needs T5.
    """
    if tokenizer is None:
        return
    fuses, learning = tokenizer.fuses, config.retriever_training
    of_prompts = ("reader_prompt_format", "passage_format", "chat_template", "cache_judgements")
    for name in of_prompts if fuses else ("encoder_format",):
        if config.flags()[name] != FIELDS[name].default:
            log.info("--%s has no effect: it is for a %s reader", name, "decoder-only" if fuses else "T5")
    if fuses and config.model.reranked:
        raise ValueError(
            f"--rerank_by_reader {config.model.rerank_by_reader} needs a decoder-only language model, which gives a "
            "question behind a passage a likelihood: leave it out, or give 0"
        )
    if fuses and config.judges and learning.gold_score_mode not in MODES:
        raise ValueError(
            f"--gold_score_mode {learning.gold_score_mode} needs a decoder-only language model, which gives a question "
            f"behind a passage a likelihood: give one of {', '.join(MODES)}"
        )
    if fuses:
        return
    reader = f"--reader_model_type {config.model.reader_model_type} is a decoder-only language model"
    if config.tasks.task in TOKENIZING_TASKS:
        raise ValueError(f"--task {config.tasks.task} needs the `<extra_id_0>` of T5, and {reader}: give another task")
    if config.judges and learning.gold_score_mode not in PROMPT_MODES:
        raise ValueError(
            f"--gold_score_mode {learning.gold_score_mode} looks at T5's cross-attention, and {reader}: give one of "
            f"{', '.join(PROMPT_MODES)}"
        )
    if learning.compute_crossattention_stats:
        raise ValueError(f"--compute_crossattention_stats looks at T5's cross-attention, and {reader}: leave it out")


def check_start(start: Path, directory: Path) -> None:
    """Raises: ValueError if `--restart` sets aside, in the run's directory, the checkpoint that it starts from."""
    if (directory / "checkpoint").resolve() in start.resolve().parents:
        raise ValueError(
            f"--restart sets {start} aside, from which --model_path starts: give the new run another --name, or leave "
            "out --restart"
        )


def report_plan(config: Config) -> None:
    """Warn of a training in which something never comes."""
    training, optimisation = config.retriever_training, config.optimisation
    total, warmup, frozen = optimisation.total_steps, optimisation.warmup_steps, training.freeze_retriever_steps
    steps, flag = total, "total_steps"
    if optimisation.scheduler_steps is not None and optimisation.scheduler_steps < total:
        steps, flag = optimisation.scheduler_steps, "scheduler_steps"
    if warmup > steps:
        log.warning("--warmup_steps %d is above --%s %d: the learning rate is never reached", warmup, flag, steps)
    if training.train_retriever and frozen >= total:
        log.warning("--freeze_retriever_steps %d, --total_steps %d: the retriever never learns", frozen, total)
    if training.in_batch_negatives and config.run.per_gpu_batch_size * distributed.world_size() == 1:
        log.warning("--in_batch_negatives with a batch of one question: there is no other question")
    index = config.index
    loaded, saved = (path and os.path.realpath(path) for path in (index.load_index_path, index.save_index_path))
    if loaded is not None and loaded == saved and training.moves_passages and index.refresh_index.strip() != "-1":
        log.warning(
            "--save_index_path is the index of --load_index_path: once it is refreshed, a run that is resumed from an "
            "earlier step finds a newer index than it had; save to another directory to keep the old one"
        )
    if training.moves_passages and index.refresh_index.strip() == "-1" and frozen < total:
        log.warning(
            "--train_retriever: the passage encoder learns, and with --refresh_index -1 the corpus is embedded only at "
            "the start, so the index grows old: give --refresh_index N, or --query_side_retriever_training"
        )
    if training.train_retriever and config.model.retriever_n_context == 1:
        log.warning("--retriever_n_context 1: the retriever learns nothing from ranking a single passage")


def report_no_checkpoint(config: Config) -> None:
    """Say that models are evaluated as they come, if any takes part."""
    model = config.model
    embeds = model.retrieves and config.index.evaluates_by_embeddings
    names = [model.reader_model_type] * model.uses_reader + [model.retriever_model_path] * embeds
    if names:
        log.warning(
            "No checkpoint is evaluated, but %s as %s: there is no --model_path, and no run %s",
            " and ".join(names),
            "they come" if len(names) > 1 else "it comes",
            Path(config.run.checkpoint_dir) / config.run.name,
        )


def report_differences(
    config: Config, options: Mapping[str, Any], source: str, resumed: bool = False, names: Iterable[str] = OF_THE_MODEL
) -> None:
    """Warn, in one line, of flags that differ from those of the checkpoint that a run starts from.

    Args:
        options: those of the checkpoint, flag -> value.
        source: which checkpoint.
        resumed: whether it is of the same run. Then all flags are compared, else those of the names.
    """
    differing = config.differences(options, FIELDS if resumed else names)
    here, there = ("now", "before") if resumed else ("here", "there")
    parts = [f"--{name} {say(of_run)} ({there}: {say(saved)})" for name, (of_run, saved) in differing.items()]
    if resumed and (unknown := [f"--{name} {say(options[name])}" for name in options.keys() - FIELDS.keys()]):
        parts.append(f"without {', '.join(sorted(unknown))}, which this version does not know")
    if parts and resumed:
        log.warning("The run is resumed with other flags than %s was saved with: %s", source, ", ".join(parts))
    elif parts:
        log.warning("%s was trained with other flags, and this run uses its own: %s", source, ", ".join(parts))


def check_prompts(settings: Model, tokenizer: "AnyReaderTokenizer | None", files: Mapping[str, Data]) -> None:
    """Refuse a `--decoder_prompt_format` that leaves no room for an answer. Collective.

    Args:
        tokenizer: the reader's.
        files: what answers are generated for.

    Raises:
        ValueError: names the first line whose prompt is too long.
    """
    if settings.decoder_prompt_format is None or settings.retrieve_only:
        return
    for data in files.values():
        read_shares("reading the prompts", len(data), "lines", partial(_check_prompts_of, data, settings, tokenizer))


def _check_prompts_of(
    data: Data,
    settings: Model,
    tokenizer: "AnyReaderTokenizer",
    lines: range,
    read: Callable[[int], object],
) -> None:
    longest = settings.generation_max_length - 2  # the decoder's start token, and at least one of the answer
    inputs = (Inputs if tokenizer.fuses else PromptInputs)(settings, tokenizer, None, device=torch.device("cpu"))
    for line in lines:
        place = line * data.task.examples_per_line
        example = data.example(place, epoch=0)
        if example is not None and (n := len(inputs.prompts([example.query])[0])) > longest:
            raise ValueError(
                f"{data.corpus.where(data.line(place))}: the prompt by --decoder_prompt_format has {n} tokens, "
                "which leaves no room for an answer: raise --generation_max_length to more than "
                f"{n + 1}, or shorten the prompt"
            )
        read(1)


def _report_without_effect(config: Config, device: torch.device) -> None:
    training, index, model = config.retriever_training, config.index, config.model
    if training.compute_crossattention_stats and not training.train_retriever:
        log.info("--compute_crossattention_stats has no effect without --train_retriever: there are no gold scores")
    if index.save_index_n_shards != Index.save_index_n_shards:
        log.info("--save_index_n_shards has no effect: our format has no shards, any number of ranks opens an index")
    reasons: dict[str, str] = {}  # flag -> where it has no effect
    for name, has_effect, without in (*_of_passages(config), *_of_training(config, device)):
        if name in config.origin.given and not has_effect:
            reasons.setdefault(name, without)
    for without in dict.fromkeys(reasons.values()):
        flags = [f"--{name}" for name, reason in reasons.items() if reason == without]
        log.info("%s %s no effect %s", ", ".join(flags), "has" if len(flags) == 1 else "have", without)
    if model.retrieves and not config.run.train_data and not index.evaluates_by_embeddings:
        log.info("--bm25_weight 1: BM25 alone ranks the passages, nothing is embedded to be compared")
    ways = ("faiss_index_type", "faiss_code_size", "faiss_nlist", "faiss_train_size")
    unused = [f"--{name}" for name in ways if getattr(index, name) != getattr(Index, name)]
    if unused and index.index_mode == "flat":
        log.warning("Without --index_mode faiss there is no effect of %s", ", ".join(unused))
    if model.retrieves and model.n_context > model.retriever_n_context and config.run.train_data:
        log.warning(
            "--n_context %d is above --retriever_n_context %d: in training the reader reads the %d retrieved",
            model.n_context,
            model.retriever_n_context,
            model.retriever_n_context,
        )


def _of_passages(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Flags of what is retrieved, read and written: name, whether it has an effect, and where it has none."""
    index, model, trains = config.index, config.model, bool(config.run.train_data)
    bm25 = index.bm25_weight > 0
    embeds = model.retrieves and (index.load_index_path is None or index.refresh_index.strip() != "-1")
    reads_passages = not (model.closed_book or model.retrieve_only)
    writes_passages = config.run.write_results and not config.run.dont_write_passages
    for name in SEARCHED:
        yield name, model.retrieves, "where nothing is retrieved"
    saved = "with --load_index_path: all of the saved passages are used (update_index.py changes them)"
    for name in ("passages", "max_passages"):
        yield name, index.load_index_path is None, saved
    tokenizes = model.uses_reader or config.tasks.task in TOKENIZING_TASKS
    yield "reader_model_type", tokenizes, "with --retrieve_only"
    for name in ("encoder_format", "target_maxlength", "generation_max_length"):
        yield name, model.uses_reader, "with --retrieve_only"
    for name in GENERATING:
        yield name, not model.retrieve_only, "with --retrieve_only"
    yield "dont_write_passages", config.run.write_results, "without --write_results"
    evidence = "without passages that are read, and --write_results"
    yield "write_evidence", reads_passages and writes_passages, evidence
    yield "metric_unicode", bool(config.run.eval_data) and not model.retrieve_only, "where no answers are compared"
    yield "cache_passage_tokens", embeds, "where no corpus is embedded"
    yield "bm25_steps", bm25 and trains, "without --bm25_weight, nor in evaluate.py"
    for name in ("k1", "b", "stopwords"):
        yield f"bm25_{name}", bm25, "without --bm25_weight"
    yield "save_index_codes_only", index.save_index_path is not None, "without --save_index_path"
    yield "generation_length_penalty", model.generation_num_beams > 1, "without more --generation_num_beams"


def _of_training(config: Config, device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """The same for flags of tasks, and of what learns, and how."""
    training, optimisation, trains = config.retriever_training, config.optimisation, bool(config.run.train_data)
    checkpoints = optimisation.use_gradient_checkpoint_reader or optimisation.use_gradient_checkpoint_retriever
    for task, names in OF_TASKS.items() if config.tasks.task in TASK_NAMES else ():  # tasks of users may use all
        for name in names:
            yield name, config.tasks.task == task, f"without --task {task}"
    for name in OF_TRAINING:
        yield name, trains, "in evaluate.py, which does not train"
    yield "int8_reader", config.model.uses_reader and not trains, "in training, nor without a reader"
    for name in OF_DISTILLATION:
        yield name, training.train_retriever, "without --train_retriever"
    for name in OF_THE_JUDGEMENT:
        used = config.run.write_evidence or (trains and training.train_retriever)
        yield name, used, "without --train_retriever or --write_evidence"
    yield "n_to_rerank_with_retrieve_with_rerank", training.retrieve_with_rerank, "without --retrieve_with_rerank"
    yield "refresh_index", trains and training.moves_passages, "where the passage encoder does not learn"
    judges = config.model.reranked > 0 or config.run.write_evidence
    if trains:
        judges = training.train_retriever and training.freeze_reader
    yield "cache_judgements", judges, "where no reader that does not learn judges passages"
    yield "gold_question_weight", training.gold_score_mode == "question", "without --gold_score_mode question"
    yield "shard_grads", not training.freeze_reader, "with --freeze_reader: the reader has no gradients to share"
    yield "use_gradient_checkpoint_reader", not training.freeze_reader, "with --freeze_reader"
    for prefix in ("lora", "retriever_lora"):
        yield f"{prefix}_rank", trains, "in an evaluation: the adapters of a checkpoint are always used"
        for name in ("alpha", "dropout", "targets"):
            yield f"{prefix}_{name}", getattr(optimisation, f"{prefix}_rank") > 0, f"without --{prefix}_rank"
    yield "gradient_checkpoint_every", checkpoints, "without --use_gradient_checkpoint_reader or _retriever"
    yield "offload_optimizer", device.type != "cpu", "on the CPU: the moments are in its memory"
    for name in ("epsilon", "beta2"):
        yield name, not trains or optimisation.optimizer != "adafactor", "with --optimizer adafactor"
