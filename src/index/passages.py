"""Passages of a corpus: which records are passages, and what an index needs to know of them."""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from src.jsonl import JsonlCorpus


def parse_passage(record: dict, join_titles: bool = True) -> dict:
    """A passage of the published format: `id`, `title`, `text`, all other fields kept.

    An integer `id` becomes its string, a missing `title` the empty one. The title is joined with a non-empty `section`
    to `{title}: {section}`, unless that has been done already (`join_titles=False`).

    Raises: ValueError with the reason if `id` or `text` is missing or a field is of the wrong type.
    """
    identifier, text = record.get("id"), record.get("text")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if not isinstance(identifier, str) or not identifier:
        raise ValueError(f"a passage needs an `id` (a string), found {found(record, 'id')}")
    if not isinstance(text, str):
        raise ValueError(f"a passage needs a `text` (a string), found {found(record, 'text')}")
    for field in ("title", "section"):
        if not isinstance(record.get(field), str | None):
            raise ValueError(f"the `{field}` of a passage is a string, found {found(record, field)}")
    title, section = record.get("title") or "", record.get("section")
    if section and join_titles:
        title = f"{title}: {section}"
    return record | {"id": identifier, "title": title, "text": text}


def found(record: dict, field: str) -> str:
    return f"{record[field]!r:.40}" if field in record else f"only {', '.join(record) or 'an empty object'}"


def open_passages(
    paths: str | os.PathLike | Sequence[str | os.PathLike], max_passages: int = -1, titles_joined: bool = False
) -> JsonlCorpus:
    """The passages of one or several files as one sequence. `titles_joined`: titles already hold the section.

    Another jsonl format is another function from a record to a passage, to be chosen here.

    Raises: as `JsonlCorpus`.
    """
    return JsonlCorpus(paths, parse=partial(parse_passage, join_titles=not titles_joined), max_rows=max_passages)


def check_passages(corpus: JsonlCorpus, rows: range, progress: Callable[[int], object] | None = None) -> np.ndarray:
    """Read every passage of the range once and return a 64-bit hash of each id, (rows,) int64.

    `progress` is told every thousand rows how many more have been read, and the rest at the end.

    Raises: DataError at the first row that is not a passage.
    """
    hashes = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), 1000):
        for i, row in enumerate(rows[start : start + 1000], start):
            hashes[i] = hash_id(corpus[row]["id"])
        if progress is not None:
            progress(i + 1 - start)
    return hashes


def hash_id(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little", signed=True)


def count_duplicates(hashes: np.ndarray) -> int:
    """How many passages have an id that another passage before them has. 38 million take about 300 MB, not a set."""
    return len(hashes) - len(np.unique(hashes))
