"""Indices for the tests: small ones of ours, compressed ones, published ones, and how to damage them."""

import hashlib
import json
import pickle
import random
from pathlib import Path

import torch

from atlas.index.build import compress
from atlas.index.codec import Compression
from atlas.index.passages import open_passages
from atlas.index.sharded import ShardedIndex
from atlas.index.store import save_index
from atlas.runtime import distributed
from tests.test_flat import made_up

CPU = torch.device("cpu")
KINDS = {"pq": 4, "ivfpq": 4, "ivfsq": None, "ivfflat": None, "flat": None, "OPQ3_6,PQ3": None, "SQ8": None}
KINDS |= {"PQ8x4fs": None, "IVF4,PQ8x4fs": None}
VERSION_1 = Path(__file__).parent / "data/index_version_1"  # PQ4 with embeddings, written when that was the format


def write_corpus(path, n, word="text"):
    passages = [{"id": f"p{i}", "title": f"T{i}", "section": "S", "text": f"{word} {i} ü", "year": i} for i in range(n)]
    path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in passages), encoding="utf-8")
    return path


def make_index(passages, embeddings):
    """A flat index of this rank's rows."""
    rows = distributed.shard_rows(len(passages), distributed.rank(), distributed.world_size())
    return ShardedIndex(passages, embeddings[rows.start : rows.stop].clone())


def save(directory, corpus, embeddings, max_passages=-1):
    """Save a flat index of a corpus, made by the retriever `abc`."""
    save_index(directory, make_index(open_passages(corpus, max_passages), embeddings), retriever_fingerprint="abc")


def saved(tmp_path, n=20, dimension=8):
    """A small index on disk: its directory, its embeddings, two queries."""
    embeddings, queries = made_up(n, dimension, 2)
    save(tmp_path / "index", write_corpus(tmp_path / "corpus.jsonl", n), embeddings)
    return tmp_path / "index", embeddings, queries


def asked(kind, **settings):
    return Compression(kind, code_size=KINDS.get(kind), **settings)


def compressed(tmp_path, kind="pq", n=300, codes_only=False, name="compressed"):
    """A compressed index on disk: its directory, its embeddings, four queries."""
    embeddings, queries = made_up(n, 8, 4)
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, n)
    index = compress(make_index(open_passages(corpus), embeddings), asked(kind))
    save_index(tmp_path / name, index, retriever_fingerprint="abc", codes_only=codes_only)
    return tmp_path / name, embeddings, queries


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


class RunsSomething:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    """Every file below a directory with its bytes."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def described(directory):
    """What index.json says."""
    return json.loads((directory / "index.json").read_text())


def describe(directory, fields, version=2):
    """Write an index.json whose checksum fits (docs/formats.md)."""
    fields = {name: value for name, value in fields.items() if name not in ("version", "checksum")}
    checksum = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    (directory / "index.json").write_text(json.dumps({"version": version, **fields, "checksum": checksum}))


def damaged(content, chance: random.Random):
    """The content with a few bits flipped, bytes overwritten, or an end cut off."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)
