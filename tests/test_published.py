"""Published indices: recognised, converted into ours once, and nothing in them can run."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.index.codec import Compression
from atlas.index.directory import has_index
from atlas.index.flat import FlatIndex
from atlas.index.published import convert_published, is_published, load_plain_pickle
from atlas.index.sharded import look_up
from atlas.index.store import open_index, save_index
from tests.indices import CPU, RunsSomething, damaged, publish, saved
from tests.parity import parity_kit
from tests.ranks import run_on_ranks, scratch_directory
from tests.test_flat import assert_same, brute_force, made_up


def test_a_published_index_is_converted(tmp_path):
    embeddings, passages = publish(tmp_path / "published")
    assert is_published(tmp_path / "published") and not is_published(tmp_path)
    convert_published(tmp_path / "published", tmp_path / "ours")
    index = open_index(tmp_path / "ours", device=CPU, dimension=6)
    assert torch.equal(index.embeddings, embeddings)
    assert list(index.passages) == passages  # the title is not joined again


def _open_published(directory, converted, queries):
    index = open_index(directory, device=CPU, converted=converted)
    hits = index.search(queries, 3)
    return hits.scores, hits.ids, [p["id"] for p in look_up(index.passages, hits.ids)[0]]


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


@pytest.mark.parametrize("name", ["passages.1.pt", "embeddings.1.pt"])
def test_a_pickle_that_holds_a_callable_is_refused_and_does_not_run(tmp_path, name):
    publish(tmp_path / "published")
    victim = tmp_path / "victim"
    with open(tmp_path / "published" / name, "wb") as file:
        pickle.dump([RunsSomething(victim)], file, protocol=2)
    with pytest.raises(ValueError, match=name) as refused:
        convert_published(tmp_path / "published", tmp_path / "ours")
    assert not victim.exists() and not has_index(tmp_path / "ours")
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
    assert not has_index(tmp_path / "ours")


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
