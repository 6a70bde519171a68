"""From embeddings to an index: train a codec on a sample of all rows, encode, put an index over the codes."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from atlas.files.jsonl import JsonlCorpus
from atlas.index.arrays import WRITE_BYTES
from atlas.index.codec import Codec, Compression, all_cores, train, training_rows
from atlas.index.compressed import CompressedIndex, explain_probes
from atlas.index.flat import FlatIndex, measure_largest_norm
from atlas.index.live import LiveRows
from atlas.index.sharded import ShardedIndex, Stored
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.distributed import shard_rows
from atlas.runtime.tracking import log, progress_bar


class IndexBuilder:
    """Collects the embeddings of this rank's rows, window by window, and makes an index of them.

    Embeddings are kept where the index, or whoever saves it, needs them. Where a compressed index does without,
    passages are encoded as soon as they are embedded, if there is a quantizer already.

    Attributes:
        rows: the rows of the corpus that this rank brings.
    """

    def __init__(
        self,
        passages: JsonlCorpus,
        dimension: int,
        compression: Compression,
        device: torch.device,
        *,
        previous: ShardedIndex | None = None,
        keep_embeddings: bool = False,
        codec: Codec | None = None,
    ) -> None:
        """Args:
        dimension: D.
        compression: the kind of index to make; without a kind, that of the previous index.
        device: that is to search.
        previous: the index that the new one replaces. Its embeddings are overwritten unless they lie in a file. Nothing
            else of it is used, so the caller can let go of it at once.
        keep_embeddings: also those of a compressed index that is searched without them.
        codec: the quantizer of a compressed index; without one, it is trained.
        """
        self.rows = shard_rows(len(passages), distributed.rank(), distributed.world_size())
        if previous and previous.compressed and compression.kind is None:
            compression = replace(compression, kind=previous.type, nlist=None)
        self._passages, self._compression, self._device = passages, compression, device
        self._threads = devices.cpu_threads(device, distributed.cores())  # `add` is called by another thread
        self._codec = codec
        self._embeddings = self._codes = None
        self._largest_norm = 0.0  # bounds those of the codes, or of the embeddings where there are no codes yet
        if self._codec is not None:
            self._codes = np.empty((len(self.rows), self._codec.code_size), np.uint8)
        if self._codec is None or keep_embeddings or compression.refine_factor > 1:
            self._embeddings = _embeddings_in_memory(previous)
            if self._embeddings is None:
                place = (
                    torch.device("cpu") if compression.compresses else device
                )  # where codes are searched, only those
                self._embeddings = torch.zeros(len(self.rows), dimension, dtype=torch.float16, device=place)

    def add(self, start: int, embeddings: torch.Tensor) -> None:
        """Take the embeddings `(n, D)` fp16 of the rows from `start` of this rank's share on.

        Raises:
            ValueError: an embedding is not finite.
        """
        end, first_row = start + len(embeddings), self.rows.start + start
        if self._codes is not None:
            self._codes[start:end], norm = self._codec.encode(embeddings, first_row, self._threads)
        else:
            norm = measure_largest_norm(embeddings, first_row)
        self._largest_norm = max(self._largest_norm, norm)
        if self._embeddings is not None:
            self._embeddings[start:end] = embeddings

    def finish(self) -> ShardedIndex:
        """The index of all ranks' rows, with embeddings where these were collected. Collective.

        Raises:
            ValueError: such an index cannot be made; the flag and what to do are named.
        """
        if self._codes is not None:
            return index_of_codes(
                self._passages,
                self._embeddings,
                self._codec,
                self._codes,
                self._largest_norm,
                self._compression,
                self._device,
            )
        flat = FlatIndex(self._embeddings, largest_norm=self._largest_norm)
        index = ShardedIndex(self._passages, self._embeddings, flat)
        if not self._compression.compresses:
            return index
        return compress(index, self._compression, device=self._device)


def _embeddings_in_memory(index: ShardedIndex | None) -> torch.Tensor | None:
    """The embeddings of an index, if it has any that may be overwritten: on a CPU those of a saved one are its file."""
    if index is None or index.embeddings is None:
        return None
    in_file = index.stored is not None and index.embeddings.device.type == "cpu"
    return None if in_file or isinstance(index.embeddings, LiveRows) else index.embeddings


def compress(
    index: ShardedIndex,
    compression: Compression,
    *,
    device: torch.device | None = None,
    codec: Codec | None = None,
) -> ShardedIndex:
    """An index of another kind made of the embeddings of this one, with which it shares them. Collective.

    Args:
        device: that is to search; by default that of the embeddings.
        codec: to encode with; by default one is trained, on rank 0, on rows that depend on the seed alone.

    Raises:
        ValueError: the kind cannot be made for this D (a flag is named), an embedding is not finite.
    """
    factory = codec.factory if codec else compression.factory(index.size, index.dimension)
    device = device or index.embeddings.device
    if factory == "flat":
        return ShardedIndex(index.passages, copy_to(index.embeddings, device), stored=index.stored)
    codec = codec or train_codec(index, factory, compression)
    codes, largest_norm = encode(codec, index, devices.cpu_threads(device, distributed.cores()))
    return index_of_codes(
        index.passages, index.embeddings, codec, codes, largest_norm, compression, device, stored=index.stored
    )


def index_of_codes(
    passages: JsonlCorpus,
    embeddings: torch.Tensor | LiveRows | None,
    codec: Codec,
    codes: np.ndarray,
    largest_norm: float,
    compression: Compression,
    device: torch.device,
    stored: Stored | None = None,
) -> ShardedIndex:
    """An index over codes `(n, code_size)` of this rank's rows; `largest_norm` bounds their norms. Collective."""
    with distributed.busy():
        local = CompressedIndex(
            codec,
            codes,
            largest_norm=max(distributed.gather_objects(largest_norm)),
            nprobe=compression.probes(codec.lists),
            device=device,
        )
    distributed.wait_for_all("filling the index")
    if explanation := explain_probes(codec.lists, compression.probes(codec.lists)):
        log.info(explanation)
    return ShardedIndex(passages, embeddings, local, refine_factor=compression.refine_factor, stored=stored)


def encode(codec: Codec, index: ShardedIndex, threads: int | None = None) -> tuple[np.ndarray, float]:
    """Codes `(n, code_size)` of this rank's embeddings and what bounds the norms of what they stand for. Collective."""
    codes = np.empty((len(index.rows), codec.code_size), np.uint8)

    def fill() -> float:
        largest_norm = 0.0
        for start, part, norm in encode_parts(codec, index, threads):
            codes[start : start + len(part)] = part
            largest_norm = max(largest_norm, norm)
        return largest_norm

    return codes, distributed.on_every_rank("encoding the passages", fill)


def encode_parts(
    codec: Codec, index: ShardedIndex, threads: int | None = None
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Codes of this rank's embeddings part by part: its first row, codes `(m, code_size)`, what bounds their norms.

    Raises:
        ValueError: an embedding is not finite.
    """
    step = 2**14
    with progress_bar("encoding", len(index.rows), "passages") as bar:
        for start in range(0, len(index.rows), step):
            codes, norm = codec.encode(index.embeddings[start : start + step], index.rows.start + start, threads)
            yield start, codes, norm
            bar.update(len(codes))


def copy_to(embeddings: torch.Tensor | LiveRows, device: torch.device) -> torch.Tensor | LiveRows:
    """The embeddings on a device: as they are if they are there, else copied piece by piece into a tensor."""
    if embeddings.device.type == device.type:
        return embeddings
    copy = torch.empty(embeddings.shape, dtype=embeddings.dtype, device=device)
    step = max(1, WRITE_BYTES // max(1, embeddings.element_size() * embeddings.shape[1]))
    for start in range(0, len(embeddings), step):
        copy[start : start + step] = embeddings[start : start + step]
        distributed.progress()
    return copy


def train_codec(index: ShardedIndex, factory: str, compression: Compression) -> Codec:
    """Train on rank 0 on a sample of all ranks' rows, and give every rank the same codec. Collective.

    Raises:
        ValueError: on every rank, an embedding in the sample is not finite.
    """
    rows = training_rows(factory, index.dimension, index.size, compression.train_size, compression.seed)
    sample = _gather_sample(index, rows)

    def trained() -> bytes:
        log.info("Training the quantizer %s on %d of %d passages", factory, len(rows), index.size)
        started = time.monotonic()
        if not np.isfinite(sample).all():
            bad = rows[np.flatnonzero(~np.isfinite(sample).all(1))[0]]
            raise ValueError(f"the embedding of passage {bad} is not finite: has the training diverged?")
        with all_cores():
            content = train(factory, sample, all_rows=compression.train_size is not None).serialize()
        log.info("Trained the quantizer in %.1f s", time.monotonic() - started)
        return content

    return Codec.load(distributed.on_main("training the quantizer", trained), factory, index.dimension)


def _gather_sample(index: ShardedIndex, rows: np.ndarray) -> np.ndarray:
    """The embeddings of these rows of all ranks, (len(rows), D) fp32, on rank 0; none elsewhere. Collective."""
    sample = np.empty((len(rows) if distributed.is_main() else 0, index.dimension), np.float32)
    step = max(1, WRITE_BYTES // (2 * index.dimension))
    with progress_bar("gathering a sample", len(rows), "passages") as bar:
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            mine = torch.from_numpy(part[(part >= index.rows.start) & (part < index.rows.stop)] - index.rows.start)
            embeddings = index.embeddings.index_select(0, mine.to(index.embeddings.device)).to("cpu", torch.float16)
            parts = distributed.gather_on_main(embeddings)
            if distributed.is_main():
                sample[start : start + len(part)] = torch.cat(parts).numpy()
            bar.update(len(part))
    return sample
