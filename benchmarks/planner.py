"""Does a command fit so many GPUs, how long do its steps take, and what would make it fit? For `plan.py`.

Memory is that of `benchmarks.memory`: what is held is computed from sizes, and the working memory is that of the real
step on fake tensors. Times are arithmetic: operations counted in that step, at a share of what the card's maker states.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, BertConfig, T5Config

from atlas.config import Config
from atlas.index.codec import FLAT, Compression, code_size
from atlas.index.directory import has_index, read_description
from atlas.index.passages import open_passages
from atlas.model.pretrained import pretrained_errors, quiet_loading
from atlas.model.retriever import Contriever
from atlas.runtime.device import embedder_precision, evaluation_batch_size
from benchmarks import memory
from benchmarks.cards import Card
from benchmarks.memory import GIB, Settings, Step

REACHED = 0.4  # of the stated rate, as large products do in training: an assumption
READ = 0.8  # of the stated bandwidth, in a search of an exact index: an assumption
SPARE = 3 * GIB  # CUDA, NCCL, gaps in the allocator's memory, the scores of a search
KNOWN_READER = re.compile(r"google/t5-(?:v1_1-)?(base|large|xl|xxl)(?:-lm-adapt)?")
KNOWN_RETRIEVERS = ("facebook/contriever", "facebook/contriever-msmarco")
PQ_BYTES = 64  # of a passage in the compressed index that is suggested


class Machine(NamedTuple):
    """The GPUs that a command is to run on."""

    card: Card
    gpus: int

    @property
    def bytes(self) -> int:
        """Of each GPU."""
        return int(self.card.gigabytes * 1e9)


class Need(NamedTuple):
    """Bytes on each GPU by what they are for, and the seconds of a step."""

    parts: dict[str, int]
    step: float
    refresh: float | None  # seconds; None without an index

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class Shapes(NamedTuple):
    """What the models look like, and how many passages there are."""

    reader: T5Config | None
    retriever: BertConfig | None
    passages: int | None  # None: unknown


def shapes_of(config: Config, passages: int | None) -> Shapes:
    """Read from the models' directories, from the hub, or known by name.

    Raises:
        OSError: a model cannot be found or reached.
    """
    model, reader, retriever = config.model, None, None
    if not model.retrieve_only:
        known = KNOWN_READER.fullmatch(model.reader_model_type)
        reader = memory.reader_config(known[1]) if known else _described("--reader_model_type", model.reader_model_type)
    if model.retrieves:
        known = model.retriever_model_path in KNOWN_RETRIEVERS
        retriever = BertConfig() if known else _described("--retriever_model_path", model.retriever_model_path)
    return Shapes(reader, retriever, passages if passages is not None else passages_of(config))


def _described(flag: str, name: str) -> Any:
    """What a model's config.json says. Raises: OSError; ValueError if it is of another kind."""
    with pretrained_errors(flag, name, "a model's config.json"), quiet_loading(name):
        found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    wanted = {"--reader_model_type": "t5", "--retriever_model_path": "bert"}[flag]
    if found.model_type != wanted:
        raise ValueError(f"{flag} {name} is a {found.model_type}: only a {wanted} can be planned for")
    return found


def passages_of(config: Config) -> int | None:
    """How many passages the index has; None where neither it nor the corpus is on this machine."""
    index = config.index
    if index.load_index_path is not None:
        place = Path(index.load_index_path)
        return read_description(place).size if has_index(place) else None
    if not index.passages or not all(Path(file).is_file() for file in index.passages):
        return None
    return len(open_passages(index.passages, index.max_passages))


class Planner:
    """What a command needs on a machine. Fake steps are taken once for all commands that take the same.

    Args:
        training: whether the command trains.
    """

    def __init__(self, shapes: Shapes, machine: Machine, *, training: bool) -> None:
        self.shapes, self.machine, self.training = shapes, machine, training
        self._steps: dict[tuple[Settings, int], Step] = {}

    def on(self, machine: Machine) -> "Planner":
        """The same for another machine; they share their fake steps."""
        other = Planner(self.shapes, machine, training=self.training)
        other._steps = self._steps
        return other

    def need(self, config: Config) -> Need:
        """Raises: ValueError if the index cannot be made; RuntimeError if the fake step crashes."""
        parts, step = {}, 0.0
        if self.shapes.reader is not None:
            settings = self.settings(config)
            counted = self._step(settings)
            working = counted.working if self.training else max(counted.working, self._answering(settings))
            parts |= self._held(settings, config.model.int8_reader) | {"working memory": working}
            step = counted.flops / self._rate(settings.precision)
        elif self.shapes.retriever is not None:
            parts["weights"] = 4 * _weights(self.shapes.retriever)
        index = self.index_bytes(config)
        if index is not None:
            parts["index"] = index
            step += index / (READ * self.machine.card.bandwidth * 1e9)
        return Need(parts | {"CUDA, NCCL, gaps": SPARE}, step, self._refresh(config))

    def settings(self, config: Config) -> Settings:
        """The flags that a step's memory depends on."""
        flags, learning, model = config.flags(), config.retriever_training, config.model
        known = {name: flags[name] for name in Settings._fields if name in flags}
        several = self.machine.gpus > 1
        known |= {
            "n_context": 1 if model.closed_book else model.n_context,
            "retriever_n_context": model.retriever_n_context if model.retrieves else None,
            "target_maxlength": max(1, model.target_maxlength or model.generation_max_length),
            "gradient_checkpoint": flags["use_gradient_checkpoint_reader"],
            "gradient_checkpoint_retriever": flags["use_gradient_checkpoint_retriever"],
            "train_retriever": learning.train_retriever and model.retrieves,
            "query_side": learning.query_side_retriever_training,
            "shard_optim": flags["shard_optim"] and several,
            "shard_grads": flags["shard_grads"] and several,
        }
        if not self.training:
            sizes = flags["per_gpu_eval_batch_size"], flags["per_gpu_batch_size"]
            batch = evaluation_batch_size(torch.device("cuda"), *sizes, model.tokens_of_a_question)
            known |= {"per_gpu_batch_size": batch, "train_retriever": False}
            known |= {"retriever_n_context": None, "training": False, "gradient_checkpoint": False}
            known |= {"gradient_checkpoint_retriever": False, "shard_optim": False, "shard_grads": False}
            known |= {"lora_rank": 0, "retriever_lora_rank": 0, "frozen_precision": "fp32"}  # they have been added
        return Settings(**known)

    def _step(self, settings: Settings) -> Step:
        # These change what is held alone, for no update is the step's peak; and Adafactor reads values.
        settings = settings._replace(shard_optim=False, optimizer="adamw", offload_optimizer=False)
        key = settings, self.machine.gpus if settings.shard_grads else 1
        if key not in self._steps:
            retriever = self.shapes.retriever or BertConfig()
            self._steps[key] = memory.fake_step(self.shapes.reader, retriever, *key)
        return self._steps[key]

    def _held(self, settings: Settings, int8: bool) -> dict[str, int]:
        if self.training:
            return memory.held(self.shapes.reader, self.shapes.retriever, settings, self.machine.gpus)._asdict()
        of_layers = 1 if int8 else 2 if settings.precision in ("fp16", "bf16") else 4  # bytes
        vocabulary = self.shapes.reader.vocab_size  # embeddings and scores of words stay fp32
        shapes = [weight.shape for weight in memory.weights_of_reader(self.shapes.reader, memory.Settings())]
        sizes = [shape.numel() * (4 if shape[0] == vocabulary else of_layers) for shape in shapes]
        encoder = _weights(self.shapes.retriever) if self.shapes.retriever else 0
        return {"weights": sum(sizes) + 4 * (2 if settings.query_side else 1) * encoder}

    def _answering(self, settings: Settings) -> int:
        """What the decoder works with, when the encoder has finished: the passages' hidden states, and their keys and
        values, which every layer keeps; those of one layer exist twice while they are made.
        """
        reader, numbers = self.shapes.reader, 2 if settings.precision in ("fp16", "bf16") else 4
        tokens = settings.per_gpu_batch_size * settings.n_context * settings.text_maxlength
        of_layers = 2 * (reader.num_decoder_layers + 1) * reader.num_heads * reader.d_kv
        return tokens * (reader.d_model + of_layers) * numbers

    def index_bytes(self, config: Config) -> int | None:
        """Of a GPU's share of the index; None if there is none, or if nobody knows how large it is.

        Raises:
            ValueError: such an index cannot be made.
        """
        if self.shapes.retriever is None or self.shapes.passages is None:
            return None
        index, dimension = config.index, self.shapes.retriever.hidden_size
        if index.index_mode == "flat" or index.faiss_index_type in FLAT:
            size = 2 * dimension
        else:
            asked = Compression(index.faiss_index_type, index.faiss_code_size, index.faiss_nlist)
            size = code_size(asked.factory(self.shapes.passages, dimension), dimension)
        return -(-self.shapes.passages // self.machine.gpus) * size

    def _refresh(self, config: Config) -> float | None:
        if self.shapes.retriever is None or self.shapes.passages is None:
            return None
        if config.index.load_index_path is not None and not config.retriever_training.moves_passages:
            return None  # nothing is embedded
        length = config.model.text_maxlength
        flops = self.shapes.passages * length * embedding_flops(self.shapes.retriever, length)
        precision = embedder_precision(torch.device("cuda"), config.run.embedder_precision)
        return flops / self.machine.gpus / self._rate(precision)

    def _rate(self, precision: str) -> float:
        card = self.machine.card
        return REACHED * 1e12 * (card.full if precision in ("fp32", "tf32") else card.half)


def embedding_flops(encoder: BertConfig, length: int) -> int:
    """Operations for each token of a passage that the encoder embeds: those of its matrix products."""
    width, inner = encoder.hidden_size, encoder.intermediate_size
    return 2 * encoder.num_hidden_layers * (4 * width**2 + 2 * width * inner + 2 * length * width)


def _weights(encoder: BertConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Contriever(encoder).parameters())


class Change(NamedTuple):
    """Flags that make a command need less memory, and what they cost."""

    flags: str
    cost: str
    values: dict[str, Any]


def changes(config: Config, machine: Machine) -> Iterator[Change]:
    """What may make it fit, cheapest first: those that leave the results of training as they are come before others."""
    flags = config.flags()
    if flags["precision"] in ("fp32", "tf32"):
        kind = "bf16" if machine.card.bf16 else "fp16"
        yield Change(f"--precision {kind}", "nothing: it is also faster", {"precision": kind})
    if machine.gpus > 1:
        if not flags["shard_optim"]:
            yield Change("--shard_optim", "little time", {"shard_optim": True})
        if not flags["shard_grads"]:
            yield Change("--shard_optim --shard_grads", "some time", {"shard_optim": True, "shard_grads": True})
    for half in ("reader", "retriever"):
        name = f"use_gradient_checkpoint_{half}"
        if not flags[name] and (half == "reader" or flags["train_retriever"]):
            yield Change(f"--{name}", "up to a third more time", {name: True})
    if flags["per_gpu_batch_size"] > 1:
        steps = flags["accumulation_steps"] * flags["per_gpu_batch_size"]
        values = {"per_gpu_batch_size": 1, "accumulation_steps": steps}
        yield Change(f"--per_gpu_batch_size 1 --accumulation_steps {steps}", "some time", values)
    if flags["per_gpu_eval_batch_size"] != 1:
        yield Change("--per_gpu_eval_batch_size 1", "slower evaluations", {"per_gpu_eval_batch_size": 1})
    if not flags["int8_reader"]:
        yield Change("--int8_reader", "almost the same answers, of evaluations", {"int8_reader": True})
    if not flags["offload_optimizer"]:
        yield Change("--offload_optimizer", "moments cross the bus in every update", {"offload_optimizer": True})
    if config.model.retrieves and config.index.index_mode == "flat":
        text = f"--index_mode faiss --faiss_index_type pq --faiss_code_size {PQ_BYTES}"
        values = {"index_mode": "faiss", "faiss_index_type": "pq", "faiss_code_size": PQ_BYTES}
        yield Change(text, "other passages are found", values)
    yield from _other_training(flags)
    for name, least in (("n_context", 10), ("text_maxlength", 128)):
        if flags[name] >= 2 * least and not flags["closed_book"]:
            values = {name: flags[name] // 2}
            if name == "n_context":
                values["retriever_n_context"] = min(flags["retriever_n_context"], values[name])
            yield Change(" ".join(f"--{key} {value}" for key, value in values.items()), "another model", values)


def _other_training(flags: dict[str, Any]) -> Iterator[Change]:
    """Moments of 8 bits, adapters in place of all weights."""
    if flags["optimizer"] == "adamw" and not flags["offload_optimizer"]:
        yield Change("--optimizer adamw8bit", "moments are rounded", {"optimizer": "adamw8bit"})
    if not flags["lora_rank"] and not flags["freeze_reader"]:
        values = {"lora_rank": 16} | ({"frozen_precision": "bf16"} if flags["precision"] == "bf16" else {})
        text = " ".join(f"--{name} {value}" for name, value in values.items())
        yield Change(text, "adapters learn in the place of the weights", values)


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The command with other values of flags."""
    sections = {
        name: dataclasses.replace(getattr(config, name), **{key: values[key] for key in section if key in values})
        for name, section in config.sections().items()
    }
    return dataclasses.replace(config, **sections)


def to_make_it_fit(planner: Planner, config: Config) -> Iterator[tuple[Change, Need]]:
    """Changes, one on top of the other, each with what is needed then, until the command fits.

    A change that hardly helps is left out: less than a hundredth of what is needed.
    """
    need = planner.need(config)
    applied: set[str] = set()
    while need.bytes > planner.machine.bytes:
        for change in changes(config, planner.machine):
            if change.flags in applied:
                continue
            applied.add(change.flags)
            other = changed(config, change.values)
            needed = planner.need(other)
            if needed.bytes <= 0.99 * need.bytes:
                config, need = other, needed
                yield change, need
                break
        else:
            return
