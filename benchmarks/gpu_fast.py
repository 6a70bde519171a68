"""Is it as fast as the card allows? Every figure of `benchmarks.gpu_check` stands beside the card's limit."""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atlas.embedding import Embedder, passage_embedder
from atlas.index.build import compress
from atlas.index.codec import Compression
from atlas.index.flat import FlatIndex
from atlas.index.pq_search import ProductQuantizerSearch
from atlas.index.sharded import LocalIndex, ShardedIndex
from atlas.runtime import device as devices
from benchmarks.gpu_bench import FULL, ROOT, Bench, Limits, Row, Sizes, free, has_module, waits
from benchmarks.gpu_search import NO_FAISS
from benchmarks.memory import batch_of, build, update
from benchmarks.step import models, peak, seconds

PASSAGE = 144  # tokens of a Wikipedia passage of 100 words
MORE_MEMORY = 1.1  # than docs/training.md says is too much
K = 100


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
        measured = f"{sizes.embedded / taken:.0f} passages/s"
        yield Row(check, "near the matrix product", measured, bench.share_of_peak(count, taken))


def documented_memory() -> dict[str, float]:
    """GiB of a training step on one GPU, by the size of the reader, from the table in docs/training.md."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = re.search(r"\| reader \| 1, no sharding .*?\n\n", text, re.DOTALL)[0]
    return {name: float(gib) for name, gib in re.findall(r"^\| (\w+) \| ([\d.]+) \|", table, re.MULTILINE)}


def step_speed(bench: Bench) -> Iterator[Row]:
    """Steps of query-side training at the settings of docs/training.md."""
    for name in bench.sizes.readers:
        for checkpointing in (True, False):
            try:
                yield training_step(bench, name, checkpointing)
            except torch.OutOfMemoryError:
                expected = "fits" if checkpointing else "fits, or not: nothing is recomputed"
                yield Row(step_name(bench, name, checkpointing), expected, "out of memory", ok=not checkpointing)
            free(bench.device)


def step_name(bench: Bench, reader: str, checkpointing: bool) -> str:
    step = bench.sizes.step
    shape = f"{step.per_gpu_batch_size} × {step.n_context} × {step.text_maxlength}"
    return f"training step, {reader}, {shape}, {'with' if checkpointing else 'without'} checkpointing"


def training_step(bench: Bench, reader: str, checkpointing: bool) -> Row:
    """Time, memory and waits of one step."""
    device, sizes = bench.device, bench.sizes
    settings = sizes.step._replace(gradient_checkpoint=checkpointing, precision=bench.precision)
    atlas, optimizers = build(sizes.readers[reader], sizes.retriever, settings, device)
    batch = batch_of(settings, sizes.retriever.vocab_size, sizes.retriever.hidden_size, device)
    step = partial(update, atlas, optimizers, batch, settings.precision)
    count = operations(step)
    free(device)
    taken = seconds(step, sizes.repeats, device)
    memory, waited = devices.peak_memory_gib(device), waits(step, device)
    documented = documented_memory().get(reader) if checkpointing else None
    expected = "1 wait" + (f", {documented} GiB (docs/training.md)" if documented else "")
    measured = f"{1e3 * taken:.4g} ms"
    if bench.on_gpu:
        measured += f", {waited} wait{'' if waited == 1 else 's'}, {memory:.1f} GiB"
    fits = documented is None or not bench.on_gpu or memory <= MORE_MEMORY * documented
    share, ok = bench.share_of_peak(count, taken), fits and waited in (None, 1)
    return Row(step_name(bench, reader, checkpointing), expected, measured, share, ok)


def timed_search(bench: Bench, name: str, index: LocalIndex, read: int) -> Iterator[Row]:
    """Searches beside the time that reading `read` bytes once takes."""
    for b in bench.sizes.queries:
        queries = torch.randn(b, bench.sizes.dimension, device=bench.device)
        taken = seconds(partial(index.search, queries, K), bench.sizes.repeats, bench.device)
        share = bench.share_of_bandwidth(read, taken)
        yield Row(
            f"{name}, {b} {'query' if b == 1 else 'queries'}", bench.to_read(read), f"{1e3 * taken:.4g} ms", share
        )


def search_speed(bench: Bench) -> Iterator[Row]:
    """Exact search, product quantizer codes, and with Faiss inverted files."""
    n, dimension, m = bench.sizes.rows, bench.sizes.dimension, bench.sizes.code_size
    rows = torch.empty(n, dimension, dtype=torch.float16, device=bench.device)
    for part in rows.split(2**18):
        part.normal_()
    yield from timed_search(bench, f"flat search, {n} × {dimension}", FlatIndex(rows), rows.nbytes)
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
    """Greedy answers of a T5 base: every token reads the decoder and the keys and values of all passages again."""
    sizes, device, step = bench.sizes, bench.device, bench.sizes.step
    reader = models(sizes.layers, sizes.width, device)[0].eval()
    if dtype := devices.compute_dtype(bench.precision):
        for block in reader.blocks:  # as for an evaluation
            block.to(dtype)
    reader.generation_config.eos_token_id = None  # all answers are as long as they may be
    for n in sizes.answered:
        ids = torch.randint(3, 30000, (n, step.n_context, step.text_maxlength), device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        length = sizes.tokens + 1  # with the start token
        with torch.no_grad(), devices.autocast(device, bench.precision):
            hidden = reader.encode(ids, mask)  # (n, K·L, d)
            write = partial(reader.write, hidden, mask.flatten(1), max_length=length, min_length=length)
            taken = seconds(write, sizes.repeats, device)
            waited = waits(write, device)
        read = sum(
            parameter.nbytes for part in (reader.decoder.block, reader.lm_head) for parameter in part.parameters()
        )
        read += 2 * sizes.layers * hidden.numel() * (dtype or torch.float32).itemsize  # keys and values, as wide as d
        check = f"answers, {n} × {step.n_context} × {step.text_maxlength}, {sizes.tokens} tokens, {bench.precision}"
        measured = f"{n * sizes.tokens / taken:.4g} tokens/s, {1e3 * taken / sizes.tokens:.3g} ms a token"
        measured += f", {waited} waits" if waited is not None else ""
        share = bench.share_of_bandwidth(sizes.tokens * read, taken)
        yield Row(check, f"a token: {bench.to_read(read)}", measured, share)


CHECKS = (embedding_speed, step_speed, search_speed, answer_speed)
