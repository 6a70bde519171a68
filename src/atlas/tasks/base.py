"""The base class of all tasks, which is also the simplest task: a query and the text to generate for it."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atlas import config
from atlas.metrics import accuracy
from atlas.model.tokenization import LONGEST_TEXT

if TYPE_CHECKING:
    from atlas.model.tokenization import AnyReaderTokenizer


@dataclass(frozen=True)
class Judged:
    """Relevance judgements for one query."""

    relevance: Mapping[str, int]  # relevant above 0
    field: str = "id"  # of the passages: whose values, as strings, are judged


@dataclass(frozen=True)
class Example:
    """A query with its target. `answers` are the references for the metrics; the reader does not see them."""

    query: str
    target: str  # "" if there is none, which only runs without a reader accept
    answers: list[str]
    metadata: dict | None = None
    id: str | int | None = None
    passages: list[dict] | None = None  # the example's own, for --use_file_passages
    choices: dict[str, int] | None = None  # what may follow `<extra_id_0>`, and its token
    first_of_line: bool = True  # False for the further examples of a line that has several
    judged: Judged | None = None  # which passages are relevant, where that is known
    words: str = ""  # the query without the words of its prompt, for BM25; empty: the query has no others

    @property
    def words_to_find(self) -> str:
        """What BM25 searches for."""
        return self.words or self.query


@dataclass(frozen=True)
class TaskSetup:
    """What a run knows that a task may need."""

    flags: config.Tasks = field(default_factory=config.Tasks)
    tokenizer: "AnyReaderTokenizer | None" = None  # the reader's
    text_maxlength: int = config.Model.text_maxlength  # tokens of the reader's input
    answers_needed: bool = True  # False accepts lines without target and answers: enough to retrieve for them
    passages_needed: bool = False  # every line must have `passages`, which are checked
    training: bool = False  # whether the examples are trained on, or evaluated


class Task:
    """Turns the lines of a data file into examples, and scores what was generated for them.

    Attributes:
        fields: the fields of a line; skips: the lines that have no example. Both for messages.
        filters_by_id: whether a line may be a passage of the corpus, which must not be retrieved for it. With
            --leave_out_own_passage that is so for every task.
        examples_per_line: the most examples that `example` makes from a line.
        joins: whether the examples of a line are scored together, by `join`.
        cuts: how often something of a line has been cut, by what it is; who counts lines clears it.
    """

    fields = "`query` and `target` (strings)"
    skips = "no line"
    filters_by_id = False
    examples_per_line = 1
    joins = False

    def __init__(self, setup: TaskSetup) -> None:
        self.cuts: Counter[str] = Counter()
        self.answers_needed, self.passages_needed = setup.answers_needed, setup.passages_needed
        self.filters_by_id = self.filters_by_id or setup.flags.leave_out_own_passage

    def process(self, record: Mapping, rng: random.Random) -> Example | None:
        """The example of a line, or None to skip the line. All randomness comes from `rng` (see `example_rng`).

        Whether a line is skipped must not depend on chance: batches are filled with the lines that `check` counts.

        Raises: ValueError with the expected and the existing fields, or what is wrong with one.
        """
        query = self.text(record, "query")
        target = self.text(record, "target", optional=not self.answers_needed)
        return Example(
            query=query,
            target=target or "",
            answers=[] if target is None else [target],
            id=self.identifier(record),
            passages=self.passages(record),
        )

    def example(self, record: Mapping, rng: random.Random, number: int) -> Example | None:
        """Example `number` of a line, from 0. `rng` is in the same state for all examples of a line.

        None if a line has fewer, which is for evaluation only: in training each line has `examples_per_line`.
        """
        return self.process(record, rng)

    def check(self, record: Mapping) -> bool:
        """Whether a line has an example; used to check a whole file before a run. Raises: ValueError, as `process`."""
        return self.process(record, random.Random(0)) is not None

    def excluded(self, examples: Sequence[Example]) -> list[str | int | None] | None:
        """Of each example the `id` of passages that must not be retrieved for it; None if none is left out."""
        return [example.id for example in examples] if self.filters_by_id else None

    def unread(self, record: Mapping) -> Iterable[str]:
        """The fields of a line that the task does not read, for a message. Unknown here, so that none is named."""
        return ()

    def question_field(self, record: Mapping) -> str:
        """The field of a line that has the question, or whatever is asked."""
        return "query"

    def score(self, generation: str, example: Example) -> dict[str, float]:
        """The metrics of this answer by name, each from 0 to 1; the same names for every answer."""
        return {"accuracy": accuracy(generation, example.answers)}

    def join(self, rows: list[dict]) -> tuple[dict, dict[str, float]]:
        """The line's row of the result file, joined from those of its examples in order, and its scores, 0 to 1."""
        (row,) = rows
        return row, {}

    def retrieval_answers(self, example: Example) -> list[str] | None:
        """Strings, one of which a relevant passage contains; None if recall@k and MRR do not make sense."""
        return None

    def text(
        self, record: Mapping, field: str, optional: bool = False, blank: bool = False, end: bool = False
    ) -> str | None:
        """A string field, not longer than `cut` leaves it; None if it is optional and absent.

        Args:
            blank: whether it may be empty.
            end: as in `cut`.

        Raises: ValueError.
        """
        value = record.get(field)
        if value is None and optional:
            return None
        if value is None:
            raise self.missing(record, field)
        if not isinstance(value, str):
            raise ValueError(f"`{field}` must be a string, found {value!r:.40}")
        value = self.cut(value, end)
        if not blank and not value.strip():
            raise ValueError(f"`{field}` is empty")
        return value

    def texts(self, values: list, field: str) -> list[str]:
        """The strings of a list, as `text` does for one. Raises: ValueError if one is no string, or empty."""
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"`{field}` must be a list of strings, found {values!r:.60}")
        texts = [self.cut(value) for value in values]
        if not all(text.strip() for text in texts):
            raise ValueError(f"`{field}` has an empty string in it: {values!r:.60}")
        return texts

    def cut(self, text: str, end: bool = False) -> str:
        """The first LONGEST_TEXT characters of a text, or the last if `end`, so that no line fills the memory."""
        if len(text) <= LONGEST_TEXT:
            return text
        self.cuts[f"a text of more than {LONGEST_TEXT} characters"] += 1
        return text[-LONGEST_TEXT:] if end else text[:LONGEST_TEXT]

    def missing(self, record: Mapping, field: str) -> ValueError:
        """The error for a line without this field."""
        return ValueError(f"no `{field}`: expected {self.fields}, found {', '.join(record) or 'no field at all'}")

    def identifier(self, record: Mapping) -> str | int | None:
        """The line's `id`, unchanged, so that results can be joined with the data."""
        return record.get("id")

    def metadata(self, record: Mapping) -> dict:
        """The metadata for the line's row of the result file: here, its own `metadata`. Raises: ValueError."""
        metadata = record.get("metadata")
        if not isinstance(metadata or {}, dict):
            raise ValueError(f"`metadata` must be an object, found {metadata!r:.40}")
        return metadata or {}

    def passages(self, record: Mapping) -> list[dict] | None:
        """The line's own passages; if they are needed, checked and with a title. Raises: ValueError."""
        passages = record.get("passages")
        if not self.passages_needed:
            return passages
        if not isinstance(passages, list) or not passages:
            raise ValueError(
                "no `passages` (a list of objects with `title` and `text`), which --use_file_passages needs"
            )
        for rank, passage in enumerate(passages, 1):
            if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
                raise ValueError(f"passage {rank} of `passages` has no `text` (a string)")
            if not isinstance(passage.get("title") or "", str):
                title = passage["title"]
                raise ValueError(f"passage {rank} of `passages`: `title` must be a string, found {title!r:.40}")
        return [passage | {"title": passage.get("title") or ""} for passage in passages]


def short_answer_prompt(question: str) -> str:
    """The query for a question with a short answer, in the format that the published readers were trained with."""
    return f"question: {question} answer: <extra_id_0>"


def example_rng(seed: int, epoch: int, line: int) -> random.Random:
    """A random generator that depends only on these three: the same in every process and for any number of ranks."""
    return random.Random(f"{seed} {epoch} {line}")  # a string is hashed by SHA-512, not by Python's seeded hash()
