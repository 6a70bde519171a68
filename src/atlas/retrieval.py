"""The text half: embed the corpus, search it for queries, return passages. No gradient anywhere."""

import contextlib
import copy
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from atlas import config
from atlas.checkpoint import Checkpoint, check_tensors
from atlas.files.jsonl import BadLine, JsonlCorpus
from atlas.index.arrays import FP16, Layout
from atlas.index.build import IndexBuilder
from atlas.index.codec import Compression
from atlas.index.directory import locked
from atlas.index.journal import EmbeddingJournal, open_journal
from atlas.index.passages import check_passages, count_duplicates, fingerprint_of, open_passages
from atlas.index.sharded import ShardedIndex
from atlas.index.store import open_index, save_index
from atlas.model.inputs import Inputs
from atlas.model.load import Model
from atlas.model.retriever import Contriever, DualEncoder, fingerprint
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.bad_lines import bad_lines_file, report_bad_lines
from atlas.runtime.session import Session, Stopped
from atlas.runtime.tracking import log, progress_bar, read_shares

WINDOW = 4096  # consecutive passages that are sorted by length together, and tokenized by one process at a time
MOST_WAITING = 2  # windows that are embedded and not yet stored
Embedder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (n, L), mask (n, L) -> embeddings (n, D) fp32


class Found(NamedTuple):
    """The passages found for B queries."""

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


class _Window(NamedTuple):
    """Padded batches of the passages of a window, one after the other, so that all go to the device in one copy."""

    shapes: list[tuple[int, int]]  # (n, L) of each batch
    ids: np.ndarray  # int32, the n·L token ids of each batch
    lengths: np.ndarray  # int32, tokens of each passage
    places: np.ndarray  # int64, where in the window each passage is


class _Windows(Dataset):
    """Tokenized passages, window by window.

    Args:
        done: which rows need no window, (n,) bool; a window is left out if all of it is done.
    """

    def __init__(self, passages: JsonlCorpus, rows: range, inputs: Inputs, max_tokens: int, done: np.ndarray) -> None:
        self.passages, self.rows, self.inputs, self.max_tokens = passages, rows, inputs, max_tokens
        self.size = WINDOW  # goes with the object to the processes that read it
        self.starts = [start for start in range(0, len(rows), WINDOW) if not done[start : start + WINDOW].all()]
        self.passages_left = sum(min(WINDOW, len(rows) - start) for start in self.starts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> _Window:
        rows = self.rows[self.starts[i] : self.starts[i] + self.size]
        tokens = self.inputs.passage_tokens(self.passages[rows.start : rows.stop])
        lengths = np.array([len(row) for row in tokens], np.int32)
        batches = list(batches_by_length(lengths.tolist(), self.max_tokens))
        padded = [self.inputs.pad_passages([tokens[place] for place in batch])[0].int().numpy() for batch in batches]
        places = np.concatenate(batches)
        return _Window(
            [ids.shape for ids in padded], np.concatenate([ids.ravel() for ids in padded]), lengths[places], places
        )


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
    """Finds passages for queries in an index that it builds and refreshes.

    Args:
        model: its retriever embeds; the reader is not used.
        passages: the whole corpus; this rank embeds and searches its share of the rows.
        run: precision and batch size of the encoder outside training.
        learning: reranking, over-retrieval, and whether the passage encoder changes after an index is built.
        index: a saved index that was opened; without one, `refresh` builds it.
        resumed_encoder: weights of the passage encoder that the index of a resumed run was built with.
    """

    def __init__(
        self,
        model: Model,
        passages: JsonlCorpus,
        settings: config.Index,
        run: config.Run,
        learning: config.RetrieverTraining,
        device: torch.device,
        index: ShardedIndex | None = None,
        resumed_encoder: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.retriever, self.inputs, self.passages = model.retriever, model.inputs, passages
        self.settings, self.device, self.index = settings, device, index
        self.embedder_precision = devices.embedder_precision(device, run.embedder_precision)
        batch_size = run.per_gpu_embedder_batch_size
        self.max_tokens = devices.embedding_tokens(device, batch_size, self.inputs.retriever_maxlength)
        self.rerank = learning.n_to_rerank_with_retrieve_with_rerank if learning.retrieve_with_rerank else 0
        self.overretrieve = learning.filtering_overretrieve_ratio
        self.compression = compression_of(settings, run.seed)
        # Weights of the passage encoder that built the index. They are kept only where the encoder moves on after that.
        self.built_by: dict[str, torch.Tensor] | None = None
        # Something is trained, and it is the passage encoder.
        self._keeps_encoder = _learns(self.retriever)
        self._resumed_encoder = resumed_encoder
        self._warned_of_own_passages = False
        self._before_saving: Callable[[], object] = lambda: None

    @classmethod
    def open(
        cls,
        settings: config.Index,
        run: config.Run,
        learning: config.RetrieverTraining,
        model: Model,
        session: Session,
        resumed: Checkpoint | None = None,
    ) -> Self | None:
        """Open the saved index, or the corpus that an index is to be built of; None without a retriever. Collective.

        Args:
            session: says on which device, in which directory a published index is converted, and what is verified.
            resumed: the checkpoint of this run that training continues from.

        Raises:
            ValueError: no such index can be made or opened, a bad line of the corpus, or no passage in it.
        """
        if model.retriever is None:
            return None
        device, compression = session.device, compression_of(settings, run.seed)
        kind = compression.factory(1, model.retriever.dim)  # refuses what cannot be made before anything is embedded
        index = None
        if settings.save_index_path is not None:
            session.hold(partial(locked, Path(settings.save_index_path)))
        if settings.load_index_path is not None:
            index = open_index(
                Path(settings.load_index_path),
                device=device,
                dimension=model.retriever.dim,
                retriever_fingerprint=fingerprint(model.retriever.passage_encoder),
                # The encoder of a resumed run has learned since, and its index is as old as it was before the stop.
                allow_other=settings.allow_other_index or (resumed is not None and _learns(model.retriever)),
                embedder_precision=devices.embedder_precision(device, run.embedder_precision),
                converted=session.directory and session.directory / "index",
                compression=compression,
                verification=session.verification,
            )
            kind = index.type
            log.info("Opened the index %s: %d passages", settings.load_index_path, len(index.passages))
        _check_against_kind(settings, kind)
        passages = index.passages if index is not None else open_corpus(settings, bad_lines_file(run, "passages"))
        compression.factory(len(passages), model.retriever.dim)  # the same for their number
        encoder = resumed.index_encoder() if resumed is not None else None
        if encoder is not None:
            check_tensors(resumed.file("index_encoder"), encoder, model.retriever.passage_encoder.state_dict())
        retrieval = cls(model, passages, settings, run, learning, device, index, encoder)
        retrieval._before_saving = session.verification.finish
        retrieval._save_opened()
        return retrieval

    def refresh(self, due: bool = False, asked_to_stop: Callable[[], bool] | None = None) -> None:
        """Build an index if there is none, or if a new one with the current encoder is `due`. Collective.

        A resumed run first builds the index that the stopped run had, with the encoder of that time.

        Raises:
            Stopped: as `build`.
        """
        encoder, self._resumed_encoder = self._resumed_encoder, None
        if encoder is not None and not due:
            own = {name: tensor.clone() for name, tensor in self.retriever.passage_encoder.state_dict().items()}
            self.retriever.passage_encoder.load_state_dict(encoder)
            try:
                self.build(asked_to_stop)
            finally:
                self.retriever.passage_encoder.load_state_dict(own)
        elif self.index is None or due:
            self.build(asked_to_stop)

    @torch.no_grad()
    def build(self, asked_to_stop: Callable[[], bool] | None = None) -> None:
        """Embed the corpus with the current encoder into a new index, and save it if that is asked for. Collective.

        Args:
            asked_to_stop: whether this rank is to stop; asked after every batch. One that was asked waits for the
                others, which embed their shares unless they were asked as well.

        Raises:
            Stopped: on every rank, if one was asked to stop; there is no index then.
        """
        saves_embeddings = self.settings.save_index_path is not None and not self.settings.save_index_codes_only
        builder = IndexBuilder(
            self.passages,
            self.retriever.dim,
            self.compression,
            self.device,
            previous=self.index,
            keep_embeddings=saves_embeddings,
            retrain=self.settings.faiss_retrain,
        )
        self.index = None  # the builder keeps what it needs of the previous one
        was_training = self.retriever.training
        self.retriever.eval()
        encoder = fingerprint(self.retriever.passage_encoder) if self.settings.save_index_path is not None else None
        with self._journal(encoder) if saves_embeddings else contextlib.nullcontext() as journal:
            self._embed_share(builder, journal, asked_to_stop)
        self.retriever.train(was_training)
        self.index = builder.finish()
        if self._keeps_encoder:
            state = self.retriever.passage_encoder.state_dict()
            self.built_by = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        if self.settings.save_index_path is not None:
            self._save(encoder, self.embedder_precision)
        if self.index.compressed and self.compression.refine_factor == 1:
            self.index.drop_embeddings()

    def _journal(self, encoder: str) -> AbstractContextManager[EmbeddingJournal]:
        """Takes the embeddings by the encoder of this fingerprint, where the index is to be saved. Collective."""
        n = len(self.passages)
        some = self.passages[sorted({i * (n - 1) // 99 for i in range(100)})]  # as tokens: formats and vocabulary
        facts = (
            encoder,
            self.embedder_precision,
            fingerprint_of(self.passages),
            self.inputs.passage_tokens(some),
        )
        identity = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return open_journal(Path(self.settings.save_index_path), identity, Layout(n, self.retriever.dim, FP16))

    def _embed_share(
        self, builder: IndexBuilder, journal: EmbeddingJournal | None, asked_to_stop: Callable[[], bool] | None
    ) -> None:
        """Embed this rank's share of the corpus; an error or a stop of one rank is one of all. Collective."""
        error, stopped, rows = None, False, builder.rows

        def store(start: int, embeddings: torch.Tensor) -> None:
            builder.add(start, embeddings)
            if journal is not None:
                journal.add(rows.start + start, embeddings)

        try:
            done = journal.restore(rows, builder.add) if journal is not None else np.zeros(len(rows), bool)
            embed = passage_embedder(self.retriever.passage_encoder, self.device, self.embedder_precision)
            self._embed_rows(rows, embed, store, asked_to_stop or (lambda: False), done)
        except (ValueError, OSError) as failed:  # not finite; no space
            error = failed
        except Stopped:
            stopped = True
        distributed.wait_for_all("embedding the corpus")
        distributed.raise_on_all_ranks(error)
        if distributed.any_rank(stopped or (asked_to_stop is not None and asked_to_stop())):
            raise Stopped

    def _save(self, retriever_fingerprint: str | None, embedder_precision: str | None) -> None:
        self._before_saving()
        save_index(
            Path(self.settings.save_index_path),
            self.index,
            retriever_fingerprint=retriever_fingerprint,
            embedder_precision=embedder_precision,
            codes_only=self.settings.save_index_codes_only,
        )

    def _save_opened(self) -> None:
        """Save an opened index only if it is of another kind than the one that was loaded."""
        if self.settings.save_index_path is None or self.index is None:
            return
        if self.index.type != self.index.stored.description.type:
            description = self.index.stored.description
            self._save(description.retriever, description.embedder_precision)
            log.info("Saved the index %s, of type %s", self.settings.save_index_path, self.index.type)
        else:
            log.info("--save_index_path: a loaded index is saved only when it is built again")

    def _embed_rows(
        self,
        rows: range,
        embed: Embedder,
        store: Callable[[int, torch.Tensor], None],
        asked_to_stop: Callable[[], bool],
        done: np.ndarray,
    ) -> None:
        """Give the rows' embeddings to `store`, window by window: `store(first row of the window, (n, D) fp16)`.

        Windows of which all rows are `done`, (n,) bool, are left out. Ranks may have different numbers of batches:
        nothing here waits for another rank.

        Raises:
            Stopped: this rank was asked to stop.
        """
        windows = _Windows(self.passages, rows, self.inputs, self.max_tokens, done)
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
        left = windows.passages_left
        there = f", {len(rows) - left} are there" if left < len(rows) else ""
        log.info("Embedding %d passages%s%s", left, share, there)
        started = time.monotonic()
        stored: deque[Future] = deque()

        def embedded(passages: int) -> None:
            bar.update(passages)
            if asked_to_stop():
                raise Stopped

        # Another thread stores, because encoding a window can take as long as embedding the next one.
        with progress_bar("embedding", left, "passages") as bar, ThreadPoolExecutor(1) as thread:
            for start, window in zip(windows.starts, loader, strict=True):
                embeddings = self._embed_window(window, embed, embedded)
                stored.append(thread.submit(store, start, embeddings))
                if len(stored) > MOST_WAITING:
                    stored.popleft().result()
            for last in stored:
                last.result()
        devices.synchronize(self.device)
        seconds = time.monotonic() - started
        log.info("Embedded %d passages%s in %.1f s: %.0f a second", left, share, seconds, left / seconds)

    def _embed_window(self, window: _Window, embed: Embedder, embedded: Callable[[int], object]) -> torch.Tensor:
        """Embeddings of a window's passages in their order, (n, D) fp16. Does not wait for the device."""
        ids, lengths, places = (
            devices.move(torch.from_numpy(array), self.device) for array in (window.ids, window.lengths, window.places)
        )
        parts = []
        batches = zip(
            window.shapes,
            ids.split([n * longest for n, longest in window.shapes]),
            lengths.split([n for n, _ in window.shapes]),
            strict=True,
        )
        for (n, longest), of_batch, tokens in batches:
            mask = torch.arange(longest, device=self.device) < tokens[:, None]  # (n, L)
            parts.append(embed(of_batch.view(n, longest), mask).to(torch.float16))
            embedded(n)
        embeddings = torch.empty(len(places), self.retriever.dim, dtype=torch.float16, device=self.device)
        return embeddings.index_copy_(0, places, torch.cat(parts))

    @torch.no_grad()
    def search(self, queries: list[str], k: int, exclude: Sequence[str | int | None] | None = None) -> Found:
        """The best k passages (all, if there are fewer) of each query. Collective; a rank may have no query.

        Args:
            queries: formatted by the task.
            exclude: for each query the `id` of passages to exclude, as long as k others are found. None excludes
                nothing; it must be None on all ranks or on none.
        """
        was_training = self.retriever.training
        self.retriever.eval()
        found = self.find(self.embed(queries), k, exclude)
        self.retriever.train(was_training)
        return found

    @torch.no_grad()
    def embed(self, queries: list[str]) -> torch.Tensor:
        """The embeddings of B queries, (B, D) fp32, by the retriever in the mode that it is in."""
        if not queries:
            return torch.zeros(0, self.retriever.dim, device=self.device)
        with devices.autocast(self.device, self.embedder_precision):
            return self.retriever.embed_queries(*self.inputs.queries(queries)).float()

    @torch.no_grad()
    def find(self, vectors: torch.Tensor, k: int, exclude: Sequence[str | int | None] | None = None) -> Found:
        """As `search`, for queries that are embedded already, (B, D)."""
        wanted = max(k, self.rerank)
        hits = self.index.search(vectors, wanted if exclude is None else wanted * self.overretrieve)
        found = Found(self.index.passages_of(hits.ids), hits.ids, hits.scores)
        if len(vectors):
            own = _own_passages(found.passages, exclude or [None] * len(vectors))  # (B, n)
            order = own.int().argsort(dim=1, stable=True)[:, :wanted]  # what is to be left out comes last
            found, own = found.select(order), own.gather(1, order)
            if self.rerank:
                found = found._replace(scores=self._fresh_scores(vectors, found))
                to_sort = found.scores.masked_fill(own.to(self.device), -torch.inf)
                order = to_sort.argsort(dim=1, descending=True, stable=True)[:, :k].cpu()
                found, own = found.select(order), own.gather(1, order)
            self._warn_of_own_passages(own)
        return found

    def _warn_of_own_passages(self, own: torch.Tensor) -> None:
        """Warn once if passages that were to be excluded are among those found, (B, k) bool."""
        if not self._warned_of_own_passages and own.any():
            self._warned_of_own_passages = True
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
            batch = self.inputs.pad_passages([tokens[row] for row in rows])
            ids, mask, places = (devices.move(tensor, self.device) for tensor in (*batch, torch.tensor(rows)))
            with devices.autocast(self.device, self.embedder_precision):
                vectors.index_copy_(0, places, self.retriever.embed_passages(ids, mask).float())
        return torch.einsum("bd,bkd->bk", queries, vectors.view(len(queries), -1, vectors.shape[-1]))


def passage_embedder(encoder: Contriever, device: torch.device, precision: str) -> Embedder:
    """Embeds passages in this precision, with the weights that the encoder has now.

    In fp16 a copy of the encoder does it, whose weights and hidden states are fp16: nothing is converted on the way,
    and its errors are about those that rounding the embeddings to fp16 makes. In bf16 they would be several times as
    large, so the hidden states stay fp32 there.
    """
    if precision == "fp16":
        return copy.deepcopy(encoder).requires_grad_(False).half()
    return partial(_embed_by_autocast, encoder, device, precision)


def _embed_by_autocast(
    encoder: Contriever, device: torch.device, precision: str, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    with devices.autocast(device, precision):
        return encoder(ids, mask)


def _own_passages(passages: list[list[dict[str, Any]]], ids: Sequence[str | int | None]) -> torch.Tensor:
    """Which passages have the id that goes with their query, (B, n) bool. A number equals its digits."""
    return torch.tensor(
        [
            [identifier is not None and str(passage["id"]) == str(identifier) for passage in of_query]
            for of_query, identifier in zip(passages, ids, strict=True)
        ]
    )


def _learns(retriever: DualEncoder) -> bool:
    """Whether the passage encoder is trained."""
    return any(parameter.requires_grad for parameter in retriever.passage_encoder.parameters())


def compression_of(settings: config.Index, seed: int) -> Compression:
    """The kind of index that the flags ask for; without --index_mode faiss an index is opened as whatever it is."""
    return Compression(
        kind=settings.faiss_index_type if settings.index_mode == "faiss" else None,
        code_size=settings.faiss_code_size,
        nlist=settings.faiss_nlist,
        nprobe=settings.faiss_nprobe,
        train_size=settings.faiss_train_size,
        seed=seed,
        refine_factor=settings.refine_factor,
    )


def open_corpus(settings: config.Index, bad_lines: Path | None = None) -> JsonlCorpus:
    """The passages of `--passages`, every line of which has been read once: each rank reads its share. Collective.

    Args:
        bad_lines: leave out lines that are no passage, and write them to this file.

    Raises:
        DataError: a line that is no passage.
        ValueError: there is no passage.
    """
    paths = settings.passages
    with distributed.main_first(f"opening {', '.join(paths)}"):
        passages = open_passages(paths, settings.max_passages)
    if len(passages) == 0:
        raise ValueError(f"--passages {' '.join(paths)}: there is no passage in it")
    bad: list[BadLine] | None = None if bad_lines is None else []
    check = partial(check_passages, passages, bad=bad)
    hashes = read_shares("reading the corpus", len(passages), "passages", check)
    if bad is not None and (rows := report_bad_lines(passages, bad, bad_lines)):
        passages.drop(rows)
        if len(passages) == 0:
            raise ValueError(f"--passages {' '.join(paths)}: no passage is left, all lines are bad; see {bad_lines}")
    if of_ranks := distributed.gather_on_main(hashes):
        duplicates = count_duplicates(np.concatenate(of_ranks))
        if duplicates:
            log.warning("%d passages have an id that an earlier passage has", duplicates)
    return passages


def _check_against_kind(settings: config.Index, kind: str) -> None:
    """Report flags that have no effect on this kind of index. Raises: ValueError for one that cannot be met."""
    if settings.refine_factor > 1 and kind == "flat":
        log.info("--refine_factor has no effect: the search of a flat index is exact")
    if settings.faiss_nprobe is not None and "IVF" not in kind:
        log.info("--faiss_nprobe has no effect: an index of type %s has no lists", kind)
    if settings.save_index_codes_only and settings.save_index_path is not None and kind == "flat":
        raise ValueError(
            "--save_index_codes_only: a flat index has no codes; ask for --index_mode faiss, or leave it out"
        )
