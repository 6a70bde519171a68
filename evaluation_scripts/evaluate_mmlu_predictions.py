"""Accuracy on MMLU by category, from the result files of `--task multiple_choice`.

    python evaluation_scripts/evaluate_mmlu_predictions.py experiments/mmlu/combined_test-step-100.jsonl
    python evaluation_scripts/evaluate_mmlu_predictions.py experiments/mmlu_5_shot/

The second form takes a directory with a run for each subject, and uses the last step of every evaluation file in it.
`debiased` is the accuracy of the option that is most probable over all orders of the options, `standard` that of the
answer generated for the original order. As in MMLU's own evaluation, all questions have the same weight.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from atlas.config import sentence
from atlas.files.jsonl import DataError, JsonlCorpus

# The 57 subjects by subcategory, and the subcategories by category (Hendrycks et al. 2021).
SUBJECTS = {
    "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
    "chemistry": ("college_chemistry", "high_school_chemistry"),
    "biology": ("college_biology", "high_school_biology"),
    "computer science": (
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ),
    "math": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    ),
    "engineering": ("electrical_engineering",),
    "history": (
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "prehistory",
    ),
    "philosophy": (
        "formal_logic",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "world_religions",
    ),
    "law": ("international_law", "jurisprudence", "professional_law"),
    "politics": (
        "high_school_government_and_politics",
        "public_relations",
        "security_studies",
        "us_foreign_policy",
    ),
    "culture": ("human_sexuality", "sociology"),
    "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
    "geography": ("high_school_geography",),
    "psychology": ("high_school_psychology", "professional_psychology"),
    "other": ("global_facts", "miscellaneous", "professional_accounting"),
    "business": ("business_ethics", "management", "marketing"),
    "health": (
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
}
CATEGORIES = {
    "STEM": ("physics", "chemistry", "biology", "computer science", "math", "engineering"),
    "humanities": ("history", "philosophy", "law"),
    "social sciences": ("politics", "culture", "economics", "geography", "psychology"),
    "other (business, health, misc.)": ("other", "business", "health"),
}
SUBCATEGORY = {subject: name for name, subjects in SUBJECTS.items() for subject in subjects}
DATASET = re.compile(r"(.+)_(test|valid|val)")
SPLIT = {"test": "test", "val": "valid", "valid": "valid", None: None}


class Score(NamedTuple):
    """The scores of a question: 1 or 0, or None if the file does not have them."""

    debiased: float | None
    standard: float | None


def score(row: dict) -> tuple[str, str | None, Score]:
    """The subject, split and score of a row. Raises: ValueError."""
    rows = row.get("permutations")
    if not isinstance(rows, list) or not all(isinstance(of_order, dict) for of_order in rows):
        raise ValueError(f"no `permutations`, so not a result of --task multiple_choice; found {', '.join(row)}")
    originals = [of_order for of_order in rows if (of_order.get("metadata") or {}).get("is_original")]
    if len(originals) != 1:
        raise ValueError(f"{len(originals)} of its `permutations` have `is_original` set in `metadata`; one must")
    (original,) = originals
    line = original["metadata"]
    for field, kind in (("dataset", str), ("options", dict), ("answer", str)):
        if not isinstance(line.get(field), kind):
            raise ValueError(f"no `{field}` in the `metadata` of `permutations`; found {', '.join(line)}")
    match = DATASET.fullmatch(line["dataset"])
    subject, split = match.groups() if match else (line["dataset"], None)
    if subject not in SUBCATEGORY:
        raise ValueError(f"`dataset` {line['dataset']!r} is not one of MMLU's {len(SUBCATEGORY)} subjects")
    options, right = line["options"], line["answer"]
    probabilities = row.get("choice_probs")
    if right not in options or (probabilities is not None and set(probabilities) != set(options)):
        raise ValueError(f"`answer` and `choice_probs` must have the letters of `options`, {', '.join(options)}")
    debiased = standard = None
    if probabilities is not None:
        chosen = max(probabilities, key=probabilities.get)
        debiased = float(options[chosen] == options[right])
    if "generation" in original:
        standard = float(original["generation"] == right)
    return subject, SPLIT[split], Score(debiased, standard)


def result_files(path: Path) -> list[Path]:
    """The file itself, or the last step of each evaluation file in a directory and its subdirectories.

    Raises: DataError if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or directory {path}")
    last: dict[Path, tuple[int, Path]] = {}
    for file in path.rglob("*.jsonl"):
        if match := re.fullmatch(r"(.+)-step-(\d+)\.jsonl", file.name):
            name, step = file.parent / match[1], int(match[2])
            last[name] = max(last.get(name, (-1, file)), (step, file))
    if not last:
        raise DataError(f"{path}: no result files NAME-step-N.jsonl in it; run with --write_results")
    return [file for _, (_, file) in sorted(last.items())]


def read(files: Iterable[Path], split: str | None) -> dict[str, list[Score]]:
    """Scores by subject, of one split: the given one, else test if there are test questions, else the only one.

    Raises: DataError for a bad row, for a subject in two files, or if there is nothing of the split.
    """
    by_split: dict[str | None, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    source: dict[tuple[str, str | None], Path] = {}
    for file in files:
        rows = JsonlCorpus([file])
        for number in range(len(rows)):
            try:
                subject, of_split, result = score(rows[number])
            except DataError:
                raise
            except ValueError as error:
                raise DataError(f"{rows.where(number)}: {error}") from error
            if source.setdefault((subject, of_split), file) != file:
                raise DataError(f"{subject} is both in {source[subject, of_split]} and in {file}: remove one of them")
            by_split[of_split][subject].append(result)
    if not by_split:
        raise DataError(f"{', '.join(map(str, files))}: contains no results")
    split = split or ("test" if "test" in by_split else next(iter(by_split)))
    if split not in by_split:
        raise DataError(f"no results for the split {split}, only for {', '.join(map(str, by_split))}")
    return by_split[split]


def mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else 100 * sum(values) / len(values)


def table(by_subject: dict[str, list[Score]]) -> Iterator[str]:
    """Lines of a table: each category with its subcategories and their subjects, and at the end all subjects."""

    def line(name: str, indent: int, subjects: Iterable[str]) -> Iterator[str]:
        scores = [score for subject in subjects for score in by_subject.get(subject, [])]
        if scores:
            means = (mean(score.debiased for score in scores), mean(score.standard for score in scores))
            shown = ("-" if value is None else f"{value:.1f}" for value in means)
            yield f"{' ' * indent + name:44}{len(scores):>9}" + "".join(f"{value:>10}" for value in shown)

    yield f"{'':44}{'questions':>9}{'debiased':>10}{'standard':>10}"
    for category, subcategories in CATEGORIES.items():
        yield from line(category, 0, [subject for name in subcategories for subject in SUBJECTS[name]])
        for subcategory in subcategories:
            yield from line(subcategory, 2, SUBJECTS[subcategory])
            for subject in SUBJECTS[subcategory]:
                yield from line(subject, 4, [subject])
    yield from line(f"all ({len(by_subject)} of {len(SUBCATEGORY)} subjects)", 0, SUBCATEGORY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="a result file, or a directory of runs")
    parser.add_argument("--split", choices=("test", "valid"), help="which questions (default: test, if there are any)")
    arguments = parser.parse_args()
    try:
        print("\n".join(table(read(result_files(arguments.results), arguments.split))))
    except (DataError, OSError) as error:
        sys.exit(f"error: {sentence(error)}")


if __name__ == "__main__":
    main()
