"""What cannot work is refused before anything is loaded: which flag, what was found, what to do.

Only the standard library is imported here, so that a wrong flag is answered at once. `preflight` checks what only a run
can know.
"""

import math
import os
import re
import string
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atlas.config import (
    BOUNDS,
    FIELDS,
    LARGEST,
    REPORTERS,
    TASK_NAMES,
    TOKENIZING_TASKS,
    Config,
    Index,
    Optimisation,
    RetrieverTraining,
    Run,
    Tasks,
    evaluation_name,
    refresh_schedule,
)
from atlas.options import find_checkpoint, read_options


def check(config: Config, program: str, runs_here: bool = True) -> None:
    """Refuse what cannot work, naming the flag, what was found and what to do. Raises ValueError."""
    flags = config.flags()
    for name in sorted(flags, key=config.origin.given.__contains__, reverse=True):  # others may be computed of those
        check_value(name, flags[name])
    training = program not in ("evaluate", "ask")
    if runs_here:
        _check_files(config, None if program == "ask" else "train_data" if training else "eval_data")
    _check_combinations(config, training)
    if training:
        _check_adapters(config.optimisation, config.retriever_training)
    _check_generation(config, program)
    _check_index(config.index)
    _check_tasks(config.tasks)
    _check_reporters(config.run)
    if program == "finetune_qa":
        _check_few_steps(config)


def check_value(name: str, value: Any) -> None:
    """Refuse a value that a flag cannot have, whatever the others are. Raises ValueError."""
    limits = FIELDS[name].metadata
    if isinstance(value, str) and not value.strip() and not limits["blank"]:
        raise ValueError(f"--{name} is empty: give a value, or leave the flag out")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_bounds(name, value, limits["bounds"])
    if isinstance(value, str) and limits["fields"]:
        _check_format(name, value, limits["fields"].split(), limits["constant"])


def _check_bounds(name: str, value: float, bounds: dict[str, float]) -> None:
    for bound, limit in (bounds if isinstance(value, float) else {"most": LARGEST} | bounds).items():
        holds, sentence = BOUNDS[bound]
        if not holds(value, limit):
            size = "too large" if bound in ("most", "below") and value >= limit else "too small"
            raise ValueError(f"--{name} {_number(value)} is {size}: {sentence} {_number(limit)}")
    if not math.isfinite(value):
        raise ValueError(f"--{name} {value} is not finite: give a number")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_combinations(config: Config, training: bool) -> None:
    model, task = config.model, config.tasks.task
    if model.target_maxlength == 0:
        raise ValueError("--target_maxlength 0 leaves no target: leave the flag out, or use -1, for no truncation")
    if task is None:
        raise ValueError(f"--task is missing: give one of {', '.join(TASK_NAMES)}")
    if model.retrieve_only and training:
        raise ValueError("--retrieve_only cannot be trained with: use evaluate.py, or leave the flag out")
    if model.closed_book and model.use_file_passages:
        raise ValueError("--closed_book and --use_file_passages exclude each other: leave one out")
    if model.retrieve_only and not model.retrieves:
        raise ValueError("--retrieve_only needs an index: leave out --closed_book and --use_file_passages")
    if model.reader_model_type is None and model.uses_reader:
        raise ValueError(
            "--reader_model_type is missing: give the hub id or directory of a T5 or a language model"
            + _reader_of(config.run.model_path, training)
        )
    if model.reader_model_type is None and task in TOKENIZING_TASKS:
        raise ValueError(f"--reader_model_type is missing: --task {task} makes its queries with the reader's tokenizer")
    if training:
        _check_frozen_reader(config.retriever_training)
    _check_question_mode(config)
    if config.run.qrels and not model.retrieves:
        raise ValueError(
            "--qrels judges what is retrieved: leave out --closed_book and --use_file_passages, or --qrels"
        )
    if model.retrieves and not config.index.passages and config.index.load_index_path is None:
        raise ValueError("give the corpus with --passages, or a saved index with --load_index_path")


def _reader_of(model_path: str, training: bool) -> str:
    """Where the name of a reader may be found, as the end of a sentence."""
    checkpoint = find_checkpoint(Path(model_path)) if model_path != "none" else None
    name = read_options(checkpoint).get("reader_model_type") if checkpoint else None
    if name:
        return f" ({model_path} has that of {name})"
    return "" if training else ", or a --model_path or --name whose checkpoint says it"


def _check_question_mode(config: Config) -> None:
    """Raises: ValueError if passages would not be judged by the question behind them."""
    prompt, learning, model = config.model.reader_prompt_format, config.retriever_training, config.model
    asks = {
        "--gold_score_mode question": config.judges and learning.gold_score_mode == "question",
        f"--rerank_by_reader {model.rerank_by_reader}": model.reranked > 0,
    }
    for flag_name in (name for name, is_asked in asks.items() if is_asked):
        passages, query = prompt.find("{passages"), prompt.rfind("{query")
        if not -1 < passages < query:
            raise ValueError(
                f"--reader_prompt_format {prompt!r}: {flag_name} needs {{passages}} and {{query}} in this order"
            )


def _check_frozen_reader(learning: RetrieverTraining) -> None:
    """Raises: ValueError if nothing would learn in some steps."""
    if learning.freeze_reader and not learning.train_retriever:
        raise ValueError("--freeze_reader leaves nothing that learns: give --train_retriever, and passages to retrieve")
    if learning.freeze_reader and learning.freeze_retriever_steps > 0:
        raise ValueError(
            f"--freeze_retriever_steps {learning.freeze_retriever_steps} with --freeze_reader: nothing learns in these "
            "steps, so leave one out"
        )


def _check_adapters(optimisation: Optimisation, learning: RetrieverTraining) -> None:
    for name in ("lora_targets", "retriever_lora_targets"):
        targets = getattr(optimisation, name)
        if not re.fullmatch(r"\w+(,\w+)*", targets):
            raise ValueError(f"--{name} {targets!r}: expected all, or names of linear layers such as q,v")
    for name in ("lora_rank", "retriever_lora_rank"):
        if (rank := getattr(optimisation, name)) and find_spec("peft") is None:
            raise ValueError(f"--{name} {rank} needs peft: pip install atlas-retrieval[lora]")
    if optimisation.lora_rank and learning.freeze_reader:
        raise ValueError(
            f"--lora_rank {optimisation.lora_rank} trains the reader, and --freeze_reader does not: leave one out"
        )
    if optimisation.retriever_lora_rank and not learning.trains_query_side:
        raise ValueError(
            f"--retriever_lora_rank {optimisation.retriever_lora_rank} is for training the query encoder alone: give "
            "--train_retriever and --query_side_retriever_training, or leave it out"
        )
    if optimisation.frozen_precision == "bf16" and not optimisation.lora_rank:
        raise ValueError("--frozen_precision bf16 needs --lora_rank: without adapters all of the reader is trained")
    if optimisation.frozen_precision == "bf16" and optimisation.precision != "bf16":
        raise ValueError(
            f"--frozen_precision bf16 cannot be computed with in --precision {optimisation.precision}: use "
            "--precision bf16, or --frozen_precision fp32"
        )


def _check_files(config: Config, needed: str | None) -> None:
    run, index = config.run, config.index
    if needed and not getattr(run, needed):
        raise ValueError(f"--{needed} is missing: give at least one jsonl file")
    passages = index.passages if index.load_index_path is None else ()
    files = {"train_data": run.train_data, "eval_data": run.eval_data, "qrels": run.qrels, "passages": passages}
    for name, paths in files.items():
        for path in paths:
            if not os.path.isfile(path):  # Path.is_file raises an error for names that are too long
                made = " (preprocessing/prepare_corpus.py makes a corpus of documents)" if name == "passages" else ""
                found = f"{path} is a directory{made}" if os.path.isdir(path) else f"there is no file {path}"
                raise ValueError(f"--{name}: {found}")
    for name, path in (("load_index_path", index.load_index_path), ("model_path", run.model_path)):
        if path not in (None, "none") and not os.path.isdir(path):
            found = f"{path} is a file" if os.path.isfile(path) else f"there is no directory {path}"
            raise ValueError(f"--{name}: {found}")
    _check_directory(run)
    if index.save_index_path is not None and os.path.isfile(index.save_index_path):
        raise ValueError(f"--save_index_path {index.save_index_path} is a file: give a directory, new or of an index")
    if run.qrels and len(run.qrels) != len(run.eval_data):
        raise ValueError(
            f"--qrels has {len(run.qrels)} files and --eval_data {len(run.eval_data)}: give one of judgements for each "
            "one of data, in the same order"
        )
    names = [evaluation_name(path) for path in run.eval_data]
    for name in set(names):
        if names.count(name) > 1:
            raise ValueError(f"--eval_data: two files are called {name}; their results would overwrite each other")


def _check_directory(run: Run) -> None:
    """Refuse a --name that would lead out of --checkpoint_dir, and files in the way. Raises ValueError."""
    path = os.path.normpath(run.name)
    if os.path.isabs(path) or path.split(os.sep)[0] in (os.curdir, os.pardir):
        raise ValueError(f"--name {run.name} is not a directory inside --checkpoint_dir: give a name such as my_run")
    directory = Path(run.checkpoint_dir, path)
    existing = next(part for part in (directory, *directory.parents, Path()) if os.path.lexists(part))
    if not os.path.isdir(existing):
        raise ValueError(f"{existing} is not a directory: give another --checkpoint_dir or --name")


def _check_reporters(run: Run) -> None:
    names = [name.strip() for name in run.report_to.split(",")]
    for name in names:
        if name not in REPORTERS and name != "none":
            raise ValueError(f"--report_to {name!r} is unknown: give some of {', '.join(REPORTERS)}, or none")
    if run.reporters and "none" in names:
        raise ValueError(f"--report_to {run.report_to}: none stands alone")


def check_installed(run: Run, asked: bool) -> None:
    """Refuse a library that was asked for and is not there; the default one may be missing. Raises ValueError."""
    for name in run.reporters:
        # a directory that is called so, such as `wandb` leaves behind, is found as well, but has no origin
        if asked and getattr(find_spec(name), "origin", None) is None:
            raise ValueError(f"--report_to {name}: it is not installed here: {REPORTERS[name]}, or leave it out")


def _check_generation(config: Config, program: str) -> None:
    """Refuse lengths that leave no answer. Raises ValueError."""
    most, least = config.model.generation_max_length, config.model.generation_min_length
    if most < 2 and (config.run.eval_data or program == "ask") and not config.model.retrieve_only:
        raise ValueError(f"--generation_max_length {most} is the start token alone: give the length of an answer")
    if least is not None and least > most:
        raise ValueError(
            f"--generation_min_length {least} is above --generation_max_length {most}: "
            "lower the first or raise the second"
        )


def _check_index(index: Index) -> None:
    if index.max_passages == 0:
        raise ValueError("--max_passages 0 leaves no passage: leave the flag out, or use -1, for all")
    if index.index_mode == "faiss" and index.faiss_index_type in ("pq", "ivfpq") and index.faiss_code_size is None:
        raise ValueError(f"--faiss_index_type {index.faiss_index_type} needs --faiss_code_size (bytes per passage)")
    refresh_schedule(index.refresh_index)


def _check_tasks(tasks: Tasks) -> None:
    if tasks.min_lm_context_ratio > tasks.max_lm_context_ratio:
        raise ValueError(
            f"--min_lm_context_ratio {tasks.min_lm_context_ratio:g} is above "
            f"--max_lm_context_ratio {tasks.max_lm_context_ratio:g}: lower the first or raise the second"
        )
    for name in ("multiple_choice_train_permutations", "multiple_choice_eval_permutations"):
        if getattr(tasks, name) == "all" and tasks.multiple_choice_num_options > 6:
            raise ValueError(f"--{name} all is for at most 6 options, which have 720 orders: use cyclic")


def _check_few_steps(config: Config) -> None:
    """Few-shot runs are short: a save or an evaluation that never comes is a mistake there."""
    total = config.optimisation.total_steps
    for name, value, least in (
        ("warmup_steps", config.optimisation.warmup_steps, 1),
        ("save_freq", config.run.save_freq, 0),  # the last step is saved and evaluated anyway
        ("eval_freq", config.run.eval_freq, 0),
    ):
        if value > total - least:
            raise ValueError(f"--{name} {value} must {'be below' if least else 'not be above'} --total_steps {total}")


def _check_format(name: str, text: str, fields: list[str], constant: bool) -> None:
    """Refuse a format string that cannot be filled in with texts, or that ignores them all. Raises ValueError."""
    try:
        parts = [(field, spec) for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise ValueError(f"--{name} {text!r} is not a format string: {error}") from error
    known = ", ".join(f"{{{field}}}" for field in sorted(fields))
    if unknown := {field for field, _ in parts} - set(fields):
        names = ", ".join(f"{{{field}}}" for field in sorted(unknown))
        raise ValueError(f"--{name} uses {names}; it may use {known}")
    if not parts and not constant:
        raise ValueError(f"--{name} {text!r} is the same for every text: use {known}")
    for field, spec in parts:
        # A field within a field would depend on the data, and a large width would fill the memory.
        if "{" in spec or re.search(r"\d{5}", spec):
            raise ValueError(f"--{name} {text!r}: {spec!r} cannot be the format of {{{field}}}; leave it out")
    try:
        text.format(**dict.fromkeys(fields, "text"))
    except ValueError as error:
        raise ValueError(f"--{name} {text!r} cannot be filled in with texts: {error}") from error
