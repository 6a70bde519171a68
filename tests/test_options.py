"""The flags that a run leaves on disk: evaluated with, compared with, and never overwritten."""

import argparse
import json

import pytest

from atlas.checkpoint import load_checkpoint
from atlas.command_line import parse_config
from atlas.config import FIELDS, OF_THE_MODEL
from atlas.options import find_checkpoint, read_options, write_options
from tests.kit import command_line, read_jsonl, run, world
from tests.test_checkpoint import published

# One value each that is neither a default nor in the command lines of the tests.
TRAINED = {
    "reader_model_type": "the/reader",
    "retriever_model_path": "the/retriever",
    "retriever_pooling": "cls",
    "retriever_normalize": True,
    "retriever_query_prefix": "query: ",
    "retriever_passage_prefix": "",
    "text_maxlength": 48,
    "target_maxlength": 9,
    "n_context": 3,
    "encoder_format": "{query} {text}",
    "retriever_format": "{text}",
    "reader_prompt_format": "{passages} {query}",
    "passage_format": "{text}",
    "chat_template": False,
    "rerank_by_reader": 7,
    "decoder_format": "so {target}",
    "decoder_prompt_format": "{query}: ",
    "qa_prompt_format": "{question}?",
    "generation_max_length": 21,
    "generation_min_length": 4,
    "generation_num_beams": 2,
    "generation_length_penalty": 0.5,
}


def checkpoint_with(directory, options):
    """A run directory whose checkpoint has nothing but these flags; its path."""
    path = directory / "checkpoint/step-7"
    path.mkdir(parents=True)
    (path / "state.json").write_text('{"format": 1, "step": 7}')
    if options is not None:
        (path / "options.json").write_text(json.dumps(options))
    (directory / "checkpoint/latest").symlink_to("step-7")
    return path


def evaluation(output, **changes):
    """The parsed flags of an evaluation that says nothing about its model."""
    bare = dict.fromkeys(name for name in OF_THE_MODEL if name not in ("decoder_format", "decoder_prompt_format"))
    return parse_config(command_line(output, **bare | {"train_data": None} | changes), program="evaluate")


def refused(capsys, *arguments, **changes):
    with pytest.raises(SystemExit) as ended:
        evaluation(*arguments, **changes)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said, said
    return said


def test_the_list_is_of_flags_and_the_examples_of_the_list():
    assert len(OF_THE_MODEL) == len(set(OF_THE_MODEL)) and set(OF_THE_MODEL) == TRAINED.keys() <= FIELDS.keys()
    assert all(value != FIELDS[name].default for name, value in TRAINED.items())


@pytest.mark.parametrize("place", ["run", "run/checkpoint", "run/checkpoint/step-7", "own"])
def test_a_checkpoints_flags_are_the_defaults_of_its_evaluation(tmp_path, place):
    """By any path of the checkpoint, and in the directory of its own run. Those of the command line win."""
    checkpoint = checkpoint_with(tmp_path / "run", {"model": TRAINED, "optimisation": {"lr": 3.0, "task": "fever"}})
    where = {"name": "run"} if place == "own" else {"name": "other", "model_path": tmp_path / place}
    config = evaluation(tmp_path, **where)
    flags = config.flags()
    assert {name: flags[name] for name in TRAINED} == TRAINED
    assert (
        flags["lr"] == 1e-3 and flags["task"] == "qa"
    )  # not of the model: the command line's, as without a checkpoint
    assert config.origin.checkpoint == checkpoint
    own = evaluation(
        tmp_path, **where, n_context=5, retriever_normalize=False, retriever_query_prefix="", text_maxlength=48
    )
    changed = {"n_context": 5, "retriever_normalize": False, "retriever_query_prefix": ""}
    assert {name: own.flags()[name] for name in TRAINED} == TRAINED | changed
    first, second = own.origins()
    assert first.startswith(f"From the checkpoint {checkpoint}: --reader_model_type the/reader, ")
    assert "--n_context" not in first and "--retriever_format {text}" in first
    assert second == (
        "From the command line: --retriever_normalize off (the checkpoint's: on), --retriever_query_prefix '' "
        "(the checkpoint's: 'query: '), --text_maxlength 48, --n_context 5 (the checkpoint's: 3)"
    )
    described = own.describe().splitlines()
    assert "n_context: 5    [command line; default: 1]" in described
    assert "target_maxlength: 9    [checkpoint; default: None]" in described


def test_what_a_checkpoint_does_not_say_has_its_default(tmp_path):
    """As where an earlier version saved it; and flags that this version does not know do not matter."""
    checkpoint_with(tmp_path / "run", {"model": {"n_context": 7, "sampling": "top-p"}, "decoding": {"speed": [1]}})
    config = evaluation(tmp_path, name="run", reader_model_type="r")
    assert (config.model.n_context, config.model.text_maxlength) == (7, 200)
    *_, last = config.origins()
    assert last.startswith("By default, as the checkpoint does not say them: --retriever_model_path, ")
    checkpoint_with(tmp_path / "bare", None)
    assert evaluation(tmp_path, name="bare", reader_model_type="r").model.n_context == 1


def test_a_preset_is_a_default(tmp_path):
    checkpoint_with(tmp_path / "run", {"model": {"n_context": 7}})
    line = command_line(tmp_path, name="run", n_context=None, train_data=None)
    assert parse_config(line, program="evaluate", n_context=9).model.n_context == 7
    line = command_line(tmp_path, name="other", n_context=None, train_data=None)
    assert parse_config(line, program="evaluate", n_context=9).model.n_context == 9


def test_what_a_script_presets_is_its_default_in_opt_log(tmp_path):
    line = command_line(tmp_path, n_context=None, log_freq=None, lr=3.0, total_steps=9)
    described = parse_config(line, n_context=9, lr=2.0, log_freq=lambda options: options.total_steps).describe()
    lines = described.splitlines()
    assert "n_context: 9" in lines and "log_freq: 9" in lines and "lr: 3.0    [default: 2.0]" in lines


def test_relative_paths_of_a_checkpoint_are_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "work/models/reader").mkdir(parents=True)
    options = {"reader_model_type": "models/reader", "retriever_model_path": "facebook/contriever"}
    run = {"checkpoint_dir": "runs", "name": "run"}
    checkpoint_with(tmp_path / "work/runs/run", {"model": options, "run": run})
    monkeypatch.chdir(tmp_path)
    found = evaluation(tmp_path, name="other", model_path="work/runs/run").model
    assert found.reader_model_type == str(tmp_path / "work/models/reader")
    assert found.retriever_model_path == "facebook/contriever"


def test_training_keeps_its_own_flags(tmp_path):
    checkpoint_with(tmp_path / "run", {"model": TRAINED})
    config = parse_config(command_line(tmp_path, name="other", model_path=tmp_path / "run", n_context=None))
    assert config.model.n_context == 1 and config.origin.checkpoint is None and config.origins() == []


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "n_context",
            "many",
            "/options.json: --n_context is 'many' there, and must be an integer (--n_context comes from ",
        ),
        ("n_context", True, "--n_context is True there, and must be an integer"),
        ("n_context", None, "--n_context is None there, and must be an integer"),
        ("n_context", [3], "--n_context is (3,) there, and must be an integer"),
        ("n_context", 0, "--n_context 0 is too small: it must be at least 1 (--n_context comes from the checkpoint "),
        ("retriever_pooling", "max", "--retriever_pooling is 'max' there, and must be one of average, sqrt, cls"),
        ("retriever_normalize", 1, "--retriever_normalize is 1 there, and must be a bool"),
        ("encoder_format", {"a": 1}, "--encoder_format is {'a': 1} there, and must be a text"),
        ("encoder_format", "{who}", "--encoder_format uses {who}; it may use {id}, {query}"),
        ("generation_length_penalty", float("nan"), "--generation_length_penalty nan is too small"),
        ("generation_min_length", 300, "--generation_min_length 300 is above --generation_max_length 128"),
    ],
)
def test_a_value_that_a_flag_cannot_have(tmp_path, capsys, name, value, sentence):
    """One sentence that says where it is from; not read where the command line gives the flag."""
    checkpoint_with(tmp_path / "run", {"model": {name: value}})
    said = refused(capsys, tmp_path, name="run", reader_model_type="r")
    assert sentence in said and "checkpoint/step-7" in said, said
    good = 5 if FIELDS[name].default != FIELDS["encoder_format"].default else "{text}"
    good = {"retriever_pooling": "cls", "retriever_normalize": False}.get(name, good)
    assert evaluation(tmp_path, name="run", reader_model_type="r", **{name: good}).flags()[name] == good


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"model": 3}', '{"model": {"n_context": ', "[" * 100_000, "\udcff"])
def test_options_that_are_none(tmp_path, capsys, text):
    checkpoint = checkpoint_with(tmp_path / "run", None)
    (checkpoint / "options.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "options.json does not hold the flags of a run by section" in refused(capsys, tmp_path, name="run")


def test_the_model_of_a_checkpoint_that_is_gone(tmp_path, capfd):
    """The sentence names the flag to give, and that its value is the checkpoint's."""
    flags = {"total_steps": 1, "eval_data": None, "closed_book": True, "passages": None}
    trained = run(tmp_path, name="trained", **flags)
    options = trained / "checkpoint/step-1/options.json"
    gone = str(tmp_path / "gone/reader")
    options.write_text(options.read_text().replace(str(world() / "models/reader"), gone))
    capfd.readouterr()
    line = command_line(
        tmp_path,
        name="trained",
        reader_model_type=None,
        train_data=None,
        verify="off",  # the options were edited
        **{k: v for k, v in flags.items() if k not in ("eval_data", "total_steps")},
    )
    with pytest.raises(SystemExit) as ended:
        from evaluate import main

        main(line)
    said = capfd.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert f"--reader_model_type {gone}: there is no such directory" in said
    assert (
        f"(--reader_model_type comes from the checkpoint {options.parent}: give the flag to use another value)" in said
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained with its own prompt, formats, lengths and number of passages."""
    own = {"encoder_format": "{query} | {text}", "qa_prompt_format": "{question} <extra_id_0>", "n_context": 3}
    return run(tmp_path_factory.mktemp("runs"), name="trained", total_steps=2, generation_num_beams=2, **own)


def test_an_evaluation_that_only_names_the_checkpoint_is_that_of_the_training(trained):
    """The results are those that the training wrote at its end, by --name and by --model_path; the log says why."""
    expected = read_jsonl(trained / "dev-step-2.jsonl")
    bare = dict.fromkeys(OF_THE_MODEL) | {"train_data": None}
    (trained / "dev-step-2.jsonl").unlink()
    assert read_jsonl(run(trained.parent, "evaluate", name="trained", **bare) / "dev-step-2.jsonl") == expected
    other = run(trained.parent, "evaluate", name="other", model_path=trained, **bare)
    assert read_jsonl(other / "dev-step-0.jsonl") == expected
    log = (other / "run.log").read_text()
    assert f"From the checkpoint {trained}/checkpoint/step-2: --reader_model_type " in log and "--n_context 3" in log
    changes = {"n_context": 2, "write_evidence": True, "temperature_gold": 0.5}
    fewer = run(trained.parent, "evaluate", name="fewer", model_path=trained, **bare | changes)
    assert all(len(row["passages"]) == 2 for row in read_jsonl(fewer / "dev-step-0.jsonl"))
    log = (fewer / "run.log").read_text()
    assert "From the command line: --n_context 2 (the checkpoint's: 3)" in log
    assert (
        "step-2 was trained with other flags, and this run uses its own: --temperature_gold 0.5 (there: 0.1)\n" in log
    )


def test_training_from_a_checkpoint_says_where_it_differs(trained, tmp_path):
    """Once, in one line; and a resumed run says it of all flags."""
    bare = {"eval_data": None, "total_steps": 1, "qa_prompt_format": "{question} <extra_id_0>"}
    directory = run(tmp_path, name="more", model_path=trained, **bare)
    (line,) = [line for line in (directory / "run.log").read_text().splitlines() if "was trained with other" in line]
    assert line.endswith(
        f"{trained}/checkpoint/step-2 was trained with other flags, and this run uses its own: "
        "--n_context 4 (there: 3), "
        "--encoder_format '{query} title: {title} context: {text}' (there: '{query} | {text}'), "
        "--generation_num_beams 1 (there: 2)"
    )
    again = run(tmp_path, name="more", model_path=trained, **bare | {"total_steps": 2, "shuffle": True})
    (line,) = [line for line in (again / "run.log").read_text().splitlines() if "resumed with other flags" in line]
    assert line.endswith("step-1 was saved with: --shuffle on (before: off), --total_steps 2 (before: 1)")
    run(tmp_path, name="same", **bare)
    assert "other flags" not in (run(tmp_path, name="same", **bare) / "run.log").read_text()


def test_a_published_checkpoint_is_only_reported_on(trained, tmp_path):
    ours = load_checkpoint(trained)
    state = {f"reader.{name}": tensor for name, tensor in ours.reader.items()}
    said = argparse.Namespace(n_context=40, text_maxlength=64, lr=3.0, closed_book=True)
    path = published(tmp_path / "published", state, opt=said)
    flags = {"closed_book": True, "passages": None, "train_data": None}
    log = (run(tmp_path, "evaluate", model_path=path, **flags) / "run.log").read_text()
    assert "published was trained with other flags, and this run uses its own: --n_context 4 (there: 40)\n" in log


def test_every_start_keeps_its_flags(tmp_path):
    """The newest are in opt.log, earlier ones beside it; the first line says from which step on they hold."""
    flags = {"eval_data": None, "closed_book": True, "passages": None}
    for changes in ({"total_steps": 2}, {"total_steps": 3}, {"total_steps": 3}, {"total_steps": 4, "lr": 2e-3}):
        directory = run(tmp_path, **flags | changes)
    run(tmp_path, **flags, total_steps=1, restart=True)
    found = {path.name: path.read_text().splitlines() for path in directory.glob("opt*")}
    assert {name: lines[0] for name, lines in found.items()} == {
        "opt.1.log": "# from step 1 on",
        "opt.2.log": "# from step 3 on",
        "opt.3.log": "# from step 4 on",
        "opt.log": "# from step 1 on",
    }
    totals = [next(line for line in found[name] if line.startswith("total_steps")) for name in sorted(found)]
    assert [total.split()[1] for total in totals] == ["2", "3", "4", "1"]


def test_a_file_of_an_earlier_version_is_kept_too(tmp_path):
    file = tmp_path / "opt.log"
    file.write_text("seed: 1\n")
    write_options(file, "from step 5 on", "seed: 1")  # the same flags
    assert file.read_text() == "seed: 1\n"
    (tmp_path / "opt.7.log").write_text("precious")
    write_options(file, "from step 5 on", "seed: 2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "opt.7.log": "precious",
        "opt.8.log": "seed: 1\n",
        "opt.log": "# from step 5 on\nseed: 2\n",
    }


def test_no_checkpoint_of_ours(tmp_path):
    assert find_checkpoint(tmp_path) is None and find_checkpoint(tmp_path / ("x" * 300)) is None
    assert read_options(tmp_path) == {}
