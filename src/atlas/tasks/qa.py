"""Question answering with short answers."""

import random
from collections.abc import Mapping

from atlas.metrics import exact_match, f1
from atlas.tasks.base import Example, Task


class QA(Task):
    """Lines `{"question": ..., "answers": [...]}`, optionally with the `target` to train on.

    `prompt_format` makes the query from `{question}`.
    """

    metrics = ("exact_match", "f1")
    fields = "`question` (a string), `answers` (a list of strings), optionally `target` (a string)"

    def __init__(self, prompt_format: str, answers_needed: bool = True, passages_needed: bool = False):
        super().__init__(answers_needed, passages_needed)
        self.prompt_format = prompt_format

    def process(self, record: Mapping, rng: random.Random) -> Example:
        question = self.question(record)
        target = self.text(record, "target", optional=True)
        answers = self.answers(record) or ([] if target is None else [target])
        if not answers and self.answers_needed:
            raise ValueError(f"no `answers`: expected {self.fields}, found {', '.join(record)}")
        if target is None and answers:
            target = rng.choice(answers)
        return Example(
            query=self.prompt_format.format(question=question),
            target="" if target is None else f"<extra_id_0> {target}",
            answers=answers,
            metadata=self.metadata(record),
            id=self.identifier(record),
            passages=self.passages(record),
        )

    def question(self, record: Mapping) -> str:
        """What is asked, to be put into `prompt_format`. Raises: ValueError."""
        return self.text(record, "question")

    def answers(self, record: Mapping) -> list[str]:
        answers = record.get("answers")
        if answers is None:
            return []
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"`answers` is a list of strings, found {answers!r:.60}")
        return answers

    def score(self, generation: str, example: Example) -> dict[str, float]:
        return {
            "exact_match": exact_match(generation, example.answers),
            "f1": f1(generation, example.answers),
        }

    def retrieval_answers(self, example: Example) -> list[str] | None:
        return example.answers or None
