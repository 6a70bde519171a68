"""Is it as fast as the card allows? Every figure of `benchmarks.gpu_check` stands beside the card's limit."""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from atlas.embedding import Embedder, passage_embedder
from atlas.index.build import compress
from atlas.index.codec import Compression
from atlas.index.flat import FlatIndex
from atlas.index.pq_search import ProductQuantizerSearch
from atlas.index.sharded import LocalIndex, ShardedIndex
from atlas.model.grouping import fuse
from atlas.model.reader import FusionInDecoder
from atlas.runtime import device as devices
from benchmarks.gpu_bench import FULL, ROOT, Bench, Limits, Row, Sizes, free, has_module, waits
from benchmarks.gpu_search import NO_FAISS
from benchmarks.memory import GIB, READERS, Settings, batch_of, build, memory_per_gpu, update
from benchmarks.step import models, peak, seconds, tokens

PASSAGE = 160  # tokens
MORE_MEMORY = 1.1  # than is documented or counted is too much
K = 100
BEAMS = (1, 4)
# Shares of the largest matrix product: embedding, and training with readers of these sizes.
EMBEDDING_GOAL, STEP_GOALS = 0.55, {"base": 0.31, "xl": 0.45}
SEARCH_GOAL = 1.5  # times as long as reading the index once
ANSWER_GOAL = 3  # times as fast as transformers' own way


def measure_limits(device: torch.device, sizes: Sizes) -> Limits:
    """What the card reaches at best."""
    dtype = torch.bfloat16 if device.type == "cuda" else devices.compute_dtype(devices.cpu_precision())
    square = (sizes.product,) * 3
    best = peak(dtype or torch.float32, sizes.repeats, device, [square])
    source = torch.zeros(sizes.copied // 2, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copied = sizes.copied / seconds(lambda: copy.copy_(source), sizes.repeats, device)
    return Limits(best.flops, copied, best.library)


def limits(bench: Bench) -> Iterator[Row]:
    """The limits themselves."""
    n, found = bench.sizes.product, bench.limits
    product = f"{found.flops / 1e12:.4g} TFLOP/s by {found.library}"
    yield Row(f"matrix product {n}³, {bench.precision}", "the limit", product, "100%")
    measured = f"{found.bytes / 1e9:.4g} GB/s"
    yield Row(f"copy of {bench.sizes.copied / 2**21:.0f} MiB, read and written", "the limit", measured, "100%")


def operations(work: Callable[[], object]) -> int:
    """Floating point operations of matrix products and attention, recomputed ones included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def embedding_speed(bench: Bench) -> Iterator[Row]:
    """Passages through BERT, without reading and tokenizing them."""
    sizes, device = bench.sizes, bench.device
    retriever = models(sizes.layers, sizes.width, device)[1].eval()
    ids = torch.randint(1000, 30000, (sizes.embedded, PASSAGE), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::3, PASSAGE - 14 :] = False
    on_gpu = (("fp16", False), ("bf16", False), ("bf16", True))
    for precision, cudnn in on_gpu if bench.on_gpu else ((bench.precision, False),):
        embedder = passage_embedder(retriever.passage_encoder, device, precision)

        def embed(embedder: Embedder = embedder, cudnn: bool = cudnn) -> None:
            attention = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext()
            with torch.no_grad(), attention:
                embedder(ids, mask)

        count, taken = operations(embed), seconds(embed, sizes.repeats, device)
        check = f"embedding {sizes.embedded} × {PASSAGE} tokens, {precision}"
        check += ", cuDNN's attention (off in runs)" if cudnn else ""
        share = bench.share_of_peak(count, taken)
        yield Row(
            check,
            "what the others reach" if cudnn else f"goal: {of_product(EMBEDDING_GOAL)}",
            f"{sizes.embedded / taken:.0f} passages/s",
            of_product(share),
            reached=cudnn or bench.reaches(share, EMBEDDING_GOAL),
        )


def of_product(share: float) -> str:
    """This share of the fastest matrix product's speed."""
    return f"{share:.0%} of the matrix product"


def times_waited(waited: int | None) -> str:
    """How often the host waited, behind another figure; nothing on a CPU."""
    return "" if waited is None else f", {waited} wait{'' if waited == 1 else 's'}"


def documented_memory() -> dict[str, float]:
    """GiB of a training step on one GPU, by the size of the reader, from the table in docs/training.md."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = re.search(r"\| reader \| 1, no sharding .*?\n\n", text, re.DOTALL)[0]
    return {name: float(gib) for name, gib in re.findall(r"^\| (\w+) \| ([\d.]+) \|", table, re.MULTILINE)}


class Memory(NamedTuple):
    """What a step should need."""

    gib: float
    source: str


def expected_memory(reader: str, settings: Settings) -> Memory | None:
    """Of a step on one GPU; None of readers that are too small to tell."""
    if reader not in READERS:
        return None
    if settings.gradient_checkpoint:
        return Memory(documented_memory()[reader], "docs/training.md")
    return Memory(sum(memory_per_gpu(reader, settings, world_size=1).values()) / GIB, "counted")


def step_speed(bench: Bench) -> Iterator[Row]:
    """Steps of query-side training at the settings of docs/training.md."""
    step = bench.sizes.step._replace(precision=bench.precision)
    shape = f"{step.per_gpu_batch_size} × {step.n_context} × {step.text_maxlength}"
    for reader in bench.sizes.readers:
        for checkpointing in (True, False):
            check = f"training step, {reader}, {shape}, {'with' if checkpointing else 'without'} checkpointing"
            settings = step._replace(gradient_checkpoint=checkpointing)
            needed = expected_memory(reader, settings)
            try:
                yield training_step(bench, check, reader, settings, needed)
            except torch.OutOfMemoryError:
                expected = f"{needed.gib:.1f} GiB ({needed.source})" if needed else "fits"
                has = torch.cuda.get_device_properties(bench.device).total_memory / GIB
                too_large = needed is not None and MORE_MEMORY * needed.gib > has
                yield Row(check, expected, f"out of memory: the card has {has:.1f} GiB", ok=too_large)
            free(bench.device)


def training_step(bench: Bench, check: str, reader: str, settings: Settings, needed: Memory | None) -> Row:
    """Time, memory and waits of one step."""
    device, sizes = bench.device, bench.sizes
    atlas, optimizers = build(sizes.readers[reader], sizes.retriever, settings, device)
    batch = batch_of(settings, sizes.retriever.vocab_size, sizes.retriever.hidden_size, device)
    step = partial(update, atlas, optimizers, batch, settings.precision)
    count = operations(step)
    free(device)
    taken = seconds(step, sizes.repeats, device)
    memory, waited = devices.peak_memory_gib(device), waits(step, device)
    share, goal = bench.share_of_peak(count, taken), STEP_GOALS.get(reader)
    expected = "1 wait" + (f", {needed.gib:.1f} GiB ({needed.source})" if needed else "")
    return Row(
        check,
        expected + (f", goal: {of_product(goal)}" if goal else ""),
        f"{1e3 * taken:.4g} ms" + times_waited(waited) + (f", {memory:.1f} GiB" if bench.on_gpu else ""),
        of_product(share),
        ok=waited in (None, 1) and (needed is None or not bench.on_gpu or memory <= MORE_MEMORY * needed.gib),
        reached=goal is None or bench.reaches(share, goal),
    )


def timed_search(bench: Bench, name: str, index: LocalIndex, read: int, exact: bool = False) -> Iterator[Row]:
    """Searches beside the time that reading `read` bytes once takes; exact ones have a goal, and wait once."""
    for b in bench.sizes.queries:
        search = partial(index.search, torch.randn(b, bench.sizes.dimension, device=bench.device), K)
        taken = seconds(search, bench.sizes.repeats, bench.device)
        waited = waits(search, bench.device) if exact else None
        share = bench.share_of_bandwidth(read, taken)
        yield Row(
            f"{name}, {b} {'query' if b == 1 else 'queries'}",
            bench.to_read(read) + (f", goal: at most {SEARCH_GOAL} × that, 1 wait" if exact else ""),
            f"{1e3 * taken:.4g} ms" + times_waited(waited),
            of_bandwidth(share),
            ok=waited in (None, 1),
            reached=not exact or bench.reaches(share, 1 / SEARCH_GOAL),
        )


def of_bandwidth(share: float) -> str:
    """This share of the largest copy's speed."""
    return f"{share:.0%} of the bandwidth"


def search_speed(bench: Bench) -> Iterator[Row]:
    """Exact search, product quantizer codes, and with Faiss inverted files."""
    n, dimension, m = bench.sizes.rows, bench.sizes.dimension, bench.sizes.code_size
    rows = torch.empty(n, dimension, dtype=torch.float16, device=bench.device)
    for part in rows.split(2**18):
        part.normal_()
    yield from timed_search(bench, f"flat search, {n} × {dimension}", FlatIndex(rows), rows.nbytes, exact=True)
    del rows
    codes = torch.randint(256, (n, m), dtype=torch.uint8, device=bench.device)
    index = ProductQuantizerSearch(codes, torch.randn(m, 256, dimension // m))
    yield from timed_search(bench, f"PQ{m} search, {n} codes", index, codes.nbytes)
    free(bench.device)
    yield from inverted_file(bench)


def inverted_file(bench: Bench) -> Iterator[Row]:
    """Faiss, on the GPU where it can; the size that the CPU searches as well, because the CPU encodes it."""
    n, dimension, m = bench.sizes.compared, bench.sizes.dimension, bench.sizes.code_size
    lists = 256 if bench.sizes is FULL else 16
    kind = f"IVF{lists},PQ{m}"
    if not has_module("faiss"):
        yield Row(f"{kind} search, {n} codes", "lists that are looked into, read once", NO_FAISS)
        return
    flat = ShardedIndex(range(n), torch.randn(n, dimension).half())
    compression = Compression(kind, nprobe=lists // 8, train_size=min(n, 256 * 64))
    index = compress(flat, compression, device=bench.device)
    yield from timed_search(bench, f"{kind} search, {n} codes, 1/8 of the lists", index, n * m // 8)


def answer_speed(bench: Bench) -> Iterator[Row]:
    """Answers of a T5 base from passages whose lengths differ, and the plain way to them."""
    sizes, device, step = bench.sizes, bench.device, bench.sizes.step
    reader = models(sizes.layers, sizes.width, device)[0].eval()
    if dtype := devices.compute_dtype(bench.precision):
        for block in reader.blocks:  # as for an evaluation
            block.to(dtype)
    reader.generation_config.eos_token_id = None  # all answers are as long as they may be
    for n in sizes.answered:
        lengths = torch.randint(step.text_maxlength // 2, step.text_maxlength + 1, (n, step.n_context))
        ids, mask = (part.to(device) for part in tokens(lengths))  # (n, K, L): a quarter is padding
        with torch.no_grad(), devices.autocast(device, bench.precision):
            hidden = reader.encode(ids, mask)  # (n, K·L, d)
        for beams in BEAMS:
            yield from timed_answers(bench, reader, Encoded(hidden, mask, lengths.numpy()), beams)


class Encoded(NamedTuple):
    """Passages as the decoder gets them."""

    hidden: torch.Tensor  # (n, K·L, d)
    mask: torch.Tensor  # (n, K, L)
    lengths: np.ndarray  # (n, K)


def timed_answers(bench: Bench, reader: FusionInDecoder, encoded: Encoded, beams: int) -> Iterator[Row]:
    """Every token reads the decoder and the keys and values of all passages again."""
    sizes, device, fused, n = bench.sizes, bench.device, fuse(*encoded), len(encoded.hidden)
    length = sizes.tokens + 1  # with the start token
    write = partial(reader.write, fused.hidden, fused.mask, max_length=length, min_length=length, num_beams=beams)
    plain = partial(plain_answers, plain_reader(reader), encoded, length=length, beams=beams)
    check = f"answers, {n} × {sizes.step.n_context} × up to {encoded.mask.shape[2]}, {sizes.tokens} tokens, "
    check += f"{f'{beams} beams' if beams > 1 else 'greedy'}, {bench.precision}"
    with devices.autocast(device, bench.precision):
        taken, waited = seconds(write, sizes.repeats, device), waits(write, device)
    read = sum(parameter.nbytes for part in (reader.decoder.block, reader.lm_head) for parameter in part.parameters())
    itemsize = (devices.compute_dtype(bench.precision) or torch.float32).itemsize
    read += 2 * sizes.layers * fused.hidden.numel() * itemsize  # keys and values, as wide as d
    measured = f"{n * sizes.tokens / taken:.4g} tokens/s, {1e3 * taken / sizes.tokens:.3g} ms a token"
    share = of_bandwidth(bench.share_of_bandwidth(sizes.tokens * read, taken))
    yield Row(check, f"a token: {bench.to_read(read)}", measured + times_waited(waited), share)
    check, expected = f"{check}, plain", f"goal: {ANSWER_GOAL} × as long as above"
    try:
        with devices.autocast(device, bench.precision):
            ratio = seconds(plain, sizes.repeats, device) / taken
    except torch.OutOfMemoryError:
        yield Row(check, expected, "out of memory")
        return
    measured = f"{1e3 * ratio * taken / sizes.tokens:.3g} ms a token: {ratio:.1f} × as long"
    yield Row(check, expected, measured, reached=bench.reaches(ratio, ANSWER_GOAL))


def plain_reader(reader: FusionInDecoder) -> T5ForConditionalGeneration:
    """transformers' own T5 with the same weights."""
    with torch.device("meta"):
        plain = T5ForConditionalGeneration(reader.config).eval()
    plain.load_state_dict(reader.state_dict(), assign=True)
    plain.generation_config = reader.generation_config
    return plain


def plain_answers(
    plain: T5ForConditionalGeneration, encoded: Encoded, *, length: int, beams: int
) -> torch.Tensor:  # (n, length)
    """Its `generate`: the decoder has keys and values for each beam, and also of padding, which the mask hides."""
    return plain.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
        attention_mask=encoded.mask.flatten(1),
        max_length=length,
        min_length=length,
        num_beams=beams,
        do_sample=False,
    )


CHECKS = (embedding_speed, step_speed, search_speed, answer_speed)
