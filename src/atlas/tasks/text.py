"""The base class of the tasks that learn from plain texts, usually the passages of the index."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping

from atlas.metrics import accuracy, f1, rouge
from atlas.tasks.base import Example, Task, TaskSetup


class TextTask(Task, ABC):
    """Lines `{"id": ..., "text": ...}`; a part of the text is the query and a part the target.

    Texts that are blank or have fewer words than `--min_words_per_lm_instance` are skipped.
    """

    fields = "`id` and `text` (strings)"
    skips = "texts that are empty or have fewer words than --min_words_per_lm_instance"
    filters_by_id = True

    def __init__(self, setup: TaskSetup) -> None:
        super().__init__(setup)
        self.min_words = max(1, setup.flags.min_words_per_lm_instance or 1)

    @abstractmethod
    def pair(self, record: Mapping, rng: random.Random) -> tuple[str, str]:
        """Query and target of a line that `check` counts."""

    def metadata(self, record: Mapping) -> dict:
        return {"id": record["id"]}

    def check(self, record: Mapping) -> bool:
        self.identifier(record)
        self.passages(record)
        text = self.text(record, "text", blank=True)
        return len(text.split(maxsplit=self.min_words)) >= self.min_words

    def process(self, record: Mapping, rng: random.Random) -> Example | None:
        if not self.check(record):
            return None
        query, target = self.pair({**record, "text": self.text(record, "text")}, rng)
        return Example(
            query=query,
            target=target,
            answers=[target],
            metadata=self.metadata(record),
            id=self.identifier(record),
            passages=self.passages(record),
        )

    def identifier(self, record: Mapping) -> str | int:
        """The `id`, which is also that of the line's own passage. Raises: ValueError."""
        identifier = record.get("id")
        if identifier is None:
            raise self.missing(record, "id")
        if isinstance(identifier, bool) or not isinstance(identifier, str | int):
            raise ValueError(f"`id` must be a string, found {identifier!r:.40}")
        return identifier

    def score(self, generation: str, example: Example) -> dict[str, float]:
        """Metrics of raw words, case-sensitive; white space at the ends of a text is ignored."""
        prediction, reference = generation.strip(), example.answers[0].strip()
        return {
            "accuracy": accuracy(prediction, [reference]),
            "f1": f1(prediction, [reference], normalize=None),
            **rouge(prediction, reference),
        }
