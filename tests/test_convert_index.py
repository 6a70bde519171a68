"""Saved indices made into others by the script: whole or not at all, whatever stops it, and in bounded memory."""

import contextlib
import io
import itertools
import json
import os
import pickle
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
import tracemalloc
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from atlas.index import convert as converting
from atlas.index import directory as files
from atlas.index import published
from atlas.index.codec import Compression, train
from atlas.index.convert import compress_index, convert
from atlas.index.published import convert_published, load_plain_pickle
from atlas.index.store import open_index, save_index
from atlas.runtime import distributed
from atlas.runtime.tracking import progress_bar
from convert_index import main, parse_options
from tests.indices import (
    CPU,
    KINDS,
    VERSION_1,
    RunsSomething,
    asked,
    compressed,
    contents,
    describe,
    described,
    names,
    publish,
    saved,
)
from tests.kit import slow
from tests.locks import held_elsewhere
from tests.parity import parity_kit
from tests.programs import Program, run_program
from tests.ranks import run_on_ranks, scratch_directory
from tests.test_docs import COMMANDS
from tests.test_flat import assert_same, brute_force, made_up

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "preprocessing/convert_index.py"
FLAT = Compression()


def as_published(directory):
    """What a published index holds, read the obvious way: embeddings (N, D) and passages."""
    numbers = range(len(list(directory.glob("embeddings.*.pt"))))
    columns = [torch.load(directory / f"embeddings.{i}.pt", weights_only=True) for i in numbers]
    passages = [p for i in numbers for p in load_plain_pickle(directory / f"passages.{i}.pt")]
    return torch.cat(columns, dim=1).T, passages


def assert_converted(source, target):
    embeddings, passages = as_published(source)
    assert np.load(target / "embeddings.1.npy").tobytes() == embeddings.contiguous().numpy().tobytes()
    lines = (target / "passages.1.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == passages
    index = open_index(target, device=CPU)
    assert index.size == len(passages) == len(embeddings) and list(index.passages) == passages


# From the published format


@pytest.mark.processes
def test_an_index_of_the_published_system_end_to_end(tmp_path, capsys):
    """Converted by the script, on a terminal that shows a bar; then compressed and exported."""
    source, flat = parity_kit() / "published_index", tmp_path / "flat"
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    script = Program([SCRIPT, source, flat], stderr=os.ttyname(terminal))
    assert script.wait() == 0 and "flat holds an index of 406 passages, of type flat" in script.stdout.read()
    shown = os.read(screen, 100_000).decode()
    assert "converting: 100%" in shown and "406/406" in shown
    os.close(screen), os.close(terminal)
    assert_converted(source, flat)
    main([str(flat), str(tmp_path / "pq"), *shlex.split("--faiss_index_type pq --faiss_code_size 64")])
    main([str(tmp_path / "pq"), str(tmp_path / "pq.faiss")])
    told = capsys.readouterr()
    assert "pq holds an index of 406 passages, of type PQ64" in told.out and told.err == ""  # no terminal, no bar
    assert f"row i is line i of {tmp_path / 'pq/passages.1.jsonl'}" in told.out
    index = open_index(tmp_path / "pq", device=CPU)
    queries = index.embeddings[::40].float()
    _, ids = faiss.read_index(str(tmp_path / "pq.faiss")).search(queries.numpy(), 10)
    assert ids.tolist() == index.search(queries, 10).ids.tolist()


@pytest.mark.parametrize("sizes", [(1,), (3, 1, 4), (0, 5), (5, 0, 2, 0), (40, 200, 7)])
@pytest.mark.parametrize("dimension", [1, 6, 129])
def test_every_shape(tmp_path, sizes, dimension):
    publish(tmp_path / "published", sizes, dimension)
    main([str(tmp_path / "published"), str(tmp_path / "ours")])
    assert_converted(tmp_path / "published", tmp_path / "ours")
    assert names(tmp_path / "ours") == ["embeddings.1.npy", "index.json", "passages.1.jsonl"]


def test_a_converted_index_is_searched_as_the_tensors_are(tmp_path):
    embeddings, _ = publish(tmp_path / "published", sizes=(30, 20), dimension=16)
    queries = made_up(1, 16, 4)[1]
    convert(tmp_path / "published", tmp_path / "ours", FLAT)
    assert_same(open_index(tmp_path / "ours", device=CPU).search(queries, 9), brute_force(embeddings, queries, 9))


def test_converting_again_changes_nothing(tmp_path):
    publish(tmp_path / "published")
    words = [str(tmp_path / "published"), str(tmp_path / "ours")]
    main(words)
    before = (tmp_path / "ours/index.json").stat()
    main(words)
    assert (tmp_path / "ours/index.json").stat() == before


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("atlas.files.jsonl.CHUNK", 2**14)  # of the text, whose lines are counted at the end

    def peak(shards):
        publish(tmp_path / str(shards), sizes=(2000,) * shards)
        tracemalloc.start()
        convert_published(tmp_path / str(shards), tmp_path / f"{shards} ours")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(8) < 1.2 * peak(2)


# Stopped


def kill_at(point, output, work):
    """Do the work in a process that is killed at its n-th step on the files of `output`, or its n-th heartbeat.

    Returns: whether it was killed.
    """

    def run():
        steps = 0

        def step():
            nonlocal steps
            steps += 1
            if steps == point:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event, arguments):
            changes = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
            if event in changes and str(output) in str(arguments[0]):
                step()

        fsync = os.fsync
        os.fsync = lambda handle: (step(), fsync(handle), step())
        distributed.progress = step
        sys.addaudithook(hook)
        work(output)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def shards_done(output):
    """How many shards a conversion has noted down so far."""
    notes = output / "converting.json"
    return len(json.loads(notes.read_text())["done"]) if notes.is_file() else 0


def every_kill(tmp_path, work):
    """Kill at every step, once each, in directories of their own; yields each directory as it was left."""
    for point in range(1, 10_000):
        output = tmp_path / f"killed-{point}"
        if not kill_at(point, output, work):
            assert point > 25  # there were steps to be killed at
            return
        yield output


@pytest.mark.processes
def test_a_conversion_killed_at_any_step_goes_on_to_the_same_files(tmp_path, monkeypatch):
    source = tmp_path / "published"
    publish(source, sizes=(8, 4), dimension=64)
    convert_published(source, tmp_path / "whole")
    expected, read, resumed = contents(tmp_path / "whole"), [], set()
    monkeypatch.setattr(published, "load_plain_pickle", lambda path: (read.append(path), load_plain_pickle(path))[1])
    for output in every_kill(tmp_path, lambda o: convert_published(source, o)):
        done = shards_done(output)
        if not files.has_index(output):
            with pytest.raises(ValueError, match="holds no index|holds an index whose conversion was stopped"):
                open_index(output, device=CPU)
        else:
            assert open_index(output, device=CPU).size == 12
            done = 2
        read.clear()
        convert_published(source, output)
        assert contents(output) == expected
        assert len(read) == 2 - done  # what was done is not done again
        resumed.add(done)
    assert resumed == {0, 1, 2}


@pytest.mark.processes
def test_a_conversion_killed_again_and_again_gets_there(tmp_path):
    source, output = tmp_path / "published", tmp_path / "ours"
    publish(source, sizes=(3,) * 6)
    convert_published(source, tmp_path / "whole")
    kills = 0
    while kill_at(25, output, lambda o: convert_published(source, o)):
        kills += 1
        assert kills < 30
    assert kills > 2 and contents(output) == contents(tmp_path / "whole")


@pytest.mark.processes
@pytest.mark.slow
def test_the_script_killed_goes_on(tmp_path):
    source, output = tmp_path / "published", tmp_path / "ours"
    publish(source, sizes=(5,) * 300)
    process = subprocess.Popen([sys.executable, SCRIPT, source, output], stdout=subprocess.DEVNULL)
    while process.poll() is None and not shards_done(output):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = shards_done(output)
    assert 0 < done < 300
    told = run_program([SCRIPT, source, output])
    assert told.returncode == 0 and f"Resuming after the first {done} of 300 shards" in told.stdout
    assert told.stderr == ""
    assert_converted(source, output)


@contextlib.contextmanager
def after_every_passage(act):
    """Call `act` with the number of passages that a conversion has written so far, after each of them."""

    def bar(what, total, unit, initial):
        made, done = progress_bar(what, total, unit, initial), itertools.count(initial + 1)
        made.update = lambda more: act(next(done))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "progress_bar", bar)
        yield


def stop_after(source, output, passages):
    """Convert until all shards up to so many passages are done, and stop in the next one."""
    with pytest.raises(KeyboardInterrupt), after_every_passage(lambda done: stop() if done > passages else None):
        convert_published(source, output)


def stop(*arguments):
    raise KeyboardInterrupt


def reading(monkeypatch):
    """The names of the files of passages that are read from now on."""
    read = []
    monkeypatch.setattr(
        published, "load_plain_pickle", lambda path: (read.append(path.name), load_plain_pickle(path))[1]
    )
    return read


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_shards_that_changed_meanwhile_are_converted_again(tmp_path, monkeypatch, changed):
    """With all behind them: their lines may be of other lengths now."""
    source, output = tmp_path / "published", tmp_path / "ours"
    _, passages = publish(source, sizes=(2, 2, 2, 2))
    stop_after(source, output, 6)  # three are done
    start = 2 * changed
    for passage in passages[start : start + 2]:
        passage["text"] = "another text, and a longer one"
    (source / f"passages.{changed}.pt").write_bytes(pickle.dumps(passages[start : start + 2], protocol=5))
    read = reading(monkeypatch)
    convert_published(source, output)
    assert read == [f"passages.{i}.pt" for i in range(changed, 4)]
    assert_converted(source, output)


@pytest.mark.parametrize("how", ["more shards", "other sizes", "another D", "damaged notes", "short text", "no array"])
def test_what_does_not_fit_is_converted_from_the_start(tmp_path, caplog, how):
    source, output = tmp_path / "published", tmp_path / "ours"
    publish(source, sizes=(2, 2, 2))
    stop_after(source, output, 4)
    if how == "more shards":
        publish(source, sizes=(2, 2, 2, 1))
    elif how == "other sizes":
        publish(source, sizes=(3, 1, 3))
    elif how == "another D":
        publish(source, sizes=(2, 2, 2), dimension=7)
    elif how == "damaged notes":
        notes = output / "converting.json"
        notes.write_text(notes.read_text().replace('"size": 6', '"size": 7'))
    elif how == "short text":
        os.truncate(output / "passages.1.jsonl", 10)
    else:
        (output / "embeddings.1.npy").unlink()
    convert_published(source, output)
    assert "cannot be used: starting anew" in caplog.text
    assert_converted(source, output)


def test_notes_of_a_finished_conversion_do_not_spoil_its_index(tmp_path, monkeypatch):
    """Killed after the index was there and before its notes were gone; then the source changes."""
    source, output = tmp_path / "published", tmp_path / "ours"
    _, passages = publish(source, sizes=(2, 2, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stages = iter([lambda directory: None])  # at the beginning; there is none for the end
        patch.setattr(files, "tidy", lambda directory: next(stages, stop)(directory))
        convert_published(source, output)
    assert files.has_index(output) and shards_done(output) == 3
    os.utime(source / "passages.1.pt", ns=(0, 0))
    for _ in range(2):
        stop_after(source, output, 4)
        assert list(open_index(output, device=CPU).passages) == passages
    convert_published(source, output)
    assert names(output) == ["embeddings.2.npy", "index.json", "passages.2.jsonl"]
    assert list(open_index(output, device=CPU).passages) == passages


@pytest.mark.parametrize("name", ["passages.0.pt", "embeddings.2.pt"])
def test_a_source_that_changes_while_it_is_converted_is_refused(tmp_path, name):
    source, output = tmp_path / "published", tmp_path / "ours"
    publish(source, sizes=(2, 2, 2))

    def change(done):
        if done == 6:
            os.utime(source / name, ns=(0, 0))

    raises = pytest.raises(ValueError, match=r"changed while the index was converted: give the same command again")
    with raises, after_every_passage(change):
        convert_published(source, output)
    assert not files.has_index(output)
    convert_published(source, output)
    assert_converted(source, output)


def test_a_shard_that_changes_its_size_meanwhile_is_refused(tmp_path):
    source, output = tmp_path / "published", tmp_path / "ours"
    publish(source, sizes=(2, 2, 2))

    def change(done):
        if done == 2:
            torch.save(torch.zeros(6, 3).half(), source / "embeddings.1.pt")

    raises = pytest.raises(ValueError, match=r"embeddings.1.pt changed while the index was converted")
    with raises, after_every_passage(change):
        convert_published(source, output)


def test_two_at_once_are_refused(tmp_path):
    publish(tmp_path / "published")
    busy = pytest.raises(ValueError, match=r"another process is writing into .*ours \(which one is not known\): wait")
    with held_elsewhere(tmp_path / "ours" / files.LOCK), busy:
        convert_published(tmp_path / "published", tmp_path / "ours")
    convert_published(tmp_path / "published", tmp_path / "ours")


def _open_published(source, converted):
    return open_index(source, device=CPU, converted=converted).embeddings.clone()


@pytest.mark.processes
def test_opening_a_published_index_goes_on_with_its_conversion(caplog):
    """On any number of processes; the log says how to do it beforehand."""
    scratch = Path(scratch_directory())
    source, converted = scratch / "published", scratch / "run/index"
    embeddings, _ = publish(source, sizes=(3, 4, 5))
    stop_after(source, converted, 7)
    started = (converted / "embeddings.1.npy").stat().st_ino
    assert torch.equal(torch.cat(run_on_ranks(2, _open_published, source, converted)), embeddings)
    assert (converted / "embeddings.1.npy").stat().st_ino == started
    caplog.set_level("INFO", "atlas")
    open_index(source, device=CPU, converted=scratch / "other")
    assert f"`python preprocessing/convert_index.py {source} DIRECTORY`" in caplog.text


def test_a_compressed_index_is_not_replaced_by_a_conversion(tmp_path):
    publish(tmp_path / "published", sizes=(30,))
    convert(tmp_path / "published", tmp_path / "index", Compression("SQ8"))
    before = contents(tmp_path / "index")
    with pytest.raises(ValueError, match="holds another index: move it away"):
        open_index(tmp_path / "published", device=CPU, converted=tmp_path / "index")
    assert contents(tmp_path / "index") == before


# Room


def free_space(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = tmp_path / "published"
    publish(source, sizes=(50, 50, 50), dimension=64)
    convert_published(source, tmp_path / "ours")
    needed = sum(path.stat().st_size for path in (tmp_path / "ours").iterdir())
    free_space(monkeypatch, needed // 2)
    for words in ([], ["--faiss_index_type", "SQ8"]):
        refused(tmp_path, [source, tmp_path / "other", *words], r"other\S* needs 0.00 GB, and there are 0.00 GB free")
        assert not (tmp_path / "other").exists()
    for target in ("a.faiss", "compressed"):
        free_space(monkeypatch, 10)
        words = ["--faiss_index_type", "SQ8"] if target == "compressed" else []
        refused(tmp_path, [tmp_path / "ours", tmp_path / target, *words], f"{target} needs")
        assert not (tmp_path / target).exists()


def test_what_was_converted_before_needs_no_room(tmp_path, monkeypatch):
    source, output = tmp_path / "published", tmp_path / "ours"
    publish(source, sizes=(50, 50, 50), dimension=64)
    stop_after(source, output, 100)
    free_space(monkeypatch, published.look_at(source).bytes // 2)
    convert_published(source, output)
    assert_converted(source, output)


@pytest.mark.parametrize("words", [100, 1])
def test_the_room_that_is_asked_for_is_enough_and_not_much_more(tmp_path, words):
    passages = [
        {"id": str(i), "title": f"Title {i}: Section", "section": "Section", "text": f"some{i} " * words}
        for i in range(3000)
    ]
    (tmp_path / "passages.0.pt").write_bytes(pickle.dumps(passages, protocol=5))
    torch.save(torch.zeros(64, 3000).half(), tmp_path / "embeddings.0.pt")
    convert_published(tmp_path, tmp_path / "ours")
    needed = sum(path.stat().st_size for path in (tmp_path / "ours").iterdir()) + 8 * 3000
    assert needed <= published.look_at(tmp_path).bytes < 1.3 * needed


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    flat, *_ = saved(tmp_path)

    def full(*arguments):
        raise RuntimeError("Error in write: No space left on device\n")

    monkeypatch.setattr(faiss, "write_index", full)
    refused(tmp_path, [flat, tmp_path / "a.faiss"], "a.faiss cannot be written .*No space left on device")


# Compressed


@pytest.mark.parametrize("kind", ["pq", "ivfpq", "ivfsq", "ivfflat", slow("OPQ3_6,PQ3")])
def test_compressed_as_a_run_would_do_it(tmp_path, kind):
    flat, embeddings, _ = saved(tmp_path, n=300)
    words = ["--faiss_index_type", kind] + (["--faiss_code_size", "4"] if kind in ("pq", "ivfpq") else [])
    main([str(flat), str(tmp_path / "by script"), *words, "--save_index_codes_only"])
    index = open_index(flat, device=CPU, compression=asked(kind))
    save_index(tmp_path / "by run", index, retriever_fingerprint="abc", codes_only=True)
    assert contents(tmp_path / "by script") == contents(tmp_path / "by run")


def test_flags_reach_the_quantizer(tmp_path):
    flat, *_ = saved(tmp_path, n=300)
    main([str(flat), str(tmp_path / "a"), *shlex.split("--faiss_index_type ivfsq --faiss_nlist 5")])
    main([str(flat), str(tmp_path / "b"), *shlex.split("--faiss_index_type pq --faiss_code_size 2")])
    main(
        [str(flat), str(tmp_path / "c"), *shlex.split("--faiss_index_type pq --faiss_code_size 2 --faiss_train_size 9")]
    )
    assert files.read_description(tmp_path / "a").type == "IVF5,SQ4"
    b, c = (contents(tmp_path / name)["trained.1.faiss"] for name in "bc")
    assert b != c


@pytest.mark.parametrize("codes_only", [False, True])
def test_a_published_index_becomes_a_compressed_one(tmp_path, codes_only):
    """By way of a flat one, of which nothing stays but what the compressed one has of it."""
    source = tmp_path / "published"
    publish(source, sizes=(30, 11, 40))
    words = [str(source), str(tmp_path / "pq"), *shlex.split("--faiss_index_type pq --faiss_code_size 3")]
    words += ["--save_index_codes_only"] if codes_only else []
    main(words)
    expected = ["codes.1.npy", "embeddings.1.npy", "index.json", "passages.1.jsonl", "trained.1.faiss"]
    assert names(tmp_path / "pq") == [name for name in expected if not codes_only or "embeddings" not in name]
    convert_published(source, tmp_path / "flat")
    compress_index(tmp_path / "flat", tmp_path / "pq of flat", Compression("pq", 3), codes_only=codes_only)
    assert contents(tmp_path / "pq") == contents(tmp_path / "pq of flat")
    before = contents(tmp_path / "pq")
    main(words)  # done already
    assert contents(tmp_path / "pq") == before
    for other in (words[:2], [*words[:3], "SQ8"], words[:-1] if codes_only else [*words, "--save_index_codes_only"]):
        refused(tmp_path, other, "pq holds another index, of type PQ3: choose another TARGET")


@pytest.mark.processes
@pytest.mark.slow
def test_compressing_a_published_index_killed_at_any_step_goes_on_to_the_same_files(tmp_path, monkeypatch):
    source = tmp_path / "published"
    embeddings, _ = publish(source, sizes=(40,))
    quantizer = train("SQ8", embeddings.float().numpy())
    monkeypatch.setattr(converting, "train_codec", lambda *_: quantizer)  # Faiss's threads do not survive a fork

    def work(output):
        convert(source, output, Compression("SQ8"), codes_only=True)

    work(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for output in every_kill(tmp_path, work):
        if files.has_index(output):
            assert open_index(output, device=CPU).type == "SQ8"
        work(output)
        assert contents(output) == expected


def test_memory_does_not_grow_with_the_rows_that_are_compressed(tmp_path):
    """Neither of codes as long as the embeddings, nor of the lists that they would be searched in."""
    compression = Compression("ivfflat", nlist=4, train_size=1000)

    def peak(n):
        flat, *_ = saved(tmp_path / str(n), n, dimension=128)
        tracemalloc.start()
        compress_index(flat, tmp_path / str(n) / "ivf", compression)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    for n in (40_000, 80_000):
        (tmp_path / str(n)).mkdir()
    assert peak(80_000) - peak(40_000) < 40_000 * 64  # some numbers for each row; the codes have 258 bytes


# Exported


@pytest.mark.parametrize("codes_only", [False, True])
@pytest.mark.parametrize("kind", [slow(kind) if "OPQ" in kind else kind for kind in KINDS])
def test_an_exported_index_finds_the_same(tmp_path, kind, codes_only):
    if kind == "flat":
        directory, embeddings, queries = saved(tmp_path, n=300)
    else:
        directory, embeddings, queries = compressed(tmp_path, kind, codes_only=codes_only)
    main([str(directory), str(tmp_path / "exported.faiss")])
    exported = faiss.read_index(str(tmp_path / "exported.faiss"))
    assert exported.ntotal == 300 and exported.d == 8 and exported.metric_type == faiss.METRIC_INNER_PRODUCT
    expected = open_index(directory, device=CPU).search(queries, 20)
    scores, ids = exported.search(queries.numpy(), 20)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-4)
    if kind.endswith("fs"):  # many equal scores, which Faiss leaves in any order
        order = np.lexsort((ids, -scores))
        ids = np.where(scores > scores[:, -1:], np.take_along_axis(ids, order, 1), expected.ids.numpy())
    assert ids.tolist() == expected.ids.tolist()


def test_an_exported_flat_index_holds_the_embeddings_in_two_bytes_a_number(tmp_path):
    directory, embeddings, queries = saved(tmp_path, n=1000, dimension=64)
    main([str(directory), str(tmp_path / "new/exported.faiss")])
    exported = faiss.read_index(str(tmp_path / "new/exported.faiss"))
    assert isinstance(exported, faiss.IndexScalarQuantizer)
    assert np.array_equal(exported.reconstruct_n(0, 1000), embeddings.float().numpy())
    assert (tmp_path / "new/exported.faiss").stat().st_size < 1000 * 64 * 2 + 1000
    plain = faiss.IndexFlatIP(64)
    plain.add(embeddings.float().numpy())
    assert np.array_equal(exported.search(queries.numpy(), 50)[1], plain.search(queries.numpy(), 50)[1])
    assert exported.search(queries.numpy(), 5)[1].tolist() == brute_force(embeddings, queries, 5)[1].tolist()


# From version 1


def recorded(tmp_path, parts="embeddings codes"):
    """An index of version 1 with embeddings, codes, or both."""
    source = tmp_path / "old"
    shutil.copytree(VERSION_1, source, ignore=shutil.ignore_patterns("expected.json"))
    fields = described(source)
    if "codes" not in parts:
        fields |= {"type": "flat", "compressed": None}
    if "embeddings" not in parts:
        fields |= {"embeddings": None, "largest_norm": None}
    describe(source, fields, version=1)
    files.tidy(source)
    return source


@pytest.mark.parametrize("parts", ["embeddings codes", "embeddings", "codes"])
def test_an_index_of_version_1_is_converted(tmp_path, capsys, parts):
    source, target = recorded(tmp_path, parts), tmp_path / "new"
    before = contents(source)
    main([str(source), str(target)])
    assert contents(source) == before
    main(["--check", str(target)])
    assert f"{target}: nothing is damaged" in capsys.readouterr().out
    old_text, new_text = (directory / "passages.1.jsonl" for directory in (source, target))
    assert new_text.read_bytes() == old_text.read_bytes() and not new_text.samefile(old_text)  # may be the user's file
    assert described(target)["version"] == 2 and described(target)["retriever"] == "recorded"
    for name in parts.split():
        assert np.array_equal(np.load(target / f"{name}.1.npy"), np.load(source / f"{name}.1.npy"))
    old, new = open_index(source, device=CPU), open_index(target, device=CPU)
    queries = made_up(1, 8, 5)[1]
    assert_same(old.search(queries, 7), new.search(queries, 7))
    assert list(old.passages) == list(new.passages) and old.has_embeddings == new.has_embeddings
    refused(tmp_path, [target, tmp_path / "third"], "new is an index of ours already")
    refused(tmp_path, [source, target], "new holds another index")


@pytest.mark.processes
def test_a_conversion_from_version_1_killed_at_any_step_leaves_nothing_or_all(tmp_path):
    source = recorded(tmp_path)
    convert(source, tmp_path / "whole", FLAT)
    expected = contents(tmp_path / "whole")
    for output in every_kill(tmp_path, lambda o: convert(source, o, FLAT)):
        if files.has_index(output):
            assert open_index(output, device=CPU).type == "PQ4"
            files.remove_index(output)
        convert(source, output, FLAT)
        assert contents(output) == expected


def test_an_index_of_version_1_is_exported_and_its_check_says_what_it_cannot_see(tmp_path, capsys):
    source = recorded(tmp_path, "embeddings")
    main([str(source), str(tmp_path / "old.faiss")])
    assert faiss.read_index(str(tmp_path / "old.faiss")).ntotal == 40
    main(["--check", str(source)])
    assert "is of version 1, which has no checksums of arrays" in capsys.readouterr().out


def test_room_for_an_index_of_version_1_includes_its_embeddings_and_its_text(tmp_path, monkeypatch):
    source = recorded(tmp_path)
    text = (source / "passages.1.jsonl").stat().st_size
    for words, needed in ([], text + 40 * 16 + 40 * 4), (["--faiss_index_type", "SQ8"], text + 40 * 16 + 40 * 8):
        free_space(monkeypatch, needed - 1)
        refused(tmp_path, [source, tmp_path / "new", *words], "new needs 0.00 GB")
        free_space(monkeypatch, needed)
        main([str(word) for word in (source, tmp_path / "new", *words)])
        shutil.rmtree(tmp_path / "new")


# Checked


def test_damage_is_named_by_the_script(tmp_path):
    directory, *_ = saved(tmp_path)
    array = directory / "embeddings.1.npy"
    content = array.read_bytes()
    array.write_bytes(content[:4200] + b"?" + content[4201:])
    refused(tmp_path, ["--check", directory], "embeddings.1.npy is damaged: 1 of 1 blocks do not fit their checksums")
    refused(tmp_path, ["--check", tmp_path / "missing"], "missing holds no index")
    publish(tmp_path / "published")
    refused(tmp_path, ["--check", tmp_path / "published"], "published is a published index, which has no checksums")


# Refused


def refused(tmp_path, words, message):
    """The script ends with status 1 and one sentence, and no file in the directory is another than before."""
    before = contents(tmp_path)
    assert re.search(message, error_of(words))
    assert contents(tmp_path) == before


def error_of(words):
    """The one sentence that the script says on standard error as it ends with status 1."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 1 and errors.getvalue().count("\n") == 1
    return errors.getvalue()


@pytest.fixture
def home(tmp_path):
    """A flat index of ours, a compressed one without embeddings, and a published one."""
    flat, *_ = saved(tmp_path, n=300)
    compressed(tmp_path, codes_only=True, name="codes")
    publish(tmp_path / "published")
    (tmp_path / "taken.faiss").write_text("something")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/thesis.tex").write_text("something")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("missing new", "missing holds no index: there is no such directory"),
        ("others new", "others holds no index, neither ours"),
        ("missing new.faiss", "missing holds no index"),
        ("index new", "index is an index of ours already: say with --faiss_index_type what to compress it to"),
        ("index index --faiss_index_type SQ8", "index holds another index, of type flat"),
        ("published index", "index holds another index, of type flat: choose another TARGET"),
        ("published codes", "codes holds another index, of type PQ4"),
        ("published index --faiss_index_type SQ8", "index holds another index, of type flat"),
        ("published others", r"others holds other files \(thesis.tex\): TARGET must be a new directory"),
        ("published published", "published holds other files"),
        ("index others --faiss_index_type SQ8", r"others holds other files \(thesis.tex\)"),
        ("published corpus.jsonl", "corpus.jsonl is a file: TARGET is a directory, or ends in .faiss"),
        ("index taken.faiss", "taken.faiss exists: choose another TARGET, or move it away"),
        ("published new.faiss", "published is a published index: convert it into a directory first"),
        ("index new.faiss --faiss_index_type SQ8", "compress into a directory first, and export that"),
        ("index new --faiss_index_type pq", "--faiss_index_type pq needs --faiss_code_size"),
        ("index new --faiss_index_type pq --faiss_code_size 3", "3 does not divide the embedding size 8; try 2 or 4"),
        ("published new --faiss_index_type pq --faiss_code_size 4", "does not divide the embedding size 6; try 3 or 6"),
        ("index new --faiss_index_type nonsense", "--faiss_index_type nonsense: neither one of flat"),
        ("codes new --faiss_index_type SQ8", "codes is an index of type PQ4 without embeddings, which another kind"),
    ],
)
def test_mistakes_get_one_sentence(home, monkeypatch, words, message):
    monkeypatch.chdir(home)
    refused(home, shlex.split(words), message)
    assert not (home / "new").exists() and not (home / "new.faiss").exists()


def test_damaged_indices_are_refused(home, monkeypatch):
    monkeypatch.chdir(home)
    with open(home / "index/passages.1.jsonl", "r+b") as text:
        text.write(b"x")
    for words in ("index new --faiss_index_type SQ8", "index new.faiss"):
        refused(home, shlex.split(words), "passages.1.jsonl is not the text that the index was made of")
    (home / "codes/index.json").write_text("{}")
    refused(home, ["codes", "new.faiss"], "index.json is damaged")


def test_an_index_that_cannot_be_compressed_to_the_end_leaves_nothing(tmp_path):
    directory, *_ = saved(tmp_path, n=300)
    array = np.load(directory / "embeddings.1.npy", mmap_mode="r+")
    array[299, 3] = np.inf  # not in the sample
    array.flush()
    words = shlex.split("--faiss_index_type SQ8 --faiss_train_size 5")
    refused(tmp_path, [directory, tmp_path / "new", *words], "the embedding of passage 299 is not finite")


def test_a_conversion_that_was_stopped_is_no_source(tmp_path):
    publish(tmp_path / "published", sizes=(2, 2, 2))
    stop_after(tmp_path / "published", tmp_path / "half", 4)
    for words in (["new", "--faiss_index_type", "SQ8"], ["new.faiss"]):
        refused(
            tmp_path,
            [tmp_path / "half", tmp_path / words[0], *words[1:]],
            "half holds an index whose conversion was stopped: give the same command again",
        )


@pytest.mark.parametrize("name", ["passages.1.pt", "embeddings.1.pt"])
def test_hostile_pickles_are_refused_and_do_not_run(tmp_path, capsys, name):
    """What was converted before stays; with the file mended, the same command goes on behind it."""
    source, output, victim = tmp_path / "published", tmp_path / "ours", tmp_path / "victim"
    publish(source, sizes=(2, 2))
    whole = (source / name).read_bytes()
    (source / name).write_bytes(pickle.dumps([RunsSomething(victim)], protocol=2))
    assert name in error_of([source, output])
    assert not victim.exists() and not files.has_index(output)
    if name.startswith("passages"):  # of embeddings all headers are looked at before anything else
        assert "1 of 2 shards are converted and kept: the same command resumes after them" in capsys.readouterr().out
    (source / name).write_bytes(whole)
    main([str(source), str(output)])
    assert_converted(source, output)


def test_a_first_shard_that_is_refused_leaves_nothing(tmp_path):
    publish(tmp_path / "published", sizes=(2, 2))
    (tmp_path / "published/passages.0.pt").write_bytes(pickle.dumps([1, 2]))
    refused(tmp_path, [tmp_path / "published", tmp_path / "ours"], "passages.0.pt, passage 0: ")


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: SOURCE, TARGET"),
        ("a b --faiss_code_size 64", "--faiss_code_size says how to compress: give a --faiss_index_type that does"),
        ("a b --faiss_index_type flat --save_index_codes_only", "--save_index_codes_only says how to compress"),
        ("a b --save_index_codes_only", "--save_index_codes_only says how to compress"),
        ("a b --faiss_index_type pq --faiss_code_size 0", "--faiss_code_size 0 is too small: it must be at least 1"),
        ("--check a b", "--check takes one directory and nothing else"),
        ("--check a --faiss_index_type pq", "--check takes one directory and nothing else"),
        ("a", "the following arguments are required: TARGET"),
        ("a b --nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_flags_end_with_status_2(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(words))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_help_names_every_flag_and_row(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, text.splitlines())) <= 120
    for part in ("SOURCE", "TARGET", "--faiss_nlist", "--save_index_codes_only", "Row i of a .faiss file", "examples:"):
        assert part in text
    for line in text.partition("examples:")[2].strip().splitlines():
        parse_options(shlex.split(line)[2:])


@pytest.mark.processes
def test_wrong_flags_are_answered_before_torch_is_imported():
    code = "import sys; from preprocessing.convert_index import main, parse_options; parse_options(['a', 'b']); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


def test_commands_of_the_readme():
    commands = [shlex.split(command) for command in COMMANDS if "convert_index.py" in command]
    assert len(commands) == 4
    for words in commands:
        parse_options(words[2:])
