"""Where the disk is full, one sentence says so and nothing is left; files have the permissions that the umask gives.

A limit on the size of files stands for a full disk: both let a write fail in the middle of a file.
"""

import os
import re
import resource
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from atlas.checkpoint import Contents, load_checkpoint, save_checkpoint
from atlas.files.disk import FullDiskError, writing
from atlas.files.jsonl import replacing
from atlas.index.passages import open_passages
from atlas.index.store import open_index, save_index
from atlas.runtime.reporting import TensorBoard
from atlas.runtime.tracking import log, start_log
from export_huggingface import main as export
from make_tiny_models import build_tiny_models
from partial import PartialFile, Version
from tests.indices import CPU, make_index, write_corpus
from tests.kit import run, world


@contextmanager
def no_file_above(size):
    """Files cannot grow beyond so many bytes. Python ignores the signal that says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("Error in write: File too large\n"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_every_librarys_error_becomes_one_sentence(tmp_path, error):
    place = tmp_path / "not/there/yet.bin"
    with pytest.raises(FullDiskError) as raised, writing(place, 12_345):
        raise error
    expected = (
        rf"{place} cannot be written \([\w ]+; 12,345 bytes are needed, [\d,]+ are free\): make room, or choose .*"
    )
    assert re.fullmatch(expected, str(raised.value))
    with pytest.raises(PermissionError), writing(place):
        raise PermissionError(13, "Permission denied")


def test_a_file_that_is_replaced_stays_as_it_was(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text("before")
    wanted = rf"{file} cannot be written \(File too large; more than 1,000 bytes are needed"
    with pytest.raises(FullDiskError, match=wanted), no_file_above(1000), replacing(file) as beside:
        beside.write_text("x" * 5000)
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "before"


@pytest.mark.parametrize("victim", ["model", "optimizer", "options.json"])
def test_a_checkpoint_that_does_not_fit_leaves_nothing(tmp_path, victim):
    def contents(step, size):
        sizes = {"model": 10, "optimizer": 10, "options.json": 10} | {victim: size}
        tensors = {kind: {"reader.a": torch.ones(sizes[kind])} for kind in ("model", "optimizer")}
        return Contents(step, **tensors, options={"run": {"x" * sizes["options.json"]: 1}}, configs={}, examples=1)

    keep = {"keep_optimizers": False, "keep_checkpoints": 1}
    save_checkpoint(tmp_path, contents(1, 10), **keep)
    needed = rf"{victim}[.a-z]* cannot be written \(File too large; [\d,]+ bytes are needed, [\d,]+ are free\)"
    with pytest.raises(FullDiskError, match=needed), no_file_above(10_000):
        save_checkpoint(tmp_path, contents(2, 20_000), **keep)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["latest", "step-1"]
    assert load_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, contents(2, 20_000), **keep)
    assert load_checkpoint(tmp_path).step == 2


def test_a_run_ends_with_the_sentence_and_keeps_its_last_checkpoint(tmp_path, capsys):
    run(tmp_path, total_steps=1, eval_data=None)
    with pytest.raises(SystemExit) as ended, no_file_above(100_000):
        run(tmp_path, total_steps=2, eval_data=None)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in error
    assert re.search(r"model\.safetensors cannot be written \(File too large; [\d,]+ bytes are needed", error)
    assert sorted(path.name for path in (tmp_path / "run/checkpoint").iterdir()) == ["latest", "step-1"]


def test_an_index_that_does_not_fit_leaves_the_old_one(tmp_path):
    corpus, embeddings = (
        write_corpus(tmp_path / "corpus.jsonl", 300),
        torch.randn(300, 64, generator=torch.manual_seed(0)).half(),
    )
    index = make_index(open_passages(corpus, -1), embeddings)
    wanted = r"embeddings\.1\.npy cannot be .*42,496 bytes are needed"
    with pytest.raises(FullDiskError, match=wanted), no_file_above(30_000):
        save_index(tmp_path / "new", index)
    assert not (tmp_path / "new").exists()
    save_index(tmp_path / "old", index)
    before = sorted(path.name for path in (tmp_path / "old").iterdir())
    with pytest.raises(FullDiskError), no_file_above(30_000):
        save_index(tmp_path / "old", make_index(open_passages(corpus, -1), -embeddings))
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == before
    assert torch.equal(open_index(tmp_path / "old", device=CPU).embeddings, embeddings)


@pytest.fixture
def full(tmp_path):
    """A log file on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "run.log").symlink_to("/dev/full")
    return tmp_path


def test_a_log_that_cannot_be_written_says_so_once(full, capsys):
    start_log(full)
    for number in range(3):
        log.info("line %d", number)
    (full / "run.log").unlink()
    log.info("there is room again")
    said = capsys.readouterr()
    assert said.out.count("line") == 3
    assert said.err.count("\n") == 1 and f"lines of the log are missing in {full}/run.log: [Errno 28]" in said.err
    assert "there is room again" in (full / "run.log").read_text()


def test_a_screen_that_cannot_be_written_does_not_end_the_run(full, monkeypatch):
    with open("/dev/full", "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        (full / "run.log").unlink()
        start_log(full)
        log.info("one")
        log.info("two")
        monkeypatch.undo()
    lines = (full / "run.log").read_text().splitlines()
    assert [line[-3:] for line in lines if "The screen cannot be written to" not in line] == ["one", "two"]
    assert len(lines) == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_that_cannot_be_written_are_given_up_once(tmp_path, capsys, caplog):
    board = TensorBoard(tmp_path)
    with no_file_above(2000):
        for step in range(5000):
            board.add({"loss": 1.0}, step)
        board.close(failed=False)
    board.close(failed=False)
    assert caplog.text.count("No more curves for tensorboard are written") == 1
    assert "Traceback" not in capsys.readouterr().err


def download(file):
    with PartialFile(file, lambda added: None) as part:
        part.begin(Version(50_000, '"a"'))
        part.append(b"x" * 50_000)


def test_a_download_that_does_not_fit_is_named(tmp_path):
    wanted = r"a\.bin\.part cannot be written \(File too large; 50,000 bytes are needed"
    with pytest.raises(FullDiskError, match=wanted), no_file_above(10_000):
        download(tmp_path / "a.bin")


def test_an_export_that_does_not_fit_leaves_nothing(tmp_path, capsys):
    directory = run(tmp_path, total_steps=1, eval_data=None)
    with pytest.raises(SystemExit) as ended, no_file_above(100_000):
        export_run(directory, tmp_path / "exported")
    assert ended.value.code == 1 and "cannot be written (File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def export_run(directory, output):
    names = ["--reader_model_type", str(world() / "models/reader")]
    names += ["--retriever_model_path", str(world() / "models/retriever")]
    export(["--model_path", str(directory), "--output_directory", str(output), *names])


@pytest.fixture
def umask():
    """Group members may read what this process writes, and others may not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_all_files_have_the_permissions_that_the_umask_gives(tmp_path, umask):
    """Of a run, an index, models that are made and exported: weights too, which safetensors makes private."""
    directory = run(tmp_path, total_steps=1, train_retriever=True, save_index_path=tmp_path / "index")
    export_run(directory, tmp_path / "exported")
    texts = [f"{a} {b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    build_tiny_models(texts, tmp_path / "tiny", vocabulary_size=200)
    found = {}
    for path in tmp_path.rglob("*"):
        if not path.is_symlink() and "passages." not in path.name:  # a hard link to the corpus
            found.setdefault((path.is_dir(), stat.S_IMODE(path.stat().st_mode)), []).append(path)
    assert found.keys() == {(True, 0o750), (False, 0o640)}, {mode: paths[:5] for mode, paths in found.items()}
    assert len([path for path in found[False, 0o640] if path.name == "model.safetensors"]) == 5
