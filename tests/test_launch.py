"""What the launcher says: torchrun's environment, SLURM's, one that is not complete; and two tasks of a SLURM step."""

import json
import os

import pytest
import torch

from atlas.runtime.launch import Launch, available_cores, first_host, read_launch, read_timeout, share_of_cores
from tests.kit import read_jsonl, run, run_on
from tests.patience import HANG_SECONDS, free_port
from tests.ranks import rank_environment, warm

STEP = {  # task 5 of 10, the second of the second of four machines
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_NODELIST": "node[02-04],gpu5",
    "SLURM_STEP_TASKS_PER_NODE": "4,2(x3)",
}


def test_a_step_of_a_slurm_job():
    launch = read_launch(STEP)
    assert launch == Launch(5, 10, 1, 2, "node02", launch.port)
    assert 12_000 <= launch.port < 32_000
    others = [read_launch(STEP | {"SLURM_PROCID": str(n), "SLURM_NODEID": "3"}) for n in range(10)]
    assert {(other.address, other.port) for other in others} == {("node02", launch.port)}
    for other in ({"SLURM_JOB_ID": "4243"}, {"SLURM_STEP_ID": "2"}):
        assert read_launch(STEP | other).port != launch.port


def test_what_is_said_explicitly_wins():
    place = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}
    launch = read_launch(STEP | place)
    assert (launch.address, launch.port, launch.rank) == ("10.0.0.7", 4000, 5)
    under_torchrun = read_launch(STEP | rank_environment(1, 2, 29_500))
    assert under_torchrun == Launch(1, 2, 1, 2, "127.0.0.1", 29_500)


@pytest.mark.parametrize(
    "gpus",
    [
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"},
        {"SLURM_NTASKS_PER_GPU": "1"},
        *({"SLURM_GPU_BIND": how} for how in ("single:1", "verbose,per_task:1", "map_gpu:0,1", "mask_gpu:0x1,0x2")),
    ],
    ids=str,
)
def test_slurm_may_hide_the_gpus_of_other_tasks(gpus):
    assert read_launch(STEP | gpus).sees_own_gpus and not read_launch(STEP).sees_own_gpus
    assert not read_launch(STEP | gpus | rank_environment(1, 2, 29_500)).sees_own_gpus


def test_binding_to_the_nearest_gpus_hides_none():
    for how in ("closest", "none", "verbose"):
        assert not read_launch(STEP | {"SLURM_GPU_BIND": how}).sees_own_gpus
    assert not read_launch(STEP | {"SLURM_NTASKS_PER_GPU": "2"}).sees_own_gpus


@pytest.mark.parametrize(
    ("launch", "visible", "cores"),
    [
        ({}, 64, 64),
        (rank_environment(1, 4, 29_500), 64, 16),
        (rank_environment(1, 4, 29_500), 3, 1),
        (STEP, 64, 32),
        (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 64, 8),
        (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 8, 8),  # bound to its own
        (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 1, 1),
        (STEP | {"SLURM_CPUS_PER_TASK": "64"} | rank_environment(1, 4, 29_500), 64, 16),  # of all that torchrun started
    ],
)
def test_the_cores_of_a_process(monkeypatch, launch, visible, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(visible)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert share_of_cores(read_launch(launch)) == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == 64


@pytest.mark.parametrize(
    "changes",
    [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None}, {"SLURM_PROCID": None}],
    ids=["one task", "the script of a job", "no task"],
)
def test_a_process_that_srun_did_not_start_with_others_is_alone(changes):
    step = STEP | {"SLURM_NTASKS": "10"} | changes
    assert read_launch({name: value for name, value in step.items() if value is not None}) is None
    assert read_launch({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-03,07],gpu5", "node01"),
        ("gpu5,node[01-03]", "gpu5"),
        ("n[7,9-12]-ib", "n7-ib"),
        ("rack[1-2]n[03-04],x", "rack1n03"),
        ("login.example.org", "login.example.org"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": None}, "RANK is set and WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "RANK is set and MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "RANK is set and MASTER_PORT is not"),
        ({"RANK": "two"}, "RANK=two is not a number from 0"),
        ({"RANK": "-1"}, "RANK=-1 is not a number from 0"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number from 1"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK= is not a number from 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a number from 1 to 65535"),
    ],
)
def test_an_environment_that_is_not_complete(changes, said):
    environment = rank_environment(1, 2, 29_500) | changes
    with pytest.raises(ValueError, match=said):
        read_launch({name: value for name, value in environment.items() if value is not None})


@pytest.mark.parametrize("text", ["soon", "", "0", "-3", "nan", "inf", "1e300"])
def test_a_time_out_is_a_number_of_seconds(text):
    assert read_timeout({}) == 600 and read_timeout({"ATLAS_TIMEOUT_SECONDS": "0.5"}) == 0.5
    with pytest.raises(ValueError, match=f"ATLAS_TIMEOUT_SECONDS={text} is not a number of seconds above 0"):
        read_timeout({"ATLAS_TIMEOUT_SECONDS": text})


def _task(number, step, directory, flags):
    os.environ.update(step | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)})
    torch.set_num_threads(1)
    run(directory, **flags)


@pytest.mark.processes
def test_two_tasks_of_a_slurm_step_are_one_run(tmp_path):
    """`srun --ntasks 2 python train.py`: one run of two ranks, with the answers of two ranks of torchrun."""
    flags = {"total_steps": 2, "train_retriever": True}
    expected = run_on(2, tmp_path, name="expected", **flags)
    step = {
        "SLURM_JOB_ID": str(free_port(20_000, 29_999) - 12_000),  # the port is made of it
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "ATLAS_TIMEOUT_SECONDS": str(HANG_SECONDS),
    }
    tasks = [warm.Process(target=_task, args=(number, step, tmp_path, flags)) for number in range(2)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(HANG_SECONDS)
    assert [task.exitcode for task in tasks] == [0, 0]
    assert "2 processes (gloo)" in (tmp_path / "run/run.log").read_text()
    assert read_jsonl(tmp_path / "run/dev-step-2.jsonl") == read_jsonl(expected / "dev-step-2.jsonl")
    assert json.loads((tmp_path / "run/checkpoint/latest/state.json").read_text())["examples"] == 8
