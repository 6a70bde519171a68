"""What fits one card, for fine-tuning and for evaluation, from base to xxl: tables of docs/training.md.

    python -m benchmarks.one_card

Memory and time are those of the planner, for commands with the presets of `finetune_qa.py` and the compressed index of
Wikipedia.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence

from atlas.command_line import parse_config
from atlas.config import Config
from benchmarks.cards import CARDS
from benchmarks.memory import GIB, PASSAGES, READERS
from benchmarks.planner import PQ_BYTES, Machine, Need, Planner, shapes_of
from finetune_qa import PRESET

ONES = ("rtx3060-12gb", "rtx4080", "rtx4090", "l40s", "a100-80gb")  # of 12, 16, 24, 48 and 80 GB
INDEX = ("--index_mode", "faiss", "--faiss_index_type", "pq", "--faiss_code_size", str(PQ_BYTES))
# What is trained, the best first; and which activations are computed twice, the fastest first.
TRAINED = ("", "--optimizer adamw8bit", "--lora_rank 16 --retriever_lora_rank 16 --frozen_precision bf16")
KEPT = "--no-use_gradient_checkpoint_reader --no-use_gradient_checkpoint_retriever"
RECOMPUTED = (KEPT, "--gradient_checkpoint_every 2", "")
EVALUATED = ("", "--per_gpu_eval_batch_size 1", "--per_gpu_eval_batch_size 1 --int8_reader")
OF_MODEL = ("task", "text_maxlength", "target_maxlength", "generation_max_length", "n_context", "precision")


def command(reader: str, flags: Iterable[str], *, training: bool) -> Config:
    """That of finetune_qa.py, or of evaluate.py for its model, with the compressed index and more flags."""
    words = ["--name", "run", "--eval_data", "test.jsonl", "--load_index_path", "index", *INDEX]
    words += ["--reader_model_type", f"google/t5-{reader}-lm-adapt", *" ".join(flags).split()]
    if training:
        return parse_config([*words, "--train_data", "train.jsonl"], program="finetune_qa", runs_here=False, **PRESET)
    of_model = {name: PRESET[name] for name in (*OF_MODEL, "query_side_retriever_training")}
    return parse_config(words, program="evaluate", runs_here=False, **of_model)


def planners(readers: Iterable[str], *, training: bool) -> dict[str, Planner]:
    """One for each reader, for all cards: their fake steps are the same."""
    machine = Machine(CARDS[ONES[0]], gpus=1)
    return {
        reader: Planner(shapes_of(command(reader, (), training=training), PASSAGES), machine, training=training)
        for reader in readers
    }


def fitting(planner: Planner, reader: str, candidates: Iterable[Sequence[str]]) -> tuple[str, Need] | None:
    """The first of these flags with which the reader fits the planner's card, and what it needs then."""
    for flags in candidates:
        need = planner.need(command(reader, flags, training=planner.training))
        if need.bytes <= planner.machine.bytes:
            return " ".join(filter(None, flags)), need
    return None


def best_training(planner: Planner, reader: str) -> tuple[str, Need] | None:
    """Training as much as fits in any way, and that in the fastest way that fits."""
    for trained in TRAINED:
        if fitting(planner, reader, [(trained, RECOMPUTED[-1])]):
            return fitting(planner, reader, [(trained, again) for again in RECOMPUTED])
    return None


def rows(readers: Sequence[str], *, training: bool) -> Iterator[list[str]]:
    """Card, reader, flags to add, GiB, and questions (in training also tokens) a second, for every card and reader."""
    found = planners(readers, training=training)
    for name in ONES:
        for reader in readers:
            planner = found[reader].on(Machine(CARDS[name], gpus=1))
            best = best_training(planner, reader) if training else fitting(planner, reader, [(f,) for f in EVALUATED])
            start = [f"{CARDS[name].gigabytes} GB ({name})", reader]
            yield [*start, *(_said(planner, reader, *best) if best else ["none fits", *["–"] * (2 + training)])]


def _said(planner: Planner, reader: str, flags: str, need: Need) -> list[str]:
    settings = planner.settings(command(reader, [flags], training=planner.training))
    questions = settings.per_gpu_batch_size / need.step
    tokens = questions * settings.n_context * settings.text_maxlength
    said = [f"`{flags}`" if flags else "nothing", f"{need.bytes / GIB:.1f}"]
    return [*said, *([f"{tokens:,.0f}"] if planner.training else []), f"{questions:.2g}"]


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=READERS, default=list(READERS), help="of the reader")
    sizes = parser.parse_args(arguments).sizes
    for training, numbers in ((True, ["GiB", "tokens/s", "questions/s"]), (False, ["GiB", "questions/s"])):
        header = [["card", "reader", "flags to add", *numbers], ["---", "---", "---", *["---:"] * len(numbers)]]
        for cells in itertools.chain(header, rows(sizes, training=training)):
            print("| " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
