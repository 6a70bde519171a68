"""The reader at work: it encodes queries with their passages once, and writes an answer to each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from atlas import config
from atlas.model.grouping import Fused, fuse
from atlas.model.inputs import ReaderRows
from atlas.model.load import Model
from atlas.model.signals import MODES, Reading, judgements
from atlas.runtime import device as devices


class Encoded(NamedTuple):
    """B queries with up to K passages each, as the decoder attends to them."""

    queries: Sequence[str]
    rows: ReaderRows  # ids, mask and lengths (B, K, L)
    hidden: torch.Tensor  # (B, K·L, d)
    fused: Fused  # (B, S, d)


class Answering:
    """Encodes and writes as the flags say, for all that let the reader answer.

    Args:
        model: with a reader; without one (--retrieve_only) nothing here may be called.
        learning: says how the reader judges passages.
        precision: of the computation.
    """

    def __init__(
        self,
        model: Model,
        settings: config.Model,
        learning: config.RetrieverTraining,
        device: torch.device,
        precision: str,
    ) -> None:
        self.reader, self.inputs = model.reader, model.inputs
        self.settings, self.learning = settings, learning
        self.device, self.precision = device, precision

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a batch: no gradient, the precision, and what two uses of the decoder share is computed once."""
        with torch.no_grad(), devices.autocast(self.device, self.precision), self.reader.reading_twice():
            yield

    def encode(self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]] | None) -> Encoded:
        """One pass of the encoder over formatted queries, each with its passages (None: without any)."""
        rows = self.inputs.reader(queries, passages)
        hidden = self.reader.encode(*rows)  # (B, K, L) -> (B, K·L, d)
        return Encoded(queries, rows, hidden, fuse(hidden, rows.mask, rows.lengths))

    def write(self, encoded: Encoded, streamer: BaseStreamer | None = None) -> list[list[int]]:
        """The tokens of B answers, as the --generation flags say; `streamer` as for `FusionInDecoder.write`."""
        names = ("max_length", "min_length", "num_beams", "length_penalty")
        return self.reader.write(
            encoded.fused.hidden,
            encoded.fused.mask,
            prompt=self.inputs.prompts(encoded.queries),
            streamer=streamer,
            **{name: getattr(self.settings, f"generation_{name}") for name in names},
        )

    def reading(self, encoded: Encoded, rows: Sequence[list[int]]) -> Reading:
        """What the reader's judgement of the passages is computed from, with the tokens of B answers as targets."""
        prompts = self.inputs.prompts(encoded.queries) or [[]] * len(rows)
        longest, end = self.settings.generation_max_length, [self.inputs.reader_tokenizer.eos_id]
        # An answer that reached the longest length has no `</s>`, so it is not judged by one.
        ended = [1 + len(prompt) + len(row) < longest for prompt, row in zip(prompts, rows, strict=True)]
        rows = [row + end if whole else row for row, whole in zip(rows, ended, strict=True)]
        targets = self.inputs.target_rows(encoded.queries, rows)
        hidden = encoded.hidden.unflatten(1, encoded.rows.ids.shape[1:])  # (B, K·L, d) -> (B, K, L, d)
        temperature, lengths = self.learning.temperature_gold, encoded.rows.lengths
        return Reading(self.reader, hidden, encoded.rows.mask, targets, temperature, lengths, encoded.fused)

    def judgements(self, reading: Reading) -> list[list[float]]:
        """How useful each passage was for the answer, as a probability over the passages: B lists of K."""
        return judgements(MODES[self.learning.gold_score_mode], reading).tolist()
