"""Memory that a training step needs on each GPU, from base to xxl, computed without a GPU: tables of docs/training.md.

    python -m benchmarks.memory

The step is the real one (`atlas.model.atlas`, `atlas.training.optim`, `atlas.runtime.parallel`), run on fake
tensors: they have shapes but no contents, and a step with them allocates and frees what a real one would. Added to that
is the memory used between the steps (weights, gradients, the optimizer's moments, the index), which is computed from
sizes.
"""

import argparse
import gc
import os
import warnings
from collections.abc import Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, T5Config
from transformers.utils import logging

from atlas.config import FIELDS, Lora, Optimisation
from atlas.model.adapters import add_adapters, lower_frozen
from atlas.model.atlas import Atlas, Losses, TrainingTensors
from atlas.model.inputs import Targets
from atlas.model.pretrained import checkpoint_activations, set_dropout
from atlas.model.reader import FusionInDecoder
from atlas.model.retriever import Contriever, DualEncoder
from atlas.model.signals import MODES
from atlas.runtime import device as devices
from atlas.runtime import parallel
from atlas.runtime.parallel import agree_on_norm, finish_gradients, local_part, shard_weights
from atlas.training import optim
from atlas.training.moments import kept_of
from atlas.training.optim import Optimizers

CPU = torch.device("cpu")
GIB = 2**30
QUERY = 64  # tokens of a question
PASSAGES = 32_000_000  # of the Wikipedia index
PASSAGE_BYTES = {"flat (fp16)": 2 * 768, "pq, code size 64": 64}
READERS = {  # google/t5-{size}-lm-adapt: d_model, d_ff, layers of each stack, heads
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
Size = str | tuple[int, int, int, int] | T5Config  # of `READERS`, or another shape
WHOLE = "no sharding"
SHARDINGS = {  # by their names in the tables
    WHOLE: {},
    "`--shard_optim`": {"shard_optim": True},
    "`--shard_optim --shard_grads`": {"shard_optim": True, "shard_grads": True},
}


class Settings(NamedTuple):
    """The flags that the memory of a step depends on."""

    per_gpu_batch_size: int = 1
    n_context: int = 40
    text_maxlength: int = 384
    target_maxlength: int = 32
    precision: str = "bf16"
    gradient_checkpoint: bool = True
    gradient_checkpoint_every: int = 1
    dropout: float = 0.1
    lora_rank: int = 0
    retriever_lora_rank: int = 0
    frozen_precision: str = "fp32"
    shard_optim: bool = False
    shard_grads: bool = False
    optimizer: str = "adamw"
    offload_optimizer: bool = False
    retriever_n_context: int | None = None  # passages that the retriever learns from; None: as n_context
    train_retriever: bool = True
    query_side: bool = True
    gold_score_mode: str = "pdist"
    gradient_checkpoint_retriever: bool | None = None  # None: as that of the reader
    training: bool = True  # False: the pass of an evaluation, before it generates

    @property
    def passages(self) -> int:
        """Of a query in training."""
        return self.retriever_n_context or self.n_context


class Held(NamedTuple):
    """Bytes on one GPU between forward and backward passes."""

    weights: int
    gradients: int
    moments: int


def storages_of(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of the tensors in nested tuples, lists and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Sum(NamedTuple):
    """The sum of two gradients of the same tensor, just computed."""

    storage: StorageWeakRef
    size: int
    term: StorageWeakRef  # the gradient to which the other one was added
    before: int  # live bytes before the sum was computed


class LiveMemory(TorchDispatchMode):
    """Counts the live bytes of tensors created inside the block, their peak, and the operations of matrix products.

    Autograd adds a tensor's second gradient to the first one in place if nothing else references that one, but not
    under a dispatch mode (`isTensorSubclassLike` in ATen/TensorSubclassLikeUtils.h). Such a sum is counted as if it
    were in place: for a shared embedding it is as large as the whole vocabulary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.flops = 0
        self._sizes: dict[StorageWeakRef, int] = {}
        self._bound = 0  # upper bound of the live bytes: freed ones may still be counted
        self._sum: Sum | None = None  # the result of the last operation, not yet counted
        self._resize = torch.UntypedStorage.resize_

    @property
    def now(self) -> int:
        """The live bytes."""
        self._settle()
        return self._alive()

    def _alive(self) -> int:
        self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
        self._bound = sum(self._sizes.values())
        return self._bound

    def __enter__(self) -> "LiveMemory":
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._settle()
            self._resize(storage, size)  # how FSDP2 frees and fills gathered weights, without the dispatcher
            self._count(StorageWeakRef(storage), storage.nbytes())

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        self._settle()
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # is called again with this rank's local tensors
        self._settle()
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        given = {storage._cdata for storage in storages_of((args, kwargs))}
        for storage in storages_of(result):
            if storage._cdata not in given:  # neither a view nor an in-place result
                self._made(function, args, StorageWeakRef(storage), storage.nbytes())
        return result

    def _made(self, function: torch._ops.OpOverload, args: tuple, storage: StorageWeakRef, size: int) -> None:
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()  # and not recomputing
        if in_backward and function is torch.ops.aten.add.Tensor:
            self._sum = Sum(storage, size, StorageWeakRef(args[0].untyped_storage()), self._alive())
        else:
            self._count(storage, size)

    def _settle(self) -> None:
        """Count the last sum, now that its term has been freed if only autograd referenced it."""
        made, self._sum = self._sum, None
        if made is None:
            return
        if not made.term.expired():
            self.peak = max(self.peak, made.before + made.size)
        self._count(made.storage, made.size)

    def _count(self, storage: StorageWeakRef, size: int) -> None:
        self._bound += size - self._sizes.get(storage, 0)
        self._sizes[storage] = size
        if self._bound > self.peak:
            self.peak = max(self.peak, self._alive())


def reader_config(size: Size) -> T5Config:
    """That of a T5 v1.1 of this shape."""
    if isinstance(size, T5Config):
        return size
    width, inner, layers, heads = READERS[size] if isinstance(size, str) else size
    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=inner,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )


def make_reader(size: Size, dropout: float) -> FusionInDecoder:
    """A reader with random weights and the shape of a T5 v1.1."""
    reader = FusionInDecoder(reader_config(size))
    reader.tie_output_embeddings(not reader.config.is_gated_act)  # T5 v1.0 ties them, later ones do not
    set_dropout(reader, dropout)
    return reader


def adapt(reader: FusionInDecoder, settings: Settings) -> None:
    """Adapters for all linear layers of the reader, as a run gives it with the flags."""
    if settings.lora_rank:
        add_adapters(reader, reader.blocks, Lora(settings.lora_rank, 2 * settings.lora_rank, 0.0, ()), "lora")
    if settings.frozen_precision == "bf16":
        lower_frozen(reader, torch.bfloat16)


def make_encoders(retriever: BertConfig, settings: Settings) -> DualEncoder:
    """The encoders with random weights; what is not trained is frozen."""
    contriever, of_retriever = Contriever(retriever), settings.gradient_checkpoint_retriever
    if settings.gradient_checkpoint if of_retriever is None else of_retriever:
        checkpoint_activations(contriever, settings.gradient_checkpoint_every)
    encoders = DualEncoder(contriever, query_side=settings.query_side)
    if rank := settings.retriever_lora_rank:
        if not isinstance(next(encoders.parameters()), FakeTensor):  # copies of fake ones do not mix with others
            encoders.share_weights()
        layers = encoders.query_encoder.encoder.layer
        add_adapters(encoders.query_encoder, layers, Lora(rank, 2 * rank, 0.0, ()), "retriever_lora")
    if not settings.train_retriever:
        encoders.requires_grad_(False)
    return encoders


class Weight(NamedTuple):
    """A parameter of a model."""

    shape: torch.Size
    itemsize: int  # bytes of a number
    trained: bool


def weights_of(model: torch.nn.Module) -> list[Weight]:
    """All of a model's, each once."""
    return [Weight(p.shape, p.itemsize, p.requires_grad) for p in model.parameters()]


def weights_of_reader(size: Size, settings: Settings) -> list[Weight]:
    """All its weights."""
    with torch.device("meta"):
        reader = make_reader(size, 0.0)
        adapt(reader, settings)
    return weights_of(reader)


def build(
    reader: Size, retriever: BertConfig, settings: Settings, device: torch.device = CPU
) -> tuple[Atlas, Optimizers]:
    """Models and optimizers of query-side training on this rank, as a run makes them, with random weights."""
    with device:
        fusion = make_reader(reader, settings.dropout)
        encoders = make_encoders(retriever, settings)
        adapt(fusion, settings)
    if settings.gradient_checkpoint:
        checkpoint_activations(fusion, settings.gradient_checkpoint_every)
    if settings.shard_grads:
        dtype = devices.compute_dtype(settings.precision)
        shard_weights(fusion, fusion.blocks, device, block_dtype=dtype, forward_methods=("encode",))
    mode = MODES[settings.gold_score_mode] if settings.train_retriever else None
    atlas = Atlas(fusion, encoders, n_context=settings.n_context, mode=mode)
    flags = {"lr": 1e-5, "weight_decay": 0.01, "scheduler": "fixed", "warmup_steps": 0, "total_steps": 10}
    names = ("shard_optim", "optimizer", "offload_optimizer")
    flags = Optimisation(**flags, **{name: getattr(settings, name) for name in names})
    optimizers = Optimizers(flags, {"reader": fusion, "retriever": encoders})
    return atlas.train(), optimizers


def batch_of(settings: Settings, vocabulary: int, embedding: int, device: torch.device = CPU) -> TrainingTensors:
    """A batch in which all rows have the maximum length."""
    n, k, length = settings.per_gpu_batch_size, settings.passages, settings.text_maxlength

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, shape, device=device)

    def mask(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bool, device=device)

    targets = Targets(ids(n, settings.target_maxlength), ids(n, settings.target_maxlength))
    reading = ids(n, k, length), mask(n, k, length), None, targets
    if not settings.train_retriever:
        return TrainingTensors(*reading)
    query = ids(n, QUERY), mask(n, QUERY)
    if not settings.query_side:
        return TrainingTensors(*reading, *query, ids(n * k, length), mask(n * k, length))
    return TrainingTensors(*reading, *query, passage_embeddings=torch.randn(n, k, embedding, device=device))


class FusedNorm(torch.autograd.Function):
    """What CUDA's kernel for T5's norm keeps and makes; on a CPU it falls into parts that keep their results."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """(…, d), (d,) -> (…, d)."""
        normed, of_rows = torch.ops.aten._fused_rms_norm(hidden, weight.shape, weight, eps)  # (…, d), (…, 1)
        context.save_for_backward(hidden, weight, of_rows)
        return normed

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Of hidden and weight: of the right size, without values."""
        hidden, weight, _ = context.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight) if context.needs_input_grad[1] else None, None


def use_cuda_kernels() -> None:
    """Use CUDA's kernels for attention, norms and dropout from now on: those of a CPU keep more tensors.

    Attention uses the memory-efficient kernel: flash attention accepts no bias, and this one also gives it a gradient.
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]

    def rms_norm(hidden, shape, weight=None, eps=None):
        return FusedNorm.apply(hidden, weight, eps)

    def dropout(hidden, p=0.5, training=True, inplace=False):
        return torch.native_dropout(hidden, p, True)[0] if training and p > 0 else hidden

    F.scaled_dot_product_attention, F.rms_norm, F.dropout = attention, rms_norm, dropout


def update(atlas: Atlas, optimizers: Optimizers, batch: TrainingTensors, precision: str) -> Losses:
    """One step as `atlas.training.trainer` takes it."""
    with devices.autocast(batch.reader_ids.device, precision):
        losses = atlas(batch)
    optimizers.backward(losses.total)
    finish_gradients(atlas)
    optimizers.step(0)
    return losses


def read(atlas: Atlas, batch: TrainingTensors, precision: str) -> Losses:
    """The pass in which an evaluation reads a batch."""
    with torch.no_grad(), devices.autocast(batch.reader_ids.device, precision):
        return atlas.eval()(batch)


def held_by(atlas: Atlas, optimizers: Optimizers) -> Held:
    """The bytes of this rank's weights, gradients and moments, measured."""

    def size(tensors: Iterable[torch.Tensor | None]) -> int:
        storages = storages_of([local_part(tensor.detach()) for tensor in tensors if tensor is not None])
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    states = [state for half in optimizers._optimizers.values() for state in half.state.values()]
    moments = size(tensor for state in states for key, tensor in state.items() if key != "step")
    return Held(size(atlas.parameters()), size(p.grad for p in atlas.parameters()), moments)


def held(reader: Size, retriever: BertConfig | None, settings: Settings, world_size: int) -> Held:
    """The same, computed from sizes."""
    of_reader = weights_of_reader(reader, settings)
    with torch.device("meta"):
        of_encoders = weights_of(make_encoders(retriever, settings)) if retriever else []
    ranks = world_size if settings.shard_grads else 1

    def size(weights: list[Weight], ranks: int) -> int:
        # FSDP2 distributes rows over ranks; no rank has more than rank 0.
        return sum(-(-w.shape[0] // ranks) * w.shape[1:].numel() * w.itemsize for w in weights)

    def moments(weights: list[Weight], ranks: int) -> int:
        if settings.offload_optimizer:
            return 0
        kept = [(w.shape[0], kept_of(settings.optimizer, w.shape).values()) for w in weights]
        sizes = [sum(k.dtype.itemsize * k.shape.numel() for k in of) * -(-n // ranks) // n for n, of in kept]
        # Whole tensors go to the ranks that have the least; the largest may exceed an equal share.
        spread = settings.shard_optim and ranks == 1 and sizes
        return max(max(sizes), -(-sum(sizes) // world_size)) if spread else sum(sizes)

    learnt, learning = ([w for w in part if w.trained] for part in (of_reader, of_encoders))
    return Held(
        weights=size(of_reader, ranks) + size(of_encoders, 1),
        gradients=size(learnt, ranks) + size(learning, 1),
        moments=moments(learnt, ranks) + moments(learning, 1),
    )


class Step(NamedTuple):
    """What a real step on fake tensors takes."""

    working: int  # peak bytes in addition to those of `held`: activations, and copies of weights (16 bits, or gathered)
    flops: int  # of its matrix products, on each GPU


def working(reader: Size, retriever: BertConfig, settings: Settings, world_size: int, cuda: bool = True) -> int:
    """`Step.working` of a step. Raises: as `fake_step`."""
    return fake_step(reader, retriever, settings, world_size, cuda).working


def fake_step(reader: Size, retriever: BertConfig, settings: Settings, world_size: int, cuda: bool = True) -> Step:
    """A real step on fake tensors.

    It runs in a separate process, because after it torch 2.13 may crash during any garbage collection.

    Raises:
        RuntimeError: that process crashed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])  # imported once for the processes of all steps
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_step, args=(theirs, reader, retriever, settings, world_size, cuda))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"the process of the fake step died with code {process.exitcode}") from error


def _send_step(
    answer: Connection, reader: Size, retriever: BertConfig, settings: Settings, world_size: int, cuda: bool
) -> None:
    def norm(parameters: list[torch.nn.Parameter], stop: bool) -> np.ndarray:
        agree_on_norm(parameters, stop)
        return np.ones(2)  # values cannot be read from fake tensors

    def mesh(*arguments: Any) -> DeviceMesh:
        with unset_fake_temporarily():  # it reads the numbers of the ranks
            return init_device_mesh(*arguments)

    gc.disable()
    logging.set_verbosity_error()  # of a cache that is not used
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copying a tensor does
    optim.agree_on_norm, parallel.init_device_mesh = norm, mesh
    if settings.lora_rank or settings.retriever_lora_rank:
        from peft.tuners.lora import LoraLayer  # an extra

        # fake weights are there already, and cannot move
        LoraLayer._move_adapter_to_device_of_base_layer = lambda *_: None
        torch.nn.Module.to = lambda module, *_, **__: module
    if cuda:
        use_cuda_kernels()
    if world_size > 1:  # this is rank 0; the others need not exist because no values are read
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    with FakeTensorMode():
        atlas, optimizers = build(reader, retriever, settings)
        batch = batch_of(settings, retriever.vocab_size, retriever.hidden_size)
        if settings.training:
            wait_for_gradients(atlas)
            optimizers.step(0)  # creates the moments
            wait_for_gradients(atlas)
        elif dtype := devices.compute_dtype(settings.precision):
            lower_frozen(atlas.reader.requires_grad_(False), dtype)  # as a run does that evaluates
            atlas.reader.requires_grad_(True)  # what is frozen would not read the target
        with LiveMemory() as live:
            if settings.training:
                update(atlas, optimizers, batch, settings.precision)
            else:
                read(atlas, batch, settings.precision)
    answer.send(Step(live.peak, live.flops))
    os._exit(0)


def wait_for_gradients(atlas: Atlas) -> None:
    """Create gradients of zeros, to which a step adds its own: with DDP or accumulation they always exist."""
    for parameter in atlas.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def memory_per_gpu(size: str, settings: Settings, world_size: int, at_work: int | None = None) -> dict[str, int]:
    """Bytes by what they are for, while training a reader of a size in `READERS` with a retriever of BERT's base size.

    Args:
        at_work: the result of `working`, which differs by less than a percent between numbers of GPUs.
    """
    retriever = BertConfig(vocab_size=30522)
    parts = held(size, retriever, settings, world_size)._asdict()
    if settings.optimizer == "adafactor":  # it reads values, which fake tensors lack; no update is the step's peak
        settings = settings._replace(optimizer="adamw")
    return parts | {"working": at_work or working(size, retriever, settings, world_size)}


def table(header: Iterable[str], rows: Iterable[Iterable[str | float]]) -> str:
    """A Markdown table; numbers are bytes and printed in GiB."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[cell if isinstance(cell, str) else f"{cell / GIB:.1f}" for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=READERS, default=list(READERS), help="of the reader")
    parser.add_argument("--world_sizes", nargs="+", type=int, default=[1, 8, 64], help="numbers of GPUs")
    for name in (
        *("per_gpu_batch_size", "n_context", "text_maxlength", "target_maxlength"),
        "gradient_checkpoint_every",
    ):
        parser.add_argument(f"--{name}", type=int, default=Settings._field_defaults[name], help="as in training")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="as in training")
    kinds = FIELDS["optimizer"].metadata["choices"]
    parser.add_argument("--optimizer", choices=kinds, default="adamw", help="as in training")
    parser.add_argument("--offload_optimizer", action="store_true", help="as in training")
    parser.add_argument("--dropout", type=float, default=0.1, help="as in training")
    for name in ("lora_rank", "retriever_lora_rank"):
        parser.add_argument(f"--{name}", type=int, default=0, help="as in training")
    parser.add_argument("--frozen_precision", choices=("fp32", "bf16"), default="fp32", help="as in training")
    parser.add_argument(
        "--gradient_checkpoint", action=argparse.BooleanOptionalAction, default=True, help="of reader and retriever"
    )
    options = vars(parser.parse_args(arguments))
    sizes, world_sizes = options.pop("sizes"), options.pop("world_sizes")
    kinds = {name: Settings(**options, **flags) for name, flags in SHARDINGS.items()}
    columns = [(n, name) for n in world_sizes for name in kinds if n > 1 or name == WHOLE]
    totals, details = [], []
    for size in sizes:
        at_work: dict[bool, int] = {}  # by whether weights are sharded
        row: list[str | float] = [size]
        for world_size, name in columns:
            settings = kinds[name]
            parts = memory_per_gpu(size, settings, world_size, at_work.get(settings.shard_grads))
            at_work[settings.shard_grads] = parts["working"]
            row.append(sum(parts.values()))
            details.append([size, f"{world_size}, {name}", *parts.values(), row[-1]])
        totals.append(row)
    print(f"GiB on each GPU, without the index: {Settings(**options)._asdict()}\n")
    print(table(["reader", *(f"{n}, {name}" for n, name in columns)], totals) + "\n")
    print(table(["reader", "GPUs", "weights", "gradients", "moments", "working memory", "sum"], details) + "\n")
    shares = [[name, *(PASSAGES * size / n for n in world_sizes)] for name, size in PASSAGE_BYTES.items()]
    print(table(["index", *map(str, world_sizes)], shares))


if __name__ == "__main__":
    main()
