"""Choices that depend on the device: which device, number formats, batch shapes. All other code is the same for all."""

import contextlib
import os
import random
import resource
import signal
import sys
import warnings
from contextlib import AbstractContextManager
from types import ModuleType

import numpy as np
import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast; fp32 and tf32 do without


def pick_device(asked: str, local_rank: int, *, sees_own_gpus: bool = False) -> torch.device:
    """The device of this process: `cpu`, `cuda` (its own GPU), or `auto`, its own GPU if there are any.

    Args:
        sees_own_gpus: the GPUs of the other processes on this machine may be hidden from this one.

    Raises:
        ValueError: there is no GPU for it, or one that the driver does not let this torch use.
    """
    if asked == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    reasons = [str(warning.message).partition("(Triggered")[0].strip() for warning in caught]
    if not found and (asked == "cuda" or any("driver" in reason for reason in reasons)):
        raise ValueError(
            f"--device {asked}: torch {torch.__version__} cannot use a GPU here; --device cpu does without "
            f"({' '.join(reasons) or 'it finds none'})"
        )
    if not found:
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if sees_own_gpus and gpus == 1:
        local_rank = 0
    if local_rank >= gpus:
        raise ValueError(
            f"--device {asked}: process {local_rank} (from 0) of this machine needs a GPU of its own, and it has "
            f"{gpus}: use srun --gpus-per-task 1, or as many processes as GPUs (srun --ntasks-per-node {gpus}, "
            f"torchrun --nproc_per_node {gpus}), or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    _choose_kernels()
    return torch.device("cuda", local_rank)


def _choose_kernels() -> None:
    # cuDNN's attention makes a plan for each shape, and NaN gradients were reported for some (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # The partial sums of a product of 16-bit matrices stay in fp32: the error bound of exact search counts on it.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def describe(device: torch.device) -> str:
    """What a process computes on, for the log."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' if threads > 1 else ''})"


def cpu_threads(device: torch.device, cores: int) -> int:
    """Threads of what the CPU does for a process that computes on this device. To be asked in the main thread.

    Beside a GPU they are as many as its `cores`, which are idle, while torchrun has set the number to one.
    """
    return cores if device.type == "cuda" else torch.get_num_threads()


def check_precision(device: torch.device, precision: str, flag: str) -> None:
    """Raises ValueError if the device cannot compute in this precision."""
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"{flag} fp16 needs a GPU, but no GPU was found; use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{flag} bf16: this GPU cannot compute in bf16; use fp16 or fp32")
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ValueError(f"{flag} tf32 needs a GPU of the Ampere generation (A100) or later; use fp32")


def precision_here(device: torch.device, precision: str) -> str:
    """This precision, or fp32 where the device does not compute in it, or only emulates it."""
    try:
        check_precision(device, precision, "")
    except ValueError:
        return "fp32"
    return "fp32" if precision == "bf16" and device.type == "cpu" and not cpu_prefers_bf16(device) else precision


def set_matmul_precision(precision: str) -> None:
    """For all fp32 matrix products of this process: their inputs are rounded to 10 bits of mantissa only with tf32.

    Exact search reads this setting and bounds its errors by it: it is set through this one interface.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Compute matrix products inside the block in this precision; the weights stay fp32."""
    if precision not in _DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def compute_dtype(precision: str) -> torch.dtype | None:
    """The dtype of matrix products in this precision; None for fp32 and tf32: that of the weights."""
    return _DTYPES.get(precision)


def embedder_precision(device: torch.device, asked: str | None) -> str:
    """Precision of the passage encoder while it embeds the corpus: the user's choice, or the device's default."""
    return asked or ("fp16" if device.type == "cuda" else "fp32")


def pad_multiple(device: torch.device) -> int:
    """Row lengths are rounded up to a multiple of this: 8 for tensor cores; a CPU needs no padding."""
    return 8 if device.type == "cuda" else 1


def tokens_of_a_call(device: torch.device) -> int:
    """How many tokens an encoder computes in the time that starting its kernels takes."""
    return 1024 if device.type == "cuda" else 64


def evaluation_batch_size(device: torch.device, asked: int | None, training_batch_size: int, tokens: int) -> int:
    """Examples evaluated together: as many as asked for, or of so many tokens what keeps a GPU busy or fits CPU caches.

    It depends on flags alone, never on free memory, so that every run of a command computes the same.
    """
    return asked or max(training_batch_size, (2**15 if device.type == "cuda" else 2**13) // tokens)


def embedding_tokens(device: torch.device, rows: int, length: int) -> int:
    """Most padded tokens in a batch of passages to embed: a CPU is fastest when a batch fits into its caches."""
    return rows * length if device.type == "cuda" else min(rows * length, 8192)


def unpacked_numbers(device: torch.device) -> int:
    """How many numbers of an index are converted to another type at a time."""
    return 2**26 if device.type == "cuda" else 2**19


def search_chunk_rows(device: torch.device) -> int:
    """Number of index rows compared with the queries at a time; limits the memory of a search.

    On a GPU every chunk costs the start of some twenty kernels; there only the number of scores has a limit.
    """
    return 2**24 if device.type == "cuda" else 2**15


def waits_cost_much(device: torch.device) -> bool:
    """Whether work is queued, so that reading a value back stops everything until the queue is empty."""
    return device.type == "cuda"


def sums_half_products_in_fp32(device: torch.device) -> bool:
    """Whether products of 16-bit matrices can be had in fp32, without rounding the sums to 16 bits."""
    return device.type == "cuda"


def half_products(queries: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Inner products of 16-bit rows, summed in fp32: (b, D), (n, D) -> `out` (b, n) fp32. A CPU rounds the sums."""
    if sums_half_products_in_fp32(rows.device):
        torch.mm(queries, rows.T, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(rows, queries.T).T)


def cpu_prefers_bf16(device: torch.device) -> bool:
    """Whether this is a CPU with bf16 instructions (AVX512-BF16 or AMX), which is faster in bf16 than in fp32."""
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def attention_learns_in_fp32(part: torch.Tensor) -> bool:
    """Whether torch's fused attention takes less time for gradients in fp32 than in the 16 bits of this tensor.

    On a CPU with bf16 instructions it takes half as long.
    """
    return part.device.type == "cpu" and part.dtype == torch.bfloat16


def cpu_multiplies_fp16(device: torch.device) -> bool:
    """Whether this is a CPU on which torch multiplies a vector with fp16 rows as they are (AVX2 or more)."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def cpu_precision() -> str:
    """The precision in which this CPU computes fastest: bf16 is many times slower if it is only emulated."""
    return "bf16" if cpu_prefers_bf16(torch.device("cpu")) else "fp32"


def tokenizer_processes(cores: int) -> int:
    """Worker processes that tokenize ahead while a rank with so many cores embeds."""
    return min(8, cores)


def single_threaded_worker(worker: int) -> None:
    """Set up a tokenizing worker process with a single thread: more would compete with those of the other workers.

    Signals to stop are ignored: schedulers and terminals send them to all processes, and the rank decides what to do.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers library also asks for this after a fork
    torch.set_num_threads(1)


def import_bm25s() -> ModuleType:
    """The library bm25s, an extra. It starts JAX where that is installed, which must not take the GPU's memory."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s  # slow, so not before it is used

    return bm25s


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on this device. Nobody waits for the copy, which needs memory that stays in place."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class PinnedMemory:
    """Memory of the CPU that stays in place, so that nobody waits for copies between it and a GPU.

    torch rounds the size of each pinned tensor up to a power of two, which for T5's matrices is a third more memory.
    Here tensors share blocks of such a size.
    """

    _SMALLEST, _LARGEST = 1 << 26, 1 << 30  # blocks, in bytes

    def __init__(self) -> None:
        self._block, self._free = self._SMALLEST // 2, torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with arbitrary values."""
        size = shape.numel() * dtype.itemsize
        if size > len(self._free):
            self._block = min(2 * self._block, self._LARGEST)
            self._free = self._pinned(max(self._block, 1 << (size - 1).bit_length()))
        taken, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def copy_to_cpu(tensor: torch.Tensor, place: torch.Tensor | None, memory: PinnedMemory) -> torch.Tensor:
    """A tensor in `place`, or anywhere in `memory`. Nobody waits for the copy: `synchronize` does.

    On a CPU it is the tensor itself.
    """
    if tensor.device.type == "cpu":
        return tensor
    place = memory.empty(tensor.shape, tensor.dtype) if place is None else place
    return place.copy_(tensor, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work. Call it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU's allocator, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
