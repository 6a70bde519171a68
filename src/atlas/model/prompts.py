"""The input of a decoder-only reader: passages and question in one prompt, and the answer that is to follow."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from atlas import config
from atlas.model.inputs import LONGEST_FORMATTED, Given, Inputs, JudgingRows, ReaderRows, Targets
from atlas.model.losses import IGNORE
from atlas.model.tokenization import LONGEST_PASSAGE, PromptTokenizer, fill_in
from atlas.runtime.tracking import log

# How T5 is asked for what is missing in a text. A prompt has words of its own around a question.
SENTINEL = re.compile(r"<extra_id_\d+>")
QUESTION = re.compile(r"question: (.*) answer: <extra_id_0>", re.DOTALL)
GAP = "___"
PASSAGE = "a"  # stands for any: a tokenizer may split a question differently at the start of a text


class PromptInputs(Inputs):
    """`Inputs` for a reader that reads everything in one prompt.

    `--text_maxlength` holds for each passage, which is cut at its end. The question is never cut.
    """

    _warned_of_positions = False

    def reader(self, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]] | None) -> ReaderRows:
        """A prompt for each query with its passages, (B, 1, L)."""
        return self._before(queries, passages, [[]] * len(queries))

    def training(self, queries: Sequence[str], passages: Given | None, rows: Sequence[list[int]]) -> ReaderRows:
        """The prompts to learn from, with the first `--n_context` passages."""
        n = self.settings.n_context
        return self._before(queries, passages and [found[:n] for found in passages], rows)

    def _before(self, queries: Sequence[str], passages: Given | None, rows: Sequence[list[int]]) -> ReaderRows:
        """The prompts that these answers fit behind."""
        passages = [[]] * len(queries) if passages is None else passages
        of_each = zip(queries, passages, rows, strict=True)
        prompts = [self._prompt(query, self._texts(found), len(row)) for query, found, row in of_each]
        return self._rows([[prompt] for prompt in prompts], 1)

    def judging(
        self,
        queries: Sequence[str],
        passages: Sequence[Sequence[dict[str, Any]]],
        rows: Sequence[list[int]],
        mode: str,
    ) -> JudgingRows:
        """The prompts by which a mode judges each passage, (B, K, L): with this passage alone, or without it (`loop`).

        For the mode `question` a prompt ends before the question, which is the beginning of the target.
        """
        prompts = []
        for query, found, row in zip(queries, passages, rows, strict=True):
            texts = self._texts(found)
            chosen = [texts[:i] + texts[i + 1 :] if mode == "loop" else [text] for i, text in enumerate(texts)]
            prompts.append([self._prompt(query, some, len(row)) for some in chosen])
        k = max([1, *map(len, passages)])
        if mode != "question":
            return JudgingRows(self._rows(prompts, k), self.target_rows(queries, rows))
        begun, heads, labels, asked = self.prompts(queries) or [[]] * len(rows), [], [], []
        ends: list[list[int]] = []  # the question, what comes behind it in a prompt, and the answer
        for query, of_query, start, row in zip(queries, prompts, begun, rows, strict=True):
            end, n = self._question(query)
            if any(prompt[-len(end) :] != end for prompt in of_query):
                raise _judges_nothing(query)
            heads.append([prompt[: -len(end)] for prompt in of_query])
            ends.append([*end, *start, *row])
            labels.append([*end[:n], *[IGNORE] * (len(end) - n + len(start)), *row])
            asked.append([1] * n)
        targets = self._targets([[]] * len(ends), ends)
        wide = targets.labels.shape[1]
        labels = self._pad([row + [IGNORE] * (wide - len(row)) for row in labels], IGNORE)[0]
        asked = self._pad([row + [0] * (wide - len(row)) for row in asked], 0)[0].bool()
        return JudgingRows(self._rows(heads, k), Targets(labels, targets.decoder_ids), asked)

    def _question(self, query: str) -> tuple[list[int], int]:
        """The tokens of a prompt from the question on, and how many of them are the question. Raises: ValueError."""
        text, query = self.text(query, [PASSAGE]), self._asked(query)
        start = text.rfind(query, 0, len(text) - self._behind_question)
        if start < 0:
            raise _judges_nothing(query)
        n, behind = (self.reader_tokenizer.count_behind(text, place) for place in (start, start + len(query)))
        return self.reader_tokenizer.encode([text], eos=False)[0][-n:], n - behind

    @cached_property
    def _behind_question(self) -> int:
        """How many characters of every prompt come behind the question."""
        one, other = (self.text(query, [PASSAGE])[::-1] for query in ("a", "b"))
        return len(os.path.commonprefix([one, other]))

    def _asked(self, query: str) -> str:
        """A query as it stands in a prompt."""
        return self.reader_tokenizer.plain(self._cut(asked(query), LONGEST_FORMATTED))

    def target_tokens(self, targets: Sequence[str]) -> list[list[int]]:
        """The tokens of each answer, as they stand behind a prompt, and EOS, at most `--target_maxlength`."""
        plain = map(self.reader_tokenizer.plain, targets)
        texts = [SENTINEL.sub("", self._formatted(self.settings.decoder_format, target=one)) for one in plain]
        texts = [text.strip().removesuffix(self.reader_tokenizer.eos) for text in texts]  # of the format
        limit = None if self.settings.target_maxlength in (None, -1) else self.settings.target_maxlength
        return [[*row, self.reader_tokenizer.eos_id][:limit] for row in self._behind(texts)]

    def prompts(self, queries: Sequence[str]) -> list[list[int]] | None:
        """The tokens that an answer must begin with; None without `--decoder_prompt_format`."""
        if self.settings.decoder_prompt_format is None:
            return None
        template = self.settings.decoder_prompt_format
        return self._behind([self._formatted(template, query=self._asked(query)) for query in queries])

    def _behind(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts behind a prompt, which a space follows unless it is a chat of another form."""
        end, between = self.reader_tokenizer.before_answer if self._chats else (":", " ")
        return self.reader_tokenizer.encode_behind(end, [between + text.strip() for text in texts])

    @property
    def _chats(self) -> bool:
        return self.settings.chat_template and self.reader_tokenizer.chats

    def _texts(self, passages: Sequence[dict[str, Any]]) -> list[str]:
        template = with_lines(self.settings.passage_format)
        texts = [self.reader_tokenizer.plain(self._of_passage(template, passage).strip()) for passage in passages]
        return self.reader_tokenizer.cut(texts, self.settings.text_maxlength)

    def _prompt(self, query: str, texts: Sequence[str], answer: int = 0) -> list[int]:
        """The tokens of a prompt that leaves room for an answer, and at least for one of so many tokens.

        Raises: ValueError if the question is too long.
        """
        tokens, answer = self._tokens(query, texts), max(answer, self.longest_answer)
        if self.reader_positions is None or len(tokens) <= self.reader_positions - answer:
            return tokens
        room = self.room_of_passages(query, len(texts), answer)
        if not self._warned_of_positions:
            self._warned_of_positions = True
            log.warning(
                "A prompt of %d tokens does not fit into the %d positions of the reader: its passages are cut to %d "
                "tokens each, and so are those of others; lower --n_context or --text_maxlength",
                len(tokens),
                self.reader_positions,
                room,
            )
        return self._tokens(query, self.reader_tokenizer.cut(texts, room))

    def room_of_passages(self, query: str, n: int, answer: int) -> int:
        """How many tokens each of n passages may have beside a query and an answer of so many tokens.

        What joins two passages takes a token, or two.

        Raises: ValueError if there is no room for one.
        """
        tokens = len(self._tokens(query, []))
        room = self.reader_positions - answer - tokens - 2 * n
        if room < n:
            passages, lower = (f"--n_context {n}, ", "--n_context, ") if n else ("", "")
            if n > self.settings.n_context:
                passages = f"--retriever_n_context {n + 1} (--gold_score_mode loop leaves out one), "
                lower = "--retriever_n_context, "
            raise ValueError(
                f"the {self.reader_positions} positions of the reader are too few for {passages}the {tokens} tokens of "
                f"the question {query[:60]!r} with its prompt, and an answer of {answer}: shorten the question, or "
                f"lower {lower}--generation_max_length or --target_maxlength"
            )
        return room // max(n, 1)

    @property
    def longest_answer(self) -> int:
        """Tokens."""
        return max(self.settings.generation_max_length, self.settings.target_maxlength or 0)

    def _tokens(self, query: str, texts: Sequence[str]) -> list[int]:
        tokens = self.reader_tokenizer.encode([self.text(query, texts)], eos=False)[0]
        return tokens if self._chats else self.reader_tokenizer.start + tokens

    def text(self, query: str, texts: Sequence[str]) -> str:
        """A prompt."""
        fields = {"passages": "\n\n".join(texts), "query": self._asked(query)}
        template = with_lines(self.settings.reader_prompt_format)
        prompt = fill_in(template, 100 * LONGEST_PASSAGE, **fields).rstrip("\n")
        prompt = prompt if texts else prompt.lstrip("\n")
        return self.reader_tokenizer.chat(prompt) if self._chats else prompt


def check_of_questions(
    settings: config.Model, tokenizer: PromptTokenizer, learning: config.RetrieverTraining | None
) -> Callable[[str, Sequence[str]], None]:
    """A function of a query and its answers. It raises ValueError if the reader has no positions for them, as in the
    middle of a run.

    Args:
        learning: of a training, where answers may be learnt, or judged by, and `loop` leaves out one of
            `--retriever_n_context` passages.
    """
    learns = learning is not None and learning.needs_answers
    loops = learning is not None and learning.train_retriever and learning.gold_score_mode == "loop"
    inputs = PromptInputs(settings, tokenizer, None, device=torch.device("cpu"), reader_positions=tokenizer.positions)
    n = 0 if settings.closed_book else 1 if settings.retrieve_only else settings.n_context
    n = max(n, (settings.retriever_n_context or n) - 1) if loops else n
    # A token has at least one byte: short questions need no tokenizer.
    around, least = len(inputs.text("", []).encode()) + len(tokenizer.start) + 1 + 3 * n, inputs.longest_answer

    def check(query: str, targets: Sequence[str]) -> None:
        targets = targets if learns else []
        longest = max([least, *(len(target.encode()) + 1 for target in targets)])
        if tokenizer.positions is not None and around + len(query.encode()) + longest > tokenizer.positions:
            inputs.room_of_passages(query, n, max([least, *map(len, inputs.target_tokens(targets))]))

    return check


def with_lines(template: str) -> str:
    """A format as it is written on a command line, where a new line is `\\n`."""
    return template.replace("\\n", "\n")


def asked(query: str) -> str:
    """A query without what it says to T5 alone."""
    if found := QUESTION.fullmatch(query):
        query = found[1]
    return SENTINEL.sub(GAP, re.sub(r"\s*<extra_id_\d+>\s*$", "", query)).strip()


def _judges_nothing(query: str) -> ValueError:
    return ValueError(
        f"the question {query[:60]!r} is not in its prompt as it is, so it cannot judge passages: put {{query}} on a "
        "line of its own in --reader_prompt_format, and try --no-chat_template"
    )
