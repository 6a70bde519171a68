"""The commands of the README and of docs/: every flag in them exists, every script and file they name is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from atlas import config
from tests.kit import command_line, read_jsonl, world, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = [
    command.strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in re.sub(r"\\\n", " ", block).splitlines()
    if command.strip() and not command.startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if "-m" in words:  # python -m benchmarks.memory
        words = [f"{word.replace('.', '/')}.py" if before == "-m" else word for before, word in pairwise(words)]
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / script).is_file()
    if script in ("train.py", "evaluate.py", "finetune_qa.py"):
        flags = words[words.index(script) + 1 :]
        _, unknown = config._make_parser(script.removesuffix(".py"), {}).parse_known_args(flags)
        assert not unknown


def test_files_named_in_the_tour_exist():
    tour = README.split("## Tour of the code")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py|[\w/]+/(?=\s)", tour))
    assert all((ROOT / name).exists() for name in named), named
    package = ROOT / "src/atlas"
    rooms = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__.py"} <= {Path(name).name for name in named}


def test_links_between_pages():
    for name in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        path = ROOT / name
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{name}: {target}"


def test_nothing_is_left_to_fill_in():
    assert not any(re.search(r"@[A-Z]+@", page) for page in PAGES)


@pytest.mark.processes
def test_the_task_of_your_own_runs(tmp_path):
    """Put in as the README says, trained for two steps and evaluated; a bad line is told."""
    section = README.split("## Your own task\n")[1].split("\n## ")[0]
    code, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    home = tmp_path / "checkout"
    shutil.copytree(ROOT / "src", home / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", home)
    environment = {**os.environ, "PYTHONPATH": str(home / "src")}  # not the package that is installed
    (home / "src/atlas/tasks/year.py").write_text(code, encoding="utf-8")
    registry = home / "src/atlas/tasks/__init__.py"
    imported, entry = line.splitlines()
    text = registry.read_text(encoding="utf-8")
    for before, added in (("from atlas.tasks.section import Section\n", imported), ("[..., Task]] = {\n", entry)):
        assert text.count(before) == 1
        text = text.replace(before, f"{before}{added}\n")
    registry.write_text(text, encoding="utf-8")
    towns = read_jsonl(world() / "passages.jsonl")[:5]
    lines = [
        {"event": f"the founding of {town['title']}", "year": 1900 + i, "id": town["id"]}
        for i, town in enumerate(towns)
    ]
    data = write_jsonl(tmp_path / "dev.jsonl", lines)
    changes = {"task": "year", "train_data": data, "eval_data": data, "train_retriever": True, "total_steps": 2}

    def train(**more):
        words = [sys.executable, "train.py", *command_line(tmp_path, **changes | more)]
        return subprocess.run(
            words, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    done = train()
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "run/dev-step-2.jsonl")
    assert [(row["id"], row["answers"]) for row in rows] == [(line["id"], [str(line["year"])]) for line in lines]
    assert rows[0]["query"] == f"question: In which year: {lines[0]['event']}? answer: <extra_id_0>"
    log = (tmp_path / "run/run.log").read_text()
    assert " accuracy | " in log and " within_ten | " in log and " recall@1 | " in log
    bad = train(name="bad", eval_data=write_jsonl(tmp_path / "bad.jsonl", [lines[0], {"event": "e", "date": 3}]))
    expected = "bad.jsonl, line 2: no `year`: expected `event` (a string) and `year` (a number), found event, date"
    assert bad.returncode == 1 and expected in bad.stderr and bad.stderr.count("\n") == 1
