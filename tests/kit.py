"""A made-up world for the tests: passages, questions, tiny untrained models, and command lines over them."""

import contextlib
import fcntl
import gc
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atlas.command_line import parse_config
from atlas.config import Tasks
from atlas.tasks import TASKS, Task, TaskSetup
from evaluate import evaluate
from tests.ranks import SHARED, run_on_ranks
from train import train

SYLLABLES = ["ba", "ko", "ri", "nu", "sel", "tam", "vor", "eth", "lin", "gra", "dus", "mon", "pel", "zor", "qua", "fim"]
PLACES = ("river", "bird", "founder", "trade", "month")


def slow(*values: Any) -> Any:
    """A case of `parametrize` that only `make test-slow` runs, because quick cases prove most of the same."""
    return pytest.param(*values, marks=pytest.mark.slow)


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice([2, 3]))).capitalize()


@contextlib.contextmanager
def made_once(name: str) -> Iterator[tuple[Path, bool]]:
    """A directory that all processes of these tests share, and whether it is to be made: only one of them makes it."""
    directory = Path(os.environ.get(SHARED) or tempfile.mkdtemp(prefix="atlas-test-")) / name
    directory.parent.mkdir(exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = Path(f"{directory}.ready")
        yield directory, not ready.exists()
        ready.touch()


@cache
def world() -> Path:
    """A directory with passages.jsonl, train.jsonl, dev.jsonl, models/reader, models/retriever; not to be changed."""
    with made_once("world") as (directory, missing):
        if missing:
            directory.mkdir(exist_ok=True)
            _make_world(directory)
    return directory


def _make_world(directory: Path, n_towns: int = 60) -> None:
    from make_tiny_models import build_tiny_models

    rng = random.Random(0)
    towns = sorted({_name(rng) for _ in range(2 * n_towns)})[:n_towns]
    facts = {town: {place: _name(rng) for place in PLACES} for town in towns}
    passages = [
        {"id": f"p{i}", "title": town, "section": place, "text": f"The {place} of {town} is {facts[town][place]}. " * n}
        for i, (town, place, n) in enumerate((t, p, rng.choice([1, 1, 2, 4])) for t in towns for p in PLACES)
    ]
    questions = [
        {"question": f"what is the {place} of {town}?", "answers": [facts[town][place], "the " + facts[town][place]]}
        for town in towns
        for place in PLACES
    ]
    rng.shuffle(questions)
    for i, question in enumerate(questions):
        question["id"] = f"q{i}"
        question["target"] = question["answers"][0] * (1 + i % 3)  # targets of different lengths
    write_jsonl(directory / "passages.jsonl", passages)
    write_jsonl(directory / "train.jsonl", questions[:40])
    write_jsonl(directory / "dev.jsonl", questions[40:51])
    texts = [f"{p['title']} {p['text']}" for p in passages] + [q["question"] for q in questions]
    build_tiny_models(texts, directory / "models", vocabulary_size=400, seed=0)


@cache
def lettered_models() -> Path:
    """Models beside those of the world, whose vocabulary has the letters of the options of multiple choice."""
    from make_tiny_models import build_tiny_models

    rows = read_jsonl(world() / "passages.jsonl") + read_jsonl(world() / "train.jsonl")
    texts = [" ".join(str(value) for value in row.values()) for row in rows]
    with made_once("lettered") as (directory, missing):
        if missing:
            build_tiny_models([*texts, *["A B C D E F G true false maybe"] * 500], directory, vocabulary_size=400)
    return directory


def choice_questions(n: int, n_options: Callable[[int], int] = lambda i: 4) -> list[dict[str, Any]]:
    """Questions of the world with so many options each, the right one at changing places; the texts differ."""
    questions = read_jsonl(world() / "train.jsonl")
    names = sorted({row["answers"][0] for row in questions})
    rows = []
    for i, row in enumerate(questions[:n]):
        rng = random.Random(i)
        wrong = rng.sample([name for name in names if name != row["answers"][0]], n_options(i) - 1)
        texts = rng.sample([row["answers"][0], *wrong], n_options(i))
        options = dict(zip("ABCDEFG", texts, strict=False))
        answer = next(letter for letter, text in options.items() if text == row["answers"][0])
        rows.append({"question": row["question"], "options": options, "answer": answer, "id": row["id"]})
    return rows


def make_task(name: str, **settings: Any) -> Task:
    """A task by its name; settings are flags of the section Tasks or fields of `TaskSetup`, defaults elsewhere."""
    flags = {field.name for field in fields(Tasks)}
    own = {key: value for key, value in settings.items() if key not in flags}
    return TASKS[name](TaskSetup(Tasks(**{key: settings[key] for key in settings.keys() & flags}), **own))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # str's would also split at U+2028


def command_line(output: str | Path, **changes: Any) -> list[str]:
    """Flags of a small question-answering run; None leaves one out, True and False switch, a list is all given."""
    home = world()
    flags = {
        "name": "run",
        "checkpoint_dir": output,
        "task": "qa",
        "train_data": home / "train.jsonl",
        "eval_data": home / "dev.jsonl",
        "passages": home / "passages.jsonl",
        "reader_model_type": home / "models/reader",
        "retriever_model_path": home / "models/retriever",
        "text_maxlength": 64,
        "target_maxlength": 16,
        "generation_max_length": 6,
        "n_context": 4,
        "retriever_n_context": 4,
        "per_gpu_batch_size": 2,
        "per_gpu_eval_batch_size": 4,
        "total_steps": 5,
        "warmup_steps": 0,
        "scheduler": "fixed",
        "lr": 1e-3,
        "lr_retriever": 1e-3,
        "dropout": 0,
        "temperature_gold": 0.1,
        "temperature_score": 0.1,
        "log_freq": 1,
        "write_results": True,
    } | changes
    line: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def run(output: str | Path, program: str = "train", preset: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Do in this process (or rank) what the script would do; the run's directory."""
    config = parse_config(command_line(output, **changes), program=program, **(preset or {}))
    evaluate(config) if program == "evaluate" else train(config)
    _freeze_what_runs_import()
    return Path(output) / config.run.name


@cache
def _freeze_what_runs_import() -> None:
    """A run collects garbage at its end: the modules that the first one loaded need not be searched by all others."""
    gc.collect()
    gc.freeze()


def run_on(world_size: int, output: str | Path, program: str = "train", **changes: Any) -> Path:
    """The same on so many ranks."""
    run_on_ranks(world_size, _run_as_rank, command_line(output, **changes), program)
    return Path(output) / changes.get("name", "run")


def _run_as_rank(arguments: list[str], program: str) -> None:
    from atlas.runtime import distributed

    stop, distributed.stop = distributed.stop, lambda: None  # the process group goes on living
    try:
        torch.set_num_threads(1)
        config = parse_config(arguments, program=program)
        evaluate(config) if program == "evaluate" else train(config)
    except SystemExit as error:
        raise AssertionError(f"the run ended with status {error.code}") from error
    finally:
        distributed.stop = stop
    _freeze_what_runs_import()


def recorded(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in metrics.jsonl; one that a kill cut off is none."""
    lines = (directory / "metrics.jsonl").read_bytes().splitlines()
    return [row for line in lines if line.endswith(b"}") and (row := json.loads(line))["kind"] == kind]


def logged(directory: Path, statistic: str) -> list[float]:
    """The values of a statistic of training in the order of metrics.jsonl."""
    return [line[statistic] for line in recorded(directory, "train") if statistic in line]


def last_metrics(directory: Path, file: str = "") -> dict[str, float]:
    """Of the last evaluation, of this file if it is named."""
    return [line for line in recorded(directory, "evaluation") if file in ("", line["file"])][-1]["metrics"]


def is_checkpointing(model: torch.nn.Module) -> bool:
    """Whether a model of transformers computes activations again: the newest calls it otherwise than the oldest."""
    newest = getattr(model, "is_activation_checkpointing", None)
    return model.is_gradient_checkpointing if newest is None else newest


CHAT = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def language_model(kind: str = "plain") -> Path:
    """A directory with a tiny untrained Llama and its tokenizer, trained on the world's texts; not to be changed.

    Args:
        kind: of tokenizer. plain: bytes, without BOS, pad token and chat template; chat: bytes, with pad token and chat
            template; spaces: like sentencepiece, BOS before every text.
    """
    rows = read_jsonl(world() / "passages.jsonl") + read_jsonl(world() / "train.jsonl")
    texts = [" ".join(str(value) for value in row.values()) for row in rows] + ["Question: Answer: user assistant"] * 20
    with made_once(f"language-model-{kind}") as (directory, missing):
        if missing:
            tokenizer = _byte_tokenizer(texts, kind) if kind != "spaces" else _space_tokenizer(texts)
            torch.manual_seed(0)
            _tiny_llama(len(tokenizer), tokenizer.eos_token_id).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return directory


def _tiny_llama(vocabulary: int, eos: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
    ends = {"bos_token_id": None, "eos_token_id": eos}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.2, **sizes, **more, **ends))


def _byte_tokenizer(texts: list[str], kind: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", *(["<|start|>", "<|pad|>"] if kind == "chat" else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    more = {"pad_token": "<|pad|>", "chat_template": CHAT} if kind == "chat" else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **more)


def _space_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=["\n", ":", "?"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
