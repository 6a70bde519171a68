"""Masked language modelling with retrieval and closed-book: how well masked spans are predicted over the steps.

    python -m benchmarks.pretraining_curves --directory curves --plot curves/curves.png

Both runs are `train.py --task mlm` on the demo's corpus, from the same tiny models, with the same steps, batches and
noise. Spans of held-out passages are predicted. A passage cannot retrieve itself, but the corpus states most facts
again in other words. `--plot` needs matplotlib: pip install matplotlib
"""

import argparse
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from atlas.runtime.device import cpu_precision
from example_scripts.demo import MODELS

ROOT = Path(__file__).resolve().parent.parent
RETRIEVAL = ("--train_retriever", "--gold_score_mode", "pdist", "--n_context", "5", "--retriever_n_context", "5")


def call(*words: object) -> None:
    """Run a script of this repository."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def split(data: Path, directory: Path, held_out: int) -> tuple[Path, Path]:
    """Files of passages to train on and to evaluate on; the latter are about things not seen in pretraining."""
    corpus, seen = ((data / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("passages", "passages.train"))
    seen = seen.splitlines(keepends=True)
    others = sorted(set(corpus.splitlines(keepends=True)) - set(seen))
    random.Random(0).shuffle(others)
    train, held = directory / "train.jsonl", directory / "held_out.jsonl"
    held.write_text("".join(others[:held_out]), encoding="utf-8")
    train.write_text("".join(seen), encoding="utf-8")
    return train, held


def measured(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) of the evaluations in metrics.jsonl."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        if line["kind"] == "evaluation":
            for name, value in line["metrics"].items():
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], file: Path) -> None:
    """Accuracy and f1 of both runs over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, metric in zip(axes, ("accuracy", "f1"), strict=True):
        for name, of_run in curves.items():
            axis.plot(*zip(*of_run[metric], strict=True), marker="o", markersize=3, label=name)
        axis.set(xlabel="steps", title=f"{metric} of held-out spans (%)", ylim=(0, None))
        axis.legend(loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Prepare, train twice, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("curves"), help="where everything goes")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--evaluations", type=int, default=8, help="points of a curve")
    parser.add_argument("--held_out", type=int, default=400, help="passages to evaluate on")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file: .png, .svg or .pdf")
    options = parser.parse_args()
    if options.steps % options.evaluations:
        parser.error(f"--evaluations {options.evaluations} does not divide --steps {options.steps}")
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {options.plot}: give a name that ends in .png, .svg or .pdf")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed here: pip install matplotlib")
    home = options.directory.resolve()
    data, models, every = home / "data", ROOT / MODELS, options.steps // options.evaluations
    if not (data / "passages.jsonl").exists():
        call("preprocessing/prepare_demo.py", "--output_directory", data)
    train, held_out = split(data, home, options.held_out)
    flags = (
        *("--task", "mlm", "--train_data", train, "--eval_data", held_out, "--checkpoint_dir", home, "--restart"),
        *("--reader_model_type", models / "reader", "--retriever_model_path", models / "retriever", "--shuffle"),
        *("--total_steps", options.steps, "--eval_freq", every, "--save_freq", options.steps, "--log_freq", every),
        *("--per_gpu_batch_size", 16, "--text_maxlength", 128, "--generation_max_length", 24, "--dropout", 0),
        *("--lr", 5e-4, "--lr_retriever", 1e-4, "--warmup_steps", 10, "--scheduler", "linear"),
        *("--temperature_gold", 0.1, "--temperature_score", 0.1, "--mlm_mean_noise_span_length", 3),
        *("--precision", cpu_precision()),
    )
    runs = {"with retrieval": ("retrieval", *RETRIEVAL, "--passages", data / "passages.jsonl")}
    runs |= {"closed book": ("closed", "--closed_book")}
    curves = {}
    for title, (name, *more) in runs.items():
        (home / name / "metrics.jsonl").unlink(missing_ok=True)
        call("train.py", "--name", name, *flags, *more)
        curves[title] = measured(home / name / "metrics.jsonl")
    for title, of_run in curves.items():
        for metric in ("accuracy", "f1"):
            print(f"{title:16}{metric:10}" + " ".join(f"{value:6.1f}" for _, value in of_run[metric]))
    if options.plot:
        draw(curves, options.plot)
        print(options.plot)


if __name__ == "__main__":
    main()
