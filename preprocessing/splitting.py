"""From documents to passages: the split into about 100 words, and the file that passages go into.

The paper (Izacard et al. 2022) splits articles by section and long sections into passages of equal size. So do these
functions, and where a sentence ends near the place of a cut, the cut is there.
"""

import argparse
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from atlas.files.jsonl import DataError, replacing
from flags import at_least

WORDS = 100
SENTENCE_END = re.compile(r"""[.!?…。！？]["'”’»)\]]*$""")
# A full stop behind these ends no sentence: initials ("J.", "U.S."), and what stands before names and numbers.
ABBREVIATION = re.compile(
    r"""["'“(\[]*(?:(?:\w\.)+|(?:mr|mrs|ms|dr|prof|st|mt|ft|gen|col|capt|lt|sgt|rev|hon|sen|rep|gov|jr|sr|no|nos|vol|pp|"""
    r"""ed|eds|fig|cf|vs|ca|c|approx|al|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)\.)$""",
    re.IGNORECASE,
)
LIST_ITEM = re.compile(r"[*\s]*\*\s*")


class Section(NamedTuple):
    """A piece of a document that no passage reaches out of."""

    heading: str  # with those above it: `History: Early years`; empty before the first heading
    blocks: list[str]  # paragraphs and list items


def add_words_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--words", type=at_least(1, int), default=WORDS, help=f"a passage has at most (default: {WORDS})"
    )


def heading_path(above: list[tuple[int, str]], level: int, heading: str) -> str:
    """The section's full name, `History: Early years`; `above` holds the headings it is under, and is brought on."""
    while above and above[-1][0] >= level:
        above.pop()
    above.append((level, heading))
    return ": ".join(text for _, text in above if text)


def blocks_of(text: str) -> list[str]:
    """Paragraphs (between blank lines) and list items (lines that begin with `* `), without line ends.

    Items that follow one another are separated by semicolons, as in the paper, unless they have punctuation already.
    """
    blocks: list[str] = []
    fresh, in_list = True, False  # whether the next line begins a paragraph; whether the last block is a list item
    for line in text.split("\n"):
        marker = LIST_ITEM.match(line)
        words = " ".join(line[marker.end() if marker else 0 :].split())
        if not words:
            fresh = fresh or not marker
            continue
        if in_list and (marker or fresh) and blocks[-1][-1] not in ".!?:;,":
            blocks[-1] += ";" if marker else "."
        if marker or fresh:
            blocks.append(words)
            in_list = bool(marker)
        else:
            blocks[-1] += " " + words
        fresh = bool(marker)
    return blocks


def split(blocks: Iterable[str], words: int = WORDS) -> list[str]:
    """Passages of at most so many words and about the same size, cut where sentences or blocks end if that is near.

    From where the last passage ended, what is left would make n equal passages. The cut is at the end nearest to that
    size, among those that make at least half a passage and leave at least a quarter of one; where none is, just there.
    """
    text: list[str] = []
    ends: set[int] = set()  # how many words stand before the end of a block or sentence
    for block in blocks:
        start = len(text)
        text += block.split()
        ends.update(
            start + i for i, (word, following) in enumerate(pairwise(text[start:]), 1) if ends_here(word, following)
        )
        ends.add(len(text))
    passages = []
    start = 0
    while start < len(text):
        left = len(text) - start
        size = math.ceil(left / math.ceil(left / words))
        lengths = range((words + 1) // 2, min(words, left - words // 4) + 1)
        whole = (length for length in lengths if start + length in ends)
        length = left if left <= words else min(whole, key=lambda length: abs(length - size), default=size)
        passages.append(" ".join(text[start : start + length]))
        start += length
    return passages


def ends_here(word: str, following: str) -> bool:
    """Whether a sentence ends between these words."""
    if not SENTENCE_END.search(word) or ABBREVIATION.match(word):
        return False
    return not following.lstrip("\"'“‘«([")[:1].islower()


def passages_of(identifier: str, title: str, sections: Iterable[Section], words: int = WORDS) -> list[dict]:
    """A document's passages; their ids are `{identifier}-{n}`, n from 0 through all its sections."""
    texts = [(section.heading, text) for section in sections for text in split(section.blocks, words)]
    return [
        {"id": f"{identifier}-{number}", "title": title, "section": heading, "text": text}
        for number, (heading, text) in enumerate(texts)
    ]


def batched(items: Iterable, size: int) -> Iterator[list]:
    """As Python 3.12's, in lists."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[dict], None]]:
    """What writes a row to a jsonl file, which has its name only when the block has ended well.

    Raises: DataError if a string has half of a surrogate pair.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:

        def write(row: dict) -> None:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except UnicodeEncodeError as error:
                raise DataError(f"{path}: half of a surrogate pair in {str(row.get('id'))!a:.60}") from error

        yield write
