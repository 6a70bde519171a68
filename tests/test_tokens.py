"""Token ids that are kept beside a corpus: embeddings are the same, whoever wrote them and whatever happened."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas import config, embedding
from atlas.files import tokens
from atlas.files.cache import FOLDER, forget
from atlas.files.lock import open_locked
from atlas.files.tokens import TokenCache
from atlas.index.passages import open_passages
from atlas.model.inputs import Inputs
from atlas.retrieval import _use_of_tokens
from tests.kit import logged, run, world
from tests.ranks import run_on_ranks
from tests.test_retrieval import make

ROWS, WINDOW = 300, 30  # of the corpus of `world()`


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(embedding, "WINDOW", WINDOW)
    monkeypatch.setattr("atlas.runtime.device.tokenizer_processes", lambda ranks: 0)


@pytest.fixture
def corpus(tmp_path):
    """A corpus of our own, beside which something may be written."""
    path = tmp_path / "data/passages.jsonl"
    path.parent.mkdir()
    path.write_bytes((world() / "passages.jsonl").read_bytes())
    return path


@pytest.fixture
def tokenized(monkeypatch):
    """How many passages were tokenized by each call but those for a sample of the corpus."""
    calls, tokenize = [], Inputs.passage_tokens

    def counted(self, passages):
        if len(passages) <= WINDOW:
            calls.append(len(passages))
        return tokenize(self, passages)

    monkeypatch.setattr(Inputs, "passage_tokens", counted)
    return calls


def build(corpus, cache="on", change=None, drop=()):
    passages = open_passages([corpus])
    if drop:
        passages.drop(drop)
    made = make(world(), passages=passages, cache_passage_tokens=cache)
    if change is not None:
        change(made.inputs)
    made.build()
    return made.index.embeddings


def entries(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_embeddings_are_the_same_bit_for_bit(corpus, tokenized, caplog):
    caplog.set_level("INFO", "atlas")
    plain = build(corpus, "off")
    assert not (corpus.parent / FOLDER).exists() and sum(tokenized) == ROWS
    assert torch.equal(build(corpus, "auto"), plain) and not (corpus.parent / FOLDER).exists()  # too small to be kept
    assert torch.equal(build(corpus), plain)
    (entry,) = (corpus.parent / FOLDER).iterdir()
    assert f"Token ids are kept for the next time in {entry} ({entry.stat().st_size / 1e6:.1f} MB)" in caplog.text
    tokenized.clear()
    for cache in ("on", "auto"):
        assert torch.equal(build(corpus, cache), plain)
    assert not tokenized and "Embedding 300 passages, 300 are kept as token ids" in caplog.text
    assert entries(entry.parent) == [entry.name]


def test_token_ids_as_they_are_in_the_file(tmp_path):
    """In uint16 where the vocabulary allows it; rows of any length, also of none."""
    rng = np.random.default_rng(0)
    for size, itemsize in ((2**16, 2), (2**16 + 1, 4)):
        rows = [rng.integers(0, size, n) for n in rng.integers(0, 60, 50)] + [np.array([size - 1])]
        cache = TokenCache(tmp_path / "a.jsonl", "c" * 16, f"{size:016x}", size)
        with cache.writer(range(51), 51, 30) as writer:
            for first, stop in ((20, 51), (0, 20)):
                lengths = np.array([len(row) for row in rows[first:stop]])
                writer.add(first, lengths, np.concatenate(rows[first:stop]))
        assert writer.size == writer.path.stat().st_size == 2 * 40 + 2 * 51 + itemsize * sum(map(len, rows))
        cache = pickle.loads(pickle.dumps(TokenCache(tmp_path / "a.jsonl", "c" * 16, f"{size:016x}", size)))
        for wanted in (range(51), range(7, 9), range(19, 21), range(50, 51)):
            for row, found in zip(wanted, cache.read(wanted), strict=True):
                assert np.array_equal(found, rows[row])
        assert cache.read(range(50, 52)) is None
        assert [cache.missing(range(*ends)) for ends in ((0, 51), (40, 60), (80, 90))] == [0, 9, 10]


def _build_on_rank(corpus, cache):
    size, embedding.WINDOW = embedding.WINDOW, WINDOW
    before, embedding.devices.tokenizer_processes = embedding.devices.tokenizer_processes, lambda ranks: 0
    tokenize, calls = Inputs.passage_tokens, []
    Inputs.passage_tokens = lambda self, passages: calls.append(len(passages)) or tokenize(self, passages)
    try:
        return build(corpus, cache), [n for n in calls if n <= WINDOW]
    finally:
        embedding.WINDOW, embedding.devices.tokenizer_processes, Inputs.passage_tokens = size, before, tokenize


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_any_number_of_ranks_reads_what_others_wrote(corpus, before, after):
    run_on_ranks(before, _build_on_rank, corpus, "on")
    assert len(entries(corpus.parent / FOLDER)) == before
    found = run_on_ranks(after, _build_on_rank, corpus, "on")
    plain = run_on_ranks(after, _build_on_rank, corpus, "off")
    assert all(not tokenized for _, tokenized in found) and sum(sum(n) for _, n in plain) == ROWS
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(found, plain, strict=True))
    assert len(entries(corpus.parent / FOLDER)) == before


@pytest.mark.processes
def test_worker_processes_read_them(corpus, monkeypatch):
    plain = build(corpus, "off")
    monkeypatch.setattr("atlas.runtime.device.tokenizer_processes", lambda ranks: 2)
    assert torch.equal(build(corpus), plain)  # written
    monkeypatch.setattr(Inputs, "passage_tokens", _only_a_sample(Inputs.passage_tokens))
    assert torch.equal(build(corpus), plain)  # read


def _only_a_sample(tokenize):
    def checked(self, passages):
        assert len(passages) == 100, "tokenized again"
        return tokenize(self, passages)

    return checked


@pytest.mark.parametrize("damage", ["cut off", "content", "header"])
def test_what_is_damaged_is_made_again(corpus, tokenized, damage):
    plain = build(corpus)
    (entry,) = (corpus.parent / FOLDER).iterdir()
    whole = entry.read_bytes()
    starts = [i for i in range(len(whole)) if whole.startswith(tokens.MAGIC, i)]
    changed = bytearray(whole)
    if damage == "cut off":
        del changed[starts[7] + 60 :]  # as by a kill
    else:
        changed[starts[7] + (100 if damage == "content" else 10)] ^= 1
    entry.write_bytes(changed)
    for expected in (WINDOW if damage == "content" else 3 * WINDOW, 0):
        tokenized.clear()
        assert torch.equal(build(corpus), plain)
        assert sum(tokenized) == expected
    assert entry.stat().st_size >= len(whole)


def test_an_edited_corpus_is_tokenized_anew(corpus, tokenized):
    build(corpus)
    before = entries(corpus.parent / FOLDER)
    corpus.write_bytes(corpus.read_bytes().replace(b"The", b"One", 1))
    tokenized.clear()
    plain = build(corpus, "off")
    assert torch.equal(build(corpus), plain) and sum(tokenized) == 2 * ROWS
    after = entries(corpus.parent / FOLDER)
    assert len(before) == len(after) == 1 and before != after  # the old ones are gone


def test_a_corpus_takes_them_along(corpus, tmp_path, tokenized):
    plain = build(corpus)
    tokenized.clear()
    corpus.parent.rename(tmp_path / "elsewhere")
    assert torch.equal(build(tmp_path / "elsewhere/passages.jsonl"), plain) and not tokenized


def test_a_corpus_without_some_rows_is_another_one(corpus):
    build(corpus)
    assert torch.equal(build(corpus, drop=[3, 17]), build(corpus, "off", drop=[3, 17]))


def _longer(inputs):
    inputs.retriever_maxlength = 20


def _other_prefix(inputs):
    inputs.passage_prefix = "passage: "


def _other_format(inputs):
    inputs.settings = config.Model(text_maxlength=64, retriever_format="{text} of {title}")


def _other_vocabulary(inputs):
    inputs.retriever_tokenizer._tokenizer.add_tokens(["river"])


@pytest.mark.parametrize("change", [_longer, _other_prefix, _other_format, _other_vocabulary])
def test_what_reads_in_another_way_has_an_entry_of_its_own(corpus, tokenized, change):
    first = build(corpus)
    plain = build(corpus, "off", change)
    tokenized.clear()
    assert torch.equal(build(corpus, change=change), plain) and sum(tokenized) == ROWS
    assert torch.equal(build(corpus), first) and sum(tokenized) == ROWS
    assert len(entries(corpus.parent / FOLDER)) == 2


def test_the_users_cache_is_taken_where_nothing_can_be_written_beside(corpus, tmp_path, monkeypatch, tokenized):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (corpus.parent / FOLDER).write_text("in the way")  # unlike a read-only directory it stops root as well
    plain = build(corpus)
    tokenized.clear()
    assert torch.equal(build(corpus), plain) and not tokenized
    assert len(entries(tmp_path / "home/atlas")) == 1 and entries(corpus.parent) == [FOLDER, "passages.jsonl"]


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_no_room_is_said_once_and_the_run_goes_on(corpus, tmp_path, monkeypatch, caplog, when):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    plain = build(corpus, "off")
    write = os.write

    def full(file, content):
        if content[:8] == tokens.MAGIC and os.fstat(file).st_size > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content)

    if when == "before":
        free = type("Usage", (), {"free": 20_000})
        monkeypatch.setattr(tokens.shutil, "disk_usage", lambda path: free)
    else:
        monkeypatch.setattr(tokens.os, "write", full)
    made = make(world(), passages=open_passages([corpus]), cache_passage_tokens="on")
    for _ in range(2):
        made.build()
        assert torch.equal(made.index.embeddings, plain)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("The token ids of the passages are not kept, so every refresh makes them again: ")
    assert ("bytes, and 20,000 are free" if when == "before" else "No space left on device") in warning
    assert not (corpus.parent / FOLDER).exists()


def test_token_ids_go_with_their_corpus(corpus):
    """As the text of an index that a newer one replaces."""
    build(corpus)
    forget(corpus)
    assert not (corpus.parent / FOLDER).exists()


def test_what_another_run_writes_is_left_alone(corpus, caplog):
    plain = build(corpus)
    (entry,) = (corpus.parent / FOLDER).iterdir()
    other = open_locked(entry)  # of a run that has just started
    os.ftruncate(other, 0)
    assert torch.equal(build(corpus), plain) and f"another run is writing {entry}" in caplog.text
    os.close(other)
    assert entry.stat().st_size == 0


def test_a_corpus_that_is_removed_while_it_is_in_use(corpus, caplog):
    plain = build(corpus, "off")
    made = make(world(), passages=open_passages([corpus]), cache_passage_tokens="on")
    corpus.unlink()
    made.build()
    assert torch.equal(made.index.embeddings, plain) and "are not kept" in caplog.text


def test_when_they_are_kept(monkeypatch):
    encoder = torch.nn.Linear(1, 1)
    trained = type("Retriever", (), {"passage_encoder": encoder})
    frozen = type("Retriever", (), {"passage_encoder": torch.nn.Identity()})
    passages = open_passages([world() / "passages.jsonl"])

    def use(retriever, **flags):
        return _use_of_tokens(config.Index(**flags), passages, retriever)

    assert use(trained, refresh_index="10") == "read"  # of a small corpus
    monkeypatch.setattr("atlas.retrieval.CACHE_FROM", 1000)
    assert use(trained, refresh_index="10") == use(trained, refresh_index="0-10:5") == "keep"
    assert use(trained) == use(frozen, refresh_index="10") == "read"
    assert use(frozen, cache_passage_tokens="on") == "keep"
    assert use(trained, refresh_index="10", cache_passage_tokens="off") == "off"


def test_a_run_with_refreshes_learns_the_same(corpus, tmp_path):
    flags = {"passages": corpus, "total_steps": 4, "train_retriever": True, "refresh_index": 2, "eval_data": None}
    plain = run(tmp_path / "off", cache_passage_tokens="off", **flags)
    kept = run(tmp_path / "on", cache_passage_tokens="on", **flags)
    assert logged(plain, "loss/train_loss") == logged(kept, "loss/train_loss") != []
    log = Path(kept / "run.log").read_text()
    assert "Embedding 300 passages\n" in log and "Embedding 300 passages, 300 are kept as token ids\n" in log
