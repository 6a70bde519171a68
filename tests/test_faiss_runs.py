"""Whole small runs over compressed indices: built, saved, opened again, refreshed, refined."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.index.store import open_index
from atlas.retrieval import Retrieval
from tests.kit import logged, read_jsonl, run, run_on, slow, world
from tests.ranks import scratch_directory
from tests.test_retrieval import make

pytestmark = pytest.mark.processes

D = 64  # dimensions of the retriever of the world
PQ = {"index_mode": "faiss", "faiss_index_type": "pq", "faiss_code_size": 8}
EVALUATE = {"train_data": None, "total_steps": None, "retrieve_only": True, "reader_model_type": None}


def found(directory, step=0):
    """Which passages were found for each query, and their scores."""
    rows = read_jsonl(directory / f"dev-step-{step}.jsonl")
    return [[(p["id"], p["score"]) for p in row["passages"]] for row in rows]


def assert_found_alike(one, other):
    """The same passages but for those that score as the last one, up to rounding."""
    for row, expected in zip(one, other, strict=True):
        scores, expected_scores = ([score for _, score in passages] for passages in (row, expected))
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
        last = scores[-1] + 1e-5 * abs(scores[-1])
        assert {i for i, score in row if score > last} == {i for i, score in expected if score > last}


@pytest.fixture(scope="module")
def home():
    """Indices saved by runs: `flat`, `pq` with embeddings, and `codes` alone; what was found with the first two."""
    directory = Path(scratch_directory())
    flat = run(directory, "evaluate", name="a", save_index_path=directory / "flat", **EVALUATE)
    pq = run(directory, "evaluate", name="b", save_index_path=directory / "pq", **PQ, **EVALUATE)
    assert found(flat) != found(pq)
    codes = {"load_index_path": directory / "flat", "save_index_path": directory / "codes", "write_results": False}
    run(directory, "evaluate", name="c", save_index_codes_only=True, **codes, **PQ, **EVALUATE)
    assert not opened(directory / "codes").has_embeddings
    return directory, found(flat), found(pq)


def opened(directory):
    return open_index(directory, device=torch.device("cpu"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_flat_index_is_loaded_compressed_and_kept(home, tmp_path, world_size):
    """The announcement's way: load a flat index, ask for PQ, keep the compressed index; the next run opens that."""
    directory, _, expected = home
    settings = EVALUATE | {"save_index_path": tmp_path / "pq", "save_index_codes_only": True}
    first = run_on(world_size, tmp_path, "evaluate", name="first", load_index_path=directory / "flat", **PQ, **settings)
    assert_found_alike(found(first), expected)
    assert names(tmp_path / "pq") == ["codes.1.npy", "index.json", "passages.1.jsonl", "trained.1.faiss"]
    for name, flags in (("with", PQ), ("without", {})):
        again = run_on(
            3 - world_size, tmp_path, "evaluate", name=name, load_index_path=tmp_path / "pq", **flags, **EVALUATE
        )
        assert_found_alike(found(again), expected)
        log = (again / "run.log").read_text()
        assert "is a compressed index: PQ8, 8 bytes a passage" in log and "Training the quantizer" not in log


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("flat", {}),
        ("ivfflat", {"faiss_nlist": 5}),
        slow("ivfflat", {"faiss_nlist": 17, "faiss_nprobe": 1000}),
        ("ivfsq", {"faiss_nprobe": 3}),
        ("ivfpq", {"faiss_code_size": 8, "faiss_train_size": 100}),
        slow("RR,PQ8", {}),
        slow("PQ8x4", {}),
        ("PQ16x4fs", {}),
        ("IVF5,PQ16x4fs", {"faiss_nprobe": 3}),
    ],
)
def test_every_type_runs_on_any_number_of_ranks(home, tmp_path, kind, flags):
    directory, exact, _ = home
    settings = (
        EVALUATE | flags | {"index_mode": "faiss", "faiss_index_type": kind, "load_index_path": directory / "flat"}
    )
    if kind.startswith("RR"):
        settings["faiss_index_type"] = f"RR{D},PQ8"
    alone = run(tmp_path, "evaluate", name="alone", **settings)
    assert_found_alike(found(run_on(2, tmp_path, "evaluate", name="together", **settings)), found(alone))
    if kind in ("flat", "ivfflat"):
        assert_found_alike(found(alone), exact)
    else:
        assert found(alone) != exact
    log = (alone / "run.log").read_text()
    probed = re.findall(r"A query looks into (\d+) of the index's (\d+) lists", log)
    assert probed == {"ivfsq": [("3", "17")], "ivfpq": [("16", "17")], "IVF5,PQ16x4fs": [("3", "5")]}.get(kind, [])


def test_refinement_brings_the_exact_order_back(home, tmp_path):
    directory, exact, rough = home
    refined = run(tmp_path, "evaluate", load_index_path=directory / "pq", refine_factor=1000, **EVALUATE)
    assert found(refined) == exact != rough


TRAIN = {"train_retriever": True, "query_side_retriever_training": True, "total_steps": 4, "eval_data": None}


def test_codes_alone_train_the_query_side_too(home, tmp_path):
    """Without embeddings the frozen encoder says again what they were, but for their rounding to fp16."""
    directory, *_ = home
    with_embeddings = run(tmp_path, name="with", load_index_path=directory / "pq", **TRAIN)
    without = run(tmp_path, name="without", load_index_path=directory / "codes", **TRAIN)
    for statistic in ("loss/reader_loss", "loss/retriever_loss"):
        assert len(logged(without, statistic)) == 4
        np.testing.assert_allclose(logged(without, statistic), logged(with_embeddings, statistic), rtol=2e-2)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("codes_only", [True, False])
def test_a_refresh_encodes_with_the_quantizer_that_is_there(home, tmp_path, world_size, codes_only):
    settings = {
        "load_index_path": home[0] / "pq",
        "train_retriever": True,
        "total_steps": 4,
        "eval_data": None,
        "refresh_index": "2",
        "save_index_path": tmp_path / "index",
        "save_index_codes_only": codes_only,
    }
    directory = run_on(world_size, tmp_path, **settings)
    log = (directory / "run.log").read_text()
    assert log.count("Training the quantizer") == 0 and log.count("Refreshing the index") == 1
    index, before = opened(tmp_path / "index"), opened(home[0] / "pq")
    assert index.compressed.codec.serialize() == before.compressed.codec.serialize()
    assert (index.compressed.codes() != before.compressed.codes()).any()  # the encoder has moved
    assert index.has_embeddings == (not codes_only)
    if index.has_embeddings:
        expected, _ = index.compressed.codec.encode(index.embeddings, 0)
        assert np.array_equal(index.compressed.codes(), expected)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_refresh_can_train_the_quantizer_again(home, tmp_path, loaded):
    directory, *_ = home
    settings = {
        "train_retriever": True,
        "total_steps": 3,
        "eval_data": None,
        "refresh_index": "2",
        "faiss_retrain": True,
        "load_index_path": directory / "pq" if loaded else None,
    }
    log = (run(tmp_path, **settings, **({} if loaded else PQ)) / "run.log").read_text()
    assert log.count("Training the quantizer PQ8") == (1 if loaded else 2)


def test_memory_is_kept_for_what_needs_it(home, tmp_path, monkeypatch):
    """Embeddings of a compressed index stay for refinement alone, and are there while the index is saved."""
    directory, *_ = home
    seen = []
    monkeypatch.setattr(Retrieval, "_save", lambda retrieval, **_: seen.append(retrieval.index.has_embeddings))
    plain = make(world(), **PQ, save_index_path=str(tmp_path / "codes"), save_index_codes_only=True)
    refined = make(world(), **PQ, refine_factor=2)
    plain.build()
    refined.build()
    assert not plain.index.has_embeddings and refined.index.has_embeddings
    embeddings, codes = refined.index.embeddings, plain.index.compressed.codes().copy()
    assert np.array_equal(codes, refined.index.compressed.codes())
    for again in (plain, refined):  # refreshed by the same encoder
        again.build()
        assert np.array_equal(again.index.compressed.codes(), codes)
    assert refined.index.embeddings is embeddings  # in place
    assert seen == [True, False]  # at the refresh codes were made as soon as passages were embedded
    assert np.array_equal(codes, opened(directory / "pq").compressed.codes())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (PQ | {"faiss_code_size": 7}, f"--faiss_code_size 7 does not divide the embedding size {D}; try"),
        (PQ | {"faiss_index_type": "PQ8x6"}, "--faiss_index_type PQ8x6 makes product quantizer codes of 6 bits"),
        (PQ | {"faiss_index_type": "nonsense"}, "--faiss_index_type nonsense: neither one of flat, ivfflat"),
        ({"save_index_path": "x", "save_index_codes_only": True}, "--save_index_codes_only: a flat index has no codes"),
        ({"load_index_path": "codes", "refine_factor": 3}, "--refine_factor 3 needs the embeddings"),
        (PQ | {"load_index_path": "codes", "faiss_code_size": 4}, "without embeddings, and PQ4 is asked for"),
    ],
)
def test_mistakes_get_one_sentence(home, tmp_path, monkeypatch, capfd, changes, sentence):
    directory, *_ = home
    monkeypatch.chdir(tmp_path)
    if changes.get("load_index_path"):
        changes = changes | {"load_index_path": directory / changes["load_index_path"]}
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "evaluate", **EVALUATE, **changes)
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert sentence in said and said.count("\n") == 1, said


def test_flags_without_effect_say_so(home, tmp_path):
    flat = {"load_index_path": home[0] / "flat"} | EVALUATE
    log = (run(tmp_path, "evaluate", faiss_code_size=8, faiss_nlist=3, **flat) / "run.log").read_text()
    assert "Without --index_mode faiss there is no effect of --faiss_code_size, --faiss_nlist" in log
    log = (run(tmp_path, "evaluate", name="b", refine_factor=2, faiss_nprobe=2, **flat) / "run.log").read_text()
    assert "--refine_factor has no effect: the search of a flat index is exact" in log
    assert "--faiss_nprobe has no effect: an index of type flat has no lists" in log and "Without" not in log


@pytest.mark.parametrize("kind", ["pq", slow("ivfpq")])
def test_a_run_resumes_with_the_quantizer_that_it_has_trained(tmp_path, kind):
    """Later indices are encoded by the quantizer of the first one, also in a run that never saw that index."""
    flags = {"index_mode": "faiss", "faiss_index_type": kind, "faiss_code_size": 4, "train_retriever": True}
    flags |= {"refresh_index": 2, "lr_retriever": 2e-2, "scheduler_steps": 8, "eval_data": None}
    straight = logged(run(tmp_path, name="straight", total_steps=8, **flags), "loss/retriever_loss")
    for steps in (3, 6, 8):
        directory = run(tmp_path, name="stopped", total_steps=steps, **flags)
    assert logged(directory, "loss/retriever_loss") == straight
    other = {**flags, "faiss_code_size": 8}
    run(tmp_path, name="stopped", total_steps=9, **other)  # another kind: a quantizer of its own
