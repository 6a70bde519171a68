"""The planner: what a command needs on a GPU, whether that fits, and which flags would make it fit."""

import gzip
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

import plan
from atlas.command_line import parse_config
from atlas.model.retriever import Contriever
from atlas.update import update_index
from benchmarks import memory, one_card
from benchmarks.cards import CARDS
from benchmarks.memory import GIB, Settings, Step
from benchmarks.planner import Machine, Planner, changed, changes, embedding_flops, passages_of, shapes_of
from finetune_qa import PRESET
from tests.indices import saved
from tests.kit import language_model, slow

FILES = ["--name", "run", "--train_data", "train.jsonl", "--eval_data", "test.jsonl"]
MODELS = ["--reader_model_type", "google/t5-base-lm-adapt", "--load_index_path", "an_index"]
COMMAND = ["finetune_qa.py", *FILES, *MODELS, "--total_steps", "31"]
WORKING, FLOPS = 2 * GIB, 10**13


@pytest.fixture
def steps(monkeypatch):
    """The settings of every fake step that is taken; each takes the same, half of it with half of the passages."""
    taken = []

    def step(reader, retriever, settings, world_size):
        taken.append(settings)
        share = settings.n_context * settings.text_maxlength * settings.per_gpu_batch_size / (40 * 384)
        share *= 1 if settings.gradient_checkpoint else 4
        return Step(int(share * WORKING), int(share * FLOPS))

    monkeypatch.setattr(memory, "fake_step", step)
    return taken


def config_of(*flags, script="finetune_qa", preset=PRESET):
    return parse_config([*COMMAND[1:], *flags], program=script, runs_here=False, **preset)


def planner_of(config, card="a100-80gb", gpus=1, passages=32_000_000, training=True):
    return Planner(shapes_of(config, passages), Machine(CARDS[card], gpus), training=training)


def plan_of(capsys, *words):
    """What is printed, and the exit status."""
    status = 0
    try:
        plan.main(list(words))
    except SystemExit as stop:
        status = stop.code
    return capsys.readouterr().out, status


def test_a_command_that_fits(capsys, steps):
    out, status = plan_of(capsys, "--gpus", "8", "--passages_in_index", "32000000", *COMMAND)
    assert status == 0 and "finetune_qa.py on 8 x a100-80gb of 80 GB" in out
    assert "sum     12.6 of 74.5: it fits" in out and "32,000,000 passages on all GPUs" in out
    parts = dict(re.findall(r" (weights|gradients|moments|index) +(\S+)", out))
    assert parts == {"weights": "0.9", "gradients": "0.5", "moments": "0.4", "index": "5.7"}  # as in docs/training.md
    assert "What helps" not in out and len(steps) == 1


def test_a_command_that_does_not_fit_is_told_what_helps(capsys, steps):
    flags = ["--no-use_gradient_checkpoint_reader", "--precision", "fp32"]
    out, status = plan_of(capsys, "--card", "rtx4090", "--passages_in_index", "32000000", *COMMAND, *flags)
    assert status == 1 and "it does not fit" in out
    helps = [line.strip().split("  ")[1] for line in out.partition("What helps")[2].splitlines()[1:]]
    assert helps[0] == "--use_gradient_checkpoint_reader"  # --precision hardly helps this fake step, so it is left out
    assert helps[1] == "--offload_optimizer" and len(helps) == 3
    assert helps[2] == "--index_mode faiss --faiss_index_type pq --faiss_code_size 64"


def test_what_nothing_helps_is_said(capsys, steps):
    out, status = plan_of(capsys, "--card", "rtx4090", "--gigabytes", "4", "--passages_in_index", "1000", *COMMAND)
    assert status == 1 and "That is still too much: use a smaller reader, more GPUs, or larger ones" in out
    assert "--n_context 20 --retriever_n_context 20" in out


def test_an_index_of_unknown_size_is_said(capsys, steps):
    out, status = plan_of(capsys, *COMMAND)
    assert status == 0 and "not counted: say how many passages it has with --passages_in_index" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*COMMAND, "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--gpus", "0", *COMMAND], "argument --gpus: expected a number of at least 1, not '0'"),
        (["--gpus", "two", *COMMAND], "argument --gpus: expected a number of at least 1, not 'two'"),
        (["ask.py", *COMMAND[1:]], "invalid choice: 'ask.py'"),
    ],
)
def test_wrong_flags(capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        plan.main(words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_model_that_cannot_be_found(capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main([*COMMAND, "--reader_model_type", "./nowhere"])
    assert "--reader_model_type ./nowhere: there is no such directory" in str(stop.value.code)


def test_a_language_model_cannot_be_planned_for(capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main([*COMMAND, "--reader_model_type", str(language_model("llama"))])
    assert re.search(r"--reader_model_type \S+ is a llama: only a t5 can be planned for", str(stop.value.code))


def test_steps_that_take_the_same_are_taken_once(steps):
    config = config_of()
    found = planner_of(config, gpus=4)
    found.need(changed(config, {"shard_grads": False}))
    found.need(changed(config, {"shard_grads": False, "shard_optim": False, "index_mode": "faiss"}))
    found.need(changed(config, {"shard_grads": False, "optimizer": "adafactor"}))
    found.need(changed(config, {"shard_grads": False, "offload_optimizer": True}))
    assert len(steps) == 1


def test_sharding_flags_mean_nothing_on_one_gpu():
    config = config_of()
    for gpus, sharded in ((1, False), (2, True)):
        settings = planner_of(config, gpus=gpus).settings(config)
        assert settings.shard_optim == settings.shard_grads == sharded


def test_changes_are_ordered_by_their_price():
    config = config_of("--precision", "fp32", "--per_gpu_batch_size", "4", "--no-shard_optim", "--no-shard_grads")
    flags = [change.flags for change in changes(config, Machine(CARDS["t4"], 2))]
    assert flags[:4] == [
        "--precision fp16",
        "--shard_optim",
        "--shard_optim --shard_grads",
        "--per_gpu_batch_size 1 --accumulation_steps 4",
    ]
    assert flags[-1] == "--text_maxlength 192"
    for change in changes(config, Machine(CARDS["t4"], 2)):
        for name, value in change.values.items():
            assert changed(config, change.values).flags()[name] == value


def test_an_evaluation_holds_no_gradients(steps, monkeypatch):
    config = config_of(
        script="evaluate", preset={"task": "qa", "n_context": 40, "text_maxlength": 384, "precision": "bf16"}
    )
    need = planner_of(config, training=False).need(config)
    assert set(need.parts) == {"weights", "working memory", "index", "CUDA, NCCL, gaps"}
    assert not steps[0].training and steps[0].per_gpu_batch_size == 2**15 // (40 * 384)
    in_int8 = changed(config, {"int8_reader": True})
    assert planner_of(in_int8, training=False).need(in_int8).parts["weights"] < 0.85 * need.parts["weights"]
    smaller = changed(config, {"per_gpu_eval_batch_size": 1})
    assert planner_of(smaller, training=False).need(smaller).parts["working memory"] == 4 * WORKING
    # of T5 large, the decoder takes more: hidden states, keys and values of 24 layers, and those of one once more, of
    # 2 questions of 40 passages of 384 tokens, 1024 numbers of 2 bytes
    large = changed(config, {"reader_model_type": "google/t5-large-lm-adapt"})
    monkeypatch.setitem(globals(), "WORKING", 0)
    assert planner_of(large, training=False).need(large).parts["working memory"] == 51 * 2 * 40 * 384 * 1024 * 2


def test_passages_are_counted_where_they_are(tmp_path):
    index, _, _ = saved(tmp_path, n=9)
    assert passages_of(config_of("--load_index_path", str(index))) == 9
    update_index(index, delete=["p3"])
    assert passages_of(config_of("--load_index_path", str(index))) == 8
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}\n" * 7)
    assert passages_of(config_of("--load_index_path", str(tmp_path))) is None
    without = parse_config(
        [*COMMAND[1:-2], "--total_steps", "31", "--passages", str(corpus), "--max_passages", "6"],
        program="train",
        runs_here=False,
        task="qa",
        load_index_path=None,
    )
    assert passages_of(changed(without, {"load_index_path": None})) == 6
    with gzip.open(tmp_path / "corpus.tsv.gz", "wt") as file:
        file.write("id\ttext\ttitle\n1\tone\tA\n2\ttwo\tB\n")
    assert passages_of(changed(without, {"load_index_path": None, "passages": (file.name,)})) == 2


@pytest.mark.parametrize(("training", "cards"), [(True, (6, 9, 12, 16, 80)), (False, (6, 15.3, 16, 80))])
def test_what_fits_one_card(steps, monkeypatch, training, cards):
    """As much is trained as fits, in the fastest way that fits; the planner says so of each command."""
    found = {}
    for gigabytes in cards:
        monkeypatch.setitem(CARDS, "a_card", CARDS["rtx4090"]._replace(gigabytes=gigabytes))
        monkeypatch.setattr(one_card, "ONES", ("a_card",))
        ((card, reader, flags, size, *_),) = one_card.rows(["base"], training=training)
        assert (card, reader) == (f"{gigabytes} GB (a_card)", "base")
        found[gigabytes] = flags.strip("`")
        if size != "–":
            config = one_card.command("base", [found[gigabytes].replace("nothing", "")], training=training)
            planner = planner_of(config, card="a_card", training=training)
            assert planner.need(config).bytes <= planner.machine.bytes
            assert size == f"{planner.need(config).bytes / GIB:.1f}"
    kept, half, _ = one_card.RECOMPUTED
    _, in_8_bits, adapters = one_card.TRAINED
    if training:
        assert list(found.values()) == ["none fits", *(f"{way} {half}" for way in (adapters, in_8_bits)), half, kept]
    else:
        assert list(found.values()) == ["none fits", *reversed(one_card.EVALUATED[1:]), "nothing"]


def test_the_index_is_as_large_as_its_kind():
    config = config_of()
    found = planner_of(config, gpus=8)
    assert found.index_bytes(config) == 4_000_000 * 1536
    assert found.index_bytes(changed(config, {"index_mode": "faiss", "faiss_index_type": "PQ96x4fs"})) == 4_000_000 * 48


def test_an_index_that_is_opened_and_stays_costs_no_embedding():
    config = config_of()  # an index is opened, and query embeddings alone learn
    found, both, built = planner_of(config), {"query_side_retriever_training": False}, {"load_index_path": None}
    assert found._refresh(config) is None
    assert found._refresh(changed(config, both)) == found._refresh(changed(config, built)) > 0


def test_operations_of_the_embedding():
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    encoder, ids = Contriever(config).eval(), torch.randint(50, (4, 20))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    assert counted.get_total_flops() == pytest.approx(4 * 20 * embedding_flops(config, 20), rel=0.02)


@pytest.mark.processes
@pytest.mark.parametrize("changes", [{"query_side": False}, *map(slow, [{"train_retriever": False}, {}])])
def test_operations_of_a_step(changes):
    shape, retriever = (
        (64, 128, 2, 2),
        BertConfig(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    )
    settings = Settings(n_context=3, text_maxlength=32, target_maxlength=8, precision="fp32", **changes)
    atlas, optimizers = memory.build(shape, retriever, settings)
    batch = memory.batch_of(settings, retriever.vocab_size, retriever.hidden_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        memory.update(atlas, optimizers, batch, settings.precision)
    assert memory.fake_step(shape, retriever, settings, 1).flops == pytest.approx(counted.get_total_flops(), rel=0.05)
