"""Pretrain the demo's tiny models from nothing, as those of models/tiny were: `make demo-pretrain`.

Prepares the corpus, builds an untrained reader and retriever with tokenizers of their own, pretrains both together with
train.py on statements with a gap (at most an hour on two cores), and exports them to ordinary directories. Nothing of
it sees a passage about, or a question for, the things that are asked about in dev.jsonl and test.jsonl. A run that was
stopped goes on when the same command is typed again. With the same seed, on the same machine, the models come out the
same, bit for bit.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from example_scripts.demo import ROOT, call, prepare, two_processes

STEPS = 3000
TRAINING = (
    *("--task", "cloze", "--n_context", "4", "--retriever_n_context", "4", "--text_maxlength", "128"),
    *("--per_gpu_batch_size", "16", "--lr", "2e-3", "--scheduler", "linear", "--warmup_steps", "50"),
    *("--weight_decay", "0.01", "--beta2", "0.98", "--clip", "1", "--dropout", "0", "--precision", "fp32"),
)
DISTILLATION = (
    *("--train_retriever", "--gold_score_mode", "pdist", "--temperature_gold", "0.1", "--temperature_score", "0.1"),
    *("--lr_retriever", "3e-4", "--refresh_index", "100"),
)


def start_models(data: Path, models: Path, seed: int) -> None:
    """Make untrained models, unless they are there."""
    if not (ROOT / models / "retriever/tokenizer_config.json").exists():
        flags = ("--passages", data / "passages.train.jsonl", "--output_directory", models, "--seed", str(seed))
        call(sys.executable, "preprocessing/make_tiny_models.py", *flags)


def flags_of_pretraining(
    data: Path, models: Path, *, steps: int, seed: int, distillation: bool = True
) -> tuple[str | Path, ...]:
    """Flags of train.py, without the run's name and place."""
    return (
        *("--train_data", data / "pretrain.jsonl", "--passages", data / "passages.train.jsonl"),
        *("--reader_model_type", models / "reader", "--retriever_model_path", models / "retriever"),
        *("--total_steps", str(steps), "--seed", str(seed), "--log_freq", "50", *TRAINING),
        *(DISTILLATION if distillation else ()),
    )


def export(run: Path, models: Path) -> None:
    """Write a run's models as ordinary directories, in half precision."""
    flags = ("--model_path", run, "--output_directory", models, "--dtype", "fp16")
    call(sys.executable, "preprocessing/export_huggingface.py", *flags)


def main() -> None:
    """Prepare, build, pretrain, export."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of pretraining (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    home = options.directory
    data, start, models = home / "data", home / "pretraining/start", home / "pretraining/models"
    prepare(data)
    start_models(data, start, options.seed)
    flags = flags_of_pretraining(data, start, options.steps, options.seed)
    place = ("--name", "run", "--checkpoint_dir", home / "pretraining", "--save_freq", "500", "--keep_checkpoints", "1")
    two_processes("train.py", *place, *flags)
    if not (ROOT / models).exists():
        export(home / "pretraining/run", models)
    print(f"\nThe pretrained models: {models}/reader and /retriever. See what they can do:")
    print(f"python example_scripts/demo.py --directory {home} --models {models}")


if __name__ == "__main__":
    main()
