"""Choices that depend on the device. There is none here but a CPU, so torch's answers about GPUs are replaced."""

import os
import random
import socket
import warnings

import pytest
import torch

from atlas.command_line import parse_config
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.device import cpu_precision, pick_device
from tests.kit import command_line
from tests.patience import free_port
from tests.programs import run_program
from tests.ranks import rank_environment
from train import train


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


def test_what_a_gpu_is_told_before_it_computes(monkeypatch):
    """No plan of cuDNN's for every shape, and sums of 16-bit products in fp32, which exact search counts on."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [torch.backends.cuda.cudnn_sdp_enabled(), *(getattr(matmul, name) for name in names)]
    choose = devices._choose_kernels
    gpus(monkeypatch, 1)
    monkeypatch.setattr(devices, "_choose_kernels", choose)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        for name in names:
            setattr(matmul, name, True)
        assert pick_device("cpu", 0).type == "cpu" and torch.backends.cuda.cudnn_sdp_enabled()
        pick_device("auto", 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not any(getattr(matmul, name) for name in names)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        for name, value in zip(names, before[1:], strict=True):
            setattr(matmul, name, value)


def test_every_process_gets_its_own_gpu(monkeypatch):
    gpus(monkeypatch, 2)
    assert [pick_device("auto", rank) for rank in (0, 1)] == [torch.device("cuda", rank) for rank in (0, 1)]
    assert pick_device("cuda", 1) == torch.device("cuda", 1)
    assert pick_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"process 2 \(from 0\) .* it has 2: .*--nproc_per_node 2\), or --device cpu"):
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
    for name, value in rank_environment(3, 4, 29_500).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK")
    assert distributed.local_rank() == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_rank() == 1


PINNED = [(4096, 10240), (4096, 4096), (2048, 5120), (768, 2048), (32128, 2048), (17,), (0, 3), ()]


def test_pinned_memory_is_shared_by_tensors(monkeypatch):
    """Blocks are powers of two, as torch makes of everything; the matrices of T5 XL fill nearly all of theirs."""
    blocks = []

    def pinned(self, size):
        blocks.append(size)
        return torch.empty(size, dtype=torch.uint8, device="meta")

    monkeypatch.setattr(devices.PinnedMemory, "_pinned", pinned)
    memory = devices.PinnedMemory()
    for shape in map(torch.Size, PINNED):
        for dtype in (torch.float32, torch.uint8):
            tensor = memory.empty(shape, dtype)
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    given = len(blocks)
    for _ in range(400):
        memory.empty(torch.Size((2048, 5120)), torch.float32)
    assert all(size == 1 << size.bit_length() - 1 for size in blocks)
    assert sum(blocks[given:]) < 1.1 * 400 * 2048 * 5120 * 4
    assert len(blocks) < 40


def test_tensors_in_pinned_memory_do_not_meet(monkeypatch):
    monkeypatch.setattr(devices.PinnedMemory, "_SMALLEST", 1 << 12)
    monkeypatch.setattr(devices.PinnedMemory, "_pinned", lambda self, size: torch.empty(size, dtype=torch.uint8))
    memory, chance = devices.PinnedMemory(), random.Random(0)
    shapes = [torch.Size((chance.randrange(40), chance.randrange(40))) for _ in range(200)]
    tensors = [
        memory.empty(shape, chance.choice([torch.float32, torch.uint8])).fill_(i) for i, shape in enumerate(shapes)
    ]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and (tensor == i).all()


def test_a_process_that_sees_its_own_gpu_alone_takes_it(monkeypatch):
    gpus(monkeypatch, 1)
    assert pick_device("auto", 3, sees_own_gpus=True) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="needs a GPU of its own, and it has 1: use srun --gpus-per-task 1"):
        pick_device("auto", 3)
    gpus(monkeypatch, 4)
    assert pick_device("auto", 3, sees_own_gpus=True) == torch.device("cuda", 3)


# What is in the way, and what is said about it. A host's name is waited for, and so is a rank, while the time lasts.
RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ATLAS_TIMEOUT_SECONDS": "1"}


@pytest.mark.parametrize(
    ("changes", "environment", "expected"),
    [
        ({"device": "cuda"}, {}, "--device cuda: torch "),
        ({}, {"RANK": "0"}, "RANK is set and WORLD_SIZE is not: start the ranks with torchrun"),
        ({}, RANKS | {"MASTER_ADDR": "no-such-host.invalid"}, "no machine of the name no-such-host.invalid is known"),
        ({}, RANKS, "rank 0 of 2 cannot meet the other ranks at 127.0.0.1:"),
        ({}, RANKS | {"ATLAS_TIMEOUT_SECONDS": "soon"}, "ATLAS_TIMEOUT_SECONDS=soon is not a number of seconds above"),
        ({"checkpoint_dir": "/proc/runs"}, {}, "--checkpoint_dir /proc/runs: nothing can be written to"),
    ],
)
def test_what_goes_wrong_before_there_is_a_log_is_one_sentence(
    tmp_path, monkeypatch, capfd, changes, environment, expected
):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "MASTER_ADDR" in environment:
        environment = environment | {"MASTER_PORT": str(free_port())}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = command_line(tmp_path, **changes)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        train(parse_config(line))
    said = capfd.readouterr().err
    assert ended.value.code == 1 and expected in said and said.count("\n") == 1, said


@pytest.mark.processes
def test_a_port_that_is_in_use_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = run_program(["train.py", *command_line(tmp_path)], env=os.environ | RANKS | {"MASTER_PORT": port})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"at 127.0.0.1:{port} (" in done.stderr and "address already in use" in done.stderr


def test_as_many_examples_are_evaluated_together_as_fit_some_tokens():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, together in ((gpu, [2, 64, 1]), (cpu, [1, 16, 1])):
        assert [
            devices.evaluation_batch_size(device, None, 1, tokens) for tokens in (40 * 384, 512, 40_000)
        ] == together
        assert devices.evaluation_batch_size(device, None, 8, 40_000) == 8
    assert devices.evaluation_batch_size(cpu, None, 32, 512) == 32
    assert devices.evaluation_batch_size(cpu, 3, 32, 512) == 3


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
