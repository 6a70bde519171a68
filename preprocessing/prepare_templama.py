"""Fetch TempLAMA and write the queries whose answer changed between 2017 and 2020, in a file for each of these years.

    python preprocessing/prepare_templama.py --output_directory $DATA_DIR

Writes `data/templama_data/temp_lama.{train,valid,test}.{2017,2020}.jsonl` with `question`, which has `<extra_id_0>` in
place of the answer, `answers`, `id` and `date`. The files of both years have the same questions in the same order. Use
them for the task qa with `--qa_prompt_format "{question}"`.
"""

from collections.abc import Iterator
from pathlib import Path

import preparing
import sources

FIRST_YEAR, LATER_YEAR = YEARS = ("2017", "2020")
ORIGINAL_NAMES = {"train": "train", "valid": "val", "test": "test"}
GAP, SENTINEL = "_X_", "<extra_id_0>"


def cloze(record: dict) -> dict:
    """A line of TempLAMA: one query in one year. Raises: ValueError."""
    query, answers = preparing.string(record, "query"), record.get("answer")
    if GAP not in query:
        raise ValueError(f"no {GAP} in `query`: {query!r:.60}")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError(f"`answer` must be a list of objects with a `name`, found {answers!r:.40}")
    return {
        "id": record.get("id"),
        "question": query.replace(GAP, SENTINEL),
        "answers": [preparing.string(answer, "name") for answer in answers],
        "date": str(record.get("date")),
    }


def changed(rows: list[dict]) -> list[dict[str, dict]]:
    """For each query that has answers in both years but none in common: its row for each year."""
    by_question: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_question.setdefault(row["question"], {})[row["date"]] = row
    both = [years for years in by_question.values() if years.keys() >= set(YEARS)]
    return [years for years in both if not set(years[FIRST_YEAR]["answers"]) & set(years[LATER_YEAR]["answers"])]


def prepare(originals: dict[str, Path]) -> Iterator[tuple[str, list[dict]]]:
    """Paths and rows of all files."""
    for split, original in ORIGINAL_NAMES.items():
        kept = changed(preparing.read_jsonl(originals[f"{original}.json"], cloze))
        for year in YEARS:
            yield f"data/templama_data/temp_lama.{split}.{year}.jsonl", [years[year] for years in kept]


def main() -> None:
    arguments = preparing.make_parser(__doc__, sources.TEMPLAMA).parse_args()
    preparing.run("prepare_templama", arguments, sources.TEMPLAMA, prepare)
    print('The questions contain <extra_id_0>: use them with --task qa --qa_prompt_format "{question}"')


if __name__ == "__main__":
    main()
