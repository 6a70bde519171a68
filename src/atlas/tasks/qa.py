"""Question answering with short answers."""

import random
from collections.abc import Iterable, Mapping, Sequence

from atlas.metrics import exact_match, f1
from atlas.model.prompts import asked
from atlas.model.tokenization import LONGEST_TEXT, fill_in
from atlas.tasks.base import Example, Task, TaskSetup

ANSWERS = ("answers", "golden_answers", "answer")  # as Atlas, FlashRAG and NQ-open call them: the first that is there


class QuestionAnswering(Task):
    """Lines `{"question": ..., "answers": [...]}`, optionally with the `target` to train on.

    FlashRAG's `golden_answers` and NQ-open's `answer` are read as well, and BEIR's queries `{"_id": ..., "text": ...}`.
    A line of a result file has the finished `query` in the place of the question.
    """

    fields = "`question` (a string), `answers` (a list of strings), optionally `target` (a string)"

    def __init__(self, setup: TaskSetup) -> None:
        super().__init__(setup)
        self.prompt_format = setup.flags.qa_prompt_format

    def process(self, record: Mapping, rng: random.Random) -> Example:
        question = self.question(record)
        target = self.text(record, "target", optional=True)
        answers = self.answers(record) or ([] if target is None else [target])
        if not answers and self.answers_needed:
            empty = "`answers` is empty" if record.get(first_given(record, ANSWERS)) == [] else "no `answers`"
            raise ValueError(f"{empty}: expected {self.fields}, found {', '.join(record)}")
        if target is None and answers:
            target = rng.choice(answers)
        finished = self.question_field(record) == "query"
        query = question if finished else fill_in(self.prompt_format, LONGEST_TEXT + 1, question=question)
        return Example(
            query=self.cut(query),
            words=asked(question) if finished else question,
            target="" if target is None else f"<extra_id_0> {target}",
            answers=answers,
            metadata=self.metadata(record),
            id=self.identifier(record),
            passages=self.passages(record),
        )

    def question(self, record: Mapping) -> str:
        """The question to put into `prompt_format`. Raises: ValueError."""
        return self.text(record, self.question_field(record))

    def question_field(self, record: Mapping) -> str:
        if record.get("question") is not None:
            return "question"
        if "_id" in record and "text" in record:
            return "text"
        of_results = "query" in record and ("generation" in record or "passages" in record)
        return "query" if of_results else "question"

    def answers(self, record: Mapping) -> list[str]:
        field = first_given(record, ANSWERS)
        answers = record.get(field)
        if answers is None:
            return []
        if isinstance(answers, str) and field == "answer":
            answers = [answers]
        if not isinstance(answers, list):
            raise ValueError(f"`{field}` must be a list of strings, found {answers!r:.60}")
        return self.texts(answers, field)

    def identifier(self, record: Mapping) -> str | int | None:
        return record.get(first_given(record, ("id", "_id")))

    def unread(self, record: Mapping) -> Iterable[str]:
        chosen = first_given(record, ANSWERS), first_given(record, ("id", "_id")), self.question_field(record)
        given = {name for name, value in record.items() if value is not None}
        return given - {*chosen, "target", "metadata", "passages"}

    def score(self, generation: str, example: Example) -> dict[str, float]:
        return {
            "exact_match": exact_match(generation, example.answers),
            "f1": f1(generation, example.answers),
        }

    def retrieval_answers(self, example: Example) -> list[str] | None:
        return example.answers or None


def first_given(record: Mapping, names: Sequence[str]) -> str:
    """The first of the names under which the record has something, or the first of all."""
    return next((name for name in names if record.get(name) is not None), names[0])
