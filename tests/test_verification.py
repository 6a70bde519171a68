"""`--verify`: what was saved and is opened is compared with its checksums, at once or in the background."""

import json
import logging
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from atlas.checkpoint import Contents, load_checkpoint, save_checkpoint
from atlas.files import checksums
from atlas.files.checksums import Blocks, Recorded, as_text, choose_sample, extend, read_file, write_file
from atlas.files.tensors import save_tensors
from atlas.index.store import open_index
from atlas.runtime.verification import Verification
from atlas.training.trainer import Trainer
from tests.indices import CPU, VERSION_1, compressed, contents, names, saved
from tests.kit import _run_as_rank, command_line, run
from tests.patience import wait_until
from tests.ranks import run_on_ranks, scratch_directory


def recorded(path, block_bytes=16):
    """A file in small blocks, as it is now."""
    sums = []
    extend(sums, 0, memoryview(path.read_bytes()), block_bytes)
    return Recorded(path, Blocks(path.stat().st_size, block_bytes, as_text(sums)), "copy it again")


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def verify(mode, files):
    """What a run does that opens these files and ends."""
    verification = Verification(mode)
    verification.check("files", lambda: files)
    verification.finish()


# Blocks and samples


def test_checksums_taken_while_writing_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK", 7)
    content = random.Random(0).randbytes(1000)
    for number, parts in enumerate(([content], [content[:1], b"", content[1:500], content[500:]], [])):
        path = tmp_path / str(number)
        written = write_file(path, parts)
        assert path.read_bytes() == b"".join(parts) and written == read_file(path)
        assert written.bytes == sum(map(len, parts))


def test_tensors_are_written_as_safetensors(tmp_path):
    kinds = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8
    tensors = {f"ü{kind}": torch.arange(n).to(kind) for n, kind in enumerate(kinds, 1)}
    tensors |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}
    tensors |= {"transposed": torch.arange(6.0).view(2, 3).T, "part": torch.arange(9)[2:5]}
    for some, metadata in ((tensors, {"format": "pt"}), ({}, None)):
        path = tmp_path / f"{len(some)}.safetensors"
        assert save_tensors(path, some, metadata) == read_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == metadata
        loaded = load_file(path)
        assert loaded.keys() == some.keys()
        assert all(torch.equal(loaded[name], some[name]) and loaded[name].dtype == some[name].dtype for name in some)


def test_a_sample_has_all_of_a_small_file_and_one_percent_of_a_large_one():
    for blocks in range(checksums.SMALL_BLOCKS + 1):
        assert choose_sample(blocks, range(blocks)) == list(range(blocks))
        assert choose_sample(blocks, range(blocks)[1:]) == list(range(blocks)[1:])
    for share, n in ((range(10), 1), (range(0), 0), (range(3, 4), 1), (range(5000, 10_000), 50), (range(120), 1)):
        chosen = choose_sample(10_000, share)
        assert len(chosen) == len(set(chosen)) == n and set(chosen) <= set(share) and chosen == sorted(chosen)


def test_samples_differ_and_leave_no_block_out():
    """No seed decides: two samples of 50 of 5,000 are the same once in 10^120, and a block is never chosen once in
    10^43 times that 10,000 samples are taken."""
    assert choose_sample(5000, range(5000)) != choose_sample(5000, range(5000))
    share = range(10, 20)
    assert {block for _ in range(1000) for block in choose_sample(30, share)} == set(share)


def test_nothing_is_drawn_from_the_generators_of_a_run(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    verify("sample", [recorded(path)])
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


# Verification


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_damage_is_named_with_its_blocks(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(bytes(60))
    file = recorded(path)
    verify(mode, [file])
    flip(path, 20)
    flip(path, 59)
    with pytest.raises(ValueError) as error:
        verify(mode, [file])
    assert str(error.value) == (
        f"{path} is damaged: 2 of 4 blocks do not fit their checksums (from 0: 1, 3; all are in bytes 16 to 60): "
        "copy it again"
    )
    path.write_bytes(bytes(59))
    with pytest.raises(ValueError, match="file is 59 bytes long, when it was written 60: copy it again"):
        verify(mode, [file])
    path.unlink()
    with pytest.raises(ValueError, match="file is missing: copy it again"):
        verify(mode, [file])
    verify("off", [file])


def test_of_a_large_file_a_sample_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * 1000))
    file, damage = recorded(path), bytes([1]) * 16 * 1000
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"10 of the 10 that were read of 1000 blocks do not fit"):
        verify("sample", [file])
    with pytest.raises(ValueError, match=r"1000 of 1000 blocks do not fit"):
        verify("full", [file])


def test_the_run_goes_on_meanwhile_whatever_becomes_of_the_files(tmp_path, monkeypatch):
    path, go_on, compare = tmp_path / "file", threading.Event(), Recorded.compare
    monkeypatch.setattr(checksums, "SMALL_BLOCKS", 0)

    def compare_later(*arguments):
        go_on.wait()
        compare(*arguments)

    monkeypatch.setattr(Recorded, "compare", compare_later)

    def begun(content):
        path.write_bytes(bytes(100))
        file = recorded(path, 100)
        path.write_bytes(content)
        verification = Verification("sample")
        verification.check("files", lambda: [file])
        path.rename(tmp_path / "moved")  # --restart sets aside what it may have started from
        path.write_bytes(b"another one")
        verification.raise_found()  # nothing yet
        return verification

    good, bad = begun(bytes(100)), begun(bytes(99) + b"x")
    go_on.set()
    good.finish()
    wait_until(lambda: bad._running[0].found is not None, "the damage is found")
    for say in (bad.raise_found, bad.finish):
        with pytest.raises(ValueError, match="file is damaged"):
            say()


def _verify_as_rank(mode, files):
    """What a rank is told; `background`: a sample, as if the files were large ones."""
    before, checksums.SMALL_BLOCKS = checksums.SMALL_BLOCKS, 0 if mode == "background" else checksums.SMALL_BLOCKS
    verification = Verification("sample" if mode == "background" else mode)
    try:
        verification.check("files", lambda: files)
        assert bool(verification._running) == (mode == "background")
        verification.finish()
    except ValueError as error:
        return str(error)
    finally:
        checksums.SMALL_BLOCKS = before
    return "fine"


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_one_rank_finds_ends_all(world_size):
    path = Path(scratch_directory()) / "file"
    path.write_bytes(bytes(16 * 60))
    large, small, for_each = recorded(path, 16), recorded(path, 16 * 20), recorded(path, 16 * 60 // world_size)
    assert run_on_ranks(world_size, _verify_as_rank, "full", [large, small]) == ["fine"] * world_size
    for at in (0, 16 * 30, 16 * 60 - 1):
        flip(path, at)
        for mode, file in (("full", large), ("sample", small), ("background", for_each)):
            answers = run_on_ranks(world_size, _verify_as_rank, mode, [file])
            assert len(set(answers)) == 1 and "damaged: 1 of" in answers[0] and "blocks" in answers[0]
        flip(path, at)
    flip(path, 16 * 59)
    (found,) = set(run_on_ranks(world_size, _verify_as_rank, "full", [large]))
    assert f"1 of the {60 // world_size} that were read of 60 blocks" in found and "(from 0: 59;" in found


def _share(recorded):
    return [part.numbers for part in [Verification("full")._part(recorded)]]


@pytest.mark.processes
def test_ranks_read_each_block_once():
    path = Path(scratch_directory()) / "file"
    path.write_bytes(bytes(16 * 7))
    shares = run_on_ranks(3, _share, recorded(path))
    assert [number for (numbers,) in shares for number in numbers] == list(range(7))


# Checkpoints and indices


def a_checkpoint(directory):
    optimizer, encoder = {"reader/a/exp_avg": torch.rand(9)}, {"c": torch.rand(3, 3)}
    what = Contents(
        step=3,
        model={"reader.a": torch.rand(50, 2), "retriever.b": torch.rand(7)},
        optimizer=optimizer,
        options={"run": {"seed": 1, "name": "ü"}},
        configs={"reader": {"d": 1}, "retriever": {"d": 2}},
        examples=6,
        index_encoder=encoder,
    )
    return save_checkpoint(directory, what, keep_optimizers=False, keep_checkpoints=None)


def places(content, chance, most=120):
    """Where to flip which bit."""
    at = range(len(content)) if len(content) <= most else chance.sample(range(len(content)), most)
    return [(place, chance.randrange(8)) for place in at]


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path, mode):
    directory, chance = a_checkpoint(tmp_path), random.Random(0)
    verify(mode, load_checkpoint(directory).recorded())
    content = contents(directory)
    assert len(content) == 7
    for name, before in content.items():
        for at, bit in places(before, chance, most=60):
            flip(directory / name, at, bit)
            with pytest.raises(ValueError) as error:
                verify(mode, load_checkpoint(directory).recorded())
            assert "\n" not in str(error.value) and str(directory) in str(error.value)
            flip(directory / name, at, bit)
    verify(mode, load_checkpoint(directory).recorded())


def test_what_may_be_removed_and_what_has_no_checksums(tmp_path, caplog, monkeypatch):
    directory = a_checkpoint(tmp_path)
    for name in ("optimizer.safetensors", "index_encoder.safetensors"):  # as in checkpoints that are not the latest
        (directory / name).unlink()
    verify("full", load_checkpoint(directory).recorded())
    path = directory / "state.json"
    state = json.loads(path.read_text())
    for change in ({"step": 4}, {"files": {}}):
        path.write_text(json.dumps(state | change))
        with pytest.raises(ValueError, match=r"state.json was edited or damaged .*--verify off to use it as it is"):
            load_checkpoint(directory).recorded()
    old = {name: state[name] for name in ("format", "step", "examples", "evaluation_due")}
    path.write_text(json.dumps(old))  # as earlier versions wrote it
    caplog.set_level("INFO", "atlas")
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("atlas"), "propagate", True)
    checkpoint = load_checkpoint(directory)
    Verification("sample").check("step-3", checkpoint.recorded)
    open_index(VERSION_1, device=CPU, verification=Verification("full"))
    assert [record.getMessage() for record in caplog.records if "--verify" in record.getMessage()] == [
        "step-3 has no checksums: --verify sample does not look for damage in it",
        f"{VERSION_1} has no checksums: --verify full does not look for damage in it",
    ]
    assert checkpoint.step == 3


def opened(directory, mode):
    """What a run does with a saved index that it opens."""
    verification = Verification(mode)
    open_index(directory, device=CPU, verification=verification)
    verification.finish()


@pytest.mark.parametrize("mode", ["full", "sample"])
@pytest.mark.parametrize(("kind", "codes_only"), [("flat", False), ("pq", False), ("ivfpq", True), ("ivfsq", False)])
def test_every_flipped_byte_of_an_index_is_found(tmp_path, kind, codes_only, mode):
    if kind == "flat":
        directory, *_ = saved(tmp_path, n=100)
    else:
        directory, *_ = compressed(tmp_path, kind, codes_only=codes_only)
    opened(directory, mode)
    chance = random.Random(0)
    for name, before in contents(directory).items():
        for at, bit in places(before, chance, most=25):
            flip(directory / name, at, bit)
            with pytest.raises(ValueError) as error:
                opened(directory, mode)
            assert "\n" not in str(error.value) and str(directory) in str(error.value)
            flip(directory / name, at, bit)
    opened(directory, mode)


def test_text_beyond_the_sample_of_opening_is_covered(tmp_path):
    """Opening looks at 64 places of the text; its blocks cover the rest."""
    directory, *_ = saved(tmp_path, n=20_000)
    text = directory / "passages.1.jsonl"
    flip(text, 4096 + 50)
    opened(directory, "off")
    with pytest.raises(ValueError, match=r"passages.1.jsonl is damaged: 1 of 1 blocks"):
        opened(directory, "sample")


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that saved a checkpoint and an index; its directories are copied before they are damaged."""
    home = tmp_path_factory.mktemp("finished")
    run(home, total_steps=1, eval_data=None, save_index_path=home / "index")
    return home


def fails(capsys, *arguments, **changes):
    """The sentence that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments, **changes)
    assert end.value.code == 1
    return capsys.readouterr().err


@pytest.fixture
def damaged(finished, tmp_path):
    """An index and a checkpoint with one flipped bit each: both open."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    flip(tmp_path / "index/embeddings.1.npy", 4096 + 3)
    weights = tmp_path / "run/checkpoint/step-1/model.safetensors"
    flip(weights, weights.stat().st_size - 1)
    return tmp_path


@pytest.fixture
def in_background(monkeypatch):
    """As if all files were large. What is found is not told before something is saved or the run ends."""
    monkeypatch.setattr(checksums, "SMALL_BLOCKS", 0)
    monkeypatch.setattr(Verification, "raise_found", lambda self: None)


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_a_run_with_a_damaged_index_does_not_begin(damaged, capsys, mode):
    said = fails(capsys, damaged, name="new", load_index_path=damaged / "index", verify=mode)
    assert "index/embeddings.1.npy is damaged: 1 of 1 blocks do not fit their checksums (from 0: 0; all are in" in said
    assert said.strip().endswith("copy the index again, or build it anew") and "Traceback" not in said
    assert not (damaged / "new/checkpoint").exists() and "step 1/5" not in (damaged / "new/run.log").read_text()


@pytest.mark.parametrize("saves", ["a checkpoint", "results", "an index"])
def test_what_is_found_in_the_background_ends_a_run_before_it_saves(damaged, capsys, in_background, saves):
    flags = {"load_index_path": damaged / "index", "total_steps": 2, "eval_data": None}
    if saves == "results":
        del flags["eval_data"]
        flags |= {"eval_freq": 1}
    elif saves == "an index":
        flags |= {"index_mode": "faiss", "faiss_index_type": "SQ8", "save_index_path": damaged / "new/sq"}
    said = fails(capsys, damaged, name="new", **flags)
    assert "index/embeddings.1.npy is damaged: 1 of 1 blocks" in said and "Traceback" not in said
    log = (damaged / "new/run.log").read_text()
    assert "Done" not in log
    assert [name for name in names(damaged / "new") if not name.startswith("events")] == [
        "metrics.jsonl",
        "opt.log",
        "run.log",
    ]
    assert ("step 1/2" in log) == (saves != "an index") and ("step 2/2" in log) == (saves == "a checkpoint")


def test_what_is_found_in_the_background_is_told_at_the_next_line_of_the_log(damaged, capsys, monkeypatch):
    monkeypatch.setattr(checksums, "SMALL_BLOCKS", 0)
    monkeypatch.setattr(Verification, "finish", lambda self: None)
    retrieve = Trainer.retrieve

    def retrieve_later(trainer, step):
        for one in trainer.session.verification._running:
            one._thread.join()
        return retrieve(trainer, step)

    monkeypatch.setattr(Trainer, "retrieve", retrieve_later)
    said = fails(capsys, damaged, name="new", load_index_path=damaged / "index", log_freq=2)
    assert "embeddings.1.npy is damaged" in said and "step 2/5" not in (damaged / "new/run.log").read_text()


def test_a_run_does_not_resume_from_a_damaged_checkpoint(damaged, capsys):
    said = fails(capsys, damaged, total_steps=3, load_index_path=None, eval_data=None)
    assert "step-1/model.safetensors is damaged: 1 of 1 blocks" in said and "--verify off" in said
    assert names(damaged / "run/checkpoint") == ["latest", "step-1"]


def test_an_evaluation_of_damaged_files_gives_no_results(damaged, capsys, in_background):
    model = damaged / "run"
    said = fails(capsys, damaged, "evaluate", name="scores", model_path=model, train_data=None)
    assert "step-1/model.safetensors is damaged" in said
    assert not list((damaged / "scores").glob("dev-step-*"))
    assert "Done" not in (damaged / "scores/run.log").read_text()
    assert "dev, step" not in (damaged / "scores/run.log").read_text()
    run(damaged, "evaluate", name="scores", model_path=model, train_data=None, verify="off")
    assert list((damaged / "scores").glob("dev-step-*"))


def _run_in_background(arguments):
    before, checksums.SMALL_BLOCKS = checksums.SMALL_BLOCKS, 0
    try:
        _run_as_rank(arguments, "train")
    finally:
        checksums.SMALL_BLOCKS = before


@pytest.mark.processes
def test_every_rank_of_a_run_ends_when_one_finds_damage(damaged):
    arguments = command_line(damaged, name="new", load_index_path=damaged / "index", total_steps=2)
    with pytest.raises(Exception, match="the run ended with status 1"):
        run_on_ranks(2, _run_in_background, arguments)
    assert not (damaged / "new/checkpoint").exists()
    logs = [(damaged / "new" / name).read_text() for name in ("run.log", "run.rank-1.log")]
    assert all("embeddings.1.npy is damaged" in log for log in logs)
