"""Checkpoints there and back, in both formats; nothing but data is ever loaded."""

import argparse
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import T5Config

from atlas import checkpoint as checkpoints
from atlas.checkpoint import Contents, latest_checkpoint, load_checkpoint, save_checkpoint
from atlas.model.reader import FusionInDecoder, load_reader, load_reader_state
from atlas.model.retriever import load_retriever, load_retriever_state
from tests.kit import read_jsonl, run, world


def save(directory, step, model, *, optimizer=None, keep_optimizers=False, keep_checkpoints=None):
    contents = Contents(step, model, optimizer or {}, options={"run": {"seed": 1}}, configs={}, examples=6)
    return save_checkpoint(directory, contents, keep_optimizers=keep_optimizers, keep_checkpoints=keep_checkpoints)


def published(directory, model, **more):
    """Write a checkpoint as the published system did."""
    directory.mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(name="x", lr=1e-4, device=torch.device("cpu"))
    saved = {"step": 7, "model": model, "optimizer": None, "retr_optimizer": None, "scheduler": None}
    torch.save(saved | {"retr_scheduler": None, "opt": options} | more, directory / "model.pth.tar")
    return directory


def v11_reader(**settings):
    """A reader whose `shared` and `lm_head` differ, as those of T5 v1.1 and of every published Atlas."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    config = T5Config(
        vocab_size=120, feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False, **shape, **settings
    )
    reader = FusionInDecoder(config)
    reader.tie_output_embeddings(False)
    with torch.no_grad():
        reader.lm_head.weight.normal_()
    return reader


def loss_of(reader):
    ids = torch.arange(3, 19).view(1, 2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    decoder_ids, labels = torch.tensor([[0, 5, 6]]), torch.tensor([5, 6, 1])
    with torch.no_grad():
        logits = reader.logits(reader.encode(ids, mask), mask.flatten(1), decoder_ids)
    return torch.nn.functional.cross_entropy(logits[0], labels).item()


def test_separate_embeddings_survive_the_published_container(tmp_path):
    reader = v11_reader()
    before = loss_of(reader)
    state = {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()}
    loaded = load_checkpoint(published(tmp_path, state))
    assert (loaded.step, loaded.published, loaded.retriever) == (7, True, {})
    reader.config.save_pretrained(tmp_path / "config")
    again = load_reader(str(tmp_path / "config"), dropout=0.0, weights=False)
    load_reader_state(again, loaded.reader)
    assert not torch.equal(again.shared.weight, again.lm_head.weight)
    assert torch.equal(again.shared.weight, reader.shared.weight)
    assert torch.equal(again.lm_head.weight, reader.lm_head.weight)
    assert loss_of(again) == before


def test_separate_embeddings_survive_our_format(tmp_path):
    reader = v11_reader()
    state = {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()}
    save(tmp_path, 3, state)
    loaded = load_checkpoint(tmp_path)
    assert "encoder.embed_tokens.weight" not in loaded.reader  # one matrix, saved once
    reader.config.save_pretrained(tmp_path / "config")
    again = load_reader(str(tmp_path / "config"), dropout=0.0, weights=False)
    load_reader_state(again, loaded.reader)
    assert loss_of(again) == loss_of(reader)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("saved_query_side", [False, True])
@pytest.mark.parametrize("wanted_query_side", [False, True])
def test_published_retrievers(tmp_path, prefix, saved_query_side, wanted_query_side):
    path = str(world() / "models/retriever")
    source = load_retriever(path, query_side=saved_query_side, dropout=None)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    state = {f"retriever.{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    side = "query_contriever" if saved_query_side else "contriever"
    state[f"retriever.{prefix}{side}.embeddings.position_ids"] = torch.arange(512)[None]
    loaded = load_checkpoint(published(tmp_path, state))
    assert loaded.retriever_config == {"uncentered_layer_norm": True}
    wanted = load_retriever(path, query_side=wanted_query_side, dropout=None)
    if saved_query_side and not wanted_query_side:
        with pytest.raises(ValueError, match="--query_side_retriever_training"):
            load_retriever_state(wanted, loaded.retriever)
        return
    load_retriever_state(wanted, loaded.retriever)
    for name, tensor in source.query_encoder.state_dict().items():
        assert torch.equal(wanted.query_encoder.state_dict()[name], tensor)
    for name, tensor in source.passage_encoder.state_dict().items():
        assert torch.equal(wanted.passage_encoder.state_dict()[name], tensor)


def test_runs_start_from_published_checkpoints(tmp_path):
    """Tied, into a tied and into a query-side run; and a query-side one stays untied when it is evaluated."""
    reader = load_reader(str(world() / "models/reader"), dropout=None)
    for saved_query_side in (False, True):
        retriever = load_retriever(str(world() / "models/retriever"), query_side=saved_query_side, dropout=None)
        state = {f"reader.{k}": v for k, v in reader.state_dict().items()}
        state |= {f"retriever.{k}": v for k, v in retriever.state_dict().items()}
        model = published(tmp_path / f"published-{saved_query_side}", state)
        directory = run(
            tmp_path, name=f"run-{saved_query_side}", model_path=model, total_steps=1, train_retriever=True, lr=0
        )
        after = load_checkpoint(directory)
        assert any(name.startswith("query_contriever") for name in after.retriever) == saved_query_side
        assert after.retriever_config["uncentered_layer_norm"] is True
        run(tmp_path, "evaluate", name=f"eval-{saved_query_side}", model_path=model, train_data=None)
        assert read_jsonl(tmp_path / f"eval-{saved_query_side}" / "dev-step-0.jsonl")


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_a_checkpoint_that_holds_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = published(tmp_path / "bad", {}, scheduler=Bomb())
    with pytest.raises(
        ValueError, match=r"model\.pth\.tar is not a published checkpoint that is safe.*system"
    ) as error:
        load_checkpoint(directory)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_other_files_are_refused_with_their_name(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.pth.tar").write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"model\.pth\.tar is not a published checkpoint"):
        load_checkpoint(tmp_path)
    odd = published(tmp_path / "odd", {"decoder.x": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown weight decoder.x"):
        load_checkpoint(odd)
    ours = save(tmp_path, 1, {"reader.a": torch.ones(2)})
    (ours / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="step-1: the checkpoint cannot be read"):
        load_checkpoint(ours)


def test_what_is_kept(tmp_path):
    for step in (2, 4, 10):
        model = {"reader.a": torch.full((2,), float(step)), "retriever.b": torch.ones(1)}
        save(tmp_path, step, model, optimizer={"reader/a/step": torch.ones(())})
    folder = tmp_path / "checkpoint"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-10", "step-2", "step-4"]
    assert [p.parent.name for p in folder.glob("step-*/optimizer.safetensors")] == ["step-10"]
    assert latest_checkpoint(tmp_path) == folder / "step-10"
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 10 and loaded.reader["a"].tolist() == [10, 10]
    assert loaded.optimizer_state() == {"reader/a/step": torch.ones(())}
    assert json.loads((folder / "step-10/options.json").read_text()) == {"run": {"seed": 1}}
    save(tmp_path, 11, {"reader.a": torch.ones(2)}, keep_checkpoints=2, keep_optimizers=True)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-10", "step-11"]
    assert (folder / "step-10/optimizer.safetensors").exists()


STEPS_OF_SAVING = [
    *((checkpoints, name) for name in ("save_tensors", "_write_json", "_flush")),
    *((Path, name) for name in ("rename", "symlink_to", "replace", "unlink", "mkdir")),
]


def save_and_die(directory, victim):
    """Save in a child process that is gone at the victim-th step; its exit status, 0 if it lived."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = itertools.count(1)

    def dying(function):
        def wrapper(*arguments, **keywords):
            if next(calls) == victim:
                os._exit(9)
            return function(*arguments, **keywords)

        return wrapper

    status = 1
    try:
        for owner, name in STEPS_OF_SAVING:
            setattr(owner, name, dying(getattr(owner, name)))
        save(directory, 2, {"reader.a": torch.full((3,), 2.0)}, keep_checkpoints=1)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.processes
def test_killed_at_any_moment_the_latest_checkpoint_is_whole(tmp_path):
    ends = []
    for victim in range(1, 40):
        directory = tmp_path / str(victim)
        save(directory, 1, {"reader.a": torch.ones(3)})
        status = save_and_die(directory, victim)
        loaded = load_checkpoint(directory)
        assert loaded.reader["a"].tolist() == [float(loaded.step)] * 3
        ends.append((status, loaded.step))
        if status == 0:
            break
        # the next save clears up after the killed one
        save(directory, 5, {"reader.a": torch.ones(3)})
        assert not list((directory / "checkpoint").glob("*.partial"))
    assert ends[0] == (9, 1) and ends[-1] == (0, 2) and len(ends) > 10


def test_the_names_in_a_checkpoint_are_the_published_ones(tmp_path):
    directory = run(tmp_path, total_steps=1, train_retriever=True, query_side_retriever_training=True)
    loaded = load_checkpoint(directory)
    assert {"shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"} <= loaded.reader.keys()
    for side in ("query_contriever", "passage_contriever"):
        assert f"{side}.embeddings.word_embeddings.weight" in loaded.retriever
        assert f"{side}.encoder.layer.0.attention.self.query.weight" in loaded.retriever
    assert checkpoints.FORMAT == 1
