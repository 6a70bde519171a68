"""What the demo's tiny models show of the method: writes docs/evidence.md and its plots, from runs of the scripts.

    pip install matplotlib
    make demo-pretrain
    python -m benchmarks.evidence

Every row is one or several runs (with different seeds) of finetune_qa.py or evaluate.py on the demo's corpus and all
its test questions. A seed of fine-tuning draws the examples and their order; seed 0 has those of `make demo`. Settings
were chosen on dev.jsonl. Two runs are run at a time, with one thread each; results in --directory are not computed
again. Pretraining with and without distillation is compared after a fraction of the shipped models' steps, the same for
both. Differences are tested by randomly flipping the signs of the questions' differences (two-sided, 20,000 times); a
question's value is its mean over the seeds.
"""

import argparse
import importlib.util
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from atlas.metrics import exact_match, retrieval_metrics
from benchmarks.compressed import only_of, table
from benchmarks.runs import run_once
from example_scripts.demo import (
    DEPTHS,
    FINE_TUNING,
    FINE_TUNING_STEPS,
    READING,
    ROOT,
    SEARCHING,
    prepare,
    read,
)
from example_scripts.demo_pretrain import STEPS, build, export, pretrain
from preprocessing.prepare_demo import balance, write_jsonl

SEEDS = (0, 1, 2)
PRETRAINING_SEEDS = (0, 1)
SHOTS = (0, 16, 64, 256)
PART = (400, 300)  # steps of the two stages of the pretraining runs that are compared
FLIPS = 20_000
# Attention scores vary less than likelihoods. 0.01 was chosen over 0.1 on dev.jsonl: with 0.1 the target distribution
# is nearly uniform over the passages.
MODES = {"adist": ("--temperature_gold", "0.01"), "loop": (), "emdr": ()}
COMPRESSED = {
    "PQ-128": ("--index_mode", "faiss", "--faiss_index_type", "pq", "--faiss_code_size", "128"),
    "PQ-32": ("--index_mode", "faiss", "--faiss_index_type", "pq", "--faiss_code_size", "32"),
    "OPQ-32": ("--index_mode", "faiss", "--faiss_index_type", "OPQ32,PQ32"),
    "OPQ-32 + refine": ("--index_mode", "faiss", "--faiss_index_type", "OPQ32,PQ32", "--refine_factor", "4"),
}


@dataclass(frozen=True)
class Run:
    """Fine-tuning on `shots` questions (0: none) and its evaluation.

    It starts from the exported models in `models`, or from the checkpoint `path` of such models. With `own_index` the
    passage encoder differs from that of `models`, so the passages are embedded again.
    """

    name: str
    models: Path
    path: Path | None = None
    shots: int = 64
    seed: int = 0
    tuning: tuple[str, ...] = ()  # flags of finetune_qa.py, which override those of the demo
    flags: tuple[str, ...] = ()  # flags of all scripts
    own_index: bool = False
    retrieves: bool = True


@dataclass(frozen=True)
class Measured:
    """For each test question: whether the answer is right, and whether one of the first k passages has it; (n,)."""

    right: np.ndarray
    recall: dict[int, np.ndarray]


class Bench:
    """Runs each experiment once and reads its results."""

    def __init__(self, home: Path, pretraining: Path) -> None:
        self.home, self.data, self.pretraining = home, home / "data", pretraining
        prepare(self.data)
        self.questions, self.train = (read(ROOT / self.data / f"{name}.jsonl") for name in ("test", "train"))
        models = [ROOT / pretraining / f"{name}/reader/model.safetensors" for name in ("start", "models")]
        only_of(ROOT / home, ROOT / self.data / "test.jsonl", *models)
        for seed in SEEDS[1:]:
            drawn = random.Random(seed).sample(self.train, len(self.train))
            for shots in SHOTS[1:]:
                write_jsonl(ROOT / self._examples(shots, seed), balance(drawn, shots))

    def script(self, name: str, done: Path, *words: object) -> None:
        """Run a script with one thread, unless that has been done. Raises: SystemExit."""
        run_once(ROOT / self.home / f"logs/{name}.log", done, *words)

    def embed(self, models: Path) -> None:
        """Save an index of the corpus for all runs with the same passage encoder."""
        index = self._index(models)
        corpus = ("--passages", self.data / "passages.jsonl", "--save_index_path", index)
        self._evaluate(f"index-{index.name}", models, *SEARCHING, *corpus)

    def run(self, run: Run) -> Measured:
        """Fine-tune, answer the questions, and search for more passages."""
        index: tuple[object, ...] = ()
        if run.retrieves:
            index = ("--load_index_path", self._index(run.models))
        corpus = ("--passages", self.data / "passages.jsonl")
        path = run.path
        if run.shots:
            path = self._tune(run, *run.flags, *(corpus if run.own_index else index))
        flags = ("--model_path", path) if path is not None else ()
        batch = ("--per_gpu_batch_size", "32")
        reading = (*READING, "--reader_model_type", run.models / "reader", "--precision", "fp32", *batch)
        if run.own_index:
            own = self.home / "indices" / run.name
            index = ("--load_index_path", own)
            reading += (*corpus, "--save_index_path", own)
        else:
            reading += index
        rows = self._evaluate(f"{run.name}-read", run.models, *reading, *run.flags, *flags)
        right = np.array([exact_match(row["generation"], row["answers"]) for row in rows], dtype=float)
        if not run.retrieves:
            return Measured(right, {})
        rows = self._evaluate(f"{run.name}-search", run.models, *SEARCHING, *batch, *index, *run.flags, *flags)
        recalls = [retrieval_metrics(row["passages"], row["answers"]) for row in rows]
        return Measured(right, {k: np.array([row[f"recall@{k}"] for row in recalls], dtype=float) for k in DEPTHS})

    def _index(self, models: Path) -> Path:
        return self.home / "indices" / "-".join(models.parts[-3:])

    def _examples(self, shots: int, seed: int) -> Path:
        """The file of training questions; for seed 0 that of the demo."""
        return self.data / f"train.{shots}-shot.jsonl" if seed == 0 else self.home / f"train.{shots}-shot.{seed}.jsonl"

    def _tune(self, run: Run, *flags: object) -> Path:
        """Fine-tune as the demo does, but in one process; returns the run's directory."""
        path = self.home / "runs" / run.name
        self.script(
            *(run.name, ROOT / path / f"checkpoint/step-{FINE_TUNING_STEPS}", "finetune_qa.py", "--name", run.name),
            *("--checkpoint_dir", self.home / "runs", "--restart", *READING, *FINE_TUNING),
            *("--train_data", self._examples(run.shots, run.seed), "--seed", str(run.seed)),
            *("--reader_model_type", run.models / "reader", "--retriever_model_path", run.models / "retriever"),
            *("--total_steps", str(FINE_TUNING_STEPS), "--per_gpu_batch_size", "16", "--precision", "fp32"),
            *flags,
            *run.tuning,
        )
        return path

    def _evaluate(self, name: str, models: Path, *flags: object) -> list[dict]:
        """The rows of evaluate.py's results on the test questions."""
        results = ROOT / self.home / "runs" / name / "test-step-0.jsonl"
        self.script(
            *(name, results, "evaluate.py", "--name", name, "--checkpoint_dir", self.home / "runs", "--write_results"),
            *("--eval_data", self.data / "test.jsonl", "--retriever_model_path", models / "retriever", *flags),
        )
        return read(results)

    def pretrained(self, seed: int, *, distillation: bool) -> Path:
        """Pretrain for a fraction of the steps and export the models; returns their directory."""
        home = self.home / f"part-{PART[0]}-{PART[1]}-{seed}"
        build(self.data, home / "start", seed)
        run = pretrain(self.data, home / "start", home, seed, steps=PART, distillation=distillation)
        export(run, home / "models" / run.name)
        return home / "models" / run.name

    def guess(self) -> float:
        """Share of the questions for which the relation's most common answer in training is right."""
        counts: dict[str, Counter[str]] = {}
        for row in self.train:
            counts.setdefault(row["relation"], Counter())[row["answers"][0]] += 1
        commonest = {relation: count.most_common(1)[0][0] for relation, count in counts.items()}
        return float(np.mean([row["answers"][0] == commonest.get(row["relation"]) for row in self.questions]))

    def named(self) -> np.ndarray:
        """For each test question: whether the name of its entity occurs anywhere in the pretraining passages; (n,)."""
        titles = {tuple(row["id"].split("-")[:2]): row["title"] for row in read(ROOT / self.data / "passages.jsonl")}
        text = "\n".join(row["text"] for row in read(ROOT / self.data / "passages.train.jsonl"))
        words = {name: re.search(rf"\b{re.escape(title)}\b", text) is not None for name, title in titles.items()}
        return np.array([words[tuple(row["id"].split("-")[:2])] for row in self.questions])


def over_seeds(run: Run) -> list[Run]:
    return [replace(run, name=f"{run.name}-{seed}", seed=seed) for seed in SEEDS]


@cache
def random_signs(n: int) -> np.ndarray:
    return np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, n))


def significance(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Two-sided p of the difference of means, by randomly flipping the signs of the questions' differences."""
    differences = np.mean(one, axis=0) - np.mean(other, axis=0)  # (n,)
    as_far = np.abs(random_signs(len(differences)) @ differences) >= abs(differences.sum()) - 1e-9
    return (1 + int(as_far.sum())) / (1 + FLIPS)


@dataclass(frozen=True)
class Group:
    """The rows of a table; each is compared with the first."""

    title: str
    text: str
    rows: dict[str, list[Run]]


def groups(bench: Bench) -> dict[str, Group]:
    """Everything that is measured, except for the curves."""
    start, models = bench.pretraining / "start", bench.pretraining / "models"
    few = Run("few", models)
    pretrained = {
        "models": Group(
            "Pretraining and retrieval",
            "After fine-tuning on 64 examples. Without pretraining the models start with their initial weights, which "
            "match words and are ready to copy. With the book closed the reader is given the question alone.",
            {
                "pretrained": over_seeds(few),
                "book closed": over_seeds(Run("closed", models, flags=("--closed_book",), retrieves=False)),
                "not pretrained": over_seeds(Run("unpretrained", start)),
            },
        ),
    }
    return pretrained | distillation_groups(bench) | fine_tuning_groups(few)


def distillation_groups(bench: Bench) -> dict[str, Group]:
    """Short pretraining with and without distillation, evaluated before and after fine-tuning."""
    part = {
        f"{name} distillation": [
            Run(f"part-{name}-{seed}", bench.pretrained(seed, distillation=name == "with"), shots=0)
            for seed in PRETRAINING_SEEDS
        ]
        for name in ("with", "without")
    }
    tuned = {
        name: [replace(run, name=f"few-{run.name}", shots=64, seed=i) for i, run in enumerate(runs)]
        for name, runs in part.items()
    }
    return {
        "distillation": Group(
            "Distillation in pretraining",
            f"Both are pretrained for {PART[0]} + {PART[1]} steps, from the same weights and on the same data; in only "
            f"one of them the retriever learns from the reader. {len(PRETRAINING_SEEDS)} seeds of pretraining, which "
            "also draw the initial weights. Evaluated without fine-tuning.",
            part,
        ),
        "distillation and examples": Group(
            "The same after fine-tuning", "Each of these models after 64 examples, a different draw for each.", tuned
        ),
    }


def fine_tuning_groups(few: Run) -> dict[str, Group]:
    """Variants of `few`, the fine-tuning of `make demo`, and compressed indices."""
    models = few.models
    both = replace(few, tuning=("--no-query_side_retriever_training",), own_index=True)
    refreshed = replace(both, name="refreshed", tuning=(*both.tuning, "--refresh_index", "10"))
    return {
        "retriever": Group(
            "Which parts of the retriever are fine-tuned",
            "On 64 examples. When both encoders learn, the index becomes stale; it is refreshed every 10 steps, or "
            "only at the end.",
            {
                "query encoder": over_seeds(few),
                "nothing": over_seeds(Run("frozen", models, tuning=("--no-train_retriever",))),
                "both encoders": over_seeds(replace(both, name="both")),
                "both, index refreshed": over_seeds(refreshed),
            },
        ),
        "gold scores": Group(
            "How the reader scores passages",
            "On 64 examples, with the temperatures of `make demo`, except for a gold temperature of 0.01 for adist, "
            "because attention scores vary less than likelihoods. `ppmean` is another name for pdist, "
            "`evalnormsum` for adist.",
            {"pdist": over_seeds(few)}
            | {
                mode: over_seeds(Run(mode, models, tuning=("--gold_score_mode", mode, *flags)))
                for mode, flags in MODES.items()
            },
        ),
        "indices": Group(
            "Compressed indices",
            "The pretrained models without fine-tuning; the index is compressed from 512 bytes per passage to the "
            "given number.",
            {"flat": [Run("flat", models, shots=0)]}
            | {name: [Run(name.replace(" ", ""), models, shots=0, flags=flags)] for name, flags in COMPRESSED.items()},
        ),
    }


def curves(pretraining: Path) -> dict[str, dict[int, list[Run]]]:
    """The runs of each curve, by place on its axis."""
    start, models = pretraining / "start", pretraining / "models"
    steps, before = {0: [Run("start", start, shots=0)]}, 0
    for stage in ("reader", "joint"):
        saved = sorted(int(path.name[5:]) for path in (ROOT / pretraining / stage / "checkpoint").glob("step-*"))
        for step in saved:
            path = pretraining / stage / "checkpoint" / f"step-{step}"
            steps[before + step] = [
                Run(f"pretrained-{before + step}", start, path, shots=0, own_index=stage == "joint")
            ]
        before += saved[-1]
    few = {0: [Run("flat", models, shots=0)]}
    few |= {
        shots: over_seeds(Run("few" if shots == 64 else f"few-{shots}", models, shots=shots)) for shots in SHOTS[1:]
    }
    return {"steps of pretraining": steps, "examples of fine-tuning": few}


def percent(values: list[np.ndarray]) -> str:
    """The mean of the runs' means, and their standard deviation if there are several, in percent."""
    means = [100 * value.mean() for value in values]
    return f"{np.mean(means):.1f}" + (f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else "")


def verdict(p: float) -> str:
    """The table cell for p, which says so if a difference is not significant."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.01 else f"{p:.2g}: not shown"


def aims(bench: Bench, all_groups: dict[str, Group], measured: dict[Run, Measured]) -> str:
    """A table of the goals that were set before any of the models was trained, and of the results."""
    after = all_groups["models"].rows
    right = {name: 100 * float(np.mean([measured[run].right for run in runs])) for name, runs in after.items()}
    recall = 100 * float(np.mean([measured[run].recall[5] for run in after["pretrained"]]))
    sides = [[measured[run].recall[5] for run in runs] for runs in all_groups["distillation"].rows.values()]
    gain, p = 100 * float(np.mean(sides[0]) - np.mean(sides[1])), significance(*sides)
    most = 100 * bench.guess() + 3
    closed, plain = right["book closed"], right["not pretrained"]
    lines = [
        ("exact match after 64 examples: 60 or more", right["pretrained"], right["pretrained"] >= 60),
        ("recall@5 after 64 examples: 90 or more", recall, recall >= 90),
        (f"exact match, book closed: at most {most:.1f}, 3 above guessing", closed, closed <= most),
        ("exact match, not pretrained: 5 or less", plain, plain <= 5),
        ("distillation: 5 points of recall@5 or more, p < 0.01", gain, gain >= 5 and p < 0.01),
    ]
    rows = [[goal, f"{value:.1f}", "holds" if holds else "**does not hold**"] for goal, value, holds in lines]
    return table(["goal", "measured", ""], rows)


def on_named(bench: Bench, all_groups: dict[str, Group], measured: dict[Run, Measured]) -> str:
    """A paragraph on the questions about entities whose names occur in pretraining."""
    named = bench.named()
    cells = []
    for name in ("pretrained", "book closed"):
        right = np.mean([measured[run].right for run in all_groups["models"].rows[name]], axis=0)
        cells.append(f"{100 * right[named].mean():.1f} vs. {100 * right[~named].mean():.1f} ({name})")
    return (
        f"No pretraining passage is about these things, but the names of some occur in one, such as the country of a "
        f"city: {named.sum()} questions. Exact match on these, compared with the others, after 64 examples: "
        f"{', '.join(cells)}."
    )


def lines_of(group: Group, measured: dict[Run, Measured]) -> str:
    """The table of a group, with p of each difference from the first row."""
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
            deviations = [100 * np.std(value, ddof=1) if len(value) > 1 else 0 for value in values]
            axis.errorbar(places, means, deviations, marker="o", markersize=3, capsize=2, label=name)
        axis.set(xlabel=label, ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[1].set_xscale("symlog", linthresh=16)
    axes[1].set_xlim(left=-2)
    axes[1].set_xticks(list(all_curves["examples of fine-tuning"]), [str(n) for n in SHOTS])
    axes[0].set_ylabel("% of the test questions")
    axes[1].legend(loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def page(bench: Bench, all_groups: dict[str, Group], measured: dict[Run, Measured], plot: str) -> str:
    """The text of docs/evidence.md."""
    n, relations = len(bench.questions), len({row["relation"] for row in bench.questions})
    parts = [
        "# What the tiny models show",
        f"Written by `python -m benchmarks.evidence`: {n} test questions over {relations} relations, about things that "
        "no pretraining passage and no example is about. A ± gives mean and standard deviation over "
        "several seeds, each with other examples. p is the significance of the difference from a table's first row, by "
        "randomly flipping the signs of the questions' differences (two-sided): it tells how certain the difference is "
        "for other questions with these models; 0.01 or more counts as not shown. Recall@k is the share of questions "
        "for which one of the first k passages has the answer, as is usual in question answering: an answer that many "
        "passages have, like a continent, is easily found. Guessing the most common answer of each relation in "
        f"training would be right for {100 * bench.guess():.1f} %.",
        f"![Exact match and recall over pretraining and over examples]({plot})",
        "Left: during pretraining, without examples; first the reader learns alone, then both learn. "
        "Right: after fine-tuning.",
        "## Goals set beforehand",
        aims(bench, all_groups, measured),
        on_named(bench, all_groups, measured),
    ]
    for group in all_groups.values():
        parts += [f"## {group.title}", group.text, lines_of(group, measured)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run everything, two runs at a time; write the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo/evidence"), help="for the runs")
    parser.add_argument("--pretraining", type=Path, default=Path("demo/pretraining"), help="of `make demo-pretrain`")
    parser.add_argument("--output", type=Path, default=Path("docs/evidence.md"))
    options = parser.parse_args()
    if not (ROOT / options.pretraining / f"joint/checkpoint/step-{STEPS[1]}").exists():
        parser.error(f"--pretraining {options.pretraining}: no finished pretraining there; run: make demo-pretrain")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install matplotlib")
    bench = Bench(options.directory, options.pretraining)
    all_groups, all_curves = groups(bench), curves(options.pretraining)
    runs = [run for group in all_groups.values() for row in group.rows.values() for run in row]
    runs += [run for points in all_curves.values() for row in points.values() for run in row]
    runs = list(dict.fromkeys(runs))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bench.embed, sorted({run.models for run in runs if run.retrieves and not run.own_index})))
        measured = dict(zip(runs, pool.map(bench.run, runs), strict=True))
    plot = options.output.with_suffix(".png")
    draw(all_curves, measured, ROOT / plot)
    (ROOT / options.output).write_text(page(bench, all_groups, measured, plot.name), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
