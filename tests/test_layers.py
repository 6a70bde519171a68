"""The house rules: who may import whom, and what is kept in one place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports only from lower layers; inside index/ and tasks/ also from neighbours.
LAYERS = [
    {"config", "distributed", "device", "metrics", "jsonl", "modules"},
    {"tokenization", "retriever", "reader", "losses", "parallel", "tracking", "index"},
    {"inputs", "tasks"},
    {"signals", "data", "results"},
    {"retrieval", "atlas"},
    {"optim", "checkpoint"},
    {"evaluator"},
    {"trainer"},
    {"build"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "preprocessing").glob("*.py"), *(ROOT / "evaluation_scripts").glob("*.py")])


def room(path):
    """`src/index/flat.py` -> index, `src/optim.py` -> optim."""
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_come_from_lower_layers(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "src" and len(parts) > 1:
            assert parts[1] in LAYER, f"{parts[1]} is in no layer"
            neighbours = here == parts[1] and here in ("index", "tasks")
            assert neighbours or LAYER[parts[1]] < LAYER[here], f"{here} imports {name}"
        assert parts[0] not in ("preprocessing", "tests")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_use_the_index_at_most(path):
    used = {name.split(".")[1] for name in imports(path) if name.startswith("src.")}
    # a model that is to be exported has to be loaded
    models = {"checkpoint", "inputs", "reader", "retriever", "tokenization"}
    assert used <= LAYERS[0] | {"index", "tracking"} | (models if path.stem == "export_huggingface" else set())


def test_one_place_for_collectives_devices_and_the_environment():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if room(path) not in ("distributed", "parallel"):
            assert "torch.distributed" not in text and "is_initialized" not in text, path
        if room(path) not in ("distributed", "parallel", "device"):
            if room(path) != "config":  # looks at LOCAL_RANK to complain once, before torch may be imported
                assert "os.environ" not in text and "getenv" not in text, path
            assert "cuda.is_available" not in text, path
        assert ".cuda()" not in text, path


def test_no_circles_inside_folders():
    for folder in ("index", "tasks"):
        graph = {
            path.stem: {n.split(".")[2] for n in imports(path) if n.startswith(f"src.{folder}.")}
            for path in (ROOT / "src" / folder).glob("*.py")
        }
        done: set[str] = set()
        while ready := {name for name, needs in graph.items() if name not in done and (needs & graph.keys()) <= done}:
            done |= ready
        assert done == graph.keys(), f"a circle among {graph.keys() - done}"


def test_nothing_is_unpickled_by_chance():
    for path in [*SOURCES, *SCRIPTS]:
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
