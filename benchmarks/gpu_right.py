"""Does the device compute what a CPU computes in fp32? The models' half of `benchmarks.gpu_check`."""

import contextlib
import copy
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from atlas.checkpoint import Contents, load_checkpoint, save_checkpoint
from atlas.config import Optimisation, RetrieverTraining
from atlas.embedding import passage_embedder
from atlas.model.atlas import Atlas, Losses
from atlas.model.interface import Reader
from atlas.model.losses import IGNORE
from atlas.model.reader import load_reader_state
from atlas.model.retriever import load_retriever_state
from atlas.model.signals import MODES, Mode, mode_of
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import gathered_weights, shard_weights
from atlas.training.optim import Optimizers
from benchmarks.gpu_bench import CPU, FULL, MODELS, ROOT, Bench, Row, World, distance, has_module, products_in
from benchmarks.memory import update
from benchmarks.step import models

LOSS_LIMITS = {"fp32": 1e-3, "bf16": 5e-2}  # relative distance to the CPU's fp32
SAME_ANSWERS = {"fp32": 0.95, "bf16": 0.6}  # at least this share


def embeddings(bench: Bench) -> Iterator[Row]:
    """Passages' embeddings in every precision that the device has."""
    retriever, inputs = bench.world.retriever().eval(), bench.world.inputs(CPU)
    ids, mask, _ = inputs.passages(bench.world.passages[:64])
    with torch.no_grad():
        wanted = retriever.embed_passages(ids, mask)
    there = copy.deepcopy(retriever).to(bench.device)
    for precision, limit in {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}.items():
        if precision == "fp16" and not bench.on_gpu:
            continue
        embed = passage_embedder(there.passage_encoder, bench.device, precision)
        with torch.no_grad():
            found = embed(ids.to(bench.device), mask.to(bench.device))
        yield close(f"embeddings, {precision}", distance(found, wanted), limit)


def close(check: str, found: float, limit: float) -> Row:
    """A relative distance to what a CPU computes in fp32, and how large it may be."""
    return Row(check, f"CPU's fp32 ± {limit:.0e}", f"{found:.1e} off", ok=found <= limit)


def joint_model(world: World, mode: str) -> Atlas:
    """The tiny models together; the retriever learns from more passages than the reader reads."""
    temperatures = {"temperature_gold": 0.1, "temperature_score": 0.1}
    reader, retriever = world.reader(), world.retriever(query_side=False)
    of_reader = mode_of(RetrieverTraining(gold_score_mode=mode), reader)
    options = {"n_context": world.sizes.read, "mode": of_reader, "correlate": True}
    return Atlas(reader, retriever, **options, **temperatures).train()


def distinct_modes(modes: Mapping[str, Mode] = MODES) -> dict[str, str]:
    """All these gold-score modes, each once: the name that it is asked for by -> all its names."""
    names: dict[int, list[str]] = {}
    for name, mode in modes.items():
        names.setdefault(hash(mode), []).append(name)
    return {same[0]: ", ".join(same) for same in names.values()}


def gradients(module: torch.nn.Module) -> torch.Tensor:
    """All gradients of a half of the model in one row, in fp32 on the CPU; zeros where a weight has none."""
    every = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters() if p.requires_grad]
    return torch.cat([gradient.flatten().to("cpu", torch.float32) for gradient in every])


def gradient_distance(found: Atlas, wanted: Atlas) -> float:
    """The larger one of the distances of the reader's and the retriever's gradients."""
    halves = ((found.reader, wanted.reader), (found.retriever, wanted.retriever))
    return max(distance(gradients(a), gradients(b)) for a, b in halves)


def losses(bench: Bench) -> Iterator[Row]:
    """Both losses of every gold-score mode, and in one mode those of tf32."""
    yield from compare_losses(bench, MODES)
    yield from compare_losses(bench, {"pdist": MODES["pdist"]}, {"tf32": 5e-3})


def compare_losses(
    bench: Bench, modes: Mapping[str, Mode], limits: Mapping[str, float] = LOSS_LIMITS, of: str = ""
) -> Iterator[Row]:
    """Both losses in each mode and precision, and the gradients of all weights. `of`: which reader they are of."""
    rows, k = slice(0, 2), bench.sizes.retrieved
    for mode, names in distinct_modes(modes).items():
        model = joint_model(bench.world, mode)
        wanted = model(bench.world.batch(rows, CPU, k, mode))
        wanted.total.backward()
        there = copy.deepcopy(model).to(bench.device)
        for precision, limit in limits.items():
            there.zero_grad()
            with products_in(precision):
                with devices.autocast(bench.device, precision):
                    found = there(bench.world.batch(rows, bench.device, k, mode))
                found.total.backward()
            off = [distance(a, b) for a, b in ((found.reader, wanted.reader), (found.retriever, wanted.retriever))]
            off.append(gradient_distance(there, model))
            most = [limit, 10 * limit, 10 * limit]
            yield Row(
                f"losses, {of}{names}, {precision}",
                "reader ± {:.0e}, retriever ± {:.0e}, gradients ± {:.0e}".format(*most),
                "{:.1e}, {:.1e}, {:.1e} off the CPU's fp32".format(*off),
                ok=all(map(math.isfinite, off)) and all(a <= b for a, b in zip(off, most, strict=True)),
            )


def position_bias(bench: Bench) -> Iterator[Row]:
    """The gradient of T5's position bias: fused attention kernels compute it in their own way."""
    reader = bench.world.reader().to(bench.device).train()
    batch = bench.world.batch(slice(0, 2), bench.device, bench.sizes.read)
    biases = [parameter for name, parameter in reader.named_parameters() if "relative_attention_bias" in name]

    def gradient(precision: str) -> torch.Tensor:
        reader.zero_grad()
        with devices.autocast(bench.device, precision):
            hidden = reader.encode(batch.reader_ids, batch.reader_mask)
            logits = reader.logits(hidden, batch.reader_mask.flatten(1), batch.targets.decoder_ids)
        labels = batch.targets.labels.flatten()
        F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE).backward()
        return torch.cat([bias.grad.flatten() for bias in biases])

    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradient("fp32")
    for precision, limit in {"fp32": 1e-3, "bf16": 1e-1}.items():
        off = distance(gradient(precision), wanted)
        expected = f"math kernel's fp32 ± {limit:.0e}"
        yield Row(f"gradient of the position bias, {precision}", expected, f"{off:.1e} off", ok=off <= limit)


class Kernels(TorchDispatchMode):
    """Counts the attention kernels that run inside the block, by name; `math` is the plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if found := re.fullmatch(r"_scaled_dot_product_(\w+?)(_attention)?(_for_cpu)?", name):
            self.counted[found[1].removesuffix("_attention")] += "backward" not in name
        self.counted["math"] += name == "_safe_softmax"
        return function(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return ", ".join(f"{name} × {n}" for name, n in self.counted.items() if n) or "none"


def kernels(bench: Bench) -> Iterator[Row]:
    """In which kernel attention runs, for models of base width with two layers."""
    device, sizes = bench.device, bench.sizes
    reader, retriever = models(2, sizes.width, device)
    ids = torch.randint(3, 1000, (2, 4, 64), device=device)  # (B, K, L)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[..., 50:] = False
    hidden = torch.randn(2, 256, sizes.width, device=device)  # (B, K·L, d)
    work: dict[str, tuple[bool, Callable[[], object]]] = {  # whether gradients are computed
        "embedding": (False, lambda: retriever.embed_passages(ids.flatten(0, 1), mask.flatten(0, 1))),
        "query encoder, training": (True, lambda: retriever.embed_queries(ids[:, 0], mask[:, 0])),
        "encoder, training": (True, lambda: reader.encode(ids, mask)),
        "decoder, training": (True, lambda: reader.logits(hidden, mask.flatten(1), ids[:, 0, :16])),
        "decoder, gold scores": (False, lambda: reader.logits(hidden, mask.flatten(1), ids[:, 0, :16])),
        "answers": (False, lambda: reader.write(hidden, mask.flatten(1), max_length=3, min_length=3)),
    }
    for name, (trains, part) in work.items():
        with torch.set_grad_enabled(trains), devices.autocast(device, bench.precision), Kernels() as seen:
            part()
        fused = not seen.counted["math"]
        expected = "not the math kernel" if bench.on_gpu else "any: a CPU's fused kernel takes no bias with a gradient"
        yield Row(f"attention kernel, {name}", expected, str(seen), ok=fused or not bench.on_gpu)


def write_answers(reader: Reader, world: World, device: torch.device, beams: int) -> list[list[int]]:
    """Tokens of the answers to all questions."""
    everything = slice(0, len(world.questions))
    inputs, passages = world.inputs(device), world.questions_with_passages(everything, world.sizes.read)
    ids, mask, lengths = inputs.reader(world.questions, passages)
    with torch.no_grad():
        return reader.write(reader.encode(ids, mask, lengths), mask.flatten(1), max_length=12, num_beams=beams)


def same_answers(check: str, found: list[list[int]], wanted: list[list[int]], least: float, of: str) -> Row:
    share = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
    return Row(check, f"at least {least:.0%} {of}", f"{share:.0%} the same", ok=share >= least)


def answers(bench: Bench) -> Iterator[Row]:
    """Greedy and beam search."""
    for name, beams in {"greedy": 1, "3 beams": 3}.items():
        yield from compare_answers(bench, bench.world.reader(), name, beams)


def compare_answers(
    bench: Bench, reader: Reader, name: str, beams: int = 1, shares: Mapping[str, float] = SAME_ANSWERS
) -> Iterator[Row]:
    """Of a reader on the CPU, and of its copy on the device."""
    wanted = write_answers(reader, bench.world, CPU, beams)
    there = copy.deepcopy(reader).to(bench.device)
    for precision, least in shares.items():
        with devices.autocast(bench.device, precision):
            found = write_answers(there, bench.world, bench.device, beams)
        yield same_answers(f"answers, {name}, {precision}", found, wanted, least, "as the CPU's fp32")


def optimizers_of(model: Atlas, **changes: str | bool) -> Optimizers:
    """AdamW with a constant learning rate, but for other flags."""
    flags = {"lr": 1e-3, "lr_retriever": 1e-3, "scheduler": "fixed", "warmup_steps": 0, "total_steps": 100}
    return Optimizers(Optimisation(**flags | changes), {"reader": model.reader, "retriever": model.retriever})


def train(bench: Bench, model: Atlas, optimizers: Optimizers, steps: range, precision: str) -> list[Losses]:
    """Take these steps on the device of the model, each with questions of its own."""
    device = next(model.parameters()).device
    batches = (bench.world.batch(slice(2 * step, 2 * step + 2), device, bench.sizes.read) for step in steps)
    return [update(model, optimizers, batch, precision) for batch in batches]


def steps(bench: Bench) -> Iterator[Row]:
    """Losses of a few steps."""
    yield from compare_steps(bench, joint_model(bench.world, "pdist"))


def compare_steps(
    bench: Bench, model: Atlas, of: str = "", limits: Mapping[str, float] = LOSS_LIMITS, **flags: str | bool
) -> Iterator[Row]:
    """Losses of a few steps of a model on the CPU, and of its copies on the device. `of`: what the flags are."""
    totals = {}
    for name, device, precision in (("wanted", CPU, "fp32"), *((p, bench.device, p) for p in limits)):
        trained = copy.deepcopy(model).to(device)
        of_steps = train(bench, trained, optimizers_of(trained, **flags), range(bench.sizes.steps), precision)
        totals[name] = torch.stack([losses.total.detach().cpu() for losses in of_steps])
    for precision, limit in limits.items():
        worst = (totals[precision] / totals["wanted"] - 1).abs().max().item()
        text = " ".join(f"{loss:.4f}" for loss in totals[precision].tolist())
        expected = f"CPU's fp32 ± {limit:.0e}"
        check = f"losses of {bench.sizes.steps} steps, {of}{precision}"
        yield Row(check, expected, f"{text}: {worst:.1e} off", ok=worst <= limit)


def resume(bench: Bench) -> Iterator[Row]:
    """Train, save, read, go on: as if the run had not been stopped."""
    straight = joint_model(bench.world, "pdist").to(bench.device)
    wanted = train(bench, straight, optimizers_of(straight), range(4), "fp32")[2:]
    stopped = joint_model(bench.world, "pdist").to(bench.device)
    optimizers = optimizers_of(stopped)
    train(bench, stopped, optimizers, range(2), "fp32")
    weights = {name: parameter.detach() for name, parameter in stopped.named_parameters()}
    contents = Contents(2, weights, optimizers.state(), options={}, configs={}, examples=4)
    path = save_checkpoint(bench.world.scratch / "run", contents, keep_optimizers=True, keep_checkpoints=None)
    checkpoint, resumed = load_checkpoint(path), joint_model(bench.world, "pdist")
    load_reader_state(resumed.reader, checkpoint.reader)
    load_retriever_state(resumed.retriever, checkpoint.retriever)
    resumed = resumed.to(bench.device)
    optimizers = optimizers_of(resumed)
    optimizers.resume(checkpoint)
    found = train(bench, resumed, optimizers, range(2, 4), "fp32")
    off = max(distance(a.total, b.total) for a, b in zip(found, wanted, strict=True))
    yield Row("losses of a resumed run", "those of a run that was not stopped ± 1e-4", f"{off:.1e} off", ok=off <= 1e-4)


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A process group of this process alone inside the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        distributed.start(device.type)
        yield
    finally:
        distributed.stop()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def sharded(bench: Bench) -> Iterator[Row]:
    """A reader whose weights are sharded (FSDP2), on one rank: its answers, and training steps; bf16 as in presets."""
    world, device = bench.world, bench.device
    for precision, limit in {"fp32": 1e-4, "bf16": 2e-2}.items():
        plain = joint_model(world, "pdist").to(device)
        with devices.autocast(device, precision):
            wanted = write_answers(plain.reader, world, device, beams=1)
        wanted_losses = train(bench, plain, optimizers_of(plain), range(2), precision)
        with one_rank(device):
            model, dtype = joint_model(world, "pdist"), devices.compute_dtype(precision)
            model.retriever.to(device)
            shard_weights(model.reader, model.reader.blocks, device, block_dtype=dtype, forward_methods=("encode",))
            with gathered_weights(model.reader), devices.autocast(device, precision):
                found = write_answers(model.reader, world, device, beams=1)
            found_losses = train(bench, model, optimizers_of(model), range(2), precision)
            off = max(distance(a.total, b.total) for a, b in zip(found_losses, wanted_losses, strict=True))
        check = f"sharded weights on 1 rank, {precision}"
        yield same_answers(f"answers, {check}", found, wanted, SAME_ANSWERS[precision], "as with whole weights")
        expected = f"those with whole weights ± {limit:.0e}"
        yield Row(f"losses of 2 steps, {check}", expected, f"{off:.1e} off", ok=off <= limit)


def demo_data(bench: Bench) -> tuple[Path, str]:
    """Where the demo's data is, and what is missing; the full form makes it, which needs packages but no network."""
    if missing := [name for name in ("regex", "rouge") if not has_module(name)]:
        return bench.demo, f"no {' and no '.join(missing)}"
    if (bench.demo / "passages.jsonl").is_file():
        return bench.demo, ""
    if bench.sizes is not FULL:
        return bench.demo, f"no {bench.demo}, which the full form makes"
    made = bench.world.scratch / "demo-data"
    command = [sys.executable, "preprocessing/prepare_demo.py", "--output_directory", str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return made, (done.stderr.strip().splitlines() or ["it says nothing"])[-1] if done.returncode else ""


def demo(bench: Bench) -> Iterator[Row]:
    """`evaluate.py` and `finetune_qa.py` as the demo calls them, in one process."""
    data, missing = demo_data(bench)
    if missing:
        yield Row("the demo's commands", "exact match rises", f"not run: {missing}")
        return
    from example_scripts.demo import FINE_TUNING, FINE_TUNING_STEPS, READING  # needs what was looked for

    home, short = bench.world.scratch / "demo", bench.sizes is not FULL
    test = home / "test.jsonl"
    home.mkdir()
    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    test.write_text("".join(lines[: 16 if short else None]), encoding="utf-8")
    common = ["--eval_data", test, "--checkpoint_dir", home, "--retriever_model_path", MODELS / "retriever", *READING]
    common += ["--reader_model_type", MODELS / "reader", "--precision", bench.precision, "--per_gpu_batch_size", "16"]
    index = home / "index"
    last = 6 if short else FINE_TUNING_STEPS
    build = ["--passages", data / "passages.jsonl", "--save_index_path", index]
    build += ["--max_passages", "400"] if short else []
    tune = [*FINE_TUNING, "--train_data", data / "train.64-shot.jsonl", "--load_index_path", index]
    tune += ["--total_steps", str(last), "--eval_freq", str(last // 2)]
    before = exact_match_of(home / "before", ["evaluate.py", *common, *build])
    after = exact_match_of(home / "after", ["finetune_qa.py", *common, *tune])
    measured = f"{before:.1f} before, {after:.1f} after"
    yield Row(f"the demo's exact match, {bench.precision}", "it rises", measured, ok=short or after > before)


def exact_match_of(directory: Path, words: list[str | Path]) -> float:
    """Run a script, the results of which go to this directory; the exact match that it measures at the end.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, *map(str, words), "--name", directory.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise RuntimeError(f"{words[0]} ended with status {done.returncode}: {last}")
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == "evaluation"][-1]["metrics"]["exact_match"]


CHECKS = (embeddings, losses, position_bias, kernels, answers, steps, resume, sharded, demo)
