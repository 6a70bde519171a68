"""From embeddings to an index: train a codec on a sample of all rows, encode, put an index over the codes."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from atlas.files.jsonl import JsonlCorpus
from atlas.index.codec import Codec, Compression, all_cores, train, training_rows
from atlas.index.compressed import CompressedIndex, explain_nprobe
from atlas.index.files import WRITE_BYTES
from atlas.index.sharded import Progress, ShardedIndex, Stored
from atlas.runtime import distributed

log = logging.getLogger("atlas")


def compress(
    index: ShardedIndex,
    compression: Compression,
    *,
    device: torch.device | None = None,
    quantizer: Codec | None = None,
    progress: Progress = lambda what, done, of: None,
) -> ShardedIndex:
    """An index of another kind made of the embeddings of this one, with which it shares them. Collective.

    Args:
        device: that is to search; by default that of the embeddings.
        quantizer: to encode with; by default one is trained, on rank 0, on rows that depend on the seed alone.
        progress: told what is going on, how much of it is done, and of how much (None: nobody knows).

    Raises:
        ValueError: the kind cannot be made for this D (a flag is named), an embedding is not finite.
    """
    factory = quantizer.factory if quantizer else compression.factory(index.size, index.dimension)
    device = device or index.embeddings.device
    if factory == "flat":
        return ShardedIndex(index.passages, copy_to(index.embeddings, device), stored=index.stored)
    quantizer = quantizer or train_quantizer(index, factory, compression, progress)
    codes, largest_norm = encode(quantizer, index, progress)
    return index_of_codes(
        index.passages, index.embeddings, quantizer, codes, largest_norm, compression, device, stored=index.stored
    )


def index_of_codes(
    passages: JsonlCorpus,
    embeddings: torch.Tensor | None,
    quantizer: Codec,
    codes: np.ndarray,
    largest_norm: float,
    compression: Compression,
    device: torch.device,
    stored: Stored | None = None,
) -> ShardedIndex:
    """An index over codes `(n, code_size)` of this rank's rows; `largest_norm` bounds their norms. Collective."""
    local = CompressedIndex(
        quantizer,
        codes,
        largest_norm=max(distributed.gather_objects(largest_norm)),
        nprobe=compression.nprobe,
        device=device,
        heartbeat=distributed.progress,
    )
    distributed.wait_for_all("filling the index")
    if explanation := explain_nprobe(quantizer.lists, compression.nprobe):
        log.info(explanation)
    return ShardedIndex(passages, embeddings, local, refine_factor=compression.refine_factor, stored=stored)


def encode(
    quantizer: Codec, index: ShardedIndex, progress: Progress = lambda what, done, of: None
) -> tuple[np.ndarray, float]:
    """Codes `(n, code_size)` of this rank's embeddings and what bounds the norms of what they stand for. Collective."""
    codes, largest_norm, error = np.empty((len(index.rows), quantizer.code_size), np.uint8), 0.0, None
    try:
        for start, part, norm in encode_parts(quantizer, index, progress):
            codes[start : start + len(part)] = part
            largest_norm = max(largest_norm, norm)
    except ValueError as bad_embedding:
        error = bad_embedding
    distributed.wait_for_all("encoding the passages")
    distributed.raise_on_all_ranks(error)
    return codes, largest_norm


def encode_parts(
    quantizer: Codec, index: ShardedIndex, progress: Progress = lambda what, done, of: None
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Codes of this rank's embeddings part by part: its first row, codes `(m, code_size)`, what bounds their norms.

    Raises:
        ValueError: an embedding is not finite.
    """
    n, step = len(index.rows), 2**14
    for start in range(0, n, step):
        yield start, *quantizer.encode(index.embeddings[start : start + step], index.rows.start + start)
        progress("encoding", min(start + step, n), n)
        distributed.progress()


def copy_to(embeddings: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The embeddings on a device: as they are if they are there, else copied piece by piece."""
    if embeddings.device.type == device.type:
        return embeddings
    copy = torch.empty(embeddings.shape, dtype=embeddings.dtype, device=device)
    step = max(1, WRITE_BYTES // max(1, embeddings.element_size() * embeddings.shape[1]))
    for start in range(0, len(embeddings), step):
        copy[start : start + step] = embeddings[start : start + step]
        distributed.progress()
    return copy


def train_quantizer(index: ShardedIndex, factory: str, compression: Compression, progress: Progress) -> Codec:
    """Train on rank 0 on a sample of all ranks' rows, and give every rank the same quantizer. Collective.

    Raises:
        ValueError: on every rank, an embedding in the sample is not finite.
    """
    rows = training_rows(factory, index.dimension, index.size, compression.train_size, compression.seed)
    sample = np.empty((len(rows) if distributed.is_main() else 0, index.dimension), np.float32)
    step = max(1, WRITE_BYTES // (2 * index.dimension))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        mine = torch.from_numpy(part[(part >= index.rows.start) & (part < index.rows.stop)] - index.rows.start)
        parts = distributed.gather_on_main(index.embeddings[mine.to(index.embeddings.device)].to("cpu", torch.float16))
        if distributed.is_main():
            sample[start : start + len(part)] = torch.cat(parts).numpy()
        progress("gathering a sample", min(start + step, len(rows)), len(rows))
    content = error = None
    if distributed.is_main():
        log.info("Training the quantizer %s on %d of %d passages", factory, len(rows), index.size)
        started = time.monotonic()
        try:
            if not np.isfinite(sample).all():
                bad = rows[np.flatnonzero(~np.isfinite(sample).all(1))[0]]
                raise ValueError(f"the embedding of passage {bad} is not finite: has the training diverged?")
            with (
                _every_second(lambda: progress("training the quantizer", round(time.monotonic() - started), None)),
                all_cores(),
            ):
                content = train(factory, sample, all_rows=compression.train_size is not None).serialize()
            log.info("Trained the quantizer in %.1f s", time.monotonic() - started)
        except ValueError as found:
            error = found
    distributed.wait_for_all("training the quantizer")
    distributed.raise_on_all_ranks(error)
    return Codec.load(distributed.from_main(content), factory, index.dimension)


@contextlib.contextmanager
def _every_second(report: Callable[[], None]) -> Iterator[None]:
    """Report, and tell the other ranks that this one is alive, while something runs that cannot say so itself."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(1.0):
            report()
            distributed.progress()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
