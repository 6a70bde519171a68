"""Embedding a corpus goes on where it was stopped or killed, whatever was written last."""

import os
import signal

import pytest
import torch

from atlas import embedding
from atlas.index.arrays import FP16, Layout
from atlas.index.convert import check_index
from atlas.index.journal import open_journal
from atlas.index.passages import open_passages
from atlas.index.store import open_index
from atlas.runtime import distributed
from atlas.runtime.session import Stopped
from tests.kit import read_jsonl, world, write_jsonl
from tests.ranks import run_on_ranks, warm
from tests.test_retrieval import make

CPU = torch.device("cpu")
ROWS, WINDOW = 300, 30  # of the corpus of `world()`


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(embedding, "WINDOW", WINDOW)
    monkeypatch.setattr("atlas.runtime.device.tokenizer_processes", lambda ranks: 0)


@pytest.fixture(scope="module")
def whole():
    """The embeddings of a start that nobody stopped, without a journal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "WINDOW", WINDOW)
        patch.setattr("atlas.runtime.device.tokenizer_processes", lambda ranks: 0)
        plain = make(world())
        plain.build()
    return plain.index.embeddings


def build(index, directory=None, *, stop_after=None, kill_in=None, max_passages=-1, change=None, **settings):
    """Embed, and save the index. Returns the rows of this rank's share that were embedded, and the index."""
    directory = directory or world()  # every process has a world of its own
    passages = open_passages([directory / "passages.jsonl"], max_passages)
    made, embedded = make(directory, passages=passages, save_index_path=str(index), **settings), 0
    if change is not None:
        change(made)
    embed_window = made.embedder._embed_window

    def counted(window, *arguments):
        nonlocal embedded
        if kill_in is not None and embedded >= kill_in * WINDOW:
            os.kill(os.getpid(), signal.SIGKILL)
        embedded += len(window.places)
        return embed_window(window, *arguments)

    made.embedder._embed_window = counted
    asked = (lambda: embedded >= stop_after * WINDOW) if stop_after is not None else None
    try:
        made.build(*([asked] if asked else []))
    except Stopped:
        assert made.index is None
    return embedded, made.index


def left_over(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("embedding."))


def test_a_stopped_embedding_goes_on(tmp_path, whole, caplog):
    caplog.set_level("INFO", "atlas")
    first, _ = build(tmp_path / "index", stop_after=4)
    assert left_over(tmp_path / "index") == ["embedding.0.log", "embedding.json", "embedding.npy"]
    second, index = build(tmp_path / "index")
    assert (first, second) == (4 * WINDOW, ROWS - 3 * WINDOW)  # the window in which it was stopped is made again
    assert torch.equal(index.embeddings, whole)
    assert left_over(tmp_path / "index") == [] and "embeddings of a start that was stopped" in caplog.text
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, whole)


PQ = {"index_mode": "faiss", "faiss_index_type": "pq", "faiss_code_size": 4}


@pytest.mark.parametrize(("before", "after"), [({}, {}), (PQ, PQ), ({}, PQ), (PQ, {})])
def test_a_saved_index_gives_its_embeddings(tmp_path, whole, caplog, before, after):
    """Also to an index of another kind."""
    caplog.set_level("INFO", "atlas")
    _, first = build(tmp_path / "index", **before)
    array = next((tmp_path / "index").glob("embeddings.*.npy"))
    written = array.stat().st_ino, array.stat().st_mtime_ns
    embedded, index = build(tmp_path / "index", **after)
    assert embedded == 0 and "holds the embeddings of these passages: they are not made again" in caplog.text
    assert (array.stat().st_ino, array.stat().st_mtime_ns) == written, "written again"
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, whole)
    if before == after:
        ids = [found.search(whole[:9].float(), 5).ids for found in (first, index)]
        assert torch.equal(*ids)


def test_a_damaged_index_gives_none(tmp_path, whole, caplog):
    build(tmp_path / "index")
    array = next((tmp_path / "index").glob("embeddings.*.npy"))
    with open(array, "r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x01")
    embedded, index = build(tmp_path / "index")
    assert embedded == ROWS and torch.equal(index.embeddings, whole) and "embedded anew" in caplog.text
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, whole)
    assert build(tmp_path / "index")[0] == 0
    text = next((tmp_path / "index").glob("passages.*.jsonl"))
    content = text.read_bytes()
    text.write_bytes(content.replace(b"the", b"thy", 1))
    assert build(tmp_path / "index")[0] == 0  # the text alone is written anew
    check_index(tmp_path / "index")


@pytest.mark.parametrize("stop_after", [None, 4])
def test_a_damaged_index_keeps_the_passages_that_are_embedded_again(tmp_path, stop_after):
    """Where it is their own index that they are read from."""
    build(tmp_path / "index")
    (text,) = (tmp_path / "index").glob("passages.*.jsonl")
    content = text.read_bytes()

    def build_of_it(**options):
        make(world(), passages=open_passages([text]), save_index_path=str(tmp_path / "index")).build(**options)

    build_of_it()
    array = next((tmp_path / "index").glob("embeddings.*.npy"))
    with open(array, "r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x01")
    if stop_after is not None:
        with pytest.raises(Stopped):
            build_of_it(asked_to_stop=lambda: True)
    else:
        build_of_it()
        check_index(tmp_path / "index")
    assert text.read_bytes() == content


def test_a_flag_that_changes_a_single_passage_counts(tmp_path):
    """Also one that is not among those that are looked at for a change of the program."""
    lines = read_jsonl(world() / "passages.jsonl")
    lines[1]["text"] *= 9
    corpus = open_passages(write_jsonl(tmp_path / "long.jsonl", lines))
    for length in (64, 128):
        made = make(world(), passages=corpus, save_index_path=str(tmp_path / "index"))
        made.inputs.retriever_maxlength = length
        made.build()
        plain = make(world(), passages=corpus)
        plain.inputs.retriever_maxlength = length
        plain.build()
        assert torch.equal(made.index.embeddings, plain.index.embeddings)


def test_a_stop_is_heard_while_embeddings_are_restored(tmp_path):
    build(tmp_path / "index")
    assert build(tmp_path / "index", stop_after=0) == (0, None)


@pytest.mark.processes
def test_any_number_of_ranks_takes_the_embeddings_of_an_index(tmp_path, whole):
    assert sum(run_on_ranks(2, _build_on_rank, tmp_path / "index", world(), None)) == ROWS
    assert run_on_ranks(3, _build_on_rank, tmp_path / "index", world(), None) == [0, 0, 0]
    assert torch.allclose(open_index(tmp_path / "index", device=CPU).embeddings.float(), whole.float(), atol=2e-3)


def test_a_finished_embedding_is_not_repeated(tmp_path, whole, monkeypatch):
    """Stopped after it, in the training of a quantizer or while the index is written."""
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot"):
        patch.setattr("atlas.index.store._prepare", lambda *_: (_ for _ in ()).throw(ValueError("cannot")))
        build(tmp_path / "index")
    embedded, index = build(tmp_path / "index")
    assert embedded == 0 and torch.equal(index.embeddings, whole)


@pytest.mark.processes
@pytest.mark.parametrize("windows", [0, 3, 9])
def test_a_killed_embedding_goes_on(tmp_path, whole, windows):
    process = warm.Process(target=_small_windows_build, args=(tmp_path / "index", world()), kwargs={"kill_in": windows})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    embedded, index = build(tmp_path / "index")
    assert embedded <= ROWS - (windows - 1 - embedding.MOST_WAITING) * WINDOW
    assert torch.equal(index.embeddings, whole)


def _small_windows_build(index, directory, **options):
    embedding.WINDOW = WINDOW
    embedding.devices.tokenizer_processes = lambda ranks: 0
    return build(index, directory, **options)[0]


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_another_number_of_ranks_goes_on(tmp_path, whole, before, after):
    """Each rank leaves out the windows that the others wrote, as far as they are wholly its own."""
    run_on_ranks(before, _build_on_rank, tmp_path / "index", world(), 2)
    embedded = run_on_ranks(after, _build_on_rank, tmp_path / "index", world(), None)
    assert 0 < sum(embedded) < ROWS
    assert torch.allclose(open_index(tmp_path / "index", device=CPU).embeddings.float(), whole.float(), atol=2e-3)


def _build_on_rank(index, directory, stop_after):
    size, processes = embedding.WINDOW, embedding.devices.tokenizer_processes
    try:
        return _small_windows_build(index, directory, stop_after=stop_after)
    finally:
        embedding.WINDOW, embedding.devices.tokenizer_processes = size, processes


def _other_weights(made):
    next(made.retriever.passage_encoder.parameters()).data.mul_(1.001)


def _other_precision(made):
    made.embedder.precision = "bf16"


def _other_format(made):
    made.inputs.settings = type(made.inputs.settings)(text_maxlength=64, retriever_format="{text} of {title}")


@pytest.mark.parametrize("change", [_other_weights, _other_precision, _other_format])
def test_other_embeddings_are_made_anew(tmp_path, caplog, change):
    caplog.set_level("INFO", "atlas")
    build(tmp_path / "index", stop_after=4)
    assert build(tmp_path / "index", change=change)[0] == ROWS
    assert "of other weights, passages or flags: they are made anew" in caplog.text
    assert build(tmp_path / "index")[0] == ROWS  # the saved index is of the others


def test_another_corpus_is_embedded_anew(tmp_path):
    build(tmp_path / "index", stop_after=4)
    assert build(tmp_path / "index", max_passages=290)[0] == 290


def test_what_is_damaged_is_made_again(tmp_path, whole):
    build(tmp_path / "index", stop_after=8)
    layout = Layout(ROWS, whole.shape[1], FP16)
    with open(tmp_path / "index/embedding.npy", "r+b") as file:
        file.seek(layout.offset(2 * WINDOW + 7))
        file.write(b"\x00\x01")
    with open(tmp_path / "index/embedding.0.log", "r+") as notes:
        text = notes.read()
        notes.seek(0)
        notes.write("300 330 00000000\n60 10 00000000\n" + text[:-4])  # none of these rows; the last note is cut off
        notes.truncate()
    embedded, index = build(tmp_path / "index")
    assert embedded == ROWS - 5 * WINDOW  # of seven windows one is damaged, and one is not noted
    assert torch.equal(index.embeddings, whole)


@pytest.mark.parametrize("content", ["", "{}", '{"version": 2, "identity": "x", "checksum": "y"}', "[1]"])
def test_a_note_that_cannot_be_read_is_none(tmp_path, whole, content, caplog):
    build(tmp_path / "index", stop_after=4)
    (tmp_path / "index/embedding.json").write_text(content)
    embedded, index = build(tmp_path / "index")
    assert embedded == ROWS and torch.equal(index.embeddings, whole) and "made anew" in caplog.text


def test_without_links_the_index_is_written_as_a_whole(tmp_path, whole, monkeypatch):
    def refuse(*_):
        raise OSError("there are no links here")

    build(tmp_path / "index", stop_after=4)
    monkeypatch.setattr(os, "link", refuse)
    _, index = build(tmp_path / "index")
    assert left_over(tmp_path / "index") == []
    assert torch.equal(open_index(tmp_path / "index", device=CPU).embeddings, whole)


def test_codes_alone_need_no_journal(tmp_path):
    made = make(world(), save_index_path=str(tmp_path / "index"), save_index_codes_only=True, index_mode="faiss",
                faiss_index_type="pq", faiss_code_size=4)  # fmt: skip
    made.build()
    assert left_over(tmp_path / "index") == []


def test_no_space_is_said_before_anything_is_embedded(tmp_path):
    with (
        pytest.raises(ValueError, match=r"embedding\.npy needs .* GB, and there are"),
        open_journal(tmp_path / "index", "identity", Layout(2**40, 768, FP16)),
    ):
        pytest.fail("opened")
    assert left_over(tmp_path / "index") == []
    assert distributed.world_size() == 1


def test_an_edited_corpus_is_another_one(tmp_path):
    """Also where its size and its time of change stay."""
    from atlas.index.passages import fingerprint_of

    write_jsonl(tmp_path / "a.jsonl", [{"id": str(i), "title": "", "text": "one"} for i in range(9)])
    before, time = fingerprint_of(open_passages([tmp_path / "a.jsonl"])), os.stat(tmp_path / "a.jsonl").st_mtime_ns
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(content.replace(b"one", b"two", 1))
    os.utime(tmp_path / "a.jsonl", ns=(time, time))
    assert fingerprint_of(open_passages([tmp_path / "a.jsonl"])) != before
