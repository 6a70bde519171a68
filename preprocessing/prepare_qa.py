"""Fetch NaturalQuestions and TriviaQA and write their questions and answers, and few-shot training files.

    python preprocessing/prepare_qa.py --output_directory $DATA_DIR

Writes `nq_data/` and `triviaqa_data/`: `train.jsonl`, `dev.jsonl`, `test.jsonl`, with `question`, `answers` and, for
TriviaQA, `target`, and `train.{n}-shot.jsonl` for each n of `--shots`. Blank answers are left out. The 64 are those of
the paper; other numbers are a seeded choice from train.jsonl, in which a smaller set is the beginning of a larger one.
TriviaQA's archive of 3 GB is streamed: it is never unpacked, neither to disk nor into memory.

With `--from_package` the development and test questions come out of a package on PyPI, for where the hosts of the
original files cannot be reached. It has no training questions, and of TriviaQA no `target`.
"""

import ast
import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tqdm import tqdm

import preparing
import sources
from archives import read_archive
from atlas.files.jsonl import DataError
from flags import at_least
from json_stream import array_items
from packages import read_wheel

PUBLISHED_SHOTS = 64
FEW_SHOT_INDICES = Path(__file__).with_name("few_shot_indices.json")
SPLITS = ("train", "dev", "test")
TOPICS = {  # file of the package's jar to file below the output directory
    f"topics-and-qrels/topics.{name}.{split}.txt": f"{directory}/{split}.jsonl"
    for name, directory in (("nq", "nq_data"), ("dpr.trivia", "triviaqa_data"))
    for split in SPLITS[1:]
}
TWICE_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def naturalquestions(record: dict) -> dict:
    """A line of NQ-open. Raises: ValueError."""
    return {"question": preparing.string(record, "question"), "answers": preparing.strings(record, "answer")}


def triviaqa(record: dict) -> dict:
    """An item of TriviaQA's `Data`. Raises: ValueError."""
    answer = record.get("Answer") if isinstance(record, dict) else None
    if not isinstance(answer, dict):
        raise ValueError("no `Answer` (an object)")
    value = preparing.string(answer, "Value")
    return {
        "question": preparing.string(record, "Question"),
        "target": value.title() if value.isupper() else value,
        "answers": preparing.strings(answer, "Aliases"),
    }


def read_triviaqa(stream: BinaryIO) -> list[dict]:
    """Questions, answers and targets, without the search results that make up most of the file. Raises: ValueError."""
    rows = []
    for number, record in enumerate(tqdm(array_items(stream, "Data"), "TriviaQA", unit=" questions", disable=None), 1):
        try:
            rows.append(triviaqa(record))
        except ValueError as error:
            raise ValueError(f"item {number} of `Data`: {error}") from error
    return rows


def read_positions(stream: BinaryIO) -> list[int]:
    """The line numbers of a split. Raises: ValueError."""
    positions = json.load(stream)
    if not isinstance(positions, list) or not all(type(position) is int for position in positions):
        raise ValueError("expected a list of whole numbers")
    return positions


def read_files(archive: Path, readers: dict[str, Callable[[BinaryIO], Any]]) -> list:
    """The readers' results for the files of these names, in any folder of the archive. Raises: DataError."""

    def choose(name: PurePosixPath):
        return readers.get(name.name)

    results = read_archive(archive, choose, sources.UNPACKED_LIMIT[archive.name])
    by_name = {name.name: result for name, result in results.items()}
    if len(by_name) < len(results):
        raise DataError(f"{archive}: {', '.join(map(str, results))}: the same file more than once")
    if missing := readers.keys() - by_name.keys():
        raise DataError(f"{archive}: it does not contain {sorted(missing)[0]}")
    return [by_name[name] for name in readers]


def splits(
    name: str, train: list[dict], dev: list[dict], positions: list[list[int]], shots: list[int], seed: int
) -> Iterator[tuple[str, list[dict]]]:
    """File names and rows. Train and dev come from the original train file, test comes from the original dev file."""
    original = {"train": train, "dev": train, "test": dev}
    for split, chosen in zip(SPLITS, positions, strict=True):
        yield f"{split}.jsonl", preparing.pick(original[split], chosen, f"the original file for {split} of {name}")
    published = json.loads(FEW_SHOT_INDICES.read_text(encoding="utf-8"))[name]
    shuffled = list(positions[0])
    random.Random(f"{seed} {name}").shuffle(shuffled)
    for number in shots:
        if number > len(shuffled):
            raise DataError(f"--shots {number}: {name} has only {len(shuffled):,} training questions")
        chosen = published if number == PUBLISHED_SHOTS else shuffled[:number]
        yield f"train.{number}-shot.jsonl", preparing.pick(train, chosen, f"the train file of {name}")


def prepare(originals: dict[str, Path], shots: list[int], seed: int) -> Iterator[tuple[str, list[dict]]]:
    """Paths and rows of all files."""
    index_names = [f"{name}.{split}.idx.json" for name in ("NQ", "TQA") for split in SPLITS]
    positions = read_files(originals["dataindex.tar.gz"], dict.fromkeys(index_names, read_positions))
    train, dev = (preparing.read_jsonl(originals[f"NQ-open.{split}.jsonl"], naturalquestions) for split in SPLITS[:2])
    for file, rows in splits("naturalquestions", train, dev, positions[:3], shots, seed):
        yield f"nq_data/{file}", rows
    readers = {f"unfiltered-web-{split}.json": read_triviaqa for split in SPLITS[:2]}
    train, dev = read_files(originals["triviaqa-unfiltered.tar.gz"], readers)
    for file, rows in splits("triviaqa", train, dev, positions[3:], shots, seed):
        yield f"triviaqa_data/{file}", rows


def read_topics(stream: BinaryIO) -> list[dict]:
    """Rows `question<tab>['answer', ...]`, quoted as DPR's files are. Raises: ValueError."""
    rows = []
    table = csv.reader(io.StringIO(stream.read().decode("utf-8"), newline=""), delimiter="\t")
    try:
        for question, answers in table:
            if quoted := TWICE_QUOTED.fullmatch(question):  # a question with quotation marks in it
                question = quoted[1].replace('""', '"')
            record = {"question": question, "answers": ast.literal_eval(answers)}
            rows.append(
                {"question": preparing.string(record, "question"), "answers": preparing.strings(record, "answers")}
            )
    except (csv.Error, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"line {table.line_num}: expected a question, a tab and a list of answers ({error})"
        ) from error
    return rows


def prepare_from_package(originals: dict[str, Path]) -> Iterator[tuple[str, list[dict]]]:
    """Paths and rows of the files that can be made of the topics in the jar in the wheel."""
    (wheel,) = originals.values()
    limit = sources.UNPACKED_LIMIT[wheel.name]

    def read_jar(stream: BinaryIO) -> dict[str, list[dict]]:
        return read_wheel(io.BytesIO(stream.read()), lambda name: read_topics if name in TOPICS else None, limit)

    jars = read_wheel(wheel, lambda name: read_jar if name.endswith("-fatjar.jar") else None, limit)
    topics = {name: rows for jar in jars.values() for name, rows in jar.items()}
    if missing := TOPICS.keys() - topics.keys():
        raise DataError(f"{wheel}: it does not contain {min(missing)}")
    for name, file in TOPICS.items():
        yield file, topics[name]


def main() -> None:
    parser = preparing.make_parser(__doc__, [*sources.QA, sources.QA_PACKAGE])
    parser.add_argument("--from_package", action="store_true", help="dev and test only, out of a package on PyPI")
    parser.add_argument("--shots", type=at_least(1, int), nargs="*", help="default: 64 100")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of few-shot questions, except for 64 of them"
    )
    arguments = parser.parse_args()
    if arguments.from_package:
        if arguments.shots is not None or arguments.seed:
            parser.error("--shots and --seed choose training questions, of which --from_package has none")
        originals, make, chosen = [sources.QA_PACKAGE], prepare_from_package, {"from_package": True}
    else:
        shots = [64, 100] if arguments.shots is None else sorted(set(arguments.shots))
        originals, chosen = sources.QA, {"shots": shots, "seed": arguments.seed}
        make = partial(prepare, **chosen)
    preparing.run("prepare_qa", arguments, originals, make, **chosen)


if __name__ == "__main__":
    main()
