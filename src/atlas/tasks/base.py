"""What a task is, and the plainest one: a query and the text that shall be generated for it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atlas import config
from atlas.metrics import accuracy

if TYPE_CHECKING:
    from atlas.model.tokenization import ReaderTokenizer


@dataclass(frozen=True)
class Example:
    """One question to the system. `answers` are the references of the metrics; they are not shown to the reader."""

    query: str
    target: str  # "" if there is none, which is fine only where nothing is read
    answers: list[str]
    metadata: dict | None = None
    id: str | int | None = None
    passages: list[dict] | None = None  # the example's own, for --use_file_passages
    choices: dict[str, int] | None = None  # what may stand behind `<extra_id_0>`, with the token that says so
    first_of_line: bool = True  # where a line gives several examples


@dataclass(frozen=True)
class TaskSetup:
    """What a run knows that a task may need."""

    flags: config.Tasks = field(default_factory=config.Tasks)
    tokenizer: "ReaderTokenizer | None" = None  # the reader's
    text_maxlength: int = config.Model.text_maxlength  # tokens of the reader's input
    answers_needed: bool = True  # False accepts lines without target and answers: enough to retrieve for them
    passages_needed: bool = False  # every line must have `passages`, which are checked
    training: bool = False  # whether the examples are trained on, or evaluated


class Task:
    """Turns the lines of a data file into examples, and scores what was generated for them.

    Attributes:
        fields: what a line holds; skips: which lines give no example. Both for messages.
        filters_by_id: whether a line may be a passage of the corpus, which must not be found for itself.
        examples_per_line: most examples that `example` gives of a line.
        joins: whether the examples of a line are measured together, by `join`.
    """

    metrics: tuple[str, ...] = ("accuracy",)
    fields = "`query` and `target` (strings)"
    skips = "no line"
    filters_by_id = False
    examples_per_line = 1
    joins = False

    def __init__(self, setup: TaskSetup) -> None:
        self.answers_needed, self.passages_needed = setup.answers_needed, setup.passages_needed

    def process(self, record: Mapping, rng: random.Random) -> Example | None:
        """The example of a line, None to skip the line. All chance comes from `rng` (see `example_rng`).

        Raises: ValueError with the fields expected and those found, or what is wrong with one.
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
        """Example `number` of a line, from 0, None if there is none; `rng` is the same for all of a line's examples."""
        return self.process(record, rng)

    def check(self, record: Mapping) -> bool:
        """Whether a line gives an example, for reading a whole file before a run. Raises: ValueError, as `process`."""
        return self.process(record, random.Random(0)) is not None

    def score(self, generation: str, example: Example) -> dict[str, float]:
        """The values, 0 to 1, of `metrics`."""
        return {"accuracy": accuracy(generation, example.answers)}

    def join(self, rows: list[dict]) -> tuple[dict, dict[str, float]]:
        """A line's row of the result file, of the rows of its examples in order; values, 0 to 1, of the whole line."""
        (row,) = rows
        return row, {}

    def retrieval_answers(self, example: Example) -> list[str] | None:
        """Strings of which a useful passage holds one; None where recall@k and MRR make no sense."""
        return None

    def text(self, record: Mapping, field: str, optional: bool = False, blank: bool = False) -> str | None:
        """A string field, not blank unless it may be; None if it is optional and missing. Raises: ValueError."""
        value = record.get(field)
        if value is None and optional:
            return None
        if value is None:
            raise self.missing(record, field)
        if not isinstance(value, str):
            raise ValueError(f"`{field}` is a string, found {value!r:.40}")
        if not blank and not value.strip():
            raise ValueError(f"`{field}` is empty")
        return value

    def missing(self, record: Mapping, field: str) -> ValueError:
        """What to say of a line without this field."""
        return ValueError(f"no `{field}`: expected {self.fields}, found {', '.join(record) or 'no field at all'}")

    def identifier(self, record: Mapping) -> str | int | None:
        """The `id` as it stands, so that results can be joined with what was asked."""
        return record.get("id")

    def metadata(self, record: Mapping) -> dict:
        """What goes into the line's row of the result file: here, its own `metadata`. Raises: ValueError."""
        metadata = record.get("metadata")
        if not isinstance(metadata or {}, dict):
            raise ValueError(f"`metadata` is an object, found {metadata!r:.40}")
        return metadata or {}

    def passages(self, record: Mapping) -> list[dict] | None:
        """The line's own passages as they are, or checked and with a title if they are needed. Raises: ValueError."""
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
                raise ValueError(f"passage {rank} of `passages`: `title` is a string, found {passage['title']!r:.40}")
        return [passage | {"title": passage.get("title") or ""} for passage in passages]


def short_answer_prompt(question: str) -> str:
    """The query of a question with a short answer, as the published readers were trained."""
    return f"question: {question} answer: <extra_id_0>"


def example_rng(seed: int, epoch: int, line: int) -> random.Random:
    """A generator that depends on nothing but these three: the same in every process, at every world size."""
    return random.Random(f"{seed} {epoch} {line}")  # a string is hashed by SHA-512, not by Python's seeded hash()
