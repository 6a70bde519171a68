"""What the demo's tiny models show of the method: writes docs/evidence.md and its plots, from runs of the scripts.

    pip install matplotlib
    make demo-pretrain
    python -m benchmarks.evidence

Every row is a run, or three with different seeds, of finetune_qa.py or evaluate.py on the demo's corpus and all its
test questions. Settings were chosen on dev.jsonl. Two runs go on at a time, in one thread each; what is in --directory
already is not run again. Pretraining with and without distillation is compared at a part of the steps that the shipped
models had, the same part for both. A difference is tested by flipping the signs of the questions' differences
(two-sided, 20,000 times), where a question's value is the mean over the seeds.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.compressed import table
from example_scripts.demo import (
    DEPTHS,
    FINE_TUNING,
    FINE_TUNING_STEPS,
    MODELS,
    READING,
    ROOT,
    SEARCHING,
    prepare,
    read,
)
from example_scripts.demo_pretrain import build, export, pretrain
from src.metrics import exact_match, retrieval_metrics

SEEDS = (0, 1, 2)
SHOTS = (0, 16, 64, 256)
PART = (400, 300)  # steps of the pretraining runs that are compared
FLIPS = 20_000
MODES = ("adist", "loop", "emdr")
COMPRESSED = {
    "PQ-128": ("--index_mode", "faiss", "--faiss_index_type", "pq", "--faiss_code_size", "128"),
    "PQ-32": ("--index_mode", "faiss", "--faiss_index_type", "pq", "--faiss_code_size", "32"),
    "OPQ-32": ("--index_mode", "faiss", "--faiss_index_type", "OPQ32,PQ32"),
    "OPQ-32 + refine": ("--index_mode", "faiss", "--faiss_index_type", "OPQ32,PQ32", "--refine_factor", "4"),
}


@dataclass(frozen=True)
class Run:
    """A fine-tuning on `shots` questions (0: none) and its evaluation.

    It starts from the ordinary models in `models`, or from the checkpoint `path` of such models.
    """

    name: str
    models: Path = MODELS
    path: Path | None = None
    shots: int = 64
    seed: int = 0
    tuning: tuple[str, ...] = ()  # flags of finetune_qa.py, over those of the demo
    flags: tuple[str, ...] = ()  # of all scripts
    retrieves: bool = True

    @property
    def moves(self) -> bool:
        """Whether the passages are embedded otherwise than by `models`."""
        return self.path is not None or "--no-query_side_retriever_training" in self.tuning


@dataclass(frozen=True)
class Measured:
    """Of each test question: whether the answer is right, and whether one of the first k passages holds it; (n,)."""

    right: np.ndarray
    recall: dict[int, np.ndarray]


class Bench:
    """Runs, each once, and what they measured."""

    def __init__(self, home: Path) -> None:
        self.home, self.data = home, home / "data"
        prepare(self.data)
        (ROOT / home / "logs").mkdir(exist_ok=True)
        self.questions = read(ROOT / self.data / "test.jsonl")

    def script(self, name: str, *words: object) -> None:
        """Run a script in one thread; its output goes to a file of that name. Raises: SystemExit."""
        log = ROOT / self.home / f"logs/{name}.log"
        command = [sys.executable, *map(str, words)]
        print("$", shlex.join(command).replace(sys.executable, "python"), flush=True)
        with log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode:
                raise SystemExit(f"{words[0]} failed: see {log}")

    def embed(self, models: Path) -> None:
        """Save an index of the corpus: the runs that embed it alike open it."""
        index = self._index(models)
        if not (ROOT / index / "index.json").exists():
            corpus = ("--passages", self.data / "passages.jsonl", "--save_index_path", index)
            self._evaluate(f"index-{index.name}", models, *SEARCHING, *corpus)

    def run(self, run: Run) -> Measured:
        """Train, read, search."""
        flags = run.flags
        if run.moves:
            flags += ("--passages", self.data / "passages.jsonl")
        elif run.retrieves:
            flags += ("--load_index_path", self._index(run.models))
        path = run.path
        if run.shots:
            path = self.home / "runs" / run.name
            if not (ROOT / path / f"checkpoint/step-{FINE_TUNING_STEPS}").exists():
                self._tune(run, *flags)
        if path is not None:
            flags += ("--model_path", path)
        batch = ("--per_gpu_batch_size", "32")
        reading = (*READING, "--reader_model_type", run.models / "reader", "--precision", "fp32", *batch)
        rows = self._evaluate(f"{run.name}-read", run.models, *reading, *flags)
        right = np.array([exact_match(row["generation"], row["answers"]) for row in rows], dtype=float)
        if not run.retrieves:
            return Measured(right, {})
        rows = self._evaluate(f"{run.name}-search", run.models, *SEARCHING, *batch, *flags)
        recalls = [retrieval_metrics(row["passages"], row["answers"]) for row in rows]
        return Measured(right, {k: np.array([row[f"recall@{k}"] for row in recalls], dtype=float) for k in DEPTHS})

    def _index(self, models: Path) -> Path:
        return self.home / "indices" / "-".join(models.parts[-2:])

    def _tune(self, run: Run, *flags: object) -> None:
        """Fine-tune as the demo does, in one process."""
        self.script(
            *(run.name, "finetune_qa.py", "--name", run.name, "--checkpoint_dir", self.home / "runs", "--restart"),
            *("--train_data", self.data / f"train.{run.shots}-shot.jsonl", *READING, *FINE_TUNING),
            *("--reader_model_type", run.models / "reader", "--retriever_model_path", run.models / "retriever"),
            *("--total_steps", str(FINE_TUNING_STEPS), "--per_gpu_batch_size", "16", "--precision", "fp32"),
            *("--seed", str(run.seed), *flags, *run.tuning),
        )

    def _evaluate(self, name: str, models: Path, *flags: object) -> list[dict]:
        """The rows of evaluate.py's results on the test questions."""
        results = ROOT / self.home / "runs" / name / "test-step-0.jsonl"
        if not results.exists():
            self.script(
                *(name, "evaluate.py", "--name", name, "--checkpoint_dir", self.home / "runs", "--write_results"),
                *("--eval_data", self.data / "test.jsonl", "--retriever_model_path", models / "retriever", *flags),
            )
        return read(results)

    def pretrained(self, *, distillation: bool) -> Path:
        """Models pretrained for a part of the steps, exported; the directory."""
        home = self.home / "part"
        build(self.data, home / "start", seed=0)
        run = pretrain(self.data, home / "start", home, seed=0, steps=PART, distillation=distillation)
        export(run, home / "models" / run.name)
        return home / "models" / run.name

    def commonest(self) -> float:
        """Share of the questions that the commonest answer to the test questions of the relation is right for."""
        counts: dict[str, Counter[str]] = {}
        for row in self.questions:
            counts.setdefault(row["relation"], Counter())[row["answers"][0]] += 1
        return sum(max(count.values()) for count in counts.values()) / len(self.questions)


def over_seeds(run: Run) -> list[Run]:
    return [replace(run, name=f"{run.name}-{seed}", seed=seed) for seed in SEEDS]


def significance(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Two-sided p of the difference of means, by flipping the signs of the questions' differences."""
    differences = np.mean(one, axis=0) - np.mean(other, axis=0)  # (n,)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, len(differences)))
    as_far = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return (1 + int(as_far.sum())) / (1 + FLIPS)


@dataclass(frozen=True)
class Group:
    """Rows of a table, compared with the first of them."""

    title: str
    text: str
    rows: dict[str, list[Run]]


def groups(bench: Bench, pretraining: Path) -> list[Group]:
    """All that is measured, but for the curves."""
    start = pretraining / "start"
    few = over_seeds(Run("few"))
    tied = ("--no-query_side_retriever_training",)
    part = {name: bench.pretrained(distillation=name == "with") for name in ("with", "without")}
    return [
        Group(
            "Pretraining and retrieval",
            "After fine-tuning on 64 examples. Without pretraining the models start as they are built, with weights "
            "that match words and are ready to copy. With the book closed the reader sees the question alone.",
            {
                "pretrained": few,
                "book closed": over_seeds(Run("closed", flags=("--closed_book",), retrieves=False)),
                "not pretrained": over_seeds(Run("unpretrained", models=start)),
            },
        ),
        Group(
            "Distillation in pretraining",
            f"Both are pretrained for {PART[0]} + {PART[1]} steps, from the same weights and on the same data; in one "
            "of them the retriever learns from the reader. Evaluated as they are.",
            {f"{name} distillation": [Run(f"part-{name}", models=models, shots=0)] for name, models in part.items()},
        ),
        Group(
            "And then fine-tuned",
            "The same models after 64 examples.",
            {f"{name} distillation": over_seeds(Run(f"few-{name}", models=models)) for name, models in part.items()},
        ),
        Group(
            "What of the retriever is fine-tuned",
            "On 64 examples. Where both encoders learn the index becomes stale; it is embedded again every 10 steps, "
            "or at the end only.",
            {
                "query encoder": few,
                "nothing": over_seeds(Run("frozen", tuning=("--no-train_retriever",))),
                "both encoders": over_seeds(Run("tied", tuning=tied)),
                "both, index refreshed": over_seeds(Run("refreshed", tuning=(*tied, "--refresh_index", "10"))),
            },
        ),
        Group(
            "How the reader judges passages",
            "On 64 examples.",
            {"pdist": few} | {mode: over_seeds(Run(mode, tuning=("--gold_score_mode", mode))) for mode in MODES},
        ),
        Group(
            "Compressed indices",
            "The pretrained models as they are; the index compressed from 512 bytes per passage to the number named.",
            {"flat": [Run("flat", shots=0)]}
            | {name: [Run(name.replace(" ", ""), shots=0, flags=flags)] for name, flags in COMPRESSED.items()},
        ),
    ]


def curves(pretraining: Path) -> dict[str, dict[int, list[Run]]]:
    """The runs of each curve, by place on its axis."""
    steps, before = {0: [Run("start", models=pretraining / "start", shots=0)]}, 0
    for stage in ("reader", "joint"):
        saved = sorted(int(path.name[5:]) for path in (ROOT / pretraining / stage / "checkpoint").glob("step-*"))
        for step in saved:
            path = pretraining / stage / "checkpoint" / f"step-{step}"
            run = Run(f"pretrained-{before + step}", models=pretraining / "start", path=path, shots=0)
            steps[before + step] = [run]
        before += saved[-1]
    few = {0: [Run("flat", shots=0)], 64: over_seeds(Run("few"))}
    few |= {shots: over_seeds(Run(f"few-{shots}", shots=shots)) for shots in SHOTS if shots not in few}
    return {"steps of pretraining": steps, "examples of fine-tuning": dict(sorted(few.items()))}


def percent(values: list[np.ndarray]) -> str:
    """The mean of the runs' means, and their standard deviation where there are several; in percent."""
    means = [100 * value.mean() for value in values]
    return f"{np.mean(means):.1f}" + (f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else "")


def verdict(p: float) -> str:
    """As a cell: p, and whether it shows anything where ten or more differences of one page are looked at."""
    return f"{p:.4f}" if p < 0.01 else f"{p:.2g}: not shown"


def aims(bench: Bench, all_groups: list[Group], measured: dict[Run, Measured]) -> str:
    """The table of what had been asked of the models before any of them was made, and what became of it."""
    after, distilled = (all_groups[i].rows for i in (0, 1))
    right = {name: 100 * float(np.mean([measured[run].right for run in runs])) for name, runs in after.items()}
    found = 100 * float(np.mean([measured[run].recall[5] for run in after["pretrained"]]))
    sides = [[measured[run].recall[5] for run in runs] for runs in distilled.values()]  # with, without
    gain, p = 100 * float(np.mean(sides[0]) - np.mean(sides[1])), significance(*sides)
    guess = 100 * bench.commonest()
    lines = [
        ("exact match after 64 examples: 60 or more", right["pretrained"], right["pretrained"] >= 60),
        ("recall@5 after 64 examples: 90 or more", found, found >= 90),
        (
            f"book closed: at most {guess + 3:.1f}, of guessing and 3",
            right["book closed"],
            right["book closed"] <= guess + 3,
        ),
        ("not pretrained: exact match of 5 or less", right["not pretrained"], right["not pretrained"] <= 5),
        (f"distillation: 5 points of recall@5 or more, p < 0.01 (p = {p:.4f})", gain, gain >= 5 and p < 0.01),
    ]
    rows = [[asked, f"{value:.1f}", "holds" if holds else "**does not hold**"] for asked, value, holds in lines]
    return table(["asked", "measured", ""], rows)


def lines_of(group: Group, measured: dict[Run, Measured]) -> str:
    """The table of a group: with p of each difference from the first row."""
    base, lines = None, []
    for name, runs in group.rows.items():
        here = [measured[run] for run in runs]
        cells = [name, percent([one.right for one in here])]
        cells += [percent([one.recall[k] for one in here]) if here[0].recall else "" for k in DEPTHS]
        if base is None:
            base = here
            cells += ["", ""]
        else:
            cells.append(verdict(significance([one.right for one in base], [one.right for one in here])))
            recalls = [[one.recall[5] for one in side] if side[0].recall else None for side in (base, here)]
            cells.append(verdict(significance(*recalls)) if all(recalls) else "")
        lines.append(cells)
    head = ["", "exact match", *(f"recall@{k}" for k in DEPTHS), "p (exact match)", "p (recall@5)"]
    return table(head, lines)


def draw(all_curves: dict[str, dict[int, list[Run]]], measured: dict[Run, Measured], file: Path) -> None:
    """Exact match and recall over the steps and over the examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(all_curves), figsize=(10, 3.8), sharey=True)
    for axis, (label, points) in zip(axes, all_curves.items(), strict=True):
        places = list(points)
        series = {"exact match": [[measured[run].right.mean() for run in runs] for runs in points.values()]}
        for k in DEPTHS:
            series[f"recall@{k}"] = [[measured[run].recall[k].mean() for run in runs] for runs in points.values()]
        for name, values in series.items():
            means = [100 * np.mean(value) for value in values]
            spread = [100 * np.std(value, ddof=1) if len(value) > 1 else 0 for value in values]
            axis.errorbar(places, means, spread, marker="o", markersize=3, capsize=2, label=name)
        axis.set(xlabel=label, ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[1].set_xscale("symlog", linthresh=16)
    axes[1].set_xticks(list(all_curves["examples of fine-tuning"]), [str(n) for n in SHOTS])
    axes[0].set_ylabel("% of the test questions")
    axes[0].legend(loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def page(bench: Bench, all_groups: list[Group], measured: dict[Run, Measured], plot: str) -> str:
    """docs/evidence.md."""
    n, relations = len(bench.questions), len({row["relation"] for row in bench.questions})
    parts = [
        "# What the tiny models show",
        f"Written by `python -m benchmarks.evidence`: {n} test questions over {relations} relations, about things that "
        "neither pretraining nor any example is about. Where a ± stands, three seeds of fine-tuning, their mean and "
        "standard deviation; p is of the difference from a table's first row, by flipping the signs of the questions' "
        "differences (two-sided); one of 0.01 or more counts as not shown. Recall@k is the share of questions for "
        "which one of the first k passages holds the answer, as in question answering at large: an answer that many "
        "passages hold, like a continent, is easily found. Guessing, always the commonest answer to a relation, would "
        f"be right for {100 * bench.commonest():.1f} %.",
        f"![Exact match and recall over pretraining and over examples]({plot})",
        "Left: the models as pretraining leaves them, without any example; first the reader learns alone, then both. "
        "Right: after fine-tuning.",
        "## What had been asked for",
        aims(bench, all_groups, measured),
    ]
    for group in all_groups:
        parts += [f"## {group.title}", group.text, lines_of(group, measured)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run all, two at a time; write the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo/evidence"), help="where the runs go")
    parser.add_argument("--pretraining", type=Path, default=Path("demo/pretraining"), help="of `make demo-pretrain`")
    parser.add_argument("--output", type=Path, default=Path("docs/evidence.md"))
    options = parser.parse_args()
    bench = Bench(options.directory)
    all_groups, all_curves = groups(bench, options.pretraining), curves(options.pretraining)
    runs = [run for group in all_groups for row in group.rows.values() for run in row]
    runs += [run for points in all_curves.values() for row in points.values() for run in row]
    runs = list(dict.fromkeys(runs))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bench.embed, sorted({run.models for run in runs if run.retrieves and not run.moves})))
        measured = dict(zip(runs, pool.map(bench.run, runs), strict=True))
    plot = options.output.with_suffix(".png")
    draw(all_curves, measured, ROOT / plot)
    (ROOT / options.output).write_text(page(bench, all_groups, measured, plot.name), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
