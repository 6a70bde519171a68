"""The text half: embed the corpus, search it for queries, hand out passages. No gradient anywhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from atlas.files.jsonl import JsonlCorpus
from atlas.index.build import compress, index_of_codes
from atlas.index.codec import Compression
from atlas.index.sharded import ShardedIndex, shard_rows
from atlas.model.inputs import Inputs
from atlas.model.retriever import DualEncoder
from atlas.model.tokenization import pad_rows
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.tracking import ProgressBars, log, progress_bar

WINDOW = 4096  # consecutive passages that are sorted by length together, and tokenized by one process at a time


class Found(NamedTuple):
    """What a search brought for B queries."""

    passages: list[list[dict[str, Any]]]  # B lists of K, best first
    ids: torch.Tensor  # (B, K) rows of the index
    scores: torch.Tensor  # (B, K)

    def select(self, order: torch.Tensor) -> "Found":
        """Of each query the passages at these places, in this order: (B, k) int64."""
        passages = [
            [of_query[i] for i in of_order] for of_query, of_order in zip(self.passages, order.tolist(), strict=True)
        ]
        order = order.to(self.ids.device)
        return Found(passages, self.ids.gather(1, order), self.scores.gather(1, order))


class _Windows(Dataset):
    """Batches of tokenized passages, window by window: item i is a list of (rows, lists of token ids)."""

    def __init__(self, passages: JsonlCorpus, rows: range, inputs: Inputs, max_tokens: int) -> None:
        self.passages, self.rows, self.inputs, self.max_tokens = passages, rows, inputs, max_tokens
        self.size = WINDOW  # goes with the object to the processes that read it

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, i: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        rows = self.rows[i * self.size : (i + 1) * self.size]
        tokens = self.inputs.passage_tokens(self.passages[rows.start : rows.stop])
        return [
            (np.asarray([rows[j] for j in batch]), [np.asarray(tokens[j], np.int32) for j in batch])
            for batch in batches_by_length([len(t) for t in tokens], self.max_tokens)
        ]


def _as_it_is(item: Any) -> Any:
    return item


def batches_by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Group positions of similar lengths, so that a batch padded to its longest row has at most `max_tokens` tokens.

    A single row that is longer makes a batch of its own.
    """
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[position] > max_tokens:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


class Retrieval:
    """Finds passages for queries in an index that it can (re)build.

    Args:
        passages: the whole corpus; this rank embeds and searches its share of the rows.
        embedder_precision: of both encoders outside of training.
        embedder_batch_size: passages of full length per batch when the corpus is embedded.
        rerank: passages to embed anew per query and sort by fresh scores; 0: take the index's order.
        overretrieve: times the passages to search for where some are excluded.
        compression: the kind of index to build.
        retrain: train a compressed index's quantizer again whenever the corpus is embedded again.
        keep_embeddings: have those of a compressed index in memory while `on_build` is called.
    """

    def __init__(
        self,
        retriever: DualEncoder,
        inputs: Inputs,
        passages: JsonlCorpus,
        *,
        device: torch.device,
        embedder_precision: str,
        embedder_batch_size: int,
        rerank: int = 0,
        overretrieve: int = 1,
        compression: Compression | None = None,
        retrain: bool = False,
        keep_embeddings: bool = False,
    ) -> None:
        self.retriever, self.inputs, self.passages = retriever, inputs, passages
        self.device, self.embedder_precision = device, embedder_precision
        self.max_tokens = devices.embedding_tokens(device, embedder_batch_size, inputs.retriever_maxlength)
        self.rerank, self.overretrieve = rerank, overretrieve
        self._told = False  # that too few passages were left
        self.compression, self.retrain = compression or Compression(), retrain
        self.keep_embeddings = keep_embeddings or self.compression.refine_factor > 1
        self.index: ShardedIndex | None = None
        self.on_build: Callable[[ShardedIndex], None] = lambda index: None
        # weights of the passage encoder that built the index, kept where the encoder moves on (see `keep_builder`)
        self.built_by: dict[str, torch.Tensor] | None = None
        self.keep_builder = False

    @torch.no_grad()
    def build(self) -> None:
        """Embed this rank's share of the corpus into the index: a new one, or the rows of the one that is there.

        Embeddings are kept in memory where the index, or whoever saves it, needs them; where a compressed index does
        without, passages are encoded as soon as they are embedded, with the quantizer that is there.
        """
        index = self.index
        compressed = index.compressed if index else None
        wanted = self.compression
        if compressed and wanted.kind is None:  # opened as what it is
            wanted = replace(wanted, kind=index.type, nlist=None)
        quantizer = compressed.quantizer if compressed and not self.retrain else None
        rows = shard_rows(len(self.passages), distributed.rank(), distributed.world_size())
        embeddings = codes = None
        if quantizer is None or self.keep_embeddings:
            embeddings = self._room_for(rows, wanted)
        if quantizer is not None:
            codes = np.empty((len(rows), quantizer.code_size), np.uint8)
        largest_norm = 0.0

        def store(start: int, vectors: torch.Tensor) -> None:  # rows from `start` on: (n, D) fp16
            nonlocal largest_norm
            if embeddings is not None:
                embeddings[start : start + len(vectors)] = vectors
            if codes is not None:
                codes[start : start + len(vectors)], norm = quantizer.encode(vectors, rows.start + start)
                largest_norm = max(largest_norm, norm)

        was_training, error = self.retriever.training, None
        self.retriever.eval()
        try:
            self._embed(rows, store)
        except ValueError as not_finite:
            error = not_finite
        self.retriever.train(was_training)
        distributed.wait_for_all("embedding the corpus")
        distributed.raise_on_all_ranks(error)
        if codes is not None:
            self.index = None  # whose codes take memory
            self.index = index_of_codes(self.passages, embeddings, quantizer, codes, largest_norm, wanted, self.device)
        else:
            self.index = ShardedIndex(self.passages, embeddings)
            if wanted.compresses:
                with ProgressBars() as progress:
                    self.index = compress(self.index, wanted, device=self.device, progress=progress)
        if self.keep_builder:
            state = self.retriever.passage_encoder.state_dict()
            self.built_by = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        self.on_build(self.index)
        if self.index.compressed and self.compression.refine_factor == 1:
            self.index.embeddings = None

    def build_with(self, encoder: dict[str, torch.Tensor]) -> None:
        """Build with these weights of the passage encoder, and give it back its own."""
        own = {name: tensor.clone() for name, tensor in self.retriever.passage_encoder.state_dict().items()}
        self.retriever.passage_encoder.load_state_dict(encoder)
        self.build()
        self.retriever.passage_encoder.load_state_dict(own)

    def _room_for(self, rows: range, wanted: Compression) -> torch.Tensor:
        """Where this rank's embeddings go: into those of the index, if it has any."""
        if self.index is not None and self.index.embeddings is not None:
            return self.index.embeddings
        device = torch.device("cpu") if wanted.compresses else self.device  # where codes are searched, only those
        return torch.zeros(len(rows), self.retriever.dim, dtype=torch.float16, device=device)

    def _embed(self, rows: range, store: Callable[[int, torch.Tensor], None]) -> None:
        """Hand the rows' embeddings to `store`, window by window.

        Other ranks may have more or fewer batches, nothing here waits for them.
        """
        windows = _Windows(self.passages, rows, self.inputs, self.max_tokens)
        processes = devices.tokenizer_processes(distributed.local_world_size()) if len(windows) > 1 else 0
        loader = DataLoader(
            windows,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=processes,
            worker_init_fn=devices.single_threaded_worker if processes else None,
            prefetch_factor=2 if processes else None,
        )
        share = f" on each of {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
        log.info("Embedding %d passages%s", len(rows), share)
        started = time.monotonic()
        window = torch.empty(min(windows.size, len(rows)), self.retriever.dim, dtype=torch.float16, device=self.device)
        with progress_bar("embedding", len(rows), "passages") as bar:
            for number, batches in enumerate(loader):
                first = number * windows.size
                for batch_rows, tokens in batches:
                    places = torch.from_numpy(batch_rows - rows.start - first).to(self.device)
                    window[places] = self._embed_batch(tokens).to(torch.float16)
                    bar.update(len(tokens))
                    distributed.progress()
                store(first, window[: len(rows) - first])
        devices.synchronize(self.device)
        seconds = time.monotonic() - started
        log.info("Embedded %d passages%s in %.1f s: %.0f a second", len(rows), share, seconds, len(rows) / seconds)

    def _embed_batch(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Embeddings of tokenized passages by the current passage encoder, (n, D)."""
        ids, mask = pad_rows(tokens, self.inputs.retriever_tokenizer.pad_id, self.inputs.pad_multiple)
        with devices.autocast(self.device, self.embedder_precision):
            return self.retriever.embed_passages(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def search(self, queries: list[str], k: int, exclude: Sequence[str | int | None] | None = None) -> Found:
        """The best k passages (all, if there are fewer) of each query. Collective: ranks may bring none.

        Args:
            queries: formatted by the task.
            exclude: for each query the `id` of passages to leave out, while there are k others among those found. None
                leaves out nothing; on all ranks, or on none.
        """
        was_training = self.retriever.training
        self.retriever.eval()
        with devices.autocast(self.device, self.embedder_precision):
            if queries:
                vectors = self.retriever.embed_queries(*self.inputs.queries(queries)).float()  # (B, D)
            else:
                vectors = torch.zeros(0, self.retriever.dim, device=self.device)
        wanted = max(k, self.rerank)
        hits = self.index.search(vectors, wanted if exclude is None else wanted * self.overretrieve)
        found = Found(self.index.passages_of(hits.ids), hits.ids, hits.scores)
        if queries:
            own = _own_passages(found.passages, exclude or [None] * len(queries))  # (B, n)
            order = own.int().argsort(dim=1, stable=True)[:, :wanted]  # what is to be left out comes last
            found, own = found.select(order), own.gather(1, order)
            if self.rerank:
                found = found._replace(scores=self._fresh_scores(vectors, found))
                to_sort = found.scores.masked_fill(own.to(self.device), -torch.inf)
                order = to_sort.argsort(dim=1, descending=True, stable=True)[:, :k].cpu()
                found, own = found.select(order), own.gather(1, order)
            self._tell_of(own)
        self.retriever.train(was_training)
        return found

    def _tell_of(self, own: torch.Tensor) -> None:
        """Say once if passages that were to be left out are among those found, (B, k) bool."""
        if not self._told and own.any():
            self._told = True
            log.warning(
                "Fewer than %d passages were found besides an example's own, so its own is read as well, after them: "
                "raise --filtering_overretrieve_ratio (it is %d), if the %d passages of the corpus allow it",
                own.shape[1],
                self.overretrieve,
                len(self.passages),
            )

    def _fresh_scores(self, queries: torch.Tensor, found: Found) -> torch.Tensor:
        """Scores by the current passage encoder, (B, K)."""
        tokens = self.inputs.passage_tokens([passage for of_query in found.passages for passage in of_query])
        vectors = torch.zeros(len(tokens), self.retriever.dim, device=self.device)
        for rows in batches_by_length([len(row) for row in tokens], self.max_tokens):
            vectors[torch.tensor(rows, device=self.device)] = self._embed_batch([tokens[row] for row in rows]).float()
        return torch.einsum("bd,bkd->bk", queries, vectors.view(len(queries), -1, vectors.shape[-1]))


def _own_passages(passages: list[list[dict[str, Any]]], ids: Sequence[str | int | None]) -> torch.Tensor:
    """Which passages have the id that goes with their query, (B, n) bool. A number equals its digits."""
    return torch.tensor(
        [
            [identifier is not None and str(passage["id"]) == str(identifier) for passage in of_query]
            for of_query, identifier in zip(passages, ids, strict=True)
        ]
    )
