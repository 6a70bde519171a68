"""Checkpoints there and back, in both formats; nothing but data is ever loaded."""

import argparse
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from atlas import checkpoint as checkpoints
from atlas.checkpoint import Contents, latest_checkpoint, load_checkpoint, save_checkpoint, set_aside
from atlas.model.reader import FusionInDecoder, load_reader, load_reader_state
from atlas.model.retriever import load_retriever, load_retriever_state
from atlas.runtime import distributed
from tests.kit import read_jsonl, run, world
from tests.ranks import run_on_ranks


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
            tmp_path,
            name=f"run-{saved_query_side}",
            model_path=model,
            total_steps=1,
            train_retriever=True,
            lr=0,
            eval_data=None,
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


def test_copies_and_files_of_the_user_are_left_alone(tmp_path):
    """Only `step-N` with a `state.json` that says N is ours, whatever else is beside it."""
    folder = tmp_path / "checkpoint"
    save(tmp_path, 2, {"reader.a": torch.ones(2)}, optimizer={"reader/a/step": torch.ones(())})
    for copy in ("step-2-best", "step-2.best", "step-02", "step-1", "step-2.partial", "my.partial"):
        shutil.copytree(folder / "step-2", folder / copy)
    (folder / "step-0.12345678.partial").mkdir()
    (folder / "step-0.12345678.partial/notes").write_text("mine")
    (folder / "latest.12345678.partial").symlink_to("elsewhere")
    (folder / "step-0").write_text("mine")
    before = everything(folder) - {folder / "latest"}
    for step in (3, 4):
        save(tmp_path, step, {"reader.a": torch.ones(2)}, keep_checkpoints=1)
    assert before - everything(folder) == {path for path in before if folder / "step-2" in (path, path.parent)}
    assert (folder / "latest").readlink() == Path("step-4") and not (folder / "step-3").exists()


def everything(folder):
    return set(folder.rglob("*"))


def something_in_the_way(path, kind):
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine") if kind == "directory" else None
        (path / "state.json").write_text('{"format": 1, "step": 2}') if kind == "copy" else None


@pytest.mark.parametrize("kind", ["file", "directory", "empty", "copy"])
def test_what_is_not_ours_is_never_overwritten(tmp_path, kind):
    save(tmp_path, 2, {"reader.a": torch.ones(2)})
    folder = tmp_path / "checkpoint"
    something_in_the_way(folder / "step-3", kind)
    before = everything(folder)
    with pytest.raises(ValueError, match="step-3 is where a checkpoint is to be saved.*move it away"):
        save(tmp_path, 3, {"reader.a": torch.ones(2)})
    assert everything(folder) == before and load_checkpoint(tmp_path).step == 2
    checkpoints.check_way(tmp_path, range(4, 9))
    with pytest.raises(ValueError, match="step-3 is where"):
        checkpoints.check_way(tmp_path, range(1, 9))


def test_what_is_in_the_way_is_found_before_the_first_step(tmp_path, capsys):
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    (tmp_path / "run/checkpoint/step-3").write_text("mine")
    with pytest.raises(SystemExit):
        run(tmp_path, total_steps=4, eval_data=None)
    assert "step-3 is where a checkpoint" in capsys.readouterr().err
    assert "Embedding" not in (tmp_path / "run/run.log").read_text()


def test_old_steps_without_latest_are_not_started_over(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10):
        save(tmp_path, step, {"reader.a": torch.ones(2)}, keep_optimizers=True)
    latest = tmp_path / "checkpoint/latest"
    latest.unlink()
    with pytest.raises(ValueError, match=rf"holds step-2, step-10, but no link.*ln -s step-10 {latest}.*--restart"):
        latest_checkpoint(tmp_path)
    (tmp_path / "checkpoint/step-2").rename(latest)
    with pytest.raises(ValueError, match="latest is not a link to a checkpoint.*ln -s step-N"):
        checkpoints.check_way(tmp_path, range(3, 9))
    with pytest.raises(ValueError, match="latest is not a link to a checkpoint"):
        save(tmp_path, 11, {"reader.a": torch.ones(2)})
    assert load_checkpoint(tmp_path).step == 2  # to evaluate it is enough


def test_going_back_to_an_earlier_step(tmp_path):
    """Later steps of the abandoned attempt stay until they are reached again; the newest keeps its optimizer."""
    for step in (2, 4, 6):
        save(tmp_path, step, {"reader.a": torch.ones(2)}, keep_optimizers=True)
    folder = tmp_path / "checkpoint"
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step-2")
    assert latest_checkpoint(tmp_path) == folder / "step-2"
    save(tmp_path, 4, {"reader.a": torch.zeros(2)}, keep_checkpoints=1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-4", "step-6"]
    assert load_checkpoint(tmp_path).reader["a"].tolist() == [0, 0] and load_checkpoint(tmp_path).step == 4
    assert all((folder / f"step-{step}/optimizer.safetensors").exists() for step in (4, 6))


def _open_while_more_is_saved(directory):
    if distributed.rank() == 1:
        save(directory, 2, {"reader.a": torch.ones(2)})
    return checkpoints.open_checkpoint(directory).step


@pytest.mark.processes
def test_ranks_open_the_same_step_of_a_run_that_goes_on(tmp_path, monkeypatch):
    save(tmp_path, 1, {"reader.a": torch.ones(2)})
    assert len(set(run_on_ranks(2, _open_while_more_is_saved, tmp_path))) == 1

    def on_main(what, work):
        path = work()
        save(tmp_path, 3, {"reader.a": torch.ones(2)})  # between rank 0's look and the reading
        return path

    monkeypatch.setattr(checkpoints.distributed, "on_main", on_main)
    assert checkpoints.open_checkpoint(tmp_path).step == 2 and load_checkpoint(tmp_path).step == 3


def test_a_directory_that_cannot_go_yet_is_removed_by_the_next_start(tmp_path, monkeypatch):
    """On NFS, a removed file that is still open leaves another one behind."""
    save(tmp_path, 1, {"reader.a": torch.ones(2)})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", lambda path: (_ for _ in ()).throw(OSError("Directory not empty")))
        save(tmp_path, 2, {"reader.a": torch.ones(2)}, keep_checkpoints=1)
    assert len(list((tmp_path / "checkpoint").glob("*.partial"))) == 1 and load_checkpoint(tmp_path).step == 2
    save(tmp_path, 3, {"reader.a": torch.ones(2)}, keep_checkpoints=1)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["latest", "step-3"]


def test_each_restart_keeps_what_was_set_aside_before(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, {"reader.a": torch.ones(2)})
        set_aside(tmp_path)
    names = [f"checkpoint.before-restart{n}" for n in ("", "-2", "-3")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, step in zip(names, (1, 2, 3), strict=True):
        assert load_checkpoint(tmp_path / name).step == step


STEPS_OF_SAVING = [
    *((checkpoints, name) for name in ("save_tensors", "_write_json", "write_file")),
    *((Path, name) for name in ("rename", "symlink_to", "replace", "unlink", "mkdir", "touch", "rmdir")),
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
        save(directory, 5, {"reader.a": torch.ones(3)}, keep_checkpoints=1)
        assert sorted(everything(directory / "checkpoint")) == clean(directory / "checkpoint", 5)
    assert ends[0] == (9, 1) and ends[-1] == (0, 2) and len(ends) > 20


def clean(folder, step):
    """What is there when a step was saved and nothing else is left."""
    names = ("", "model.safetensors", "optimizer.safetensors", "options.json", "state.json")
    return sorted([folder / "latest", *(folder / f"step-{step}" / name for name in names)])


@pytest.mark.processes
def test_killed_in_the_first_save_a_run_starts_again(tmp_path):
    """There is no `latest` yet: what the killed writer left is no earlier run."""
    for victim in range(1, 40):
        directory = tmp_path / str(victim)
        status = save_and_die(directory, victim)
        assert status in (0, 9)
        if status == 0:
            break
        found = latest_checkpoint(directory)
        assert found is None or load_checkpoint(found).reader["a"].tolist() == [2.0] * 3
        save(directory, 5, {"reader.a": torch.ones(3)}, keep_checkpoints=1)
        assert sorted(everything(directory / "checkpoint")) == clean(directory / "checkpoint", 5)
    assert victim > 15


def test_the_names_in_a_checkpoint_are_the_published_ones(tmp_path):
    flags = {"train_retriever": True, "query_side_retriever_training": True, "eval_data": None}
    directory = run(tmp_path, total_steps=1, **flags)
    loaded = load_checkpoint(directory)
    assert {"shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"} <= loaded.reader.keys()
    for side in ("query_contriever", "passage_contriever"):
        assert f"{side}.embeddings.word_embeddings.weight" in loaded.retriever
        assert f"{side}.encoder.layer.0.attention.self.query.weight" in loaded.retriever
    assert checkpoints.FORMAT == 1


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The directory of a run of one step, to be copied."""
    return run(tmp_path_factory.mktemp("one"), total_steps=1, eval_data=None, train_retriever=True)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "model",
            lambda tensor: tensor.long(),
            r"model\.safetensors: .* is torch.int64, and weights are floating-point",
        ),
        (
            "index_encoder",
            lambda tensor: tensor[:1].clone(),
            r"index_encoder\.safetensors does not fit .* is \(1,.*not \(",
        ),
        (
            "index_encoder",
            lambda tensor: tensor.half(),
            r"index_encoder\.safetensors does not fit .* torch.float16, not",
        ),
        ("optimizer", lambda tensor: tensor[:1].clone(), r"optimizer\.safetensors does not fit .* is \(1,.*not \("),
    ],
)
def test_tensors_that_do_not_fit_end_the_run_with_a_sentence(tmp_path, one_step, capsys, name, change, sentence):
    directory = shutil.copytree(one_step, tmp_path / "run", symlinks=True)
    file = directory / f"checkpoint/step-1/{name}.safetensors"
    tensors = load_file(file)
    first = next(name for name in sorted(tensors) if tensors[name].dim() == 2)
    save_file(tensors | {first: change(tensors[first])}, file)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=2, eval_data=None, train_retriever=True, verify="off")
    assert ended.value.code == 1 and re.search(sentence, capsys.readouterr().err)


def test_weights_in_other_number_formats_are_converted_and_the_log_says_so(tmp_path, one_step):
    directory = shutil.copytree(one_step, tmp_path / "start", symlinks=True)
    file = directory / "checkpoint/step-1/model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    later = run(tmp_path, name="later", model_path=directory, total_steps=1, eval_data=None, verify="off")
    assert "weights are converted to fp32 (torch.bfloat16" in (later / "run.log").read_text()
