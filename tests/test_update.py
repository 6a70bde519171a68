"""Updates of a saved index: what is searched afterwards is what an index built anew of the same passages has."""

import contextlib
import random
import shutil
import zlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from atlas import embedding
from atlas.embedding import CorpusEmbedder
from atlas.index import directory as files
from atlas.index.build import compress, copy_to
from atlas.index.convert import check_index, convert
from atlas.index.live import joined
from atlas.index.passages import open_passages
from atlas.index.sharded import look_up
from atlas.index.store import open_index, restore_embeddings, save_index
from atlas.index.update import compact_index
from atlas.runtime import distributed
from atlas.update import update_index
from tests.indices import CPU, VERSION_1, asked, contents, describe, described, make_index, names, publish
from tests.kit import read_jsonl, run, run_on, slow, world, write_jsonl
from tests.locks import held_elsewhere
from tests.ranks import run_on_ranks, scratch_directory
from tests.test_convert_index import kill_at
from tests.test_flat import assert_same
from tests.test_retrieval import make
from update_index import main, parse_options, read_ids

DIMENSION = 8
KINDS = ("flat", "pq", "ivfpq", "PQ8x4fs", "RR8,RaBitQ")


def embed(passages):
    """Made-up embeddings; passages of the same text tie."""
    seeds = [zlib.crc32(passage["text"].encode()) for passage in passages]
    return torch.stack([torch.randn(DIMENSION, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).half()


class MadeUp:
    """Embeds as `embed` does."""

    precision = "fp32"

    def __init__(self, made_by="abc", dimension=DIMENSION, scale=1.0):
        self.retriever, self.made_by, self.scale = SimpleNamespace(dim=dimension), made_by, scale
        self.embedded = []  # ids

    def fingerprint(self):
        return self.made_by

    def embed(self, passages):
        return self.scale * embed(passages)

    def identity(self, passages, encoder):
        return encoder

    def journal(self, directory, passages, identity):
        return contextlib.nullcontext()

    def embed_share(self, passages, rows, store, journal):
        self.embedded += [passage["id"] for passage in passages[rows.start : rows.stop]]
        if rows:
            store(0, self.embed(passages[rows.start : rows.stop]))


def passage(i, text):
    return {"id": f"p{i}", "title": f"T{i}", "section": "S" if i % 2 else "", "text": text, "year": i}


def write_index(directory, passages, kind="flat", codes_only=False):
    corpus = open_passages(write_jsonl(directory.with_suffix(".jsonl"), passages))
    flat = make_index(corpus, embed(list(corpus)))
    index = compress(flat, asked(kind, nlist=4)) if kind != "flat" else flat
    save_index(directory, index, retriever_fingerprint="abc", embedder_precision="fp32", codes_only=codes_only)


def new_passages(directory, rows):
    return open_passages(write_jsonl(directory / "new.jsonl", rows))


def changed(passages, new, delete):
    """What the list of all passages is after an update."""
    by_id = {p["id"]: p for p in new}
    new = [p for p in new if p not in passages]
    gone = {p["id"] for p in new} | set(delete)
    assert by_id.keys().isdisjoint(delete)
    return [p for p in passages if p["id"] not in gone] + new


def random_update(chance, passages, fresh):
    """New, changed and unchanged passages, and ids to delete."""
    some = chance.sample(passages, min(len(passages), chance.randint(2, 30)))
    cut = sorted(chance.randint(0, len(some)) for _ in range(2))
    delete = [p["id"] for p in some[: cut[0]]]
    replaced = [passage(p["year"], f"new {chance.randrange(10**6)}") for p in some[cut[0] : cut[1]]]
    added = [passage(fresh + i, f"more {chance.randrange(10**6)}") for i in range(chance.randint(0, 25))]
    new = replaced + added + some[cut[1] :]
    chance.shuffle(new)
    return new, delete


def expected_index(directory, passages, codec=None):
    """An index of these passages built anew; its codes are made by this quantizer."""
    corpus = open_passages(write_jsonl(directory / "expected.jsonl", passages))
    flat = make_index(corpus, embed(list(corpus)))
    return compress(flat, asked("any"), codec=codec) if codec else flat


def assert_equal(directory, scratch, passages, refine_factor=1):
    """Everything that is seen of the saved index is that of one built anew."""
    index = open_index(directory, device=CPU, compression=asked(None, refine_factor=refine_factor))
    anew = expected_index(scratch, passages, index.compressed.codec if index.compressed else None)
    anew.refine_factor = refine_factor
    assert index.size == len(passages) and list(index.passages) == list(anew.passages)
    if index.has_embeddings:
        assert torch.equal(index.embeddings[:], anew.embeddings)
        ids = torch.randint(index.size, (3, 4), generator=torch.Generator().manual_seed(0))
        assert torch.equal(index.embeddings_of(ids), anew.embeddings_of(ids))
    if index.compressed:
        assert np.array_equal(index.compressed.codes(), anew.compressed.codes())
    for b, k in ((1, 5), (7, 3), (20, index.size + 2)):
        queries = torch.randn(b, DIMENSION, generator=torch.Generator().manual_seed(b))
        found, expected = index.search(queries, k), anew.search(queries, k)
        assert_same((found.scores, found.ids), (expected.scores, expected.ids))
        assert look_up(index.passages, found.ids) == look_up(anew.passages, expected.ids)
    return index


@pytest.mark.parametrize(
    ("kind", "codes_only", "seed"),
    [
        *(("flat", False, 0), ("ivfpq", False, 0), ("pq", True, 0)),
        *(slow(kind, codes_only, seed) for kind in KINDS[1:] for codes_only in (False, True) for seed in (1, 2)),
        *(slow("flat", False, seed) for seed in range(1, 9)),
    ],
)
def test_updates_are_as_an_index_built_anew(tmp_path, kind, codes_only, seed):
    """Several in a row, of random additions, replacements and deletions, and a compaction in between and at the end."""
    chance = random.Random(f"{kind} {codes_only} {seed}")
    passages = [passage(i, f"text {i // 2}") for i in range(120)]
    directory = tmp_path / "index"
    write_index(directory, passages, kind, codes_only)
    for turn in range(6):
        new, delete = random_update(chance, passages, 1000 * (turn + 1))
        embedder = MadeUp()
        changes = update_index(directory, embedder, new_passages(tmp_path, new) if new else None, delete)
        after = changed(passages, new, delete)
        assert sorted(embedder.embedded) == sorted(p["id"] for p in new if p not in passages)
        assert changes.replaced + changes.deleted == len(changes.leaving)
        passages = after
        assert_equal(directory, tmp_path, passages)
        if not codes_only and kind != "flat":
            assert_equal(directory, tmp_path, passages, refine_factor=3)
        check_index(directory)
        assert set(names(directory)) == files.read_description(directory).files() | {"index.json"}
        if turn in (3, 5):
            compact_index(directory)
            assert files.read_description(directory).whole and len(described(directory)["segments"]) == 1
            assert_equal(directory, tmp_path, passages)
            check_index(directory)
            assert set(names(directory)) == files.read_description(directory).files() | {"index.json"}


def _update_on_rank(directory, scratch, turns):
    """Updates and a compaction on this rank; what is seen of the index after each."""
    seen = []
    for number, (new, delete) in enumerate(turns):
        corpus = scratch / f"new.{number}.jsonl"
        if distributed.is_main():
            write_jsonl(corpus, new)
        distributed.wait_for_all("the corpus")
        update_index(directory, MadeUp(), open_passages(corpus) if new else None, delete)
        seen.append(_seen(directory))
    compact_index(directory)
    return [*seen, _seen(directory)]


def _seen(directory):
    index = open_index(directory, device=CPU)
    queries = torch.randn(6, DIMENSION, generator=torch.Generator().manual_seed(1))
    hits = index.search(queries[distributed.rank() :: distributed.world_size()], 9)
    ids = torch.tensor([[0, index.size // 2, index.size - 1]])
    embeddings = index.embeddings_of(ids) if index.has_embeddings else None
    return hits.scores, hits.ids, look_up(index.passages, hits.ids), embeddings, index.size


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["flat", slow("ivfpq"), slow("pq")])
def test_any_number_of_ranks_updates_and_searches(kind):
    """The same is found, and the same files are written. The first update adds fewer passages than there are ranks."""
    chance, scratch = random.Random(5), Path(scratch_directory())
    passages = [passage(i, f"text {i // 2}") for i in range(100)]
    turns = [([passage(500, "one"), passage(501, "two")], ["p3"]), ([], ["p4", "p99"])]
    for number in range(2):
        state = passages
        for new, delete in turns:
            state = changed(state, new, delete)
        turns.append(random_update(chance, state, 1000 * (number + 1)))
    answers, written = {}, {}
    for world_size in (1, 2, 3):
        directory = scratch / str(world_size) / "index"
        directory.parent.mkdir()
        write_index(directory, passages, kind)
        answers[world_size] = run_on_ranks(world_size, _update_on_rank, directory, directory.parent, turns)
        arrays = [name for name in names(directory) if name != "index.json"]  # which has fingerprints of the corpora
        written[world_size] = {name: (directory / name).read_bytes() for name in arrays}
        check_index(directory)
    for world_size in (2, 3):
        assert written[world_size] == written[1]
        for rank, turn in ((rank, turn) for rank in range(world_size) for turn in range(len(turns) + 1)):
            scores, ids, found, embeddings, size = answers[1][0][turn]
            mine, seen = slice(rank, None, world_size), answers[world_size][rank][turn]
            assert torch.equal(seen[0], scores[mine]) and seen[4] == size
            if kind == "flat":  # of codes, passages of the same score as the last one may be others
                assert torch.equal(seen[1], ids[mine]) and seen[2] == found[mine]
            if embeddings is not None:
                assert torch.equal(seen[3], embeddings)


@pytest.mark.parametrize("seed", range(20))
def test_live_rows_are_those_that_are_left(seed):
    chance, numbers = np.random.default_rng(seed), torch.arange(60).view(30, 2)
    ends = np.sort(chance.integers(0, 31, chance.integers(0, 4))).tolist()
    arrays = [numbers[start:end] for start, end in pairwise([0, *ends, 30])]
    deleted = [np.flatnonzero(chance.random(len(array)) < chance.choice([0, 0.1, 0.9])) for array in arrays]
    kept = [np.delete(array.numpy(), rows, axis=0) for array, rows in zip(arrays, deleted, strict=True)]
    expected, found = torch.from_numpy(np.concatenate(kept)), joined(arrays, deleted)
    n = len(expected)
    assert len(found) == n and found.shape == (n, 2) and found.dtype == torch.int64
    for start in (*range(-3, n + 3), None):
        for stop in (*range(-3, n + 3), None):
            assert torch.equal(found[start:stop], expected[start:stop])
    if n:
        rows = torch.from_numpy(chance.integers(0, n, 40))
        assert torch.equal(found.index_select(0, rows), expected[rows])
    assert found.index_select(0, torch.empty(0, dtype=torch.int64)).shape == (0, 2)


def test_live_rows_are_copied_into_a_tensor_where_another_device_searches():
    live = joined([torch.zeros(5, 2)], [np.array([1])])
    assert copy_to(live, CPU) is live
    copied = copy_to(live, torch.device("meta"))
    assert isinstance(copied, torch.Tensor) and copied.shape == (4, 2)


def test_one_array_without_deleted_rows_stays_as_it_is():
    nothing, array = np.empty(0, np.int64), torch.zeros(3, 2)
    assert joined([array[:0], array, array[:0]], [nothing] * 3) is array
    live = joined([array, array], [nothing, np.array([1])])
    assert live[0:3].data_ptr() == array.data_ptr()  # a range without deleted rows is a part of the array, not a copy


@pytest.fixture
def small(tmp_path):
    """A small index with its passages, updated once: two segments, and tombstones in the first."""
    passages = [passage(i, f"text {i}") for i in range(30)]
    write_index(tmp_path / "index", passages)
    new, delete = [passage(40, "new"), passage(7, "newer"), passage(41, "new")], ["p3", "p12"]
    update_index(tmp_path / "index", MadeUp(), new_passages(tmp_path, new), delete)
    return tmp_path / "index", changed(passages, new, delete)


def test_what_is_written(small, tmp_path):
    """A segment for what is new, tombstones that numpy reads, and nothing that was there is written again."""
    directory, passages = small
    assert names(directory) == [
        *("embeddings.1.npy", "embeddings.2.npy", "index.json"),
        *("passages.1.jsonl", "passages.2.jsonl", "tombstones.2.npy"),
    ]
    assert np.load(directory / "tombstones.2.npy").tolist() == [[3], [7], [12]]
    before = {name: (directory / name).stat() for name in names(directory)}
    update_index(directory, delete=["p40", "p5"])
    assert described(directory)["segments"][1]["tombstones"]["rows"] == 1
    for name in ("embeddings.1.npy", "embeddings.2.npy", "passages.1.jsonl", "passages.2.jsonl"):
        assert (directory / name).stat() == before[name]
    assert "tombstones.2.npy" not in names(directory)
    assert_equal(directory, tmp_path, changed(passages, [], ["p40", "p5"]))
    update_index(directory, delete=["p7", "p41"])  # all that is left of the second segment
    assert len(described(directory)["segments"]) == 1 and "embeddings.2.npy" not in names(directory)


def test_what_was_updated_is_no_longer_the_embeddings_of_one_corpus(tmp_path):
    passages = [passage(i, f"text {i}") for i in range(9)]
    index = make_index(open_passages(write_jsonl(tmp_path / "a.jsonl", passages)), embed(passages))
    save_index(tmp_path / "index", index, identity="one")
    kept = []
    assert restore_embeddings(tmp_path / "index", "one", range(9), lambda start, rows: kept.append(rows))
    assert torch.equal(torch.cat(kept), embed(passages))
    assert restore_embeddings(tmp_path / "index", "two", range(9), kept.append) is None
    update_index(tmp_path / "index", delete=["p3"])
    compact_index(tmp_path / "index")
    assert restore_embeddings(tmp_path / "index", "one", range(8), kept.append) is None


def test_what_is_there_word_for_word_stays(small, tmp_path, caplog):
    caplog.set_level("INFO", "atlas")
    directory, passages = small
    before, embedder = contents(directory), MadeUp()
    changes = update_index(directory, embedder, new_passages(tmp_path, passages), ["p3"])  # which was deleted before
    assert contents(directory) == before and embedder.embedded == []
    assert changes.unchanged.tolist() == list(range(len(passages))) and len(changes.leaving) == 0
    assert "Deleted before: 1 of 1 ids" in caplog.text and "30 were there as they are; it has 30" in caplog.text


def test_all_passages_of_an_id_are_replaced_or_deleted(tmp_path):
    passages = [passage(i % 4, f"text {i}") for i in range(12)]
    write_index(tmp_path / "index", passages)
    changes = update_index(tmp_path / "index", MadeUp(), new_passages(tmp_path, [passages[1]]), ["p2"])
    assert (changes.replaced, changes.deleted, len(changes.leaving)) == (1, 1, 6)
    left = [p for p in passages if p["id"] in ("p0", "p3")]
    assert_equal(tmp_path / "index", tmp_path, [*left, passages[1]])


@pytest.mark.parametrize(
    ("embedder", "new", "delete", "said"),
    [
        (MadeUp("xyz"), [passage(9, "x")], [],
         "made by the passage encoder abc, and new passages would be embedded by xyz: "),
        (MadeUp(dimension=16), [passage(9, "x")], [], "embeddings of size 8, the retriever makes them of size 16"),
        (MadeUp(scale=1.2), [passage(9, "x")], [], "27 of 27 of its passages, embedded again, come out otherwise"),
        (MadeUp(), [passage(8, "x"), passage(9, "x"), passage(8, "y")], [],
         r"new.jsonl, line 3: the id 'p8' stands in .*new.jsonl, line 1 as well"),
        (MadeUp(), [passage(9, "x")], ["p9"], r"ids to delete are among the new passages as well \(1: 'p9'\)"),
        (None, [], ["p0", *(f"q{i}" for i in range(7))],
         r"ids to delete are not in .*index \(7: 'q0', 'q1', 'q2', 'q3', 'q4', ...\): leave them out; nothing was"),
        (None, [], [f"p{i}" for i in (*range(30), 40, 41)],
         "nothing would be left of .*: remove the directory instead"),
    ],
)  # fmt: skip
def test_refusals_change_nothing(small, tmp_path, embedder, new, delete, said):
    directory, passages = small
    before = contents(directory)
    with pytest.raises(ValueError, match=said):
        update_index(directory, embedder, new_passages(tmp_path, new) if new else None, delete)
    assert contents(directory) == before
    assert_equal(directory, tmp_path, passages)


def test_codes_of_another_format_are_recognised(tmp_path):
    """Without embeddings: what is stored is farther from a fresh embedding than its code is."""
    passages = [passage(i, f"text {i}") for i in range(120)]
    write_index(tmp_path / "index", passages, "pq", codes_only=True)
    new = new_passages(tmp_path, [passage(200, "new")])
    with pytest.raises(ValueError, match="of 64 of its passages, embedded again, come out otherwise"):
        update_index(tmp_path / "index", MadeUp(scale=1.3), new)
    update_index(tmp_path / "index", MadeUp(scale=1.001), new)  # another precision


def test_indices_of_other_formats_are_refused(tmp_path):
    publish(tmp_path / "published")
    for directory, kind in ((VERSION_1, "an index of version 1"), (tmp_path / "published", "a published index")):
        before = contents(directory)
        for work in (lambda where: update_index(where, delete=["p1"]), compact_index):
            with pytest.raises(
                ValueError, match=rf"is {kind}: make one of version 2 of it \(python preprocessing/conv"
            ):
                work(directory)
        assert contents(directory) == before
    with pytest.raises(ValueError, match="holds no index: there is no such directory"):
        update_index(tmp_path / "none", delete=["p1"])
    assert not (tmp_path / "none").exists()


def test_a_directory_that_is_being_written_is_left_alone(small):
    directory, _ = small
    before = contents(directory)
    with held_elsewhere(directory / files.LOCK), pytest.raises(ValueError, match="another process is writing into"):
        update_index(directory, delete=["p1"])
    assert contents(directory) == before


def test_titles_are_joined_once(tmp_path, monkeypatch):
    """In an index that was converted from a published one, whose titles hold the section already."""
    texts = [{"text": f"text {i} ü"} for i in range(8)]
    monkeypatch.setattr("tests.indices.made_up", lambda *_: (embed(texts), None))
    publish(tmp_path / "published", dimension=DIMENSION)
    convert(tmp_path / "published", tmp_path / "index", asked(None))
    new = [{"id": "p2", "title": "T", "section": "S", "text": "new"}, {"id": "p9", "title": "U", "text": "newer"}]
    update_index(tmp_path / "index", MadeUp("any"), new_passages(tmp_path, new), ["p0"])
    there = open_index(tmp_path / "index", device=CPU).passages
    assert [p["title"] for p in there] == ["T1: S", *(f"T{i}: S" for i in range(3, 8)), "T: S", "U"]
    compact_index(tmp_path / "index")
    assert list(open_index(tmp_path / "index", device=CPU).passages) == list(there)
    with pytest.raises(ValueError, match="holds another index"):  # it is no longer what comes out of the published one
        convert(tmp_path / "published", tmp_path / "index", asked(None))


def test_damaged_tombstones_are_refused(small):
    directory, _ = small
    path = directory / "tombstones.2.npy"
    content, fields = path.read_bytes(), described(directory)
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"tombstones\.2\.npy was changed or damaged, its checksum does not fit"):
        open_index(directory, device=CPU)
    path.unlink()
    with pytest.raises(ValueError, match=r"tombstones\.2\.npy, which index\.json names, is missing"):
        open_index(directory, device=CPU)
    for rows in ([3, 3, 12], [3, 12, 7], [-1, 3, 7], [3, 7, 30]):  # under a checksum that fits
        path.unlink(missing_ok=True)
        written = files.write_tombstones(path, np.array(rows))
        fields["segments"][0]["tombstones"]["sha256"] = written.sha256
        describe(directory, fields)
        with pytest.raises(ValueError, match=r"tombstones\.2\.npy names no rows of its segment"):
            open_index(directory, device=CPU)
    for rows in (0, 30, -3):
        fields["segments"][0]["tombstones"]["rows"] = rows
        describe(directory, fields)
        with pytest.raises(ValueError, match=r"index\.json cannot be right"):
            open_index(directory, device=CPU)


def test_damage_is_found_in_every_segment(small):
    directory, _ = small
    for name in ("embeddings.1.npy", "embeddings.2.npy", "passages.1.jsonl", "passages.2.jsonl"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(ValueError, match=name):
            check_index(directory)
        (directory / name).write_bytes(content[:-1])
        with pytest.raises(ValueError, match=name):
            open_index(directory, device=CPU)
        (directory / name).write_bytes(content)
    check_index(directory)


def test_an_updated_index_is_saved_compressed_and_exported(small, tmp_path, caplog):
    """What is made of it is one segment, in another directory or in its own."""
    caplog.set_level("INFO", "atlas")
    directory, passages = small
    queries = torch.randn(5, DIMENSION, generator=torch.Generator().manual_seed(3))
    index = open_index(directory, device=CPU)
    convert(directory, tmp_path / "flat.faiss", asked(None))
    assert "row i is passage i of the index, from 0" in caplog.text
    exported = faiss.read_index(str(tmp_path / "flat.faiss"))
    found = exported.search(queries.numpy(), 9)[1].tolist()
    assert [set(row) for row in found] == [set(row) for row in index.search(queries, 9).ids.tolist()]  # there are ties
    convert(directory, tmp_path / "pq", asked("pq"))
    convert(tmp_path / "pq", tmp_path / "pq.faiss", asked(None))
    save_index(tmp_path / "again", index)
    assert index.passages.paths[0].parent == directory
    for other in (tmp_path / "pq", tmp_path / "again"):
        assert_equal(other, tmp_path, passages)
        check_index(other)
        assert files.read_description(other).whole
    save_index(directory, index)
    assert names(directory) == ["embeddings.3.npy", "index.json", "passages.3.jsonl"]
    assert index.passages.paths == [directory / "passages.3.jsonl"]
    assert_equal(directory, tmp_path, passages)


def test_deleted_rows_are_said_when_they_are_many(small, caplog):
    caplog.set_level("INFO", "atlas")
    directory, _ = small
    update_index(directory, delete=["p1"])
    assert "--compact" not in caplog.text
    update_index(directory, delete=[f"p{i}" for i in range(20, 24)])
    assert "24 % of its rows are deleted and still take room: `python preprocessing/update_index.py" in caplog.text


def test_a_quantizer_that_does_not_fit_is_said(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "atlas")
    write_index(tmp_path / "index", [passage(i, f"text {i}") for i in range(300)], "SQ8")
    update_index(
        tmp_path / "index", MadeUp(), new_passages(tmp_path, [passage(i, f"new {i}") for i in range(300, 400)])
    )
    assert "of a new embedding's squared length" in caplog.text and "training it again may pay" not in caplog.text
    shifted = [passage(i, f"moved {i}") for i in range(400, 500)]
    monkeypatch.setattr(
        MadeUp, "embed_share", lambda _, __, rows, store, ___: store(0, 4 + embed(shifted)[rows.start : rows.stop])
    )
    update_index(tmp_path / "index", MadeUp(), new_passages(tmp_path, shifted))
    assert "training it again may pay (preprocessing/convert_index.py does so)" in caplog.text


# With a model


@pytest.fixture
def town_index(tmp_path):
    """An index of 250 passages of the world, the flags of its retriever, and all passages after an update."""
    rows = read_jsonl(world() / "passages.jsonl")
    corpus = open_passages(write_jsonl(tmp_path / "towns.jsonl", rows[:250]))
    make(world(), passages=corpus, save_index_path=str(tmp_path / "index")).build()
    new = [rows[3] | {"text": f"{rows[17]['text']} {rows[3]['text']}"}, *rows[250:], rows[5]]
    write_jsonl(tmp_path / "new.jsonl", new)
    (tmp_path / "gone.txt").write_text("p1\n\np2\n")
    flags = ["--passages", tmp_path / "new.jsonl", "--delete", "p0", "p9", "--delete_file", tmp_path / "gone.txt"]
    flags += ["--retriever_model_path", world() / "models/retriever", "--text_maxlength", 64, "--device", "cpu"]
    after = changed(rows[:250], new, ["p0", "p9", "p1", "p2"])
    write_jsonl(tmp_path / "after.jsonl", after)
    return tmp_path / "index", list(map(str, flags)), after


def test_the_script_updates_with_the_retriever(town_index, tmp_path, capsys):
    directory, flags, after = town_index
    main([str(directory), *flags])
    said = "50 passages added, 1 replaced, 4 deleted, 1 were there as they are; it has 296"
    assert said in capsys.readouterr().out
    anew = make(world(), passages=open_passages(tmp_path / "after.jsonl"))
    anew.build()
    index = open_index(directory, device=CPU)
    assert list(index.passages) == list(anew.passages)
    assert torch.allclose(index.embeddings[:].float(), anew.index.embeddings.float(), atol=2e-3)
    main([str(directory), "--compact"])
    assert files.read_description(directory).whole and "Compacted" in capsys.readouterr().out
    assert torch.equal(open_index(directory, device=CPU).embeddings, index.embeddings[:])


def test_another_length_is_refused(town_index, capsys):
    directory, flags, _ = town_index
    before = contents(directory)
    with pytest.raises(SystemExit) as ended:
        main([str(directory), *flags, "--text_maxlength", "8"])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "embedded again, come out otherwise than they are stored" in error
    assert error.count("\n") == 1 and contents(directory) == before


def test_an_update_that_is_stopped_while_it_embeds_goes_on(town_index, monkeypatch):
    directory, flags, after = town_index
    monkeypatch.setattr(embedding, "WINDOW", 10)
    monkeypatch.setattr("atlas.runtime.device.tokenizer_processes", lambda ranks: 0)
    embed_window, embedded = CorpusEmbedder._embed_window, []

    def stopping(embedder, window, embed, report):
        embedded.append(len(window.places))
        if sum(embedded) > most:
            raise RuntimeError("stopped")
        return embed_window(embedder, window, embed, report)

    monkeypatch.setattr(CorpusEmbedder, "_embed_window", stopping)
    before, most = contents(directory), 64 + 40  # passages of the index are embedded first
    with pytest.raises(RuntimeError, match="stopped"):
        main([str(directory), *flags])
    left = {name for name in contents(directory) if not name.startswith("embedding.")}
    assert left == before.keys() and (directory / "embedding.npy").exists()
    embedded.clear()
    most = 1000
    main([str(directory), *flags])
    assert 64 + 11 <= sum(embedded) < 64 + 51  # of 51 new ones, four windows were embedded before
    assert list(open_index(directory, device=CPU).passages) == list(open_passages(directory.parent / "after.jsonl"))
    assert set(names(directory)) == files.read_description(directory).files() | {"index.json"}


def test_training_and_refreshes_go_on_with_an_updated_index(town_index, tmp_path):
    """A refresh that is saved in the place of the index makes one segment of it, and the next one reads that."""
    directory, flags, after = town_index
    main([str(directory), *flags])
    found = {"load_index_path": directory, "save_index_path": directory, "passages": None}
    ran = run(tmp_path, total_steps=5, refresh_index="2", train_retriever=True, **found)
    assert (ran / "run.log").read_text().count("--save_index_path is the index of --load_index_path: once it is") == 1
    assert files.read_description(directory).whole
    assert list(open_index(directory, device=CPU).passages) == list(open_passages(tmp_path / "after.jsonl"))
    check_index(directory)


def test_the_encoder_that_built_the_index_of_a_run_updates_it(tmp_path, capsys):
    """Both encoders have learned since then; flags are those of the checkpoint."""
    rows, directory = read_jsonl(world() / "passages.jsonl"), tmp_path / "index"
    trained = run(tmp_path, total_steps=2, train_retriever=True, save_index_path=directory)
    assert (trained / "checkpoint/latest/index_encoder.safetensors").exists()
    write_jsonl(tmp_path / "new.jsonl", [{**rows[4], "id": "new"}])
    capsys.readouterr()
    main([str(directory), "--passages", str(tmp_path / "new.jsonl"), "--model_path", str(trained)])
    assert "1 passages added, 0 replaced, 0 deleted" in capsys.readouterr().out
    embeddings = open_index(directory, device=CPU).embeddings[:]
    assert torch.allclose(embeddings[-1].float(), embeddings[4].float(), atol=2e-3)


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_evaluate_an_updated_index_as_one_built_anew(town_index, tmp_path):
    directory, flags, after = town_index
    main([str(directory), *flags])
    flags = {"program": "evaluate", "retrieve_only": True, "train_data": None}
    run_on(2, tmp_path, name="updated", load_index_path=directory, passages=None, **flags)
    run(tmp_path, name="anew", passages=tmp_path / "after.jsonl", **flags)
    updated, anew = (read_jsonl(tmp_path / name / "dev-step-0.jsonl") for name in ("updated", "anew"))
    ids = [[[passage["id"] for passage in row["passages"]] for row in rows] for rows in (updated, anew)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing is to be done: give --passages, --delete, --delete_file or --compact"),
        ("--passages x.jsonl", "--passages needs the retriever that made the index: give --model_path or"),
        ("--delete_file gone.txt", "--delete_file gone.txt is not there: give a file of ids, one on each line"),
        ("--delete_file .", "--delete_file . is a directory: give a file of ids"),
        ("--delete 1 --text_maxlength 9", "--text_maxlength is about embedding new passages: give --passages, or"),
        ("--passages x --model_path m --text_maxlength 2", "--text_maxlength 2 is too small: it must be at least 3"),
        ("--passages x --model_path m --retriever_format {name}", "--retriever_format"),
    ],
)
def test_wrong_flags_are_refused_by_name(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(["index", *words.split()])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_file_of_ids(tmp_path):
    (tmp_path / "gone.txt").write_bytes("\ufeffp1\r\n\n p2 ".encode())
    assert read_ids(tmp_path / "gone.txt") == ["p1", "p2"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"\n \n", "there is no id in it"), (b"1\n\xff\n", r"not UTF-8 \(at byte 2\)")]
)
def test_a_file_of_ids_that_has_none_is_refused(tmp_path, content, said):
    (tmp_path / "gone.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"--delete_file .*gone.txt: {said}"):
        read_ids(tmp_path / "gone.txt")


# Killed


def all_of(index):
    return list(index.passages), index.embeddings[:].tolist()


def kill_at_many_steps(tmp_path, original, work, states, steps):
    """Kill the work on a copy of the index at these of its steps; what is left is one of both states, and it works.

    Returns: which states were left, one after the other.
    """
    left = []
    for step in steps:
        directory = shutil.copytree(original, tmp_path / f"killed-{step}")
        if not kill_at(step, directory, work):
            break
        left.append(states.index(all_of(open_index(directory, device=CPU))))
        check_index(directory)
        work(directory)
        assert all_of(open_index(directory, device=CPU)) == states[-1]
        assert set(names(directory)) == files.read_description(directory).files() | {"index.json"}
    return left


FEW, ALL = range(5, 1000, 12), range(1, 1000)


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "steps"), [("flat", FEW), slow("flat", ALL), slow("ivfpq", ALL)])
def test_an_update_killed_at_any_step_leaves_the_old_index_or_the_new_one(tmp_path, kind, steps):
    passages = [passage(i, f"text {i}") for i in range(100)]
    write_index(tmp_path / "index", passages, kind)
    update_index(tmp_path / "index", delete=["p1"])
    corpus = new_passages(tmp_path, [passage(7, "newer"), passage(40, "text 40"), passage(200, "new")])

    def work(directory):
        update_index(directory, MadeUp(), corpus, ["p3", "p12"])

    before = all_of(open_index(tmp_path / "index", device=CPU))
    work(shutil.copytree(tmp_path / "index", tmp_path / "whole"))
    states = [before, all_of(open_index(tmp_path / "whole", device=CPU))]
    left = kill_at_many_steps(tmp_path, tmp_path / "index", work, states, steps)
    assert left == sorted(left)
    if steps is ALL:
        assert len(left) > 30 and set(left) == {0, 1}


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "steps"), [("flat", FEW), slow("flat", ALL), slow("pq", ALL)])
def test_a_compaction_killed_at_any_step_changes_nothing_that_is_seen(tmp_path, kind, steps):
    write_index(tmp_path / "index", [passage(i, f"text {i}") for i in range(100)], kind)
    update_index(tmp_path / "index", MadeUp(), new_passages(tmp_path, [passage(7, "newer")]), ["p3"])
    seen = all_of(open_index(tmp_path / "index", device=CPU))
    left = kill_at_many_steps(tmp_path, tmp_path / "index", compact_index, [seen], steps)
    assert steps is not ALL or len(left) > 30
