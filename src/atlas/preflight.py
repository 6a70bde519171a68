"""What only a run can check: what the device can compute, which tasks there are, which flags have no effect.

The bounds of a flag are beside its default in `config.py`, and combinations of flags are checked there when the command
line is read. `retrieval.py` adds what depends on the kind of an index that was saved.
"""

import torch

from atlas.config import Config, Index
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import log
from atlas.tasks import TASKS


def check(config: Config, device: torch.device) -> None:
    """Refuse what cannot work here, and report flags without effect. Raises: ValueError."""
    embedder_precision = devices.embedder_precision(device, config.run.embedder_precision)
    n, backend = distributed.world_size(), "gloo and NCCL" if device.type == "cuda" else "gloo"
    log.info(
        "%s on %s, torch %s, --precision %s, --embedder_precision %s",
        f"{n} processes ({backend}), each" if n > 1 else "One process",
        devices.describe(device),
        torch.__version__,
        config.optimisation.precision,
        embedder_precision,
    )
    devices.check_precision(device, config.optimisation.precision, "--precision")
    devices.check_precision(device, embedder_precision, "--embedder_precision")
    devices.set_matmul_precision(config.optimisation.precision)
    if config.optimisation.precision == "bf16" and device.type == "cpu" and not devices.cpu_prefers_bf16(device):
        log.warning("--precision bf16: this CPU only emulates it; --precision fp32 is many times as fast here")
    if config.tasks.task not in TASKS:
        raise ValueError(f"--task {config.tasks.task} is unknown: give one of {', '.join(TASKS)}")
    _report_without_effect(config)


def _report_without_effect(config: Config) -> None:
    training, index, model = config.retriever_training, config.index, config.model
    if training.compute_crossattention_stats and not training.train_retriever:
        log.info("--compute_crossattention_stats has no effect without --train_retriever: there are no gold scores")
    if index.save_index_n_shards != Index.save_index_n_shards:
        log.info("--save_index_n_shards has no effect: our format has no shards, any number of ranks opens an index")
    ways = ("faiss_index_type", "faiss_code_size", "faiss_nlist", "faiss_train_size")
    unused = [f"--{name}" for name in ways if getattr(index, name) != getattr(Index, name)]
    if unused and index.index_mode == "flat":
        log.warning("Without --index_mode faiss there is no effect of %s", ", ".join(unused))
    if model.retrieves and model.n_context > model.retriever_n_context and config.run.train_data:
        log.warning(
            "--n_context %d is above --retriever_n_context %d: in training the reader reads the %d retrieved",
            model.n_context,
            model.retriever_n_context,
            model.retriever_n_context,
        )
