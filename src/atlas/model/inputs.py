"""From text to tensors: the inputs of the reader and the retriever, padded to the longest row of the batch."""

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch

from atlas import config
from atlas.model.losses import IGNORE
from atlas.model.retriever import DualEncoder
from atlas.model.tokenization import (
    LONGEST_PASSAGE,
    LONGEST_TEXT,
    AnyReaderTokenizer,
    RetrieverTokenizer,
    fill_in,
    pad_rows,
    pieces_of,
)
from atlas.runtime import device as device_choices
from atlas.runtime.tracking import log

RETRIEVER_MAXLENGTH = 512  # that of the published retrievers
PASSAGE_FIELDS = ("title", "text", "id", "section")
LONGEST_FORMATTED = 2 * LONGEST_TEXT  # characters: a question or an answer, and what a format adds to it


class Targets(NamedTuple):
    """The decoder's labels and inputs."""

    labels: torch.Tensor  # (B, T), -100 at positions without loss: padding and the decoder's prompt
    decoder_ids: torch.Tensor  # (B, T): prompt and target, shifted right by one position

    @property
    def lengths(self) -> torch.Tensor:
        """The number of tokens with a loss per example, (B,)."""
        return (self.labels != IGNORE).sum(-1)


class ReaderRows(NamedTuple):
    """The encoder's input. K is the largest number of passages of a query; other queries have rows without a token."""

    ids: torch.Tensor  # (B, K, L)
    mask: torch.Tensor  # (B, K, L) bool
    lengths: np.ndarray | None  # (B, K) tokens, on the CPU; None: unknown


class JudgingRows(NamedTuple):
    """The input by which passages are judged, where it is not what is read, and the targets that are likely or not."""

    rows: ReaderRows
    targets: Targets
    asked: torch.Tensor | None = None  # (B, T) bool: the targets' tokens that are the question, not the answer


Given = Sequence[Sequence[dict[str, Any]]]  # the passages of each query


class RetrieverRows(NamedTuple):
    """An encoder's input."""

    ids: torch.Tensor  # (n, L)
    mask: torch.Tensor  # (n, L) bool
    lengths: np.ndarray  # (n,) tokens, on the CPU


def count_filling(queries: Sequence[str], settings: config.Model, tokenizer: AnyReaderTokenizer) -> int:
    """How many queries fill `--text_maxlength` alone, so that the reader gets nothing of their passages."""
    if not tokenizer.fuses:
        return 0  # a prompt has room for both
    pieces = list(pieces_of(settings.encoder_format))
    before = list(takewhile(lambda piece: piece[1] in (None, "query"), pieces))
    if len(before) == len(pieces):
        return 0  # the format has no passage in it
    template, room = "".join(piece for piece, _ in before), settings.text_maxlength - 1  # for `</s>`
    # The space at the end becomes part of the passage's first token.
    texts = [fill_in(template, LONGEST_FORMATTED, query=query).rstrip() for query in queries]
    # A token has at least one byte, apart from a leading ▁: short questions need no tokenizer.
    suspects = [text for text in texts if len(text.encode()) + 1 >= room]
    return sum(len(row) >= room for row in tokenizer.encode(suspects, max_length=room, eos=False))


class Inputs:
    """Formats and tokenizes texts, as set by the flags of the section Model.

    Args:
        reader_tokenizer, retriever_tokenizer: None if that half is not used.
        decoder_start_id: the token that the decoder starts with.
        reader_positions: most tokens that the reader has positions for, its answer included; None: any number.
        retriever: gives its longest input, and its prefixes for queries and passages. No reference to it is kept,
            because worker processes get a copy of this object.
    """

    def __init__(
        self,
        settings: config.Model,
        reader_tokenizer: AnyReaderTokenizer | None,
        retriever_tokenizer: RetrieverTokenizer | None,
        *,
        device: torch.device,
        decoder_start_id: int = 0,
        reader_positions: int | None = None,
        retriever: DualEncoder | None = None,
    ) -> None:
        self.settings, self.device, self.decoder_start_id = settings, device, decoder_start_id
        self.reader_positions = reader_positions
        self.reader_tokenizer, self.retriever_tokenizer = reader_tokenizer, retriever_tokenizer
        positions = retriever.max_length if retriever is not None else RETRIEVER_MAXLENGTH
        self.retriever_maxlength = min(settings.text_maxlength, RETRIEVER_MAXLENGTH, positions)
        self.query_prefix = retriever.query_prefix if retriever is not None else ""
        self.passage_prefix = retriever.passage_prefix if retriever is not None else ""
        self.pad_multiple = device_choices.pad_multiple(device)  # row lengths are rounded up to it
        self._warned_of_cut = False

    def reader(self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]] | None) -> ReaderRows:
        """Encoder input. Without passages (None, or none for a query) the reader is given the query alone."""
        passages = [[]] * len(queries) if passages is None else passages
        k = max([1, *map(len, passages)])
        texts = []
        for query, of_query in zip(queries, passages, strict=True):
            own = [self._of_passage(self.settings.encoder_format, passage, query=query) for passage in of_query]
            texts.append(own or [self._cut(query, LONGEST_FORMATTED)])
        flat = [text for of_query in texts for text in of_query]
        tokens = iter(self.reader_tokenizer.encode(flat, max_length=self.settings.text_maxlength))
        return self._rows([list(islice(tokens, len(of_query))) for of_query in texts], k)

    def _rows(self, rows: Sequence[Sequence[list[int]]], k: int) -> ReaderRows:
        """K rows of tokens for each query, empty where it has fewer."""
        filled = [row for of_query in rows for row in [*of_query, *[[]] * (k - len(of_query))]]
        ids, mask = self._pad(filled, self.reader_tokenizer.pad_id)
        lengths = np.array([len(row) for row in filled], np.int64)
        return ReaderRows(*(part.reshape(len(rows), k, -1) for part in (ids, mask)), lengths.reshape(-1, k))

    def training(self, queries: Sequence[str], passages: Given | None, rows: Sequence[list[int]]) -> ReaderRows:
        """The input to learn from. Of the passages, `Atlas` reads the first `--n_context`. `rows`: as for `judging`."""
        return self.reader(queries, passages)

    def judging(
        self,
        queries: Sequence[str],
        passages: Sequence[Sequence[dict[str, Any]]],
        rows: Sequence[list[int]],
        mode: str,
    ) -> JudgingRows | None:
        """The input by which a gold-score mode judges the passages; None: what is read, as here.

        Args:
            rows: the targets' tokens.
        """
        return None

    def targets(self, queries: Sequence[str], targets: Sequence[str]) -> Targets:
        """What the decoder learns to generate: the prompt if there is one (without loss), the target and `</s>`."""
        return self.target_rows(queries, self.target_tokens(targets))

    def target_tokens(self, targets: Sequence[str]) -> list[list[int]]:
        """The tokens of each target, `</s>` included, at most `--target_maxlength`."""
        targets = [self._formatted(self.settings.decoder_format, target=target) for target in targets]
        texts = [target if target.endswith("</s>") else f"{target}</s>" for target in targets]
        limit = None if self.settings.target_maxlength in (None, -1) else self.settings.target_maxlength
        return self.reader_tokenizer.encode(texts, max_length=limit, eos=False)

    def target_rows(self, queries: Sequence[str], rows: Sequence[list[int]]) -> Targets:
        """The same for targets that are tokens already, such as those that the reader has generated."""
        prompts = self.prompts(queries) or [[]] * len(rows)
        return self._targets(prompts, rows)

    def _targets(self, prompts: Sequence[list[int]], rows: Sequence[list[int]]) -> Targets:
        labels, _ = self._pad([[IGNORE] * len(p) + row for p, row in zip(prompts, rows, strict=True)], IGNORE)
        outputs, _ = self._pad([p + row for p, row in zip(prompts, rows, strict=True)], self.reader_tokenizer.pad_id)
        decoder_ids = outputs.roll(1, dims=1)
        decoder_ids[:, 0] = self.decoder_start_id
        return Targets(labels, decoder_ids)

    def prompts(self, queries: Sequence[str]) -> list[list[int]] | None:
        """The tokens that the decoder's output starts with; None without `--decoder_prompt_format`."""
        if self.settings.decoder_prompt_format is None:
            return None
        texts = [self._formatted(self.settings.decoder_prompt_format, query=query) for query in queries]
        return self.reader_tokenizer.encode(texts, eos=False)

    def queries(self, queries: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The retriever's input for queries: ids and mask (B, L)."""
        texts = [self._cut(self.query_prefix + query, LONGEST_FORMATTED) for query in queries]
        tokens = self.retriever_tokenizer.encode(texts, max_length=self.retriever_maxlength)
        return self._pad(tokens, self.retriever_tokenizer.pad_id)

    def passages(self, passages: Sequence[dict[str, Any]]) -> RetrieverRows:
        """The retriever's input for passages."""
        tokens = self.passage_tokens(passages)
        ids, mask = (device_choices.move(part, self.device) for part in self.pad_passages(tokens))
        return RetrieverRows(ids, mask, np.array([len(row) for row in tokens], np.int64))

    def passage_tokens(self, passages: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The retriever's token ids of passages, not padded."""
        texts = [self.passage_prefix + self.passage_text(passage) for passage in passages]
        return self.retriever_tokenizer.encode(texts, max_length=self.retriever_maxlength)

    def passage_reading(self) -> str:
        """All that `passage_tokens` depends on but the passages and the version of the library."""
        how = (self.passage_prefix, self.settings.retriever_format, LONGEST_PASSAGE, self.retriever_maxlength)
        return repr((how, self.retriever_tokenizer.description()))

    def passage_text(self, passage: dict[str, Any]) -> str:
        """A passage as the retriever reads it, without its prefix."""
        return self._of_passage(self.settings.retriever_format, passage)

    def pad_passages(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of `passage_tokens`, padded, on the CPU: ids and mask (n, L)."""
        return pad_rows(rows, self.retriever_tokenizer.pad_id, self.pad_multiple)

    def _of_passage(self, template: str, passage: dict[str, Any], **more: str) -> str:
        fields = {name: passage.get(name) for name in PASSAGE_FIELDS}
        return self._cut(fill_in(template, LONGEST_PASSAGE + 1, **fields, **more), LONGEST_PASSAGE)

    def _formatted(self, template: str | None, **field: str) -> str:
        (text,) = field.values()
        filled = text if template is None else fill_in(template, LONGEST_FORMATTED + 1, **field)
        return self._cut(filled, LONGEST_FORMATTED)

    def _cut(self, text: str, most: int) -> str:
        """The first `most` characters; the first cut is reported."""
        if len(text) > most and not self._warned_of_cut:
            self._warned_of_cut = True
            log.warning("A text of more than %d characters is cut there before it is tokenized: %r…", most, text[:60])
        return text[:most]

    def _pad(self, rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad_rows(rows, pad_id, self.pad_multiple)
        return device_choices.move(ids, self.device), device_choices.move(mask, self.device)
