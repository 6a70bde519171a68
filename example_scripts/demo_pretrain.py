"""Pretrain the demo's tiny models from scratch, as those of models/tiny were: `make demo-pretrain`.

Prepares the corpus, builds an untrained reader and retriever with their own tokenizers, and pretrains them with
train.py on cloze statements, in two stages. First the reader alone learns to copy from one passage. Then both learn
together: the retriever is only trained on the reader's scores of four passages. The models are exported to ordinary
directories. It takes at most an hour on two cores. Pretraining sees no passage and no question about the things in
dev.jsonl and test.jsonl. A run that was stopped is resumed when the same command is run again. With the same seed, on
the same machine, the models are the same, bit for bit.
"""

import argparse
import sys
from pathlib import Path

from example_scripts.demo import ROOT, call, in_processes, prepare

STEPS = (1000, 1500)  # of the stages
OPTIMISATION = (
    *("--task", "cloze", "--text_maxlength", "128", "--shuffle", "--scheduler", "linear", "--warmup_steps", "50"),
    *("--weight_decay", "0.01", "--beta2", "0.98", "--clip", "1", "--dropout", "0", "--precision", "fp32"),
)
READER = (64, "--n_context", "1", "--lr", "2e-3")  # examples in a step, flags
JOINT = (32, "--n_context", "4", "--retriever_n_context", "4", "--lr", "1e-3")
DISTILLATION = (
    *("--train_retriever", "--gold_score_mode", "pdist", "--temperature_gold", "0.1", "--temperature_score", "0.1"),
    *("--lr_retriever", "3e-4", "--refresh_index", "100"),
)


def build(data: Path, models: Path, seed: int) -> None:
    """Build untrained models, unless they exist."""
    if not (ROOT / models / "retriever/tokenizer_config.json").exists():
        flags = ("--passages", data / "passages.train.jsonl", "--output_directory", models, "--seed", str(seed))
        call(sys.executable, "preprocessing/make_tiny_models.py", *flags)


def pretrain(
    data: Path, start: Path, runs: Path, seed: int, steps: tuple[int, int] = STEPS, distillation: bool = True
) -> Path:
    """Both stages, as runs in `runs`; returns that of the second, which trains only the reader without distillation."""
    train(data, start, runs, "reader", steps[0], seed, *READER)
    name = "joint" if distillation else "without-distillation"
    learning = DISTILLATION if distillation else ()
    train(data, start, runs, name, steps[1], seed + 1, *JOINT, *learning, "--model_path", runs / "reader")
    return runs / name


def train(
    data: Path, start: Path, runs: Path, name: str, steps: int, seed: int, batch_size: int, *flags: str | Path
) -> None:
    """One run of train.py; does nothing if it is finished."""
    in_processes(
        "train.py",
        batch_size,
        *("--name", name, "--checkpoint_dir", runs, "--total_steps", str(steps), "--seed", str(seed)),
        *("--train_data", data / "pretrain.jsonl", "--passages", data / "passages.train.jsonl", *OPTIMISATION),
        *("--reader_model_type", start / "reader", "--retriever_model_path", start / "retriever"),
        *("--log_freq", "50", "--save_freq", "250", *flags),
    )


def export(run: Path, models: Path) -> None:
    """Export a run's models to ordinary directories, in half precision, unless they exist."""
    if not (ROOT / models).exists():
        flags = ("--model_path", run, "--output_directory", models, "--dtype", "fp16")
        call(sys.executable, "preprocessing/export_huggingface.py", *flags)


def main() -> None:
    """Prepare, build, pretrain, export."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="for all output (default: demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    directory = options.directory / "short" if options.short else options.directory
    data, steps = directory / "data", (6, 6) if options.short else STEPS
    home = directory / (f"pretraining-{options.seed}" if options.seed else "pretraining")
    prepare(data)
    build(data, home / "start", options.seed)
    export(pretrain(data, home / "start", home, options.seed, steps), home / "models")
    print(f"\nThe pretrained models: {home}/models/reader and {home}/models/retriever. To evaluate them:")
    print(f"python example_scripts/demo.py --directory {directory} --models {home / 'models'}")


if __name__ == "__main__":
    main()
