"""What only a run can check, at its start: the decoder's prompts, plans in which something never comes."""

import contextlib
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel

from atlas import preflight
from atlas.command_line import parse_config
from atlas.preflight import OF_TRAINING
from atlas.runtime import distributed
from atlas.update import update_index
from tests.kit import command_line, read_jsonl, run, world, write_jsonl

CLOSED = {"closed_book": True, "passages": None}


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_prompt_that_leaves_no_room_for_an_answer(tmp_path, capfd, program):
    """Refused before a model is loaded, with its line; with one more token there is room."""
    rows = read_jsonl(world() / "dev.jsonl")[:3]
    rows[1]["question"] *= 3
    prompted = {"decoder_prompt_format": "{query} so", "eval_data": write_jsonl(tmp_path / "long.jsonl", rows)} | CLOSED
    prompted |= {"train_data": None} if program == "evaluate" else {"total_steps": 1}
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, program, generation_max_length=30, **prompted)
    out, said = capfd.readouterr()
    assert ended.value.code == 1 and said.count("\n") == 1 and "long.jsonl, line 2: the prompt by" in said, said
    assert "--decoder_prompt_format has " in said and "raise --generation_max_length to more than " in said
    assert not (tmp_path / "run/checkpoint").exists() and "dev, step" not in out and "long, step" not in out
    enough = 1 + int(said.split("to more than ")[1].split(",")[0])
    with pytest.raises(SystemExit):
        run(tmp_path, program, generation_max_length=enough - 1, **prompted)
    directory = run(tmp_path, program, generation_max_length=enough, **prompted)
    assert len(read_jsonl(next(directory.glob("long-step-*.jsonl")))) == 3


def test_prompts_do_not_matter_where_nothing_is_generated(tmp_path):
    prompted = {"decoder_prompt_format": "{query} " * 9, "generation_max_length": 2}
    run(tmp_path, total_steps=1, eval_data=None, **CLOSED, **prompted)
    assert run(tmp_path, "evaluate", name="search", retrieve_only=True, train_data=None, **prompted).is_dir()


def test_what_never_comes_is_said_once(tmp_path):
    plan = {"warmup_steps": 3, "freeze_retriever_steps": 2, "train_retriever": True, "retriever_n_context": 1}
    plan |= {"optimizer": "adafactor", "beta2": 0.9, "offload_optimizer": True, "gradient_checkpoint_every": 2}
    log = (run(tmp_path, total_steps=2, n_context=1, eval_data=None, **plan) / "run.log").read_text()
    for warning in (
        "--warmup_steps 3 is above --total_steps 2: the learning rate is never reached\n",
        "--freeze_retriever_steps 2, --total_steps 2: the retriever never learns\n",
        "--retriever_n_context 1: the retriever learns nothing from ranking a single passage\n",
        "--gradient_checkpoint_every has no effect without --use_gradient_checkpoint_reader or _retriever\n",
        "--beta2 has no effect with --optimizer adafactor\n",
        "--offload_optimizer has no effect on the CPU: the moments are in its memory\n",
    ):
        assert log.count(warning) == 1, warning
    plan = {"warmup_steps": 2, "freeze_retriever_steps": 1, "train_retriever": True}
    fine = run(tmp_path, name="fine", total_steps=2, eval_data=None, **plan)
    log = (fine / "run.log").read_text()
    assert "--warmup_steps" not in log and "never " not in log
    short = run(tmp_path, name="fine", total_steps=3, eval_data=None, scheduler_steps=1, **plan)
    assert "--warmup_steps 2 is above --scheduler_steps 1: the" in (short / "run.log").read_text()


def test_adafactor_needs_whole_matrices(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for optimizer in ("adamw8bit", "adafactor"):
        config = parse_config(command_line(tmp_path, optimizer=optimizer, shard_grads=True))
        refused = pytest.raises(ValueError, match="adafactor needs whole matrices.*use --no-shard_grads")
        with refused if optimizer == "adafactor" else contextlib.nullcontext():
            preflight.check(config, torch.device("cpu"))


def test_what_has_no_effect_is_said_once(tmp_path):
    flags = {"dont_write_passages": True, "save_index_codes_only": True, "generation_length_penalty": 0.5}
    flags |= {"bm25_k1": 1.2, "bm25_stopwords": "none", "write_evidence": True}
    flags |= {"lora_alpha": 4, "retriever_lora_rank": 2, "refresh_index": 2}
    search = {"total_steps": 1, "train_data": None, "retrieve_only": True}
    log = (run(tmp_path, "evaluate", write_results=False, **search, **flags) / "run.log").read_text()
    for said in (
        "--reader_model_type, --target_maxlength, --generation_max_length, --generation_length_penalty have no effect "
        "with --retrieve_only",
        "--dont_write_passages has no effect without --write_results",
        "--write_evidence has no effect without passages that are read, and --write_results",
        "--save_index_codes_only has no effect without --save_index_path",
        "--bm25_k1, --bm25_stopwords have no effect without --bm25_weight",
        "--lora_alpha has no effect without --lora_rank",
        "--retriever_lora_rank has no effect in an evaluation: the adapters of a checkpoint are always used",
        "--refresh_index has no effect where the passage encoder does not learn",
    ):
        assert log.count(f"] {said}\n") == 1, log
    with_effect = {"generation_num_beams": 2, "dont_write_passages": True, "generation_length_penalty": 0.5}
    with_effect |= dict.fromkeys((*OF_TRAINING, "temperature_gold"), None)
    again = run(tmp_path, "evaluate", name="again", save_index_path=tmp_path / "index", **with_effect)
    assert "no effect" not in (again / "run.log").read_text()
    opened = {"load_index_path": tmp_path / "index", "passages": None, "max_passages": 5}
    opened |= {"cache_passage_tokens": "on"}
    log = (run(tmp_path, "evaluate", name="opened", **search, **opened) / "run.log").read_text()
    assert "--max_passages has no effect with --load_index_path: all of the saved passages are used" in log
    assert "--cache_passage_tokens has no effect where no corpus is embedded\n" in log


def effectless(tmp_path, program="train", **changes):
    """What is said about flags without effect."""
    directory = run(tmp_path, program, **{"total_steps": 1, "eval_data": None} | changes)
    lines = [line.split("] ", 1)[1] for line in (directory / "run.log").read_text().splitlines() if "] " in line]
    return [line for line in lines if " no effect " in line]


def test_a_retriever_that_is_not_trained(tmp_path):
    learns = {
        "in_batch_negatives": True,
        "temperature_gold": 3.0,
        "freeze_retriever_steps": 1,
        "mlm_noise_density": 0.2,
    }
    said = effectless(tmp_path, train_retriever=False, lr_retriever=None, temperature_score=None, **learns)
    assert said == [
        "--mlm_noise_density has no effect without --task mlm",
        "--freeze_retriever_steps, --in_batch_negatives have no effect without --train_retriever",
        "--temperature_gold has no effect without --train_retriever or --write_evidence",
    ]
    said = effectless(tmp_path, name="judged", train_retriever=False, write_evidence=True, temperature_gold=3.0)
    assert not any("--temperature_gold" in line for line in said)
    (said,) = effectless(tmp_path, name="closed", closed_book=True, train_retriever=True, passages=None)[:1]
    assert said == "--train_retriever has no effect where nothing is retrieved"


def test_what_is_for_training_is_named_in_an_evaluation(tmp_path):
    flags = dict.fromkeys(OF_TRAINING, None) | {"lr": 1.0, "restart": True, "train_retriever": True}
    flags |= {"train_data": world() / "train.jsonl", "eval_data": world() / "dev.jsonl", "temperature_gold": None}
    assert effectless(tmp_path, "evaluate", **flags) == [
        "--train_data, --restart, --train_retriever, --lr have no effect in evaluate.py, which does not train"
    ]


def test_models_that_are_evaluated_as_they_come_are_named(tmp_path, capsys):
    """As where the name of the run is mistyped."""
    run(tmp_path, total_steps=1, eval_data=None)
    flags = dict.fromkeys(OF_TRAINING, None) | {"eval_data": world() / "dev.jsonl", "checkpoint_dir": tmp_path}
    said = f"models/retriever as they come: there is no --model_path, and no run {tmp_path}/rum"
    assert said in (run(tmp_path, "evaluate", name="rum", **flags) / "run.log").read_text()
    assert "No checkpoint" not in (run(tmp_path, "evaluate", **flags) / "run.log").read_text()
    for program, more, hint in (
        ("train", {"model_path": tmp_path / "run"}, f" ({tmp_path}/run has that of {world()}/models/reader)"),
        ("evaluate", {"train_data": None, "name": "rum"}, ", or a --model_path or --name whose checkpoint says it"),
    ):
        with pytest.raises(SystemExit):
            parse_config(command_line(tmp_path, reader_model_type=None, **more), program=program)
        assert f"the hub id or directory of a T5 or a language model{hint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "grows_old"),
    [({}, True), ({"refresh_index": "2"}, False), ({"query_side_retriever_training": True}, False)],
)
def test_an_index_that_grows_old_is_said(tmp_path, flags, grows_old):
    directory = run(tmp_path, total_steps=1, eval_data=None, train_retriever=True, **flags)
    assert ("so the index grows old" in (directory / "run.log").read_text()) == grows_old


def test_long_answers_are_counted(tmp_path):
    lines = read_jsonl(world() / "dev.jsonl")
    lines[2] |= {
        "answers": ["the river of Selnu and of Kobari " * 9],
        "target": "the river of Selnu and of Kobari " * 9,
    }
    data = write_jsonl(tmp_path / "long.jsonl", lines)
    directory = run(
        tmp_path, total_steps=1, train_data=data, eval_data=data, target_maxlength=16, generation_max_length=20
    )
    text = (directory / "run.log").read_text()
    fits = run(
        tmp_path,
        name="fits",
        total_steps=1,
        eval_data=data,
        target_maxlength=9,
        decoder_format="{target} " + "and so on " * 9,
    )
    assert (
        f"{len(lines)} of {len(lines)} targets" not in text and "targets are longer" in (fits / "run.log").read_text()
    )
    for said in (
        f"1 of {len(lines)} targets are longer than --target_maxlength 16 and are cut: raise it",
        f"1 of {len(lines)} lines have no answer that can be written with --generation_max_length 20: raise it",
    ):
        assert text.count(f"long.jsonl: {said}") == 1, said


def test_an_index_is_not_replaced_by_that_of_another_corpus(tmp_path, capsys):
    search = dict.fromkeys(OF_TRAINING, None) | {"retrieve_only": True, "save_index_path": tmp_path / "index"}
    run(tmp_path, "evaluate", **search)
    before = sorted(path.name for path in (tmp_path / "index").iterdir())
    others = write_jsonl(tmp_path / "others.jsonl", read_jsonl(world() / "passages.jsonl")[:50])
    with pytest.raises(SystemExit):
        run(tmp_path, "evaluate", name="others", **search | {"passages": others})
    assert f"--save_index_path {tmp_path}/index holds an index of other passages" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before
    bert = BertConfig.from_pretrained(world() / "models/retriever")
    other = tmp_path / "other"
    shutil.copytree(world() / "models/retriever", other)
    BertModel(bert).save_pretrained(other)
    again = run(tmp_path, "evaluate", name="other", **search | {"retriever_model_path": other})
    assert "index: the index there, made by another passage encoder, is replaced" in (again / "run.log").read_text()
    copied = tmp_path / "copied.jsonl"  # the same at another place and time
    copied.write_bytes((world() / "passages.jsonl").read_bytes())
    run(tmp_path, "evaluate", name="again", **search | {"passages": copied})
    saved = {"passages": others, "save_index_path": tmp_path / "other_index"}
    run(tmp_path, "evaluate", name="saved", **search | saved)
    for change in (
        {"load_index_path": tmp_path / "index"},
        {"passages": next((tmp_path / "index").glob("passages.*.jsonl"))},
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, "evaluate", name="refused", **search | saved | change)
        assert f"--save_index_path {tmp_path}/other_index holds an index of other passages" in capsys.readouterr().err
    update_index(tmp_path / "index", None, None, ["p3"])
    with pytest.raises(SystemExit):
        run(tmp_path, "evaluate", name="updated", **search)
    assert "index holds an index of other passages" in capsys.readouterr().err
