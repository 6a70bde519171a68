"""Saved indices: any number of ranks writes, any number opens; damage is refused; published ones are converted."""

import hashlib
import json
import logging
import os
import pickle
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.index import files
from atlas.index.build import compress
from atlas.index.codec import Codec, Compression, train
from atlas.index.flat import FlatIndex
from atlas.index.passages import open_passages
from atlas.index.published import convert_published, is_published, load_plain_pickle
from atlas.index.sharded import ShardedIndex, shard_rows
from atlas.index.storage import compress_index, open_index, save_index
from atlas.runtime import distributed
from tests.parity import parity_kit
from tests.patience import free_port
from tests.ranks import rank_environment, run_on_ranks, scratch_directory
from tests.test_flat import assert_same, brute_force, made_up

CPU = torch.device("cpu")


def write_corpus(path, n, word="text"):
    passages = [{"id": f"p{i}", "title": f"T{i}", "section": "S", "text": f"{word} {i} ü", "year": i} for i in range(n)]
    path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in passages), encoding="utf-8")
    return path


def make_index(passages, embeddings):
    rows = shard_rows(len(passages), distributed.rank(), distributed.world_size())
    return ShardedIndex(passages, embeddings[rows.start : rows.stop].clone())


def _save(directory, corpus, embeddings, max_passages=-1):
    save_index(directory, make_index(open_passages(corpus, max_passages), embeddings), retriever_fingerprint="abc")


def _open_and_search(directory, queries, k):
    index = open_index(directory, device=CPU, dimension=queries.shape[1])
    hits = index.search(queries, k)
    rows = (index.rows.start, index.embeddings.clone())
    return hits.scores, hits.ids, index.passages_of(hits.ids), rows


def saved(tmp_path, n=20, dimension=8):
    """A small index on disk: its directory, its embeddings, two queries."""
    embeddings, queries = made_up(n, dimension, 2)
    _save(tmp_path / "index", write_corpus(tmp_path / "corpus.jsonl", n), embeddings)
    return tmp_path / "index", embeddings, queries


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.processes
@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 200, 1000])
def test_any_number_of_ranks_saves_and_any_number_opens(writers, n):
    directory = Path(scratch_directory())
    embeddings, queries = made_up(n, 8, 3)
    corpus = write_corpus(directory / "corpus.jsonl", n)
    run_on_ranks(writers, _save, directory / "index", corpus, embeddings)
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
    assert np.array_equal(np.load(directory / "embeddings.1.npy"), embeddings.numpy())


def test_writing_into_opened_embeddings_does_not_change_the_file(tmp_path):
    directory, embeddings, queries = saved(tmp_path)
    index = open_index(directory, device=CPU)
    index.embeddings[:] = 1.0  # a refresh
    again = ShardedIndex(index.passages, index.embeddings)
    assert again.search(queries, 2).ids.tolist() == [[0, 1], [0, 1]]
    assert torch.equal(open_index(directory, device=CPU).embeddings, embeddings)


def test_embeddings_of_another_type_are_saved_in_fp16(tmp_path):
    embeddings, _ = made_up(5, 4, 0, torch.float32)
    _save(tmp_path / "index", write_corpus(tmp_path / "corpus.jsonl", 5), embeddings)
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, embeddings.half())
    with pytest.raises(ValueError, match="passage 3 is not finite"):
        _save(tmp_path / "index", tmp_path / "corpus.jsonl", embeddings.clone().index_fill_(0, torch.tensor([3]), 1e6))
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, embeddings.half())


def test_one_whole_corpus_is_linked_and_survives_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    corpus = write_corpus(tmp_path / "corpus.jsonl", 6)
    content = corpus.read_bytes()
    embeddings, _ = made_up(6, 4, 0)
    for generation in (1, 2, 3):
        _save(tmp_path / "index", corpus, embeddings)
        assert (tmp_path / "index" / f"passages.{generation}.jsonl").samefile(corpus)
    assert corpus.read_bytes() == content
    assert names(tmp_path / "index") == [
        "embeddings.3.npy",
        "index.json",
        "passages.3.jsonl",
        "passages.3.jsonl.offsets.npy",
    ]


def test_a_symbolic_link_to_a_corpus_is_followed(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 6)
    (tmp_path / "link.jsonl").symlink_to(corpus)
    _save(tmp_path / "index", tmp_path / "link.jsonl", made_up(6, 4, 0)[0])
    kept = tmp_path / "index" / "passages.1.jsonl"
    assert kept.samefile(corpus) and not kept.is_symlink()


@pytest.mark.parametrize("how", ["two files", "cut", "no links"])
def test_any_other_corpus_is_copied(tmp_path, monkeypatch, how):
    first = write_corpus(tmp_path / "a.jsonl", 4)
    second = write_corpus(tmp_path / "b.jsonl", 3, word="other")
    second.write_bytes(second.read_bytes().replace(b"\n", b"\n\n").rstrip())  # blank lines, none at the end
    paths, most = {"two files": ([first, second], -1), "cut": ([first], 2), "no links": ([first], -1)}[how]
    if how == "no links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not here")))
    corpus = open_passages(paths, most)
    _save(tmp_path / "index", paths, made_up(len(corpus), 4, 0)[0], most)
    index = open_index(tmp_path / "index", device=CPU)
    assert not (tmp_path / "index" / "passages.1.jsonl").samefile(first)
    assert list(index.passages) == list(corpus)


@pytest.mark.parametrize("how", ["two files", "cut", "no links", "tsv"])
def test_text_is_copied_once(tmp_path, monkeypatch, how):
    """Whatever is saved again is saved with the copy that is there, as long as that and the corpus are the same."""
    paths, most = [write_corpus(tmp_path / "a.jsonl", 6)], -1
    if how == "two files":
        paths.append(write_corpus(tmp_path / "b.jsonl", 3, word="other"))
    elif how == "cut":
        most = 5
    elif how == "tsv":
        paths = [tmp_path / "a.tsv"]
        paths[0].write_text("id\ttext\ttitle\n" + "".join(f"{i}\ttext {i}\tT\n" for i in range(6)))
    else:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not here")))

    def save(value):
        corpus = open_passages(paths, most)
        _save(tmp_path / "index", paths, torch.full((len(corpus), 4), float(value)).half(), most)
        index = open_index(tmp_path / "index", device=CPU)
        assert list(index.passages) == list(corpus) and index.embeddings.unique().tolist() == [value]
        return files.read_description(tmp_path / "index").passages

    assert [save(value) for value in (1, 2, 3)] == ["passages.1.jsonl"] * 3
    assert names(tmp_path / "index") == ["embeddings.3.npy", "index.json", "passages.1.jsonl"]
    os.truncate(tmp_path / "index/passages.1.jsonl", 10)
    assert save(4) == "passages.4.jsonl"
    paths[0].write_bytes(paths[0].read_bytes().replace(b"text 2", b"next 2"))
    assert save(5) == "passages.5.jsonl"
    if how != "cut":
        return
    most = 4
    assert save(6) == "passages.6.jsonl"


def test_saving_an_opened_index_into_its_own_directory(tmp_path, monkeypatch):
    """What a refresh with the same --load_index_path and --save_index_path does: text stays, embeddings change."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    directory, embeddings, _ = saved(tmp_path)
    index = open_index(directory, device=CPU)
    text = (directory / "passages.1.jsonl").stat()
    index.embeddings.mul_(2)
    save_index(directory, ShardedIndex(index.passages, index.embeddings), retriever_fingerprint="def")
    assert names(directory) == ["embeddings.2.npy", "index.json", "passages.1.jsonl", "passages.1.jsonl.offsets.npy"]
    assert (directory / "passages.1.jsonl").stat() == text
    again = open_index(directory, device=CPU)
    assert torch.equal(again.embeddings, 2 * embeddings)
    assert again.passages[3]["title"] == "T3: S"  # still joined once


def test_another_retriever_is_warned_of_with_both_names(tmp_path, caplog, monkeypatch):
    directory, *_ = saved(tmp_path)
    monkeypatch.setattr(logging.getLogger("atlas"), "propagate", True)
    open_index(directory, device=CPU, retriever_fingerprint="abc")
    assert not caplog.records
    open_index(directory, device=CPU, retriever_fingerprint="xyz")
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "abc" in caplog.text and "xyz" in caplog.text


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
    corpus = tmp_path / "corpus.jsonl"  # the same file as in the index
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
    with pytest.raises(ValueError, match=r"embeddings.1.npy is 446 bytes long, 20 x 8 fp16 numbers take 448"):
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


def damaged(content, chance):
    """The content with a few bits flipped, bytes overwritten, or an end cut off."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)


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
            index.passages_of(index.search(queries, 20).ids)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert name == "embeddings.1.npy"  # another number is another number; text and description never pass
        (directory / name).write_bytes(originals[name])
    assert refused > 250


def test_damaged_offsets_of_lines_are_found_again_or_refused_or_harmless(tmp_path, monkeypatch):
    """The file that says where the lines of a large text are: 250 times no other text is taken for a passage."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    directory, _, queries = saved(tmp_path)
    os.unlink(tmp_path / "corpus.jsonl")
    expected = list(open_index(directory, device=CPU).passages)
    offsets, chance, refused = directory / "passages.1.jsonl.offsets.npy", random.Random(2), 0
    content = offsets.read_bytes()
    for _ in range(250):
        offsets.write_bytes(damaged(content, chance))
        try:
            index = open_index(directory, device=CPU)
            ids = index.search(queries, 20).ids
            assert index.passages_of(ids) == [[expected[i] for i in row] for row in ids.tolist()]
        except ValueError as error:
            refused += 1
            assert str(error) == f"{offsets} is damaged: remove it, and it will be made again"
    assert 0 < refused < 250


@pytest.mark.parametrize("at", range(0, 128, 3))
def test_every_byte_of_the_array_header_is_checked(tmp_path, at):
    directory, *_ = saved(tmp_path, n=3, dimension=2)
    array = directory / "embeddings.1.npy"
    content = bytearray(array.read_bytes())
    content[at] ^= 1
    array.write_bytes(content)
    with pytest.raises(ValueError, match="does not begin as an array of 3 x 2 fp16 numbers"):
        open_index(directory, device=CPU)


def test_edited_descriptions_are_refused(tmp_path):
    directory, *_ = saved(tmp_path)
    path = directory / "index.json"
    fields = json.loads(path.read_text())
    for change, message in [
        ({"size": 19}, "edited or damaged"),
        ({"checksum": "0"}, "edited or damaged"),
        ({"version": 2}, "format version 2, this program reads 1"),
        ({"embeddings": "../embeddings.1.npy"}, "files that do not belong"),
    ]:
        edited = fields | change
        if "embeddings" in change:  # by someone who knows how
            edited["checksum"] = files._checksum({k: v for k, v in edited.items() if k not in ("version", "checksum")})
        path.write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=message):
            open_index(directory, device=CPU)
    for content in ("", "[]", "{}", "null", '{"version": 1', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match="index.json is damaged"):
            open_index(directory, device=CPU)


def _save_for_ever(directory, corpora):
    for turn in range(10**6):
        kind = turn % 2
        save_index(directory, make_index(open_passages(corpora[kind]), torch.full((300, 64), float(kind)).half()))


@pytest.mark.processes
def test_a_writer_killed_at_any_moment_leaves_a_whole_index(tmp_path, monkeypatch):
    """Two indices are saved in turns; after each of 20 kills the directory holds one of them, never a mixture."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    corpora = [write_corpus(tmp_path / f"{kind}.jsonl", 300, word) for kind, word in enumerate(("zero", "one"))]
    directory, chance, seen = tmp_path / "index", random.Random(0), set()
    _save(directory, corpora[0], torch.zeros(300, 64).half())
    for _ in range(20):
        writer = get_context("fork").Process(target=_save_for_ever, args=(directory, corpora))
        writer.start()
        time.sleep(chance.uniform(0.02, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        index = open_index(directory, device=CPU)
        (kind,) = index.embeddings.unique().tolist()
        assert {p["text"].split()[0] for p in index.passages} == {["zero", "one"][int(kind)]}
        seen.add(int(json.loads((directory / "index.json").read_text())["embeddings"].split(".")[1]))
    assert len(seen) > 5  # the writers did get somewhere
    _save(directory, corpora[0], torch.zeros(300, 64).half())
    assert len(names(directory)) == 4  # what the killed ones left is gone


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
    _save(directory, corpora[0], torch.zeros(300, 64).half())
    for _ in range(20):
        port = free_port()
        arguments = [(rank, port, directory, corpora) for rank in (0, 1)]
        writers = [get_context("fork").Process(target=_save_for_ever_as_rank, args=a) for a in arguments]
        for writer in writers:
            writer.start()
        time.sleep(chance.uniform(0.5, 2))
        for writer in chance.sample(writers, 2):
            os.kill(writer.pid, signal.SIGKILL)
            time.sleep(chance.uniform(0, 0.1))
        for writer in writers:
            writer.join()
        index = open_index(directory, device=CPU)
        (kind,) = index.embeddings.unique().tolist()
        assert {p["text"].split()[0] for p in index.passages} == {["zero", "one"][int(kind)]}
        seen.add(json.loads((directory / "index.json").read_text())["embeddings"])
    assert len(seen) > 5  # the writers did get somewhere


# Compressed indices

KINDS = {"pq": 4, "ivfpq": 4, "ivfsq": None, "ivfflat": None, "flat": None, "OPQ3_6,PQ3": None, "SQ8": None}


def asked(kind, **settings):
    return Compression(kind, code_size=KINDS.get(kind), **settings)


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
    [(n, QUICK) for n in (1, 2, 7, 200, 1000)]
    + [(200, ["OPQ3_6,PQ3"])]
    + [pytest.param(n, OTHERS, marks=pytest.mark.slow) for n in (1, 2, 7, 200, 1000)],
)
def test_compressed_indices_are_the_same_at_every_number_of_ranks(n, kinds):
    """Trained, encoded and saved by any number of ranks, opened by any other: the same files, ids and scores."""
    directory = Path(scratch_directory())
    embeddings, queries = made_up(n, 8, 7)
    embeddings[n // 2 :] = embeddings[: n - n // 2].clone()  # ties
    corpus = write_corpus(directory / "corpus.jsonl", n)
    ks = (1, 5, n + 3)
    expected, content = [], {}
    for writers in (1, 2, 3):
        run_on_ranks(writers, _compress_and_save, directory / str(writers), corpus, embeddings, kinds)
        for kind in kinds:
            for name in {"codes.1.npy", "trained.1.faiss", "embeddings.1.npy"} & set(
                names(directory / str(writers) / kind)
            ):
                found = (directory / str(writers) / kind / name).read_bytes()
                assert content.setdefault((kind, name), found) == found
        for kind in () if expected else kinds:
            index = open_index(directory / str(writers) / kind, device=CPU)
            decoded, rotated = embeddings, queries
            if index.compressed:
                decoded = torch.from_numpy(index.compressed.quantizer.decode(index.compressed.codes()))
                rotated = index.compressed.quantizer.rotate(queries)
            expected.append([brute_force(decoded, rotated, k) for k in ks])
        for readers in (1, 2, 3):
            answers = run_on_ranks(readers, _open_and_search_each, directory / str(writers), queries, ks, kinds)
            for rank, of_rank in enumerate(answers):
                for hits, wanted in zip(of_rank, expected, strict=True):
                    for found, (scores, ids) in zip(hits, wanted, strict=True):
                        assert_same(found, (scores[rank::readers], ids[rank::readers]))


def compressed(tmp_path, kind="pq", n=300, codes_only=False, name="compressed"):
    embeddings, queries = made_up(n, 8, 4)
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, n)
    index = compress(make_index(open_passages(corpus), embeddings), asked(kind))
    save_index(tmp_path / name, index, retriever_fingerprint="abc", codes_only=codes_only)
    return tmp_path / name, embeddings, queries


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


def test_a_flat_index_is_compressed_without_a_model(tmp_path):
    """Embeddings and text are linked where they can be, and the retriever is remembered."""
    flat, embeddings, queries = saved(tmp_path, n=300)
    told = []
    compress_index(flat, tmp_path / "pq", asked("pq"), progress=lambda *words: told.append(words))
    assert (tmp_path / "pq/embeddings.1.npy").samefile(flat / "embeddings.1.npy")
    assert files.read_description(tmp_path / "pq").retriever == "abc"
    assert told[-1] == ("encoding", 300, 300) and {what for what, *_ in told} >= {"gathering a sample", "encoding"}
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


def test_writing_into_opened_codes_does_not_change_the_file(tmp_path):
    directory, _, queries = compressed(tmp_path, codes_only=True)
    before = open_index(directory, device=CPU).search(queries, 9)
    open_index(directory, device=CPU).compressed.codes()[:] = 0
    assert_same(open_index(directory, device=CPU).search(queries, 9), before)


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
            index.passages_of(index.search(queries, 60).ids)
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
    fields = json.loads((directory / "index.json").read_text())
    fields["compressed"]["trained_checksum"] = hashlib.sha256(content).hexdigest()
    fields["checksum"] = files._checksum({k: v for k, v in fields.items() if k not in ("version", "checksum")})
    (directory / "index.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"trained.1.faiss: it holds .* not an empty trained index"):
        open_index(directory, device=CPU)


def _save_compressed_for_ever(directory, corpora, quantizers):
    for turn in range(10**6):
        kind = turn % 2
        flat = make_index(open_passages(corpora[kind]), torch.full((300, 8), float(kind + 1)).half())
        index = compress(flat, Compression("any"), quantizer=quantizers[kind])
        save_index(directory, index, codes_only=kind == 1)


@pytest.mark.processes
def test_a_killed_writer_of_a_compressed_index_leaves_a_whole_one(tmp_path, monkeypatch):
    """Two of different types, with and without embeddings, are saved in turns; 20 kills."""
    monkeypatch.setattr("atlas.files.jsonl.CACHE_FROM", 0)
    corpora = [write_corpus(tmp_path / f"{kind}.jsonl", 300, word) for kind, word in enumerate(("zero", "one"))]
    sample = made_up(300, 8, 0, torch.float32)[0].numpy()
    quantizers = [train("PQ4", sample), train("SQ8", sample)]
    directory, chance, seen = tmp_path / "index", random.Random(0), set()
    _save(directory, corpora[0], torch.ones(300, 8).half())
    for _ in range(20):
        writer = get_context("fork").Process(target=_save_compressed_for_ever, args=(directory, corpora, quantizers))
        writer.start()
        time.sleep(chance.uniform(0.02, 0.2))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        index = open_index(directory, device=CPU)
        kind = {"flat": 0, "PQ4": 0, "SQ8": 1}[index.type]
        assert {p["text"].split()[0] for p in index.passages} == {["zero", "one"][kind]}
        if index.compressed:
            expected, _ = quantizers[kind].encode(torch.full((300, 8), float(kind + 1)).half(), 0)
            assert np.array_equal(index.compressed.codes(), expected)
        assert index.has_embeddings == (kind == 0)
        if index.has_embeddings:
            assert index.embeddings.unique().tolist() == [1.0]
        seen.add(json.loads((directory / "index.json").read_text())["passages"])
    assert len(seen) > 5  # the writers did get somewhere
    save_index(directory, open_index(directory, device=CPU))
    assert set(names(directory)) == files.read_description(directory).files() | {"index.json"}


def test_a_published_index_is_compressed_as_it_is_opened(tmp_path):
    embeddings, passages = publish(tmp_path / "published", sizes=(30, 11, 40))
    queries = made_up(1, 6, 3)[1]
    opened = {"device": CPU, "converted": tmp_path / "ours", "compression": Compression("pq", 3)}
    index = open_index(tmp_path / "published", **opened)
    save_index(tmp_path / "pq", index, codes_only=True)
    expected = index.search(queries, 5)
    assert index.type == "PQ3" and list(index.passages) == passages
    assert_same(open_index(tmp_path / "pq", device=CPU).search(queries, 5), expected)
    assert list(open_index(tmp_path / "pq", device=CPU).passages) == passages


# Published indices


def publish(directory, sizes=(3, 1, 4), dimension=6, first=0):
    """Files as the published system writes them; the embeddings (N, D) and the passages."""
    directory.mkdir(exist_ok=True)
    embeddings, _ = made_up(sum(sizes), dimension, 0)
    passages = [
        {"id": f"p{i}", "title": f"T{i}: S", "section": "S", "text": f"text {i} ü", "n": [i, 0.5, None, True]}
        for i in range(sum(sizes))
    ]
    start = 0
    for number, size in enumerate(sizes, start=first):
        rows = slice(start, start + size)
        torch.save(embeddings[rows].T.contiguous(), directory / f"embeddings.{number}.pt")
        with open(directory / f"passages.{number}.pt", "wb") as file:
            pickle.dump(passages[rows], file, protocol=5)
        start += size
    return embeddings, passages


def test_a_published_index_is_converted(tmp_path):
    embeddings, passages = publish(tmp_path / "published")
    assert is_published(tmp_path / "published") and not is_published(tmp_path)
    calls = []
    convert_published(tmp_path / "published", tmp_path / "ours", lambda done, of: calls.append((done, of)))
    index = open_index(tmp_path / "ours", device=CPU, dimension=6)
    assert torch.equal(index.embeddings, embeddings)
    assert list(index.passages) == passages  # the title is not joined again
    assert calls[-1] == (8, 8) and calls == sorted(calls)


def _open_published(directory, converted, queries):
    index = open_index(directory, device=CPU, converted=converted)
    hits = index.search(queries, 3)
    return hits.scores, hits.ids, [p["id"] for p in index.passages_of(hits.ids)[0]]


@pytest.mark.processes
def test_a_published_index_is_opened_through_one_conversion():
    scratch = Path(scratch_directory())
    embeddings, _ = publish(scratch / "published")
    _, queries = made_up(1, 6, 2)
    expected = brute_force(embeddings, queries, 3)
    arguments = (scratch / "published", scratch / "ours", queries)
    for scores, ids, found in run_on_ranks(2, _open_published, *arguments):
        assert_same((scores, ids), expected)
        assert found == [f"p{i}" for i in ids[0].tolist()]
    written = (scratch / "ours" / "index.json").stat().st_mtime_ns
    run_on_ranks(2, _open_published, *arguments)
    assert (scratch / "ours" / "index.json").stat().st_mtime_ns == written
    publish(scratch / "published", sizes=(5, 5))  # passages.2.pt stays: 5 + 5 + 4
    _open_published(*arguments)
    assert open_index(scratch / "ours", device=CPU).size == 14


def test_opening_a_published_index_needs_a_place_and_respects_what_is_there(tmp_path):
    publish(tmp_path / "published")
    with pytest.raises(ValueError, match="is a published index: convert it"):
        open_index(tmp_path / "published", device=CPU)
    ours, *_ = saved(tmp_path)
    with pytest.raises(ValueError, match="holds another index"):
        open_index(tmp_path / "published", device=CPU, converted=ours)


def test_a_converted_index_is_saved_again_with_its_titles(tmp_path):
    _, passages = publish(tmp_path / "published")
    convert_published(tmp_path / "published", tmp_path / "ours")
    save_index(tmp_path / "again", open_index(tmp_path / "ours", device=CPU))
    assert list(open_index(tmp_path / "again", device=CPU).passages) == passages


class RunsSomething:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["passages.1.pt", "embeddings.1.pt"])
def test_a_pickle_that_holds_a_callable_is_refused_and_does_not_run(tmp_path, name):
    publish(tmp_path / "published")
    victim = tmp_path / "victim"
    with open(tmp_path / "published" / name, "wb") as file:
        pickle.dump([RunsSomething(victim)], file, protocol=2)
    with pytest.raises(ValueError, match=name) as refused:
        convert_published(tmp_path / "published", tmp_path / "ours")
    assert not victim.exists() and not files.has_index(tmp_path / "ours")
    assert "\n" not in str(refused.value)
    if name.startswith("passages"):
        assert "it holds __builtin__.getattr" in str(refused.value)


@pytest.mark.parametrize("held", [os.system, Path("x"), torch.zeros(1), RuntimeError, np.float64(1), 1j, object()])
def test_every_class_and_function_is_refused_by_name(tmp_path, held):
    for protocol in range(6):
        (tmp_path / "file").write_bytes(pickle.dumps([held], protocol=protocol))
        with pytest.raises(ValueError, match=r"it holds \w+\.\w+"):
            load_plain_pickle(tmp_path / "file")


def test_plain_data_is_read_whatever_the_protocol(tmp_path):
    plain = [{"a": (1, 2.5, None), "b": [True, b"x", "ü"]}]
    for protocol in range(3, 6):
        (tmp_path / "file").write_bytes(pickle.dumps(plain, protocol=protocol))
        assert load_plain_pickle(tmp_path / "file") == plain


def test_damaged_pickles_are_refused_in_one_sentence(tmp_path):
    chance = random.Random(0)
    content = pickle.dumps(publish(tmp_path / "published")[1], protocol=5)
    for _ in range(300):
        (tmp_path / "file").write_bytes(damaged(content, chance)[:-1])
        with pytest.raises(ValueError, match="cannot be read as plain passages") as refused:
            load_plain_pickle(tmp_path / "file")
        assert "\n" not in str(refused.value)


def spoil(directory, how):
    """Damage a published index in one way; what the refusal must say."""
    if how == "hole":
        (directory / "embeddings.1.pt").unlink()
        return r"embeddings\.1\.pt is missing: .* from 0 to 2"
    if how == "no passages":
        (directory / "passages.2.pt").unlink()
        return r"passages\.2\.pt is missing"
    if how == "length":
        (directory / "passages.1.pt").write_bytes(pickle.dumps([]))
        return r"passages\.1\.pt holds 0 passages, its embeddings are 1"
    if how == "not a list":
        (directory / "passages.1.pt").write_bytes(pickle.dumps({}))
        return r"passages\.1\.pt holds a dict"
    if how == "dimension":
        torch.save(torch.zeros(5, 1).half(), directory / "embeddings.1.pt")
        return r"embeddings\.1\.pt holds embeddings of size 5, embeddings\.0\.pt of size 6"
    if how == "not a tensor":
        torch.save({"a": torch.zeros(2)}, directory / "embeddings.1.pt")
        return r"embeddings\.1\.pt holds a dict, not a tensor"
    if how == "shape":
        torch.save(torch.zeros(6).half(), directory / "embeddings.1.pt")
        return r"embeddings\.1\.pt holds a tensor \(6,\)"
    if how == "not finite":
        torch.save(torch.full((6, 1), torch.inf).half(), directory / "embeddings.1.pt")
        return r"embeddings\.1\.pt: the embedding of passage 3 is not finite"
    passage = {
        "no text": {"id": "x"},
        "bytes": {"id": "x", "text": "", "extra": b"x"},
        "set": {"id": "x", "text": "", "extra": {1}},
        "surrogate": {"id": "x", "text": "\ud800"},
        "not a dict": "x",
    }[how]
    (directory / "passages.1.pt").write_bytes(pickle.dumps([passage], protocol=5))
    return r"passages\.1\.pt, passage 0: "


@pytest.mark.parametrize(
    "how",
    ["hole", "no passages", "length", "not a list", "dimension", "not a tensor", "shape", "not finite"]
    + ["no text", "bytes", "set", "surrogate", "not a dict"],
)
def test_bad_published_indices_are_refused_by_file(tmp_path, how):
    publish(tmp_path / "published")
    message = spoil(tmp_path / "published", how)
    with pytest.raises(ValueError, match=message):
        convert_published(tmp_path / "published", tmp_path / "ours")
    assert not files.has_index(tmp_path / "ours")


def test_numbers_must_start_at_0(tmp_path):
    publish(tmp_path / "published", first=1)
    with pytest.raises(ValueError, match=r"embeddings\.0\.pt is missing"):
        convert_published(tmp_path / "published", tmp_path / "ours")


def test_embeddings_saved_in_the_old_container_or_as_a_view(tmp_path):
    embeddings, _ = publish(tmp_path / "published", sizes=(3, 5))
    columns = embeddings.T.contiguous()
    torch.save(columns[:, :3].clone(), tmp_path / "published/embeddings.0.pt", _use_new_zipfile_serialization=False)
    torch.save(columns[:, 3:], tmp_path / "published/embeddings.1.pt")
    convert_published(tmp_path / "published", tmp_path / "ours")
    assert torch.equal(open_index(tmp_path / "ours", device=CPU).embeddings, embeddings)


def test_an_index_saved_by_the_published_system(tmp_path):
    published = parity_kit() / "published_index"
    convert_published(published, tmp_path / "ours")
    index = open_index(tmp_path / "ours", device=CPU, dimension=768)
    shards = [torch.load(published / f"embeddings.{i}.pt", weights_only=True) for i in range(4)]
    assert torch.equal(index.embeddings, torch.cat(shards, dim=1).T)
    assert list(index.passages) == [p for i in range(4) for p in load_plain_pickle(published / f"passages.{i}.pt")]
    assert index.size == 406
    hits = index.search(index.embeddings[:5].float(), 10)
    assert_same(hits, brute_force(index.embeddings, index.embeddings[:5].float(), 10))
    assert isinstance(index.local, FlatIndex)
