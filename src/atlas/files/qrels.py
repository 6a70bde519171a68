"""Relevance judgements of passages for queries, in TREC's or BEIR's format."""

from collections.abc import Mapping
from pathlib import Path

from atlas.files.jsonl import BYTE_ORDER_MARK, DataError, decode_text, open_existing

Judgements = Mapping[str, Mapping[str, int]]  # query to passage to relevance, relevant above 0


def read_judgements(path: Path) -> Judgements:
    """The lines `query iteration passage relevance` (TREC's) or `query passage relevance` (BEIR's) of a file.

    Fields are separated by white space of any kind. Below a header as BEIR's (it ends in `score`) that has tabs, they
    are separated by tabs, so that ids may contain spaces.

    Raises: FileNotFoundError; DataError with file and line, also where a passage is judged again with another result.
    """
    judgements: dict[str, dict[str, int]] = {}
    lines: dict[tuple[str, str], int] = {}  # where each is judged first
    separator = None
    with open_existing(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = decode_text(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
                if number == 1 and text.split()[-1:] == ["score"]:
                    separator = "\t" if "\t" in text else None
                elif text:
                    query, passage, relevance = judgement(text, separator)
                    first = lines.setdefault((query, passage), number)
                    before = judgements.setdefault(query, {}).setdefault(passage, relevance)
                    if before != relevance:
                        here = f"passage {passage} is judged {relevance} for query {query}"
                        raise ValueError(f"{here}, and {before} in line {first}")
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    return judgements


def judgement(text: str, separator: str | None) -> tuple[str, str, int]:
    """Query, passage and relevance. Raises: ValueError."""
    fields = [field.strip() for field in text.split(separator)]
    if separator and (len(fields) != 3 or not all(fields)):
        fields = text.split()
    if len(fields) not in (3, 4):
        raise ValueError(f"expected query, [iteration,] passage, relevance; found {len(fields)} fields")
    try:
        return fields[0], fields[-2], int(fields[-1])
    except ValueError:
        raise ValueError(f"the relevance of a passage is a whole number, found {fields[-1]!r:.40}") from None
