"""The report of a run: what it reads, how it judges and counts, what is escaped, how large it is, and in a browser."""

import base64
import json
import re
import time
import zlib
from math import comb

import pytest

from atlas.asking.answers import marks
from atlas.metrics import exact_match
from atlas.report import __main__ as command
from atlas.report import page as page_module
from atlas.report.charts import Curve, chart, number
from atlas.report.packing import Packed
from atlas.report.page import NAME, write_report
from atlas.report.questions import MISSING, RIGHT, UNREAD, WORDED, WRONG, Judging, Reader, mcnemar
from atlas.report.record import Evaluation, Flag, read_record
from tests.browser import browsing, find_browser
from tests.kit import read_jsonl, run
from tests.made_runs import make_run, write_lines

EVIL = "</script><script>evil()</script><img src=x onerror=evil()>"


def head_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="head">(.*?)</script>', text)[1])


def values_of(text, name):
    """What was packed under this name, in the page or in the file beside it."""
    pieces = re.search(rf'(?:id="{name}">|"{name}", ")([^<"]*)', text)[1].split()
    return [value for piece in pieces for value in json.loads(zlib.decompress(base64.b64decode(piece)))]


def questions_of(rows, tmp_path, metrics, **flags):
    """The questions of these rows, as a run with these metrics left them."""
    results = write_lines(tmp_path / "dev-step-1.jsonl", rows)
    record = read_record(tmp_path)
    record.flags = {name: Flag(value, None) for name, value in flags.items()}
    return Reader().questions(record, Evaluation("dev", 1, metrics, results=results), {})


# What a run wrote about itself


def test_what_was_repeated_or_cut_off_counts_once(tmp_path):
    directory = make_run(tmp_path / "run")
    first = read_record(directory)
    assert list(first.training) == [5, 10, 15, 20] and first.files == ["dev", "test"] and first.seconds == 203
    assert [(e.file, e.step) for e in first.evaluations] == [("dev", 10), ("dev", 20), ("test", 10), ("test", 20)]
    assert first.flags["task"] == Flag("qa", "None") and first.flags["seed"] == Flag("0", None)
    with open(directory / "metrics.jsonl", "a") as file:
        again = [
            {"kind": "start", "time": 2e9, "step": 10, "command": ["train.py", "--lr", "1"]},
            {"kind": "train", "time": 2e9 + 5, "step": 15, "lr": 7.0, "loss/train_loss": float("nan")},
            {"kind": "start", "time": 3e9, "step": 10, "command": ["evaluate.py", "--name", "run"]},
            {"kind": "evaluation", "time": 3e9 + 1, "step": 10, "file": "dev", "metrics": {"f1": 3.0}, "results": "x"},
        ]
        file.writelines(json.dumps(line) + "\n" for line in again)
        file.write('{"kind": "train", "time": 4e9, "st')
    record = read_record(directory)
    assert list(record.training) == [5, 10, 15] and record.training[15] == {"lr": 7.0}
    (dev,), (test,) = record.of_file("dev"), record.of_file("test")  # those of step 20 are forgotten
    assert dev.metrics == {"f1": 3.0} and dev.results is None and dev.gone == "x" and test.results is not None
    assert record.seconds == 203 + 5 + 1 and len(record.starts) == 3
    assert record.main_start["command"][0] == "train.py"  # whose flags are in opt.log; the page has both commands
    page = write_report(directory)[0].read_text()
    commands = [page.index(f"<dd>python {words}") for words in ("train.py", "evaluate.py")]
    assert commands == sorted(commands)


LOG = """\
[11/29/2026 02:00:00] One process on the CPU (2 threads), torch 2.13.0, --precision fp32, --embedder_precision fp32
[11/29/2026 02:00:05] 3 / 9 | loss/train_loss: 9 | lr: 0.5 | Memory: 0.70 GiB
[11/29/2026 02:10:00] One process on the CPU (2 threads), torch 2.13.0, --precision fp32, --embedder_precision fp32
[11/29/2026 02:10:01] Dataset: few.jsonl | 97.5 recall@1 | 60 exact_match | 0.933882 eval_loss
[11/29/2026 02:10:02] Evaluated 40 examples in 0.9 s: /elsewhere/few-step-2.jsonl
Traceback (most recent call last):
[11/29/2026 02:10:03] 3 / 9 | loss/train_loss: 1.5 | runtime/retrieve: 0.06 | lr: 5e-05 | Memory: 0.71 GiB
[11/29/2026 02:10:04] Dataset: few.jsonl | 61 exact_match
[11/29/2026 02:10:04] Evaluated 40 examples in 0.9 s
[11/29/2026 02:20:00] 2 processes (gloo), each on the CPU (1 thread), torch 2.13.1, --precision fp32, --embedder x
[11/29/2026 02:20:00] Resuming after step 4 of run/checkpoint/step-4
[11/29/2026 02:20:07] 5 / 9 | loss/train_loss: 1.25 | lr: 5e-05 | Memory: 0.9 GiB
"""


def test_an_older_run_is_read_from_its_log(tmp_path):
    (tmp_path / "run.log").write_text(LOG)
    (tmp_path / "opt.log").write_text("# x\neval_freq: 2    [default: 500]\ntotal_steps: 9\n")
    (tmp_path / "few-step-2.jsonl").touch()
    record = read_record(tmp_path)
    assert record.training == {  # the first start was followed by one from the beginning
        3: {"loss/train_loss": 1.5, "runtime/retrieve": 0.06, "lr": 5e-05, "peak_memory_gib": 0.71},
        5: {"loss/train_loss": 1.25, "lr": 5e-05, "peak_memory_gib": 0.9},
    }
    with_results, without = record.evaluations
    assert (with_results.step, with_results.examples, with_results.seconds) == (2, 40, 0.9)
    assert with_results.metrics == {"recall@1": 97.5, "exact_match": 60, "eval_loss": 0.933882}
    assert with_results.results == tmp_path / "few-step-2.jsonl" and without.results is None
    assert without.step == 4  # the next one that was due
    assert record.starts[-1]["versions"] == {"torch": "2.13.1"} and record.seconds == 5 + 4 + 7
    later = time.mktime(time.strptime("11/30/2026", "%m/%d/%Y"))  # the run goes on with this version
    write_lines(tmp_path / "metrics.jsonl", [{"kind": "start", "time": later, "step": 5, "command": ["train.py"]}])
    assert list(read_record(tmp_path).training) == [3, 5]


def test_result_files_alone_are_enough(tmp_path):
    make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "opt.log"):
        (tmp_path / "run" / name).unlink()
    record = read_record(tmp_path / "run")
    assert [(e.file, e.step) for e in record.evaluations] == [("dev", 10), ("dev", 20), ("test", 10), ("test", 20)]
    assert head_of(write_report(tmp_path / "run")[0])["files"][0]["n"] == 40


# Right, wrong, and why


@pytest.mark.parametrize(
    ("generation", "passages", "kind", "rank"),
    [
        ("The Seine!", ["none", "the river Seine."], RIGHT, 2),
        ("Seine", ["none"], RIGHT, 0),
        ("river Seine", ["none"], WORDED, 0),
        ("Rhine", ["none", "none"], MISSING, 0),
        ("Rhine", ["none", "none", "It is the SEINE", "Seine"], UNREAD, 3),
        ("Rhine", ["Seinelike"], MISSING, 0),
        ("Rhine", [], WRONG, None),
    ],
)
def test_kinds_of_mistakes(generation, passages, kind, rank):
    judging = Judging.of(Evaluation("dev", 1, {"exact_match": 1, "mrr": 1}), {})
    assert judging.rank([{"text": text} for text in passages], ["Seine"]) == rank
    assert judging.kind(generation, ["Seine"], rank) == kind


@pytest.mark.parametrize(
    ("metrics", "flags", "row", "right"),
    [
        ({"accuracy": 1, "f1": 1, "rouge_1": 1}, {"task": "mlm"}, ("<extra_id_0> a  b <extra_id_1> c", "a b c"), True),
        ({"accuracy": 1, "debiased_accuracy": 1}, {"task": "multiple_choice"}, ("B", "B"), True),
        ({"accuracy": 1}, {"task": "fever"}, ("true", "True"), False),
        ({"accuracy": 1, "exact_match": 1, "mrr": 1}, {"task": "kilt"}, ("The Seine", "seine"), True),
        ({"exact_match": 1}, {"metric_unicode": "nfc"}, ("Oe\u0301", "O\u00e9"), True),
        ({"exact_match": 1}, {}, ("Oe\u0301", "O\u00e9"), False),
    ],
)
def test_answers_are_judged_as_the_task_does(metrics, flags, row, right):
    judging = Judging.of(Evaluation("dev", 1, metrics), {name: Flag(value, None) for name, value in flags.items()})
    assert judging.is_right(row[1], [row[0]]) == right


def test_verdicts_are_not_searched_for():
    judging = Judging.of(
        Evaluation("dev", 1, {"accuracy": 1, "exact_match": 1, "mrr": 1}), {"task": Flag("kilt", None)}
    )
    assert judging.rank([{"text": "it is true"}], ["true"]) is None and judging.rank([{"text": "Oslo"}], ["Oslo"]) == 1


def test_mcnemar_is_the_binomial_test():
    for wins, losses in ((0, 0), (10, 2), (3, 3), (1, 0), (40, 61)):
        n, fewer = wins + losses, min(wins, losses)
        expected = min(1.0, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)
        assert mcnemar(wins, losses) == mcnemar(losses, wins) == pytest.approx(expected)
    assert mcnemar(10, 2) == pytest.approx(0.03857, abs=1e-5) and mcnemar(9000, 1000) == 0.0


# The page


def test_every_question_is_there_and_every_passage_once(tmp_path):
    directory = make_run(tmp_path / "run", k=25, corpus=60)
    (page,) = write_report(directory)
    text, rows = page.read_text(encoding="utf-8"), read_jsonl(directory / "dev-step-20.jsonl")
    listed, details, passages = (values_of(text, name) for name in ("listed-0", "details-0", "passages"))
    assert len(listed) == len(details) == 40 and len({tuple(passage) for passage in passages}) == len(passages) <= 60
    earlier = {row["id"]: row for row in read_jsonl(directory / "dev-step-10.jsonl")}
    for row, line, detail in zip(rows, listed, details, strict=True):
        before = earlier[row["id"]]["generation"]
        right, was_right = (exact_match(said, row["answers"]) == 1 for said in (row["generation"], before))
        question = row["query"].removeprefix("question: ").removesuffix(" answer: <extra_id_0>")
        assert line[:6] == [question, row["answers"][0], row["generation"], right, before, was_right]
        assert detail["left out"] == 5 and len(detail["passages"]) == 20
        for (index, score, judgement), passage in zip(detail["passages"], row["passages"][:20], strict=True):
            assert passages[index] == [passage[name] for name in ("id", "title", "section", "text")]
            assert (score, judgement) == (passage["score"], passage["judgement"])


def test_what_does_not_fit_is_in_a_file_beside_the_page(tmp_path, monkeypatch):
    directory = make_run(tmp_path / "run", n=200, corpus=2000)
    (page,) = write_report(directory)
    whole, size = page.read_text(encoding="utf-8"), page.stat().st_size
    passages = values_of(whole, "passages")
    monkeypatch.setattr(page_module, "MOST_BYTES", size - 1)
    page, second = write_report(directory)
    assert page.stat().st_size < size and second == directory / "report.questions.js"
    assert values_of(second.read_text(), "passages") == passages and 'id="passages"' not in page.read_text()
    assert f'packed("{head_of(page)["key"]}", "passages"' in second.read_text()
    monkeypatch.undo()
    assert write_report(directory) == [page] and not second.exists() and page.read_text() == whole
    assert page_module.MOST_BYTES <= 30e6


def test_nothing_of_a_text_is_markup(tmp_path):
    directory = make_run(tmp_path / f"run {EVIL[:8].replace('/', '')}", n=3)
    rows = read_jsonl(directory / "dev-step-20.jsonl")
    for row in rows:
        row |= {"query": EVIL, "answers": [EVIL], "generation": EVIL}
        row["passages"] = [passage | {"title": EVIL, "text": EVIL, "id": EVIL} for passage in row["passages"]]
    write_lines(directory / "dev-step-20.jsonl", rows)
    with open(directory / "metrics.jsonl", "a") as file:
        start = {"kind": "start", "time": 2e9, "step": 20, "command": ["train.py", EVIL, "{{packed}}"], "device": EVIL}
        file.write(json.dumps(start | {"versions": {EVIL: EVIL}}) + "\n")
        metrics = {"kind": "evaluation", "time": 2e9, "step": 20, "file": EVIL, "metrics": {EVIL: 1.0, "f1": 2.0}}
        file.write(json.dumps(metrics) + "\n")
    (directory / "opt.log").write_text(f"task: {EVIL}    [default: {EVIL}]\n", encoding="utf-8")
    text = write_report(directory)[0].read_text(encoding="utf-8")
    assert (
        "evil()</script>" not in text
        and "<img" not in text
        and text.count("<script") == 2 + len(re.findall(r'<script type="text/plain"', text))
    )
    assert "&lt;img src=x onerror=evil()&gt;" in text and "{{packed}}" in text


def test_parts_that_have_nothing_are_left_out(tmp_path):
    """Evaluations of other tasks, and without reader, passages or results."""

    def report(name, rows, metrics, task):
        directory = tmp_path / name
        directory.mkdir()
        lines = [{"kind": "start", "time": 1e9, "step": 0, "command": ["evaluate.py", "--task", task]}]
        lines.append({"kind": "evaluation", "time": 1e9, "step": 0, "file": "dev", "metrics": metrics})
        if rows:
            write_lines(directory / "dev-step-0.jsonl", rows)
            lines[-1]["results"] = "dev-step-0.jsonl"
        write_lines(directory / "metrics.jsonl", lines)
        text = write_report(directory)[0].read_text(encoding="utf-8")
        return text, [re.sub("<.*", "", title) for title in re.findall("<h2>(.*?)</h2>", text)]

    passages = [{"id": "1", "title": "t", "text": "It is Oslo.", "score": 1.0}, {"id": 0, "text": "no"}]
    asked = {"query": "q", "answers": ["Oslo"]}
    text, titles = report("search", [asked | {"passages": passages}], {"recall@1": 100, "mrr": 1.0}, "qa")
    assert titles == ["What was run", "Evaluations", "Retrieval", "Questions"]
    assert values_of(text, "listed-0") == [["q", "Oslo", None, True, None, None, None, 1]]
    assert [passage[0] for passage in values_of(text, "passages")] == ["1", "0"]
    text, titles = report("closed", [asked | {"generation": "Bergen"}], {"exact_match": 0.0, "f1": 0.0}, "qa")
    assert titles == ["What was run", "Evaluations", "What went wrong", "Questions"]
    assert values_of(text, "listed-0") == [["q", "Oslo", "Bergen", False, None, None, WRONG, None]]
    choice = {"query": "q", "answers": ["B"], "generation": "A", "choice_probs": {"A": 0.75, "B": 0.25}}
    text, titles = report("choice", [choice | {"passages": passages}], {"accuracy": 0.0}, "multiple_choice")
    assert titles == ["What was run", "Evaluations", "What went wrong", "Questions"]
    assert values_of(text, "details-0")[0]["choices"] == {"A": 0.75, "B": 0.25}
    gaps = {"query": "a <extra_id_0> c", "answers": ["<extra_id_0> b"], "generation": "b", "passages": passages}
    text, titles = report("gaps", [gaps], {"accuracy": 100.0, "f1": 100.0, "rouge_1": 100.0}, "mlm")
    assert values_of(text, "listed-0")[0][3:] == [True, None, None, RIGHT, None]
    text, titles = report("unwritten", [], {"accuracy": 100.0}, "fever")
    assert titles[:2] == ["What was run", "Evaluations"] and '<section id="questions" hidden>' in text
    text, titles = report("unanswered", [{"query": "q", "answers": [], "passages": passages}], {}, "qa")
    assert values_of(text, "listed-0")[0][3:] == [None, None, None, None, None]


def test_two_runs_side_by_side(tmp_path):
    here, there = make_run(tmp_path / "here"), make_run(tmp_path / "there")
    rows = {name: read_jsonl(tmp_path / name / "dev-step-20.jsonl") for name in ("here", "there")}
    for name, right in (("here", range(30)), ("there", range(20, 35))):
        for i, row in enumerate(rows[name]):
            row["generation"] = row["answers"][0] if i in right else "wrong"
        write_lines(tmp_path / name / "dev-step-20.jsonl", rows[name][:39] if name == "there" else rows[name])
    for path in (tmp_path / "there").glob("test-*"):
        path.unlink()
    (page,) = write_report(here, there)
    assert page == here / "report-beside-there.html"
    text = page.read_text(encoding="utf-8")
    cells = re.search(r"<tr><th>dev</th>((?:<td>[^<]*</td>)+)", text)[1]
    p = f"{mcnemar(20, 5):.3g}"
    assert re.findall("<td>([^<]*)</td>", cells) == ["39", "20", "5", "10", "4", p, "1"]
    assert "Without questions to compare: test" in text and "<th>--name</th>" not in text.split("Flags that differ")[-1]
    listed, details = values_of(text, "listed-0"), values_of(text, "details-0")
    assert listed[0][3:6] == [True, "wrong", False] and listed[39][4:6] == [None, None]
    assert len(details[0]["passages before"]) == 5 and "passages before" not in details[39]


def test_curves():
    drawn = chart("Loss & more", [Curve("a<b", [(1, 2.0), (2, 1.0)]), Curve("empty", [])])
    assert "Loss &amp; more" in drawn and "a&lt;b" in drawn and "empty" not in drawn and drawn.count("<circle") == 2
    assert chart("One point", [Curve("a", [(1, 2.0)])]) == ""
    long = chart("Long", [Curve("a", [(i, i % 7) for i in range(10_000)])])
    assert len(long) < 10_000 and "nan" not in chart("Flat", [Curve("a", [(1, 0.0), (2, 0.0)])])
    assert [number(x) for x in (0, 12345.6, 0.00015, -0.5, 3)] == ["0", "12,346", "1.5e-4", "-0.5", "3"]


def test_packed_values_are_found_again():
    packed = Packed()
    values = [[i, "ü𝔸\ud800"[: 1 + i % 2] * 5000] for i in range(100)]
    assert [packed.add(value) for value in values] == list(range(100))
    packed.finish()
    found = [json.loads(zlib.decompress(base64.b64decode(piece))) for piece in packed.pieces]
    assert len(found) > 2 and sum(found, []) == values
    assert packed.starts == [values.index(piece[0]) for piece in found]


# The command, and the end of a run


def test_the_command(tmp_path, capsys):
    directory = make_run(tmp_path / "run", n=3)
    command.main([str(directory), "--output", str(tmp_path / "mine.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'mine.html'}\n"
    (tmp_path / "letter.html").write_text("<p>dear</p>")
    (tmp_path / "empty").mkdir()
    broken = make_run(tmp_path / "broken", n=3) / "dev-step-20.jsonl"
    broken.write_text(broken.read_text() + "{]")
    for words, status, sentence in (
        (
            [str(directory), "--output", str(tmp_path / "letter.html")],
            1,
            "letter.html is there and is no report: move it",
        ),
        ([str(tmp_path / "empty")], 1, "empty holds nothing of a run: neither metrics.jsonl, run.log nor result files"),
        ([str(broken.parent)], 1, "dev-step-20.jsonl, line 4: not JSON"),
        ([str(tmp_path / "none")], 2, "RUN: there is no directory"),
        ([str(directory), "--compare", str(tmp_path / "none")], 2, "--compare: there is no directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        said = capsys.readouterr().err if status == 2 else ended.value.code
        assert (ended.value.code if status == 2 else 1) == status and sentence in said
    assert (tmp_path / "letter.html").read_text() == "<p>dear</p>"


@pytest.mark.processes
def test_a_run_ends_with_its_report(tmp_path):
    """Its figures are those of the log. What is in the way of the page is said, and the run ends well."""
    directory = run(tmp_path, total_steps=2, eval_freq=1, train_retriever=True)
    page = directory / NAME
    assert f", report in {page}" in (directory / "run.log").read_text().splitlines()[-1]
    (evaluation,) = [e for e in read_record(directory).evaluations if e.step == 2]
    listed = values_of(page.read_text(encoding="utf-8"), "listed-0")
    assert len(listed) == evaluation.examples == 11
    assert 100 * sum(line[3] for line in listed) / 11 == pytest.approx(evaluation.metrics["exact_match"], abs=1e-3)
    assert 100 * sum(line[7] == 1 for line in listed) / 11 == pytest.approx(evaluation.metrics["recall@1"], abs=1e-3)
    page.write_text("my own page")
    run(tmp_path, "evaluate", train_data=None, model_path=directory, closed_book=True)
    log = (directory / "run.log").read_text()
    assert f"{page} is not written: {page} is there and is no report: move it" in log
    assert "report in" not in log.splitlines()[-1] and page.read_text() == "my own page"


@pytest.mark.processes
@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium in PATH")
def test_the_report_in_a_browser(tmp_path, monkeypatch):
    """From a file, by mouse and keyboard, light and dark, wide and narrow; nothing of a text is run."""
    directory = make_run(tmp_path / "run", n=400, corpus=2000)
    rows = read_jsonl(directory / "dev-step-20.jsonl")
    rows[1] |= {"query": EVIL, "answers": [EVIL], "generation": "evil image"}
    rows[1]["passages"][0] |= {"title": EVIL, "text": f"𝔸 {EVIL} an evil script, the Image"}
    write_lines(directory / "dev-step-20.jsonl", rows)
    monkeypatch.setattr(page_module, "MOST_BYTES", 100_000)
    page, second = write_report(directory)
    right = [exact_match(row["generation"], row["answers"]) == 1 for row in rows]
    with browsing(tmp_path / "profile") as tab:

        def text(selector):
            return tab.value(f"document.querySelector({selector!r}).textContent")

        tab.look(1280)
        tab.open(f"file://{page}")
        tab.wait_for("document.querySelectorAll('.row').length > 0")
        assert (
            5 < tab.value("document.querySelectorAll('.row').length") < 40 and text("#found") == "400 of 400 questions"
        )
        tab.click("#row-1")
        tab.wait_for("document.querySelectorAll('#detail .passages li').length === 5")
        assert text("#detail h3") == EVIL and text("#detail .source").startswith(EVIL)
        assert text("#detail .text") == rows[1]["passages"][0]["text"]
        assert tab.value("document.querySelector('#detail .text mark.given').textContent") == "evil"
        shares = tab.value(
            "[...document.querySelectorAll('#detail rect.judgement')].map((e) => e.getAttribute('width'))"
        )
        assert [float(share) / 100 for share in shares] == pytest.approx([p["judgement"] for p in rows[1]["passages"]])
        tab.press("ArrowDown", 40)
        tab.wait_for("document.querySelector('#detail h3').textContent.includes('river of')")
        assert tab.value("document.querySelector('#list').getAttribute('aria-activedescendant')") == "row-2"
        tab.press("End", 35)
        tab.wait_for("document.querySelector('#row-399') !== null && document.querySelector('#row-1') === null")

        tab.click("#filters label:nth-of-type(3) input")
        assert text("#found") == f"{right.count(False)} of 400 questions"
        tab.click("#filters label:nth-of-type(1) input")
        tab.click("#search")
        tab.type("q399 nothing")
        assert text("#found") == "0 of 400 questions"
        tab.value("$('search').value = ''")
        tab.click(".kinds button[data-kind='3']")
        tab.wait_for("document.querySelector('#filters input:checked').dataset.kind === '3'")
        sample = "Ærø-Straße, 3 ærø straße x2"
        for answer in ("ærø straße", "straße zzz", "3", "a b", "x2."):
            assert tab.value(f"places({json.dumps(sample)}, {json.dumps(answer)})") == marks(sample, answer)

        tab.look(390, dark=True)
        assert tab.value("document.documentElement.scrollWidth") == 390
        dark = tab.value("getComputedStyle(document.body).backgroundColor")
        tab.look(390)
        assert dark != tab.value("getComputedStyle(document.body).backgroundColor")
        assert tab.errors == []

        second.rename(tmp_path / "gone.js")
        tab.open(f"file://{page}?again")
        tab.wait_for("document.querySelectorAll('.row').length > 0 || !document.querySelector('#error').hidden")
        tab.value("select(1)")
        tab.wait_for("!document.querySelector('#error').hidden")
        assert text("#error").startswith("report.questions.js is not beside this file")
