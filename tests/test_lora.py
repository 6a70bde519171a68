"""Adapters (LoRA): what is trained, what is saved, and that a model is the same however it is loaded."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import BertModel, T5ForConditionalGeneration

import atlas
import export_huggingface
from atlas.checkpoint import Contents, load_checkpoint, save_checkpoint
from atlas.command_line import parse_config
from atlas.model.adapters import merge_adapter
from atlas.model.load import Model
from atlas.model.reader import load_reader
from atlas.model.retriever import fingerprint
from atlas.model.tokenization import load_reader_tokenizer
from atlas.training.optim import Optimizers
from tests.kit import command_line, language_model, logged, read_jsonl, run, run_on, world
from tests.test_training import losses_of

QUERY_SIDE = {"train_retriever": True, "query_side_retriever_training": True}
READER = {"lora_rank": 3}
BOTH = QUERY_SIDE | {"lora_rank": 3, "retriever_lora_rank": 2}


def load(checkpoint=None, training=True, **flags):
    """A model as a run with these flags loads it."""
    config = parse_config(command_line("unused", dropout=0, **flags))
    tokenizer = load_reader_tokenizer(config.model.reader_model_type)
    sections = config.model, config.retriever_training, config.optimisation
    torch.manual_seed(0)
    return Model.load(*sections, checkpoint, tokenizer, torch.device("cpu"), training=training)


def trained(model, seed=1):
    """The same model after what might be a training: everything that is trained has moved."""
    torch.manual_seed(seed)
    for half in filter(None, (model.reader, model.retriever)):
        for parameter in half.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(directory, model):
    """It as a checkpoint."""
    contents = Contents(
        1,
        model.weights(),
        optimizer={},
        options={"model": {"reader_model_type": str(world() / "models/reader")}},
        configs=model.configs(),
        examples=0,
        adapters=model.adapters(),
        bases=model.bases,
    )
    save_checkpoint(directory, contents, keep_optimizers=False, keep_checkpoints=None)
    return load_checkpoint(directory)


@torch.no_grad()
def outputs(model):
    """What reader and query encoder make of some tokens."""
    ids = torch.arange(3, 19).view(1, 2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = []
    if model.reader is not None:
        model.reader.eval()
        hidden = model.reader.encode(ids, mask)
        found.append(model.reader.logits(hidden, mask.flatten(1), torch.tensor([[0, 5, 6]])))
    if model.retriever is not None:
        model.retriever.eval()
        found += [encode(ids[0], mask[0]) for encode in (model.retriever.embed_queries, model.retriever.embed_passages)]
    return found


def assert_same_outputs(model, other):
    for found, expected in zip(outputs(model), outputs(other), strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-4)


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("targets", "layers"), [("all", {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}), ("q,v", {"q", "v"})]
)
def test_adapters_alone_are_trained_and_begin_without_effect(targets, layers):
    model = load(**READER, lora_targets=targets)
    names = trained_names(model.reader)
    assert {name.split(".")[-4] for name in names} == layers
    assert {name.split(".", 1)[1].split(".default")[0].rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    assert len({name.split(".lora_")[0] for name in names}) == len(names) / 2
    assert model.retriever.query_encoder.training is False and not trained_names(model.retriever)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(load()), strict=True))
    optimizers = Optimizers(parse_config(command_line("unused")).optimisation, {"reader": model.reader})
    assert optimizers._parameters["reader"].keys() == names


def test_what_the_flags_of_adapters_say(caplog):
    model = load(**READER, lora_alpha=12, lora_dropout=0.3)
    settings = model.adapters()["reader"].settings
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 12, 0.3)
    assert model.reader.has_dropout  # so that gold scores are computed again, without it
    assert load(**READER).adapters()["reader"].settings["lora_alpha"] == 6
    for flag, there in (
        ("lora_targets", "k, o, q, v, wi_0, wi_1, wo"),
        ("retriever_lora_targets", "dense, key, query"),
    ):
        with pytest.raises(ValueError, match=f"--{flag}: there is no linear layer called x; there are {there}"):
            load(**BOTH, **{flag: "x"})


def test_the_query_encoder_has_adapters_and_shares_the_rest():
    model, without = trained(load(**BOTH)), load(**QUERY_SIDE)
    retriever = model.retriever
    assert trained_names(retriever) and all("query_contriever" in name for name in trained_names(retriever))
    assert fingerprint(retriever.passage_encoder) == fingerprint(without.retriever.passage_encoder)
    whole = sum(p.numel() for p in without.retriever.passage_encoder.parameters())
    assert sum(p.numel() for p in retriever.parameters() if not p.requires_grad) == whole
    (_, queries, passages), (_, queries_before, passages_before) = outputs(model), outputs(without)
    assert torch.equal(passages, passages_before) and not torch.allclose(queries, queries_before, atol=1e-2)


@pytest.mark.parametrize("flags", [READER, BOTH], ids=["reader", "both"])
def test_a_checkpoint_holds_what_is_trained_and_is_the_model_again(tmp_path, flags):
    model = trained(load(**flags))
    checkpoint = saved(tmp_path, model)
    assert set(checkpoint.adapters) == {"reader", *(["query_encoder"] if flags is BOTH else [])}
    assert not checkpoint.reader and not checkpoint.retriever and set(checkpoint.bases) == {"reader", "retriever"}
    for again in (load(checkpoint, **flags), load(checkpoint, **QUERY_SIDE), load(checkpoint, training=False)):
        assert_same_outputs(model, again)
    resumed = load(checkpoint, **flags)
    for name, adapter in model.adapters().items():
        found = resumed.adapters()[name]
        assert found.settings == adapter.settings
        assert all(torch.equal(tensor, found.weights[key]) for key, tensor in adapter.weights.items())
    assert resumed.bases == model.bases


def test_peft_loads_what_is_saved(tmp_path):
    from peft import PeftModel

    model = trained(load(**BOTH))
    place = saved(tmp_path, model).path
    plain = T5ForConditionalGeneration.from_pretrained(world() / "models/reader").eval()
    of_peft = PeftModel.from_pretrained(plain, place / "reader_adapter")
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        found = of_peft(input_ids=ids, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits
        mask = torch.ones(1, 1, 8, dtype=torch.bool)
        hidden = model.reader.encode(ids[None], mask)
        assert_close(found, model.reader.logits(hidden, mask[0], torch.tensor([[0, 5, 6]])), atol=1e-4, rtol=1e-4)
    bert = BertModel.from_pretrained(world() / "models/retriever", add_pooling_layer=False)
    bert = PeftModel.from_pretrained(bert, place / "query_encoder_adapter").eval()
    with torch.no_grad():
        found = bert(input_ids=ids).last_hidden_state.mean(1)
        assert_close(found, model.retriever.embed_queries(ids, mask[0]), atol=1e-4, rtol=1e-4)


def test_a_base_that_is_a_checkpoint(tmp_path):
    """From --model_path, and from there on by another run, with adapters and without."""
    whole = saved(tmp_path / "whole", trained(load(**QUERY_SIDE)))
    first = trained(load(whole, **READER))
    checkpoint = saved(tmp_path / "first", first)
    assert checkpoint.bases["reader"].checkpoint == checkpoint.bases["retriever"].checkpoint == str(whole.path)
    assert {file.path for file in checkpoint.recorded()} >= {whole.path / "model.safetensors"}
    assert_same_outputs(first, load(checkpoint, training=False))
    further = trained(load(checkpoint, **BOTH), seed=2)
    again = saved(tmp_path / "further", further)
    assert {base.checkpoint for base in again.bases.values()} == {str(whole.path)}
    assert_same_outputs(further, load(again, training=False))
    full = trained(load(again, **QUERY_SIDE), seed=3)  # everything is trained on
    last = saved(tmp_path / "full", full)
    assert not last.adapters and not last.bases and last.reader and last.retriever
    assert_same_outputs(full, load(last, training=False))


def test_a_run_without_retrieval_carries_the_retriever_along(tmp_path):
    model = trained(load(**BOTH))
    closed = {"closed_book": True, "passages": None}
    for flags in (READER, {}):
        carried = saved(tmp_path / str(len(flags)), load(saved(tmp_path / "a", model), **closed, **flags))
        assert not carried.retriever and "query_encoder" in carried.adapters
        assert_same_outputs(model, load(carried, training=False))
    whole = saved(tmp_path / "whole", load())
    of_whole = saved(tmp_path / "b", load(whole, **closed, **READER))
    assert of_whole.bases["retriever"].checkpoint == str(whole.path)


def refused(sentence, checkpoint, **flags):
    with pytest.raises(ValueError, match=sentence) as error:
        load(checkpoint, **flags)
    assert "\n" not in str(error.value)


def test_adapters_that_do_not_fit(tmp_path):
    checkpoint = saved(tmp_path / "a", trained(load(**READER)))
    file = "reader_adapter/adapter_model.safetensors"
    refused(f"{file} was trained with --lora_rank 3, and this run has 4: use the same", checkpoint, lora_rank=4)
    refused("was trained with --lora_alpha 6, and this run has 7", checkpoint, **READER, lora_alpha=7)
    refused("was trained with --lora_targets k,o,.*, and this run has q: use", checkpoint, **READER, lora_targets="q")
    weights = checkpoint.adapters["reader"].weights
    name = next(iter(weights))
    weights[name] = weights[name][:, :-1]
    refused(f"{file} does not fit this run: {name} is", checkpoint)
    del weights[name]
    refused(f"{file} does not fit this run: it has no {name}", checkpoint)
    checkpoint.adapters["reader"].settings["use_dora"] = True
    refused("reader_adapter/adapter_config.json describes no adapters as train.py makes them", checkpoint)


def test_a_base_that_is_another_or_gone(tmp_path):
    whole = saved(tmp_path / "whole", load())
    place = saved(tmp_path / "a", load(whole, **READER)).path
    other = saved(tmp_path / "other", trained(load()))
    shutil.copyfile(other.path / "model.safetensors", whole.path / "model.safetensors")
    refused(
        "belongs to other weights of the reader than those of .*whole.*: they have the fing", load_checkpoint(place)
    )
    shutil.rmtree(whole.path)
    with pytest.raises(ValueError, match=r"belongs to the reader in .*whole/.*, which cannot be read \(.*put that che"):
        load_checkpoint(place)
    state = json.loads((place / "state.json").read_text())
    for bases, reason in (
        ({"reader": {"model": 5}}, "does not say which weights"),
        ({}, "to which reader its adapter"),
    ):
        (place / "state.json").write_text(json.dumps(state | {"bases": bases}))
        with pytest.raises(ValueError, match=f"the checkpoint cannot be read .*{reason}"):
            load_checkpoint(place)


def test_frozen_matrices_in_16_bits_change_no_result():
    flags = {"lora_rank": 3, "precision": "bf16"}
    kept, lowered = (trained(load(**flags, frozen_precision=precision)) for precision in ("fp32", "bf16"))
    dtypes = {parameter.dtype for name, parameter in lowered.reader.named_parameters() if "base_layer" in name}
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in lowered.reader.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(outputs(kept), outputs(lowered), strict=True))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with adapters in both halves, dropout of them too, and recomputed activations."""
    return run(tmp_path_factory.mktemp("straight"), total_steps=3, **DROPPING_OUT)


DROPPING_OUT = BOTH | {"dropout": 0.1, "lora_dropout": 0.2, "use_gradient_checkpoint_reader": True}
SIXTEEN_BITS = {"precision": "bf16", "frozen_precision": "bf16"}


@pytest.mark.processes
def test_a_resumed_run_is_the_same_to_the_bit(straight, tmp_path):
    run(tmp_path, total_steps=2, eval_data=None, **DROPPING_OUT)
    resumed = run(tmp_path, total_steps=3, eval_data=None, **DROPPING_OUT)
    assert losses_of(resumed) == losses_of(straight) and len(logged(resumed, "loss/reader_loss")) == 3
    found, expected = load_checkpoint(resumed), load_checkpoint(straight)
    for name, adapter in expected.adapters.items():
        assert adapter.weights and adapter.settings == found.adapters[name].settings
        assert all(torch.equal(tensor, found.adapters[name].weights[key]) for key, tensor in adapter.weights.items())
    moments, others = found.optimizer_state(), expected.optimizer_state()
    assert all(torch.equal(moments[key], others[key]) for key in others)
    assert all("lora_" in key for key in others if key != "skipped")
    sizes = {file.name: file.stat().st_size for file in resumed.glob("checkpoint/step-3/*.safetensors")}
    assert sizes["model.safetensors"] < 100 and sizes["optimizer.safetensors"] < 300_000


@pytest.mark.processes
def test_the_model_is_evaluated_asked_and_exported(straight, tmp_path):
    evaluated = run(tmp_path, "evaluate", model_path=straight, train_data=None, name="again")
    rows, again = read_jsonl(straight / "dev-step-3.jsonl"), read_jsonl(evaluated / "dev-step-0.jsonl")
    assert [row["generation"] for row in again] == [row["generation"] for row in rows]
    for row, other in zip(rows, again, strict=True):
        assert [p["id"] for p in other["passages"]] == [p["id"] for p in row["passages"]]
        assert [p["score"] for p in other["passages"]] == pytest.approx([p["score"] for p in row["passages"]], rel=1e-4)
    output = tmp_path / "exported"
    export_huggingface.main(["--model_path", str(straight), "--output_directory", str(output)])
    merged = T5ForConditionalGeneration.from_pretrained(output / "reader")
    reader = load(load_checkpoint(straight), training=False).reader
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in reader.state_dict().items())
    passages = [str(world() / "passages.jsonl")]
    asked = [atlas.load(place, passages=passages, device="cpu") for place in (straight, output)]
    question = read_jsonl(world() / "dev.jsonl")[0]["question"]
    assert asked[0].ask(question).text == asked[1].ask(question).text


def test_the_merge_is_that_of_peft(tmp_path):
    from peft.tuners.lora import LoraLayer

    model, other = trained(load(**READER)), load()
    merge_adapter(other.reader, model.adapters()["reader"], tmp_path)
    for name, part in model.reader.named_modules():
        if isinstance(part, LoraLayer):
            part.merge()
            assert_close(other.reader.get_submodule(name).weight, part.base_layer.weight)


WAYS = {
    "ddp": {},
    "zero1": {"shard_optim": True},
    "fsdp": {"shard_optim": True, "shard_grads": True},
}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_accumulation(tmp_path, way):
    two = run_on(2, tmp_path, name="two", total_steps=3, **BOTH, **WAYS[way])
    one = run(tmp_path, name="one", total_steps=6, accumulation_steps=2, log_freq=2, **BOTH)
    for name, values in losses_of(one).items():
        assert len(values) == 3 and values == pytest.approx(losses_of(two)[name], abs=2e-5), name
    for name, adapter in load_checkpoint(one).adapters.items():
        found = load_checkpoint(two).adapters[name].weights
        assert found.keys() == adapter.weights.keys()
        for key, tensor in adapter.weights.items():
            assert_close(found[key], tensor, atol=2e-4, rtol=1e-2)
    generations = [[row["generation"] for row in read_jsonl(next(d.glob("dev-*.jsonl")))] for d in (one, two)]
    assert generations[0] == generations[1]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_go_on_to_the_bit(tmp_path, way):
    flags = DROPPING_OUT | SIXTEEN_BITS | WAYS[way] | {"eval_data": None}
    straight = run_on(2, tmp_path, name="straight", total_steps=3, **flags)
    run_on(2, tmp_path, name="stopped", total_steps=2, **flags)
    assert losses_of(run_on(2, tmp_path, name="stopped", total_steps=3, **flags)) == losses_of(straight)
    found, expected = (load_checkpoint(tmp_path / name).adapters for name in ("stopped", "straight"))
    assert all(torch.equal(found[n].weights[k], t) for n in expected for k, t in expected[n].weights.items())
    alone = run(tmp_path, name="stopped", total_steps=4, **flags)  # on one process
    assert load_checkpoint(alone).step == 4


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adist", "loop", "emdr"])
def test_every_way_to_judge(tmp_path, mode):
    flags = BOTH | {"gold_score_mode": mode, "lora_dropout": 0.1, "use_gradient_checkpoint_reader": True}
    losses = losses_of(run(tmp_path, total_steps=3, eval_data=None, use_gradient_checkpoint_retriever=True, **flags))
    same = losses_of(run(tmp_path, name="kept", total_steps=3, eval_data=None, **BOTH | {"gold_score_mode": mode}))
    assert len(losses["retriever"]) == 3 and losses["retriever"][0] == pytest.approx(same["retriever"][0], rel=1e-4)
    adapter = load_checkpoint(tmp_path / "run").adapters["query_encoder"]
    assert all(tensor.abs().sum() > 0 for tensor in adapter.weights.values())  # B was zero


@pytest.mark.processes
def test_a_language_model_has_adapters(tmp_path):
    flags = {"reader_model_type": language_model("plain"), "qa_prompt_format": "{question}", "n_context": 2}
    flags |= {"lora_rank": 2, "lr": 1e-2, "dropout": 0.0, "save_optimizer": True, "save_freq": 2}
    directory = run(tmp_path, **flags, total_steps=4)
    saved = load_checkpoint(directory)
    assert not saved.reader and saved.adapters["reader"].settings["task_type"] == "CAUSAL_LM"
    resumed = tmp_path / "resumed"
    run(resumed, **flags, total_steps=2)
    found = load_checkpoint(run(resumed, **flags, total_steps=4)).adapters["reader"].weights
    assert all(torch.equal(tensor, found[name]) for name, tensor in saved.adapters["reader"].weights.items())
    of_model = dict.fromkeys(("reader_model_type", "qa_prompt_format", "n_context"))  # the checkpoint says them
    evaluated = run(tmp_path, "evaluate", name="again", model_path=directory, train_data=None, **of_model)
    files = directory / "dev-step-4.jsonl", evaluated / "dev-step-0.jsonl"
    before, after = ([row["generation"] for row in read_jsonl(file)] for file in files)
    assert before == after and any(before)
    output = tmp_path / "exported"
    export_huggingface.main(["--model_path", str(directory), "--output_directory", str(output)])
    exported = load_reader(str(output / "reader"), dropout=None)
    merged = load(saved, training=False, reader_model_type=flags["reader_model_type"]).reader
    for name, parameter in merged.named_parameters():
        assert_close(parameter, exported.get_parameter(name), atol=0, rtol=0)
