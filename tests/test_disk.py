"""Files are written with the permissions that the umask gives."""

import os
import stat

import pytest

from export_huggingface import main as export
from make_tiny_models import build_tiny_models
from tests.kit import run, world


@pytest.fixture
def umask():
    """Group members may read what this process writes, and others may not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_all_files_have_the_permissions_that_the_umask_gives(tmp_path, umask):
    """Of a run, an index, models that are made and exported: weights too, which safetensors makes private."""
    directory = run(tmp_path, total_steps=1, train_retriever=True, save_index_path=tmp_path / "index")
    names = ["--reader_model_type", str(world() / "models/reader")]
    names += ["--retriever_model_path", str(world() / "models/retriever")]
    export(["--model_path", str(directory), "--output_directory", str(tmp_path / "exported"), *names])
    texts = [f"{a} {b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    build_tiny_models(texts, tmp_path / "tiny", vocabulary_size=200)
    found = {}
    for path in tmp_path.rglob("*"):
        if not path.is_symlink() and "passages." not in path.name:  # a hard link to the corpus
            found.setdefault((path.is_dir(), stat.S_IMODE(path.stat().st_mode)), []).append(path)
    assert found.keys() == {(True, 0o750), (False, 0o640)}, {mode: paths[:5] for mode, paths in found.items()}
    assert len([path for path in found[False, 0o640] if path.name == "model.safetensors"]) == 5
