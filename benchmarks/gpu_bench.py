"""What the parts of `benchmarks.gpu_check` share: sizes, rows of the table, made-up passages, clocks."""

import contextlib
import gc
import importlib.util
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import BertConfig

from atlas import config
from atlas.files.jsonl import JsonlCorpus
from atlas.index.passages import open_passages
from atlas.model.atlas import TrainingTensors
from atlas.model.inputs import Inputs
from atlas.model.interface import Reader
from atlas.model.prompts import PromptInputs
from atlas.model.reader import load_reader
from atlas.model.retriever import DualEncoder, load_retriever
from atlas.model.tokenization import (
    AnyReaderTokenizer,
    RetrieverTokenizer,
    load_reader_tokenizer,
    load_retriever_tokenizer,
)
from atlas.runtime import device as devices
from benchmarks.memory import Settings, Size

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models/tiny"
CPU = torch.device("cpu")


class Row(NamedTuple):
    """One line of the table."""

    check: str
    expected: str
    measured: str
    share: str = ""  # of the card's limit
    ok: bool = True
    reached: bool = True  # the goal of its speed, if it has one


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    product: int  # rows and columns of the largest matrix product
    copied: int  # bytes read and written by the copy that measures the bandwidth
    rows: int  # of the index whose search is timed
    compared: int  # of the index that the CPU searches as well
    dimension: int  # of embeddings
    code_size: int  # bytes of a product quantizer's code
    queries: tuple[int, ...]  # at a time
    passages: int  # texts, for the tiny models
    text_maxlength: int  # their tokens
    read: int  # passages that the tiny reader reads for each question
    retrieved: int  # passages that the tiny retriever learns from
    asked: int  # questions that the tiny reader answers
    steps: int  # in which the tiny models are trained
    layers: int  # of BERT, and of each stack of the T5 that generates
    width: int
    embedded: int  # passages in a batch
    readers: dict[str, Size]  # trained
    retriever: BertConfig  # trained with them
    step: Settings  # of the training steps: those of the table in docs/training.md
    answered: tuple[int, ...]  # questions answered at a time
    tokens: int  # of each answer
    repeats: int  # of measurements; the median is shown


FULL = Sizes(
    product=8192,
    copied=2**32,
    rows=4_000_000,
    compared=100_000,
    dimension=768,
    code_size=64,
    queries=(1, 8, 64),
    passages=5000,
    text_maxlength=96,
    read=4,
    retrieved=6,
    asked=32,
    steps=5,
    layers=12,
    width=768,
    embedded=512,
    readers={"base": "base", "large": "large", "xl": "xl"},
    retriever=BertConfig(vocab_size=30522),
    step=Settings(),
    answered=(1, 8),
    tokens=32,
    repeats=5,
)
SHORT = Sizes(
    product=256,
    copied=2**22,
    rows=5000,
    compared=2000,
    dimension=64,
    code_size=8,
    queries=(1, 8),
    passages=200,
    text_maxlength=32,
    read=2,
    retrieved=3,
    asked=8,
    steps=2,
    layers=2,
    width=64,
    embedded=8,
    readers={"tiny": (64, 128, 2, 2)},
    retriever=BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128
    ),
    step=Settings(n_context=2, text_maxlength=32, target_maxlength=8),
    answered=(1,),
    tokens=4,
    repeats=1,
)


class Limits(NamedTuple):
    """What the card reaches at best, measured."""

    flops: float  # per second, of a large matrix product in the precision of training
    bytes: float  # per second, read and written by a large copy
    library: str  # of the matrix product


class World:
    """The tiny models, and made-up passages and questions that they can read.

    Args:
        models: a directory with `reader` and `retriever`.
        scratch: a directory to write into.
        reader: another reader than that of `models`.
    """

    def __init__(self, models: Path, scratch: Path, sizes: Sizes, reader: Path | None = None) -> None:
        self.sizes, self.scratch = sizes, scratch
        self._reader, self._retriever = str(reader or models / "reader"), str(models / "retriever")
        rng = random.Random(0)
        places = ["river", "capital", "mountain", "company", "language", "king", "airport", "element"]
        names = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(4, 9))).capitalize() for _ in range(400)]
        filler = [
            "the",
            "of",
            "and",
            "in",
            "is",
            "a",
            "was",
            "city",
            "country",
            "area",
            "north",
            "year",
            "known",
            "for",
        ]
        self.passages = []
        for i in range(sizes.passages):
            name, place, value = names[i % 400], places[i // 400 % 8], rng.choice(names)
            more = " ".join(rng.choices(filler + names, k=rng.randint(10, 60)))
            text = f"The {place} of {name} is {value}. {more}"
            self.passages.append({"id": str(i), "title": name, "section": place, "text": text, "answer": value})
        asked = rng.sample(self.passages[:3200], sizes.asked)  # after 3200 names and places begin anew
        self.questions = [f"question: what is the {p['section']} of {p['title']}? answer: <extra_id_0>" for p in asked]
        self.targets = [f"<extra_id_0> {p['answer']}" for p in asked]

    @cached_property
    def corpus(self) -> JsonlCorpus:
        """The passages in a file."""
        path = self.scratch / "passages.jsonl"
        path.write_text("".join(f"{json.dumps(passage)}\n" for passage in self.passages), encoding="utf-8")
        return open_passages([path])

    @cached_property
    def _tokenizers(self) -> tuple[AnyReaderTokenizer, RetrieverTokenizer]:
        return load_reader_tokenizer(self._reader), load_retriever_tokenizer(self._retriever)

    def reader(self) -> Reader:
        """The tiny reader, without dropout, on the CPU."""
        return load_reader(self._reader, dropout=0.0)

    def retriever(self, query_side: bool = True) -> DualEncoder:
        """The tiny retriever, without dropout, on the CPU."""
        return load_retriever(self._retriever, query_side=query_side, dropout=0.0)

    def inputs(self, device: torch.device) -> Inputs:
        """Tensors of texts, with the same shapes on every device."""
        settings = config.Model(text_maxlength=self.sizes.text_maxlength, n_context=self.sizes.read)
        kind = Inputs if self._tokenizers[0].fuses else PromptInputs
        inputs = kind(settings, *self._tokenizers, device=device)
        inputs.pad_multiple = devices.pad_multiple(torch.device("cuda"))
        return inputs

    def questions_with_passages(self, rows: slice, k: int) -> list[list[dict[str, str]]]:
        """k passages for each of these questions, for every other question one of them twice."""
        rng = random.Random(1)
        drawn = [rng.sample(self.passages, k - i % 2) for i in range(len(self.questions[rows]))]
        return [(of_query + of_query)[:k] for of_query in drawn]

    def batch(self, rows: slice, device: torch.device, k: int, mode: str = "pdist") -> TrainingTensors:
        """A batch of questions with k passages each, which the retriever embeds again."""
        inputs, queries, passages = self.inputs(device), self.questions[rows], self.questions_with_passages(rows, k)
        flat = [passage for of_query in passages for passage in of_query]
        tokens = inputs.target_tokens(self.targets[rows])
        return TrainingTensors(
            *inputs.training(queries, passages, tokens),
            inputs.target_rows(queries, tokens),
            *inputs.queries(queries),
            *inputs.passages(flat),
            judged=inputs.judging(queries, passages, tokens, mode),
        )


@dataclass(frozen=True)
class Bench:
    """What is checked, and with what."""

    device: torch.device
    sizes: Sizes
    limits: Limits
    world: World
    demo: Path  # with the demo's data, if it exists

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """What training computes in on this device."""
        return "bf16" if self.on_gpu else devices.cpu_precision()

    def share_of_peak(self, flops: float, seconds: float) -> float:
        """These operations in this time, as a share of the fastest matrix product."""
        return flops / seconds / self.limits.flops

    def share_of_bandwidth(self, read: float, seconds: float) -> float:
        """The time that reading these bytes once takes, as a share of this time."""
        return read / self.limits.bytes / seconds

    def reaches(self, figure: float, goal: float) -> bool:
        """Whether a goal of speed is reached; the short form has none, because its speeds mean nothing."""
        return self.sizes is not FULL or figure >= goal

    def to_read(self, read: float) -> str:
        """How long it takes to read these bytes once."""
        return f"{1e3 * read / self.limits.bytes:.3g} ms to read {read / 2**20:.4g} MiB once"


def has_module(name: str) -> bool:
    """Whether a module can be imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, whatever their devices and types."""
    found, wanted = (tensor.detach().to("cpu", torch.float64) for tensor in (found, wanted))
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def waits(work: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the GPU while it does this work; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Multiply matrices of fp32 numbers inside the block as `--precision` says, and in fp32 afterwards."""
    devices.set_matmul_precision(precision)
    try:
        yield
    finally:
        devices.set_matmul_precision("fp32")


def free(device: torch.device) -> None:
    """Give back all memory of a GPU that is no longer used, and begin a new peak."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


Check = Callable[[Bench], Iterator[Row]]
