"""A training step at the size of T5 base: its share of the machine's peak, and what each measure brings.

    python -m benchmarks.step

*Plain* pads to text_maxlength, computes in fp32, embeds the passages again although their encoder is frozen, and looks
at every parameter's gradient by itself, which waits for the device each time. All else computes in bf16 where this CPU
has it (AVX512-BF16 or AMX), elsewhere in fp32: there the ratios are those of the other measures alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, T5Config

from src import device as devices
from src.atlas import Atlas, TrainingTensors
from src.inputs import Targets
from src.optim import Optimizers
from src.reader import FusionInDecoder
from src.retriever import Contriever, DualEncoder
from src.signals import MODES

CPU = torch.device("cpu")
PRECISION = "bf16" if devices.fast_bf16(CPU) else "fp32"
VOCABULARY, MAXLENGTH, TARGET = 32128, 384, 16


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak(dtype: torch.dtype, repeats: int) -> float:
    """Floating point operations a second of the fastest of several large matrix products."""
    best = 0.0
    for n, m, k in ((4096, 2048, 768), (4096, 768, 2048), (2048, 2048, 2048), (4096, 4096, 4096)):
        a, b = torch.randn(n, k, dtype=dtype), torch.randn(k, m, dtype=dtype)
        best = max(best, 2 * n * m * k / seconds(lambda a=a, b=b: a @ b, repeats))
    return best


def models(layers: int, width: int) -> tuple[FusionInDecoder, DualEncoder]:
    """A T5 v1.1 and a BERT of the shapes of their base sizes, but perhaps of fewer layers; random weights."""
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
    return FusionInDecoder(config), DualEncoder(Contriever(bert), query_side=True)


def tokens(*shape: int, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; rows of the given lengths, or full ones."""
    ids = torch.randint(3, 30000, shape)
    if lengths is None:
        return ids, torch.ones(shape, dtype=torch.bool)
    mask = torch.arange(shape[-1]) < lengths[..., None]
    return ids * mask, mask


class Step:
    """One batch of one query with K passages of 60 to 160 tokens, and the models and optimizers of a run."""

    def __init__(self, k: int, layers: int, width: int) -> None:
        torch.manual_seed(0)
        self.k = k
        self.reader, self.retriever = models(layers, width)
        self.atlas = Atlas(self.reader, self.retriever, n_context=k, mode=MODES["pdist"])
        trained = {
            "reader": list(self.reader.named_parameters()),
            "retriever": [(n, p) for n, p in self.retriever.named_parameters() if p.requires_grad],
        }
        self.parameters = [p for named in trained.values() for _, p in named]
        self.optimizers = Optimizers(
            {name: (parameters, 1e-5) for name, parameters in trained.items()},
            weight_decay=0.01,
            epsilon=1e-6,
            beta2=0.999,
            clip=1.0,
            scheduler="fixed",
            warmup_steps=0,
            total_steps=100,
        )
        lengths = torch.randint(60, 161, (1, k))
        longest = int(lengths.max())
        labels = torch.randint(3, 30000, (1, TARGET))
        self.targets = Targets(labels, labels.roll(1, dims=1))
        self.short = tokens(1, k, longest, lengths=lengths)
        self.query = tokens(1, 24)
        self.passages = tokens(k, longest, lengths=lengths[0])
        self.embeddings = torch.randn(1, k, self.retriever.dim)

    def update(self, batch: TrainingTensors) -> None:
        with devices.autocast(CPU, PRECISION):
            losses = self.atlas(batch)
        self.optimizers.backward(losses.total)
        self.optimizers.step(0)

    def fast(self) -> None:
        """Rows as long as they are, embeddings out of the index."""
        self.update(TrainingTensors(*self.short, self.targets, *self.query, passage_embeddings=self.embeddings))

    def embedding_again(self) -> None:
        """The same, but the frozen encoder embeds the passages once more."""
        self.update(TrainingTensors(*self.short, self.targets, *self.query, *self.passages))

    def plain(self) -> None:
        """Everything padded, fp32, embedded again, every parameter looked at by itself."""
        wide = [pad(tensor) for tensor in self.short]
        passages = [pad(tensor) for tensor in self.passages]
        losses = self.atlas(TrainingTensors(*wide, self.targets, *map(pad, self.query), *passages))
        self.optimizers.backward(losses.total)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.norm().item()
                torch.isfinite(parameter.grad).all().item()
        self.optimizers.step(0)

    def read(self) -> None:
        """The reader's forward and backward pass alone."""
        ids, mask = self.short
        with devices.autocast(CPU, PRECISION):
            logits = self.reader.logits(self.reader.encode(ids, mask), mask.flatten(1), self.targets.decoder_ids)
        logits.float().mean().backward()


def pad(tensor: torch.Tensor) -> torch.Tensor:
    """To text_maxlength."""
    return torch.nn.functional.pad(tensor, (0, MAXLENGTH - tensor.shape[-1]))


def in_turns(fast: Callable[[], None], other: Callable[[], None], repeats: int) -> float:
    """Median of the ratios of times taken one after the other."""
    fast(), other()
    ratios = []
    for _ in range(repeats):
        times = []
        for function in (fast, other):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, default=20, help="passages per query")
    parser.add_argument("--layers", type=int, default=12, help="layers of each stack")
    parser.add_argument("--width", type=int, default=768, help="width of the models, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=3, help="measurements; the median is shown")
    options = parser.parse_args()
    step = Step(options.context, options.layers, options.width)
    most = peak(devices.compute_dtype(PRECISION) or torch.float32, options.repeats)
    with FlopCounterMode(display=False) as counter:
        step.read()
    time_of_reading = seconds(step.read, options.repeats)
    achieved = counter.get_total_flops() / time_of_reading
    print(f"{PRECISION} matrix products at their best: {most / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    print(f"reader, forward and backward: {achieved / 1e9:.0f} GFLOP/s, {100 * achieved / most:.0f} % of that")
    again = in_turns(step.fast, step.embedding_again, options.repeats)
    print(f"step with embeddings out of the index against embedding again: {again:.2f} times as fast")
    print(f"whole step against the plain way: {in_turns(step.fast, step.plain, options.repeats):.2f} times as fast")


if __name__ == "__main__":
    main()
