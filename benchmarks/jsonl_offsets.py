"""How fast the line offsets of a jsonl file are found, compared with reading it line by line in Python.

    python -m benchmarks.jsonl_offsets --megabytes 1000
    python -m benchmarks.jsonl_offsets --file corpus.jsonl

Both ways read the file from the page cache; the fastest of the repeats counts. Then rows are read at random, and on
Linux also from the disk.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from atlas.files.jsonl import JsonlCorpus, find_offsets, open_lines  # noqa: E402


def write_corpus(path: Path, megabytes: int) -> None:
    rng, size, row = random.Random(0), 0, 0
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = " ".join(rng.choices(words, k=rng.randint(60, 140)))
            size += file.write(json.dumps({"id": str(row), "title": rng.choice(words), "text": text}) + "\n")
            row += 1


def offsets_line_by_line(path: Path) -> np.ndarray:
    offsets, position = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
    return np.array(offsets)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(path: Path, repeats: int, rows: int) -> None:
    text, known, _ = open_lines(path)
    if not np.array_equal(offsets_line_by_line(path), known):  # also brings the file into the page cache
        raise SystemExit("the two ways disagree")
    # Each repeat maps the file again, as a new process would, so that page faults are included.
    fast = min(seconds(lambda: find_offsets(open_lines(path)[0])) for _ in range(repeats))
    plain = min(seconds(lambda: offsets_line_by_line(path)) for _ in range(repeats))
    megabytes = len(text) / 1e6
    print(f"{megabytes:.0f} MB, {len(known)} lines")
    print(f"offsets, vectorised    {megabytes / fast:8.0f} MB/s")
    print(f"offsets, line by line  {megabytes / plain:8.0f} MB/s")
    print(f"ratio                  {plain / fast:8.1f}")
    print(f"opened with the cache  {1000 * seconds(lambda: JsonlCorpus(path)):8.2f} ms")
    corpus = JsonlCorpus(path)
    picks = random.Random(1).choices(range(len(corpus)), k=rows)
    print(f"random rows            {1e6 / rows * seconds(lambda: [corpus.raw(i) for i in picks]):8.2f} µs a line")
    print(f"random rows, decoded   {1e6 / rows * seconds(lambda: corpus[picks]):8.2f} µs a row")


def measure_cold(path: Path, rows: int) -> None:
    """Rows that are not in the page cache, looked up together and one by one. Nobody else may have mapped the file."""
    for name, read in (
        ("looked up together", lambda corpus, picks: corpus[picks]),
        ("one by one", lambda corpus, picks: [corpus[i] for i in picks]),
    ):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        corpus = JsonlCorpus(path)
        picks = random.Random(1).choices(range(len(corpus)), k=rows)
        before = bytes_read()
        taken = seconds(partial(read, corpus, picks))
        kilobytes = (bytes_read() - before) / 1000 / len(picks)
        del corpus  # pages that are mapped stay
        print(f"from the disk, {name:18} {1e6 / len(picks) * taken:8.2f} µs a row, {kilobytes:.1f} kB read for each")


def bytes_read() -> int:
    """What this process has had read from the disk."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="an existing jsonl file; otherwise one is made up")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the made-up file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000, help="rows read at random")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = arguments.file or Path(directory) / "corpus.jsonl"
        if not arguments.file:
            write_corpus(path, arguments.megabytes)
        measure(path, arguments.repeats, arguments.rows)
        if hasattr(os, "posix_fadvise"):
            measure_cold(path, arguments.rows // 50)


if __name__ == "__main__":
    main()
