"""The reader at work: it is given passages, encodes them once with their query, and writes an answer to each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from atlas import config
from atlas.model.grouping import Fused, fuse
from atlas.model.inputs import ReaderRows
from atlas.model.load import Model
from atlas.model.signals import Reading, judgements, likelihood_of_question, mode_of, reading_of
from atlas.retrieval import Found, Retrieval
from atlas.runtime import device as devices
from atlas.tasks import Example


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
        self.reader, self.inputs, self.known = model.reader, model.inputs, model.known
        self.settings, self.learning = settings, learning
        self.device, self.precision = device, precision

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a batch: no gradient, and the precision."""
        with torch.no_grad(), devices.autocast(self.device, self.precision):
            yield

    def encode(self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]] | None) -> Encoded:
        """One pass of the encoder over formatted queries, each with its passages (None: without any)."""
        rows = self.inputs.reader(queries, passages)
        hidden = self.reader.encode(*rows)  # (B, K, L) -> (B, K·L, d)
        return Encoded(queries, rows, hidden, fuse(hidden, rows.mask, rows.lengths))

    def passages(
        self,
        retrieval: Retrieval | None,
        examples: Sequence[Example],
        k: int,
        exclude: Sequence[str | int | None] | None,
        embedded: Callable[[], object] = lambda: None,
    ) -> tuple[list[list[dict[str, Any]]] | None, list[list[float]] | None]:
        """Up to k passages to read for each example, and their scores where they were searched for. Collective."""
        if retrieval is not None:
            found = self.find(retrieval, examples, k, exclude, embedded)
            return found.passages, found.scores.tolist()
        if self.settings.use_file_passages:
            return [example.passages[:k] for example in examples], None
        return None, None

    def find(
        self,
        retrieval: Retrieval,
        examples: Sequence[Example],
        k: int,
        exclude: Sequence[str | int | None] | None,
        embedded: Callable[[], object] = lambda: None,
    ) -> Found:
        """The best k passages for each example, as they are read; `exclude` and `embedded` as for `Retrieval.search`.

        Collective.
        """
        queries, words = [example.query for example in examples], [example.words_to_find for example in examples]
        found = retrieval.search(queries, self._to_find(k), exclude, words=words, read=k, embedded=embedded)
        return self._rerank(queries, found, k)

    def _rerank(self, queries: Sequence[str], found: Found, k: int) -> Found:
        """The k passages to read: all that were found, but the first --rerank_by_reader in the reader's order."""
        first = self.settings.reranked
        if not first or not queries:
            return found
        with self.computing():
            passages = [of_query[:first] for of_query in found.passages]
            judged = self.inputs.judging(queries, passages, [[] for _ in queries], "question")
            scores = likelihood_of_question(reading_of(self.reader, judged, 1.0, self.known))  # (B, first)
        return found.sorted_by(scores.masked_fill(~judged.rows.mask.any(-1), -torch.inf), k)

    def _to_find(self, k: int) -> int:
        """How many passages are to be found where k are to be read."""
        return max(k, self.settings.reranked)

    def write(self, encoded: Encoded, streamer: BaseStreamer | None = None) -> list[list[int]]:
        """The tokens of B answers, as the --generation flags say; `streamer` as for `FusionInDecoder.write`.

        Raises: ValueError if what an answer begins with leaves no room for it.
        """
        prompt, longest = self.inputs.prompts(encoded.queries), self.settings.generation_max_length
        if (n := max(map(len, prompt or [[]]))) > longest - 2:  # a start token, and at least one of the answer
            raise ValueError(
                f"--decoder_prompt_format: an answer would begin with {n} tokens, and --generation_max_length "
                f"{longest} leaves no room for more: raise it, or ask a shorter question"
            )
        names = ("max_length", "min_length", "num_beams", "length_penalty")
        return self.reader.write(
            encoded.fused.hidden,
            encoded.fused.mask,
            prompt=prompt,
            streamer=streamer,
            **{name: getattr(self.settings, f"generation_{name}") for name in names},
        )

    def whole(self, encoded: Encoded, rows: Sequence[list[int]]) -> list[list[int]]:
        """The tokens of B answers with the `</s>` that ended them; one that reached the longest length has none."""
        prompts = self.inputs.prompts(encoded.queries) or [[]] * len(rows)
        longest, end = self.settings.generation_max_length, [self.inputs.reader_tokenizer.eos_id]
        ended = [1 + len(prompt) + len(row) < longest for prompt, row in zip(prompts, rows, strict=True)]
        return [row + end if whole else row for row, whole in zip(rows, ended, strict=True)]

    def reading(self, encoded: Encoded, rows: Sequence[list[int]]) -> Reading:
        """What was read, with the tokens of B whole answers as targets."""
        targets = self.inputs.target_rows(encoded.queries, rows)
        hidden = encoded.hidden.unflatten(1, encoded.rows.ids.shape[1:])  # (B, K·L, d) -> (B, K, L, d)
        temperature, lengths = self.learning.temperature_gold, encoded.rows.lengths
        return Reading(self.reader, hidden, encoded.rows.mask, targets, temperature, lengths, encoded.fused)

    def judgements(
        self, encoded: Encoded, passages: Sequence[Sequence[dict[str, Any]]], rows: Sequence[list[int]]
    ) -> list[list[float]]:
        """How useful each passage was for the whole answer, as a probability over the passages: B lists of K."""
        answers = rows if self.learning.judges_by_answers else [[] for _ in rows]
        judged = self.inputs.judging(encoded.queries, passages, answers, self.learning.gold_score_mode)
        if judged is None:  # by what was read
            reading = self.reading(encoded, rows)
        else:
            reading = reading_of(self.reader, judged, self.learning.temperature_gold, self.known)
        return judgements(mode_of(self.learning, self.reader), reading).tolist()
