"""The scripts as a user starts them: plain, under torchrun, and with something wrong."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_qa
from atlas.index.store import save_index
from atlas.model.reader import load_reader
from atlas.model.retriever import load_retriever
from atlas.retrieval import Retrieval
from make_tiny_models import build_tiny_models
from tests.kit import command_line, read_jsonl, run, run_on, world, write_jsonl
from tests.patience import HANG_SECONDS, free_port
from tests.programs import TORCHRUN, Program, run_program
from tests.test_checkpoint import published
from tests.test_interruptions import losses_by_step
from tests.test_retrieval import make

ROOT = Path(__file__).resolve().parent.parent

# The walk-through of the announcement; the second command breaks off there before its last value.
ANNOUNCED = """
torchrun --standalone --nnodes 1 --nproc_per_node 8  finetune_qa.py --train_data
$DATA_DIR/nq_data/train.100-shot.jsonl --eval_data $DATA_DIR/nq_data/test.jsonl --name
"my_finetuning_experiment_baseline_xl" --checkpoint_dir $DATA_DIR/experiments/ --total_steps 31
--index_mode flat --model_path $DATA_DIR/models/atlas/xl --load_index_path
$DATA_DIR/indices/atlas/wiki/xl --reader_model_type google/t5-xl-lm-adapt
"""
ANNOUNCED_PQ = """
torchrun --standalone --nnodes 1 --nproc_per_node 2  finetune_qa.py --train_data
$DATA_DIR/nq_data/train.100-shot.jsonl --eval_data $DATA_DIR/nq_data/test.jsonl --name
"my_finetuning_experiment_pq_64_xl"  --checkpoint_dir $DATA_DIR/experiments/ --total_steps 31
--index_mode faiss --faiss_index_type pq --faiss_code_size {code_size} --model_path $DATA_DIR/models/atlas/xl
--load_index_path $DATA_DIR/indices/atlas/wiki/xl --reader_model_type google/t5-xl-lm-adapt
"""


def start(*words, **environment):
    """Run a command in the repository's root, as a user does."""
    return subprocess.run(
        [*map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def download(home, directory):
    """What the download scripts would have brought, small: questions, a published checkpoint, an index, a corpus."""
    (directory / "nq_data").mkdir()
    shutil.copy(world() / "train.jsonl", directory / "nq_data/train.100-shot.jsonl")
    write_jsonl(directory / "nq_data/test.jsonl", read_jsonl(world() / "dev.jsonl")[:4])
    reader = load_reader(str(home / "models/reader"), dropout=None)
    retriever = load_retriever(str(home / "models/retriever"), query_side=False, dropout=None)
    state = {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()}
    state |= {f"retriever.{name}": tensor for name, tensor in retriever.state_dict().items()}
    published(directory / "models/atlas/xl", state)
    found: Retrieval = make(home)
    found.build()
    save_index(directory / "indices/atlas/wiki/xl", found.index)
    return directory


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory):
    return download(world(), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A world whose embeddings have 192 numbers, which 64 and 192 divide; and what would have been downloaded."""
    home = tmp_path_factory.mktemp("wide")
    shutil.copy(world() / "passages.jsonl", home)
    texts = [f"{p['title']} {p['text']}" for p in read_jsonl(home / "passages.jsonl")]
    build_tiny_models(texts, home / "models", vocabulary_size=400, retriever_width=192)
    return home, download(home, tmp_path_factory.mktemp("data"))


def announced(command, directory, home=None):
    """The announcement's flags, with tiny local models in place of the hub's, and few passages per question."""
    home = home or world()
    words = shlex.split(command.replace("$DATA_DIR", str(directory)).replace("\n", " "))
    flags = words[words.index("finetune_qa.py") + 1 :]
    flags[flags.index("google/t5-xl-lm-adapt")] = str(home / "models/reader")
    return ["finetune_qa.py", *flags, "--retriever_model_path", str(home / "models/retriever")]


@pytest.mark.processes
@pytest.mark.slow
def test_the_announced_command(data_directory):
    launcher = [sys.executable, *TORCHRUN, "--standalone", "--nnodes", 1, "--nproc_per_node", 2]
    done = start(*launcher, *announced(ANNOUNCED, data_directory))
    assert done.returncode == 0, done.stdout + done.stderr
    directory = data_directory / "experiments/my_finetuning_experiment_baseline_xl"
    log = (directory / "run.log").read_text()
    assert "Each of 2 ranks keeps its part of the reader" in log  # --shard_grads is among the script's defaults
    rows = read_jsonl(directory / "test-step-31.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in read_jsonl(data_directory / "nq_data/test.jsonl")]
    assert all(len(row["passages"]) == 40 for row in rows)
    assert (directory / "checkpoint/latest").resolve().name == "step-31"
    assert (directory / "run.rank-1.log").exists()
    assert f"results in {directory}/test-step-31.jsonl" in done.stdout.splitlines()[-1]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("code_size", [192, 64])
def test_the_announced_compressed_commands(wide, tmp_path, code_size):
    """A flat index is loaded and compressed; kept with --save_index_path, it is opened as it is by the next run.

    Its 31 steps are those of the first command, so they are cut short here.
    """
    home, directory = wide
    command = announced(ANNOUNCED_PQ.format(code_size=code_size), directory, home)
    command += ["--checkpoint_dir", str(tmp_path), "--save_index_path", str(tmp_path / "pq")]
    command += ["--total_steps", "6", "--eval_freq", "5"]
    done = run_program([*TORCHRUN, "--standalone", "--nnodes", 1, "--nproc_per_node", 2, *command])
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "my_finetuning_experiment_pq_64_xl"
    log = (directory / "run.log").read_text()
    assert f"Training the quantizer PQ{code_size} on 300 of 300 passages" in log
    rows = read_jsonl(directory / "test-step-6.jsonl")
    assert all(len(row["passages"]) == 40 for row in rows) and len(rows) == 4
    assert np.load(tmp_path / "pq/codes.1.npy").shape == (300, code_size)
    line = ["--index_mode", "flat", "--load_index_path", str(tmp_path / "pq"), "--name", "next", "--restart"]
    again = run_program([*command, *line])
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"is a compressed index: PQ{code_size}, {code_size} bytes a passage" in again.stdout
    assert "Training the quantizer" not in again.stdout


def test_a_code_size_that_does_not_divide_stops_with_a_sentence(data_directory, capfd):
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        finetune_qa.main(announced(ANNOUNCED_PQ.format(code_size=192), data_directory)[1:])
    said = capfd.readouterr().err
    assert ended.value.code == 1
    assert "--faiss_code_size 192 does not divide the embedding size 64; try 64" in said
    assert said.count("\n") == 1 and "Traceback" not in said


@pytest.mark.processes
@pytest.mark.slow
def test_one_process_two_processes_the_same(tmp_path):
    alone = start(sys.executable, "evaluate.py", *command_line(tmp_path, name="alone", train_data=None))
    line = command_line(tmp_path, name="together", train_data=None)
    together = run_program([*TORCHRUN, "--standalone", "--nproc_per_node", 2, "evaluate.py", *line])
    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    a, b = (read_jsonl(tmp_path / name / "dev-step-0.jsonl") for name in ("alone", "together"))
    for x, y in zip(a, b, strict=True):
        assert (x["generation"], [p["id"] for p in x["passages"]]) == (
            y["generation"],
            [p["id"] for p in y["passages"]],
        )


@pytest.mark.processes
@pytest.mark.slow
def test_two_launchers_as_on_two_machines(tmp_path):
    """`torchrun --nnodes 2`, both on loopback: one job, the numbers of two ranks; rank 0 of the whole job writes."""
    flags = {"total_steps": 5, "train_retriever": True, "query_side_retriever_training": True}
    flags |= {"dropout": 0.1, "shuffle": True}
    expected = run_on(2, tmp_path, name="expected", **flags)
    line = command_line(tmp_path, **flags)
    launch = [
        *TORCHRUN,
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    launchers = [Program([*launch, "--node_rank", node, "train.py", *line]) for node in range(2)]
    outputs = [launcher.communicate() for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    results = read_jsonl(tmp_path / "run/dev-step-5.jsonl")
    assert len(results) == 11 and results == read_jsonl(expected / "dev-step-5.jsonl")
    assert losses_by_step(tmp_path / "run") == losses_by_step(expected)
    assert json.loads((tmp_path / "run/checkpoint/latest/state.json").read_text())["examples"] == 5 * 2 * 2
    assert "Done: " in outputs[0][0] and "Done: " not in outputs[1][0]


BAD = [
    ({"train_data": "bad.jsonl"}, "bad.jsonl, line 2: no `question`: expected `question` (a string)"),
    ({"passages": "bad.jsonl"}, "bad.jsonl, line 1: a passage needs an `id`"),
    ({"eval_data": "broken.jsonl"}, "broken.jsonl, line 1: "),
    ({"train_data": "empty.jsonl"}, "empty.jsonl: there is no line with data in it"),
    ({"passages": "empty.jsonl"}, "--passages"),
    ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
    ({"precision": "tf32"}, "--precision tf32 needs a GPU of the Ampere generation"),
    ({"reader_model_type": "nowhere"}, "--reader_model_type nowhere: cannot load"),
    ({"retriever_model_path": "nowhere"}, "--retriever_model_path nowhere: cannot load"),
    ({"model_path": "."}, "holds no checkpoint"),
    ({"load_index_path": "."}, "holds no index"),
    ({"task": "quiz"}, "--task quiz is unknown: give one of base, qa, cloze, mlm, "),
    ({"task": "mlm"}, "dev.jsonl, line 1: no `text`: expected `id` and `text` (strings), found question, answers, id"),
    ({"task": "lm", "eval_data": None, "train_data": "blank.jsonl"}, "blank.jsonl: no line is left, because"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capfd, changes, sentence):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "bad.jsonl", [{"question": "q", "answers": ["a"]}, {"query": "q"}])
    write_jsonl(tmp_path / "blank.jsonl", [{"id": "1", "text": ""}, {"id": "2", "text": " "}])
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    world()  # the first test that needs it makes it, with progress bars
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, **changes)
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert sentence in said and said.count("\n") == 1, said
    written = {path.name for path in (tmp_path / "run").glob("*.jsonl*")}
    assert written <= {"metrics.jsonl"}  # no results, no half of any
    assert not (tmp_path / "run/checkpoint").exists()
    assert "Traceback" in (tmp_path / "run/run.log").read_text()


@pytest.mark.processes
@pytest.mark.slow
def test_a_mistake_on_two_processes_ends_both(tmp_path):
    write_jsonl(tmp_path / "bad.jsonl", [*read_jsonl(world() / "passages.jsonl"), {"id": "x"}])
    line = command_line(tmp_path, passages=tmp_path / "bad.jsonl")
    done = run_program([*TORCHRUN, "--standalone", "--nproc_per_node", 2, "train.py", *line])
    assert done.returncode == 1
    assert done.stderr.count("bad.jsonl, line 301: a passage needs a `text`") == 1
    assert not (tmp_path / "run/checkpoint").exists()


def test_the_preset_trains_query_side_and_writes(tmp_path):
    directory = run(
        tmp_path,
        "finetune_qa",
        preset=finetune_qa.PRESET,
        total_steps=12,
        warmup_steps=None,
        scheduler=None,
        n_context=2,
        retriever_n_context=2,
        eval_data=write_jsonl(tmp_path / "dev.jsonl", read_jsonl(world() / "dev.jsonl")[:2]),
        task=None,
        write_results=None,
    )
    assert {"dev-step-10.jsonl", "dev-step-12.jsonl"} <= {path.name for path in directory.iterdir()}
    assert sorted(p.name for p in (directory / "checkpoint").iterdir()) == ["latest", "step-12"]


def test_models_load_from_a_local_directory_by_any_path(tmp_path, monkeypatch):
    """Relative and absolute, and with weights in the older container."""
    reader = load_reader(str(world() / "models/reader"), dropout=None)
    shutil.copytree(world() / "models", tmp_path / "models")
    (tmp_path / "models/reader/model.safetensors").unlink()
    torch.save(reader.state_dict(), tmp_path / "models/reader/pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    again = load_reader("models/reader", dropout=None)
    for name, tensor in reader.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
