"""Two runs of one name, two writers of one index: the second one is refused before it writes anything."""

import errno
import fcntl
import json
import os
import signal
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from atlas.files import lock
from atlas.files.disk import FullDiskError
from atlas.files.lock import holding
from atlas.runtime import distributed
from tests.kit import run, world
from tests.locks import held_elsewhere, is_free
from tests.patience import HANG_SECONDS
from tests.ranks import run_on_ranks, scratch_directory

NOTE = '{"pid": 4711, "host": "far", "since": "yesterday"}'


def test_the_file_says_who_holds_it_and_is_gone_afterwards(tmp_path):
    path = tmp_path / "new" / "deeper" / "a.lock"
    with holding(path, "busy", "wait"):
        note = json.loads(path.read_text())
        assert note["pid"] == os.getpid() and note["host"] and note["since"]
        assert not is_free(path)
        with holding(path, "busy", "wait"):  # this process holds it already
            pass
        assert not is_free(path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), holding(path, "busy", "wait"):
        (path.parent / "mine").write_text("")
        raise KeyError
    assert os.listdir(path.parent) == ["mine"]


@pytest.mark.parametrize(
    ("note", "who"), [(NOTE, "process 4711 on far, since yesterday"), ("", "which one is not known"), ("[]", "which")]
)
def test_a_second_holder_is_refused_in_one_sentence(tmp_path, note, who):
    path = tmp_path / "a.lock"
    refuses = pytest.raises(ValueError, match=rf"^it is busy \({who}.*\): wait$")
    with held_elsewhere(path, note), refuses, holding(path, "it is busy", "wait"):
        pytest.fail("both are in")
    assert not path.exists()
    path.write_text(note)  # a killed process left the file, but no lock
    with holding(path, "it is busy", "wait"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_file_that_was_removed_before_it_was_locked_is_none(tmp_path, monkeypatch):
    """Its last holder removes it: whoever opened it before that starts again with the new one."""
    path, flock = tmp_path / "a.lock", fcntl.flock

    def lock_too_late(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with holding(path, "busy", "wait"):
        assert not is_free(path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FullDiskError, match="index.lock cannot be written"), holding(tmp_path / "index.lock", "", ""):
        pass
    assert not list(tmp_path.iterdir())


def test_without_locks_a_warning_says_so_once(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "_warned", False)
    (tmp_path / ".b.0123abcd.part").write_text("perhaps somebody is writing it")
    for name in ("a", "b"):
        with holding(tmp_path / name, "busy", "wait"), lock.temporary(tmp_path / "b"):
            pass
    assert caplog.messages == [f"{tmp_path}: this file system has no locks, so make sure that nobody else writes there"]
    assert os.listdir(tmp_path) == [".b.0123abcd.part"]


def hold_and_wait(path, pipe):
    """Also in a process of its own, as those that read data are."""
    with holding(path, "busy", "wait"):
        child = get_context("fork").Process(target=signal.pause)
        child.start()
        pipe.send(child.pid)
        signal.pause()


@pytest.mark.processes
def test_a_killed_process_leaves_no_lock_even_if_its_children_live_on(tmp_path):
    path, (mine, its) = tmp_path / "a.lock", get_context("fork").Pipe()
    process = get_context("fork").Process(target=hold_and_wait, args=(path, its))
    process.start()
    assert mine.poll(HANG_SECONDS)
    child = mine.recv()
    try:
        with pytest.raises(ValueError, match=rf"busy \(process {process.pid} on .*"), holding(path, "busy", "wait"):
            pytest.fail("both are in")
        process.kill()
        process.join()
        with holding(path, "busy", "wait"):
            os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def _hold(path):
    context = partial(holding, path, f"rank {distributed.rank()} finds it busy", "wait")
    try:
        with distributed.held_on_main("locking", context):
            free = is_free(path)
            distributed.wait_for_all("looking at the lock")
            return free
    except ValueError as error:
        return str(error)


@pytest.mark.processes
def test_every_rank_is_refused_with_the_same_sentence():
    path = Path(scratch_directory()) / "a.lock"
    assert run_on_ranks(2, _hold, path) == [False, False]
    with held_elsewhere(path, NOTE):
        assert run_on_ranks(2, _hold, path) == ["rank 0 finds it busy (process 4711 on far, since yesterday): wait"] * 2


def refused(capsys, *arguments, **changes):
    """The sentence of a run that ends with status 1."""
    with pytest.raises(SystemExit) as exit:
        run(*arguments, **changes)
    assert exit.value.code == 1
    return capsys.readouterr().err.splitlines()[-1].partition("] ")[2]


def test_a_second_run_of_a_name_is_refused_and_writes_nothing(tmp_path, capsys):
    for program, what in (("train", "a run"), ("evaluate", "an evaluation")):
        with held_elsewhere(tmp_path / f"run/{program}.lock", NOTE):
            assert refused(capsys, tmp_path, program) == (
                f"{tmp_path}/run: {what} of this name is active (process 4711 on far, since yesterday): wait until it "
                "has ended, or give another --name"
            )
            assert os.listdir(tmp_path / "run") == [f"{program}.lock"]


def test_a_run_is_evaluated_while_it_is_trained_and_one_index_is_for_one_run(tmp_path, capsys):
    settings = {"save_index_path": tmp_path / "index", "retrieve_only": True, "eval_data": world() / "dev.jsonl"}
    with held_elsewhere(tmp_path / "run/train.lock", NOTE):
        run(tmp_path, "evaluate", **settings)
    assert (tmp_path / "run/dev-step-0.jsonl").exists()
    assert not [*tmp_path.rglob("*.lock")]
    with held_elsewhere(tmp_path / "index/write.lock", NOTE):
        sentence = refused(capsys, tmp_path, "evaluate", name="second", **settings)
    assert sentence.startswith(
        f"another process is writing into {tmp_path}/index (process 4711 on far, since yesterday)"
    )
    assert "Embedding" not in (tmp_path / "second/run.log").read_text()  # it is told before the work starts
