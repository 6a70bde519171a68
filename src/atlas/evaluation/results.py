"""Result files: one JSON object a line, one line an example, in the order of the data file."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from atlas.files.jsonl import replacing
from atlas.runtime.reporting import six_digits
from atlas.tasks.base import Example


@contextmanager
def results_writer(path: Path) -> Iterator[Callable[[dict], None]]:
    """A function that writes a row to a file beside `path`, which is renamed when the `with` block ends well.

    If it does not, nothing is left behind, and a file that was there before stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:

        def write(row: dict) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


def result_row(
    example: Example,
    generation: str | None,
    passages: Sequence[dict] | None,
    scores: Sequence[float] | None,
    write_passages: bool = True,
    choice_logits: dict[str, float] | None = None,
    judgements: Sequence[float] | None = None,
) -> dict:
    """The row of an example, with the keys of the published result files in their order.

    `generation` None: nothing was read. `passages` None: nothing was retrieved. `scores` and `judgements` are those of
    the passages, in the same order; None leaves the passages as they are. `metadata`, `id` and `choice_logits` are
    there if the example has them.
    """
    row = {"query": example.query, "answers": example.answers}
    if generation is not None:
        row["generation"] = generation
    if passages is not None and write_passages:
        row["passages"] = list(passages)
        if scores is not None:
            row["passages"] = [p | {"score": six_digits(s)} for p, s in zip(passages, scores, strict=True)]
        if judgements is not None:
            pairs = zip(row["passages"], judgements, strict=True)
            row["passages"] = [p | {"judgement": six_digits(judgement)} for p, judgement in pairs]
    if example.metadata is not None:
        row["metadata"] = example.metadata
    if example.id is not None:
        row["id"] = example.id
    if choice_logits is not None:
        row["choice_logits"] = {choice: six_digits(logit) for choice, logit in choice_logits.items()}
    return row
