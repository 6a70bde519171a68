"""The whole system in minutes, in two processes on a CPU, or one for each GPU: `make demo`.

Prepares a corpus of facts and questions, evaluates the tiny reader and retriever of models/tiny on it, fine-tunes both
together on 64 questions with finetune_qa.py, and shows the difference. Every command is printed so that it can be
copied.
"""

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from atlas.metrics import exact_match, retrieval_metrics
from atlas.runtime.launch import available_cores

ROOT = Path(__file__).resolve().parent.parent
MODELS = Path("models/tiny")  # pretrained by example_scripts/demo_pretrain.py
DEPTHS = (1, 5, 20)
READING = ("--task", "qa", "--text_maxlength", "128", "--n_context", "5", "--generation_max_length", "32")
SEARCHING = ("--task", "qa", "--text_maxlength", "128", "--n_context", str(max(DEPTHS)), "--retrieve_only")
MOST_PROCESSES = 16  # every batch can be divided by that
# These settings were chosen on dev.jsonl.
FINE_TUNING = (
    *("--retriever_n_context", "5", "--lr", "5e-4", "--lr_retriever", "1e-4", "--dropout", "0", "--shuffle"),
    *("--gold_score_mode", "pdist", "--temperature_gold", "0.1", "--temperature_score", "0.1"),
)
FINE_TUNING_STEPS = 40  # with 16 examples in each


def call(*words: str | Path) -> None:
    """Print a command and run it in the repository's root directory."""
    line = shlex.join(map(str, words))
    print(f"\n$ {line.replace(sys.executable, 'python')}", flush=True)
    # torchrun's processes share the processors, so threads must not spin while they wait.
    threads = "1" if any("torchrun" in str(word) for word in words) else str(available_cores())
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **os.environ}
    subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, check=True)


@functools.cache
def processes() -> int:
    """One for each GPU, as many as a power of two has; two without any."""
    gpus = torch.cuda.device_count()
    return min(MOST_PROCESSES, 2 ** (gpus.bit_length() - 1)) if gpus else 2


def in_processes(script: str, batch_size: int, *flags: str | Path) -> None:
    """Run a script by torchrun, with `batch_size` examples a step over all its processes."""
    launcher = Path(sys.executable).with_name("torchrun")
    call(
        launcher.relative_to(ROOT) if launcher.is_relative_to(ROOT) else launcher,
        *("--standalone", "--nnodes", "1", "--nproc_per_node", str(processes()), script),
        *("--per_gpu_batch_size", str(batch_size // processes()), *flags),
    )


def prepare(data: Path) -> None:
    """Write the corpus and its questions, even if they exist: they may be of another version."""
    call(sys.executable, "preprocessing/prepare_demo.py", "--output_directory", data)


def read(file: Path) -> list[dict]:
    """The rows of a result file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def measure(answered: Path, searched: Path) -> dict[str, float]:
    """Percentages: exact match of the answers, and recall of a search for more passages."""
    answers, recalls = read(answered), [retrieval_metrics(row["passages"], row["answers"]) for row in read(searched)]
    measured = {"exact match": sum(exact_match(row["generation"], row["answers"]) for row in answers)}
    measured |= {f"recall@{k}": sum(recall[f"recall@{k}"] for recall in recalls) for k in DEPTHS}
    return {name: 100 * value / len(answers) for name, value in measured.items()}


def show(before: tuple[Path, Path], after: tuple[Path, Path], questions: int) -> None:
    """Print a table of both measurements, and a few questions with their passages and answers."""
    first, second, rows = measure(*before), measure(*after), read(after[0])
    print(f"\n{len(rows)} test questions about things that no training question is about")
    print(f"{'':14}{'before':>8}{'after 64 examples':>20}")
    for name in first:
        print(f"{name:14}{first[name]:8.1f}{second[name]:20.1f}")
    right = [row for row in rows if exact_match(row["generation"], row["answers"])]
    wrong = [row for row in rows if not exact_match(row["generation"], row["answers"])]
    for row in (right[: questions - 1] + wrong + right[questions - 1 :])[:questions]:
        verdict = "right" if exact_match(row["generation"], row["answers"]) else f"not {' or '.join(row['answers'])}"
        print(f"\n{row['query']}")
        for passage in row["passages"][:3]:
            print(f"    {passage['score']:8.2f}  {passage['title']} | {passage['text']}")
        print(f"    answer: {row['generation']}   ({verdict})")


def main() -> None:
    """Prepare, measure, train, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="for all output (default: demo)")
    parser.add_argument("--models", type=Path, default=MODELS, help=f"models to start from (default: {MODELS})")
    parser.add_argument("--short", action="store_true", help="a fraction of the training, to see that it runs")
    options = parser.parse_args()
    started = time.monotonic()
    home = options.directory if not options.short else options.directory / "short"
    data, models, experiments = home / "data", options.models, home / "experiments"
    steps = 6 if options.short else FINE_TUNING_STEPS

    prepare(data)
    test = data / "test.jsonl"
    if options.short:
        test = data / "few.jsonl"
        lines = (ROOT / data / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (ROOT / test).write_text("".join(lines[:40]), encoding="utf-8")
    flags = (
        *("--eval_data", test, "--checkpoint_dir", experiments, "--retriever_model_path", models / "retriever"),
        "--write_results",
    )
    # The passages are embedded only once: fine-tuning changes the query encoder alone.
    embed = ("--passages", data / "passages.jsonl", "--save_index_path", home / "index")
    index = ("--load_index_path", home / "index")
    search = (*flags, *SEARCHING)
    # finetune_qa.py would use bf16; in fp32 the figures are the same on all CPUs.
    answer = (*flags, *READING, "--precision", "fp32", "--reader_model_type", models / "reader")

    in_processes("evaluate.py", 16, "--name", "before", *answer, *embed)
    in_processes("evaluate.py", 128, "--name", "before-search", *search, *index)
    in_processes(
        "finetune_qa.py",
        16,
        *("--name", "after", "--restart", "--train_data", data / "train.64-shot.jsonl", *answer, *FINE_TUNING),
        *("--total_steps", str(steps), "--eval_freq", str(steps // 2), *index),
    )
    in_processes("evaluate.py", 128, "--name", "after-search", *search, *index, "--model_path", experiments / "after")
    after = experiments / "after" / f"{test.stem}-step-{steps}.jsonl"
    before = experiments / "before" / f"{test.stem}-step-0.jsonl"
    searches = [experiments / f"{name}-search" / f"{test.stem}-step-0.jsonl" for name in ("before", "after")]
    show((ROOT / before, ROOT / searches[0]), (ROOT / after, ROOT / searches[1]), questions=3)
    print(f"\nAll answers with their passages: {after}")
    print(f"The fine-tuned model: {experiments / 'after' / 'checkpoint' / 'latest'}")
    print(f"It took {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"Curves, mistakes and every question, for a browser: {experiments / 'after' / 'report.html'}")


if __name__ == "__main__":
    main()
