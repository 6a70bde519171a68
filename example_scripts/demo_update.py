"""Facts change, and the answers follow the index without any training: after `make demo`, in a few minutes.

The paper swaps an index of 2017 for one of 2020 and gets the answers of 2020 from a model of 2017. Here every fact that
a test question asks for is exchanged with that of another thing: capitals move, cities grow, airports get other
codes. The passages that say so are put in the place of the old ones by preprocessing/update_index.py; nothing else is
embedded. The demo's fine-tuned model is then asked for the old facts and for the new ones, with either index.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

from atlas.metrics import exact_match
from example_scripts.demo import READING, ROOT, call, in_processes, read


def exchanged(questions: list[dict]) -> list[dict]:
    """The questions, each with the answers of the next one of its relation whose answer is another.

    Left out are those whose answer is that of another question about the same thing.
    """
    asked_of = Counter((thing(row), row["answers"][0]) for row in questions)
    by_relation = defaultdict(list)
    for row in questions:
        if asked_of[thing(row), row["answers"][0]] == 1:
            by_relation[row["relation"]].append(row)
    answers = {}
    for rows in by_relation.values():
        for i, row in enumerate(rows):
            others = [other["answers"] for other in rows[i + 1 :] + rows[:i] if other["answers"] != row["answers"]]
            answers |= {row["id"]: others[0]} if others else {}
    return [row | {"answers": answers[row["id"]]} for row in questions if row["id"] in answers]


def thing(row: dict) -> str:
    """What a question or a passage is about: `country-17-capital` and `country-17-government-0` -> `country-17`."""
    return "-".join(row["id"].split("-")[:2])


def rewritten(passages: list[dict], before: list[dict], after: list[dict]) -> list[dict]:
    """The passages in which a fact has changed; every fact ends a sentence."""
    old = {row["id"]: row["answers"][0] for row in before}
    changes = defaultdict(dict)
    for row in after:
        changes[thing(row)][old[row["id"]]] = row["answers"][0]
    found = []
    for passage in passages:
        facts = changes.get(thing(passage), {})
        pattern = "|".join(rf"(?<= ){re.escape(fact)}(?=\.( |$))" for fact in sorted(facts, key=len, reverse=True))
        text = re.sub(pattern, lambda match, facts=facts: facts[match[0]], passage["text"]) if facts else None
        found += [passage | {"text": text}] if text not in (None, passage["text"]) else []
    return found


def write(path: Path, rows: list[dict]) -> Path:
    """One row a line; the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    """Change facts, update a copy of the index, ask."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="of `make demo` (default: demo)")
    home = parser.parse_args().directory
    data, model, index, updated = home / "data", home / "experiments/after", home / "index", home / "index-updated"

    questions = read(ROOT / data / "test.jsonl")
    after = exchanged(questions)
    kept = {row["id"] for row in after}
    before = [row for row in questions if row["id"] in kept]
    passages = rewritten(read(ROOT / data / "passages.jsonl"), before, after)
    files = [write(ROOT / data / "before.jsonl", before), write(ROOT / data / "after.jsonl", after)]
    write(ROOT / data / "changed.jsonl", passages)
    print(f"{len(after)} facts change, in {len(passages)} passages")

    shutil.rmtree(ROOT / updated, ignore_errors=True)
    shutil.copytree(ROOT / index, ROOT / updated)
    changed = ("--passages", data / "changed.jsonl", "--model_path", model)
    call(sys.executable, "preprocessing/update_index.py", updated, *changed)
    asked = ("--eval_data", data / "before.jsonl", data / "after.jsonl", "--checkpoint_dir", home / "experiments")
    for name, searched in (("index-before", index), ("index-after", updated)):
        flags = (*READING, *asked, "--model_path", model, "--load_index_path", searched, "--precision", "fp32")
        in_processes("evaluate.py", 32, "--name", name, "--write_results", *flags)
    show(ROOT / home / "experiments", [file.stem for file in files], before, after)


def show(experiments: Path, asked: list[str], before: list[dict], after: list[dict]) -> None:
    """Print how many answers are right, and how a few of them moved."""
    found = {
        (index, name): read(experiments / f"index-{index}" / f"{name}-step-0.jsonl")
        for index in ("before", "after")
        for name in asked
    }
    print(f"\n{'exact match of the same model':32}{'the old facts':>16}{'the new facts':>16}")
    for index, label in (("before", "with the index as it was"), ("after", "with the updated index")):
        right = [
            100 * sum(exact_match(row["generation"], row["answers"]) for row in rows) / len(rows)
            for rows in (found[index, name] for name in asked)
        ]
        print(f"{label:32}{right[0]:16.1f}{right[1]:16.1f}")
    moved = [i for i, row in enumerate(before) if row["relation"] == "country.capital"][:3]
    for i in moved:
        answers = [found[index, asked[0]][i]["generation"] for index in ("before", "after")]
        print(f"\n{before[i]['question']}\n    {answers[0]} -> {answers[1]}   (now it is {after[i]['answers'][0]})")


if __name__ == "__main__":
    main()
