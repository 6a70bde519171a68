"""prepare_qa.py, prepare_fever.py, prepare_mmlu.py and prepare_templama.py, from made-up originals to their files."""

import csv
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import json_stream
import prepare_fever
import prepare_qa
import prepare_templama
import sources
from atlas.files.jsonl import DataError
from atlas.tasks.base import example_rng
from tests.kit import make_task, read_jsonl
from tests.origin import ROOT, one_sentence, run_script, running, status, storm

pytestmark = pytest.mark.processes

PUBLISHED = json.loads((ROOT / "preprocessing/few_shot_indices.json").read_text())
LETTERS = "ABCD"
QUICK = ("--retry_wait", "0.001")


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tar(files: dict[str, bytes], compressed: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), 1) if compressed else buffer.getvalue()


def nq(split, i):
    return {"question": f"{split} question {i} – ünï", "answer": [f"{split} answer {i}", "the same"]}


def trivia(split, i):
    value = "DON BRADMAN" if i % 2 else f"Answer {i}"
    return {
        "Answer": {"Aliases": [value, " ", f"alias {i}"], "NormalizedAliases": [value.lower()], "Value": value},
        "Question": f"{split} trivia {i}?",
        "QuestionId": f"tc_{i}",
        "SearchResults": [{"Title": ']}{["', "Rank": 1.5}],
    }


def trivia_file(split, number) -> bytes:
    items = ",\n        ".join(json.dumps(trivia(split, i)) for i in range(number))
    text = '{\n    "Version": 1.0,\n    "Data": [\n        ' + items + '\n    ],\n    "Domain": "unfiltered-web"\n}'
    return text.encode()


POSITIONS = {
    "NQ": {"train": list(range(70_000, 69_000, -1)), "dev": [5, 3, 70_001], "test": [9, 0, 4]},
    "TQA": {"train": list(range(200, 1400)), "dev": [1, 0], "test": [2, 5, 7, 3]},
}


@pytest.fixture(scope="module")
def qa_originals() -> dict[str, bytes]:
    indices = {
        f"dataindex/{name}.{split}.idx.json": json.dumps(positions).encode()
        for name, splits in POSITIONS.items()
        for split, positions in splits.items()
    }
    return {
        "/dataindex.tar.gz": tar({"dataindex/README": b"hello", **indices}),
        "/NQ-open.train.jsonl": jsonl(nq("train", i) for i in range(max(PUBLISHED["naturalquestions"]) + 1)),
        "/NQ-open.dev.jsonl": jsonl(nq("dev", i) for i in range(10)),
        "/triviaqa-unfiltered.tar.gz": tar(
            {
                "triviaqa-unfiltered/README": b"hello",
                "triviaqa-unfiltered/unfiltered-web-dev.json": trivia_file("dev", 10),
                "triviaqa-unfiltered/unfiltered-web-train.json": trivia_file("train", max(PUBLISHED["triviaqa"]) + 1),
                "triviaqa-unfiltered/unfiltered-web-test-without-answers.json": b"{broken",
            }
        ),
    }


@pytest.fixture
def origin():
    with running() as origin:
        yield origin


def prepare(name, origin, directory, *words):
    return run_script(f"prepare_{name}", "--output_directory", directory, "--base_url", origin.url, *QUICK, *words)


def outputs(directory) -> dict[str, list[dict]]:
    return {str(path.relative_to(directory)): read_jsonl(path) for path in directory.rglob("*.jsonl")}


def expected_nq(split, positions):
    rows = [nq(split, i) for i in positions]
    return [{"question": row["question"], "answers": row["answer"]} for row in rows]


def expected_trivia(split, positions):
    rows = [trivia(split, i) for i in positions]
    targets = ["Don Bradman" if i % 2 else f"Answer {i}" for i in positions]
    return [
        {
            "question": row["Question"],
            "target": target,
            "answers": [alias for alias in row["Answer"]["Aliases"] if alias != " "],
        }
        for row, target in zip(rows, targets, strict=True)
    ]


def test_qa(origin, tmp_path, qa_originals):
    origin.files |= qa_originals
    for path in ("/NQ-open.train.jsonl", "/triviaqa-unfiltered.tar.gz"):
        origin.faults[path] = storm(len(origin.files[path]))
    done = prepare("qa", origin, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    made = outputs(tmp_path)
    assert {name: len(rows) for name, rows in made.items()} == {
        f"{directory}/{file}": lines
        for directory, train, dev, test in (("nq_data", 1000, 3, 3), ("triviaqa_data", 1200, 2, 4))
        for file, lines in {
            "train.jsonl": train,
            "dev.jsonl": dev,
            "test.jsonl": test,
            "train.64-shot.jsonl": 64,
            "train.100-shot.jsonl": 100,
        }.items()
    }
    for directory, short, long, expected in (
        ("nq_data", "NQ", "naturalquestions", expected_nq),
        ("triviaqa_data", "TQA", "triviaqa", expected_trivia),
    ):
        assert made[f"{directory}/train.jsonl"] == expected("train", POSITIONS[short]["train"])
        assert made[f"{directory}/dev.jsonl"] == expected("train", POSITIONS[short]["dev"])
        assert made[f"{directory}/test.jsonl"] == expected("dev", POSITIONS[short]["test"])
        assert made[f"{directory}/train.64-shot.jsonl"] == expected("train", PUBLISHED[long])
        few = made[f"{directory}/train.100-shot.jsonl"]
        assert len({row["question"] for row in few}) == 100
        assert all(row in made[f"{directory}/train.jsonl"] for row in few)
    task = make_task("qa")
    for rows in made.values():
        assert all(task.process(row, example_rng(0, 0, 0)).answers == row["answers"] for row in rows)
    assert not (tmp_path / "downloads").exists() and not list(tmp_path.rglob("*.part*"))


@pytest.mark.slow
def test_qa_again(origin, tmp_path, qa_originals):
    origin.files |= qa_originals
    words = ("--shots", "8", "32", "64", "--keep_downloads")
    assert prepare("qa", origin, tmp_path, *words).returncode == 0
    made = outputs(tmp_path)
    assert {file.name for file in (tmp_path / "nq_data").iterdir()} == {
        *("train.jsonl", "dev.jsonl", "test.jsonl"),
        *(f"train.{n}-shot.jsonl" for n in (8, 32, 64)),
    }
    assert made["nq_data/train.8-shot.jsonl"] == made["nq_data/train.32-shot.jsonl"][:8]
    assert made["nq_data/train.64-shot.jsonl"][:8] != made["nq_data/train.8-shot.jsonl"]
    assert len(list((tmp_path / "downloads").iterdir())) == 4

    origin.log.clear()  # all there: nothing is asked for
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = prepare("qa", origin, tmp_path, *words)
    assert done.returncode == 0 and "12 files" in done.stdout and origin.log == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times

    damaged = tmp_path / "nq_data/dev.jsonl"  # put right from the downloads that were kept; what stood there is kept
    damaged.write_text("mine\n")
    done = prepare("qa", origin, tmp_path, *words)
    assert done.returncode == 0 and "dev.jsonl.old-1" in done.stdout
    assert (tmp_path / "nq_data/dev.jsonl.old-1").read_text() == "mine\n"
    assert outputs(tmp_path) == made and not any(method == "GET" for method, *_ in origin.log)

    other = prepare("qa", origin, tmp_path, "--shots", "8", "64", "--seed", "1")
    assert other.returncode == 0 and "old" not in other.stdout  # our own files are replaced without a copy
    seeded = outputs(tmp_path)
    assert seeded["nq_data/train.8-shot.jsonl"] != made["nq_data/train.8-shot.jsonl"]
    assert seeded["nq_data/train.64-shot.jsonl"] == made["nq_data/train.64-shot.jsonl"]
    assert not (tmp_path / "downloads").exists()


def qa_wheel(changes: dict[str, str]) -> bytes:
    """A package with a jar that has the questions, as DPR's files are written."""
    plain = 'who? \t[\'Ünï\']\r\nwhere?\t"[\'a\', ""it\'s""]"\r\n'
    quoted = '"""What is """"x""""?"""\t[\'x\', \' \']\nWho said "hm"?\t[\'y\']\n'
    topics = {name: quoted if "trivia" in name else plain for name in prepare_qa.TOPICS} | changes
    jar = zipped({"other.class": "x", **topics})
    return zipped({"pyserini/__init__.py": "raise SystemExit", "pyserini/jars/a-fatjar.jar": jar})


def zipped(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_qa_from_a_package(tmp_path):
    original = sources.QA_PACKAGE.name
    originals = save(tmp_path, {f"/{original}": qa_wheel({})})
    made = dict(prepare_qa.prepare_from_package(originals))
    assert made.keys() == {f"{name}_data/{split}.jsonl" for name in ("nq", "triviaqa") for split in ("dev", "test")}
    assert made["nq_data/test.jsonl"] == [
        {"question": "who? ", "answers": ["Ünï"]},
        {"question": "where?", "answers": ["a", "it's"]},
    ]
    assert made["triviaqa_data/dev.jsonl"] == [
        {"question": 'What is "x"?', "answers": ["x"]},
        {"question": 'Who said "hm"?', "answers": ["y"]},
    ]
    for content, words in (
        ("who?\t['a']\nwhere?\n", "line 2: expected a question, a tab and a list of answers"),
        ("who?\t__import__('os')\n", "line 1: expected a question, a tab"),
        ("who?\t[1]\n", "line 1: .*`answers` must be a list of strings"),
    ):
        originals = save(tmp_path, {f"/{original}": qa_wheel({"topics-and-qrels/topics.nq.dev.txt": content})})
        with pytest.raises(DataError, match=words):
            list(prepare_qa.prepare_from_package(originals))
    originals = save(tmp_path, {f"/{original}": zipped({"a-fatjar.jar": zipped({"b": "c"})})})
    with pytest.raises(DataError, match="it does not contain topics-and-qrels/topics.dpr.trivia.dev.txt"):
        list(prepare_qa.prepare_from_package(originals))


def test_a_package_has_no_few_shot_questions(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare_qa.py", "--from_package", "--shots", "64"])
    with pytest.raises(SystemExit, match="2"):
        prepare_qa.main()
    assert "--shots and --seed choose training questions, of which --from_package has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "sentence"),
    [("two", "--parallel: invalid int value: 'two'"), ("0", "--parallel: 0 is no number of at least 1")],
)
def test_numbers_that_are_none(monkeypatch, capsys, value, sentence):
    monkeypatch.setattr("sys.argv", ["prepare_qa.py", "--parallel", value])
    with pytest.raises(SystemExit, match="2"):
        prepare_qa.main()
    assert sentence in capsys.readouterr().err


def test_more_shots_than_questions(origin, tmp_path, qa_originals):
    origin.files |= qa_originals
    message = one_sentence(prepare("qa", origin, tmp_path, "--shots", "5000"))
    assert "--shots 5000: naturalquestions has only 1,000" in message


def save(directory, originals: dict[str, bytes]) -> dict[str, Path]:
    """What the scripts would have downloaded."""
    for name, content in originals.items():
        (directory / name.strip("/")).write_bytes(content)
    return {path.name: path for path in directory.iterdir()}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ([90_000], "not the file that was published"),
        ([-1], "not the file that was published"),
        ("x", "list of whole numbers"),
        ([True], "list of whole numbers"),
        (None, "does not contain NQ.dev.idx.json"),
    ],
)
def test_wrong_positions(tmp_path, qa_originals, wrong, words):
    files = {
        f"dataindex/{name}.{split}.idx.json": json.dumps(wrong if split == "dev" else positions).encode()
        for name, splits in POSITIONS.items()
        for split, positions in splits.items()
        if wrong is not None or split != "dev"
    }
    originals = save(tmp_path, qa_originals | {"/dataindex.tar.gz": tar(files)})
    with pytest.raises(DataError, match=words):
        list(prepare_qa.prepare(originals, shots=[], seed=0))


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"question": "x"', "line 3: not JSON"),
        (b'{"question": "x", "answer": "y"}', "line 3: `answer` must be a list"),
        (b'{"answer": ["y"]}', "line 3: `question` must be a string"),
    ],
)
def test_wrong_lines(tmp_path, qa_originals, line, words):
    train = jsonl(nq("train", i) for i in range(2))
    originals = save(tmp_path, qa_originals | {"/NQ-open.train.jsonl": train + line + b"\n"})
    with pytest.raises(DataError, match=f"NQ-open.train.jsonl, {words}"):
        list(prepare_qa.prepare(originals, shots=[], seed=0))


@pytest.mark.parametrize(
    "content, words",
    [
        (
            b'{"Data": [{"Question": "q", "Answer": {"Aliases": [], "Value": "a"}}, {}]}',
            "item 2 of `Data`: no `Answer`",
        ),
        (b'{"Data": {}}', "no array `Data`"),
        (b'{"Other": [1, 2], "Data"', "no end of the value"),
        (b'{"Other": [1, 2], "Data" ', "ends too early"),
        (b'{"Data": [{"Question": "q"', "not JSON"),
        (b"[" * 100_000, "expected {"),
        (b'{"Data": [' + b"[" * 100_000, "nested too deeply"),
        (b'{"Data": ["\xff"]}', "utf-8"),
    ],
)
def test_triviaqa_that_is_none(tmp_path, content, words):
    archive = tmp_path / "triviaqa-unfiltered.tar.gz"
    archive.write_bytes(tar({"t/unfiltered-web-dev.json": content}))
    with pytest.raises(DataError, match=f"triviaqa-unfiltered.tar.gz, .*unfiltered-web-dev.json.*{words}"):
        prepare_qa.read_files(archive, {"unfiltered-web-dev.json": prepare_qa.read_triviaqa})


def test_the_same_file_in_two_places(tmp_path):
    archive = tmp_path / "triviaqa-unfiltered.tar.gz"
    archive.write_bytes(tar({f"{folder}/unfiltered-web-dev.json": trivia_file("dev", 2) for folder in "ab"}))
    with pytest.raises(DataError, match="more than once"):
        prepare_qa.read_files(archive, {"unfiltered-web-dev.json": prepare_qa.read_triviaqa})


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    "document",
    [
        {"Data": []},
        {"Data": [1, 23.5, -4e10, "é]}{[,\u2028", None, True, [], {}, [[1]], {"Data": [9]}]},
        {"a": {"Data": [0]}, "Data": "x", "b": 12},
        {"x": 1.25, "Data": [123456, 789], "Data2": [3]},
    ],
)
def test_items_of_a_stream_are_those_of_the_whole(monkeypatch, document, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    for layout in ({}, {"indent": 4}, {"ensure_ascii": False, "separators": (",", ":")}):
        stream = io.BytesIO(json.dumps(document, **layout).encode())
        if isinstance(document["Data"], list):
            assert list(json_stream.array_items(stream, "Data")) == document["Data"]
        else:
            with pytest.raises(ValueError, match="no array"):
                list(json_stream.array_items(stream, "Data"))


def test_an_endless_item(monkeypatch):
    monkeypatch.setattr(json_stream, "ITEM_LIMIT", 1000)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    stream = io.BytesIO(b'{"Data": ["' + b"x" * 10**6)
    with pytest.raises(ValueError, match="more than 1,000 characters"):
        list(json_stream.array_items(stream, "Data"))
    assert stream.tell() < 5000


FEVER_LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def fever(i, **more):
    label = FEVER_LABELS[i % 3]
    return {
        "id": i,
        "verifiable": "VERIFIABLE",
        "label": label,
        "claim": f"Claim {i}.",
        "evidence": [[[1, None]]],
        **more,
    }


def test_fever(origin, tmp_path):
    # 143,221 short lines: the published positions need so many
    train = [b'{"id": %d, "label": "SUPPORTS", "claim": "c"}\n' % i for i in range(max(PUBLISHED["fever"]) + 1)]
    dev = [fever(i) for i in range(5)]
    test = [{"id": i, "claim": f"Test {i}."} for i in range(7)]
    origin.files |= {
        "/train.jsonl": b"".join(train),
        "/shared_task_dev.jsonl": jsonl(dev),
        "/shared_task_test.jsonl": jsonl(test),
    }
    origin.faults["/train.jsonl"] = storm(len(origin.files["/train.jsonl"]))
    done = prepare("fever", origin, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "fever_data/train.jsonl").read_bytes() == b"".join(train)
    few = read_jsonl(tmp_path / "fever_data/train-64.jsonl")
    assert few == [json.loads(train[i]) for i in sorted(PUBLISHED["fever"])]
    assert read_jsonl(tmp_path / "fever_data/dev.jsonl") == dev
    assert read_jsonl(tmp_path / "fever_data/test.jsonl") == test


@pytest.mark.parametrize(
    "row, words",
    [
        (fever(1, label="TRUE"), "line 2: `label` must be one of"),
        (fever(1, claim=" "), "line 2: `claim` must be a string"),
        (fever(1), "not the file that was published"),
    ],
)
def test_fever_sentences(tmp_path, row, words):
    originals = save(tmp_path, {"/train.jsonl": jsonl([fever(0), row])})
    with pytest.raises(DataError, match=f"train.jsonl.*{words}"):
        list(prepare_fever.prepare(originals))


def mmlu_rows(name, number):
    return [[f'{name}, "{i}"\nsecond line', "one", "2", "", "four, really", LETTERS[i % 4]] for i in range(number)]


def mmlu_files() -> dict[str, list[list[str]]]:
    files = {
        "data/auxiliary_train/race.csv": mmlu_rows("race", 6),
        "data/auxiliary_train/arc_easy.csv": mmlu_rows("arc", 3),
    }
    for subject, number in (("anatomy", 4), ("college_physics", 3)):
        for folder, lines in (("dev", 5), ("val", number), ("test", 2 * number)):
            files[f"data/{folder}/{subject}_{folder}.csv"] = mmlu_rows(f"{subject} {folder}", lines)
    return files


def mmlu_archive(files) -> bytes:
    def table(rows):
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        return text.getvalue().encode()

    extras = {"data/README.txt": b"hello", "data/dev/._anatomy_dev.csv": b"\x00\x05\x16", "data/possibly.txt": b"x"}
    return tar({**extras, **{name: table(rows) for name, rows in files.items()}}, compressed=False)


def mmlu_examples(files, *names):
    return [
        {
            "question": row[0],
            "options": dict(zip(LETTERS, row[1:5], strict=True)),
            "answer": row[5],
            "dataset": name.split("/")[-1].removesuffix(".csv"),
        }
        for name in names
        for row in files[f"data/{name}.csv"]
    ]


def test_mmlu(origin, tmp_path):
    files = mmlu_files()
    origin.files["/data.tar"] = mmlu_archive(files)
    origin.faults["/data.tar"] = storm(len(origin.files["/data.tar"]))
    done = prepare("mmlu", origin, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    made = outputs(tmp_path / "data/mmlu_data")
    names = {"train": "dev", "valid": "val", "test": "test"}
    subjects = ("anatomy", "college_physics")
    expected = {
        f"5-shot/{split}/{subject}.{split}.jsonl": mmlu_examples(files, f"{folder}/{subject}_{folder}")
        for split, folder in names.items()
        for subject in subjects
    }
    together = {
        folder: mmlu_examples(files, *(f"{folder}/{s}_{folder}" for s in subjects)) for folder in names.values()
    }
    auxiliary = mmlu_examples(files, "auxiliary_train/arc_easy", "auxiliary_train/race")
    for setting, train in (("5-shot-multitask", together["dev"]), ("full", auxiliary + together["dev"])):
        expected |= {
            f"{setting}/train.jsonl": train,
            f"{setting}/combined_valid.jsonl": together["val"],
            f"{setting}/combined_test.jsonl": together["test"],
        }
    assert made == expected
    assert len(made["full/train.jsonl"]) == 9 + 10


@pytest.mark.parametrize(
    "name, rows, words",
    [
        (
            "data/dev/anatomy_dev.csv",
            [["q", "a", "b", "c", "d", "AB"]],
            "anatomy_dev.csv.*line 1.*letter of the answer",
        ),
        ("data/dev/anatomy_dev.csv", [["q", "a", "b", "c", "d", "A"], ["q", "a", "A"]], "anatomy_dev.csv.*line 2"),
        ("data/dev/anatomy_dev.csv", [["q", "a", "b", "c", "d", ""]], "letter of the answer"),
        ("data/dev/virology_dev.csv", [], "for the same subjects"),
    ],
)
def test_mmlu_sentences(origin, tmp_path, name, rows, words):
    origin.files["/data.tar"] = mmlu_archive(mmlu_files() | {name: rows})
    assert re.search(words, one_sentence(prepare("mmlu", origin, tmp_path)))
    assert not (tmp_path / "data").exists()


def templama(query, date, *names):
    answers = [{"wikidata_id": "Q1", "name": name} for name in names]
    return {
        "query": f"{query} plays for _X_.",
        "answer": answers,
        "date": date,
        "id": f"{query}_{date}",
        "relation": "P54",
    }


def test_templama(origin, tmp_path):
    rows = [
        templama("Changed", "2016", "Before"),
        templama("Changed", "2017", "Old", "Older"),
        templama("Same", "2017", "Club"),
        templama("Changed too", "2017", "Then"),
        templama("Only first", "2017", "Club"),
        templama("Overlap", "2017", "One", "Two"),
        templama("Changed", "2019", "Between"),
        templama("Changed too", "2020", "Now"),
        templama("Changed", "2020", "New"),
        templama("Same", "2020", "Club"),
        templama("Overlap", "2020", "Two", "Three"),
        templama("Only later", "2020", "Club"),
    ]
    origin.files |= {f"/{name}.json": jsonl(rows) for name in ("train", "val")}
    origin.files["/test.json"] = jsonl(rows[:1])
    origin.faults["/val.json"] = storm(len(origin.files["/val.json"]))
    done = prepare("templama", origin, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    made = outputs(tmp_path / "data/templama_data")
    years = {"2017": (["Old", "Older"], ["Then"]), "2020": (["New"], ["Now"])}
    expected = {f"temp_lama.test.{year}.jsonl": [] for year in years}
    for split in ("train", "valid"):
        for year, answers in years.items():
            expected[f"temp_lama.{split}.{year}.jsonl"] = [
                {
                    "id": f"{query}_{year}",
                    "question": f"{query} plays for <extra_id_0>.",
                    "answers": names,
                    "date": year,
                }
                for query, names in zip(("Changed", "Changed too"), answers, strict=True)
            ]
    assert made == expected
    task = make_task("qa", qa_prompt_format="{question}")
    assert task.process(made["temp_lama.train.2020.jsonl"][0], example_rng(0, 0, 0)).answers == ["New"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"query": "no gap"}, "no _X_"),
        ({"answer": []}, "list of objects"),
        ({"answer": [{"name": ""}]}, "`name` must be a string"),
    ],
)
def test_templama_sentences(tmp_path, changes, words):
    originals = save(
        tmp_path, {"/train.json": jsonl([templama("x", "2017", "y"), templama("x", "2020", "y") | changes])}
    )
    with pytest.raises(DataError, match=f"train.json, line 2: .*{words}"):
        list(prepare_templama.prepare(originals))


def test_nothing_is_left_behind_by_a_refusal(origin, tmp_path):
    for address in sources.TEMPLAMA:
        origin.files["/" + address.rpartition("/")[2]] = b""
    origin.heads["/val.json"] = status(403)
    origin.faults["/val.json"] = [status(403)]
    assert "permission denied (403)" in one_sentence(prepare("templama", origin, tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def hostile() -> dict[str, tuple[Callable[[], bytes], str]]:
    """What makes an archive, by what is wrong with it, and a word of the sentence."""

    def member(name, content=b"import os\n", **changes):
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        for field, value in changes.items():
            setattr(entry, field, value)
        return entry, io.BytesIO(content)

    def archive(*members, format=tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as made:
            for entry, content in members:
                made.addfile(entry, content if entry.isreg() else None)
        return buffer.getvalue()

    def link(name, target, kind):
        return member(name, b"", type=kind, linkname=target)

    def bare_header(entry, size):
        """A header that promises `size` bytes which do not follow."""
        entry.size = size
        return entry.tobuf(tarfile.GNU_FORMAT)

    pax = tarfile.TarInfo("pax")
    pax.type = tarfile.XHDTYPE
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type = tarfile.GNUTYPE_LONGNAME
    whole = archive(member("data/dev/anatomy_dev.csv", b"q,a,b,c,d,A\n" * 5000))
    packed = gzip.compress(whole)
    return {
        "a name that climbs": (lambda: archive(member("../../escaped.py")), "points outside"),
        "an absolute name": (lambda: archive(member("/tmp/escaped.py")), "points outside"),
        "a symbolic link": (
            lambda: archive(link("data", "/tmp", tarfile.SYMTYPE), member("data/escaped.py")),
            "not a plain file",
        ),
        "a hard link": (lambda: archive(link("data/x", "/etc/passwd", tarfile.LNKTYPE)), "not a plain file"),
        "a device": (lambda: archive(link("data/null", "", tarfile.CHRTYPE)), "not a plain file"),
        "a pipe": (lambda: archive(link("data/pipe", "", tarfile.FIFOTYPE)), "not a plain file"),
        "too many files": (
            lambda: archive(*(member(f"data/{i}", b"") for i in range(10_001))),
            "more than 10,000 files",
        ),
        "a file that is too large": (
            lambda: bare_header(tarfile.TarInfo("data/big"), 1 << 40),
            "more than 2,147,483,648 bytes",
        ),
        "a bomb": (
            lambda: gzip.compress(bare_header(tarfile.TarInfo("data/big"), 3 << 30), 1),
            "more than 2,147,483,648 bytes",
        ),
        "an endless header": (
            lambda: gzip.compress(bare_header(pax, 1 << 30) + bytes(64 << 20), 1),
            "more data than",
        ),
        "a chain of long names": (lambda: b"".join([bare_header(long_name, 1) + bytes(512)] * 900), "damaged"),
        "the same name twice": (lambda: archive(member("data/x"), member("./data/x")), "contains it twice"),
        "half of an archive": (lambda: packed[: len(packed) // 2], "damaged"),
        "half of a plain archive": (lambda: whole[:3000], "damaged"),
        "no archive": (lambda: b"<html>Not here any more</html>" * 100, "damaged"),
        "nothing": (lambda: b"", "damaged"),
        "an empty archive": (lambda: archive(), "must contain auxiliary_train"),
    }


HOSTILE = hostile()
OUTSIDE = (Path("/tmp/escaped.py"), ROOT.parent.parent / "escaped.py")  # where they would land


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives(origin, tmp_path, kind):
    made, words = HOSTILE[kind]
    origin.files["/data.tar"] = made()
    home = tmp_path / "a/b/home"
    before = [path.exists() for path in OUTSIDE]
    message = one_sentence(prepare("mmlu", origin, home))
    assert [path.exists() for path in OUTSIDE] == before
    assert words in message and "downloads/data.tar" in message
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["a/b/home/downloads/data.tar"]  # as it came; nothing of what is in it
