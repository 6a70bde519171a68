"""Fact verification: is a claim supported, refuted, or neither?"""

import random
from collections.abc import Mapping

from atlas.tasks.base import Example, Task, short_answer_prompt

ANSWERS = {"SUPPORTS": "true", "REFUTES": "false", "NOT ENOUGH INFO": "maybe"}


class Fever(Task):
    """Lines `{"claim": ..., "label": ...}` of FEVER (Thorne et al. 2018)."""

    fields = f"`claim` (a string) and `label` (one of {', '.join(ANSWERS)})"

    def question_field(self, record: Mapping) -> str:
        return "claim"

    def process(self, record: Mapping, rng: random.Random) -> Example:
        claim = self.text(record, "claim")
        label = self.text(record, "label", optional=not self.answers_needed)
        if label is not None and label not in ANSWERS:
            raise ValueError(f"`label` must be one of {', '.join(ANSWERS)}, found {label!r:.40}")
        answers = [] if label is None else [ANSWERS[label]]
        return Example(
            query=short_answer_prompt(claim),
            words=claim,
            target=f"<extra_id_0> {answers[0]}" if answers else "",
            answers=answers,
            metadata=self.metadata(record) | {"clean_target": answers[0] if answers else None},
            id=self.identifier(record),
            passages=self.passages(record),
        )
