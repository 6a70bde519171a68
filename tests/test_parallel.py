"""Sharded optimizers and weights: the same numbers as without, in less memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atlas.checkpoint import load_checkpoint
from atlas.config import Optimisation
from atlas.runtime import distributed
from atlas.runtime.parallel import finish_gradients, full_tensors_on_main, gathered_weights, shard_weights
from atlas.training.moments import RankOptimizer
from atlas.training.optim import Optimizers
from tests.kit import logged, read_jsonl, run, run_on, slow
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.processes

RETRIEVER = {"train_retriever": True, "query_side_retriever_training": True}
KINDS = {
    "ddp": {},
    "zero1": {"shard_optim": True},
    "fsdp": {"shard_grads": True},
    "both": {"shard_optim": True, "shard_grads": True},
}


def losses_of(directory):
    return {name: logged(directory, f"loss/{name}_loss") for name in ("train", "reader", "retriever")}


def assert_same_run(one, other, step, other_step):
    for name, values in losses_of(one).items():
        # 1e-5 itself is allowed: it is the last of the log's six digits, and not exact in floating point
        assert values and values == pytest.approx(losses_of(other)[name], abs=1e-5 + 1e-9), name
    first, second = read_jsonl(one / f"dev-step-{step}.jsonl"), read_jsonl(other / f"dev-step-{other_step}.jsonl")
    for a, b in zip(first, second, strict=True):
        assert (a["query"], a["generation"]) == (b["query"], b["generation"])
        assert [p["id"] for p in a["passages"]] == [p["id"] for p in b["passages"]]


@pytest.mark.parametrize("query_side", [True, slow(False)])
def test_every_kind_trains_and_evaluates_alike(tmp_path, query_side):
    """1 rank, 2 ranks DDP, ZeRO-1, FSDP2, both. 11 questions: 2 batches for one rank, 1 for the other."""
    flags = {"train_retriever": True, "query_side_retriever_training": query_side, "per_gpu_batch_size": 1}
    flags["per_gpu_eval_batch_size"] = 5
    one = run(tmp_path, name="one", total_steps=8, accumulation_steps=2, log_freq=2, **flags)
    expected = load_checkpoint(one)
    for name, kind in KINDS.items():
        many = run_on(2, tmp_path, name=name, total_steps=4, **flags, **kind)
        assert_same_run(one, many, 8, 4)
        saved = load_checkpoint(many)
        for half in ("reader", "retriever"):
            a, b = getattr(saved, half), getattr(expected, half)
            assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-4) for key in b)
        moments, expected_moments = (load_file(d / "checkpoint/latest/optimizer.safetensors") for d in (many, one))
        assert moments.keys() == expected_moments.keys()
        assert all(torch.allclose(moments[key], expected_moments[key], atol=1e-4) for key in moments)


def test_three_ranks_whose_shards_are_of_different_sizes(tmp_path):
    flags = {"per_gpu_batch_size": 1, "eval_data": None, **RETRIEVER}
    ddp = losses_of(run_on(3, tmp_path, name="ddp", total_steps=4, **flags))
    for name in ("zero1", "fsdp"):
        sharded = losses_of(run_on(3, tmp_path, name=name, total_steps=4, **flags, **KINDS[name]))
        for statistic, values in ddp.items():
            assert sharded[statistic] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        slow({"use_gradient_checkpoint_reader": True, "use_gradient_checkpoint_retriever": True}),
        {"accumulation_steps": 2},
        slow({"clip": 0.01}),
        slow({"freeze_retriever_steps": 2}),
    ],
)
def test_sharding_changes_nothing_with(tmp_path, changes):
    flags = {"total_steps": 4, "eval_data": None, **RETRIEVER} | changes
    plain = losses_of(run_on(2, tmp_path, name="plain", **flags))
    sharded = losses_of(run_on(2, tmp_path, name="sharded", **flags, **KINDS["both"]))
    for name, values in plain.items():
        assert values and values == pytest.approx(sharded[name], abs=2e-5), name  # the log has six digits


@pytest.mark.parametrize(("one", "other"), [("ddp", "zero1"), slow("fsdp", "both")])
def test_sharding_the_optimizer_changes_nothing_with_dropout(tmp_path, one, other):
    """Ranks that share the reader's weights do not group passages by length, and so have other dropout masks."""
    flags = {"total_steps": 4, "eval_data": None, "dropout": 0.1, **RETRIEVER}
    runs = [losses_of(run_on(2, tmp_path, name=kind, **flags, **KINDS[kind])) for kind in (one, other)]
    for name, values in runs[0].items():
        assert values and values == pytest.approx(runs[1][name], abs=2e-5), name


def test_sharded_bf16_tracks_fp32(tmp_path):
    flags = {"total_steps": 3, "eval_data": None, **RETRIEVER}
    exact = losses_of(run_on(2, tmp_path, name="fp32", **flags))
    rounded = losses_of(run_on(2, tmp_path, name="bf16", precision="bf16", **flags, **KINDS["both"]))
    assert rounded["reader"] == pytest.approx(exact["reader"], rel=0.02)
    assert rounded["reader"] != exact["reader"]


@pytest.mark.parametrize("kind", [slow("zero1"), "fsdp"])
def test_a_sharded_run_goes_on(tmp_path, kind):
    """Stopped and continued on 2 ranks, to the last bit; and what it saved is a checkpoint for one process."""
    flags = {"eval_data": None, "scheduler_steps": 6, "train_retriever": True, "dropout": 0.1, **KINDS[kind]}
    straight = losses_of(run_on(2, tmp_path, name="straight", total_steps=6, **flags))
    run_on(2, tmp_path, name="stopped", total_steps=3, **flags)
    assert losses_of(run_on(2, tmp_path, name="stopped", total_steps=6, **flags)) == straight
    run(tmp_path, name="stopped", total_steps=8, **flags)
    assert load_checkpoint(tmp_path / "stopped").step == 8


def _shards_of_a_linear_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard_weights(model, [model[0]], torch.device("cpu"), block_dtype=torch.bfloat16, forward_methods=())
    local = sum(p.to_local().numel() for p in model.parameters())
    with gathered_weights(model), torch.no_grad():
        dtypes = [part.weight.dtype for part in model]
        # ranks run it different numbers of times: nothing may wait for the others
        outputs = [model[1](model[0](torch.ones(1, 5).bfloat16()).float()) for _ in range(1 + 2 * distributed.rank())]
    gathered = full_tensors_on_main({name: p.detach() for name, p in model.named_parameters()})
    same = all(torch.equal(gathered[name], whole[name]) for name in whole) if distributed.is_main() else not gathered
    return local, dtypes, same, outputs[0]


def test_whole_weights():
    first, second = run_on_ranks(2, _shards_of_a_linear_layer)
    assert first[0] + second[0] == 5 * 7 + 7 + 7 * 3 + 3 and abs(first[0] - second[0]) < 20
    assert first[1] == [torch.bfloat16, torch.float32]
    assert first[2] and second[2] and torch.equal(first[3], second[3])


def _a_rank_with_infinite_gradients():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"sharded": torch.nn.Linear(4, 4), "whole": torch.nn.Linear(4, 4)})
    shard_weights(model["sharded"], [], torch.device("cpu"), block_dtype=None, forward_methods=())
    flags = Optimisation(lr=0.1, weight_decay=0, beta2=0.9, scheduler="fixed", warmup_steps=0, total_steps=9)
    optimizers = Optimizers(flags, model)
    decisions = []
    for step, poison in enumerate([1.0, float("inf"), 1.0]):
        poison = poison if distributed.rank() == 1 else 1.0  # one rank alone
        optimizers.backward((model["whole"](model["sharded"](torch.ones(2, 4))) * poison).sum())
        finish_gradients(model)
        decisions.append(tuple(optimizers.step(step, stop=step == 2 and distributed.rank() == 1)))
    return decisions, model["whole"].weight.detach().clone()


def test_all_ranks_skip_and_stop_together():
    (first, weights), (second, others) = run_on_ranks(2, _a_rank_with_infinite_gradients)
    assert first == second == [(True, False), (False, False), (True, True)]
    assert torch.isfinite(weights).all() and torch.equal(weights, others)


def _what_a_rank_says_to_moments_of_another_shape(shard_weights_too):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"reader": torch.nn.Linear(4, 4)})
    if shard_weights_too:
        shard_weights(model["reader"], [], torch.device("cpu"), block_dtype=None, forward_methods=())
    flags = Optimisation(lr=0.1, shard_optim=not shard_weights_too, scheduler="fixed", warmup_steps=0, total_steps=9)
    optimizers = Optimizers(flags, model)
    moments = {f"reader/{name}/{key}": torch.ones(p.shape) for name, p in model["reader"].named_parameters()
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    moments |= {f"reader/{name}/step": torch.ones(()) for name, _ in model["reader"].named_parameters()}
    optimizers.load_state(moments, Path("o.safetensors"))
    errors = []
    for wrong in (torch.ones(2, 4), torch.ones(4, 4).double()):  # the first one is of the shape of a rank's part
        try:
            optimizers.load_state(moments | {"reader/weight/exp_avg": wrong}, Path("o.safetensors"))
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("shard_weights_too", [False, True])
def test_moments_that_do_not_fit_are_refused_on_every_rank(shard_weights_too):
    first, second = run_on_ranks(2, _what_a_rank_says_to_moments_of_another_shape, shard_weights_too)
    assert first == second and ["(2, 4)" in first[0], "float64" in first[1]] == [True, True]


def _moments_of_a_rank():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (5, 8, 2, 0, 3)]
    optimizer = RankOptimizer(Optimisation(shard_optim=True), parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    return [len(p) for p in optimizer.state], [p.detach().clone() for p in parameters]


def test_moments_are_spread_and_weights_are_not():
    of_ranks = run_on_ranks(3, _moments_of_a_rank)
    held = [size for sizes, _ in of_ranks for size in sizes]
    assert sorted(held) == [0, 2, 3, 5, 8] and max(sum(sizes) for sizes, _ in of_ranks) == 8
    for _, weights in of_ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, of_ranks[0][1], strict=True))


def _trained(flags, sharded, state=None):
    """(what rank 0 would save, the weights) after some updates, or after nothing but loading a state."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"reader": torch.nn.Linear(64, 67)})  # ranks have different numbers of rows
    if sharded:
        shard_weights(model["reader"], [], torch.device("cpu"), block_dtype=None, forward_methods=())
    flags = {"lr": 0.01, "clip": 0, "scheduler": "fixed", "warmup_steps": 0, "total_steps": 9} | flags
    optimizers = Optimizers(Optimisation(**flags), model)
    if state is not None:
        optimizers.load_state(state, Path("o.safetensors"))
    for step in range(3 if state is None else 0):
        torch.manual_seed(step)
        optimizers.backward((model["reader"](torch.randn(5, 64)) - 1).square().mean())
        optimizers.step(step)
    return optimizers.state(), full_tensors_on_main({name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("flags", "sharded"),
    [
        ({"optimizer": "adamw8bit", "offload_optimizer": True, "shard_optim": True}, False),
        ({"optimizer": "adamw8bit"}, True),
        ({"offload_optimizer": True}, True),
        ({"optimizer": "adafactor", "shard_optim": True}, False),
    ],
)
def test_every_optimizer_on_two_ranks(flags, sharded):
    """To the last bit as in one process, and its state goes to any number of ranks and back."""
    state, weights = _trained(flags, sharded=False)
    for expected, found in zip((state, weights), run_on_ranks(2, _trained, flags, sharded)[0], strict=True):
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    again, _ = run_on_ranks(2, _trained, flags, sharded, state)[0]
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.slow
def test_a_run_in_8_bits_goes_on(tmp_path):
    """Stopped and continued on 2 ranks, to the last bit, as one that was not stopped."""
    flags = {"eval_data": None, "scheduler_steps": 4, "optimizer": "adamw8bit", **RETRIEVER, **KINDS["both"]}
    straight = losses_of(run_on(2, tmp_path, name="straight", total_steps=4, **flags))
    run_on(2, tmp_path, name="stopped", total_steps=2, **flags)
    assert losses_of(run_on(2, tmp_path, name="stopped", total_steps=4, **flags)) == straight
    saved = load_file(tmp_path / "stopped/checkpoint/latest/optimizer.safetensors")
    assert any(name.startswith("reader/") and name.endswith("exp_avg_sq.codes") for name in saved)
    assert losses_of(run_on(2, tmp_path, name="fp32", total_steps=4, **flags | {"optimizer": "adamw"})) != straight
