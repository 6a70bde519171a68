"""The losses and the search on several GPUs, which NCCL connects: a part of `benchmarks.gpu_check`.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.gpu_ranks rows.json

Rank 0 computes the same alone, compares, and writes the rows of the table. On a CPU the ranks use gloo.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from atlas.index.flat import FlatIndex
from atlas.index.sharded import ShardedIndex
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import data_parallel
from benchmarks.gpu_bench import MODELS, ROOT, SHORT, Bench, Row, World
from benchmarks.gpu_right import distinct_modes, gradient_distance, joint_model

ROWS, DIMENSION, K = 10_001, 64, 20


def losses(world: World, device: torch.device) -> Iterator[Row]:
    """Gradients averaged over ranks that read different questions, in every gold-score mode."""
    ranks = distributed.world_size()
    batches = [world.batch(slice(2 * rank, 2 * rank + 2), device, world.sizes.retrieved) for rank in range(ranks)]
    for mode, names in distinct_modes().items():
        alone = joint_model(world, mode).to(device)
        together = copy.deepcopy(alone)
        parallel = data_parallel(together, device, some_unused=False)  # averages only while it exists
        parallel(batches[distributed.rank()]).total.backward()
        for batch in batches:
            (alone(batch).total / ranks).backward()
        off = max(distributed.gather_objects(gradient_distance(together, alone)))
        yield Row(f"gradients on {ranks} ranks, {names}", "one rank's ± 1e-3", f"{off:.1e} off", ok=off <= 1e-3)


def search(device: torch.device) -> Iterator[Row]:
    """Every rank searches its rows for the queries of all."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.randn(ROWS, DIMENSION, generator=generator).half()
    own = distributed.shard_rows(ROWS, distributed.rank(), distributed.world_size())
    index = ShardedIndex(range(ROWS), everything[own.start : own.stop].to(device))
    queries = torch.randn(5 + distributed.rank(), DIMENSION, generator=generator).to(device)
    hits = index.search(queries, K)
    scores, rows = FlatIndex(everything.to(device)).search(queries, K)
    same = all(distributed.gather_objects(torch.equal(hits.ids, rows) and torch.equal(hits.scores, scores)))
    check = f"flat search on {distributed.world_size()} ranks"
    yield Row(check, "rows and scores of one rank", "the same" if same else "others", ok=same)


def several_ranks(bench: Bench) -> Iterator[Row]:
    """Start this file on all GPUs of the machine."""
    gpus = torch.cuda.device_count() if bench.on_gpu and bench.sizes is not SHORT else 0
    if gpus < 2:
        yield Row("losses and search under torchrun", "as on one rank", "not run: needs two GPUs and the full form")
        return
    yield from launch(gpus, bench.world.scratch / "ranks.json")


def launch(ranks: int, output: Path) -> list[Row]:
    """The rows that so many ranks write.

    Raises:
        RuntimeError: torchrun fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "benchmarks.gpu_ranks", str(output)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with status {done.returncode}: {done.stderr[-1500:]}")
    return [Row(*row) for row in json.loads(output.read_text(encoding="utf-8"))]


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="file for the rows of the table")
    output = parser.parse_args().output
    device = devices.pick_device("auto", distributed.local_rank())
    distributed.start(device.type)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [*losses(World(MODELS, Path(scratch), SHORT), device), *search(device)]
    if distributed.is_main():
        output.write_text(json.dumps(rows), encoding="utf-8")
    distributed.stop()


if __name__ == "__main__":
    main()
