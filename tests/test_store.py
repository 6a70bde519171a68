"""Saved indices: any number of ranks writes, any number opens; damage is refused; published ones are converted."""

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from atlas.files.copies import clone
from atlas.files.disk import FullDiskError
from atlas.index import arrays, build, store
from atlas.index import directory as files
from atlas.index.build import compress
from atlas.index.codec import Codec, Compression, train
from atlas.index.convert import check_index, compress_index
from atlas.index.flat import FlatIndex
from atlas.index.passages import open_passages
from atlas.index.published import convert_published
from atlas.index.sharded import ShardedIndex, look_up
from atlas.index.store import open_index, save_index
from atlas.runtime import distributed
from tests.indices import (
    CPU,
    KINDS,
    VERSION_1,
    asked,
    compressed,
    damaged,
    describe,
    described,
    make_index,
    names,
    publish,
    save,
    saved,
    write_corpus,
)
from tests.kit import slow
from tests.locks import held_elsewhere
from tests.patience import free_port, wait_until
from tests.ranks import rank_environment, run_on_ranks, scratch_directory
from tests.test_flat import assert_same, brute_force, made_up


def _save_in_pages(*arguments):
    """With blocks so small that every rank has some of its own."""
    before, arrays.BLOCK_BYTES = arrays.BLOCK_BYTES, 4096
    try:
        save(*arguments)
    finally:
        arrays.BLOCK_BYTES = before


def _open_and_search(directory, queries, k):
    index = open_index(directory, device=CPU, dimension=queries.shape[1])
    hits = index.search(queries, k)
    rows = (index.rows.start, index.embeddings.clone())
    return hits.scores, hits.ids, look_up(index.passages, hits.ids), rows


@pytest.mark.processes
@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 200, 1000])
def test_any_number_of_ranks_saves_and_any_number_opens(writers, n):
    directory = Path(scratch_directory())
    embeddings, queries = made_up(n, 8, 3)
    corpus = write_corpus(directory / "corpus.jsonl", n)
    run_on_ranks(writers, _save_in_pages, directory / "index", corpus, embeddings)
    check_index(directory / "index")
    scores, ids = brute_force(embeddings, queries, 5)
    texts = [[f"text {i} ü" for i in row] for row in ids.tolist()]
    for readers in (1, 2, 3):
        answers = run_on_ranks(readers, _open_and_search, directory / "index", queries, 5)
        assert torch.equal(torch.cat([mine for *_, (_, mine) in answers]), embeddings)
        for found_scores, found_ids, passages, _ in answers:
            assert_same((found_scores, found_ids), (scores, ids))
            assert [[p["text"] for p in row] for row in passages] == texts
            assert passages[0][0]["title"] == f"T{ids[0, 0]}: S" and passages[0][0]["year"] == ids[0, 0]


def test_the_embeddings_are_an_ordinary_array(tmp_path):
    directory, embeddings, _ = saved(tmp_path)
    for mode in (None, "r"):
        assert np.array_equal(np.load(directory / "embeddings.1.npy", mmap_mode=mode), embeddings.numpy())


def _mapped(directory):
    """Of an index opened on this rank: files, permissions and sizes of what is mapped of its arrays; its rows."""
    index = open_index(directory, device=CPU)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]
    ranges = [(fields[-1], fields[1], *(int(end, 16) for end in fields[0].split("-"))) for fields in lines]
    found = [(Path(file).name, permissions, end - start) for file, permissions, start, end in ranges]
    return [part for part in found if part[0].endswith(".npy")], len(index.rows)


@pytest.mark.processes
def test_each_rank_maps_its_own_rows_and_cannot_write_into_them():
    directory = Path(scratch_directory())
    embeddings, _ = made_up(3000, 64, 0)
    save(directory / "index", write_corpus(directory / "corpus.jsonl", 3000), embeddings)
    for mapped, rows in run_on_ranks(3, _mapped, directory / "index"):
        ((file, permissions, size),) = mapped
        assert file == "embeddings.1.npy" and permissions == "r--s"
        assert 0 <= size - rows * 128 <= 2 * 4096 + 4096  # whole pages


def test_a_read_only_array_is_opened_without_a_warning(tmp_path, recwarn):
    directory, embeddings, _ = saved(tmp_path)
    assert torch.equal(open_index(directory, device=CPU).embeddings, embeddings)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_embeddings_of_another_type_are_saved_in_fp16(tmp_path):
    embeddings, _ = made_up(5, 4, 0, torch.float32)
    save(tmp_path / "index", write_corpus(tmp_path / "corpus.jsonl", 5), embeddings)
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, embeddings.half())
    with pytest.raises(ValueError, match="passage 3 is not finite"):
        save(tmp_path / "index", tmp_path / "corpus.jsonl", embeddings.clone().index_fill_(0, torch.tensor([3]), 1e6))
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, embeddings.half())


def assert_offsets_are_those_of(directory, text):
    """Offsets of lines are cached of this text of an index alone, and nothing else is in the cache."""
    (entry,) = names(directory / ".atlas-cache")
    assert entry.startswith(f"{text}.") and entry.endswith(".offsets.npy")


@pytest.mark.parametrize("clones", [True, False])
def test_the_text_of_an_index_is_its_own(tmp_path, monkeypatch, clones):
    """Whatever is done to the corpus that was given: the bytes are copied, or shared by the file system till then."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    monkeypatch.setattr(store, "clone", partial(as_if_cloned, clones))
    corpus = write_corpus(tmp_path / "corpus.jsonl", 6)
    content = corpus.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(corpus)
    embeddings, _ = made_up(6, 4, 0)
    for _ in range(3):
        save(tmp_path / "index", tmp_path / "link.jsonl", embeddings)
    text = tmp_path / "index/passages.1.jsonl"  # copied once
    assert names(tmp_path / "index") == [".atlas-cache", "embeddings.3.npy", "index.json", text.name]
    assert_offsets_are_those_of(tmp_path / "index", text.name)
    assert not text.is_symlink() and text.stat().st_nlink == 1 and text.read_bytes() == content
    expected = list(open_passages(corpus))
    with open(corpus, "r+b") as file:  # in its place, as an editor may do
        file.write(content.replace(b"text", b"tent"))
        file.truncate(len(content) // 2)
    assert list(open_index(tmp_path / "index", device=CPU).passages) == expected
    check_index(tmp_path / "index")


def as_if_cloned(works, source, target):
    """What a file system that can share blocks does, or one that cannot."""
    if works:
        target.write_bytes(source.read_bytes())
    return works


def test_a_clone_is_a_copy_or_empty(tmp_path):
    """On the file system of the tests, whatever it can do; another one that is asked says that it cannot."""
    original = write_corpus(tmp_path / "corpus.jsonl", 2000)
    content, target = original.read_bytes(), tmp_path / "clone"
    if clone(original, target):
        original.write_bytes(b"changed")
        assert target.read_bytes() == content
    else:
        assert target.read_bytes() == b""
    assert not clone(Path("/proc/version"), tmp_path / "other") and (tmp_path / "other").read_bytes() == b""


def test_indices_of_ours_share_their_text(tmp_path):
    directory, *_ = saved(tmp_path, n=300)
    (tmp_path / "corpus.jsonl").unlink()
    text = directory / "passages.1.jsonl"
    compress_index(directory, tmp_path / "pq", asked("pq"))
    index = open_index(directory, device=CPU)
    save_index(tmp_path / "again", ShardedIndex(index.passages, 2 * index.embeddings))
    for other in (tmp_path / "pq", tmp_path / "again"):
        assert (other / "passages.1.jsonl").samefile(text)
        assert described(other)["segments"][0]["passages"] == described(directory)["segments"][0]["passages"]
        check_index(other)


def as_earlier_versions_saved(directory, corpus):
    """The text is a second name of the user's file, and has no checksums."""
    text, fields = directory / "passages.1.jsonl", described(directory)
    text.unlink()
    os.link(corpus, text)
    for name in ("blocks", "block_bytes"):
        del fields["segments"][0]["passages"][name]
    describe(directory, fields)


def test_text_that_may_be_the_user_s_own_file_is_copied(tmp_path):
    """An index of an earlier version is opened as it is, and what is made of it, in its place too, has its own text."""
    old, *_ = saved(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    as_earlier_versions_saved(old, corpus)
    check_index(old)
    compress_index(old, tmp_path / "sq", asked("SQ8"))
    save_index(old, open_index(old, device=CPU))
    for directory, text in ((tmp_path / "sq", "passages.1.jsonl"), (old, "passages.2.jsonl")):
        assert text in names(directory) and not (directory / text).samefile(corpus)
        assert (directory / text).read_bytes() == corpus.read_bytes()
        check_index(directory)


def test_no_room_for_the_text_is_said_with_file_and_bytes(tmp_path, monkeypatch):
    """Before it is copied, and when the disk fills up on the way; nothing is left behind."""
    corpus, index = write_corpus(tmp_path / "corpus.jsonl", 20), tmp_path / "index"
    embeddings, size = made_up(20, 8, 0)[0], corpus.stat().st_size
    monkeypatch.setattr(store, "clone", partial(as_if_cloned, False))
    message = r"passages.1.jsonl needs 0.00 GB, and there are 0.00 GB free: make room, or choose another place"
    for paths in (corpus, [corpus, corpus]):
        free = size - 1 if paths == corpus else 2 * size - 1
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(10**9, 10**9, free))
        with pytest.raises(ValueError, match=message):
            save(index, paths, embeddings.repeat(len(paths) if paths != corpus else 1, 1))
        assert not index.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, size))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("atlas.files.checksums.os.fsync", full)
    message = (
        rf"passages\.1\.jsonl cannot be written \(No space left on device; {size:,} bytes are needed, {size:,} are free"
    )
    with pytest.raises(FullDiskError, match=message):
        save(index, corpus, embeddings)
    assert not index.exists()


@pytest.mark.parametrize("how", ["two files", "cut"])
def test_any_other_corpus_is_copied(tmp_path, how):
    first = write_corpus(tmp_path / "a.jsonl", 4)
    second = write_corpus(tmp_path / "b.jsonl", 3, word="other")
    second.write_bytes(second.read_bytes().replace(b"\n", b"\n\n").rstrip())  # blank lines, none at the end
    paths, most = {"two files": ([first, second], -1), "cut": ([first], 2)}[how]
    corpus = open_passages(paths, most)
    save(tmp_path / "index", paths, made_up(len(corpus), 4, 0)[0], most)
    index = open_index(tmp_path / "index", device=CPU)
    assert list(index.passages) == list(corpus)


@pytest.mark.parametrize("how", ["two files", "cut", "one file", "tsv"])
def test_text_is_copied_once(tmp_path, how):
    """Whatever is saved again is saved with the copy that is there, as long as that and the corpus are the same."""
    paths, most = [write_corpus(tmp_path / "a.jsonl", 6)], -1
    if how == "two files":
        paths.append(write_corpus(tmp_path / "b.jsonl", 3, word="other"))
    elif how == "cut":
        most = 5
    elif how == "tsv":
        paths = [tmp_path / "a.tsv"]
        paths[0].write_text("id\ttext\ttitle\n" + "".join(f"{i}\ttext {i}\tT\n" for i in range(6)))

    def save_all(value):
        corpus = open_passages(paths, most)
        save(tmp_path / "index", paths, torch.full((len(corpus), 4), float(value)).half(), most)
        index = open_index(tmp_path / "index", device=CPU)
        assert list(index.passages) == list(corpus) and index.embeddings.unique().tolist() == [value]
        return files.read_description(tmp_path / "index").segments[0].passages.file

    assert [save_all(value) for value in (1, 2, 3)] == ["passages.1.jsonl"] * 3
    assert names(tmp_path / "index") == ["embeddings.3.npy", "index.json", "passages.1.jsonl"]
    os.truncate(tmp_path / "index/passages.1.jsonl", 10)
    assert save_all(4) == "passages.4.jsonl"
    paths[0].write_bytes(paths[0].read_bytes().replace(b"text 2", b"next 2"))
    assert save_all(5) == "passages.5.jsonl"
    if how != "cut":
        return
    most = 4
    assert save_all(6) == "passages.6.jsonl"


def test_saving_an_opened_index_into_its_own_directory(tmp_path, monkeypatch):
    """What a refresh with the same --load_index_path and --save_index_path does: text stays, embeddings change."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    directory, embeddings, _ = saved(tmp_path)
    index = open_index(directory, device=CPU)
    text = (directory / "passages.1.jsonl").stat()
    save_index(directory, ShardedIndex(index.passages, 2 * index.embeddings), retriever_fingerprint="def")
    assert names(directory) == [".atlas-cache", "embeddings.2.npy", "index.json", "passages.1.jsonl"]
    assert_offsets_are_those_of(directory, "passages.1.jsonl")
    assert (directory / "passages.1.jsonl").stat() == text
    again = open_index(directory, device=CPU)
    assert torch.equal(again.embeddings, 2 * embeddings)
    assert again.passages[3]["title"] == "T3: S"  # still joined once


def test_another_retriever_is_refused_with_both_names_unless_it_is_insisted_on(tmp_path, caplog, monkeypatch):
    directory, *_ = saved(tmp_path)
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("atlas"), "propagate", True)
    open_index(directory, device=CPU)  # it is not to be searched with any
    open_index(directory, device=CPU, retriever_fingerprint="abc")
    assert not caplog.records
    sentence = "was made by the passage encoder abc and would be searched with xyz, .* insist with --allow_other_index$"
    with pytest.raises(ValueError, match=sentence):
        open_index(directory, device=CPU, retriever_fingerprint="xyz")
    assert not caplog.records
    open_index(directory, device=CPU, retriever_fingerprint="xyz", allow_other=True)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "abc" in caplog.text and "xyz" in caplog.text


def test_an_index_of_unknown_origin_is_warned_of(tmp_path, caplog, monkeypatch):
    publish(tmp_path / "published")
    monkeypatch.setattr(logging.getLogger("atlas"), "propagate", True)
    convert_published(tmp_path / "published", tmp_path / "index")
    open_index(tmp_path / "index", device=CPU)
    assert "WARNING" not in {record.levelname for record in caplog.records}
    open_index(tmp_path / "index", device=CPU, retriever_fingerprint="xyz")
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith(f"{tmp_path / 'index'} does not say which retriever it was made by")


def test_another_dimension_is_refused(tmp_path):
    directory, *_ = saved(tmp_path)
    with pytest.raises(ValueError, match="embeddings of size 8, the retriever makes them of size 16"):
        open_index(directory, device=CPU, dimension=16)


def test_no_index_there(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no index"):
            open_index(directory, device=CPU)


def test_a_changed_corpus_is_refused(tmp_path):
    directory, *_ = saved(tmp_path)
    corpus = directory / "passages.1.jsonl"
    content = corpus.read_bytes()
    corpus.write_bytes(content.replace(b"text 7", b"tent 7"))
    with pytest.raises(ValueError, match="not the text that the index was made of"):
        open_index(directory, device=CPU)
    corpus.write_bytes(content + b'{"id": "new", "text": ""}\n')
    with pytest.raises(ValueError, match=r"bytes long, when the index was made \d+"):
        open_index(directory, device=CPU)
    corpus.write_bytes(content)
    assert open_index(directory, device=CPU).size == 20


def test_missing_and_short_files_are_refused_by_name(tmp_path):
    directory, *_ = saved(tmp_path)
    array, text = directory / "embeddings.1.npy", directory / "passages.1.jsonl"
    content = array.read_bytes()
    array.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"embeddings.1.npy is 4414 bytes long, 20 x 8 fp16 numbers take 4416"):
        open_index(directory, device=CPU)
    array.unlink()
    with pytest.raises(ValueError, match=r"embeddings.1.npy, which index.json names, is missing"):
        open_index(directory, device=CPU)
    array.write_bytes(content)
    text.unlink()
    with pytest.raises(ValueError, match=r"passages.1.jsonl, which index.json names, is missing"):
        open_index(directory, device=CPU)


def _open(directory):
    try:
        return open_index(directory, device=CPU).size
    except ValueError as error:
        return str(error)


@pytest.mark.processes
def test_a_refusal_reaches_every_rank():
    directory = Path(scratch_directory())
    index, *_ = saved(directory)
    (index / "embeddings.1.npy").write_bytes(b"short")
    answers = run_on_ranks(3, _open, index)
    assert len(set(answers)) == 1 and "is 5 bytes long" in answers[0]


def test_damaged_files_are_refused_in_one_sentence_or_harmless(tmp_path):
    """500 times: open, search and read, or refuse with one sentence."""
    directory, _, queries = saved(tmp_path)
    os.unlink(tmp_path / "corpus.jsonl")
    chance, refused = random.Random(0), 0
    originals = {name: (directory / name).read_bytes() for name in names(directory)}
    for i in range(500):
        name = sorted(originals)[i % len(originals)]
        (directory / name).write_bytes(damaged(originals[name], chance))
        try:
            index = open_index(directory, device=CPU)
            look_up(index.passages, index.search(queries, 20).ids)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert name == "embeddings.1.npy"  # another number is another number; text and description never pass
            if (directory / name).read_bytes() != originals[name]:
                with pytest.raises(ValueError, match="embeddings.1.npy is damaged: 1 of 1 blocks"):
                    check_index(directory)
        (directory / name).write_bytes(originals[name])
    assert refused > 250


def test_damaged_offsets_of_lines_are_found_again(tmp_path, monkeypatch):
    """The file that says where the lines of a large text are: 100 times no other text is taken for a passage."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    directory, _, queries = saved(tmp_path)
    os.unlink(tmp_path / "corpus.jsonl")
    expected = list(open_index(directory, device=CPU).passages)
    (offsets,), chance = (directory / ".atlas-cache").glob("*"), random.Random(2)
    content = offsets.read_bytes()
    for _ in range(100):
        offsets.write_bytes(damaged(content, chance))
        index = open_index(directory, device=CPU)
        ids = index.search(queries, 20).ids
        assert look_up(index.passages, ids) == [[expected[i] for i in row] for row in ids.tolist()]
        assert offsets.read_bytes() == content


def test_only_one_process_writes_into_a_directory_at_a_time(tmp_path):
    directory, embeddings, _ = saved(tmp_path)
    note = '{"pid": 4711, "host": "far", "since": "yesterday"}'
    sentence = rf"^another process is writing into {directory} \(process 4711 on far, since yesterday\): wait until"
    before = names(directory)
    with held_elsewhere(directory / files.LOCK, note), pytest.raises(ValueError, match=sentence):
        save(directory, tmp_path / "corpus.jsonl", 2 * embeddings)
    (directory / files.LOCK).write_text(note)  # its writer was killed
    (directory / "embeddings.7.npy").write_text("half")  # and left this, which may take the room that is needed
    assert torch.equal(open_index(directory, device=CPU).embeddings, embeddings)
    save(directory, tmp_path / "corpus.jsonl", 2 * embeddings)
    assert torch.equal(open_index(directory, device=CPU).embeddings, 2 * embeddings)
    assert names(directory) == [name.replace("embeddings.1", "embeddings.2") for name in before]  # the text is the same


def test_every_byte_of_the_array_header_is_checked(tmp_path):
    directory, *_ = saved(tmp_path, n=3, dimension=2)
    array = directory / "embeddings.1.npy"
    for at in [*range(0, 128, 3), *range(128, 4096, 97), 4095]:
        content = bytearray(array.read_bytes())
        content[at] ^= 1
        array.write_bytes(content)
        with pytest.raises(ValueError, match="does not begin as an array of 3 x 2 fp16 numbers"):
            open_index(directory, device=CPU)
        content[at] ^= 1
        array.write_bytes(content)


def test_edited_descriptions_are_refused(tmp_path):
    directory, *_ = saved(tmp_path)
    path, fields = directory / "index.json", described(directory)
    for change, message in [
        ({"dimension": 9}, "edited or damaged"),
        ({"checksum": "0"}, "edited or damaged"),
        ({"version": 3}, "format version 3, and this one reads up to 2: it was written by a newer version"),
    ]:
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message):
            open_index(directory, device=CPU)
    for content in ("", "[]", "{}", "null", '{"version": 1', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match="index.json is damaged"):
            open_index(directory, device=CPU)


def test_what_a_later_version_may_write_is_refused_and_left_alone(tmp_path):
    """Under a checksum that fits: fields that mean something later, or something else."""
    directory, *_ = saved(tmp_path)
    fields, before = described(directory), names(directory)
    (segment,) = fields["segments"]
    for change in (
        {"segments": [segment, segment | {"dates": "dates.2.npy"}]},
        {"segments": [segment | {"tombstones": "tombstones.2.npy"}]},
        {"segments": [segment | {"language": "en"}]},
        {"languages": ["en"]},
    ):
        describe(directory, fields | change)
        with pytest.raises(ValueError, match=r"index.json has .*: it was written by a newer version of this program"):
            open_index(directory, device=CPU)
        with pytest.raises(ValueError, match="newer version"):
            files.tidy(directory)
    assert names(directory) == before
    for name in ("embeddings", "passages"):  # by someone who knows how
        describe(directory, fields | {"segments": [segment | {name: segment[name] | {"file": f"../{name}.1.npy"}}]})
        with pytest.raises(ValueError, match="files that do not belong"):
            open_index(directory, device=CPU)


def test_a_flipped_byte_is_found_by_the_check(tmp_path, monkeypatch):
    """In any block of any array, with its number and rows; opening does not read the arrays."""
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 4096)
    directory, _, queries = compressed(tmp_path, "ivfsq", n=3000)
    check_index(directory)
    for name, row_bytes in (("embeddings.1.npy", 16), ("codes.1.npy", 5)):
        content = (directory / name).read_bytes()
        for at in (4096, 8191, 8192, len(content) - 1):
            (directory / name).write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
            block, first = at // 4096, (at // 4096 * 4096 - 4096) // row_bytes
            with pytest.raises(
                ValueError, match=rf"{name} is damaged: 1 of \d+ blocks .* 0: {block}; .* rows {first} to"
            ):
                check_index(directory)
        (directory / name).write_bytes(content)
    check_index(directory)


def test_the_check_reads_text_and_quantizer_as_well(tmp_path):
    directory, *_ = compressed(tmp_path, n=300)
    text, trained = directory / "passages.1.jsonl", directory / "trained.1.faiss"
    content = trained.read_bytes()
    trained.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=r"trained.1.faiss was changed or damaged"):
        check_index(directory)
    trained.write_bytes(content)
    text.write_bytes(text.read_bytes().replace(b'"text": "text 7 ', b'"test": "text 7 '))
    fields = described(directory)
    fields["segments"][0]["passages"]["sample"] = files.sample_of(text)[1]
    describe(directory, fields)  # as if the sample had missed the change
    with pytest.raises(ValueError, match="line 8: a passage needs a `text`"):
        check_index(directory)
    text.write_bytes(text.read_bytes().replace(b'"test": "text 7 ', b'"text": "tent 7 '))
    fields["segments"][0]["passages"]["sample"] = files.sample_of(text)[1]
    describe(directory, fields)
    with pytest.raises(ValueError, match=rf"passages.1.jsonl is damaged: 1 of 1 .* bytes 0 to {text.stat().st_size}\)"):
        check_index(directory)


def test_the_precision_of_the_embedder_is_remembered_and_mentioned(tmp_path, caplog):
    directory, *_ = saved(tmp_path)
    index = open_index(directory, device=CPU, embedder_precision="bf16")
    save_index(directory, index, embedder_precision="fp32")
    compress_index(directory, tmp_path / "pq", asked("SQ8"))
    assert files.read_description(tmp_path / "pq").embedder_precision == "fp32"
    caplog.set_level("INFO", "atlas")
    open_index(directory, device=CPU, embedder_precision="fp32")
    assert "embedded in" not in caplog.text
    open_index(directory, device=CPU, embedder_precision="bf16")
    assert f"{directory} was embedded in fp32 and is searched with queries in bf16" in caplog.text


# An index of version 1, written by the program of that time


def _search_as_recorded(directory):
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    queries = torch.tensor(expected["queries"])
    index = open_index(directory, device=CPU, dimension=8)
    assert index.type == "PQ4" and index.size == 40
    assert index.search(queries, 5).ids.tolist() == expected["ids"]
    flat = open_index(directory, device=CPU, compression=asked("flat"))
    hits = flat.search(queries, 5)
    assert hits.ids.tolist() == expected["exact ids"] and hits.scores.tolist() == expected["exact scores"]
    assert flat.passages[7] == {"id": "p7", "title": "T7: S", "section": "S", "text": "text 7 ü"}
    embeddings = np.load(directory / described(directory)["embeddings"])
    assert np.array_equal(flat.embeddings.numpy(), embeddings[flat.rows.start : flat.rows.stop])


@pytest.mark.processes
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_an_index_of_version_1_is_opened_by_any_number_of_ranks(readers):
    before = {path.name: path.read_bytes() for path in VERSION_1.iterdir()}
    run_on_ranks(readers, _search_as_recorded, VERSION_1)
    assert {path.name: path.read_bytes() for path in VERSION_1.iterdir()} == before


def test_damage_of_an_index_of_version_1_is_refused(tmp_path):
    directory = shutil.copytree(VERSION_1, tmp_path / "index")
    for name in ("embeddings.1.npy", "codes.1.npy"):
        content = (directory / name).read_bytes()
        for other, message in [
            (content[:-1], "bytes long, 40 x . "),
            (b"x" + content[1:], "does not begin as an array of 40 x"),
        ]:
            (directory / name).write_bytes(other)
            with pytest.raises(ValueError, match=f"{name} .*{message}"):
                open_index(directory, device=CPU)
        (directory / name).write_bytes(content)
    describe(directory, described(directory) | {"corpus": {"bytes": 2690, "rows": 40, "sample": "0"}}, version=1)
    with pytest.raises(ValueError, match="not the text that the index was made of"):
        open_index(directory, device=CPU)


def test_an_index_of_version_1_is_saved_and_compressed_in_version_2(tmp_path):
    """Its embeddings and its passages cannot be linked: those of the new indices begin elsewhere, or are their own."""
    directory = shutil.copytree(VERSION_1, tmp_path / "index")
    compress_index(directory, tmp_path / "sq", asked("SQ8"))
    save_index(tmp_path / "again", open_index(directory, device=CPU))
    for target in (tmp_path / "sq", tmp_path / "again"):
        check_index(target)
        assert described(target)["version"] == 2
        text = target / "passages.1.jsonl"
        assert text.stat().st_nlink == 1 and text.read_bytes() == (directory / "passages.1.jsonl").read_bytes()
        assert np.array_equal(np.load(target / "embeddings.1.npy"), np.load(directory / "embeddings.1.npy"))
    save_index(directory, open_index(directory, device=CPU))  # in its own place
    check_index(directory)
    assert names(directory)[:3] == ["codes.2.npy", "embeddings.2.npy", "expected.json"]


def _save_for_ever(directory, corpora):
    for turn in range(10**6):
        kind = turn % 2
        save_index(directory, make_index(open_passages(corpora[kind]), torch.full((300, 64), float(kind)).half()))


def _kill_in_a_save(directory, writers, chance):
    """Start processes that save into the directory for ever; kill them some time after they saved a whole index."""
    before, started = (directory / "index.json").read_bytes(), time.monotonic()
    for writer in writers:
        writer.start()
    wait_until(
        lambda: (directory / "index.json").read_bytes() != before,
        "an index was saved",
        alive=lambda: all(writer.is_alive() for writer in writers),
    )
    took = time.monotonic() - started
    time.sleep(chance.uniform(0, took))
    for writer in chance.sample(writers, len(writers)):
        os.kill(writer.pid, signal.SIGKILL)
        time.sleep(chance.uniform(0, took / 10))
    for writer in writers:
        writer.join()


@pytest.mark.processes
def test_a_writer_killed_at_any_moment_leaves_a_whole_index(tmp_path, monkeypatch):
    """Two indices are saved in turns; after each of 20 kills the directory holds one of them, never a mixture."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    corpora = [write_corpus(tmp_path / f"{kind}.jsonl", 300, word) for kind, word in enumerate(("zero", "one"))]
    directory, chance, seen = tmp_path / "index", random.Random(0), set()
    save(directory, corpora[0], torch.zeros(300, 64).half())
    for _ in range(20):
        _kill_in_a_save(
            directory, [get_context("fork").Process(target=_save_for_ever, args=(directory, corpora))], chance
        )
        index = open_index(directory, device=CPU)
        (kind,) = index.embeddings.unique().tolist()
        assert {p["text"].split()[0] for p in index.passages} == {["zero", "one"][int(kind)]}
        check_index(directory)
        seen.add(described(directory)["segments"][0]["embeddings"]["file"])
    assert len(seen) > 10  # the writers did get somewhere
    save(directory, corpora[0], torch.zeros(300, 64).half())
    assert len(names(directory)) == 4  # what the killed ones left is gone
    assert_offsets_are_those_of(directory, files.read_description(directory).segments[0].passages.file)


def _save_for_ever_as_rank(rank, port, directory, corpora):
    os.environ.update(rank_environment(rank, 2, port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    distributed.start("cpu")
    _save_for_ever(directory, corpora)


@pytest.mark.processes
@pytest.mark.slow
def test_two_writers_killed_one_after_the_other_leave_a_whole_index(tmp_path, monkeypatch):
    """As above, but each rank writes its rows: 20 times one rank is killed, and the other a moment later."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    corpora = [write_corpus(tmp_path / f"{kind}.jsonl", 300, word) for kind, word in enumerate(("zero", "one"))]
    directory, chance, seen = tmp_path / "index", random.Random(0), set()
    save(directory, corpora[0], torch.zeros(300, 64).half())
    for _ in range(20):
        port = free_port()
        arguments = [(rank, port, directory, corpora) for rank in (0, 1)]
        writers = [get_context("fork").Process(target=_save_for_ever_as_rank, args=a) for a in arguments]
        _kill_in_a_save(directory, writers, chance)
        index = open_index(directory, device=CPU)
        (kind,) = index.embeddings.unique().tolist()
        assert {p["text"].split()[0] for p in index.passages} == {["zero", "one"][int(kind)]}
        check_index(directory)
        seen.add(described(directory)["segments"][0]["embeddings"]["file"])
    assert len(seen) > 5  # the writers did get somewhere


# Compressed indices


def _compress_and_save(directory, corpus, embeddings, kinds, codes_only=False):
    for kind in kinds:
        index = compress(make_index(open_passages(corpus), embeddings), asked(kind))
        save_index(
            directory / kind, index, retriever_fingerprint="abc", codes_only=codes_only and index.compressed is not None
        )


def _open_and_search_each(directory, queries, ks, kinds):
    answers = []
    for kind in kinds:
        index = open_index(directory / kind, device=CPU, dimension=queries.shape[1])
        assert index.type == asked(kind).factory(index.size, index.dimension)
        mine = queries[distributed.rank() :: distributed.world_size()]  # other queries, and other numbers of them
        hits = [index.search(mine, k) for k in ks]
        answers.append([(h.scores, h.ids) for h in hits])
    return answers


QUICK = [kind for kind in KINDS if "OPQ" not in kind]  # which takes a second to train
OTHERS = ["OPQ3_6,PQ3", "OPQ2,IVF3,PQ4", "PCAR6,IVF2,SQfp16", "RR8,SQ4"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("n", "kinds"),
    [(200, QUICK)] + [slow(n, QUICK) for n in (1, 2, 7, 300)] + [slow(n, OTHERS) for n in (1, 2, 7, 200, 300)],
)
def test_compressed_indices_are_the_same_at_every_number_of_ranks(n, kinds):
    """Trained, encoded and saved by any number of ranks, opened by any other: the same files, and the same passages."""
    directory = Path(scratch_directory())
    embeddings, queries = made_up(n, 8, 7)
    embeddings[n // 2 :] = embeddings[: n - n // 2].clone()  # ties
    corpus = write_corpus(directory / "corpus.jsonl", n)
    ks = (1, 5, n + 3)
    content: dict[tuple[str, str], bytes] = {}
    for writers in (1, 2, 3):
        run_on_ranks(writers, _compress_and_save, directory / str(writers), corpus, embeddings, kinds)
        for kind in kinds:
            for path in (directory / str(writers) / kind).iterdir():
                if path.suffix in (".npy", ".faiss"):
                    assert content.setdefault((kind, path.name), path.read_bytes()) == path.read_bytes()
    expected = [_searched_alone(directory / "1" / kind, embeddings, queries, ks) for kind in kinds]
    for writers, readers in [(1, 1), (1, 2), (1, 3), (2, 3), (3, 2)]:  # all of them wrote the same files
        answers = run_on_ranks(readers, _open_and_search_each, directory / str(writers), queries, ks, kinds)
        for rank, of_rank in enumerate(answers):
            for kind, hits, wanted in zip(kinds, of_rank, expected, strict=True):
                for found, (scores, ids) in zip(hits, wanted, strict=True):
                    mine = scores[rank::readers], ids[rank::readers]
                    assert_same(found, mine) if kind == "flat" else assert_same_but_last(found, mine)


def _searched_alone(directory, embeddings, queries, ks):
    """Hits of one process, which are those of a full comparison with what the codes stand for, up to rounding."""
    index, hits = open_index(directory, device=CPU), []
    for k in ks:
        found = index.search(queries, k)
        if index.compressed is None:
            assert_same(found, brute_force(embeddings, queries, k))
        else:
            codec, codes = index.compressed.codec, index.compressed.codes()
            if index.type.endswith("fs"):  # their score is that of look-up tables
                searched = codec.filled(codes).search(queries.numpy(), min(k, index.size))
                expected = tuple(map(torch.from_numpy, searched))
            else:
                expected = brute_force(torch.from_numpy(codec.decode(codes)), codec.rotate(queries), k)
            assert_same_but_last(found, expected, by_row=False)
        hits.append((found.scores, found.ids))
    return hits


def assert_same_but_last(found, expected, by_row=True):
    """Scores up to rounding, and ids as far as the score is not the last one's; `by_row`: in the same order."""
    (scores, ids), (expected_scores, expected_ids) = found, expected
    rounding = 1e-5 * expected_scores.abs().amax(1, keepdim=True) if len(ids) else expected_scores
    assert scores.shape == expected_scores.shape and ((scores - expected_scores).abs() <= rounding).all()
    inside = expected_scores > expected_scores[:, -1:] + 2 * rounding
    for row, wanted, among in zip(ids, expected_ids, inside, strict=True):
        assert len(set(row.tolist())) == len(row) and torch.isin(wanted[among], row).all()
        assert not by_row or torch.equal(row[: among.sum()], wanted[among])


@pytest.mark.parametrize("kind", ["pq", "ivfpq", "ivfsq", "SQ8"])
def test_codes_alone_are_enough(tmp_path, kind):
    whole, _, queries = compressed(tmp_path, kind)
    alone, *_ = compressed(tmp_path, kind, codes_only=True, name="alone")
    assert names(whole) == ["codes.1.npy", "embeddings.1.npy", "index.json", "passages.1.jsonl", "trained.1.faiss"]
    assert names(alone) == ["codes.1.npy", "index.json", "passages.1.jsonl", "trained.1.faiss"]
    a, b = open_index(whole, device=CPU), open_index(alone, device=CPU)
    assert a.has_embeddings and not b.has_embeddings
    assert_same(a.search(queries, 9), b.search(queries, 9))
    assert np.array_equal(np.load(alone / "codes.1.npy"), b.compressed.codes())


def test_codes_alone_can_be_saved_again(tmp_path):
    alone, _, queries = compressed(tmp_path, "ivfpq", codes_only=True)
    index = open_index(alone, device=CPU)
    save_index(tmp_path / "again", index)
    assert_same(open_index(tmp_path / "again", device=CPU).search(queries, 9), index.search(queries, 9))
    flat = make_index(open_passages(tmp_path / "corpus.jsonl"), made_up(300, 8, 4)[0])
    with pytest.raises(ValueError, match="--save_index_codes_only: a flat index has no codes"):
        save_index(tmp_path / "flat", flat, codes_only=True)


def test_a_compressed_index_is_opened_by_whoever_asks_for_it_or_for_nothing(tmp_path):
    directory, embeddings, queries = compressed(tmp_path, "ivfpq", codes_only=True)
    expected = open_index(directory, device=CPU).search(queries, 9)
    for compression in (asked("ivfpq"), asked("ivfpq", nlist=17), Compression("IVF17,PQ4")):
        assert_same(open_index(directory, device=CPU, compression=compression).search(queries, 9), expected)
    for compression, wanted in [
        (Compression("ivfpq", 2), "IVF17,PQ2"),
        (asked("ivfpq", nlist=5), "IVF5,PQ4"),
        (asked("pq"), "PQ4"),
        (asked("flat"), "flat"),
    ]:
        with pytest.raises(ValueError, match=f"of type IVF17,PQ4 without embeddings, and {wanted} is asked for"):
            open_index(directory, device=CPU, compression=compression)
    with pytest.raises(ValueError, match="--faiss_code_size 3 does not divide the embedding size 8; try 2 or 4"):
        open_index(directory, device=CPU, compression=Compression("pq", 3))
    with pytest.raises(ValueError, match="embeddings of size 8, the retriever makes them of size 16"):
        open_index(directory, device=CPU, dimension=16)


def test_an_index_with_embeddings_becomes_any_other_kind(tmp_path):
    directory, embeddings, queries = compressed(tmp_path, "ivfpq")
    flat = open_index(directory, device=CPU, compression=asked("flat"))
    assert flat.type == "flat" and isinstance(flat.local, FlatIndex)
    assert_same(flat.search(queries, 9), brute_force(embeddings, queries, 9))
    other = open_index(directory, device=CPU, compression=asked("pq"))
    direct = compress(make_index(open_passages(tmp_path / "corpus.jsonl"), embeddings), asked("pq"))
    assert_same(other.search(queries, 9), direct.search(queries, 9))


def test_a_flat_index_is_compressed_without_a_model(tmp_path, monkeypatch):
    """Embeddings and text are linked where they can be, and the retriever is remembered."""
    flat, embeddings, queries = saved(tmp_path, n=300)
    told = []
    monkeypatch.setattr(
        build, "progress_bar", lambda what, total, unit: told.append((what, total)) or tqdm(disable=True)
    )
    compress_index(flat, tmp_path / "pq", asked("pq"))
    assert (tmp_path / "pq/embeddings.1.npy").samefile(flat / "embeddings.1.npy")
    assert files.read_description(tmp_path / "pq").retriever == "abc"
    assert told == [("gathering a sample", 300), ("encoding", 300)]
    compress_index(flat, tmp_path / "alone", asked("pq"), codes_only=True)
    expected = compress(make_index(open_passages(tmp_path / "corpus.jsonl"), embeddings), asked("pq"))
    for directory in (tmp_path / "pq", tmp_path / "alone"):
        assert_same(open_index(directory, device=CPU).search(queries, 9), expected.search(queries, 9))
    compress_index(flat, flat, asked("pq"))  # in place: what is there already stays
    assert names(flat) == ["codes.2.npy", "embeddings.1.npy", "index.json", "passages.1.jsonl", "trained.2.faiss"]
    assert open_index(flat, device=CPU).type == "PQ4"


def test_embeddings_are_copied_where_links_do_not_work(tmp_path, monkeypatch):
    flat, embeddings, _ = saved(tmp_path)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not here")))
    compress_index(flat, tmp_path / "pq", asked("pq"))
    assert np.array_equal(np.load(tmp_path / "pq/embeddings.1.npy"), embeddings.numpy())


def test_refinement_needs_embeddings(tmp_path):
    alone, *_ = compressed(tmp_path, codes_only=True)
    with pytest.raises(ValueError, match="--refine_factor 4 needs the embeddings, and this index holds codes alone"):
        open_index(alone, device=CPU, compression=Compression(refine_factor=4))


@pytest.mark.parametrize("kind", ["pq", "ivfpq"])
def test_damaged_compressed_files_are_refused_in_one_sentence_or_harmless(tmp_path, kind):
    directory, _, queries = compressed(tmp_path, kind, n=60)
    os.unlink(tmp_path / "corpus.jsonl")
    chance, refused = random.Random(1), 0
    originals = {name: (directory / name).read_bytes() for name in names(directory)}
    for i in range(250):
        name = sorted(originals)[i % len(originals)]
        (directory / name).write_bytes(damaged(originals[name], chance))
        try:
            index = open_index(directory, device=CPU, compression=Compression(refine_factor=2))
            look_up(index.passages, index.search(queries, 60).ids)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(directory) in str(error) or "damaged" in str(error)
        else:
            assert name in ("embeddings.1.npy", "codes.1.npy")  # other numbers are other numbers
        (directory / name).write_bytes(originals[name])
    assert refused > 150


def test_a_damaged_quantizer_never_reaches_faiss(tmp_path, monkeypatch):
    directory, *_ = compressed(tmp_path, n=20)
    trained = directory / "trained.1.faiss"
    content = trained.read_bytes()
    monkeypatch.setattr(Codec, "load", None)
    for other in (content[:-1], content + b"x", content[:100] + bytes([content[100] ^ 1]) + content[101:], b""):
        trained.write_bytes(other)
        with pytest.raises(ValueError, match=r"trained.1.faiss was changed or damaged, its checksum does not fit"):
            open_index(directory, device=CPU)
    trained.unlink()
    with pytest.raises(ValueError, match=r"trained.1.faiss, which index.json names, is missing"):
        open_index(directory, device=CPU)


def test_a_quantizer_of_another_index_is_refused(tmp_path):
    """Even by someone who made the checksums fit."""
    directory, *_ = compressed(tmp_path, n=20)
    other, *_ = compressed(tmp_path, "ivfpq", n=20, name="other")
    content = (other / "trained.1.faiss").read_bytes()
    (directory / "trained.1.faiss").write_bytes(content)
    fields = described(directory)
    fields["quantizer"]["sha256"] = hashlib.sha256(content).hexdigest()
    describe(directory, fields)
    with pytest.raises(
        ValueError, match=r"trained.1.faiss: (it holds .* not an empty trained index|Faiss cannot read it)"
    ):
        open_index(directory, device=CPU)


def _save_compressed_for_ever(directory, corpora, quantizers):
    for turn in range(10**6):
        kind = turn % 2
        flat = make_index(open_passages(corpora[kind]), torch.full((300, 8), float(kind + 1)).half())
        index = compress(flat, Compression("any"), codec=quantizers[kind])
        save_index(directory, index, codes_only=kind == 1)


@pytest.mark.processes
def test_a_killed_writer_of_a_compressed_index_leaves_a_whole_one(tmp_path, monkeypatch):
    """Two of different types, with and without embeddings, are saved in turns; 20 kills."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    corpora = [write_corpus(tmp_path / f"{kind}.jsonl", 300, word) for kind, word in enumerate(("zero", "one"))]
    sample = made_up(300, 8, 0, torch.float32)[0].numpy()
    quantizers = [train("PQ4", sample), train("SQ8", sample)]
    directory, chance, seen = tmp_path / "index", random.Random(0), set()
    save(directory, corpora[0], torch.ones(300, 8).half())
    arguments = (directory, corpora, quantizers)
    for _ in range(20):
        _kill_in_a_save(
            directory, [get_context("fork").Process(target=_save_compressed_for_ever, args=arguments)], chance
        )
        index = open_index(directory, device=CPU)
        kind = {"flat": 0, "PQ4": 0, "SQ8": 1}[index.type]
        assert {p["text"].split()[0] for p in index.passages} == {["zero", "one"][kind]}
        if index.compressed:
            expected, _ = quantizers[kind].encode(torch.full((300, 8), float(kind + 1)).half(), 0)
            assert np.array_equal(index.compressed.codes(), expected)
        assert index.has_embeddings == (kind == 0)
        if index.has_embeddings:
            assert index.embeddings.unique().tolist() == [1.0]
        check_index(directory)
        seen.add(described(directory)["segments"][0]["passages"]["file"])
    assert len(seen) > 10  # the writers did get somewhere
    save_index(directory, open_index(directory, device=CPU))
    description = files.read_description(directory)
    assert set(names(directory)) == description.files() | {"index.json", ".atlas-cache"}
    assert_offsets_are_those_of(directory, description.segments[0].passages.file)
