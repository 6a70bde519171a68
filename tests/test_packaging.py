"""What is installed: the pins against the ranges, the wheel from an empty directory, and what a wrong flag imports."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
UNPINNED = ("dev", "demo", "wandb", "trackio")  # extras that are not in requirements.txt
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}


def pins(name: str) -> dict[tuple[str, str], str]:
    """(package, marker) -> version, of every pinned line of a requirements file; nothing is pinned twice."""
    found: dict[tuple[str, str], str] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        requirement = Requirement(line)
        key = canonicalize_name(requirement.name), str(requirement.marker or "")
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{name}: {line} is not a pin"
        assert key not in found, f"{name}: {line} is there twice"
        found[key] = specifier.version
    return found


@pytest.mark.parametrize(
    ("file", "ranges"),
    [
        (
            "requirements.txt",
            [
                *map(Requirement, PROJECT["dependencies"]),
                *(range_ for name, ranges in EXTRAS.items() if name not in UNPINNED for range_ in ranges),
            ],
        ),
        ("requirements-demo.txt", EXTRAS["demo"]),
        ("requirements-dev.txt", EXTRAS["dev"]),
    ],
)
def test_every_pin_lies_in_its_range_and_nothing_else_is_pinned(file, ranges):
    pinned = {name: version for (name, _), version in pins(file).items()}
    allowed = {canonicalize_name(requirement.name): requirement.specifier for requirement in ranges}
    assert pinned.keys() == allowed.keys()
    for name, version in pinned.items():
        assert allowed[name].contains(version), f"{file} pins {name} {version}, pyproject.toml wants {allowed[name]}"


def test_both_ends_of_the_ranges_are_tested():
    """`make test-range` installs the oldest and the newest versions: those that the ranges begin and end with."""
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    oldest, newest = (dict(pins(f"requirements-{end}.txt")) for end in ("oldest", "newest"))
    assert {name for name, _ in oldest} == {name for name, _ in newest} == {"torch", "transformers"}
    for (name, marker), version in oldest.items():
        major, minor = map(int, newest[name, marker].split(".")[:2])
        bounds = {f">={version.removesuffix('.0')}", f"<{major}.{minor + 1}"}
        assert {str(specifier) for specifier in ranges[name]} == bounds


def test_the_pins_install_the_checkout_too():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "-e ." in lines and "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_exactly_one_faiss_is_pinned_on_every_machine():
    markers = [Requirement(f"x; {marker}").marker for name, marker in pins("requirements.txt") if "faiss" in name]
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")):
        here = {"sys_platform": system, "platform_machine": machine}
        assert sum(marker.evaluate(here) for marker in markers) == 1, here


ANSWER = """
import sys
from pathlib import Path

import torch

import atlas
from atlas.config import Model
from atlas.index.flat import FlatIndex
from atlas.model.inputs import Inputs
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer

PASSAGES = [
    {"id": "0", "title": "Karpathos Airport", "section": "", "text": "The ICAO code of Karpathos Airport is LGKP."},
    {"id": "1", "title": "Lyon", "section": "", "text": "Lyon is a city in France."},
    {"id": "2", "title": "Iron", "section": "", "text": "The symbol of iron is Fe."},
    {"id": "3", "title": "Osaka", "section": "", "text": "The time zone of Osaka is Asia/Tokyo."},
]
reader_path, retriever_path = (f"{sys.argv[1]}/{half}" for half in ("reader", "retriever"))
reader = atlas.load_reader(reader_path, dropout=None)
retriever = atlas.load_retriever(retriever_path, query_side=False, dropout=None)
tokenizer = load_reader_tokenizer(reader_path)
inputs = Inputs(
    Model(), tokenizer, load_retriever_tokenizer(retriever_path), device=torch.device("cpu"), retriever=retriever
)
query = "question: time zone of Osaka answer: <extra_id_0>"
with torch.no_grad():
    index = FlatIndex(retriever.embed_passages(*inputs.passages(PASSAGES)))
    _, rows = index.search(retriever.embed_queries(*inputs.queries([query])), k=2)
    ids, mask, _ = inputs.reader([query], [[PASSAGES[row] for row in rows[0].tolist()]])
    (answer,) = tokenizer.decode(reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=16))
package = Path(atlas.__file__).parent
print(package, atlas.__version__, (package / "py.typed").is_file(), rows[0, 0].item(), answer, sep="\\n")
"""


def _run(*words: object, **settings: object) -> str:
    """The output of a command that succeeds."""
    settings = {"capture_output": True, "text": True, "timeout": HANG_SECONDS, **settings}
    done = subprocess.run([*map(str, words)], **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with the wheel alone in it, built of a copy of the sources."""
    home = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", home / "source/src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", home, home / "source")
    (wheel,) = home.glob("*.whl")
    _run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", home / "installed", wheel)
    return home / "installed"


@pytest.mark.processes
@pytest.mark.slow
def test_the_wheel_answers_a_question_from_an_empty_directory(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    output = _run(sys.executable, "-c", ANSWER, ROOT / "models/tiny", cwd=tmp_path, env=environment)
    package, version, typed, found, answer = output.splitlines()
    assert Path(package) == installed / "atlas"
    assert typed == "True" and (found, answer) == ("3", "Asia/Tokyo")
    (metadata,) = installed.glob("atlas_retrieval-*.dist-info/METADATA")
    assert f"Version: {version}" in metadata.read_text(encoding="utf-8").splitlines()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_the_wheel_holds_the_library_and_nothing_else(installed):
    (information,) = installed.glob("atlas_retrieval-*.dist-info")
    assert sorted(path.name for path in installed.iterdir()) == ["atlas", information.name, "bin"]
    assert [path.name for path in (installed / "bin").iterdir()] == ["atlas-ask"]
    files = {path.relative_to(installed / "atlas") for path in (installed / "atlas").rglob("*") if path.is_file()}
    package = ROOT / "src/atlas"
    data = [package / "py.typed", package / "asking/page.html"]
    assert files == {p.relative_to(package) for p in [*package.rglob("*.py"), *data]}
    assert "atlas-ask = atlas.asking.command:main" in (information / "entry_points.txt").read_text(encoding="utf-8")
    assert (information / "licenses/LICENSE").is_file()


@pytest.mark.processes
@pytest.mark.parametrize("words", [["--help"], ["--no_such_flag"], ["--task", "qa"]], ids=" ".join)
@pytest.mark.parametrize("script", ["train", "evaluate", "finetune_qa", "ask"])
def test_help_and_wrong_flags_import_nothing_heavy(script, words):
    """Neither do they import most of the package."""
    command = [sys.executable, "-X", "importtime", f"{script}.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "atlas.config" in imported
    assert not imported & {"torch", "numpy", "transformers", "tokenizers", "faiss", "safetensors"}
    own = {"atlas.asking.command", "atlas.asking.settings"} if script == "ask" else set()
    assert {name for name in imported if re.match(r"atlas\.\w+\.", name)} == own
