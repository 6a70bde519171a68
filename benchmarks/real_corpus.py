"""A larger corpus of real texts: windows of consecutive sentences, out of the passages of smaller ones.

    python -m benchmarks.real_corpus data/real/corpus.jsonl demo/data/passages.jsonl --output windows.jsonl

A few thousand passages are too few to measure an index by. A window is one to --sentences consecutive sentences of a
section, also across the ends of its passages. So windows overlap, as passages about one thing do, and no text is there
twice. Of more than --windows, a sample is taken, the same each time.
"""

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from atlas.files.jsonl import JsonlCorpus, replacing

SENTENCE_END = re.compile(r"""(?<=[a-z0-9)\]"”’][.!?;]) (?=[A-Z0-9"“(])""")


def windows_of(section: list[dict], longest: int) -> Iterator[dict]:
    """The windows of consecutive passages. Their ids are the first passage's, and which sentence is the first."""
    sentences = [sentence for passage in section for sentence in SENTENCE_END.split(passage["text"].strip())]
    for first, number in itertools.product(range(len(sentences)), range(1, longest + 1)):
        if first + number <= len(sentences):
            text = " ".join(sentences[first : first + number])
            yield {"id": f"{section[0]['id']}:{first}+{number}", "title": section[0].get("title", ""), "text": text}


def sample(passages: Iterable[dict], number: int, longest: int = 8) -> list[dict]:
    """At most this many windows, no text of which is there twice."""
    sections = itertools.groupby(passages, lambda passage: (passage.get("title"), passage.get("section")))
    distinct = {window["text"]: window for _, section in sections for window in windows_of(list(section), longest)}
    return sorted(distinct.values(), key=lambda window: hashlib.sha256(window["text"].encode()).digest())[:number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passages", nargs="+", type=Path, help="corpora in Atlas's jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200_000, help="at most so many (200,000)")
    parser.add_argument("--sentences", type=int, default=8, help="of the longest window (8)")
    arguments = parser.parse_args()
    passages = JsonlCorpus(arguments.passages)
    windows = sample(passages, arguments.windows, arguments.sentences)
    with replacing(arguments.output) as beside, open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(window, ensure_ascii=False) + "\n" for window in windows)
    print(f"{arguments.output}: {len(windows):,} windows of {len(passages):,} passages")


if __name__ == "__main__":
    main()
