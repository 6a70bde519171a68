"""Choices that depend on the device: which one, its number formats, its batch shapes. All else is the same code."""

import contextlib
import os
import random
import resource
import signal
import sys
from contextlib import AbstractContextManager

import numpy as np
import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this process when there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def check_precision(device: torch.device, precision: str, flag: str) -> None:
    """Raises ValueError when the device cannot compute in this precision."""
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"{flag} fp16 needs a GPU, and there is none here; use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{flag} bf16: this GPU cannot compute in bf16; use fp16 or fp32")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Compute matrix products in this precision; the weights stay fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def compute_dtype(precision: str) -> torch.dtype | None:
    """The number format that matrix products run in, where it is not that of the weights."""
    return None if precision == "fp32" else _DTYPES[precision]


def embedder_precision(device: torch.device, asked: str | None) -> str:
    """Precision of the passage encoder while it embeds the corpus."""
    return asked or ("fp16" if device.type == "cuda" else "fp32")


def pad_multiple(device: torch.device) -> int:
    """Row lengths are rounded up to this: tensor cores want multiples of 8, a CPU does not care."""
    return 8 if device.type == "cuda" else 1


def embedding_tokens(device: torch.device, rows: int, length: int) -> int:
    """Most padded tokens in one batch of passages to embed: a CPU is fastest while a batch fits its caches."""
    return rows * length if device.type == "cuda" else min(rows * length, 8192)


def search_chunk_rows(device: torch.device) -> int:
    """Rows of the index compared to the queries at a time: bounds the memory of a search."""
    return 2**18 if device.type == "cuda" else 2**15


def cpu_prefers_bf16(device: torch.device) -> bool:
    """Whether this is a CPU whose matrix products are faster in bf16 (AVX512-BF16 or AMX) than in fp32."""
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def cpu_precision() -> str:
    """The precision in which this CPU computes fastest: bf16 is many times slower where it is only emulated."""
    return "bf16" if cpu_prefers_bf16(torch.device("cpu")) else "fp32"


def tokenizer_processes(local_world_size: int) -> int:
    """Worker processes that tokenize ahead while this rank embeds."""
    return max(1, min(8, (os.cpu_count() or 1) // local_world_size))


def single_threaded_worker(worker: int) -> None:
    """Set up a tokenizing worker process: its threads would only fight with those of its siblings.

    A scheduler sends its signals to all processes at once; what they mean is for the rank itself to decide.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # also what the tokenizers library asks for after a fork
    torch.set_num_threads(1)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
