"""Fetch FEVER's claims.

    python preprocessing/prepare_fever.py --output_directory $DATA_DIR

Writes `fever_data/`: `train.jsonl`, `dev.jsonl`, `test.jsonl` (without labels) and `train-64.jsonl`, the 64 training
claims of the paper. Lines have `claim`, `label` and the other fields of the original files.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import preparing
import sources

FEW_SHOT_INDICES = Path(__file__).with_name("few_shot_indices.json")
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def claim(record: dict) -> dict:
    """A line of any split. Raises: ValueError."""
    preparing.string(record, "claim")
    return record


def labelled(record: dict) -> dict:
    """A line of train or dev. Raises: ValueError."""
    if record.get("label") not in LABELS:
        raise ValueError(f"`label` must be one of {', '.join(LABELS)}, found {record.get('label')!r:.40}")
    return claim(record)


def prepare(originals: dict[str, Path]) -> Iterator[tuple[str, list[dict]]]:
    """Paths and rows of all files."""
    train = preparing.read_jsonl(originals["train.jsonl"], labelled)
    few = sorted(json.loads(FEW_SHOT_INDICES.read_text(encoding="utf-8"))["fever"])
    yield "fever_data/train.jsonl", train
    yield "fever_data/train-64.jsonl", preparing.pick(train, few, str(originals["train.jsonl"]))
    yield "fever_data/dev.jsonl", preparing.read_jsonl(originals["shared_task_dev.jsonl"], labelled)
    yield "fever_data/test.jsonl", preparing.read_jsonl(originals["shared_task_test.jsonl"], claim)


def main() -> None:
    arguments = preparing.make_parser(__doc__, sources.FEVER).parse_args()
    preparing.run("prepare_fever", arguments, sources.FEVER, prepare)


if __name__ == "__main__":
    main()
