"""The speed-up of each fast path: its time compared with that of a plain implementation, measured in the same run.

    python -m benchmarks.throughput

The plain implementation pads everything to text_maxlength, does not sort passages by length, embeds the passages of a
training step again although their encoder is frozen, and runs the encoder twice in evaluation (for the loss and for the
answer). In the last row, of CPU time, it tokenizes the corpus again, where a refresh has its token ids on disk.
Passages have 60 to 160 tokens. The models are small and have random weights, which does not affect the time.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig, T5Config

from atlas import config
from atlas.embedding import CorpusEmbedder, Windows
from atlas.files.tokens import TokenCache
from atlas.index.passages import open_passages
from atlas.model.atlas import Atlas, TrainingTensors
from atlas.model.grouping import fuse
from atlas.model.inputs import Inputs, Targets
from atlas.model.reader import FusionInDecoder, token_log_probabilities
from atlas.model.retriever import Contriever, DualEncoder
from atlas.model.signals import MODES
from atlas.model.tokenization import RetrieverTokenizer, load_reader_tokenizer, load_retriever_tokenizer, pad_rows
from atlas.training.optim import Optimizers

MAXLENGTH = 384
CPU = torch.device("cpu")


def median_ratio(
    fast: Callable[[], None], plain: Callable[[], None], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, float]:
    """Median seconds of both, measured alternately, and the median ratio of the pairs."""
    times = []
    for function in (fast, plain):
        function()  # warm-up
    for _ in range(repeats):
        pair = []
        for function in (fast, plain):
            started = clock()
            function()
            pair.append(clock() - started)
        times.append(pair)
    columns = list(zip(*times, strict=True))
    ratio = statistics.median(plain_time / fast_time for fast_time, plain_time in times)
    return statistics.median(columns[0]), statistics.median(columns[1]), ratio


def widen(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the last dimension to text_maxlength."""
    extra = max(0, MAXLENGTH - ids.shape[-1])
    return F.pad(ids, (0, extra)), F.pad(mask, (0, extra))


class Bench:
    """A corpus, a reader and a query-side retriever."""

    def __init__(self, directory: Path, n_passages: int, k: int, batch: int) -> None:
        sys.path.append(str(Path(__file__).resolve().parent.parent / "preprocessing"))  # scripts, which import others
        from make_tiny_models import build_tiny_models

        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 5))) for _ in range(500)]
        texts = [" ".join(rng.choices(words, k=rng.randint(30, 80))) for _ in range(n_passages)]
        build_tiny_models(texts[:200], directory, vocabulary_size=2000)
        self.reader_tokenizer = load_reader_tokenizer(str(directory / "reader"))
        self.retriever_tokenizer = load_retriever_tokenizer(str(directory / "retriever"))
        texts = [self._cut(text, rng) for text in texts]
        self.passages = [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]
        self.file = directory / "passages.jsonl"
        self.file.write_text("".join(json.dumps(passage) + "\n" for passage in self.passages), encoding="utf-8")
        self.k, self.batch = k, batch
        torch.manual_seed(0)
        shape = {"d_model": 256, "d_kv": 64, "d_ff": 640, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
        vocabulary = len(self.reader_tokenizer)
        shape_of_reader = T5Config(
            vocab_size=vocabulary, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, **shape
        )
        self.reader = FusionInDecoder(shape_of_reader)
        shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        retriever = Contriever(BertConfig(vocab_size=len(self.retriever_tokenizer), **shape, **dropout))
        self.retriever = DualEncoder(retriever, query_side=True)
        formats = {"encoder_format": "{query} {text}", "retriever_format": "{text}"}
        self.inputs = Inputs(
            config.Model(text_maxlength=MAXLENGTH, **formats),
            self.reader_tokenizer,
            self.retriever_tokenizer,
            device=CPU,
        )
        self.embedder = CorpusEmbedder(self.retriever, self.inputs, CPU, "fp32", batch_size=64)

    def _cut(self, text: str, rng: random.Random) -> str:
        """The beginning of the text, with 60 to 160 tokens of the retriever."""
        tokenizer: RetrieverTokenizer = self.retriever_tokenizer
        wanted, words = rng.randint(60, 160), (text + " " + text).split()
        while len(tokenizer.encode([" ".join(words)])[0]) > wanted:
            words = words[:-2]
        return " ".join(words)

    def embedding(self, repeats: int) -> tuple[float, float, float]:
        rows = range(len(self.passages))
        into = torch.zeros(len(rows), self.retriever.dim, dtype=torch.float16)

        def fast() -> None:
            self.embedder.embed_rows(
                self.passages, rows, lambda first, vectors: into[first : first + len(vectors)].copy_(vectors)
            )

        @torch.no_grad()
        def plain() -> None:
            for start in range(0, len(rows), 64):
                tokens = self.inputs.passage_tokens(self.passages[start : start + 64])
                ids, mask = widen(*pad_rows(tokens, self.retriever_tokenizer.pad_id))
                into[start : start + 64] = self.retriever.embed_passages(ids, mask).half()

        return median_ratio(fast, plain, repeats)

    def tokenizing(self, repeats: int) -> tuple[float, float, float]:
        corpus, rows, max_tokens = open_passages([self.file]), range(len(self.passages)), self.embedder.max_tokens
        plain = Windows(corpus, rows, self.inputs, max_tokens)

        def token_cache() -> TokenCache:
            return TokenCache(self.file, "0" * 16, "0" * 16, len(self.retriever_tokenizer))

        with token_cache().writer(rows, len(rows), mean_tokens=110) as writer:
            for start, window in zip(plain.starts, plain, strict=True):
                writer.add(start, *window.tokens())
        cached = Windows(corpus, rows, self.inputs, max_tokens, cache=token_cache())
        sizes = [size / len(rows) for size in (writer.size, self.file.stat().st_size)]
        print("Token ids take {:.0f} bytes a passage, its line in the corpus {:.0f}".format(*sizes))
        return median_ratio(partial(deque, cached, 0), partial(deque, plain, 0), repeats, time.process_time)

    def examples(self) -> tuple[list[str], list[list[dict]], Targets]:
        queries = [f"question: {p['text'][:40]} answer: <extra_id_0>" for p in self.passages[: self.batch]]
        passages = [self.passages[i * self.k : (i + 1) * self.k] for i in range(self.batch)]
        return queries, passages, self.inputs.targets(queries, [f"<extra_id_0> {q[10:30]}" for q in queries])

    def training(self, repeats: int) -> tuple[float, float, float]:
        queries, passages, targets = self.examples()
        atlas = Atlas(self.reader, self.retriever, n_context=self.k, mode=MODES["pdist"])
        flags = {"lr": 1e-5, "weight_decay": 0.01, "scheduler": "fixed", "warmup_steps": 0, "total_steps": 100}
        optimizers = Optimizers(config.Optimisation(**flags), {"reader": self.reader, "retriever": self.retriever})
        from_index = torch.randn(self.batch, self.k, self.retriever.dim)

        def fast() -> None:
            rows = self.inputs.reader(queries, passages)
            tensors = TrainingTensors(*rows, targets, *self.inputs.queries(queries), passage_embeddings=from_index)
            optimizers.backward(atlas(tensors).total)
            optimizers.step(0)

        def plain() -> None:
            ids, mask = widen(*self.inputs.reader(queries, passages)[:2])
            flat = [passage for of_query in passages for passage in of_query]
            again = widen(*self.inputs.passages(flat)[:2])
            tensors = TrainingTensors(ids, mask, None, targets, *widen(*self.inputs.queries(queries)), *again)
            optimizers.backward(atlas(tensors).total)
            optimizers.step(0)

        return median_ratio(fast, plain, repeats)

    def evaluation(self, repeats: int) -> tuple[float, float, float]:
        queries, passages, targets = self.examples()
        self.reader.eval()

        def read(hidden: torch.Tensor, mask: torch.Tensor) -> None:
            logits = self.reader.logits(hidden, mask, targets.decoder_ids)
            token_log_probabilities(logits, targets.labels)

        def write(hidden: torch.Tensor, mask: torch.Tensor) -> None:
            self.reader.write(hidden, mask, max_length=16)

        @torch.no_grad()
        def fast() -> None:
            ids, mask, lengths = self.inputs.reader(queries, passages)
            fused = fuse(self.reader.encode(ids, mask, lengths), mask, lengths)
            read(fused.hidden, fused.mask)
            write(fused.hidden, fused.mask)

        @torch.no_grad()
        def plain() -> None:
            ids, mask = widen(*self.inputs.reader(queries, passages)[:2])
            read(self.reader.encode(ids, mask), mask.flatten(1))
            write(self.reader.encode(ids, mask), mask.flatten(1))

        return median_ratio(fast, plain, repeats)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--passages", type=int, default=512, help="passages to embed")
    parser.add_argument("--context", type=int, default=10, help="passages per query")
    parser.add_argument("--batch", type=int, default=2, help="queries per step")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of measurements; the median is shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.passages, options.context, options.batch)
        tokenizing = bench.tokenizing(options.repeats)
        print(f"{'':12}{'fast':>12}{'plain':>12}{'':14}{'ratio':>8}")
        for name, (fast, plain, ratio), amount, unit in (
            ("embedding", bench.embedding(options.repeats), options.passages, "passages/s"),
            ("training", bench.training(options.repeats), 1, "steps/s"),
            ("evaluation", bench.evaluation(options.repeats), options.batch, "examples/s"),
            ("tokenizing", tokenizing, options.passages, "passages/s"),
        ):
            print(f"{name:12}{amount / fast:12.2f}{amount / plain:12.2f} {unit:13}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
