"""The knowledge-intensive tasks of KILT (Petroni et al. 2021), in KILT's own format."""

import random
from collections.abc import Mapping

from atlas.metrics import exact_match, f1
from atlas.tasks.base import Example, Task, short_answer_prompt

VERDICTS = {"true", "false"}  # not searched for in passages


class KILT(Task):
    """Lines `{"input": ..., "output": [{"answer": ...}, ...]}`; other parts of `output` (provenance) are ignored.

    Lines whose `filename` contains `fever` have verdicts for answers: SUPPORTS is `true`, all else `false`.
    """

    metrics = ("accuracy", "exact_match", "f1")
    fields = "`input` (a string) and `output` (a list of objects, at least one with an `answer`, a string)"

    def process(self, record: Mapping, rng: random.Random) -> Example:
        question = self.text(record, "input")
        answers = self.answers(record)
        target = rng.choice(answers) if answers else None
        return Example(
            query=short_answer_prompt(question),
            target="" if target is None else f"<extra_id_0> {target}",
            answers=answers,
            metadata=self.metadata(record) | {"clean_target": target},
            id=self.identifier(record),
            passages=self.passages(record),
        )

    def answers(self, record: Mapping) -> list[str]:
        output = record.get("output")
        if output is None and self.answers_needed:
            raise self.missing(record, "output")
        if not isinstance(output or [], list) or not all(isinstance(part, dict) for part in output or []):
            raise ValueError(f"`output` must be a list of objects, found {output!r:.60}")
        answers = [part["answer"] for part in output or [] if part.get("answer") is not None]
        if not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"`answer` in `output` must be a string, found {answers!r:.60}")
        answers = self.texts(answers, "output")
        if not answers and self.answers_needed:
            raise ValueError(f"no `answer` in `output`: expected {self.fields}")
        if "fever" in (self.text(record, "filename", optional=True, blank=True) or ""):
            return ["true" if answer == "SUPPORTS" else "false" for answer in answers]
        return answers

    def score(self, generation: str, example: Example) -> dict[str, float]:
        normalised = {"exact_match": exact_match(generation, example.answers), "f1": f1(generation, example.answers)}
        return super().score(generation, example) | normalised

    def retrieval_answers(self, example: Example) -> list[str] | None:
        return None if set(example.answers) <= VERDICTS else example.answers
