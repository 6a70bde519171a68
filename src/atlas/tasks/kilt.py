"""The knowledge-intensive tasks of KILT (Petroni et al. 2021), in KILT's own format."""

import random
from collections.abc import Iterable, Mapping

from atlas.metrics import VERDICTS, exact_match, f1
from atlas.tasks.base import Example, Judged, Task, short_answer_prompt


class KILT(Task):
    """Lines `{"input": ..., "output": [{"answer": ..., "provenance": [{"wikipedia_id": ...}, ...]}, ...]}`.

    The pages of the provenance are judgements: relevant are the passages with one of their `wikipedia_id`s.
    Lines whose `filename` contains `fever` have verdicts for answers: SUPPORTS is `true`, all else `false`.
    """

    fields = "`input` (a string) and `output` (a list of objects, at least one with an `answer`, a string)"

    def question_field(self, record: Mapping) -> str:
        return "input"

    def process(self, record: Mapping, rng: random.Random) -> Example:
        question = self.text(record, "input")
        answers = self.answers(record)
        target = rng.choice(answers) if answers else None
        return Example(
            query=short_answer_prompt(question),
            words=question,
            target="" if target is None else f"<extra_id_0> {target}",
            answers=answers,
            metadata=self.metadata(record) | {"clean_target": target},
            id=self.identifier(record),
            passages=self.passages(record),
            judged=self.judged(record),
        )

    def answers(self, record: Mapping) -> list[str]:
        if record.get("output") is None and self.answers_needed:
            raise self.missing(record, "output")
        answers = [part["answer"] for part in objects(record, "output") if part.get("answer") is not None]
        if not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"`answer` in `output` must be a string, found {answers!r:.60}")
        answers = self.texts(answers, "output")
        if not answers and self.answers_needed:
            raise ValueError(f"no `answer` in `output`: expected {self.fields}")
        if "fever" in (self.text(record, "filename", optional=True, blank=True) or ""):
            return ["true" if answer == "SUPPORTS" else "false" for answer in answers]
        return answers

    def judged(self, record: Mapping) -> Judged | None:
        pages = [page for part in objects(record, "output") for page in objects(part, "provenance")]
        relevance = {str(page["wikipedia_id"]): 1 for page in pages if page.get("wikipedia_id") is not None}
        return Judged(relevance, field="wikipedia_id") if relevance else None

    def unread(self, record: Mapping) -> Iterable[str]:
        output = objects(record, "output")
        pages = (page for part in output for page in objects(part, "provenance"))
        return {
            *(record.keys() - {"id", "input", "output", "filename", "metadata", "passages"}),
            *(f"output.{name}" for part in output for name in part.keys() - {"answer", "provenance"}),
            *(f"output.provenance.{name}" for page in pages for name in page.keys() - {"wikipedia_id"}),
        }

    def score(self, generation: str, example: Example) -> dict[str, float]:
        normalised = {"exact_match": exact_match(generation, example.answers), "f1": f1(generation, example.answers)}
        return super().score(generation, example) | normalised

    def retrieval_answers(self, example: Example) -> list[str] | None:
        return None if set(example.answers) <= VERDICTS else example.answers


def objects(record: Mapping, field: str) -> list[dict]:
    """The objects of a list, none if it is absent. Raises: ValueError."""
    values = record.get(field) or []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"`{field}` must be a list of objects, found {values!r:.60}")
    return values
