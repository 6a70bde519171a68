"""How long a saved index takes from being opened to its first answer, and the memory that it holds.

    python -m benchmarks.open_index
    python -m benchmarks.open_index --directory DIRECTORY    # keeps the indices there, and uses them again
    python -m benchmarks.open_index --updated                # also after an update of 1,000 passages

Random embeddings. Every index is opened in a process of its own, which has imported everything and searched a tiny
index before: that starts threads and loads libraries. Then time runs while the index is opened and one query searched,
until the texts of its passages are there. The files were just written, so they are in the page cache.

Memory is what the process has more of afterwards: anonymous memory, and the mapped pages of the files of codes (or
embeddings, for a flat index). It is compared to the bytes of the codes. The mapped pages of the texts and of their
lines' offsets are of the page cache, one copy for all processes, and are told apart.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from atlas.index.codec import Compression
from atlas.index.convert import compress_index
from atlas.index.directory import has_index, read_description
from atlas.index.flat import FlatIndex
from atlas.index.passages import open_passages
from atlas.index.sharded import ShardedIndex, look_up
from atlas.index.store import Content, open_codec, open_index, save_index
from atlas.index.update import find_changes, opened_to_update, write_changes
from benchmarks.search import process_memory, random_embeddings

CPU = torch.device("cpu")
LONGER = 10  # times as long are the texts of the second corpus


def write_corpus(path: Path, n: int, texts: int) -> None:
    """n passages, each of so many texts of about 100 words; they are put together from a thousand different ones."""
    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 10))) for _ in range(5000)]
    )
    pool = [" ".join(rng.choice(words, rng.integers(60, 141))) for _ in range(1000)]
    with open(path, "w", encoding="utf-8") as file:
        for row, picks in enumerate(rng.integers(len(pool), size=(n, texts)).tolist()):
            text = " ".join(pool[i] for i in picks)
            file.write(json.dumps({"id": str(row), "title": text[:20], "text": text}) + "\n")


def build(directory: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Save the indices that are not there yet: a flat one, compressed ones made of it, and these with longer texts."""
    indices = {"flat": directory / "flat"}
    for texts in (1, LONGER):
        if not (directory / f"{texts}.jsonl").exists():
            write_corpus(directory / f"{texts}.jsonl", arguments.passages, texts)
    if not has_index(indices["flat"]):
        embeddings = random_embeddings(arguments.passages, arguments.dimension)
        save_index(indices["flat"], ShardedIndex(open_passages(directory / "1.jsonl"), embeddings))
    for kind in arguments.types:
        name, _, code_size = kind.partition("-")
        indices[kind], longer = directory / kind, directory / f"{kind}-long"
        wanted = Compression(
            name, int(code_size) if code_size else None, nlist=arguments.faiss_nlist, train_size=arguments.train
        )
        try:
            wanted.factory(arguments.passages, arguments.dimension)
        except ValueError as error:
            print(f"{kind} is left out: {error}")
            del indices[kind]
            continue
        if not has_index(indices[kind]):
            compress_index(indices["flat"], indices[kind], wanted, codes_only=True)
        indices[f"{kind}, texts x {LONGER}"] = longer
        if not has_index(longer):
            local = open_index(indices[kind], device=CPU).local
            save_index(longer, ShardedIndex(open_passages(directory / f"{LONGER}.jsonl"), None, local), codes_only=True)
    return indices


def update(source: Path, target: Path) -> None:
    """A copy of an index in which 500 passages are added, 300 replaced and 200 deleted; the files are shared."""
    shutil.copytree(source, target, copy_function=os.link)
    size = read_description(target).size
    some = np.random.default_rng(0).choice(size, 500, replace=False).tolist()
    rows = [{"id": str(i), "title": "", "text": "new"} for i in [*some[:300], *range(size, size + 500)]]
    corpus = target.with_suffix(".new.jsonl")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    passages, started = open_passages(corpus), time.perf_counter()
    with opened_to_update(target) as description:
        changes = find_changes(target, description, passages, [str(i) for i in some[300:]])
        embeddings, codec, codes = random_embeddings(len(rows), description.dimension), None, ()
        if description.quantizer:
            codec = open_codec(target, description)
            codes = [codec.encode(embeddings, size)]
        stored = embeddings if description.has_embeddings else None
        content = Content(passages, range(len(rows)), stored, codec, codes)
        write_changes(target, description, changes.leaving, content, None)
    print(f"{target.name}: updated in {time.perf_counter() - started:.1f} s, without embedding")


def mapped_bytes(directory: Path, name: str) -> int:
    """Pages of files of such a name in the memory of this process, in bytes; Linux only."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(directory.resolve()) in line and re.search(name, line) is not None
        elif inside and (size := re.match(r"Rss:\s+(\d+) kB", line)):
            found += 1024 * int(size[1])
    return found


def measure(directory: Path, nprobe: int | None) -> dict[str, float]:
    """Open an index and answer one query: seconds, and bytes of memory."""
    queries = torch.randn(1, read_description(directory).dimension)
    FlatIndex(random_embeddings(100, queries.shape[1])).search(queries, 10)
    before, started = process_memory("RssAnon"), time.perf_counter()
    index = open_index(directory, device=CPU, compression=Compression(nprobe=nprobe))
    opened = time.perf_counter() - started
    found = look_up(index.passages, index.search(queries, 10).ids)
    answered = time.perf_counter() - started
    assert len(found[0]) == 10
    quantizer = read_description(directory).quantizer
    width = quantizer.code_size if quantizer else 2 * index.dimension
    return {
        "opened": opened,
        "answered": answered,
        "codes": index.size * width,
        # a page that was written to would be in both, and none is
        "held": process_memory("RssAnon") - before + mapped_bytes(directory, r"(codes|embeddings)\.\d+\.npy"),
        "texts": mapped_bytes(directory, r"passages\.\d+\.jsonl"),
    }


def measure_in_a_new_process(directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.open_index", "--measure", str(directory)]
    command += ["--threads", str(arguments.threads)]
    if arguments.faiss_nprobe:
        command += ["--faiss_nprobe", str(arguments.faiss_nprobe)]
    # What is freed goes back to the system at once, so that what is left is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the indices are kept; by default they are removed")
    parser.add_argument("--passages", type=int, default=10**6)
    parser.add_argument("--dimension", type=int, default=768, help="D")
    parser.add_argument(
        "--types",
        nargs="*",
        default=["pq-64", "ivfpq-64", "ivfsq", "PQ128x4fs"],
        help="beside flat; with the bytes of a code",
    )
    parser.add_argument("--updated", action="store_true", help="measure an update of each index as well")
    parser.add_argument("--faiss_nlist", type=int, help="lists of ivf types; by default the root of the passages")
    parser.add_argument("--faiss_nprobe", type=int, help="lists searched; by default all")
    parser.add_argument("--train", type=int, default=10_000, help="rows that quantizers are trained on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.faiss_nprobe)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        indices = build(directory, arguments)
        plain = [(name, path) for name, path in indices.items() if "texts" not in name]
        for name, path in plain if arguments.updated else ():
            indices[f"{name}, updated"] = directory / f"{path.name}-updated"
            if not has_index(indices[f"{name}, updated"]):
                update(path, indices[f"{name}, updated"])
        print(f"{arguments.passages} passages x {arguments.dimension}, {arguments.threads} threads")
        print(f"{'':24} {'opened':>8} {'answered':>8} {'codes':>9} {'held':>9} {'more':>7} {'texts':>9}")
        for name, path in indices.items():
            found = measure_in_a_new_process(path, arguments)
            megabytes = "".join(f" {found[part] / 1e6:6.1f} MB" for part in ("codes", "held"))
            print(
                f"{name:24} {found['opened']:6.2f} s {found['answered']:6.2f} s{megabytes} "
                f"{found['held'] / found['codes'] - 1:+7.1%} {found['texts'] / 1e6:6.1f} MB"
            )


if __name__ == "__main__":
    main()
