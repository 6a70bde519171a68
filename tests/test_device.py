"""Choices that depend on the device. There is none here but a CPU, so torch's answers about GPUs are replaced."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.device import cpu_precision, pick_device
from tests.kit import command_line
from tests.patience import free_port


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_that_emulates_bf16_computes_in_fp32(monkeypatch, fast, precision):
    monkeypatch.setattr("atlas.runtime.device.cpu_prefers_bf16", lambda device: fast)
    assert cpu_precision() == precision


def gpus(monkeypatch, count, warning=None):
    def is_available():
        if warning:
            warnings.warn(warning, stacklevel=1)
        return count > 0

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(devices, "_choose_kernels", lambda: None)


def test_every_process_gets_its_own_gpu(monkeypatch):
    gpus(monkeypatch, 2)
    assert [pick_device("auto", rank) for rank in (0, 1)] == [torch.device("cuda", rank) for rank in (0, 1)]
    assert pick_device("cuda", 1) == torch.device("cuda", 1)
    assert pick_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"process 2 \(from 0\) .* it has 2: .*--nproc_per_node 2, or use --device"):
        pick_device("auto", 2)


def test_without_a_gpu(monkeypatch):
    gpus(monkeypatch, 0)
    assert pick_device("auto", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"--device cuda: torch .* cannot use a GPU here; .*\(it finds none\)"):
        pick_device("cuda", 0)


def test_a_driver_that_is_too_old_is_no_silent_run_on_the_cpu(monkeypatch):
    gpus(monkeypatch, 0, "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)")
    with pytest.raises(ValueError, match=r"--device auto: .*--device cpu does without \(.*driver .* is too old"):
        pick_device("auto", 0)
    assert pick_device("cpu", 0) == torch.device("cpu")


def test_ranks_that_are_started_without_torchrun_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.local_rank() == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_rank() == 1


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert devices.available_cores() == 1 and devices.tokenizer_processes(1) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert devices.available_cores() == 64


@pytest.mark.processes
@pytest.mark.parametrize(
    ("changes", "environment", "expected"),
    [
        ({"device": "cuda"}, {}, "--device cuda: torch "),
        ({}, {"RANK": "0"}, "rank 0 cannot meet the other ranks at MASTER_ADDR:MASTER_PORT (Error initializing"),
        ({}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"}, "rank 0 cannot meet the other"),
        ({"checkpoint_dir": "/dev/null/runs"}, {}, "'/dev/null/runs"),
    ],
)
def test_what_goes_wrong_before_there_is_a_log_is_one_sentence(tmp_path, changes, environment, expected):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "MASTER_ADDR" in environment:
        environment = environment | {"MASTER_PORT": str(free_port()), "ATLAS_TIMEOUT_SECONDS": "2"}
    words = [sys.executable, "train.py", *command_line(tmp_path, **changes)]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert expected in done.stderr.splitlines()[-1] and len(done.stderr.splitlines()[-1]) > len(expected)


def test_a_gpu_evaluates_as_many_examples_as_fit_some_tokens():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [devices.evaluation_batch_size(gpu, 1, tokens) for tokens in (40 * 384, 512, 40_000)] == [2, 64, 1]
    assert devices.evaluation_batch_size(gpu, 8, 40_000) == devices.evaluation_batch_size(cpu, 8, 512) == 8


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_tf32_needs_tensor_cores_that_have_it(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if fits:
        devices.check_precision(torch.device("cuda"), "tf32", "--precision")
    else:
        with pytest.raises(ValueError, match="--precision tf32 needs a GPU of the Ampere"):
            devices.check_precision(torch.device("cuda"), "tf32", "--precision")


def test_precision_of_products_is_what_exact_search_reads():
    with devices.autocast(torch.device("cpu"), "tf32"):
        assert not torch.is_autocast_enabled("cpu") and devices.compute_dtype("tf32") is None
    for precision, setting in (("tf32", "high"), ("bf16", "highest"), ("fp32", "highest")):
        devices.set_matmul_precision(precision)
        assert torch.get_float32_matmul_precision() == setting
