"""The text half: embed the corpus, search it for queries, return passages. No gradient anywhere."""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from atlas import config
from atlas.checkpoint import Checkpoint, check_tensors
from atlas.embedding import CorpusEmbedder, batches_by_length, never
from atlas.files.jsonl import CACHE_FROM, BadLine, JsonlCorpus
from atlas.index.bm25 import FUSED, WordIndex, fuse, open_word_index
from atlas.index.build import IndexBuilder
from atlas.index.codec import Codec, Compression
from atlas.index.directory import has_index, locked, read_description
from atlas.index.passages import check_passages, count_duplicates, hash_id, open_passages
from atlas.index.sharded import Hits, ShardedIndex, look_up
from atlas.index.store import open_index, passages_of, restore_embeddings, save_index
from atlas.model.inputs import Inputs
from atlas.model.load import Model
from atlas.model.pretrained import evaluating
from atlas.model.retriever import DualEncoder, fingerprint
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.bad_lines import bad_lines_file, report_bad_lines
from atlas.runtime.reporting import Reports
from atlas.runtime.session import Session
from atlas.runtime.tracking import log, read_shares


class Found(NamedTuple):
    """The passages found for B queries."""

    passages: list[list[dict[str, Any]]]  # B lists of K, best first
    ids: torch.Tensor  # (B, K) rows of the index
    scores: torch.Tensor  # (B, K)
    own: torch.Tensor  # (B, K) bool, on the CPU: those that were to be left out, and come last

    def select(self, order: torch.Tensor) -> "Found":
        """Of each query the passages at these places, in this order: (B, k) int64."""
        passages = [
            [of_query[i] for i in of_order] for of_query, of_order in zip(self.passages, order.tolist(), strict=True)
        ]
        here = order.to(self.ids.device)
        return Found(passages, self.ids.gather(1, here), self.scores.gather(1, here), self.own.gather(1, order.cpu()))

    def names(self, exclude: Sequence[str | int | None] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hashes of ids: of the passages, (B, K), and of those that are a query's own, (B, K + 1): found, or excluded.

        Args:
            exclude: as for `search`.
        """
        found = [[hash_id(str(passage["id"])) for passage in of_query] for of_query in self.passages]
        out = [None if one is None else hash_id(str(one)) for one in exclude or [None] * len(found)]
        own = [[*row, row[0] if one is None else one] for row, one in zip(found, out, strict=True)]
        return torch.tensor(found), torch.tensor(own)

    def sorted_by(self, scores: torch.Tensor, k: int) -> "Found":
        """The best k passages by other scores, (B, n), of the first n; what was to be left out still comes last."""
        n = scores.shape[1]
        order = scores.masked_fill(self.own[:, :n].to(scores.device), -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        rest = torch.arange(n, self.ids.shape[1], device=order.device).expand(len(order), -1)
        return self.select(torch.cat([order, rest], dim=1)[:, :k])


class Retrieval:
    """Finds passages for queries in an index that it builds and refreshes. Collective where BM25 takes part.

    Args:
        model: its retriever embeds; the reader is not used.
        passages: the whole corpus; this rank embeds and searches its share of the rows.
        run: precision and batch size of the encoder outside training.
        learning: reranking, over-retrieval, and whether the passage encoder changes after an index is built.
        index: a saved index that was opened; without one, `refresh` builds it.
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
    ) -> None:
        self.retriever, self.inputs, self.passages = model.retriever, model.inputs, passages
        self.settings, self.device, self.index = settings, device, index
        self.words = _open_words(settings, passages, model.inputs)
        self.embedder = CorpusEmbedder(
            model.retriever,
            model.inputs,
            device,
            run.embedder_precision,
            run.per_gpu_embedder_batch_size,
            cache_tokens=_use_of_tokens(settings, passages, model.retriever),
        )
        self.rerank = learning.n_to_rerank_with_retrieve_with_rerank if learning.retrieve_with_rerank else 0
        self.overretrieve = learning.filtering_overretrieve_ratio
        self.compression = compression_of(settings, run.seed)
        # Weights of the passage encoder that built the index. They are kept only where the encoder moves on after that.
        self.built_by: dict[str, torch.Tensor] | None = None
        # Likewise the quantizer that later indices are encoded with, by its kind.
        self.quantizer: dict[str, torch.Tensor] | None = None
        # Something is trained, and it is the passage encoder.
        self._keeps_encoder = _learns(self.retriever)
        self._resumed_encoder: dict[str, torch.Tensor] | None = None  # as `built_by`, of the run that was stopped
        self._codec: Codec | None = None
        self._warned_of_own_passages = False
        self._before_saving: Callable[[], object] = lambda: None
        self._reports = Reports(None)

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
        _check_place(settings, passages, model.retriever if index is None and resumed is None else None)
        compression.factory(len(passages), model.retriever.dim)  # the same for their number
        retrieval = cls(model, passages, settings, run, learning, device, index)
        if resumed is not None:
            retrieval._take_over(resumed)
        retrieval._before_saving, retrieval._reports = session.verification.finish, session.reports
        retrieval._save_opened()
        return retrieval

    def refresh(self, due: bool = False, asked_to_stop: Callable[[], bool] = never, *, step: int = 0) -> None:
        """Build an index if there is none, or if a new one with the current encoder is `due`. Collective.

        A resumed run first builds the index that the stopped run had, with the encoder of that time.

        Args:
            asked_to_stop: as in `build`.
            step: the last one that is finished, for the reports.

        Raises:
            Stopped: as `build`.
        """
        encoder, self._resumed_encoder = self._resumed_encoder, None
        started = time.monotonic()
        if encoder is not None and not due:
            own = {name: tensor.clone() for name, tensor in self.retriever.passage_encoder.state_dict().items()}
            self.retriever.passage_encoder.load_state_dict(encoder)
            try:
                self.build(asked_to_stop)
            finally:
                self.retriever.passage_encoder.load_state_dict(own)
        elif self.index is None or due:
            self.build(asked_to_stop)
        else:
            return
        fields = {"seconds": time.monotonic() - started, "passages": len(self.passages)}
        self._reports.record("refresh", step, fields)

    @torch.no_grad()
    def build(self, asked_to_stop: Callable[[], bool] = never) -> None:
        """Embed the corpus with the current encoder into a new index, and save it if that is asked for. Collective.

        Args:
            asked_to_stop: as in `CorpusEmbedder.embed_share`.

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
            codec=None if self.settings.faiss_retrain else self._quantizer,
        )
        self.index = None  # the builder keeps what it needs of the previous one
        place = self.settings.save_index_path and Path(self.settings.save_index_path)
        encoder = self.embedder.fingerprint() if place else None
        identity = self.embedder.identity(self.passages, encoder) if saves_embeddings else None
        restored = None
        if identity:
            restored = restore_embeddings(place, identity, builder.rows, builder.add, asked_to_stop)
        if restored is None:
            journal = self.embedder.journal(place, self.passages, identity) if identity else contextlib.nullcontext()
            with journal as opened:
                self.embedder.embed_share(self.passages, builder.rows, builder.add, opened, asked_to_stop)
        self.index = builder.finish()
        if self._keeps_encoder:
            state = self.retriever.passage_encoder.state_dict()
            self.built_by = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            if self.index.compressed:
                codec = self.index.compressed.codec
                self.quantizer = {codec.factory: torch.frombuffer(bytearray(codec.serialize()), dtype=torch.uint8)}
        if place:
            precision = self.embedder.precision
            self._save(
                retriever_fingerprint=encoder, embedder_precision=precision, identity=identity, restored=restored
            )
        if self.index.compressed and self.compression.refine_factor == 1:
            self.index.drop_embeddings()

    @property
    def _quantizer(self) -> Codec | None:
        """What a new index is encoded with: that of the index before it, or of the run that was stopped."""
        return self.index.compressed.codec if self.index and self.index.compressed else self._codec

    def _take_over(self, resumed: Checkpoint) -> None:
        """What the index of a stopped run was built with: the encoder, and the quantizer if its kind is asked for.

        Raises:
            ValueError: one of them is damaged, or does not fit.
        """
        if (encoder := resumed.index_encoder()) is not None:
            check_tensors(resumed.file("index_encoder"), encoder, self.retriever.passage_encoder.state_dict())
            self._resumed_encoder = encoder
        factory = self.compression.factory(len(self.passages), self.retriever.dim)
        if (content := (resumed.quantizer() or {}).get(factory)) is None:
            return
        try:
            self._codec = Codec.load(content.numpy().tobytes(), factory, self.retriever.dim)
        except ValueError as error:
            raise ValueError(
                f"{resumed.file('quantizer')}: {error}: copy the checkpoint again, or --restart"
            ) from error

    def _save(self, **origin: Any) -> None:
        """`origin`: as for `save_index`."""
        self._before_saving()
        place, codes_only = Path(self.settings.save_index_path), self.settings.save_index_codes_only
        save_index(place, self.index, codes_only=codes_only, **origin)
        self.passages = self.index.passages

    def _save_opened(self) -> None:
        """Save an opened index only if it is of another kind than the one that was loaded."""
        if self.settings.save_index_path is None or self.index is None:
            return
        if self.index.type != self.index.stored.description.type:
            description = self.index.stored.description
            self._save(retriever_fingerprint=description.retriever, embedder_precision=description.embedder_precision)
            log.info("Saved the index %s, of type %s", self.settings.save_index_path, self.index.type)
        else:
            log.info("--save_index_path: a loaded index is saved only when it is built again")

    @torch.no_grad()
    def search(
        self,
        queries: list[str],
        k: int,
        exclude: Sequence[str | int | None] | None = None,
        *,
        words: Sequence[str] | None = None,
        step: int | None = None,
        read: int | None = None,
        embedded: Callable[[], object] = lambda: None,
    ) -> Found:
        """The best k passages (all, if there are fewer) of each query. Collective; a rank may have no query.

        Their scores are those by embeddings, unless BM25 alone ranks them: then they are its own.

        Args:
            queries: formatted by the task.
            exclude: for each query the `id` of passages to exclude, as long as k others are found. None excludes
                nothing; it must be None on all ranks or on none.
            words: the text of each query for BM25; by default the query.
            step: of the training, which `--bm25_steps` counts; None in an evaluation.
            read: how many of them will be read; None: all.
            embedded: called once the queries are embedded.
        """
        with evaluating(self.retriever):
            vectors = self.embed(queries) if self.embeds(step) else None
            embedded()
            return self.find(vectors, k, exclude, words=queries if words is None else words, step=step, read=read)

    def embeds(self, step: int | None = None) -> bool:
        """Whether queries are embedded, or BM25 alone ranks the passages."""
        return self.rerank > 0 or self.settings.bm25_weight_at(step) < 1

    @torch.no_grad()
    def embed(self, queries: list[str]) -> torch.Tensor:
        """The embeddings of B queries, (B, D) fp32, by the retriever in the mode that it is in."""
        if not queries:
            return torch.zeros(0, self.retriever.dim, device=self.device)
        with devices.autocast(self.device, self.embedder.precision):
            return self.retriever.embed_queries(*self.inputs.queries(queries)).float()

    @torch.no_grad()
    def find(
        self,
        vectors: torch.Tensor | None,
        k: int,
        exclude: Sequence[str | int | None] | None = None,
        *,
        words: Sequence[str],
        step: int | None = None,
        read: int | None = None,
    ) -> Found:
        """As `search`, for queries that are embedded already, (B, D); None: those that BM25 alone ranks."""
        weight, wanted = self.settings.bm25_weight_at(step), max(k, self.rerank)
        hits = self._search(vectors, words, wanted if exclude is None else wanted * self.overretrieve, weight)
        passages = look_up(self.passages, hits.ids)
        own = _own_passages(passages, exclude or [None] * len(words))
        found = Found(passages, hits.ids, hits.scores, own.view(hits.ids.shape))
        if words:
            found = found.select(found.own.int().argsort(dim=1, stable=True)[:, :wanted])
            if self.rerank or (0 < weight < 1 and not self.index.has_embeddings):
                found = found._replace(scores=self._fresh_scores(vectors, found))
            if self.rerank:
                found = found.sorted_by(found.scores, k)
            self._warn_of_own_passages(found.own[:, :read])
        return found

    def _search(self, vectors: torch.Tensor | None, words: Sequence[str], k: int, weight: float) -> Hits:
        """The best k by embeddings, by words, or by the ranks of both. Collective.

        Fused hits have their scores by the embeddings of the index, and no scores (zeros) where it has none.
        """
        k = min(k, len(self.passages))
        if weight == 0:
            return self.index.search(vectors, k)
        by_words = self.words.search(words, k if weight == 1 else max(k, FUSED))
        if weight == 1:
            return Hits(*(part.to(self.device) for part in by_words))
        ids = fuse(self.index.search(vectors, max(k, FUSED)), by_words, weight, k)
        if not self.index.has_embeddings:
            return Hits(torch.zeros_like(ids, dtype=torch.float32), ids)
        return Hits(self.index.scores_of(vectors, ids), ids)

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
        for rows in batches_by_length([len(row) for row in tokens], self.embedder.max_tokens):
            batch = self.inputs.pad_passages([tokens[row] for row in rows])
            ids, mask, places = (devices.move(tensor, self.device) for tensor in (*batch, torch.tensor(rows)))
            with devices.autocast(self.device, self.embedder.precision):
                vectors.index_copy_(0, places, self.retriever.embed_passages(ids, mask).float())
        return torch.einsum("bd,bkd->bk", queries, vectors.view(len(queries), -1, vectors.shape[-1]))


def _own_passages(passages: list[list[dict[str, Any]]], ids: Sequence[str | int | None]) -> torch.Tensor:
    """Which passages have the id that goes with their query, (B, n) bool. A number equals its digits."""
    return torch.tensor(
        [
            [identifier is not None and str(passage["id"]) == str(identifier) for passage in of_query]
            for of_query, identifier in zip(passages, ids, strict=True)
        ],
        dtype=torch.bool,
    )


def _open_words(settings: config.Index, passages: JsonlCorpus, inputs: Inputs) -> WordIndex | None:
    """What BM25 searches, if it takes part. Collective."""
    if settings.bm25_weight == 0:
        return None
    return open_word_index(passages, settings, inputs.passage_text, inputs.settings.retriever_format)


def _learns(retriever: DualEncoder) -> bool:
    """Whether the passage encoder is trained."""
    return any(parameter.requires_grad for parameter in retriever.passage_encoder.parameters())


def _use_of_tokens(settings: config.Index, passages: JsonlCorpus, retriever: DualEncoder) -> str:
    """What becomes of the corpus's token ids: off, read or keep."""
    if settings.cache_passage_tokens != "auto":
        return {"on": "keep", "off": "off"}[settings.cache_passage_tokens]
    refreshed = _learns(retriever) and settings.refresh_index.strip() != "-1"
    return "keep" if refreshed and sum(path.stat().st_size for path in passages.paths) >= CACHE_FROM else "read"


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


def _check_place(settings: config.Index, passages: JsonlCorpus, retriever: DualEncoder | None) -> None:
    """Refuse to replace a saved index of other passages, by a sample of them. Collective. Raises: ValueError.

    Args:
        retriever: that an index is to be built by; the log says where another one made that which is there.
    """
    place = settings.save_index_path and Path(settings.save_index_path)

    def holds_others() -> bool:
        if not place or not has_index(place):
            return False
        try:
            description = read_description(place)
            saved = passages_of(place, description)
        except ValueError:  # it is damaged, and can be made anew
            return False
        encoder = fingerprint(retriever.passage_encoder) if retriever is not None else description.retriever
        if description.retriever not in (None, encoder):
            log.warning("--save_index_path %s: the index there, made by another passage encoder, is replaced", place)
        sample = np.linspace(0, len(passages) - 1, min(64, len(passages))).astype(int).tolist()
        return len(saved) != len(passages) or any(
            saved[row][field] != passages[row][field] for row in sample for field in ("id", "text")
        )

    if distributed.on_main("looking into --save_index_path", holds_others):
        raise ValueError(
            f"--save_index_path {place} holds an index of other passages: choose another directory, or remove that one"
        )


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
