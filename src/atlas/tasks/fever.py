"""Fact verification: is a claim supported, refuted, or neither?"""

import random
from collections.abc import Mapping

from atlas.tasks.base import Example, Task, short_answer_prompt

SAID = {"SUPPORTS": "true", "REFUTES": "false", "NOT ENOUGH INFO": "maybe"}


class Fever(Task):
    """Lines `{"claim": ..., "label": ...}` of FEVER (Thorne et al. 2018)."""

    fields = f"`claim` (a string) and `label` (one of {', '.join(SAID)})"

    def process(self, record: Mapping, rng: random.Random) -> Example:
        claim = self.text(record, "claim")
        label = self.text(record, "label", optional=not self.answers_needed)
        if label is not None and label not in SAID:
            raise ValueError(f"`label` is one of {', '.join(SAID)}, found {label!r:.40}")
        said = [] if label is None else [SAID[label]]
        return Example(
            query=short_answer_prompt(claim),
            target=f"<extra_id_0> {said[0]}" if said else "",
            answers=said,
            metadata=self.metadata(record) | {"clean_target": said[0] if said else None},
            id=self.identifier(record),
            passages=self.passages(record),
        )
