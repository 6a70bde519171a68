"""From documents to passages: the split into about 100 words, and writing the passages to a file.

As in the paper (Izacard et al. 2022), articles are split by section and long sections into passages of equal size.
Here a cut is moved to the end of a sentence if one is near. In scripts without spaces every character counts as a word.
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

import regex

from atlas.files.jsonl import DataError
from fetch import keeping_another
from flags import at_least

WORDS = 100
SENTENCE_END = re.compile(r"""[.!?…。．｡！？။។៕།]["'”’»)\]」』）】》〉]* ?$""")
# A full stop after these does not end a sentence: initials ("J.", "U.S."), and words before names and numbers.
ABBREVIATION = re.compile(
    r"""["'“(\[]*(?:(?:\w\.)+|(?:mr|mrs|ms|dr|prof|st|mt|ft|gen|col|capt|lt|sgt|rev|hon|sen|rep|gov|jr|sr|no|nos|vol|pp|"""
    r"""ed|eds|fig|cf|vs|ca|c|approx|al|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)\.) ?$""",
    re.IGNORECASE,
)
LIST_ITEM = re.compile(r"(?:\s*\*+(?=\s|$))+\s*")
INDENTED = re.compile(r" {2}|\t")
# Scripts without spaces between words. Those of South-East Asia have one at the end of a phrase.
EAST_ASIAN = r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{scx=Yi}"
SOUTH_EAST_ASIAN = (
    r"\p{scx=Thai}\p{scx=Lao}\p{scx=Khmer}\p{scx=Myanmar}\p{scx=Tai_Le}\p{scx=New_Tai_Lue}\p{scx=Tai_Tham}"
)
LETTER = rf"[[{EAST_ASIAN}{SOUTH_EAST_ASIAN}\p{{Tibetan}}]&&[\p{{L}}\p{{Nl}}]]"
# A character that is not to be cut: a letter with its marks, with the consonants below it (behind a virama), and with
# the vowels of Thai and Lao before or behind it; in Tibetan a syllable.
CHARACTER = (
    rf"(?:[\p{{Tibetan}}&&[\p{{L}}\p{{M}}]]+"
    rf"|[\u0e40-\u0e44\u0ec0-\u0ec4]?{LETTER}(?:\p{{M}}*(?<=[\u1039\u17d2\u1a60]){LETTER})*"
    r"[\p{M}\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3\uff9e\uff9f\u200b-\u200d]*)"
)
OPENING = r"[\p{Ps}\p{Pi}]{0,4}"
UNSPACED = regex.compile(LETTER, regex.VERSION1)
PIECE = regex.compile(
    rf"(?:{OPENING}{CHARACTER}|(?:(?!{OPENING}{LETTER})\S)+)[\p{{Pe}}\p{{Pf}}\p{{Po}}\p{{M}}]* ?", regex.VERSION1
)
PHRASE_END = regex.compile(rf"[{SOUTH_EAST_ASIAN}]\s$", regex.VERSION1)
# The end of a line between Chinese or Japanese characters is not a space.
WRAPPED = regex.compile(rf"(?<=[{EAST_ASIAN}，：；！？])[ \t]*\n[ \t]*(?=[{EAST_ASIAN}，：；！？])", regex.VERSION1)
# Soft hyphens (with the end of the line that they are at), word joiners, byte order marks, and spaces without width.
# The last are kept in South-East Asia, where they are the only sign of where a word ends.
INVISIBLE = regex.compile(rf"\xad\n?|[\u2060\ufeff]|\u200b(?![{SOUTH_EAST_ASIAN}])", regex.VERSION1)


class Section(NamedTuple):
    """A part of a document; passages do not cross its boundaries."""

    heading: str  # preceded by the headings above it: `History: Early years`; empty before the first heading
    blocks: list[str]  # paragraphs and list items


def add_words_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--words", type=at_least(1, int), default=WORDS, help=f"most words of a passage (default: {WORDS})"
    )


def heading_path(above: list[tuple[int, str]], level: int, heading: str) -> str:
    """The section's full name, `History: Early years`. `above`, the open headings above it, is updated in place."""
    while above and above[-1][0] >= level:
        above.pop()
    above.append((level, heading))
    return ": ".join(text for _, text in above if text)


def visible(text: str) -> str:
    """The text without characters that are not to be seen, as soft hyphens."""
    return text if text.isascii() else INVISIBLE.sub("", text)


def with_line_feeds(text: str) -> str:
    """The text with the line ends of Unix, whichever system's it has."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unwrapped(text: str) -> str:
    """The text without the ends of lines that stand between two Chinese or Japanese characters."""
    return text if text.isascii() else WRAPPED.sub("", text)


def words_of(block: str) -> list[str]:
    """The words of a block, each with the space behind it if there is one.

    In scripts without spaces, a word is a character with its marks and the punctuation beside it.
    """
    words = block.split()
    if block.isascii() or not UNSPACED.search(block):
        return [word + " " for word in words]
    return PIECE.findall(" ".join(words) + " ")


def blocks_of(text: str) -> list[str]:
    """Paragraphs (between blank lines) and list items (lines that begin with `* `), without line ends.

    A line below an item belongs to it if it is indented by two spaces or more, or a tab. Consecutive items are
    separated by semicolons, as in the paper, unless they already end with punctuation.
    """
    text = unwrapped(visible(text))
    blocks: list[str] = []
    fresh, in_list = True, False  # whether the next line starts a paragraph; whether the last block is a list item
    wraps = False  # whether an item is in the line above
    for line in text.split("\n"):
        marker = LIST_ITEM.match(line)
        words = " ".join(line[marker.end() if marker else 0 :].split())
        if not words:
            fresh, wraps = fresh or not marker, False
            continue
        if wraps and not marker and INDENTED.match(line):
            blocks[-1] += " " + words
            continue
        if in_list and (marker or fresh) and blocks[-1][-1] not in ".!?:;,":
            blocks[-1] += ";" if marker else "."
        if marker or fresh:
            blocks.append(words)
            in_list = bool(marker)
        else:
            blocks[-1] += " " + words
        fresh = wraps = bool(marker)
    return blocks


def split(blocks: Iterable[str], words: int = WORDS) -> list[str]:
    """Passages of at most this many words and about equal size, cut at the end of a sentence or block if one is near.

    After each passage, the rest is divided into n equal parts. The next cut is at the end of a sentence or block
    nearest to this size that makes at least half a passage and leaves at least a quarter of one. If there is none, the
    cut is exactly at this size.
    """
    text: list[str] = []
    ends: set[int] = set()  # the number of words before each end of a block or sentence
    for block in blocks:
        start = len(text)
        text += words_of(block)
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
        at_ends = (length for length in lengths if start + length in ends)
        length = left if left <= words else min(at_ends, key=lambda length: abs(length - size), default=size)
        passages.append("".join(text[start : start + length]).strip())
        start += length
    return passages


def ends_here(word: str, following: str) -> bool:
    """Whether a sentence ends between these words (in Thai and its neighbours: a phrase, which a space ends)."""
    if not word.isascii() and PHRASE_END.search(word):
        return True
    if not SENTENCE_END.search(word) or ABBREVIATION.match(word):
        return False
    return not following.lstrip("\"'“‘«([")[:1].islower()


def passages_of(identifier: str, title: str, sections: Iterable[Section], words: int = WORDS) -> list[dict]:
    """A document's passages. Their ids are `{identifier}-{n}`, n counted from 0 over all sections."""
    texts = [(visible(section.heading), text) for section in sections for text in split(section.blocks, words)]
    return [
        {"id": f"{identifier}-{number}", "title": visible(title), "section": heading, "text": text}
        for number, (heading, text) in enumerate(texts)
    ]


def batched(items: Iterable, size: int) -> Iterator[list]:
    """As `itertools.batched` of Python 3.12, but lists."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[dict], None]]:
    """A function that writes a row to a jsonl file. The file gets its name only if the block succeeds.

    Another file of this name is kept under a new one.

    Raises: DataError if a string has half of a surrogate pair.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with keeping_another(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:

        def write(row: dict) -> None:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except UnicodeEncodeError as error:
                raise DataError(f"{path}: half of a surrogate pair in {str(row.get('id'))!a:.60}") from error

        yield write
