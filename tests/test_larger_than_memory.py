"""An index that is larger than the memory of the machine: a rank maps its own rows, read-only, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BYTES, DIMENSION, RANKS, WITH_CONTENT = 2**34, 768, 8, 100_000  # all other rows are zeros, which take no space

MAKE = """
import sys
from pathlib import Path
import numpy as np
from atlas.files.checksums import write_file
from atlas.index import directory as files
from atlas.index.arrays import FP16, Array, Layout, create
from atlas.index.directory import Description, Segment

directory, dimension, *sizes = Path(sys.argv[1]), *map(int, sys.argv[2:])
with_content, segments = sizes.pop(), []
rows = np.random.default_rng(0).standard_normal((with_content, dimension), np.float32).astype(FP16)
for number, size in enumerate(sizes, 1):
    lines = [b'{"id":"1","text":""}\\n' * 2**16] * (size // 2**16)
    text = directory / f"passages.{number}.jsonl"
    content = write_file(text, [*lines, b'{"id":"1","text":""}\\n' * (size % 2**16)])
    layout, embeddings = Layout(size, dimension, FP16), directory / f"embeddings.{number}.npy"
    create(embeddings, layout)
    with open(embeddings, "r+b") as file:
        file.seek(layout.offset(0))
        file.write(rows[: with_content if number == 1 else 0].tobytes())
    deleted = None
    if len(sizes) > 1:  # every thousandth row behind those with content
        deleted = files.write_tombstones(directory / f"tombstones.{number}.npy", np.arange(with_content, size, 1000))
    array = Array(embeddings.name, 40.0, None, None)
    segments.append(Segment(size, files.describe_passages(text, content), array, None, deleted))
files.commit(directory, Description("flat", dimension, False, None, None, None, None, tuple(segments)))
"""

USE = """
import json, re, resource, sys
from pathlib import Path
import faiss, torch
from atlas.index import directory as files, store
from atlas.index.codec import Compression, train
from atlas.runtime import distributed

def memory(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
directory, ranks, with_content = Path(sys.argv[1]), *map(int, sys.argv[2:])
limit = memory("VmSize") + 2**31 + 2**30  # a rank's rows take 2 GiB of addresses
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
distributed.rank, distributed.world_size = lambda: 0, lambda: ranks
description = files.read_description(directory)
passages, embeddings, local = store._open_rows(directory, description, Compression("flat"), torch.device("cpu"))
queries = embeddings.index_select(0, torch.tensor([5, with_content - 1])).float()
first = local.search(queries, 1)[1].flatten().tolist()
codec = train("SQ8", embeddings[:10_000].float().numpy())
encoded = sum(len(codec.encode(embeddings[i : i + 10_000], i)[0]) for i in range(0, with_content, 10_000))
print(json.dumps([len(passages), len(embeddings), type(embeddings).__name__, first, encoded, memory("RssAnon")]))
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("updated", [False, True])
def test_a_rank_of_eight_in_a_quarter_of_the_addresses(tmp_path, updated):
    """16 GiB of embeddings, opened, searched and encoded in 3 GiB of addresses; under 1 GB is the process's own.

    Of an updated index the rank has the end of one segment and a part of the next, without the deleted rows.
    """
    size = BYTES // (2 * DIMENSION)
    sizes = (2 * WITH_CONTENT, size - 2 * WITH_CONTENT) if updated else (size,)
    python(MAKE, tmp_path, DIMENSION, *sizes, WITH_CONTENT)
    n, own, kind, first, encoded, resident = json.loads(python(USE, tmp_path, RANKS, WITH_CONTENT))
    live = size - sum(len(range(WITH_CONTENT, part, 1000)) for part in sizes) if updated else size
    assert (n, own, kind) == (live, live // RANKS, "LiveRows" if updated else "Tensor")
    assert first == [5, WITH_CONTENT - 1] and encoded == WITH_CONTENT
    assert resident < 10**9


def python(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
