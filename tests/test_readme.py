"""The README's commands: every flag in them exists, every script and file they name is there."""

import re
import shlex
from pathlib import Path

import pytest

from src import config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    for command in re.sub(r"\\\n", " ", block).splitlines()
    if command.strip() and not command.startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / script).is_file()
    if script in ("train.py", "evaluate.py", "finetune_qa.py"):
        flags = words[words.index(script) + 1 :]
        _, unknown = config._make_parser(script.removesuffix(".py"), {}).parse_known_args(flags)
        assert not unknown


def test_files_named_in_the_tour_exist():
    tour = README.split("## Tour of the code")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py|(?:src|preprocessing|benchmarks)/(?:\w+/)?", tour))
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "src/index" / name).exists(), name
    in_tour = {Path(name).name for name in named}
    assert {path.name for path in (ROOT / "src").glob("*.py")} - {"__init__.py"} <= in_tour


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README)
