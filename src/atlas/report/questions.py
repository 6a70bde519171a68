"""The questions of result files: right or wrong, what went wrong, and what changed since an earlier evaluation."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from atlas.files.jsonl import DataError, decode
from atlas.metrics import VERDICTS, contains_answer, exact_match, f1, simple_tokens
from atlas.report.packing import Distinct, Packed, finite
from atlas.report.record import Evaluation, Flag, Record

MOST_PASSAGES = 20  # of a question, that the report shows
LISTED = 400  # characters of a text in the list of questions, which can be searched

# What can be said of a question: all but the first are mistakes.
RIGHT, WORDED, MISSING, UNREAD, WRONG = range(5)
KINDS = {
    RIGHT: ("right", "the answer is one of the expected ones"),
    WORDED: ("worded otherwise", "not the expected answer, but it shares words with it (F1 above 0)"),
    MISSING: ("not in the passages", "no passage that was read has an expected answer in its text"),
    UNREAD: ("there, but not read", "a passage has an expected answer, and the reader said something else"),
    WRONG: ("wrong", "another answer than the expected ones"),
}


class Judging(NamedTuple):
    """How the answers of an evaluation are judged: as the run did, as far as its results tell."""

    by_words: bool  # normalised, as exact match has it; else the same text
    searched: bool  # whether a passage that has the answer helps
    nfc: bool = False
    verdicts: bool = False  # whether some answers are not searched for

    @classmethod
    def of(cls, evaluation: Evaluation, flags: Mapping[str, Flag]) -> "Judging":
        metrics, task = evaluation.metrics, flags["task"].value if "task" in flags else None
        nfc = "metric_unicode" in flags and flags["metric_unicode"].value == "nfc"
        return cls(
            "accuracy" not in metrics or "exact_match" in metrics, not metrics or "mrr" in metrics, nfc, task == "kilt"
        )

    def is_right(self, generation: str, answers: Sequence[str]) -> bool:
        """Whether the generation is one of the answers."""
        if self.nfc:
            generation, *answers = (unicodedata.normalize("NFC", text) for text in (generation, *answers))
        if self.by_words:
            return exact_match(generation, answers) == 1
        return _without_sentinels(generation) in map(_without_sentinels, answers)

    def rank(self, passages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> int | None:
        """The rank of the first passage with an answer, from 1; 0: none has one; None: that is not looked for."""
        if not self.searched or not passages or not answers or (self.verdicts and set(answers) <= VERDICTS):
            return None
        tokens = [simple_tokens(answer) for answer in answers]
        starts = [answer.split()[0].casefold() for answer in tokens if answer.strip()]

        def has_answer(passage: Mapping[str, Any]) -> bool:
            text = str(passage.get("text") or "")
            folded = unicodedata.normalize("NFD", text).casefold()
            # Most passages have not even the first word, which is seen many times as fast.
            return any(start in folded for start in starts) and contains_answer(text, tokens)

        return next((rank for rank, passage in enumerate(passages, 1) if has_answer(passage)), 0)

    def kind(self, generation: str, answers: Sequence[str], rank: int | None) -> int:
        """One of `KINDS`."""
        if self.is_right(generation, answers):
            return RIGHT
        if f1(generation, answers) > 0:
            return WORDED
        return {None: WRONG, 0: MISSING}.get(rank, UNREAD)


class Before(NamedTuple):
    """What an earlier evaluation, or another run, made of a question."""

    generation: str | None
    right: bool | None
    detail: dict[str, Any]


@dataclass
class Questions:
    """A result file, packed for the page, and what was counted on the way.

    Attributes:
        listed: of each question `[question, answers, generation, right, generation before, right before, kind, rank]`.
        details: of each question its passages `[number, score, judgement]`, and what the list has cut.
        ranks: rank of the first passage with an answer -> questions.
        changes: (right before, right now) -> questions that were asked both times.
    """

    file: str
    step: int
    read: bool = False  # whether there are answers; else a question is right if its answer was found
    longest: int = 0  # passages of a question
    listed: Packed = field(default_factory=Packed)
    details: Packed = field(default_factory=Packed)
    kinds: Counter[int] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    changes: Counter[tuple[bool, bool]] = field(default_factory=Counter)

    @property
    def searched(self) -> int:
        """Questions for which a passage with the answer was looked for."""
        return self.ranks.total()

    def recall(self) -> dict[int, float]:
        """k -> percentage of questions with an answer among the first k passages."""
        shares, found = {}, 0
        for k in range(1, self.longest + 1 if self.searched else 1):
            found += self.ranks[k]
            shares[k] = 100 * found / self.searched
        return shares


class Reader:
    """Reads result files and packs them; passages that they share are packed once."""

    def __init__(self) -> None:
        self.passages = Distinct()  # [id, title, section, text]

    def questions(self, record: Record, evaluation: Evaluation, earlier: Mapping[tuple[str, int], Before]) -> Questions:
        """The questions of an evaluation, beside what an earlier one, or another run, made of them.

        Raises:
            DataError: a line of the result file cannot be read.
            OSError: the file cannot be read.
        """
        judging, strip = Judging.of(evaluation, record.flags), _prompt(record.flags)
        questions = Questions(evaluation.file, evaluation.step)
        for key, row in _numbered(evaluation.results):
            before = earlier.get(key, Before(None, None, {}))
            rank, right = _measure(row, judging)
            generation, answers = row.generation, row.answers
            kind = judging.kind(generation, answers, rank) if generation is not None and answers else None
            query, said = strip(row.query), " / ".join(answers)
            detail = self._detail(row) | before.detail
            if before.generation is not None:
                detail["before"] = before.generation
            if max(len(query), len(said), len(generation or "")) > LISTED:
                detail |= {"query": query, "generation": generation}
            line = [query, said, generation, right, before.generation, before.right, kind, rank]
            questions.listed.add([text[:LISTED] if isinstance(text, str) else text for text in line])
            questions.details.add(detail | {"answers": answers})
            questions.read |= generation is not None
            questions.longest = max(questions.longest, len(row.passages))
            if kind is not None:
                questions.kinds[kind] += 1
            if rank is not None:
                questions.ranks[rank] += 1
            if right is not None and before.right is not None:
                questions.changes[before.right, right] += 1
        questions.listed.finish()
        questions.details.finish()
        return questions

    def before(self, record: Record, evaluation: Evaluation, passages: bool) -> dict[tuple[str, int], Before]:
        """What an evaluation made of each question, to be looked up by another one; with its passages if asked to."""
        judging, found = Judging.of(evaluation, record.flags), {}
        for key, row in _numbered(evaluation.results):
            if row.generation is None or passages:
                _, right = _measure(row, judging)
            else:
                right = judging.is_right(row.generation, row.answers)
            detail = {f"{name} before": value for name, value in self._detail(row).items()} if passages else {}
            found[key] = Before(row.generation, right, detail)
        return found

    def _detail(self, row: "Row") -> dict[str, Any]:
        detail: dict[str, Any] = {}
        if row.passages:
            shown = row.passages[:MOST_PASSAGES]
            detail["passages"] = [[self.passages.add(_texts(p)), *_numbers(p)] for p in shown]
            if len(row.passages) > MOST_PASSAGES:
                detail["left out"] = len(row.passages) - MOST_PASSAGES
        if row.choices:
            detail["choices"] = row.choices
        return detail


class Row(NamedTuple):
    """A line of a result file."""

    query: str
    answers: list[str]
    generation: str | None
    passages: list[dict[str, Any]]
    choices: dict[str, float]  # of multiple choice: letter -> probability


def mcnemar(wins: int, losses: int) -> float:
    """The exact p of McNemar's test (1947): two-sided, by the binomial distribution, over the questions that differ."""
    n, ways, tail = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def _measure(row: Row, judging: Judging) -> tuple[int | None, bool | None]:
    """The rank of the first passage with an answer; whether the question is right, or without a reader found."""
    rank = judging.rank(row.passages, row.answers)
    if row.generation is None or not row.answers:
        return rank, None if rank is None else rank > 0
    return rank, judging.is_right(row.generation, row.answers)


def _numbered(path: Path) -> Iterator[tuple[tuple[str, int], Row]]:
    """The rows of a file, each with a key that the same question has in another file: its id, or else its query."""
    asked: Counter[str] = Counter()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = decode(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            identifier = record.get("id")
            name = f"query {record.get('query')}" if identifier is None else f"id {identifier}"
            asked[name] += 1
            yield (name, asked[name]), _row(record)


def _row(record: Mapping[str, Any]) -> Row:
    answers = [str(answer) for answer in record.get("answers") or []]
    generation = record.get("generation")
    passages = [passage for passage in record.get("passages") or [] if isinstance(passage, dict)]
    choices = {str(letter): finite(round(float(p), 4)) for letter, p in (record.get("choice_probs") or {}).items()}
    text = None if generation is None else str(generation)
    return Row(str(record.get("query") or ""), answers, text, passages, choices)


def _texts(passage: Mapping[str, Any]) -> list[str]:
    values = (passage.get(name) for name in ("id", "title", "section", "text"))
    return ["" if value is None else str(value) for value in values]


def _numbers(passage: Mapping[str, Any]) -> list[float | None]:
    score, judgement = (finite(passage.get(name)) for name in ("score", "judgement"))
    return [score] if judgement is None else [score, judgement]


def _prompt(flags: Mapping[str, Flag]) -> Callable[[str], str]:
    """A function that takes the words of the prompt from a query."""
    format = flags["qa_prompt_format"].value if "qa_prompt_format" in flags else ""
    start, field, end = format.partition("{question}")

    def strip(query: str) -> str:
        if not field or not (query.startswith(start) and query.endswith(end)):
            return query
        return query[len(start) : len(query) - len(end)] or query

    return strip


def _without_sentinels(text: str) -> str:
    return " ".join(re.sub(r"<extra_id_\d+>", " ", text).split())
