"""The command line is a contract: every flag, its type and default; every refusal, in one sentence."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import finetune_qa
from atlas.command_line import parse_config
from atlas.config import FIELDS, LARGEST, OF_THE_MODEL, SECTIONS, refresh_schedule
from atlas.runtime import device as devices
from atlas.training.plan import Plan

ROOT = Path(__file__).resolve().parent.parent

DEFAULTS = {
    "run": {
        "name": "experiment_name",
        "checkpoint_dir": "./checkpoint/",
        "model_path": "none",
        "seed": 0,
        "log_freq": 100,
        "report_to": "tensorboard",
        "eval_freq": 500,
        "save_freq": 5000,
        "train_data": (),
        "eval_data": (),
        "qrels": (),
        "bad_lines": "error",
        "metric_unicode": "off",
        "write_results": False,
        "dont_write_passages": False,
        "write_evidence": False,
        "device": "auto",
        "local_rank": -1,
        "main_port": -1,
        "per_gpu_batch_size": 1,
        "per_gpu_eval_batch_size": None,
        "per_gpu_embedder_batch_size": 512,
        "embedder_precision": None,
        "shuffle": False,
        "verify": "sample",
    },
    "index": {
        "passages": (),
        "max_passages": -1,
        "index_mode": "flat",
        "faiss_index_type": "flat",
        "faiss_code_size": None,
        "load_index_path": None,
        "allow_other_index": False,
        "save_index_path": None,
        "save_index_n_shards": 128,
        "faiss_nlist": None,
        "faiss_nprobe": None,
        "faiss_train_size": None,
        "faiss_retrain": False,
        "refine_factor": 1,
        "save_index_codes_only": False,
        "refresh_index": "-1",
        "cache_passage_tokens": "auto",
        "bm25_weight": 0.0,
        "bm25_steps": None,
        "bm25_k1": 0.9,
        "bm25_b": 0.4,
        "bm25_stopwords": "en",
    },
    "model": {
        "reader_model_type": None,
        "retriever_model_path": "facebook/contriever",
        "retriever_pooling": None,  # ours, like the next three
        "retriever_normalize": None,
        "retriever_query_prefix": None,
        "retriever_passage_prefix": None,
        "int8_reader": False,
        "text_maxlength": 200,
        "target_maxlength": None,
        "n_context": 1,
        "retriever_n_context": 5,
        "rerank_by_reader": None,  # ours
        "retrieve_only": False,
        "use_file_passages": False,
        "closed_book": False,
        "encoder_format": "{query} title: {title} context: {text}",
        "retriever_format": "{title} {text}",
        "reader_prompt_format": r"{passages}\n\nQuestion: {query}\nAnswer:",  # ours, like the next two
        "passage_format": r"{title}\n{text}",
        "chat_template": True,
        "decoder_format": None,
        "decoder_prompt_format": None,
        "generation_max_length": 128,
        "generation_min_length": None,
        "generation_num_beams": 1,
        "generation_length_penalty": 1.0,
    },
    "retriever_training": {
        "train_retriever": False,
        "query_side_retriever_training": False,
        "gold_score_mode": "ppmean",
        "gold_question_weight": 1.0,  # ours, like the next
        "in_batch_negatives": False,
        "temperature_gold": 0.01,
        "temperature_score": 0.01,
        "freeze_reader": False,  # ours
        "freeze_retriever_steps": -1,
        "retrieve_with_rerank": False,
        "n_to_rerank_with_retrieve_with_rerank": 128,
        "filtering_overretrieve_ratio": 2,
        "compute_crossattention_stats": False,
        "cache_judgements": None,  # ours
    },
    "optimisation": {
        "total_steps": 1000,
        "warmup_steps": 1000,
        "scheduler": "cosine",
        "scheduler_steps": None,
        "optimizer": "adamw",
        "offload_optimizer": False,
        "lr": 1e-4,
        "lr_retriever": 1e-5,
        "weight_decay": 0.1,
        "epsilon": 1e-6,
        "beta2": 0.999,
        "clip": 1.0,
        "dropout": 0.1,
        "alpha": 1.0,
        "accumulation_steps": 1,
        "precision": "fp32",
        "lora_rank": 0,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "lora_targets": "all",
        "retriever_lora_rank": 0,
        "retriever_lora_alpha": None,
        "retriever_lora_dropout": 0.0,
        "retriever_lora_targets": "all",
        "frozen_precision": "fp32",
        "shard_optim": False,
        "shard_grads": False,
        "use_gradient_checkpoint_reader": False,
        "use_gradient_checkpoint_retriever": False,
        "gradient_checkpoint_every": 1,
        "save_optimizer": False,
        "keep_checkpoints": None,
        "restart": False,
    },
    "tasks": {
        "task": None,
        "qa_prompt_format": "question: {question} answer: <extra_id_0>",
        "mlm_noise_density": 0.15,
        "mlm_mean_noise_span_length": 3,
        "min_words_per_lm_instance": None,
        "min_lm_context_ratio": 0.5,
        "max_lm_context_ratio": 0.5,
        "leave_out_own_passage": False,
        "multiple_choice_num_options": 4,
        "multiple_choice_train_permutations": "single",
        "multiple_choice_eval_permutations": "single",
    },
}
FINETUNE_QA = {
    "task": "qa",
    "write_results": True,
    "train_retriever": True,
    "query_side_retriever_training": True,
    "use_gradient_checkpoint_reader": True,
    "use_gradient_checkpoint_retriever": True,
    "shard_optim": True,
    "shard_grads": True,
    "temperature_gold": 0.01,
    "temperature_score": 0.01,
    "refresh_index": "-1",
    "dropout": 0.1,
    "lr": 4e-5,
    "lr_retriever": 4e-5,
    "scheduler": "linear",
    "weight_decay": 0.01,
    "generation_max_length": 32,
    "target_maxlength": 32,
    "gold_score_mode": "ppmean",
    "precision": "bf16",
    "text_maxlength": 384,
    "per_gpu_batch_size": 1,
    "n_context": 40,
    "retriever_n_context": 40,
    "warmup_steps": 5,
    "log_freq": 5,
}


@pytest.fixture
def files(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "corpus.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "index").mkdir()
    return tmp_path


def words(files, **changes):
    """A command line that works, with changes: None leaves a flag out, True is a switch."""
    flags = {
        "task": "qa",
        "train_data": files / "train.jsonl",
        "eval_data": files / "dev.jsonl",
        "passages": files / "corpus.jsonl",
        "reader_model_type": "google/t5-base-lm-adapt",
    } | changes
    line = []
    for name, value in flags.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def test_every_flag_with_its_default():
    found = {
        name: {field.name: field.default for field in dataclasses.fields(section)} for name, section in SECTIONS.items()
    }
    assert found == DEFAULTS


def test_defaults_survive_parsing(files):
    config = parse_config(words(files))
    assert config.optimisation == SECTIONS["optimisation"]()
    assert config.index.passages == (str(files / "corpus.jsonl"),)


def test_preset_of_finetune_qa(files):
    config = parse_config(words(files, total_steps=31), program="finetune_qa", **finetune_qa.PRESET)
    values = {key: value for name in SECTIONS for key, value in vars(getattr(config, name)).items()}
    assert {name: values[name] for name in FINETUNE_QA} == FINETUNE_QA
    assert finetune_qa.PRESET.keys() == FINETUNE_QA.keys() | {"save_freq", "eval_freq"}


@pytest.mark.parametrize("total", [*range(11, 60), 91, 181, 361, 2521])
def test_the_preset_neither_evaluates_nor_saves_one_step_before_the_end(files, total):
    config = parse_config(words(files, total_steps=total), program="finetune_qa", **finetune_qa.PRESET)
    plan = Plan.of(config)
    steps = range(1, total + 1)
    assert [step for step in steps if plan.saves_after(step)] == [total]
    evaluated = [step for step in steps if plan.evaluates_after(step)]
    assert evaluated[-1] == total and total - 1 not in evaluated and len(evaluated) >= max(2, total // 11)
    line = words(files, total_steps=total, eval_freq=total - 1, save_freq=total - 1)  # the user's own are obeyed
    plan = Plan.of(parse_config(line, program="finetune_qa", **finetune_qa.PRESET))
    assert [step for step in steps if plan.saves_after(step) and plan.evaluates_after(step)] == [total - 1, total]


@pytest.mark.parametrize("total", range(1, 11))
def test_the_preset_suits_a_run_of_few_steps(files, total):
    config = parse_config(words(files, total_steps=total), program="finetune_qa", **finetune_qa.PRESET)
    plan, steps = Plan.of(config), range(1, total + 1)
    assert config.optimisation.warmup_steps == min(5, total - 1)
    assert [step for step in steps if plan.saves_after(step)] == [total]
    evaluated = [step for step in steps if plan.evaluates_after(step)]
    assert evaluated[-1] == total and total - 1 not in evaluated


def test_help_says_what_a_preset_computes(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], program="finetune_qa", **finetune_qa.PRESET)
    shown = capsys.readouterr().out
    assert "steps between checkpoints (default: once, at the end)" in shown


def test_the_command_line_overrides_the_preset(files):
    line = words(files, total_steps=31, lr=1, **{"no-shard_grads": True, "save_freq": 7, "gold_score_mode": "pdist"})
    config = parse_config(line, program="finetune_qa", **finetune_qa.PRESET)
    assert (config.optimisation.lr, config.optimisation.shard_grads, config.run.save_freq) == (1.0, False, 7)
    assert config.retriever_training.gold_score_mode == "pdist"


def test_each_flag_takes_a_value_of_its_type(files):
    given = {
        "seed": ("3", 3),
        "lr": ("1e-3", 1e-3),
        "faiss_code_size": ("64", 64),
        "generation_min_length": ("2", 2),
        "target_maxlength": ("-1", -1),
        "clip": ("2", 2.0),
        "precision": ("bf16", "bf16"),
        "faiss_index_type": ("OPQ64,PQ64", "OPQ64,PQ64"),
        "retriever_pooling": ("cls", "cls"),
        "retriever_query_prefix": ("query: ", "query: "),
        "retriever_passage_prefix": ("", ""),
    }
    config = parse_config(words(files, **{name: text for name, (text, _) in given.items()}))
    values = {key: value for name in SECTIONS for key, value in vars(getattr(config, name)).items()}
    assert {name: values[name] for name in given} == {name: value for name, (_, value) in given.items()}


@pytest.mark.parametrize(
    ("switch", "value"), [({}, None), ({"retriever_normalize": True}, True), ({"no-retriever_normalize": True}, False)]
)
def test_a_switch_may_be_left_to_the_config(files, switch, value):
    assert parse_config(words(files, **switch)).model.retriever_normalize is value


def test_quoted_lists_are_taken_apart(files):
    train = files / "train.jsonl"
    assert parse_config(words(files, train_data=f"{train} {train}")).run.train_data == (str(train), str(train))
    assert parse_config(words(files, train_data=[train, train])).run.train_data == (str(train), str(train))
    spaced = files / "my data.jsonl"
    spaced.write_text("{}\n")
    assert parse_config(words(files, train_data=spaced)).run.train_data == (str(spaced),)


def test_a_long_quoted_list(files):
    names = " ".join([str(files / "train.jsonl")] * 300)
    assert len(parse_config(words(files, train_data=names)).run.train_data) == 300


def test_sections_are_frozen(files):
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(words(files)).run.seed = 1


@pytest.mark.parametrize("switch", ["closed_book", "use_file_passages"])
def test_no_retrieval_no_retriever_training(files, switch):
    line = words(files, total_steps=31, passages=None, **{switch: True})
    config = parse_config(line, program="finetune_qa", **finetune_qa.PRESET)
    assert not config.model.retrieves and not config.retriever_training.train_retriever


BAD_NAMES = ["..", ".", "../mine", "/mine", "a/..", "a/../..", "a/../../mine", "./"]
REFUSED = [
    ("train", {"task": None}, "--task is missing"),
    ("train", {"train_data": None}, "--train_data is missing"),
    ("train", {"train_data": "nowhere.jsonl"}, "--train_data: there is no file nowhere.jsonl"),
    ("train", {"eval_data": "nowhere.jsonl"}, "--eval_data: there is no file nowhere.jsonl"),
    ("evaluate", {"eval_data": None}, "--eval_data is missing"),
    ("evaluate", {"qrels": "nowhere.tsv"}, "--qrels: there is no file nowhere.tsv"),
    ("evaluate", {"qrels": [__file__, __file__]}, "--qrels has 2 files and --eval_data 1: give one of judgements for"),
    ("train", {"qrels": __file__, "eval_data": None}, "--qrels has 1 files and --eval_data 0"),
    ("evaluate", {"qrels": __file__, "closed_book": True}, "--qrels judges what is retrieved: leave out --closed_book"),
    ("train", {"bad_lines": "drop"}, "--bad_lines: invalid choice: 'drop'"),
    ("train", {"metric_unicode": "nfd"}, "--metric_unicode: invalid choice: 'nfd'"),
    ("train", {"passages": None}, "--passages"),
    ("train", {"passages": "nowhere.jsonl"}, "--passages: there is no file nowhere.jsonl"),
    ("train", {"load_index_path": "nowhere"}, "--load_index_path: there is no directory nowhere"),
    ("train", {"model_path": "nowhere"}, "--model_path: there is no directory nowhere"),
    ("train", {"passages": "."}, "--passages: . is a directory (preprocessing/prepare_corpus.py makes a corpus of"),
    ("evaluate", {"eval_data": "."}, "--eval_data: . is a directory"),
    ("train", {"load_index_path": __file__}, "test_config.py is a file"),
    ("train", {"save_index_path": __file__}, "test_config.py is a file: give a directory, new or of an index"),
    ("train", {"reader_model_type": None}, "--reader_model_type is missing"),
    ("train", {"retrieve_only": True}, "--retrieve_only cannot be trained"),
    ("evaluate", {"retrieve_only": True, "closed_book": True}, "--retrieve_only needs an index"),
    ("train", {"closed_book": True, "use_file_passages": True}, "exclude each other"),
    ("train", {"index_mode": "faiss", "faiss_index_type": "pq"}, "--faiss_code_size"),
    ("train", {"index_mode": "faiss", "faiss_index_type": "ivfpq"}, "--faiss_code_size"),
    ("train", {"retriever_pooling": "max"}, "--retriever_pooling: invalid choice: 'max'"),
    ("train", {"encoder_format": "{question} {text}"}, "--encoder_format uses {question}; it may use {id}, {query}"),
    ("train", {"retriever_format": "{query} {text}"}, "--retriever_format uses {query}"),
    ("train", {"qa_prompt_format": "{query}"}, "--qa_prompt_format uses {query}; it may use {question}"),
    ("train", {"decoder_format": "{answer}"}, "--decoder_format uses {answer}"),
    ("train", {"decoder_prompt_format": "{target}"}, "--decoder_prompt_format uses {target}"),
    ("train", {"encoder_format": "{query"}, "is not a format string"),
    ("train", {"refresh_index": "0"}, "--refresh_index '0'"),
    ("train", {"refresh_index": "5-3:1"}, "--refresh_index '5-3:1'"),
    ("train", {"per_gpu_batch_size": 0}, "--per_gpu_batch_size 0 is too small: it must be at least 1"),
    ("train", {"target_maxlength": 0}, "--target_maxlength 0"),
    ("train", {"temperature_gold": 0}, "--temperature_gold 0 is too small: it must be above 0"),
    ("train", {"dropout": 1.0}, "--dropout 1 is too large: it must be below 1"),
    ("train", {"lr": "nan"}, "--lr nan is too small"),
    ("train", {"mlm_noise_density": 0}, "--mlm_noise_density 0 is too small: it must be above 0"),
    ("train", {"mlm_noise_density": 1}, "--mlm_noise_density 1 is too large: it must be below 1"),
    ("train", {"mlm_mean_noise_span_length": 0.5}, "--mlm_mean_noise_span_length 0.5 is too small"),
    ("train", {"min_words_per_lm_instance": -1}, "--min_words_per_lm_instance -1 is too small"),
    ("train", {"min_lm_context_ratio": 0.6}, "--min_lm_context_ratio 0.6 is above --max_lm_context_ratio 0.5"),
    ("train", {"bm25_weight": 1.5}, "--bm25_weight 1.5 is too large: it must be at most 1"),
    ("train", {"bm25_steps": -1}, "--bm25_steps -1 is too small: it must be at least 0"),
    ("train", {"bm25_b": -0.1}, "--bm25_b -0.1 is too small: it must be at least 0"),
    ("evaluate", {"bm25_k1": "inf"}, "--bm25_k1 inf is too large: it must be at most 1000"),
    ("train", {"max_lm_context_ratio": 1.5}, "--max_lm_context_ratio 1.5 is too large: it must be at most 1"),
    (
        "evaluate",
        {"task": "mlm", "retrieve_only": True, "reader_model_type": None},
        "--task mlm makes its queries",
    ),
    (
        "evaluate",
        {"task": "multiple_choice", "retrieve_only": True, "reader_model_type": None},
        "--task multiple_choice makes its queries",
    ),
    ("train", {"multiple_choice_num_options": 1}, "--multiple_choice_num_options 1 is too small"),
    (
        "train",
        {"multiple_choice_num_options": 27},
        "--multiple_choice_num_options 27 is too large: it must be at most 26",
    ),
    (
        "train",
        {"multiple_choice_num_options": 7, "multiple_choice_eval_permutations": "all"},
        "--multiple_choice_eval_permutations all is for at most 6 options",
    ),
    ("train", {"generation_min_length": 9, "generation_max_length": 8}, "--generation_min_length 9 is above --gen"),
    ("evaluate", {"generation_max_length": 1}, "--generation_max_length 1 is the start token alone"),
    ("train", {"generation_num_beams": 5000}, "--generation_num_beams 5000 is too large: it must be at most 256"),
    ("train", {"generation_length_penalty": 1e9}, "--generation_length_penalty 1e+09 is too large: it must be at most"),
    ("train", {"seed": "99999999999999999999"}, "--seed 99999999999999999999 is too large: it must be at most 184467"),
    ("train", {"max_passages": 10**19}, "--max_passages 10000000000000000000 is too large: it must be at most 92233"),
    ("train", {"max_passages": 0}, "--max_passages 0 leaves no passage"),
    ("train", {"text_maxlength": 2}, "--text_maxlength 2 is too small: it must be at least 3"),
    ("train", {"max_lm_context_ratio": 0, "min_lm_context_ratio": 0}, "--max_lm_context_ratio 0 is too small"),
    ("train", {"epsilon": 0}, "--epsilon 0 is too small: it must be above 0"),
    ("train", {"name": ""}, "--name is empty: give a value, or leave the flag out"),
    *(("train", {"name": name}, f"--name {name} is not a directory inside") for name in BAD_NAMES),
    ("train", {"checkpoint_dir": __file__}, "test_config.py is not a directory: give another --checkpoint_dir or"),
    ("train", {"checkpoint_dir": f"{__file__}/more"}, "test_config.py is not a directory: give another"),
    ("train", {"model_path": ""}, "--model_path is empty"),
    ("train", {"load_index_path": " "}, "--load_index_path is empty"),
    ("train", {"eval_data": ""}, "--eval_data: expected at least one file, found an empty text"),
    ("train", {"train_data": "x" * 300}, "--train_data: there is no file xxx"),
    ("train", {"load_index_path": "x" * 300}, "--load_index_path: there is no directory xxx"),
    ("evaluate", {"model_path": "x" * 300}, "--model_path: there is no directory xxx"),
    ("evaluate", {"model_path": "nowhere", "reader_model_type": None}, "--model_path: there is no directory nowhere"),
    ("finetune_qa", {"total_steps": 0}, "--total_steps 0 is too small: it must be at least 1"),
    ("train", {"total_step": 3}, "unrecognized arguments: --total_step 3"),
    ("finetune_qa", {"total_steps": 5, "warmup_steps": 5}, "--warmup_steps 5 must be below --total_steps 5"),
    ("finetune_qa", {"total_steps": 9, "eval_freq": 10}, "--eval_freq 10 must not be above --total_steps 9"),
    ("finetune_qa", {"total_steps": 31, "save_freq": 32}, "--save_freq 32 must not be above --total_steps 31"),
    (
        "train",
        {"gold_score_mode": "question", "train_retriever": True, "reader_prompt_format": "{query} {passages}"},
        "--gold_score_mode question needs {passages} and {query} in this order",
    ),
    (
        "evaluate",
        {"rerank_by_reader": 5, "retrieve_only": True, "reader_model_type": None},
        "--reader_model_type is missing",
    ),
    ("train", {"gold_question_weight": 1.5}, "--gold_question_weight 1.5 is too large: it must be at most 1"),
    ("train", {"freeze_reader": True}, "--freeze_reader leaves nothing that learns: give --train_retriever"),
    (
        "train",
        {"freeze_reader": True, "train_retriever": True, "freeze_retriever_steps": 2},
        "--freeze_retriever_steps 2 with --freeze_reader: nothing learns",
    ),
    ("train", {"lora_rank": 4, "lora_targets": "q, v"}, "--lora_targets 'q, v': expected all, or names of linear"),
    ("train", {"retriever_lora_rank": 4, "train_retriever": True}, "--retriever_lora_rank 4 is for training the query"),
    ("finetune_qa", {"total_steps": 31, "frozen_precision": "bf16"}, "--frozen_precision bf16 needs --lora_rank"),
    ("train", {"lora_rank": 4, "frozen_precision": "bf16"}, "--frozen_precision bf16 cannot be computed with in --pre"),
    ("train", {"no_such_flag": 1}, "unrecognized arguments: --no_such_flag 1"),
]


@pytest.mark.parametrize(("program", "changes", "sentence"), REFUSED)
def test_refusals(files, capsys, program, changes, sentence):
    preset = finetune_qa.PRESET if program == "finetune_qa" else {}
    with pytest.raises(SystemExit) as refused:
        parse_config(words(files, **changes), program=program, **preset)
    said = capsys.readouterr().err
    assert refused.value.code == 2
    assert sentence in said and said.count("\n") == 1, said


@pytest.mark.parametrize("name", ["lora_rank", "retriever_lora_rank"])
def test_adapters_without_the_library_of_adapters(files, capsys, monkeypatch, name):
    line = words(files, **{name: 4}, train_retriever=True, query_side_retriever_training=True)
    assert getattr(parse_config(line).optimisation, name) == 4
    monkeypatch.setattr("atlas.checks.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        parse_config(line)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"train.py: --{name} 4 needs peft: pip install atlas-retrieval[lora]\n"


FLOATS = [name for name, field in FIELDS.items() if isinstance(field.default, float)]
FORMATS = [name for name, field in FIELDS.items() if field.metadata["fields"]]


def refusal(files, capsys, **changes):
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        parse_config(words(files, **changes))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["inf", "1e999", "nan"])
def test_every_number_is_finite(files, capsys, name, value):
    said = refusal(files, capsys, **{name: value})
    assert f"--{name} {value.replace('1e999', 'inf')} is " in said and any(
        reason in said for reason in ("not finite: give a number", "too large", "too small")
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("{FIELD:5d}", "cannot be filled in with texts: Unknown format code 'd'"),
        ("{FIELD:=9}", "cannot be filled in with texts: '=' alignment"),
        ("{FIELD!z}", "cannot be filled in with texts: "),
        ("{FIELD:{FIELD}}", "'{FIELD}' cannot be the format of {FIELD}"),
        ("{FIELD:>9999999999}", "'>9999999999' cannot be the format of {FIELD}"),
        ("{FIELD.real}", "uses {FIELD.real}; it may use {"),
        ("{FIELD[0]}", "uses {FIELD[0]}; it may use {"),
        ("{}", "uses {}; it may use {"),
        ("{FIELD!}", "is not a format string: "),
        ("{FIELD", "is not a format string: "),
        ("}", "is not a format string: "),
    ],
)
def test_every_format_can_be_filled_in(files, capsys, name, form, reason):
    field = FIELDS[name].metadata["fields"].split()[0]
    said = refusal(files, capsys, **{name: form.replace("FIELD", field)})
    assert f"--{name} " in said and reason.replace("FIELD", field) in said


def test_a_format_depends_on_the_text(files, capsys):
    for name in FORMATS:
        if name != "decoder_prompt_format":  # a prompt may be the same for all
            assert f"--{name} 'fixed' is the same for every text: use {{" in refusal(files, capsys, **{name: "fixed"})
    form = {"decoder_prompt_format": "fixed", "encoder_format": "{query!s:>20} {{{text:.200}}} {title!r}"}
    assert parse_config(words(files, **form)).model.encoder_format == form["encoder_format"]


def test_what_is_just_allowed(files):
    allowed = {"seed": 2**64 - 1, "generation_num_beams": 256, "generation_max_length": 2, "generation_min_length": 2}
    allowed |= {"name": "group/mine", "total_steps": LARGEST, "retriever_query_prefix": "", "text_maxlength": 3}
    flags = parse_config(words(files, **allowed)).flags()
    assert {name: flags[name] for name in allowed} == allowed
    devices.seed_everything(flags["seed"])
    searching = {"generation_max_length": 1, "retrieve_only": True}  # nothing is generated
    assert parse_config(words(files, **searching), program="evaluate").model.generation_max_length == 1


@pytest.mark.parametrize(("program", "preset"), [("train", {}), ("evaluate", {}), ("finetune_qa", finetune_qa.PRESET)])
def test_help_shows_each_default_as_it_would_be_typed(capsys, program, preset):
    """Numbers as numbers, switches as on and off, and nothing is unset that the run computes."""
    with pytest.raises(SystemExit):
        parse_config(["--help"], program=program, **preset)
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    shown = {re.match(r"--(\w+)", entry)[1]: " ".join(entry.split("\n\n")[0].split()) for entry in entries}
    assert shown.keys() == FIELDS.keys()
    for name, field in FIELDS.items():
        default, text = preset.get(name, field.default), field.metadata["help"]
        first = "the checkpoint's, else " if program == "evaluate" and name in OF_THE_MODEL else ""
        if callable(default):
            expected = f"(default: {default.__doc__})"
        elif default is None and text.endswith(")"):
            expected = f"(default: {first}{text.rpartition('(')[2]}"
        elif default is None or isinstance(default, bool):
            expected = f"(default: {first}{ {None: 'unset', True: 'on', False: 'off'}[default] })"
        else:
            typed = f"'{default}'" if " " in str(default) else "none" if default == () else default
            expected = f"(default: {first}{typed})"
        assert shown[name].endswith(f" {expected}") and "%%" not in shown[name], name


def test_two_evaluation_files_of_one_name(files, capsys):
    (files / "other").mkdir()
    (files / "other" / "dev.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        parse_config(words(files, eval_data=[files / "dev.jsonl", files / "other" / "dev.jsonl"]))
    assert "two files are called dev" in capsys.readouterr().err


def test_a_path_that_cannot_be_looked_at_is_one_sentence(files, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(words(files, passages=files / ("x" * 5000)))
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2 and said.startswith("train.py: --passages: there is no file /") and said.count("\n") == 1
    ), said


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_only_one_rank_complains(files, capsys, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        parse_config(words(files, task=None))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("-1", [0]),
        ("3", [0, 3, 6, 9]),
        ("2-5:2,7-9:1", [0, 2, 4, 7, 8]),
        ("0-4:3", [0, 3]),
    ],
)
def test_refresh_schedule(text, steps):
    schedule = refresh_schedule(text)
    assert [step for step in range(10) if schedule(step)] == steps


@pytest.mark.processes
@pytest.mark.parametrize("script", ["train", "evaluate", "finetune_qa"])
def test_help_is_grouped_and_needs_no_torch(script):
    code = f"import sys, runpy; sys.argv = ['{script}.py', '--help']\n"
    code += f"try:\n    runpy.run_path('{script}.py', run_name='__main__')\n"
    code += "except SystemExit:\n    sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for section in SECTIONS.values():
        assert f"\n{section.__doc__}:" in done.stdout
    for defaults in DEFAULTS.values():
        assert all(f"--{name}" in done.stdout for name in defaults)
