"""The check for GPUs: its short form on this CPU, what it says when something is wrong, and its own k-means."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas.index.codec import faiss
from atlas.model.grouping import fuse
from benchmarks import gpu_check, gpu_fast, gpu_ranks, gpu_search
from benchmarks.gpu_bench import CPU, FULL, MODELS, SHORT, Bench, Limits, Row, World
from benchmarks.memory import Settings
from benchmarks.step import models, tokens
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
# what a bare machine lacks, before anything is imported
BARE = """
import runpy, sys
for name in ("faiss", "rouge", "peft"):
    sys.modules[name] = None
runpy.run_module("benchmarks.gpu_check", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def bench(tmp_path):
    return Bench(CPU, SHORT, Limits(1e9, 1e9, "torch"), World(MODELS, tmp_path, SHORT), tmp_path / "no demo")


@pytest.mark.processes
def test_the_short_form_on_a_bare_machine():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BARE, "--short"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, _, *lines = done.stdout.splitlines()
    assert head.startswith("CPU") and "Faiss not there" in head and f"; 0 of {len(lines) - 2} wrong" in head
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:])}
    assert all(len(cells) == len(gpu_check.COLUMNS) for cells in rows.values())
    not_run = [name for name, cells in rows.items() if cells[2].startswith("not run")]
    assert len([name for name in not_run if "PQ8" in name or "IVF" in name]) == 5
    assert set(not_run) >= {"the demo's commands", "losses and search under torchrun"}
    assert len(rows) - len(not_run) > 50


@pytest.mark.skipif(faiss is None, reason="needs Faiss")
def test_with_faiss(bench):
    rows = [*gpu_search.saved(bench), *gpu_fast.inverted_file(bench)]
    assert len(rows) == 7 and all(row.ok and "not run" not in row.measured for row in rows)


def test_what_is_wrong_is_shown(monkeypatch, capsys):
    def a_bad_figure(bench):
        yield Row("figure", "1", "2", ok=False)

    def an_error(bench):
        yield Row("first | part", "1", "1")
        yield Row("speed", "goal: 2", "1", reached=False)
        raise RuntimeError("it broke\nin two")

    monkeypatch.setattr(gpu_check, "CHECKS", (a_bad_figure, an_error))
    monkeypatch.setattr(gpu_check, "output_of", lambda *words: "")  # starts no program
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--short"])
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "2 of 4 wrong, 1 below their goal" in shown.out and "in two" in shown.err
    assert "| figure | 1 | **wrong**: 2 |  |\n| first / part | 1 | 1 |  |" in shown.out
    assert "| speed | goal: 2 | **below the goal**: 1 |  |" in shown.out
    assert "| an_error | no error | **wrong**: RuntimeError: it broke |  |" in shown.out


def test_memory_is_compared_with_the_documented_figures():
    assert gpu_fast.documented_memory().keys() >= FULL.readers.keys()
    assert gpu_fast.expected_memory("xl", Settings()) == (54.3, "docs/training.md")
    assert gpu_fast.expected_memory("tiny", Settings()) is None


@pytest.mark.slow
def test_memory_without_checkpointing_is_counted():
    documented = re.search(
        r"\| base, no checkpointing \| ([\d.]+) ", (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    )
    found = gpu_fast.expected_memory("base", Settings(gradient_checkpoint=False))
    assert (f"{found.gib:.1f}", found.source) == (documented[1], "counted")


def test_goals_are_those_of_the_full_form(bench):
    assert bench.reaches(0.1, 0.5)
    full = replace(bench, sizes=FULL)
    assert full.reaches(0.5, 0.5) and not full.reaches(0.4, 0.5)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_plain_way_writes_the_same_answers(beams):
    torch.manual_seed(0)
    reader = models(2, 64)[0].eval()
    reader.generation_config.eos_token_id = None
    lengths = torch.tensor([[5, 9], [12, 3]])
    ids, mask = tokens(lengths)
    with torch.no_grad():
        encoded = gpu_fast.Encoded(reader.encode(ids, mask), mask, lengths.numpy())
    fused = fuse(*encoded)
    assert fused.hidden.shape[1] < encoded.hidden.shape[1]
    found = reader.write(fused.hidden, fused.mask, max_length=6, min_length=6, num_beams=beams)
    wanted = gpu_fast.plain_answers(gpu_fast.plain_reader(reader), encoded, length=6, beams=beams)
    assert found == wanted[:, 1:].tolist()


def test_the_quantizer_finds_the_nearest_centroids_and_improves():
    rows = torch.randn(600, 24, generator=torch.Generator().manual_seed(1))
    first, last = (gpu_search.train_centroids(rows, 4, rounds) for rounds in (0, 5))
    codes = gpu_search.encode(rows, last)
    distances = torch.cdist(rows.view(600, 4, 6).transpose(0, 1), last)  # (m, n, 256)
    assert torch.equal(codes.long(), distances.argmin(2).T)
    lost = [torch.cdist(rows.view(600, 4, 6).transpose(0, 1), c).amin(2).square().sum() for c in (first, last)]
    assert lost[1] < lost[0]


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    rows = gpu_ranks.launch(2, tmp_path / "rows.json")
    assert len(rows) == 5 and all(row.ok for row in rows)
