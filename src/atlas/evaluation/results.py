"""Result files: one JSON object a line, one line an example, in the order of the data file."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from atlas.files.jsonl import replacing
from atlas.tasks.base import Example


class ResultsWriter:
    """Writes rows beside `path` and renames the file when the `with` block ends well.

    If it does not, nothing is left behind and a file that was there before stays as it was.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        beside = self._stack.enter_context(replacing(self.path))
        self._file = self._stack.enter_context(open(beside, "w", encoding="utf-8", newline="\n"))
        return self

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


def result_row(
    example: Example,
    generation: str | None,
    passages: Sequence[dict] | None,
    scores: Sequence[float] | None,
    write_passages: bool = True,
    choice_logits: dict[str, float] | None = None,
) -> dict:
    """The row of an example, with the keys of the published result files in their order.

    `generation` None: nothing was read. `passages` None: nothing was retrieved. `scores` are those of the passages, in
    the same order; None leaves the passages as they are. `metadata`, `id` and `choice_logits` are there if the example
    has them.
    """
    row = {"query": example.query, "answers": example.answers}
    if generation is not None:
        row["generation"] = generation
    if passages is not None and write_passages:
        row["passages"] = list(passages)
        if scores is not None:
            row["passages"] = [p | {"score": six_digits(s)} for p, s in zip(passages, scores, strict=True)]
    if example.metadata is not None:
        row["metadata"] = example.metadata
    if example.id is not None:
        row["id"] = example.id
    if choice_logits is not None:
        row["choice_logits"] = {choice: six_digits(logit) for choice, logit in choice_logits.items()}
    return row


def six_digits(number: float) -> float:
    """The digits behind change with the shapes of matrix products, and nobody reads them."""
    return float(f"{number:.6g}")
