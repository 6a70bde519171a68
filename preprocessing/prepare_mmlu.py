"""Fetch MMLU's multiple-choice questions and arrange them for the paper's three training settings.

    python preprocessing/prepare_mmlu.py --output_directory $DATA_DIR

Writes `data/mmlu_data/`, with `question`, `options` {A, B, C, D}, `answer` and `dataset` (such as `anatomy_test`) in
each line:

- `5-shot/{train,valid,test}/{subject}.{train,valid,test}.jsonl`: a model per subject, from five examples.
- `5-shot-multitask/{train,combined_valid,combined_test}.jsonl`: one model, from the five examples of all subjects.
- `full/{train,combined_valid,combined_test}.jsonl`: one model, from these examples and the auxiliary questions that
  MMLU's authors took from other data sets.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import preparing
import sources
from archives import read_archive
from atlas.files.jsonl import DataError

LETTERS = "ABCD"
ORIGINAL_NAMES = {"train": "dev", "valid": "val", "test": "test"}  # MMLU's dev has the five examples
TABLE = re.compile(r"(?:.*/)?(auxiliary_train|dev|val|test)/([\w-]+)\.csv")


def read_table(stream: BinaryIO) -> list[dict]:
    """Rows of question, A, B, C, D, answer, without a header. Raises: ValueError."""
    examples = []
    table = csv.reader(io.StringIO(stream.read().decode("utf-8"), newline=""))
    try:
        for row in table:
            if len(row) != 6 or row[5] not in tuple(LETTERS):
                raise ValueError(f"expected question, A, B, C, D and the letter of the answer, found {row!r:.90}")
            examples.append(
                {"question": row[0], "options": dict(zip(LETTERS, row[1:5], strict=True)), "answer": row[5]}
            )
    except (csv.Error, ValueError) as error:
        raise ValueError(f"line {table.line_num}: {error}") from error
    return examples


def read_tables(archive: Path) -> dict[str, dict[str, list[dict]]]:
    """Folder (auxiliary_train, dev, val, test) to subject to examples, subjects in order. Raises: DataError."""

    def choose(name: PurePosixPath):
        return read_table if TABLE.fullmatch(str(name)) else None

    folders: dict[str, dict[str, list[dict]]] = {"auxiliary_train": {}, "dev": {}, "val": {}, "test": {}}
    for name, examples in sorted(read_archive(archive, choose, sources.UNPACKED_LIMIT[archive.name]).items()):
        folder, dataset = TABLE.fullmatch(str(name)).groups()
        subject = dataset.removesuffix(f"_{folder}")
        folders[folder][subject] = [example | {"dataset": dataset} for example in examples]
    subjects = [folders[folder].keys() for folder in ORIGINAL_NAMES.values()]
    if not all(subjects) or subjects.count(subjects[0]) != 3 or not folders["auxiliary_train"]:
        raise DataError(f"{archive}: it must contain auxiliary_train, and dev, val and test for the same subjects")
    return folders


def prepare(originals: dict[str, Path]) -> Iterator[tuple[str, list[dict]]]:
    """Paths and rows of all files."""
    folders = read_tables(originals["data.tar"])
    together = {folder: [example for rows in tables.values() for example in rows] for folder, tables in folders.items()}
    root = "data/mmlu_data"
    for split, folder in ORIGINAL_NAMES.items():
        for subject, examples in folders[folder].items():
            yield f"{root}/5-shot/{split}/{subject}.{split}.jsonl", examples
    for setting, auxiliary in (("5-shot-multitask", []), ("full", together["auxiliary_train"])):
        yield f"{root}/{setting}/train.jsonl", auxiliary + together["dev"]
        yield f"{root}/{setting}/combined_valid.jsonl", together["val"]
        yield f"{root}/{setting}/combined_test.jsonl", together["test"]


def main() -> None:
    arguments = preparing.make_parser(__doc__, sources.MMLU).parse_args()
    preparing.run("prepare_mmlu", arguments, sources.MMLU, prepare)


if __name__ == "__main__":
    main()
