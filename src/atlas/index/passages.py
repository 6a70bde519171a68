"""Passages of a corpus: the formats it may be in, which records are passages, and what an index needs to know of them.

Formats are Atlas jsonl (`id`, `title`, `text`, `section`), BEIR's `corpus.jsonl` (`_id`, `title`, `text`, `metadata`),
Tevatron's (`docid`, `title`, `text`), FlashRAG's (`id`, `contents`: the title, a line end, the text) and DPR's tsv
(`psgs_w100.tsv`: a header `id text title`, then one passage a line, quoted as in csv).
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from atlas.files.cache import fingerprint
from atlas.files.jsonl import JSON_LINES, BadLine, JsonlCorpus, LineFormat, decode, decode_text

# What other formats call the `id`.
IDENTIFIERS = {"_id": "a BEIR corpus needs an `_id`", "docid": "a Tevatron corpus needs a `docid`"}


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
    """The passages of one or several files, each of any format, as one sequence.

    `titles_joined`: titles already hold the section.

    Raises: as `JsonlCorpus`; DataError if a `.tsv` file has no header.
    """
    parse = partial(parse_passage, join_titles=not titles_joined)
    return JsonlCorpus(paths, parse=parse, max_rows=max_passages, choose_format=passage_format)


def passage_format(path: Path, first_line: bytes) -> LineFormat:
    """The format of a file: tsv by its header, others by the fields of its first passage, else Atlas jsonl.

    Raises: ValueError if a file called `.tsv` has no header.
    """
    columns = tsv_fields(first_line.decode("utf-8", errors="replace"))
    if {"id", "text"} <= set(columns):
        return LineFormat(partial(decode_tsv, columns=columns), has_header=True)
    if first_line and path.suffix == ".tsv":
        raise ValueError(f"a .tsv corpus needs a first line that names its columns (id, text, title), found {columns}")
    try:
        record = decode(first_line)
    except ValueError:
        return JSON_LINES  # whoever reads the line is told what is wrong with it
    if "id" in record:
        return LineFormat(decode_contents) if "contents" in record and "text" not in record else JSON_LINES
    name = next((name for name in IDENTIFIERS if name in record), None)
    return LineFormat(partial(decode_identified, name=name)) if name else JSON_LINES


def tsv_fields(line: str) -> list[str]:
    """The fields of a line, unquoted if the quotes are those of a csv writer; other quotes belong to the text."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's limit of 128 KiB
    try:
        return next(csv.reader([line], delimiter="\t", strict=True), [])
    except csv.Error:  # as in `"Hello" he said`
        return line.split("\t")


def decode_tsv(line: bytes, columns: Sequence[str]) -> dict:
    fields = tsv_fields(decode_text(line))
    if len(fields) != len(columns):
        raise ValueError(f"expected {len(columns)} fields ({', '.join(columns)}) on one line, found {len(fields)}")
    return dict(zip(columns, fields, strict=True))


def decode_identified(line: bytes, name: str) -> dict:
    """A passage whose identifier is called `name`. Raises: ValueError."""
    record = decode(line)
    if name not in record:
        raise ValueError(f"a passage of {IDENTIFIERS[name]}, found {found(record, name)}")
    return {"id": record.pop(name), **record}


def decode_contents(line: bytes) -> dict:
    """A passage of FlashRAG: the first line of `contents` is its title, unless it has one. Raises: ValueError."""
    record = decode(line)
    contents = record.pop("contents", None)
    if not isinstance(contents, str):
        raise ValueError(f"a passage of a FlashRAG corpus needs `contents` (a string), found {contents!r:.40}")
    if "title" in record or "\n" not in contents:
        return {**record, "text": contents}
    title, _, text = contents.partition("\n")
    return {**record, "title": title, "text": text}


def is_verbatim(corpus: JsonlCorpus) -> bool:
    """Whether every file is Atlas jsonl and all of it is read, so that it may be linked or copied as it is."""
    return all(form is JSON_LINES for form in corpus.formats) and not len(corpus.dropped)


def saved_lines(corpus: JsonlCorpus, rows: Iterable[int], join_titles: bool = False) -> Iterator[bytes]:
    """The rows as lines of Atlas jsonl, without line ends: unchanged where they are that already.

    Titles are as in the corpus: what is saved is opened with the corpus's `titles_joined`. Or they are joined here, and
    it is opened with `titles_joined`.

    Raises: DataError at a line that cannot be decoded.
    """
    for row in rows:
        if join_titles:
            yield json.dumps(corpus[row], ensure_ascii=False).encode()
        elif corpus.format_of(row) is JSON_LINES:
            yield corpus.raw(row)
        else:
            yield json.dumps(corpus.record(row), ensure_ascii=False).encode()


def titles_joined(corpus: JsonlCorpus) -> bool:
    """What `open_passages` was told: whether the titles in the files already hold the section."""
    return not corpus.parse.keywords["join_titles"]


def fingerprint_of(corpus: JsonlCorpus) -> str:
    """Changes with the files of a corpus, their order, and which of their passages are taken.

    Of large files only a sample is read, so the time of their last change counts as well.
    """
    facts = []
    for path in corpus.paths:
        with open(path, "rb") as file:
            facts.append((fingerprint(file), path.stat().st_mtime_ns))
    return hashlib.sha256(repr([facts, len(corpus), *corpus.dropped.tolist()]).encode()).hexdigest()[:16]


def check_passages(
    corpus: JsonlCorpus,
    rows: range,
    progress: Callable[[int], object] | None = None,
    bad: list[BadLine] | None = None,
) -> np.ndarray:
    """Read every passage of the range once and return a 64-bit hash of each id, (passages,) int64.

    `progress` is told every thousand rows how many more have been read, and the rest at the end. Rows that are no
    passage are added to `bad`, if that is given.

    Raises: DataError at the first row that is not a passage.
    """
    hashes, n = np.empty(len(rows), np.int64), 0
    for start in range(0, len(rows), 1000):
        for row in rows[start : start + 1000]:
            found = corpus.read(row, lambda passage: hash_id(passage["id"]), bad)
            if found is not None:
                hashes[n] = found
                n += 1
        if progress is not None:
            progress(len(rows[start : start + 1000]))
    return hashes[:n]


def hash_id(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little", signed=True)


def count_duplicates(hashes: np.ndarray) -> int:
    """How many passages have an id that another passage before them has. 38 million take about 300 MB, not a set."""
    return len(hashes) - len(np.unique(hashes))
