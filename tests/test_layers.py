"""The house rules: who may import whom, and what is kept in one place."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/atlas"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "preprocessing").glob("*.py"), *(ROOT / "evaluation_scripts").glob("*.py")])
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# Of the files beside the folders; each folder says its own in its first paragraph: "May import: files, runtime."
MODULES = {
    "config": {"options"},
    "checks": {"config", "options"},
    "command_line": {"checks", "config", "options"},
    "options": set(),
    "metrics": set(),
    "checkpoint": {"files", "options", "runtime"},
    "preflight": {"config", "model", "runtime", "tasks"},
    "embedding": {"files", "index", "model", "runtime"},
    "update": {"embedding", "files", "index", "runtime"},
    "retrieval": {"checkpoint", "config", "embedding", "files", "index", "model", "runtime"},
}


def room(path):
    """`src/atlas/index/flat.py` -> index, `src/atlas/config.py` -> config."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed():
    """What each folder and each file beside them may import, as they say themselves."""
    rules = dict(MODULES)
    for folder in FOLDERS:
        text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
        (rule,) = re.findall(r"^May import: ([^.]+)\.", text, re.MULTILINE)
        rules[folder] = set() if rule.startswith("nothing") else {name.strip() for name in rule.split(",")}
    return rules


RULES = allowed()


def imports(path):
    """Dotted names of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_used(path):
    """Folders and files of the package that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("atlas.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rules(path):
    here = room(path)
    if here == "__init__":
        return
    assert rooms_used(path) - {here} <= RULES[here], f"{here} says that it imports {RULES[here]}"
    top = {name.split(".")[0] for name in imports(path)}
    assert not top & ({"tests"} | {script.stem for script in SCRIPTS})


def test_the_rules_have_no_circle_and_name_what_is_there():
    assert set().union(*RULES.values()) <= RULES.keys()
    done: set[str] = set()
    while ready := {name for name, needs in RULES.items() if name not in done and needs <= done}:
        done |= ready
    assert done == RULES.keys(), f"a circle among {RULES.keys() - done}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_use_the_library_but_never_the_trainer(path):
    assert not rooms_used(path) & {"training", "evaluation", "retrieval"}


def test_one_place_for_collectives_devices_and_the_environment():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(PACKAGE)).removesuffix(".py")
        if name not in ("runtime/distributed", "runtime/parallel"):
            assert "torch.distributed" not in text and "is_initialized" not in text, path
        if name not in ("runtime/distributed", "runtime/parallel", "runtime/device"):
            # the command line looks at LOCAL_RANK, before torch is imported; the cache at XDG_CACHE_HOME
            if name not in ("command_line", "files/cache"):
                assert "os.environ" not in text and "getenv" not in text, path
            assert "cuda.is_available" not in text, path
        assert ".cuda()" not in text, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circles_inside_folders(folder):
    graph = {
        path.stem: {n.split(".")[2] for n in imports(path) if n.startswith(f"atlas.{folder}.")}
        for path in (PACKAGE / folder).glob("*.py")
    }
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and (needs & graph.keys()) <= done}:
        done |= ready
    assert done == graph.keys(), f"a circle among {graph.keys() - done}"


def test_nothing_is_unpickled_or_run_by_chance():
    """Nothing that was downloaded, and nothing that another rank sends."""
    for path in [*SOURCES, *SCRIPTS, *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
            keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if called == "torch.load":
                assert keywords.get("weights_only") is True, path
            if called in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", False) is False, path
            assert called not in ("pickle.load", "pickle.loads"), path
            assert not re.search(r"_object(_list)?$", called), path  # torch.distributed's are pickled
            if re.fullmatch(r"Auto\w+\.(from_pretrained|from_config)", called):
                assert keywords.get("trust_remote_code") is False, (
                    path
                )  # else transformers asks, and runs it after a "y"


@pytest.mark.slow
@pytest.mark.processes
def test_benchmarks_start_from_the_root_without_the_paths_of_the_tests():
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(f'benchmarks.{name}')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", code, *names]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
