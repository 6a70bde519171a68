import errno
import gzip
import json
import multiprocessing
import os
import pickle
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from atlas.files import cache, jsonl
from atlas.files.cache import FOLDER
from atlas.files.jsonl import JSON_LINES, DataError, JsonlCorpus, LineFormat, replacing
from tests.locks import held_elsewhere
from tests.patience import HANG_SECONDS


@pytest.fixture(autouse=True)
def cache_every_file(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(jsonl, "CACHE_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


def entries(directory):
    """What is cached beside the files of a directory."""
    return sorted((directory / FOLDER).glob("*"))


def plain_reader(*paths):
    """The slow and obvious version: every line in turn, with its place."""
    rows, lines, places = [], [], []
    for path in paths:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                rows.append(json.loads(line))
                lines.append(line.removesuffix(b"\r"))
                places.append(f"{path}, line {number}")
    return rows, lines, places


def random_file(path, seed, rows=200):
    rng = random.Random(seed)
    alphabet = 'abc ABC 0 \\ " \u00e9 \u4f60 \U0001f600 \u2028 \u0085 \t \n'
    content = b"\xef\xbb\xbf" if rng.random() < 0.5 else b""
    for row in range(rows):
        record = {"id": row, "text": "".join(rng.choices(alphabet, k=rng.randint(0, 40)))}
        line = rng.choice(["", "", "", " ", "\t "]) + json.dumps(record, ensure_ascii=rng.random() < 0.3)
        content += line.encode() + rng.choice([b"\n", b"\r\n", b" \r\n", b"\t\n"])
        while rng.random() < 0.3:
            content += rng.choice([b"\n", b"\r\n", b"   \n", b"\t \r\n", b" \x0b\x0c\n"])
    path.write_bytes(content if rng.random() < 0.5 else content.rstrip())
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("chunk", [1, 7, 64, jsonl.CHUNK])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_plain_reader(tmp_path, monkeypatch, seed, chunk):
    monkeypatch.setattr(jsonl, "CHUNK", chunk)
    paths = [random_file(tmp_path / f"{n}.jsonl", seed * 10 + n, rows=n * 40) for n in range(4)]
    rows, lines, places = plain_reader(*paths)
    for _ in ("found", "cached"):
        corpus = JsonlCorpus(paths)
        assert len(corpus) == len(rows) == 240
        assert list(corpus) == rows
        assert [corpus.raw(i) for i in range(len(corpus))] == lines
        assert [corpus.where(i) for i in range(len(corpus))] == places


def test_indexing_is_that_of_a_list(tmp_path):
    rows = [{"row": i} for i in range(7)]
    corpus = JsonlCorpus([write_rows(tmp_path / "a.jsonl", rows[:3]), write_rows(tmp_path / "b.jsonl", rows[3:])])
    assert corpus[0] == rows[0] and corpus[np.int64(3)] == rows[3] and corpus[-1] == rows[-1] and corpus[-7] == rows[0]
    assert corpus[2:5] == rows[2:5] and corpus[::-2] == rows[::-2] and corpus[5:100] == rows[5:]
    assert corpus[[6, 0, 0]] == [rows[6], rows[0], rows[0]] and corpus[np.array([4, -1])] == [rows[4], rows[6]]
    assert corpus[[]] == []
    for row in (7, -8):
        with pytest.raises(IndexError, match="7 rows"):
            corpus[row]


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_file_without_rows(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    corpus = JsonlCorpus(path)
    assert len(corpus) == 0 and list(corpus) == [] and corpus[:] == []
    with pytest.raises(IndexError):
        corpus[0]


def test_one_path_several_or_none(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"row": 0}])
    assert list(JsonlCorpus(path)) == list(JsonlCorpus(str(path))) == list(JsonlCorpus([path])) == [{"row": 0}]
    assert len(JsonlCorpus([path, path])) == 2
    assert len(JsonlCorpus([])) == 0


@pytest.mark.parametrize("max_rows", [-1, 0, 1, 4, 5, 6, 9, 100])
@pytest.mark.parametrize("cached", [False, True])
def test_max_rows_counts_over_all_files(tmp_path, monkeypatch, max_rows, cached):
    monkeypatch.setattr(jsonl, "CHUNK", 16)
    rows = [{"row": i} for i in range(9)]
    paths = [write_rows(tmp_path / "a.jsonl", rows[:5]), write_rows(tmp_path / "b.jsonl", rows[5:])]
    if cached:
        JsonlCorpus(paths)
    assert list(JsonlCorpus(paths, max_rows=max_rows)) == (rows if max_rows < 0 else rows[:max_rows])
    assert list(JsonlCorpus(paths)) == rows  # what was cached by the first is not the shorter list


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"row": 1', r"not JSON \(Expecting ',' delimiter at character 10\)"),
        (b"[1, 2]", "a JSON list; write one object per line"),
        (b'  [{"row": 1},', "a JSON list; write one object per line"),
        (b'"text"', r"expected a JSON object"),
        (b'{"row": "\xff"}', r"not UTF-8 \(byte 0xff at position 10\)"),
        (b"\xff\xfe{\x00}\x00", r"not UTF-8"),
        (b'{"row": "\\ud83d"}', r"half of a surrogate pair"),
        (b'{"row": ' + b"[" * 100_000, r"JSON nested too deeply"),
    ],
)
def test_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"row": 0}\r\n\n  \n' + line + b'\n{"row": 2}\n')
    corpus = JsonlCorpus([write_rows(tmp_path / "good.jsonl", [{"row": 0}]), path])
    assert len(corpus) == 4 and corpus[3] == {"row": 2}
    with pytest.raises(DataError, match=f"^{path}, line 4: {reason}"):
        corpus[2]
    assert len(corpus[0:2]) == 2
    with pytest.raises(DataError, match="line 4"):
        corpus[0:4]


@pytest.mark.parametrize("rows", [[{"row": 1}, {"row": 2}], [], {"data": [{"row": 1}]}])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_in_another_form_is_refused_when_a_file_is_opened(tmp_path, rows, indent):
    """Whatever part of it is read; a file with one object on one line is jsonl."""
    path = tmp_path / "questions.jsonl"
    path.write_text("\n" + json.dumps(rows, indent=indent))
    what = "list" if isinstance(rows, list) else "object over several lines"
    if isinstance(rows, dict) and indent is None:
        assert JsonlCorpus(path)[0] == rows
        return
    for choose_format in (None, lambda path, line: LineFormat(jsonl.decode)):
        with pytest.raises(DataError, match=f"^{path}: a JSON {what}; write one object per line$"):
            JsonlCorpus([write_rows(tmp_path / "good.jsonl", [{}]), path], max_rows=1, choose_format=choose_format)


def test_whole_surrogate_pairs_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00 \\\\ud83d"}')
    assert JsonlCorpus(path)[0] == {"text": "\U0001f600 \\ud83d"}


def refuse_odd(record):
    if record["row"] % 2:
        raise ValueError(f"{record['row']} is odd")
    return {"half": record["row"] // 2}


def test_parse_is_applied_and_its_reason_given_a_place(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"row": 0}, {"row": 1}, {"row": 4}])
    corpus = JsonlCorpus(path, parse=refuse_odd)
    assert corpus[[0, 2]] == [{"half": 0}, {"half": 2}]
    with pytest.raises(DataError, match=f"^{path}, line 2: 1 is odd$"):
        corpus[1]


def decode_number(line):
    return {"row": int(line)}


def numbers_below_a_header(path, first_line):
    if path.suffix == ".txt" and first_line not in (b"", b"numbers"):
        raise ValueError(f"no header but {first_line.decode()}")
    return LineFormat(decode_number, has_header=True) if path.suffix == ".txt" else JSON_LINES


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_each_file_has_its_format(tmp_path, line_end):
    plain = write_rows(tmp_path / "a.jsonl", [{"row": 0}, {"row": 1}])
    numbers, empty = tmp_path / "b.txt", tmp_path / "c.txt"
    numbers.write_bytes(b"\xef\xbb\xbf" + line_end.join(["", "numbers", "2", "", "three", "4", ""]).encode())
    empty.write_text("")
    corpus = JsonlCorpus([plain, numbers, empty, plain], choose_format=numbers_below_a_header)
    for same in (corpus, pickle.loads(pickle.dumps(corpus))):
        assert len(same) == 7 and same[[0, 1, 2, 4, 5, 6]] == [{"row": i} for i in (0, 1, 2, 4, 0, 1)]
        assert [same.format_of(i) is JSON_LINES for i in range(7)] == [True, True, False, False, False, True, True]
        assert same.raw(2) == b"2" and same.where(2) == f"{numbers}, line 3"
        with pytest.raises(DataError, match=f"^{numbers}, line 5: invalid literal .* b'three'"):
            same[3]
    few = JsonlCorpus([plain, numbers], max_rows=3, choose_format=numbers_below_a_header)
    assert list(few) == [{"row": 0}, {"row": 1}, {"row": 2}]
    numbers.write_text("7\n8\n")
    with pytest.raises(DataError, match=f"^{numbers}: no header but 7$"):
        JsonlCorpus([plain, numbers], choose_format=numbers_below_a_header)


def test_a_record_is_what_parse_is_given(tmp_path):
    corpus = JsonlCorpus(write_rows(tmp_path / "a.jsonl", [{"row": 1}]), parse=refuse_odd)
    assert corpus.record(0) == {"row": 1}
    with pytest.raises(DataError, match="1 is odd"):
        corpus[0]


def test_missing_file(tmp_path):
    for name in ("none.jsonl", "none.jsonl.gz"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            JsonlCorpus([tmp_path / name])
    with pytest.raises(FileNotFoundError, match="directory"):
        JsonlCorpus(tmp_path)
    existing = write_rows(tmp_path / "a.jsonl", [{}])
    with pytest.raises(FileNotFoundError):  # noticed although no row of it would be read
        JsonlCorpus([existing, tmp_path / "none.jsonl"], max_rows=1)


def count_searches(monkeypatch):
    searched = []
    find = jsonl.find_offsets
    monkeypatch.setattr(jsonl, "find_offsets", lambda *arguments: searched.append(1) or find(*arguments))
    return searched


def test_offsets_are_cached_until_the_file_changes(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [{"row": 11}, {"row": 22}])
    searched = count_searches(monkeypatch)
    assert list(JsonlCorpus(path)) == [{"row": 11}, {"row": 22}] and len(searched) == 1
    (entry,) = entries(tmp_path)
    assert np.load(entry).tolist() == [0, 12] and np.load(entry).dtype == np.int64
    os.utime(path, ns=(0, 5))  # only the content counts
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.jsonl", FOLDER):
        os.rename(tmp_path / name, moved / name)
    path = moved / "a.jsonl"
    assert list(JsonlCorpus(path)) == [{"row": 11}, {"row": 22}] and len(searched) == 1
    assert sorted(os.listdir(moved)) == [FOLDER, "a.jsonl"]

    status = path.stat()
    path.write_text('{"row":123456789}\n{}\n{}\n')  # as long and as old as before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    for _ in range(2):
        assert list(JsonlCorpus(path)) == [{"row": 123456789}, {}, {}] and len(searched) == 2
    assert len(entries(moved)) == 1 and entries(moved) != [entry]


@pytest.mark.parametrize("kind", ["offsets", "text"])
@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x93NUMPY\x01\x00", "cut", "grown", "first", "middle", "last"])
def test_damaged_entry_is_made_again(tmp_path, damage, kind):
    rows = [{"row": i} for i in range(9)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    if kind == "text":
        path.write_bytes(gzip.compress(path.read_bytes()))
        path = path.rename(tmp_path / "a.jsonl.gz")
    JsonlCorpus(path)
    (entry,) = (path for path in entries(tmp_path) if f".{kind}" in path.name)
    good = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(good[:-5])
    elif damage == "grown":
        entry.write_bytes(good + b"\n")
    elif damage in ("first", "middle", "last"):
        at = {"first": 0, "middle": len(good) // 2, "last": len(good) - 1}[damage]
        entry.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    else:
        entry.write_bytes(damage)
    assert list(JsonlCorpus(path)) == rows
    assert entry.read_bytes() == good


def test_damage_between_the_blocks_of_a_fingerprint_is_not_believed(tmp_path, monkeypatch):
    """Of a large entry only a sample is read when it is opened: what is wrong elsewhere is seen at its row."""
    monkeypatch.setattr(cache, "BLOCKS", 2)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 256)
    path = write_rows(tmp_path / "a.jsonl", [{"row": i} for i in range(200)])
    JsonlCorpus(path)
    (entry,) = entries(tmp_path)
    content = bytearray(entry.read_bytes())
    content[128 + 8 * 100] ^= 1
    entry.write_bytes(content)
    corpus = JsonlCorpus(path)
    assert corpus[99] == {"row": 99} and corpus[101] == {"row": 101}
    with pytest.raises(DataError, match=f"^{entry} is damaged: remove it, and it will be made again$"):
        corpus[100]


def write_to_a_full_disk(monkeypatch, *full):
    """Let nothing be written below these directories, as root too would see it."""
    made = cache.temporary

    def refuse(path):
        if any(path.is_relative_to(directory) for directory in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return made(path)

    monkeypatch.setattr(cache, "temporary", refuse)


@pytest.mark.parametrize("why", ["no directory", "full"])
def test_the_users_cache_is_taken_where_nothing_can_be_written_beside(tmp_path, monkeypatch, why):
    home, data = tmp_path / "home", tmp_path / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    data.mkdir()
    if why == "full":
        write_to_a_full_disk(monkeypatch, data)
    else:
        (data / FOLDER).write_text("in the way")  # unlike a read-only directory it stops root as well
    before = sorted(os.listdir(data))
    plain = write_rows(data / "a.jsonl", [{"row": 0}])
    packed = data / "b.jsonl.gz"
    searched = count_searches(monkeypatch)
    for version in (1, 2):
        packed.write_bytes(gzip.compress(b'{"row": 1}\n' * version))
        for _ in range(2):
            assert list(JsonlCorpus([plain, packed])) == [{"row": 0}, *[{"row": 1}] * version]
        assert len(os.listdir(home / "atlas")) == 3  # two files of offsets, one of text
    assert len(searched) == 3 and sorted(os.listdir(data)) == sorted([*before, "a.jsonl", "b.jsonl.gz"])


def test_where_nothing_can_be_written_at_all(tmp_path, monkeypatch):
    """Offsets stay in memory; of an unpacked file that is too much, so a sentence says where there is no room."""
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    write_to_a_full_disk(monkeypatch, tmp_path)
    path = write_rows(tmp_path / "a.jsonl", [{"row": 0}, {"row": 1}])
    assert list(JsonlCorpus(path)) == [{"row": 0}, {"row": 1}]
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    sentence = (
        f"^{packed}: there is no place to unpack it \\({tmp_path / FOLDER}: No space left on device; {home}/atlas: No"
    )
    with pytest.raises(DataError, match=sentence):
        JsonlCorpus(packed)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "b.jsonl.gz", "home"]


def test_gz_is_read_from_the_cache_and_the_file_beside_it_is_left_alone(tmp_path):
    """Whatever else lies under the name without `.gz`, of whatever age, is somebody else's."""
    packed, own = tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl"
    packed.write_bytes(gzip.compress(b'{"row": 0}\n{"row": 1}\n'))
    own.write_text('{"mine": true}\n')
    later = packed.stat().st_mtime_ns + 1_000_000_000
    os.utime(own, ns=(later, later))
    corpus = JsonlCorpus(packed)
    assert list(corpus) == [{"row": 0}, {"row": 1}] and corpus.where(1) == f"{packed}, line 2"
    (text,) = (path for path in entries(tmp_path) if path.suffix == ".text")
    inode = text.stat().st_ino
    assert len(JsonlCorpus(packed)) == 2 and text.stat().st_ino == inode  # unpacked once

    packed.write_bytes(gzip.compress(b'{"row": 7}\n'))
    os.utime(packed, ns=(0, 0))
    assert list(JsonlCorpus(packed)) == [{"row": 7}]
    assert list(corpus) == [{"row": 0}, {"row": 1}]  # opened before: still reads what it opened
    assert len([path for path in entries(tmp_path) if path.suffix == ".text"]) == 1  # nothing piles up
    assert own.read_text() == '{"mine": true}\n' and own.stat().st_mtime_ns == later
    assert sorted(os.listdir(tmp_path)) == [FOLDER, "a.jsonl", "a.jsonl.gz"]


def test_offsets_of_an_earlier_version_are_not_used_and_that_is_said_once(tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", [{"row": 0}, {"row": 1}])
    old = tmp_path / "a.jsonl.offsets.npy"
    np.save(old, np.array([1, path.stat().st_size, path.stat().st_mtime_ns, 0]))
    content = old.read_bytes()
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert len(JsonlCorpus(path)) == 2
    assert caplog.messages == [f"{old} is of an earlier version of this program and no longer used: you may remove it"]
    assert old.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b'{"row": 0}\n' * 1000)[:-20]], ids=["not gzip", "cut short"]
)
def test_damaged_gz_is_named_and_leaves_nothing(tmp_path, content):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(content)
    with pytest.raises(DataError, match=f"^{packed}: damaged gzip file"):
        JsonlCorpus(packed)
    assert os.listdir(tmp_path) == ["a.jsonl.gz"]


def open_at_the_same_time(paths, barrier, queue):
    jsonl.CACHE_FROM = 0
    barrier.wait()
    queue.put([list(JsonlCorpus(path)) for path in paths])


@pytest.mark.processes
def test_several_processes_fill_the_cache_at_the_same_time(tmp_path):
    rows = [{"row": i} for i in range(5000)]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    arguments = ([packed, plain], barrier, queue)
    children = [context.Process(target=open_at_the_same_time, args=arguments) for _ in range(4)]
    for child in children:
        child.start()
    assert all(queue.get(timeout=HANG_SECONDS) == [rows, rows] for _ in children)
    for child in children:
        child.join()
    assert len(entries(tmp_path)) == 3 and all(path.suffix in (".text", ".npy") for path in entries(tmp_path))


def unpack_and_hang(path, unpacking):
    copy = jsonl.shutil.copyfileobj

    def hang(source, target, size):
        copy(source, target, size)
        unpacking.set()
        signal.pause()

    jsonl.shutil.copyfileobj = hang
    JsonlCorpus(path)


@pytest.mark.processes
def test_what_a_killed_process_has_left_is_removed_but_not_what_one_is_writing(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"row": 0}\n'))
    context = multiprocessing.get_context("fork")
    unpacking = context.Event()
    child = context.Process(target=unpack_and_hang, args=(packed, unpacking))
    child.start()
    assert unpacking.wait(HANG_SECONDS)
    half = [path for path in entries(tmp_path) if path.suffix == ".part"]
    assert len(half) == 1 and len(JsonlCorpus(packed)) == 1 and half[0].exists()
    child.kill()
    child.join()
    for path in entries(tmp_path):
        if path != half[0]:
            path.unlink()
    assert len(JsonlCorpus(packed)) == 1 and not half[0].exists()


def test_pickled_it_opens_the_files_again(tmp_path):
    paths = [random_file(tmp_path / f"{n}.jsonl", n) for n in range(2)]
    corpus = JsonlCorpus(paths, max_rows=300)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 500  # neither offsets nor text
    assert list(pickle.loads(pickled)) == list(corpus) == plain_reader(*paths)[0][:300]
    halved = JsonlCorpus(write_rows(tmp_path / "even.jsonl", [{"row": 8}]), parse=refuse_odd)
    assert list(pickle.loads(pickle.dumps(halved))) == [{"half": 4}]


def read_in_child(corpus, queue):
    queue.put([corpus[i] for i in range(len(corpus))])


@pytest.mark.processes
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_read_in_other_processes(tmp_path, method):
    corpus = JsonlCorpus(random_file(tmp_path / "a.jsonl", 3))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(corpus, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=HANG_SECONDS) for _ in children] == [list(corpus)] * 2
    for child in children:
        child.join()


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as beside:
        beside.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_replacing_removes_what_killed_writers_of_the_same_file_have_left(tmp_path):
    ours, others = tmp_path / ".a.0123abcd.part", tmp_path / ".ab.0123abcd.part"
    mine = [others, tmp_path / ".a.part", tmp_path / "a.0123abcd.part", tmp_path / ".a.notes.part"]
    for path in (ours, *mine):
        path.write_text("half")
    with held_elsewhere(ours), replacing(tmp_path / "a") as beside:  # it is still being written
        assert ours.exists() and beside.exists()
    ours.write_text("half")
    with replacing(tmp_path / "a"):
        assert not ours.exists()
    assert all(path.exists() for path in mine)


def test_small_files_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CACHE_FROM", 100)
    for size in (50, 150):
        (tmp_path / f"{size}.jsonl").write_text('{"a": 1}\n' * (size // 9 + 1))
        JsonlCorpus(tmp_path / f"{size}.jsonl")
    assert sorted(os.listdir(tmp_path)) == [FOLDER, "150.jsonl", "50.jsonl"] and len(entries(tmp_path)) == 1


def test_rows_are_dropped_again(tmp_path):
    """Each time counted among those that are left."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"i": {i}}}\n' for i in range(10)))
    corpus, left = JsonlCorpus(path), list(range(10))
    for rows in ([], [0, 4, 9], [1, 2], [4]):
        corpus.drop(rows)
        left = [i for place, i in enumerate(left) if place not in rows]
        assert [row["i"] for row in corpus] == left
        assert [row["i"] for row in pickle.loads(pickle.dumps(corpus))] == left


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="not on Linux")
def test_nothing_is_read_ahead_of_scattered_rows(tmp_path):
    """A row that is looked up takes a page of the disk, where in order megabytes are read at a time."""
    path = write_rows(tmp_path / "a.jsonl", [{"row": i} for i in range(20)])
    seen = []

    def look(row):
        mappings = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1:]
        flags = [line for text in mappings for line in text.splitlines() if line.startswith("VmFlags")][0].split()
        seen.append("rr" in flags)  # random reads
        return row

    corpus = JsonlCorpus([path, write_rows(tmp_path / "empty.jsonl", [])], parse=look)
    assert [row["row"] for row in corpus[[7, 3]]] == [7, 3] and seen == [True, True]
    seen.clear()
    assert len(corpus[:5]) == 5 and corpus[19] == {"row": 19} and not any(seen)
    with pytest.raises(IndexError):
        corpus[[20]]
    assert corpus[0] and not seen[-1]
