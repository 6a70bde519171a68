"""The input of a decoder-only reader: passages and question in one prompt, and the answer that is to follow."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from atlas.model.inputs import LONGEST_FORMATTED, Inputs, ReaderRows, Targets
from atlas.model.tokenization import LONGEST_PASSAGE, fill_in
from atlas.runtime.tracking import log

# How T5 is asked for what is missing in a text. A prompt has words of its own around a question.
SENTINEL = re.compile(r"<extra_id_\d+>")
QUESTION = re.compile(r"question: (.*) answer: <extra_id_0>", re.DOTALL)
GAP = "___"


class PromptInputs(Inputs):
    """`Inputs` for a reader that reads everything in one prompt.

    `--text_maxlength` holds for each passage, which is cut at its end. The question is never cut.
    """

    _warned_of_positions = False

    def reader(self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]] | None) -> ReaderRows:
        """A prompt for each query with its passages, (B, 1, L)."""
        passages = [[]] * len(queries) if passages is None else passages
        prompts = [self._prompt(query, self._texts(found)) for query, found in zip(queries, passages, strict=True)]
        return self._rows([[prompt] for prompt in prompts], 1)

    def training(
        self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]] | None, mode: str | None
    ) -> tuple[ReaderRows, ReaderRows | None]:
        """The prompts to learn from, with the first `--n_context` passages, and those that judge all passages."""
        n = self.settings.n_context
        read = self.reader(queries, passages and [found[:n] for found in passages])
        return read, self.judging(queries, passages, mode) if mode is not None else None

    def judging(self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]], mode: str) -> ReaderRows:
        """The prompts by which a mode judges each passage, (B, K, L).

        A passage is judged by a prompt with this passage alone, or (`loop`) by one with all of the others.
        """
        rows = []
        for query, found in zip(queries, passages, strict=True):
            texts = self._texts(found)
            chosen = [texts[:i] + texts[i + 1 :] if mode == "loop" else [text] for i, text in enumerate(texts)]
            rows.append([self._prompt(query, some) for some in chosen])
        return self._rows(rows, max([1, *map(len, passages)]))

    def targets(self, queries: Sequence[str], targets: Sequence[str]) -> Targets:
        """The answers, as they stand behind a prompt, and EOS."""
        texts = [SENTINEL.sub("", self._formatted(self.settings.decoder_format, target=one)) for one in targets]
        limit = None if self.settings.target_maxlength in (None, -1) else self.settings.target_maxlength
        rows = [row + [self.reader_tokenizer.eos_id] for row in self._behind(texts)]
        return self.target_rows(queries, [row[:limit] for row in rows])

    def prompts(self, queries: Sequence[str]) -> list[list[int]] | None:
        """The tokens that an answer must begin with; None without `--decoder_prompt_format`."""
        if self.settings.decoder_prompt_format is None:
            return None
        template = self.settings.decoder_prompt_format
        return self._behind([self._formatted(template, query=asked(query)) for query in queries])

    def _behind(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts behind a prompt, which a space follows unless it is a chat."""
        texts = [text.strip() for text in texts]
        if self._chats:
            return self.reader_tokenizer.encode_behind("\n", texts)
        return self.reader_tokenizer.encode_behind(":", [f" {text}" for text in texts])

    @property
    def _chats(self) -> bool:
        return self.settings.chat_template and self.reader_tokenizer.chats

    def _texts(self, passages: Sequence[dict[str, Any]]) -> list[str]:
        template = with_lines(self.settings.passage_format)
        texts = [self._of_passage(template, passage).strip() for passage in passages]
        return self.reader_tokenizer.cut(texts, self.settings.text_maxlength)

    def _prompt(self, query: str, texts: Sequence[str]) -> list[int]:
        """The tokens of a prompt that leaves room for an answer. Raises: ValueError if the question alone does not."""
        tokens = self._tokens(query, texts)
        if self.reader_positions is None:
            return tokens
        room = self.reader_positions - max(self.settings.generation_max_length, self.settings.target_maxlength or 0)
        if len(tokens) <= room:
            return tokens
        room -= len(self._tokens(query, [])) + 2 * len(texts)  # what joins two passages takes a token, or two
        if not texts or room < len(texts):
            raise ValueError(
                f"the question {query[:60]!r}… alone fills the {self.reader_positions} positions of the reader: "
                "shorten it, or lower --generation_max_length"
            )
        if not self._warned_of_positions:
            self._warned_of_positions = True
            log.warning(
                "A prompt of %d tokens does not fit into the %d positions of the reader: its passages are cut to %d "
                "tokens each, and so are those of others; lower --n_context or --text_maxlength",
                len(tokens),
                self.reader_positions,
                room // len(texts),
            )
        return self._tokens(query, self.reader_tokenizer.cut(texts, room // len(texts)))

    def _tokens(self, query: str, texts: Sequence[str]) -> list[int]:
        fields = {"passages": "\n\n".join(texts), "query": self._cut(asked(query), LONGEST_FORMATTED)}
        template = with_lines(self.settings.reader_prompt_format)
        prompt = fill_in(template, 100 * LONGEST_PASSAGE, **fields).strip("\n")
        tokenizer = self.reader_tokenizer
        if self._chats:
            return tokenizer.encode([tokenizer.chat(prompt)], eos=False)[0]
        return tokenizer.start + tokenizer.encode([prompt], eos=False)[0]

    def _rows(self, rows: Sequence[Sequence[list[int]]], k: int) -> ReaderRows:
        """K prompts for each query; other queries have rows without a token."""
        filled = [row for of_query in rows for row in [*of_query, *[[]] * (k - len(of_query))]]
        ids, mask = self._pad(filled, self.reader_tokenizer.pad_id)
        lengths = np.array([len(row) for row in filled], np.int64)
        return ReaderRows(*(part.reshape(len(rows), k, -1) for part in (ids, mask)), lengths.reshape(-1, k))


def with_lines(template: str) -> str:
    """A format as it is written on a command line, where a new line is `\\n`."""
    return template.replace("\\n", "\n")


def asked(query: str) -> str:
    """A query without what it says to T5 alone."""
    if found := QUESTION.fullmatch(query):
        query = found[1]
    return SENTINEL.sub(GAP, re.sub(r"\s*<extra_id_\d+>\s*$", "", query))
