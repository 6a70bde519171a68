"""The model as one module: from a batch of tensors to the reader's loss and the retriever's loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from atlas.model.grouping import fuse
from atlas.model.inputs import JudgingRows, ReaderRows, Targets
from atlas.model.interface import Reader
from atlas.model.losses import IGNORE, retriever_scores
from atlas.model.pretrained import evaluating
from atlas.model.retriever import DualEncoder
from atlas.model.signals import Correlation, Mode, Reading, correlations, reading_of


@dataclass(frozen=True)
class TrainingTensors:
    """One rank's batch. The retriever's fields are None when it is not trained."""

    reader_ids: torch.Tensor  # (B, K, L): all retrieved passages; the reader reads the first n_context of them
    reader_mask: torch.Tensor  # (B, K, L) bool
    reader_lengths: np.ndarray | None  # (B, K) tokens, on the CPU; None: unknown, so that padding is computed too
    targets: Targets
    query_ids: torch.Tensor | None = None  # (B, Lq)
    query_mask: torch.Tensor | None = None
    passage_ids: torch.Tensor | None = None  # (B·K, Lp), when the passage encoder is trained and embeds them again
    passage_mask: torch.Tensor | None = None
    passage_lengths: np.ndarray | None = None  # (B·K,), on the CPU
    passage_embeddings: torch.Tensor | None = None  # (B, K, D) from the index, when the passage encoder is frozen
    found: torch.Tensor | None = None  # (B, K) int64: hashes of the passages' ids, to compare with other queries'
    own: torch.Tensor | None = None  # (B, n) int64: those that are no negatives of a query: found, or left out
    judged: JudgingRows | None = None  # by which passages are judged; None: by what is read

    def read(self, start: int, end: int) -> ReaderRows:
        """The reader's rows of some of each query's passages."""
        lengths = self.reader_lengths
        return ReaderRows(
            self.reader_ids[:, start:end],
            self.reader_mask[:, start:end],
            None if lengths is None else lengths[:, start:end],
        )


class Losses(NamedTuple):
    """Scalars; None of a half that is not trained. `correlations` is empty unless `correlate` is set."""

    reader: torch.Tensor | None
    retriever: torch.Tensor | None
    correlations: Mapping[str, Correlation]

    @property
    def total(self) -> torch.Tensor:
        if self.reader is None or self.retriever is None:
            return self.retriever if self.reader is None else self.reader
        return self.reader + self.retriever


class Atlas(nn.Module):
    """Reader and retriever together.

    Args:
        retriever: None for closed-book runs, and for runs that read the passages in the data.
        mode: how the reader scores passages (`atlas.model.signals`); None when the retriever is not trained.
        n_context: number of passages that the reader reads; the retriever learns from all retrieved passages.
        correlate: whether to correlate the gold scores with the decoder's attention.
        group_by_length: whether the reader may compute rows of similar length together. Ranks that share its weights
            must call it equally often.
    """

    def __init__(
        self,
        reader: Reader,
        retriever: DualEncoder | None,
        *,
        n_context: int,
        mode: Mode | None = None,
        temperature_gold: float = 0.01,
        temperature_score: float = 0.01,
        correlate: bool = False,
        group_by_length: bool = True,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.retriever = retriever
        self.n_context = n_context
        self.mode = mode
        self.temperature_gold = temperature_gold
        self.temperature_score = temperature_score
        self.correlate = correlate
        self.group_by_length = group_by_length

    def forward(self, batch: TrainingTensors) -> Losses:
        """The losses of one batch. The retriever has one only if the batch contains its tensors."""
        rows = batch.read(0, self.n_context)
        hidden = self._encode(rows)  # (B, K, L) -> (B, K·L, d)
        learns = any(parameter.requires_grad for parameter in self.reader.parameters())
        reader_loss = self._reader_loss(hidden, rows, batch.targets) if learns else None
        if batch.query_ids is None:
            return Losses(reader_loss, None, {})
        with torch.no_grad(), evaluating(self.reader):
            reading = self._reading(batch, hidden)
            gold = self.mode.signal(reading)  # (B, K), or (B, K, T)
            correlated = correlations(reading, gold) if self.correlate else {}
        scores, *others = self._retriever_scores(batch)
        retriever_loss = self.mode.loss(scores, gold, reading, self.temperature_score, *others)
        return Losses(reader_loss, retriever_loss, correlated)

    def _reader_loss(self, hidden: torch.Tensor, rows: ReaderRows, targets: Targets) -> torch.Tensor:
        fused = fuse(hidden, rows.mask, rows.lengths)  # (B, K·L, d) -> (B, S, d)
        logits = self.reader.logits(fused.hidden, fused.mask, targets.decoder_ids)  # (B, T, V)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return losses / (targets.labels != IGNORE).sum().clamp(min=1)

    def _reading(self, batch: TrainingTensors, hidden: torch.Tensor) -> Reading:
        """All K passages, encoded without dropout. Passages already encoded without dropout are not encoded again.

        Args:
            hidden: (B, n_context·L, d): the encodings that the reader's loss was computed from.
        """
        if batch.judged is not None:
            rows = batch.judged.rows
            rows = rows._replace(lengths=rows.lengths if self.group_by_length else None)
            return reading_of(self.reader, batch.judged._replace(rows=rows), self.temperature_gold, self.mode.known)
        k = batch.reader_ids.shape[1]
        rows = batch.read(0, k)
        if self.reader.has_dropout:
            hidden = self._encode(rows)
        elif k > self.n_context:
            rest = self._encode(batch.read(self.n_context, k))
            hidden = torch.cat([hidden, rest], dim=1)
        hidden = hidden.detach().unflatten(1, rows.ids.shape[1:])  # (B, K·L, d) -> (B, K, L, d)
        return Reading(self.reader, hidden, rows.mask, batch.targets, self.temperature_gold, rows.lengths)

    def _encode(self, rows: ReaderRows) -> torch.Tensor:  # (B, K, L) -> (B, K·L, d)
        return self.reader.encode(rows.ids, rows.mask, rows.lengths if self.group_by_length else None)

    def _retriever_scores(self, batch: TrainingTensors) -> tuple[torch.Tensor, ...]:
        """(B, K), and with `Mode.gather` (B, M) of the other queries' passages, -inf where they are the query's own.

        Gradients flow into the query encoder, and into the passage encoder if it is the same module.
        """
        queries = self.retriever.embed_queries(batch.query_ids, batch.query_mask)  # (B, D)
        passages = batch.passage_embeddings
        if passages is None:
            rows = batch.passage_ids, batch.passage_mask, batch.passage_lengths
            passages = self.retriever.embed_passages(*rows)  # (B·K, D)
            passages = passages.view(len(queries), -1, passages.shape[-1])
        scores = retriever_scores(queries, passages)
        if (gather := self.mode.gather) is None:
            return (scores,)
        everybody = gather(passages.flatten(0, 1)).expand(len(queries), -1, -1)  # (B, W·B·K, D)
        own = (batch.own[..., None] == gather(batch.found.flatten())).any(1)  # (B, n, 1) -> (B, W·B·K)
        return scores, retriever_scores(queries, everybody).masked_fill(own, -torch.inf)
