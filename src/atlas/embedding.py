"""From the passages of a corpus to their embeddings: every rank its share, window by window, tokenized beside it."""

import contextlib
import copy
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from atlas.files.jsonl import JsonlCorpus
from atlas.files.tokens import TokenCache, TokenWriter
from atlas.index.arrays import FP16, Layout
from atlas.index.journal import EmbeddingJournal, open_journal
from atlas.index.passages import fingerprint_of, titles_joined
from atlas.model.inputs import Inputs
from atlas.model.pretrained import evaluating
from atlas.model.retriever import Contriever, DualEncoder, fingerprint
from atlas.model.tokenization import LIBRARY
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.session import Stopped
from atlas.runtime.tracking import log, progress_bar

WINDOW = 4096  # consecutive passages that are sorted by length together, and tokenized by one process at a time
MOST_WAITING = 2  # windows that are embedded and not yet stored
MINUTES = 30_000  # passages that take a CPU minutes
Embedder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (n, L), mask (n, L) -> embeddings (n, D) fp32
Store = Callable[[int, torch.Tensor], None]  # place of the first row in this rank's share, embeddings (n, D) fp16


def never() -> bool:
    """Nobody asks to stop."""
    return False


class Window(NamedTuple):
    """Padded batches of the passages of a window, one after the other, so that all go to the device in one copy."""

    shapes: list[tuple[int, int]]  # (n, L) of each batch
    ids: np.ndarray  # int32, the n·L token ids of each batch
    lengths: np.ndarray  # int32, tokens of each passage
    places: np.ndarray  # int64, where in the window each passage is
    cached: bool  # whether the token ids were read

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each passage, and the token ids of all, one after the other, in the order of the corpus."""
        widths = np.concatenate([np.full(n, longest) for n, longest in self.shapes])  # of the padded rows
        order = np.argsort(self.places)
        lengths, starts = self.lengths[order], (np.cumsum(widths) - widths)[order]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return lengths, self.ids[np.repeat(starts, lengths) + within]


class Windows(Dataset):
    """Tokenized passages, window by window.

    Args:
        done: which rows need no window, (n,) bool, by default none; a window is left out if all of it is done.
        cache: of token ids; what is not there is tokenized.
    """

    def __init__(
        self,
        passages: Sequence[dict],
        rows: range,
        inputs: Inputs,
        max_tokens: int,
        done: np.ndarray | None = None,
        cache: TokenCache | None = None,
    ) -> None:
        done = np.zeros(len(rows), bool) if done is None else done
        self.passages, self.rows, self.inputs, self.max_tokens = passages, rows, inputs, max_tokens
        self.cache = cache
        # They end at multiples of WINDOW of the whole corpus, where the blocks that a quantizer encodes end as well.
        cuts = [0, *range(WINDOW - rows.start % WINDOW, len(rows), WINDOW), len(rows)]
        self.spans = [(start, end) for start, end in pairwise(cuts) if not done[start:end].all()]
        self.passages_left = sum(end - start for start, end in self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> Window:
        rows = self.rows[slice(*self.spans[i])]
        kept = self.cache.read(rows) if self.cache is not None else None
        tokens = self.inputs.passage_tokens(self.passages[rows.start : rows.stop]) if kept is None else kept
        lengths = np.array([len(row) for row in tokens], np.int32)
        batches = list(batches_by_length(lengths.tolist(), self.max_tokens))
        padded = [self.inputs.pad_passages([tokens[place] for place in batch])[0].int().numpy() for batch in batches]
        places = np.concatenate(batches)
        ids = np.concatenate([ids.ravel() for ids in padded])
        return Window([ids.shape for ids in padded], ids, lengths[places], places, kept is not None)

    def read_ahead(self) -> DataLoader:
        """All windows in their order, made by other processes where there are cores for them."""
        processes = devices.tokenizer_processes(distributed.cores()) if len(self) > 1 else 0
        return DataLoader(
            self,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=processes,
            worker_init_fn=devices.single_threaded_worker if processes else None,
            prefetch_factor=2 if processes else None,
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


class CorpusEmbedder:
    """Embeds passages with the passage encoder of a retriever, with the weights that it has at that time.

    Attributes:
        precision: that the encoder computes in.
        max_tokens: of a batch, with padding.
    """

    def __init__(
        self,
        retriever: DualEncoder,
        inputs: Inputs,
        device: torch.device,
        precision: str,
        batch_size: int,
        cache_tokens: str = "off",
    ) -> None:
        """`precision` and `batch_size` are the values of the flags that name them.

        cache_tokens: "read" those that are kept beside the corpus; "keep" them there as well; "off": neither.
        """
        self.retriever, self.inputs, self.device, self.cache_tokens = retriever, inputs, device, cache_tokens
        self.precision = devices.embedder_precision(device, precision)
        self.max_tokens = devices.embedding_tokens(device, batch_size, inputs.retriever_maxlength)
        self._filling = 0  # passages of the rows that are embedded which are as long as the retriever takes them

    def fingerprint(self) -> str:
        """Of the passage encoder as it is now."""
        return fingerprint(self.retriever.passage_encoder)

    def identity(self, passages: JsonlCorpus, encoder: str) -> str:
        """Changes with everything that determines the embeddings; `encoder` is the encoder's fingerprint."""
        reading = self.inputs.passage_reading(), LIBRARY, titles_joined(passages)
        sample = self._sample(passages)  # another version of this program may read passages in another way
        return _hash(encoder, self.precision, fingerprint_of(passages), reading, sample)

    def journal(
        self, directory: Path, passages: JsonlCorpus, identity: str
    ) -> AbstractContextManager[EmbeddingJournal]:
        """Takes the embeddings where an index is to be saved. Collective."""
        return open_journal(directory, identity, Layout(len(passages), self.retriever.dim, FP16))

    def _sample(self, passages: JsonlCorpus) -> list[list[int]]:
        """The token ids of up to a hundred passages from all over the corpus."""
        last = len(passages) - 1
        return self.inputs.passage_tokens(passages[sorted({i * last // 99 for i in range(100)})])

    def _open_tokens(self, passages: JsonlCorpus, rows: range) -> tuple[TokenCache | None, TokenWriter | None]:
        """What is kept of the corpus's token ids, and where those of this rank's rows are added, as far as is asked."""
        if self.cache_tokens == "off":
            return None, None
        sample = self._sample(passages)  # another version of this program may read passages in another way
        try:
            content = _hash(fingerprint_of(passages), titles_joined(passages), LIBRARY, sample)
        except OSError as error:  # a file was removed while it is mapped
            self._keep_no_more(str(error))
            return None, None
        files = [path.name for path in passages.sources]
        reading = _hash(files, passages.max_rows, self.inputs.passage_reading())
        cache = TokenCache(passages.sources[0], content, reading, len(self.inputs.retriever_tokenizer))
        if self.cache_tokens == "read":
            return cache, None
        mean = sum(map(len, sample)) / len(sample)
        return cache, cache.writer(rows, corpus_rows=len(passages), mean_tokens=mean)

    def _keep_no_more(self, reason: str) -> None:
        if self.cache_tokens == "keep":
            self.cache_tokens = "read"
            log.warning("The token ids of the passages are not kept, so every refresh makes them again: %s", reason)

    def embed_share(
        self,
        passages: JsonlCorpus,
        rows: range,
        store: Store,
        journal: EmbeddingJournal | None = None,
        asked_to_stop: Callable[[], bool] = never,
    ) -> None:
        """Give the embeddings of this rank's rows of the corpus to `store`, and to the journal. Collective.

        What the journal has already is stored without being made again.

        Args:
            asked_to_stop: whether this rank is to stop; asked after every batch. One that was asked waits for the
                others, which embed their shares unless they were asked as well.

        Raises:
            Stopped: on every rank, if one was asked to stop.
            ValueError, OSError: on every rank, if `store` or the journal raises it on one.
        """
        error, stopped = None, False

        def store_and_note(start: int, embeddings: torch.Tensor) -> None:
            store(start, embeddings)
            if journal is not None:
                journal.add(rows.start + start, embeddings)

        try:
            done = journal.restore(rows, store) if journal else None
            with evaluating(self.retriever):
                self.embed_rows(passages, rows, store_and_note, asked_to_stop, done)
        except (ValueError, OSError) as failed:  # not finite; no space
            error = failed
        except Stopped:
            stopped = True
        distributed.wait_for_all("embedding the corpus")
        distributed.raise_on_all_ranks(error)
        if distributed.any_rank(stopped or asked_to_stop()):
            raise Stopped

    @torch.no_grad()
    def embed_rows(
        self,
        passages: JsonlCorpus,
        rows: range,
        store: Store,
        asked_to_stop: Callable[[], bool] = never,
        done: np.ndarray | None = None,
    ) -> None:
        """Give the rows' embeddings to `store`, window by window.

        Windows of which all rows are `done`, (n,) bool, are left out. Ranks may have different numbers of batches:
        nothing here waits for another rank.

        Raises:
            Stopped: this rank was asked to stop.
        """
        cache, writer = self._open_tokens(passages, rows)
        windows = Windows(passages, rows, self.inputs, self.max_tokens, done, cache)
        left = windows.passages_left
        self._say_what_is_left(len(rows), left, cache.missing(rows) if cache else len(rows))
        started = time.monotonic()
        embed = passage_embedder(self.retriever.passage_encoder, self.device, self.precision)
        stored: deque[Future] = deque()

        def embedded(passages: int) -> None:
            bar.update(passages)
            if asked_to_stop():
                raise Stopped

        def keep(start: int, embeddings: torch.Tensor, window: Window) -> None:
            store(start, embeddings)
            if writer is not None and not window.cached:
                writer.add(rows.start + start, *window.tokens())

        # Another thread stores, because encoding a window can take as long as embedding the next one.
        with (
            progress_bar("embedding", left, "passages") as bar,
            writer or contextlib.nullcontext(),
            ThreadPoolExecutor(1) as thread,
        ):
            for (start, _), window in zip(windows.spans, windows.read_ahead(), strict=True):
                embeddings = self._embed_window(window, embed, embedded)
                stored.append(thread.submit(keep, start, embeddings, window))
                if len(stored) > MOST_WAITING:
                    stored.popleft().result()
            for last in stored:
                last.result()
        devices.synchronize(self.device)
        self._report(left, time.monotonic() - started, writer)

    @torch.no_grad()
    def embed(self, passages: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The embeddings of a few passages, (n, D) fp16 on the CPU."""
        windows = Windows(passages, range(len(passages)), self.inputs, self.max_tokens)
        embed = passage_embedder(self.retriever.passage_encoder, self.device, self.precision)
        with evaluating(self.retriever):
            parts = [self._embed_window(windows[i], embed, lambda _: None).cpu() for i in range(len(windows))]
        return torch.cat(parts)

    def _say_what_is_left(self, rows: int, left: int, untokenized: int) -> None:
        self._filling = 0
        there = f", {rows - left} are there" if left < rows else ""
        kept = f", {rows - untokenized} are kept as token ids" if untokenized < rows else ""
        log.info("Embedding %d passages%s%s%s", left, _share(), there, kept)
        if left >= MINUTES and self.precision == "fp32" and devices.cpu_prefers_bf16(self.device):
            log.info("--embedder_precision bf16 would take little more than half of the time on this CPU")

    def _report(self, passages: int, seconds: float, writer: TokenWriter | None) -> None:
        """Say how long it took, and where token ids were written, or why they were not."""
        log.info("Embedded %d passages%s in %.1f s: %.0f a second", passages, _share(), seconds, passages / seconds)
        if self._filling:
            share, most = 100 * self._filling / passages, self.inputs.retriever_maxlength
            log.info("%.2g %% of them fill the %d tokens of --text_maxlength: what is behind is cut", share, most)
        if writer is not None and writer.failure is not None:
            self._keep_no_more(writer.failure)
        elif writer is not None and writer.path is not None:
            log.info("Token ids are kept for the next time in %s (%.1f MB)", writer.path, writer.size / 1e6)

    def _embed_window(self, window: Window, embed: Embedder, embedded: Callable[[int], object]) -> torch.Tensor:
        """Embeddings of a window's passages in their order, (n, D) fp16. Does not wait for the device."""
        self._filling += int((window.lengths >= self.inputs.retriever_maxlength).sum())
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


def _share() -> str:
    return f" on each of {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""


def _hash(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
