"""What stays small: functions, constructors, and the files that Python runs when a folder is imported."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/atlas"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 50  # lines, from `def` to the last one
MOST_ARGUMENTS = 8  # of a constructor, without self

# What is longer or takes more until it is divided. To be emptied; nothing is added.
LONG_FUNCTIONS: set[str] = set()
WIDE_CONSTRUCTORS: set[str] = set()


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """`index/flat.py: FlatIndex.search` -> its node, for every function of a file."""
    found: dict[str, ast.FunctionDef] = {}

    def visit(node: ast.AST, outer: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = (*outer, child.name)
                if not isinstance(child, ast.ClassDef):
                    found[f"{path.relative_to(PACKAGE)}: {'.'.join(names)}"] = child
                visit(child, names)
            else:
                visit(child, outer)

    visit(ast.parse(path.read_text(encoding="utf-8")), ())
    return found


@cache
def all_functions() -> dict[str, ast.FunctionDef]:
    return {name: node for path in SOURCES for name, node in functions(path).items()}


def test_functions_fit_on_a_screen():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in all_functions().items()}
    assert len(lengths) > 300
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION and name not in LONG_FUNCTIONS} == {}
    assert {name for name, n in lengths.items() if n > LONGEST_FUNCTION} >= LONG_FUNCTIONS, "take it off the list"


def test_constructors_take_few_arguments():
    """An `__init__`; the fields of a dataclass are its data, not arguments that somebody copies one by one."""
    counts = {
        name: len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) - 1
        for name, node in all_functions().items()
        if name.endswith(".__init__")
    }
    assert len(counts) > 20
    assert {name: n for name, n in counts.items() if n > MOST_ARGUMENTS and name not in WIDE_CONSTRUCTORS} == {}
    assert {name for name, n in counts.items() if n > MOST_ARGUMENTS} >= WIDE_CONSTRUCTORS, "take it off the list"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_folders_say_what_they_hold_and_import_nothing(path):
    """One docstring; the tasks' registry may name its classes, and that is all."""
    docstring, *rest = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    assert rest == [] or path.parent.name == "tasks"


def test_importing_the_package_imports_nothing_heavy():
    """Its public names are resolved when they are asked for."""
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    imported = {
        name.split(".")[0]
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert imported <= {"__future__", "importlib", "typing"}


def test_a_unit_test_starts_nothing():
    """Neither programs nor ranks: `make test-units` stays quick because tests/conftest.py refuses."""
    for start in (lambda: subprocess.run([sys.executable, "-c", ""]), lambda: run_on_ranks(2, len, ())):
        with pytest.raises(pytest.fail.Exception, match="mark it with @pytest.mark.processes"):
            start()
