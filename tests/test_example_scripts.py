"""The scripts of the published experiments: every command line is right, some really run, and SLURM's signals work."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import finetune_qa
import sources
from atlas.checkpoint import load_checkpoint
from atlas.command_line import parse_config
from atlas.config import Config
from tests.kit import read_jsonl, world, write_jsonl
from tests.patience import HANG_SECONDS, free_port, wait_until

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "example_scripts").glob("*.sh") if path.stem != "launch")
TORCHRUN = f"{sys.executable} -m torch.distributed.run"
SUBJECTS = ("anatomy", "virology")
DATA = [
    *(f"{name}_data/{file}.jsonl" for name in ("nq", "triviaqa") for file in ("train", "train.64-shot", "dev", "test")),
    *(f"fever_data/{name}.jsonl" for name in ("train", "train-64", "dev", "test")),
    *(f"data/mmlu_data/5-shot/{split}/{s}.{split}.jsonl" for split in ("train", "valid", "test") for s in SUBJECTS),
    *(
        f"data/mmlu_data/{setting}/{name}.jsonl"
        for setting in ("5-shot-multitask", "full")
        for name in ("train", "combined_valid", "combined_test")
    ),
    *(f"data/templama_data/temp_lama.{s}.{year}.jsonl" for s in ("train", "valid", "test") for year in (2017, 2020)),
    *(f"{key}/{file}" for key, files in sources.CORPORA.items() for file in files),
]
# Flags that make any of the scripts a small run on a CPU: behind a script's name they override its own.
SMALL = [
    *("--precision", "fp32", "--text_maxlength", "64", "--n_context", "3", "--retriever_n_context", "3"),
    *("--total_steps", "4", "--warmup_steps", "1", "--eval_freq", "2", "--save_freq", "3", "--log_freq", "1"),
    *("--refresh_index", "0-4:2", "--no-use_gradient_checkpoint_reader"),
]


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def data(tmp_path):
    """What was downloaded and prepared, all empty; and a torchrun that only writes down how it was called."""
    for name in DATA:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    for name in ("models/atlas/base", "models/atlas/xl", "indices/atlas/wiki/xl", "indices/xl_flat"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/torchrun", f'#!/bin/sh\nprintf "%s\\n" "$@" "" >> {tmp_path}/calls\n')
    return tmp_path / "data"


def start(script, data, *flags, background=False, **environment):
    """`bash example_scripts/{script}.sh flags`, from anywhere."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    path = f"{data.parent}/bin:{clean['PATH']}"
    environment = {"DATA_DIR": str(data), "TORCHRUN": "torchrun", "PATH": path, "OMP_NUM_THREADS": "1"} | environment
    words = ["bash", str(ROOT / f"example_scripts/{script}.sh"), *map(str, flags)]
    settings = {"env": clean | environment, "cwd": data.parent, "text": True}
    if background:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
    return subprocess.run(words, capture_output=True, timeout=HANG_SECONDS, **settings)


def calls(data) -> list[list[str]]:
    return [call.split("\n") for call in (data.parent / "calls").read_text().removesuffix("\n\n").split("\n\n")]


def parsed(call) -> tuple[str, Config]:
    """The program that a call of torchrun starts, and its configuration; the flags are checked on the way."""
    (name,) = [word for word in call if word.endswith(".py")]
    flags = call[call.index(name) + 1 :]
    preset = finetune_qa.PRESET if name == "finetune_qa.py" else {}
    return name, parse_config(flags, program=name.removesuffix(".py"), **preset)


# script -> programs, examples of an update (None: nothing is trained), updates, number of evaluation files
EXPECTED = {
    "nq_few_shot": (["finetune_qa.py"], 32, 30, 2),
    "nq_full": (["finetune_qa.py"], 32, 5000, 2),
    "triviaqa": (["finetune_qa.py"], 32, 30, 2),
    "pretrain_mlm": (["train.py"], 64, 10_000, 0),
    "mmlu_zero_shot": (["evaluate.py"], None, 0, 1),
    "mmlu_5_shot": (["train.py"] * 2, 64, 32, 1),
    "mmlu_5_shot_multitask": (["train.py"], 64, 500, 2),
    "mmlu_full": (["train.py"], 64, 2000, 2),
    "fever_64_shot": (["finetune_qa.py"], 32, 30, 1),
    "fever_full": (["finetune_qa.py"], 32, 5000, 1),
    "templama": (["finetune_qa.py", "evaluate.py"], 32, 30, 2),
    "retrieve_only": (["evaluate.py"], None, 0, 1),
}


def test_there_is_a_script_for_every_experiment():
    assert (
        sorted(
            [
                "nq_few_shot",
                "nq_full",
                "triviaqa",
                "pretrain_mlm",
                "mmlu_zero_shot",
                "mmlu_5_shot",
                "mmlu_5_shot_multitask",
                "mmlu_full",
                "fever_64_shot",
                "fever_full",
                "templama",
                "retrieve_only",
            ]
        )
        == SCRIPTS
    )


@pytest.mark.parametrize("per_gpu", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_command_lines(data, script, per_gpu):
    if script == "templama":
        (data / "experiments/templama_xl").mkdir(parents=True)  # what its first half leaves to the second
    done = start(script, data, "--seed", "7", "--qa_prompt_format", "a b: {question}", PER_GPU=str(per_gpu))
    assert done.returncode == 0, done.stderr
    programs, batch, updates, files = EXPECTED[script]
    found = [parsed(call) for call in calls(data)]
    assert [name for name, _ in found] == programs
    for name, config in found:
        assert config.run.seed == 7 and config.tasks.qa_prompt_format == "a b: {question}"
        assert len(config.run.eval_data) == files
        if name == "evaluate.py":
            continue
        steps = config.optimisation.accumulation_steps
        assert config.run.per_gpu_batch_size * steps * 8 == batch
        assert config.optimisation.total_steps == updates * steps
        assert config.run.save_freq % steps == 0 or name == "finetune_qa.py"
        assert config.optimisation.warmup_steps < config.optimisation.total_steps
    assert calls(data)[0][:6] == [
        "--nproc_per_node", "8", "--signals-to-handle", "SIGTERM,SIGUSR1", "--shutdown-timeout", "300",
    ]  # fmt: skip


def test_triviaqa_from_all_examples(data):
    assert start("triviaqa", data, SHOTS="full").returncode == 0
    ((_, config),) = map(parsed, calls(data))
    assert config.run.train_data == (f"{data}/triviaqa_data/train.jsonl",)
    assert not config.retriever_training.query_side_retriever_training
    assert config.index.refresh_index == "0-4000:2000,4000-20000:8000" and config.optimisation.total_steps == 20_000


def test_templama_embeds_each_corpus_once(data):
    (data / "experiments/templama_xl").mkdir(parents=True)
    assert start("templama", data).returncode == 0
    for year in (2017, 2020):
        (data / f"experiments/index_{year}_xl").mkdir()
        (data / f"experiments/index_{year}_xl/index.json").touch()
    assert start("templama", data).returncode == 0
    indices = [parsed(call)[1].index for call in calls(data)]
    for year, first, second in zip((2017, 2020), indices[:2], indices[2:], strict=True):
        place = f"{data}/experiments/index_{year}_xl"
        assert (first.load_index_path, first.save_index_path) == (None, place) and f"dec{year}" in first.passages[0]
        assert (second.load_index_path, second.save_index_path, second.passages) == (place, None, ())


def test_finished_subjects_are_not_repeated(data):
    done = data / "experiments/mmlu_5_shot_xl/anatomy"
    (done / "checkpoint").mkdir(parents=True)
    (done / "anatomy.test-step-256.jsonl").touch()
    assert start("mmlu_5_shot", data).returncode == 0
    assert [parsed(call)[1].run.name for call in calls(data)] == ["virology"] and (done / "checkpoint").exists()


def test_a_failure_is_passed_on(data):
    program(data.parent / "bin/torchrun", "#!/bin/sh\nexit 3\n")
    assert start("templama", data).returncode == 3
    assert start("templama", data, DATA_DIR="nowhere", TORCHRUN="nowhere").returncode == 127


@pytest.mark.parametrize("script", SCRIPTS)
def test_headers(script):
    """sbatch stops reading `#SBATCH` at the first command; the same header everywhere, and it explains itself."""
    lines = (ROOT / f"example_scripts/{script}.sh").read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    header = [line for line in lines if line.startswith("#SBATCH")]
    assert head[0] == "#!/bin/bash" and head[1 : 1 + len(header)] == header
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in header)
    assert options.pop("job-name") == "atlas-" + script.replace("_", "-")
    assert options == {
        "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "8", "cpus-per-task": "64", "mem": "0",
        "time": "24:00:00", "output": "%x-%j.log", "open-mode": "append", "requeue": "", "signal": "B:USR1@600",
    }  # fmt: skip
    said = "\n".join(head)
    assert "Needs:" in said and re.search("After the paper|Our choice|The settings are", said)
    assert os.access(ROOT / f"example_scripts/{script}.sh", os.X_OK)


SRUN = """#!{python}
import os, re, signal, subprocess, sys
words = sys.argv[1:]
with open("{calls}", "a") as file:
    print("srun", *words, file=file)
first = next(i for i, word in enumerate(words) if word.endswith("torchrun"))
nodes = int(words[words.index("--ntasks") + 1])
tasks = [subprocess.Popen(words[first:]) for _ in range(nodes)]

def forward(number, frame):  # to the tasks, and with some of SLURM's process trackers to all they have started
    for task in tasks:
        started = subprocess.run(["pgrep", "-P", str(task.pid)], capture_output=True, text=True).stdout.split()
        for process in [*map(int, started), task.pid]:
            os.kill(process, number)

signal.signal(signal.SIGUSR1, forward)
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; sleep 0.2; echo other; else echo "$@" >> {calls}; fi
"""


@pytest.fixture
def slurm(data):
    """Stand-ins for srun and scontrol, and the environment of a job on two nodes, here on one machine."""
    calls = data.parent / "slurm"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program(data.parent / "bin" / name, text.format(python=sys.executable, calls=calls))
    environment = {
        "SLURM_JOB_ID": str(free_port(20_000, 29_999)),  # launch.sh makes the port of it
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    return calls, environment


def test_slurm_command_line(data, slurm):
    said, environment = slurm
    done = start("nq_few_shot", data, **environment)
    assert done.returncode == 0, done.stderr
    asked = "srun --ntasks 2 --ntasks-per-node 1 --cpus-per-task 64 --kill-on-bad-exit=0 "
    assert said.read_text().startswith(asked)
    assert len(calls(data)) == 2
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 10000
    for call in calls(data):
        launcher = dict(zip(call[:14:2], call[1:14:2], strict=True))
        assert launcher["--nnodes"] == "2" and launcher["--nproc_per_node"] == "1"
        assert launcher["--rdzv_backend"] == "c10d" and launcher["--rdzv_endpoint"] == f"127.0.0.1:{port}"
        assert parsed(call)[1].optimisation.accumulation_steps == 16


@pytest.fixture
def tiny(data):
    """Real data and models in place of the empty files, and the real torchrun."""
    for split, file in (("train.64-shot", "train"), ("train", "train"), ("dev", "dev"), ("test", "dev")):
        shutil.copy(world() / f"{file}.jsonl", data / f"nq_data/{split}.jsonl")
    corpus = read_jsonl(world() / "passages.jsonl")
    for year in (2017, 2020, 2021):
        write_jsonl(data / f"corpora/wiki/enwiki-dec{year}/text-list-100-sec.jsonl", corpus[:150])
        write_jsonl(data / f"corpora/wiki/enwiki-dec{year}/infobox.jsonl", corpus[150:])
    questions = [row | {"question": f"{row['question']} <extra_id_0>"} for row in read_jsonl(world() / "dev.jsonl")]
    for year in (2017, 2020):
        for split in ("train", "test"):
            write_jsonl(data / f"data/templama_data/temp_lama.{split}.{year}.jsonl", questions)
    program(data.parent / "bin/torchrun", f'#!/bin/sh\nexec {TORCHRUN} "$@"\n')
    return data


MODELS = {
    "MODEL": "none",
    "READER": "{home}/models/reader",
    "RETRIEVER": "{home}/models/retriever",
    "INDEX": "{data}/experiments/index_2017_xl",
    "GPUS": "2",
}


def small(data, script, *flags, **environment):
    models = {name: value.format(home=world(), data=data) for name, value in MODELS.items()}
    return start(script, data, *SMALL, *flags, **(models | environment))


@pytest.mark.slow
def test_templama_then_others_on_its_index(tiny):
    """Three experiments on two processes: TempLAMA builds its indices, NQ and the retriever alone use one."""
    done = small(tiny, "templama")
    assert done.returncode == 0, done.stdout + done.stderr
    results = tiny / "experiments"
    assert len(read_jsonl(results / "templama_xl/temp_lama.test.2017-step-4.jsonl")) == 11
    assert len(read_jsonl(results / "templama_xl_index_2020/temp_lama.test.2020-step-0.jsonl")) == 11
    done = small(tiny, "nq_few_shot")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_jsonl(results / "nq_64_shot_xl/test-step-4.jsonl")) == 11
    done = small(tiny, "retrieve_only", "--n_context", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_jsonl(results / "retrieve_only_xl/test-step-0.jsonl")
    assert all(len(row["passages"]) == 5 and "generation" not in row for row in rows)


@pytest.mark.slow
def test_pretraining_is_requeued_and_goes_on(tiny, slurm):
    """On two `nodes`: USR1 to the batch shell alone ends in a checkpoint and a requeue; the next start goes on."""
    said, environment = slurm
    flags = ["--refresh_index", 64, "--save_freq", 10**6, "--eval_freq", 10**6]
    models = {name: value.format(home=world(), data=tiny) for name, value in MODELS.items() if name != "GPUS"}
    log = tiny / "experiments/pretrain_mlm_base/run.log"
    endless = ["--total_steps", 10**6]
    process = start("pretrain_mlm", tiny, *SMALL, *flags, *endless, background=True, **models, **environment)
    begun = re.compile(r"step +\d+/1000000")
    wait_until(lambda: log.exists() and begun.search(log.read_text()), "the first step", lambda: process.poll() is None)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143, output
    assert said.read_text().splitlines()[-1] == f"requeue {environment['SLURM_JOB_ID']}"
    stopped = load_checkpoint(log.parent).step
    assert stopped > 0 and f"Asked to stop: step {stopped} is saved" in log.read_text()
    again = start("pretrain_mlm", tiny, *SMALL, *flags, "--total_steps", stopped + 5, **models, **environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"Resuming after step {stopped}" in log.read_text() and load_checkpoint(log.parent).step == stopped + 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_without_slurm_is_passed_on_and_waited_for(data, number):
    """The program saves before it ends, and the script does not end before the program."""
    heard = data.parent / "heard"
    code = f"import pathlib, signal, sys, time; file = pathlib.Path({str(heard)!r})\n"
    code += "signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), file.write_text('saved'), sys.exit(1)))\n"
    code += f"file.write_text('ready'); time.sleep({HANG_SECONDS})"
    program(data.parent / "bin/torchrun", f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    process = start("templama", data, background=True)
    wait_until(lambda: heard.exists() and heard.read_text(), "the program", lambda: process.poll() is None)
    process.send_signal(number)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143 and heard.read_text() == "saved"
