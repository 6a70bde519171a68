"""Files that were damaged, or made to do damage: loading succeeds, or is one sentence about them."""

import copy
import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.checkpoint import PUBLISHED_FILE, load_checkpoint
from atlas.embedding import CorpusEmbedder
from atlas.index.codec import Codec, Compression, faiss, make_empty, train
from atlas.index.convert import check_index
from atlas.index.store import open_index
from atlas.model.reader import load_reader
from atlas.model.retriever import load_retriever
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer
from tests.indices import CPU, VERSION_1, compressed, contents, damaged, describe, described, saved
from tests.kit import run, world
from tests.patience import HANG_SECONDS
from tests.ranks import warm
from tests.test_checkpoint import published

DEEP = json.loads("[" * 900 + "]" * 900)
ODD = (None, True, -1, 0, 10**18, 10**400, 1.5, float("inf"), float("nan"), "", "\ud800", "../../x", [], {}, [[]], DEEP)
MOST_MEMORY = 2**31  # bytes more than before; what is read here takes a few thousand
FEW, MANY = 60, 500


def places(value, path=()):
    """Where in a value of JSON something can be replaced."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, by):
    if not path:
        return by
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = by
    return value


def mutations(file, n, write=None):
    """Change a file of JSON in n ways, the same every time; `write` writes what is valid JSON."""
    chance, whole = random.Random(file.name), file.read_bytes()
    value = json.loads(whole)
    everywhere = list(places(value))
    for number in range(n):
        if number % 3 == 0:
            file.write_bytes(damaged(whole, chance))
            yield number, "bytes"
        else:
            place, odd = chance.choice(everywhere), chance.choice(ODD)
            changed = replaced(value, place, odd)
            if write and isinstance(changed, dict):
                write(changed)
            else:
                file.write_text(json.dumps(changed))
            yield number, f"{place} = {odd!r:.40}"
    file.write_bytes(b'{"a": ' * 10**5)
    yield n, "a nest without an end"
    file.write_bytes(whole)


def succeeds_or_says(what, name, load):
    """Load; an error must be one line that names the file or its directory."""
    try:
        load()
    except (ValueError, OSError) as error:
        said = str(error)
        assert said and "\n" not in said and str(name) in said and len(said) < 2000, f"{what}: {said!r}"
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error


def sizes(*files):
    """The number of mutations of each file: few, and many among the slow tests."""
    return [
        pytest.param(file, n, marks=[pytest.mark.slow] if n == MANY else [], id=f"{file}-{n}")
        for n in (FEW, MANY)
        for file in files
    ]


@pytest.mark.parametrize(("kind", "n"), sizes("flat", "pq", "codes alone", "version 1"))
def test_index_json(tmp_path, kind, n):
    """Also under a checksum that fits."""
    if kind == "version 1":
        directory = shutil.copytree(VERSION_1, tmp_path / "index")
    elif kind == "flat":
        directory, *_ = saved(tmp_path)
    else:
        directory, *_ = compressed(tmp_path, codes_only=kind == "codes alone")
    version = described(directory)["version"]

    def load():
        open_index(directory, device=CPU, compression=Compression())
        check_index(directory)

    load()
    for number, what in mutations(directory / "index.json", n, lambda fields: describe(directory, fields, version)):
        succeeds_or_says(f"{number}: {what}", directory, load)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    flags = {"total_steps": 1, "eval_data": None, "train_retriever": True}
    return run(tmp_path_factory.mktemp("run"), **flags) / "checkpoint/step-1"


@pytest.mark.parametrize(("name", "n"), sizes("state.json", "options.json", "retriever_config.json"))
def test_a_checkpoint(checkpoint, tmp_path, name, n):
    directory = shutil.copytree(checkpoint, tmp_path / "step-1")

    def load():
        loaded = load_checkpoint(directory)
        if name == "retriever_config.json":
            path = str(world() / "models/retriever")
            try:
                load_retriever(path, query_side=False, dropout=None, weights=False, overrides=loaded.retriever_config)
            except OSError as error:
                raise OSError(f"{directory}: {error}") from error

    load()
    for number, what in mutations(directory / name, n):
        succeeds_or_says(f"{number}: {what}", directory, load)


@pytest.mark.parametrize(("name", "n"), sizes("model.safetensors", "optimizer.safetensors"))
def test_safetensors(checkpoint, tmp_path, name, n):
    directory, chance = shutil.copytree(checkpoint, tmp_path / "step-1"), random.Random(name)
    whole = (directory / name).read_bytes()
    for number in range(n // 2):
        head = damaged(whole[:2000], chance)
        (directory / name).write_bytes(head + whole[2000:] if len(head) == 2000 else head)
        succeeds_or_says(number, directory, lambda: load_checkpoint(directory).optimizer_state())


@pytest.mark.parametrize(("name", "n"), sizes(PUBLISHED_FILE))
def test_a_published_checkpoint(tmp_path, name, n):
    directory, chance = published(tmp_path / "published", {"reader.a": torch.ones(3, 2)}), random.Random(name)
    whole = (directory / name).read_bytes()
    for number in range(n):
        (directory / name).write_bytes(damaged(whole, chance))
        succeeds_or_says(number, directory, lambda: load_checkpoint(directory))
    for odd in ({1: torch.ones(1)}, {"reader.a": 1}, [], None, "x"):
        published(directory, odd)
        succeeds_or_says(repr(odd), directory, lambda: load_checkpoint(directory))
    torch.save([1, 2], directory / name)
    succeeds_or_says("a list", directory, lambda: load_checkpoint(directory))


MODEL_FILES = {
    "reader/config.json": lambda path: load_reader(path, dropout=None),
    "reader/tokenizer.json": load_reader_tokenizer,
    "retriever/config.json": lambda path: load_retriever(path, query_side=False, dropout=None),
    "retriever/tokenizer_config.json": load_retriever_tokenizer,
    "retriever/tokenizer.json": load_retriever_tokenizer,
}


@pytest.mark.parametrize(("name", "n"), sizes(*MODEL_FILES))
def test_the_files_of_a_model(tmp_path, name, n):
    directory = shutil.copytree(world() / "models" / name.split("/")[0], tmp_path / "model")
    for number, what in mutations(directory / name.split("/")[1], n // 3):
        succeeds_or_says(f"{number}: {what}", directory, lambda: MODEL_FILES[name](str(directory)))


def hostile(content, n, seed):
    """A quantizer whose bytes say other numbers, or end early."""
    chance = random.Random(seed)
    for _ in range(n):
        changed, place = bytearray(content), chance.randrange(min(len(content), 400))
        number = chance.choice([0, 1, 255, 2**31 - 1, 2**31, 2**40 - 1, 10**9, 2**63, 2**64 - 1, 10**6])
        width = chance.choice([1, 4, 8])
        changed[place : place + width] = (number % 256**width).to_bytes(width, "little")
        yield bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.2 else changed)


def _load_hostile(path, factory, n, seed):
    """In a process that may die of it: the sentence of every refusal goes to a file, line by line."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY,) * 2)
    sample = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    content, said = train(factory, sample).serialize(), []
    for changed in hostile(content, n, seed):
        try:
            Codec.load(changed, factory, 8).encode(torch.from_numpy(sample[:3]), 0)
            said.append("fits")
        except ValueError as error:
            said.append(str(error))
    path.write_text("\n".join(said))


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(faiss, "set_deserialization_vector_byte_limit"), reason="this Faiss knows no limits")
@pytest.mark.parametrize(
    ("factory", "n"),
    sizes("OPQ2_4,PQ2", "IVF4,PQ4", "IVF4,Flat", "SQ8", "PCA4,IVF4,SQ4", "L2norm,PQ4x4fs", "RR8,IVF4,RaBitQ"),
)
def test_a_quantizer_of_hostile_bytes_neither_crashes_nor_takes_all_memory(tmp_path, factory, n):
    process = warm.Process(target=_load_hostile, args=(tmp_path / "said", factory, n, 0))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text().split("\n")
    assert len(said) == n and {"fits"} < set(said)


@pytest.mark.parametrize(
    ("factory", "dimension", "said"),
    [
        ("PCA512,PQ4", 256, "PCA cannot make 512 numbers of 256: ask for at most 256"),
        ("ITQ32,SQ8", 16, "PCA cannot make 32 numbers of 16"),
        ("PCA8,PCAR12,SQ8", 16, "PCA cannot make 12 numbers of 8"),
        ("IVF0,PQ4", 16, "IVF0 is not a number from 1 to 4194304"),
        ("PCA0,SQ8", 16, "PCA0 is not a number from 1 to 65536"),
        ("OPQ4_0,PQ4", 16, "0 is not a number from 1 to"),
        ("IVF1000000000,SQ8", 16, "IVF1000000000 is not a number from 1 to 4194304"),
        ("Pad100000000,SQ8", 16, "Pad100000000 is not a number from 1 to 65536"),
    ],
)
def test_factories_that_cannot_work_are_refused_by_their_numbers(factory, dimension, said):
    with pytest.raises(ValueError, match=f"--faiss_index_type {factory}.*{said}"):
        make_empty(factory, dimension)


def test_a_factory_that_needs_more_passages_is_refused_before_it_is_trained():
    asked = Compression("PCA300,SQ8")
    for size, rows in ((260, None), (10_000, 290)):
        with pytest.raises(
            ValueError, match=r"PCA learns 300 numbers from no fewer passages, and there are 2[69]0 to "
        ):
            Compression("PCA300,SQ8", train_size=rows).factory(size, 384)
    assert asked.factory(1, 384) == asked.factory(300, 384) == "PCA300,SQ8"
    sample = np.random.default_rng(0).standard_normal((299, 384)).astype(np.float32)
    with pytest.raises(ValueError, match="there are 299 to train on"):
        train("PCA300,SQ8", sample)
    assert train("PCA300,SQ8", np.concatenate([sample, sample[:1]])).code_size == 300


def test_nothing_is_embedded_for_a_factory_that_cannot_work(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(CorpusEmbedder, "embed_rows", lambda *_: pytest.fail("embeds"))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, index_mode="faiss", faiss_index_type="PCA512,PQ4", total_steps=1)
    said = capfd.readouterr().err
    assert ended.value.code == 1 and "--faiss_index_type PCA512,PQ4: PCA cannot make 512 numbers of 64" in said


def test_what_faiss_says_while_it_trains_is_one_sentence(monkeypatch):
    def fail(index, sample):
        raise RuntimeError("Error in void f() at /project/x.cpp:3: Error: 'a > b' failed: no way")

    monkeypatch.setattr(faiss.IndexPQ, "train", fail)
    with pytest.raises(
        ValueError, match=r"--faiss_index_type PQ4 cannot be trained on 256 embeddings of 8 numbers \(Err"
    ):
        train("PQ4", np.zeros((10, 8), np.float32))


def test_an_index_that_lacks_checksums_is_not_called_whole(tmp_path):
    directory, *_ = saved(tmp_path)
    before, fields = contents(directory), described(directory)
    fields["segments"][0]["embeddings"]["blocks"] = ""
    describe(directory, fields)
    with pytest.raises(ValueError, match="0 checksums of embeddings.1.npy, not all"):
        check_index(directory)
    assert contents(directory).keys() == before.keys()
