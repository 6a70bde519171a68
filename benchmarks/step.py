"""A training step at the size of T5 base: its share of the machine's peak, and the speed-up of each optimisation.

    python -m benchmarks.step

A query-side step takes the passages' embeddings from the index. It is compared with embedding them again: padded to the
longest of the batch, like all rows here, and padded to text_maxlength, as in the published system. Passages are as long
as Wikipedia passages of 100 words (130 to 150 tokens), and the reader's rows also contain the query. Dropout is off:
with dropout the reader encodes the passages again for the gold scores, and both ratios are smaller.

*Plain* pads all rows, which have 60 to 160 tokens, to 384, computes in fp32, embeds the passages again, and checks each
parameter's gradient separately, which waits for the device each time. Everything else computes in bf16 if this CPU
supports it (AVX512-BF16 or AMX), otherwise in fp32; the ratios then show the other optimisations alone.

`--checkpointing` measures something else: what it costs to compute the activations of all layers twice, or of some.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, T5Config

from atlas.config import Optimisation
from atlas.model.atlas import Atlas, TrainingTensors
from atlas.model.grouping import fuse
from atlas.model.inputs import Targets
from atlas.model.pretrained import checkpoint_activations
from atlas.model.reader import FusionInDecoder
from atlas.model.retriever import Contriever, DualEncoder
from atlas.model.signals import MODES
from atlas.runtime import device as devices
from atlas.training.optim import Optimizers

CPU = torch.device("cpu")
PRECISION = devices.cpu_precision()
VOCABULARY, QUERY, TARGET = 32128, 24, 16
SHAPES = ((4096, 2048, 768), (4096, 768, 2048), (2048, 2048, 2048), (4096, 4096, 4096))  # n, m, k of (n, k) @ (k, m)
PLAIN_MAXLENGTH = 384
MIXED, WIKIPEDIA = (60, 160), (130, 150)  # the fewest and the most tokens of a passage


def seconds(function: Callable[[], object], repeats: int, device: torch.device = CPU) -> float:
    """Median of several runs after a warm-up."""
    function()
    times = []
    for _ in range(repeats):
        devices.synchronize(device)
        started = time.perf_counter()
        function()
        devices.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class Peak(NamedTuple):
    """The fastest of several large matrix products."""

    flops: float  # floating point operations per second
    library: str  # that computed it


def products(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The ways to compute (n, k), (m, k) -> (n, m) on this device: torch's own, and on a CPU other libraries."""
    ways: dict[str, Callable[[], object]] = {"torch": lambda: a @ b.T}
    if a.device != CPU:
        return ways
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
    if torch.backends.mkldnn.is_available() and (a.dtype == torch.float32 or bf16()):
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    if a.dtype == torch.float32:
        of_numpy = a.numpy(), b.numpy()
        ways["numpy"] = lambda: of_numpy[0] @ of_numpy[1].T
    return ways


def peak(
    dtype: torch.dtype, repeats: int, device: torch.device = CPU, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> Peak:
    """The fastest product of any shape and any library: a slow library makes no share of the peak look good."""
    found = []
    for n, m, k in shapes:
        a, b = torch.randn(n, k, dtype=dtype, device=device), torch.randn(m, k, dtype=dtype, device=device)
        ways = products(a, b)
        found += [Peak(2 * n * m * k / seconds(way, repeats, device), library) for library, way in ways.items()]
    return max(found)


def models(layers: int, width: int, device: torch.device = CPU) -> tuple[FusionInDecoder, DualEncoder]:
    """A T5 v1.1 and a BERT with random weights; the defaults are their base sizes."""
    shape = {"d_model": width, "d_kv": 64, "d_ff": width * 8 // 3, "num_heads": width // 64, "num_layers": layers}
    config = T5Config(
        vocab_size=VOCABULARY,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        num_decoder_layers=layers,
        **shape,
    )
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertConfig(vocab_size=30522, intermediate_size=4 * width, **shape, **dropout)
    with device:
        return FusionInDecoder(config), DualEncoder(Contriever(bert), query_side=True)


def tokens(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (…) -> (…, L), (…, L)
    """Ids and mask of rows with these lengths, padded to the longest."""
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    return torch.randint(3, 30000, mask.shape) * mask, mask


def pad(tensor: torch.Tensor, length: int) -> torch.Tensor:  # (…, L) -> (…, length)
    """Pad the rows to this length."""
    return F.pad(tensor, (0, length - tensor.shape[-1]))


class Batch:
    """One query with K passages: rows for the reader, rows for the retriever, embeddings from an index.

    Args:
        limits: the fewest and the most tokens of a passage.
        query: tokens of the query in each of the reader's rows.
    """

    def __init__(self, k: int, limits: tuple[int, int], dim: int, query: int = 0) -> None:
        lengths = torch.randint(limits[0], limits[1] + 1, (k,))
        labels = torch.randint(3, 30000, (1, TARGET))
        self.targets = Targets(labels, labels.roll(1, dims=1))
        self.rows = *tokens(query + lengths[None]), query + lengths[None].numpy()  # (1, K, L) twice, (1, K)
        self.query = tokens(torch.tensor([QUERY]))
        self.passages = tokens(lengths)  # (K, L)
        self.embeddings = torch.randn(1, k, dim)

    def from_index(self) -> TrainingTensors:
        """Unpadded rows, embeddings from the index."""
        return TrainingTensors(*self.rows, self.targets, *self.query, passage_embeddings=self.embeddings)

    def embedding_again(self, length: int | None = None) -> TrainingTensors:
        """The same, but the frozen encoder embeds the passages again, padded to `length` or to the longest."""
        passages = [pad(tensor, length or tensor.shape[-1]) for tensor in self.passages]
        return TrainingTensors(*self.rows, self.targets, *self.query, *passages)

    def padded(self, length: int) -> TrainingTensors:
        """All rows padded, and the passages embedded again."""
        padded = (self.rows[:2], self.query, self.passages)
        rows, query, passages = ([pad(tensor, length) for tensor in pair] for pair in padded)
        return TrainingTensors(*rows, None, self.targets, *query, *passages)


class Step:
    """The models and optimizers of a run with K passages per query."""

    def __init__(self, k: int, layers: int, width: int) -> None:
        torch.manual_seed(0)
        self.reader, self.retriever = models(layers, width)
        self.atlas = Atlas(self.reader, self.retriever, n_context=k, mode=MODES["pdist"])
        halves = {"reader": self.reader, "retriever": self.retriever}
        self.parameters = [p for half in halves.values() for p in half.parameters() if p.requires_grad]
        flags = {"lr": 1e-5, "weight_decay": 0.01, "scheduler": "fixed", "warmup_steps": 0, "total_steps": 100}
        self.optimizers = Optimizers(Optimisation(**flags), halves)

    def update(self, batch: TrainingTensors) -> None:
        with devices.autocast(CPU, PRECISION):
            losses = self.atlas(batch)
        self.optimizers.backward(losses.total)
        self.optimizers.step(0)

    def plain(self, batch: TrainingTensors) -> None:
        """In fp32, with a separate check of each parameter's gradient."""
        self.optimizers.backward(self.atlas(batch).total)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.norm().item()
                torch.isfinite(parameter.grad).all().item()
        self.optimizers.step(0)

    def read(self, batch: TrainingTensors) -> None:
        """The reader's forward and backward pass alone."""
        rows = batch.read(0, batch.reader_ids.shape[1])
        with devices.autocast(CPU, PRECISION):
            fused = fuse(self.reader.encode(*rows), rows.mask, rows.lengths)
            logits = self.reader.logits(fused.hidden, fused.mask, batch.targets.decoder_ids)
        logits.float().mean().backward()


def speed_ups(fast: Callable[[], object], others: list[Callable[[], object]], repeats: int) -> list[float]:
    """How many times as long as `fast` each of the others takes: the medians of ratios within each repeat."""
    functions, ratios = [fast, *others], []
    for function in functions:
        function()
    for _ in range(repeats):
        times = []
        for function in functions:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        ratios.append([other / times[0] for other in times[1:]])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def report_checkpointing(step: Step, batch: TrainingTensors, repeats: int) -> None:
    """Print how many times as long as without gradient checkpointing a step takes, by `--gradient_checkpoint_every`."""
    halves, numbers = (step.reader, step.retriever.query_encoder), (1, 2, 3, 4)
    for half in halves:
        checkpoint_activations(half)
    layers = [*halves[0].blocks, *halves[1].encoder.layer]

    def update(every: int | None) -> None:
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = every is not None and number % every == 0
        step.update(batch)

    ratios = speed_ups(lambda: update(None), [partial(update, every) for every in numbers], repeats)
    print("step with gradient checkpointing, compared with none:")
    for every, ratio in zip(numbers, ratios, strict=True):
        print(f"- of {'all layers' if every == 1 else f'one layer in {every}'}: {ratio:.2f} times as long")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, default=20, help="passages per query")
    parser.add_argument("--layers", type=int, default=12, help="layers of each stack")
    parser.add_argument("--width", type=int, default=768, help="width of the models, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=3, help="measurements; the median is shown")
    parser.add_argument("--text_maxlength", type=int, default=384, help="length that passages are padded to")
    parser.add_argument("--checkpointing", action="store_true", help="measure gradient checkpointing instead")
    options = parser.parse_args()
    if options.text_maxlength < WIKIPEDIA[1]:
        parser.error(f"--text_maxlength {options.text_maxlength}: passages have up to {WIKIPEDIA[1]} tokens; give more")
    step = Step(options.context, options.layers, options.width)
    mixed = Batch(options.context, MIXED, options.width)
    if options.checkpointing:
        report_checkpointing(step, mixed.from_index(), options.repeats)
        return
    wikipedia = Batch(options.context, WIKIPEDIA, options.width, query=QUERY)
    most = peak(devices.compute_dtype(PRECISION) or torch.float32, options.repeats)
    with FlopCounterMode(display=False) as counter:
        step.read(mixed.from_index())
    achieved = counter.get_total_flops() / seconds(lambda: step.read(mixed.from_index()), options.repeats)
    best, threads = f"{most.flops / 1e9:.0f} GFLOP/s by {most.library}", torch.get_num_threads()
    print(f"{PRECISION} matrix products at their best: {best} on {threads} threads")
    print(f"reader, forward and backward: {achieved / 1e9:.0f} GFLOP/s, {100 * achieved / most.flops:.0f} % of that")
    to_longest, to_maxlength = speed_ups(
        lambda: step.update(wikipedia.from_index()),
        [
            lambda: step.update(wikipedia.embedding_again()),
            lambda: step.update(wikipedia.embedding_again(options.text_maxlength)),
        ],
        options.repeats,
    )
    print("step with embeddings from the index, compared with embedding the passages again,")
    print(f"- padded to the longest of the batch: {to_longest:.2f} times as fast")
    print(f"- padded to text_maxlength, {options.text_maxlength}: {to_maxlength:.2f} times as fast")
    (plain,) = speed_ups(
        lambda: step.update(mixed.from_index()), [lambda: step.plain(mixed.padded(PLAIN_MAXLENGTH))], options.repeats
    )
    print(f"whole step, compared with the plain one: {plain:.2f} times as fast")


if __name__ == "__main__":
    main()
