"""Which half of a model comes from where, and what is said of models that are absent, damaged, or want to run code."""

import json
import os
import shutil

import pytest
import torch

from atlas.model.reader import load_reader
from atlas.model.retriever import load_retriever
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer
from tests.kit import run, world
from tests.test_checkpoint import published

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n"


def halves():
    """The weights of both, with their prefixes."""
    reader = load_reader(str(world() / "models/reader"), dropout=None)
    retriever = load_retriever(str(world() / "models/retriever"), query_side=False, dropout=None)
    return {
        "reader": {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()},
        "retriever": {f"retriever.{name}": tensor for name, tensor in retriever.state_dict().items()},
    }


@pytest.mark.parametrize(
    ("held", "flags", "said"),
    [
        (
            "retriever",
            {},
            "holds no reader, so its answers would be those of another model: evaluate with --retrieve_o",
        ),
        (
            "reader",
            {},
            "holds no retriever, so its answers would be those of another model: evaluate with --closed_boo",
        ),
        (None, {}, "holds no weights at all"),
        ("retriever", {"retrieve_only": True}, None),
        ("reader", {"closed_book": True}, None),
    ],
)
def test_no_other_model_is_evaluated_in_the_place_of_a_missing_half(tmp_path, capfd, held, flags, said):
    model = published(tmp_path / "model", halves()[held] if held else {})
    capfd.readouterr()
    if said is None:
        run(tmp_path, "evaluate", model_path=model, train_data=None, **flags)
        return
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "evaluate", model_path=model, train_data=None, **flags)
    errors = capfd.readouterr().err
    assert ended.value.code == 1 and f"{model} {said}" in errors and errors.count("\n") == 1, errors
    assert not list((tmp_path / "run").glob("*-step-*.jsonl"))


@pytest.mark.parametrize(("held", "other"), [("retriever", "reader"), ("reader", "retriever")])
def test_training_says_which_half_comes_from_elsewhere(tmp_path, held, other):
    model = published(tmp_path / "model", halves()[held])
    log = (run(tmp_path, model_path=model, total_steps=1, eval_data=None) / "run.log").read_text()
    flag = {"reader": "--reader_model_type", "retriever": "--retriever_model_path"}[other]
    assert f"{model} holds no {other}: training starts from that of {flag} {world() / 'models' / other}" in log


LOADERS = {
    "reader": (lambda path: load_reader(path, dropout=None), "--reader_model_type"),
    "reader's tokenizer": (load_reader_tokenizer, "--reader_model_type"),
    "retriever": (lambda path: load_retriever(path, query_side=False, dropout=None), "--retriever_model_path"),
    "retriever's tokenizer": (load_retriever_tokenizer, "--retriever_model_path"),
}


def refused(what, directory):
    """The sentence about a directory that cannot be loaded."""
    load, flag = LOADERS[what]
    with pytest.raises(OSError, match=flag) as error:
        load(str(directory))
    said = str(error.value)
    assert said.startswith(f"{flag} {directory}: cannot load a ") and "\n" not in said, said
    return said


def copied(what, tmp_path):
    return shutil.copytree(world() / "models" / what.split("'")[0], tmp_path / "copy")


@pytest.mark.parametrize("content", [POINTER.encode(), b"", b"\xff" * 100, b"{}", b"[]", None], ids=repr)
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("reader", "model.safetensors"),
        ("reader", "config.json"),
        ("reader's tokenizer", "tokenizer.json"),
        ("retriever", "model.safetensors"),
        ("retriever", "config.json"),
        ("retriever's tokenizer", "tokenizer.json"),
    ],
)
def test_files_that_are_no_files_of_a_model(tmp_path, what, name, content):
    directory = copied(what, tmp_path)
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    said = refused(what, directory)
    assert (f"({name} is the pointer of a file that was not fetched: run `git lfs pull` there)" in said) == (
        content == POINTER.encode()
    )


@pytest.mark.parametrize("container", [POINTER.encode(), b"PK\x03\x04", b"\x80\x02."])
def test_weights_in_the_older_container_that_are_none(tmp_path, container):
    directory = copied("reader", tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(container)
    refused("reader", directory)


@pytest.mark.parametrize(
    ("what", "key", "value"),
    [
        ("reader", "vocab_size", 10**12),
        ("reader", "num_layers", 10**9),
        ("retriever", "num_hidden_layers", 10**9),
        ("retriever", "hidden_size", 10**30),
        ("retriever", "hidden_size", float("nan")),
    ],
)
def test_sizes_that_no_model_has(tmp_path, what, key, value):
    directory = copied(what, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    refused(what, directory)


def test_a_config_of_more_than_this_machine_holds_is_not_tried(tmp_path):
    directory = copied("retriever", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"vocab_size": 2**24, "hidden_size": 2**20, "num_attention_heads": 1}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="a model of .* GB, more than this machine's memory"):
        load_retriever(str(directory), query_side=False, dropout=None, weights=False)


@pytest.mark.parametrize("what", LOADERS)
def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch, what):
    """Not even when somebody would say yes."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    directory, victim = copied(what, tmp_path), tmp_path / "victim"
    (directory / "code.py").write_text(f"open({str(victim)!r}, 'w').close()\nclass Own: pass\n")
    classes = {"AutoConfig": "code.Own", "AutoModel": "code.Own", "AutoTokenizer": ["code.Own", "code.Own"]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((directory / name).read_text())
        own = {"auto_map": classes, "model_type": "own", "tokenizer_class": "Own"}
        (directory / name).write_text(json.dumps(content | own))
    try:
        LOADERS[what][0](str(directory))
    except OSError as error:
        assert "\n" not in str(error)
    assert not victim.exists()


def test_a_damaged_optimizer_is_named(tmp_path):
    directory = run(tmp_path, total_steps=1, eval_data=None)
    (directory / "checkpoint/latest/optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        run(tmp_path, total_steps=2, eval_data=None, verify="off")
    assert "step-1/optimizer.safetensors cannot be read (" in (directory / "run.log").read_text()


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Root may read everything, so what the system would say is said here."""
    is_dir = type(tmp_path).is_dir

    def refusing(path):
        if path == tmp_path:
            raise PermissionError(13, os.strerror(13), str(path))
        return is_dir(path)

    monkeypatch.setattr(type(tmp_path), "is_dir", refusing)
    with pytest.raises(OSError, match=f"--reader_model_type {tmp_path}: cannot load a T5 model .*Permission denied"):
        load_reader(str(tmp_path), dropout=None)


def test_the_models_of_these_tests_are_whole():
    for what, (load, _) in LOADERS.items():
        assert load(str(world() / "models" / what.split("'")[0]))
    assert all(isinstance(tensor, torch.Tensor) for half in halves().values() for tensor in half.values())
