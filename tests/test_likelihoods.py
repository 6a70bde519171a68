"""--cache_judgements: what a language model that does not learn finds likely is computed once."""

import sqlite3

import pytest
import torch
from torch.testing import assert_close

import atlas
from atlas.model.causal import CausalReader
from atlas.model.likelihoods import KnownLikelihoods
from atlas.model.reader import load_reader
from atlas.model.signals import PROMPT_MODES, mode_of, reading_of
from tests.kit import language_model, logged, read_jsonl, run, run_on, world, write_jsonl
from tests.test_causal import PASSAGES, inputs_of, learning, read_with

QUERIES, ANSWERS = ["what is the river of Kobari?", "who?", "what is it?"], ["Selnu", "Pelzor Kobari", "a"]
FOUND = [PASSAGES, PASSAGES[:1], []]
FROZEN = read_with(train_retriever=True, freeze_reader=True, gold_score_mode="question", gold_question_weight=0.7)


@pytest.fixture
def calls(monkeypatch):
    """How many answers the reader has computed likelihoods of, by call."""
    counted, of_one_each, of_shared = [], CausalReader.logits, CausalReader.logits_behind

    def logits(self, hidden, mask, decoder_ids):
        counted.append(len(decoder_ids))
        return of_one_each(self, hidden, mask, decoder_ids)

    def logits_behind(self, begun, which, decoder_ids):
        counted.append(len(decoder_ids))
        return of_shared(self, begun, which, decoder_ids)

    monkeypatch.setattr(CausalReader, "logits", logits)
    monkeypatch.setattr(CausalReader, "logits_behind", logits_behind)
    return counted


@torch.no_grad()
@pytest.mark.parametrize("mode", sorted(PROMPT_MODES))
def test_what_is_known_is_what_would_be_computed(mode, tmp_path, calls):
    reader, make = load_reader(str(language_model()), dropout=None), inputs_of("plain")
    signal = mode_of(learning(mode, 0.7), reader).signal

    def gold(rows, known, temperature=0.5):
        queries, found, answers = ([part[row] for row in rows] for part in (QUERIES, FOUND, ANSWERS))
        judged = make.judging(queries, found, make.target_tokens(answers), mode)
        return signal(reading_of(reader, judged, temperature, known))

    expected = gold([0, 1, 2], None)
    known = KnownLikelihoods(tmp_path / "kept/known.sqlite", reader, "fp32")
    assert_close(gold([1, 0], known)[1], expected[0], atol=1e-5, rtol=0)
    before = len(calls)
    again = KnownLikelihoods(tmp_path / "kept/known.sqlite", reader, "fp32")
    one = gold([0], again)[0]
    assert_close(one, expected[0, :, : one.shape[-1]] if mode == "emdr" else expected[0], atol=1e-5, rtol=0)
    assert len(calls) == before
    assert_close(gold([0, 1, 2], again), expected, atol=1e-5, rtol=0)
    of_last = sum(calls[before:])
    assert 0 < of_last <= 3  # the query without passages was not asked before
    gold([0], again, temperature=0.25)
    assert (sum(calls[before:]) > of_last) == (mode == "emdr")  # the only one that computes with it


@torch.no_grad()
def test_another_reader_or_precision_or_answer_is_not_known(tmp_path, calls):
    reader, make = load_reader(str(language_model()), dropout=None), inputs_of("plain")

    def computed(precision="fp32", answer="Selnu"):
        before, known = sum(calls), KnownLikelihoods(tmp_path / "known.sqlite", reader, precision)
        judged = make.judging(QUERIES[:1], FOUND[:1], make.target_tokens([answer]), "ppmean")
        mode_of(learning("ppmean"), reader).signal(reading_of(reader, judged, 1.0, known))
        return sum(calls) - before

    assert (computed(), computed()) == (3, 0)
    assert (computed(answer="Pelzor"), computed(precision="bf16")) == (3, 3)
    reader.model.norm.weight.data[0] += 1
    assert (computed(), computed()) == (3, 0)
    reader.config.rms_norm_eps *= 2
    assert (computed(), computed()) == (3, 0)
    reader.config._name_or_path = "elsewhere"
    assert computed() == 0


@torch.no_grad()
def test_what_is_damaged_is_computed_again(tmp_path, calls):
    reader, make = load_reader(str(language_model()), dropout=None), inputs_of("plain")
    known = KnownLikelihoods(tmp_path / "known.sqlite", reader, "fp32")
    judged = make.judging(QUERIES[:1], FOUND[:1], make.target_tokens(["Selnu"]), "ppmean")
    signal = mode_of(learning("ppmean"), reader).signal
    expected = signal(reading_of(reader, judged, 1.0, known))
    with sqlite3.connect(tmp_path / "known.sqlite") as file:
        file.execute("UPDATE likelihoods SET found = ?", (bytes(4 * 999),))
    assert_close(signal(reading_of(reader, judged, 1.0, known)), expected)
    before = len(calls)
    assert_close(signal(reading_of(reader, judged, 1.0, known)), expected)
    assert len(calls) == before


def test_epochs_and_runs_share_it_and_learn_the_same(tmp_path, calls):
    flags = FROZEN | {"total_steps": 4, "eval_data": None, "in_batch_negatives": True}
    without = run(tmp_path, name="without", **flags)
    computed = sum(calls)
    kept = run(tmp_path, name="kept", **flags, cache_judgements=tmp_path / "known.sqlite")
    between = sum(calls)
    again = run(tmp_path, name="again", **flags, cache_judgements=tmp_path / "known.sqlite")
    assert 0 < between - computed <= computed and sum(calls) == between  # the second run computes nothing
    for directory in (kept, again):
        losses = logged(without, "loss/retriever_loss")
        assert logged(directory, "loss/retriever_loss") == pytest.approx(losses, abs=1e-5)
        assert not logged(directory, "loss/reader_loss")


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_it(tmp_path, ranks):
    flags = FROZEN | {"total_steps": 3, "log_freq": 1}
    without = run_on(ranks, tmp_path, name="without", **flags)
    for name in ("kept", "again"):
        directory = run_on(ranks, tmp_path, name=name, **flags, cache_judgements=tmp_path / "known.sqlite")
        for loss in zip(*(logged(one, "loss/retriever_loss") for one in (without, directory)), strict=True):
            assert loss[0] == pytest.approx(loss[1], abs=1e-5)
        answers = [[row["generation"] for row in read_jsonl(one / "dev-step-3.jsonl")] for one in (without, directory)]
        assert answers[0] == answers[1]
    with sqlite3.connect(tmp_path / "known.sqlite") as file:
        ((n,),) = file.execute("SELECT count(*) FROM likelihoods")
    assert n > 0


def test_evaluations_order_passages_by_what_is_known(tmp_path, calls):
    flags = read_with() | {"train_data": None, "rerank_by_reader": 4, "model_path": None}
    flags |= {"retriever_model_path": world() / "models/retriever"}
    paths, computed = [], []
    for name in ("first", "second"):
        before, kept = sum(calls), tmp_path / "known.sqlite"
        paths.append(run(tmp_path, "evaluate", name=name, **flags, cache_judgements=kept) / "dev-step-0.jsonl")
        computed.append(sum(calls) - before)
    assert computed[0] - computed[1] == 4 * len(read_jsonl(paths[0]))
    assert read_jsonl(paths[0]) == read_jsonl(paths[1])


@pytest.mark.parametrize("weight", [1, 0.7])
def test_of_a_question_that_is_judged_alone_no_answer_is_computed(tmp_path, calls, weight):
    """Another answer to it is a reason to compute it again only where the answer counts."""
    rows, computed = read_jsonl(world() / "train.jsonl"), []
    for name in ("these", "others"):
        write_jsonl(tmp_path / f"{name}.jsonl", [row | {"target": name, "answers": [name]} for row in rows])
        flags = FROZEN | {"gold_question_weight": weight, "train_data": [tmp_path / f"{name}.jsonl"], "eval_data": None}
        before = sum(calls)
        run(tmp_path, name=name, **flags, total_steps=1, cache_judgements=tmp_path / "known.sqlite")
        computed.append(sum(calls) - before)
    assert computed[0] > 0 and (computed[1] == 0) == (weight == 1)


def test_a_run_that_kept_judgements_is_asked_without_them(tmp_path):
    kept = tmp_path / "known.sqlite"
    directory = run(tmp_path, **FROZEN, cache_judgements=kept, total_steps=1, eval_data=None)
    before, question = kept.read_bytes(), read_jsonl(world() / "dev.jsonl")[0]["question"]
    answers = [
        atlas.load(directory, **flags).ask(question, stream=True).answer for flags in ({}, {"cache_judgements": kept})
    ]
    assert answers[0].text == answers[1].text and kept.read_bytes() != before
    kept.write_bytes(before)
    assert atlas.load(directory).ask(question).text == answers[0].text and kept.read_bytes() == before


def test_evidence_is_judged_by_what_is_known(tmp_path, calls):
    flags = read_with() | {"train_data": None, "model_path": None, "write_evidence": True}
    flags |= {"retriever_model_path": world() / "models/retriever"}
    rows, computed = [], []
    for name in ("first", "second"):
        before, kept = sum(calls), tmp_path / "known.sqlite"
        directory = run(tmp_path, "evaluate", name=name, **flags, cache_judgements=kept)
        assert "--cache_judgements has no effect" not in (directory / "run.log").read_text()
        rows.append(read_jsonl(directory / "dev-step-0.jsonl"))
        computed.append(sum(calls) - before)
    assert computed[0] > computed[1] and rows[0] == rows[1]


@pytest.mark.parametrize("content", [b"not a database\n" * 200, "another"])
def test_other_files_are_left_as_they_are(tmp_path, content):
    path = tmp_path / "theirs.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    reader = load_reader(str(language_model()), dropout=None)
    with pytest.raises(
        ValueError, match=r"--cache_judgements .*theirs.db: (file is not a database|it holds something)"
    ):
        KnownLikelihoods(path, reader, "fp32")
    assert path.read_bytes() == before


def test_where_nothing_is_judged_it_is_said(tmp_path):
    kept = tmp_path / "known.sqlite"
    flags = read_with(train_retriever=True, total_steps=1, eval_data=None)
    log = (run(tmp_path, **flags, cache_judgements=kept) / "run.log").read_text()
    assert "--cache_judgements has no effect where no reader that does not learn judges passages" in log
    flags |= {"reader_model_type": world() / "models/reader", "freeze_reader": True}
    log = (run(tmp_path, name="t5", **flags, cache_judgements=kept) / "run.log").read_text()
    assert "--cache_judgements has no effect: it is for a decoder-only reader" in log
    asked = read_with(train_data=None) | {"passages": None, "closed_book": True}
    log = (run(tmp_path, "evaluate", name="closed", **asked, cache_judgements=kept) / "run.log").read_text()
    assert "--cache_judgements has no effect where no reader that does not learn judges passages" in log
    assert not kept.exists()
