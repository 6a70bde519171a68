"""score_retrieval.py: against numbers computed by hand, a slow reference, and the metrics of a run."""

import math
import random

import pytest
import pytrec_eval

from atlas.files.jsonl import DataError
from atlas.files.qrels import read_judgements
from atlas.metrics import RECALL_AT, ndcg, retrieval_metrics
from score_retrieval import Result, by_answers, by_judgements, main, read_results, run_scores, score_files
from tests.kit import write_jsonl
from tests.origin import one_sentence, run_script


def row(identifier, passages, answers=("Paris",)):
    """`passages`: ids and texts."""
    found = [{"id": i, "title": "", "text": text, "score": 9.5 - n} for n, (i, text) in enumerate(passages)]
    return {"query": "q", "answers": list(answers), "passages": found, "id": identifier}


ROWS = [
    row("q1", [("d1", "Rome"), ("d2", "in Paris."), ("d3", "Paris again"), ("d4", "x")]),
    row("q2", [("d3", "Paris"), ("d9", "x"), ("d2", "x"), ("d1", "x")]),
    row("q3", [("d4", "Parisian"), ("d5", "x"), ("d6", "x"), ("d7", "x")]),
    row("q4", [("d1", "x")], answers=()),
]
TREC = "q1 0 d2 2\nq1 0 d4 1\nq1 0 d8 3\nq1 0 d1 0\n\nq2 0 d3 1\nq3 0 d4 0\nq9 0 d1 1\n"
BEIR = "query-id\tcorpus-id\tscore\n" + "".join(
    "\t".join([fields[0], *fields[2:]]) + "\n" for fields in map(str.split, TREC.splitlines()) if fields
)


def lines(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.processes
def test_by_answers(tmp_path):
    """q1: ranks 2 and 3 hold the answer, q2: rank 1, q3: none; q4 has no answers."""
    results = write_jsonl(tmp_path / "test-step-3.jsonl", ROWS)
    found = lines(run_script("score_retrieval", results, "--k", "1", "2", "5", "3"))
    q1_at_3 = (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert found == [
        "3 of 4 queries have answers",
        f"recall@1    {100 * 1 / 3:.2f}",
        f"recall@2    {100 * 2 / 3:.2f}",
        f"recall@3    {100 * 2 / 3:.2f}",
        f"ndcg@1      {100 * 1 / 3:.2f}",
        f"ndcg@2      {100 * (1 / math.log2(3) / (1 + 1 / math.log2(3)) + 1) / 3:.2f}",
        f"ndcg@3      {100 * (q1_at_3 + 1) / 3:.2f}",
        f"mrr         {(1 / 2 + 1) / 3:.4f}",
        "nothing at a k above 4: no query has more passages",
    ]


@pytest.mark.processes
@pytest.mark.parametrize("qrels", [TREC, BEIR, BEIR.partition("\n")[2]])
def test_by_judgements(tmp_path, qrels):
    """q1 finds d1 (0), d2 (2), d3 (not judged), d4 (1), and d8 (3) is missed; q2 finds d3 (1) first."""
    results = write_jsonl(tmp_path / "r.jsonl", ROWS)
    (tmp_path / "qrels").write_text(qrels)
    found = lines(run_script("score_retrieval", results, "--qrels", tmp_path / "qrels", "--k", "1", "4"))
    dcg, ideal = 2 / math.log2(3) + 1 / math.log2(5), 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert found == [
        "2 of 4 queries have relevant passages",
        f"4 queries are in {tmp_path}/qrels",
        f"recall@1    {100 * (0 + 1) / 2:.2f}",
        f"recall@4    {100 * (2 / 3 + 1) / 2:.2f}",
        f"ndcg@1      {100 * (0 + 1) / 2:.2f}",
        f"ndcg@4      {100 * (dcg / ideal + 1) / 2:.2f}",
        f"mrr         {(1 / 2 + 1) / 2:.4f}",
    ]


def slow_ndcg(found, judged, k):
    """Textbook: every rank by itself, the ideal by trying which passage is best for every rank."""
    total, best = 0.0, 0.0
    left = [max(relevance, 0) for relevance in judged.values()]
    for rank in range(1, k + 1):
        discount = math.log(rank + 1) / math.log(2)
        if rank <= len(found):
            total += max(judged.get(found[rank - 1], 0), 0) / discount
        if left:
            best += left.pop(left.index(max(left))) / discount
    return total / best if best else 0.0


@pytest.mark.parametrize("seed", range(20))
def test_judgements_against_a_slow_reference(seed):
    rng = random.Random(seed)
    documents = [f"d{i}" for i in range(60)]
    found = rng.sample(documents, rng.randrange(1, 50))
    judged = {document: rng.choice([-1, 0, 0, 1, 2, 3]) for document in rng.sample(documents, 25)} | {"d0": 1}
    result = Result("q", [], [{"id": document, "text": ""} for document in found])
    metrics = by_judgements(result, {"q": judged}, (1, 5, 10, 100))
    relevant = {document for document, relevance in judged.items() if relevance > 0}
    for k in (1, 5, 10, 100):
        assert metrics[f"recall@{k}"] == len(relevant & set(found[:k])) / len(relevant)
        assert metrics[f"ndcg@{k}"] == pytest.approx(slow_ndcg(found, judged, k), abs=1e-12)
        assert ndcg([judged.get(document, 0) for document in found], [0, 0], k) == 0
    ranks = [1 / rank for rank, document in enumerate(found, 1) if document in relevant]
    assert metrics["mrr"] == max(ranks, default=0)
    perfect = Result("q", [], [{"id": d, "text": ""} for d in sorted(judged, key=judged.get, reverse=True)])
    assert by_judgements(perfect, {"q": judged}, (5,))["ndcg@5"] == 1


@pytest.mark.parametrize("seed", range(20))
def test_answers_as_a_run_scores_them(seed):
    rng = random.Random(seed)
    passages = [
        {"id": str(i), "text": rng.choice(["Rome", "the Paris.", "x", "x", "x"])} for i in range(rng.randrange(30))
    ]
    answers = rng.choice([["paris"], ["Rome", "paris"], ["nowhere"]])
    metrics = by_answers(Result("q", answers, passages), RECALL_AT)
    assert metrics | retrieval_metrics(passages, answers) == metrics


def random_result(rng, name):
    """Passages in order, some with equal scores, some with null ones or in another order."""
    passages = [{"id": f"d{i}", "text": ""} for i in rng.sample(range(60), rng.randrange(1, 30))]
    scores = sorted((rng.choice([1.5, 0.0, -2, 1e-45, 3e20, rng.gauss(0, 1)]) for _ in passages), reverse=True)
    how = rng.random()
    if how < 0.1:
        rng.shuffle(scores)
    elif how < 0.2:
        scores[0] = rng.choice([None, math.inf, 1e300])
    return {"id": name, "passages": [p | {"score": s} for p, s in zip(passages, scores, strict=True)]}


def test_trec_eval_agrees_on_the_run_that_is_written(tmp_path, capsys):
    """1,000 random runs with ties, each passage's relevance from -1 to 3."""
    rng, at = random.Random(0), (1, 5, 10)
    rows = [random_result(rng, f"q{i}") for i in range(1000)]
    judged = {row["id"]: {f"d{i}": rng.choice([-1, 0, 0, 1, 2, 3]) for i in rng.sample(range(60), 25)} for row in rows}
    (tmp_path / "qrels").write_text("".join(f"{q} 0\t{d}  {r}\n" for q, of in judged.items() for d, r in of.items()))
    results = write_jsonl(tmp_path / "r.jsonl", rows)
    score_files([results], tmp_path / "qrels", tmp_path / "run", "tag", at)
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)

    run = {}
    for line in (tmp_path / "run").read_text().splitlines():
        query, _, passage, _, score, _ = line.split()
        run.setdefault(query, {})[passage] = float(score)
    measures = {"recip_rank", "recall_1,5,10", "ndcg_cut_1,5,10"}
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    names = {"mrr": "recip_rank"} | {
        f"{a}@{k}": f"{b}_{k}" for a, b in (("recall", "recall"), ("ndcg", "ndcg_cut")) for k in at
    }
    for result in read_results([results]):
        ours = by_judgements(result, judged, at)
        assert {name: found[result.id][names[name]] for name in ours} == pytest.approx(ours, abs=1e-9), result
    assert len(found) == 1000 and said.keys() == names.keys()
    for name, text in said.items():
        mean = sum(of_query[names[name]] for of_query in found.values()) / 1000
        assert text == (f"{mean:.4f}" if name == "mrr" else f"{100 * mean:.2f}")


@pytest.mark.parametrize(
    ("scores", "written"),
    [
        ([1.5, 1.5], ["1.5", "1.4999999"]),
        ([1.5, 1.5, 1.4999999, 1, 0.25], ["1.5", "1.4999999", "1.4999998", "1", "0.25"]),
        ([1.00000000001, 1.0], ["1.00000000001", "0.99999994"]),
        ([2.5, None], ["-1", "-2"]),
        ([1.0, 2.0, 0.5], ["-1", "-2", "-3"]),
        ([1e300, 1.0], ["-1", "-2"]),
        ([0.0, -0.0], ["0.0", "-1e-45"]),
        ([], []),
    ],
)
def test_scores_of_a_run_say_the_order(scores, written):
    assert run_scores(scores) == written


@pytest.mark.parametrize("tag", ["my run", "", " "])
def test_the_tag_of_a_run_is_a_word(tmp_path, tag, monkeypatch, capsys):
    words = ["score_retrieval.py", "r.jsonl", "--trec_run", str(tmp_path / "run"), "--tag", tag]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2 and "give one word" in capsys.readouterr().err


def test_a_run_in_the_place_of_another_file(tmp_path, capsys):
    results = write_jsonl(tmp_path / "r.jsonl", ROWS)
    before = results.read_bytes()
    score_files([results], None, results, "tag", (1, 50))
    assert (tmp_path / "r.jsonl.old-1").read_bytes() == before and results.read_text().startswith("q1 Q0 d1 1 9.5 tag")
    said = capsys.readouterr().out.splitlines()
    assert "r.jsonl was there with other content, which is kept as r.jsonl.old-1" in said[0]
    assert any(
        line.startswith("nothing at a k above ") and line.endswith(": no query has more passages") for line in said
    )


@pytest.mark.processes
def test_a_trec_run(tmp_path):
    without = ROWS[2] | {"id": None, "passages": [{"id": "d5", "text": ""}, {"id": "d4", "text": ""}]}
    results = write_jsonl(tmp_path / "r.jsonl", [*ROWS[:2], without])
    found = lines(run_script("score_retrieval", results, "--trec_run", tmp_path / "new/run.txt", "--tag", "mine"))
    assert found[0] == "1 queries have no id: they are called line-N, where N is their number, from 1"
    assert found[-2] == f"{tmp_path}/new/run.txt: the passages of 3 queries"
    assert found[-1].startswith("1 of them have scores that are equal, missing or out of order")
    run = [line.split(" ") for line in (tmp_path / "new/run.txt").read_text().splitlines()]
    assert run[:2] == [["q1", "Q0", "d1", "1", "9.5", "mine"], ["q1", "Q0", "d2", "2", "8.5", "mine"]]
    assert run[-2:] == [["line-3", "Q0", "d5", "1", "-1", "mine"], ["line-3", "Q0", "d4", "2", "-2", "mine"]]
    assert len(run) == 10


@pytest.mark.parametrize(
    ("rows", "qrels", "words"),
    [
        ([{"query": "q", "answers": ["a"]}], None, "r.jsonl, line 1: `passages` must be a list of objects, found None"),
        ([ROWS[0], {"passages": [{"text": "x"}]}], None, "r.jsonl, line 2: a passage needs `id` and `text`"),
        ([ROWS[0] | {"answers": "Paris"}], None, "r.jsonl, line 1: `answers` must be a list of strings"),
        ([ROWS[0], ROWS[0]], None, "r.jsonl, line 2: its query has the id q1, as that of .*r.jsonl, line 1"),
        ([ROWS[3]], None, "no query has answers"),
        ([ROWS[2]], TREC, "no query has a relevant passage in"),
        ([row("q1", [("d1", "x"), ("d1", "x")])], TREC, "query q1: the passage d1 was retrieved twice"),
        ([ROWS[0]], "q1 0 d1 yes\n", "qrels, line 1: the relevance of a passage is a whole number, found 'yes'"),
        ([ROWS[0]], "q1 0 d1 1\nq1 0 d1 0\n", "qrels, line 2: passage d1 is judged 0 for query q1, and 1 in line 1"),
        ([ROWS[0] | {"passages": [{"id": "d", "text": "", "score": "1"}]}], None, "line 1: the `score` .* found '1'"),
        ([ROWS[0]], "q1 0 d1 1\nq1\n", "qrels, line 2: expected query, .*found 1 fields"),
        ([row("q 1", [("d1", "x")])], None, "contains white space"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, rows, qrels, words):
    results = write_jsonl(tmp_path / "r.jsonl", rows)
    judgements = tmp_path / "qrels" if qrels else None
    if qrels:
        judgements.write_text(qrels)
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match=words):
        score_files([results], judgements, tmp_path / "run" if "white" in words else None, "tag", [1])
    assert set(tmp_path.iterdir()) == before


@pytest.mark.processes
def test_the_script_says_it_in_one_sentence(tmp_path):
    assert "absent.jsonl does not exist" in one_sentence(run_script("score_retrieval", tmp_path / "absent.jsonl"))
    results = write_jsonl(tmp_path / "r.jsonl", ROWS)
    said = one_sentence(run_script("score_retrieval", results, "--qrels", tmp_path / "absent.tsv"))
    assert "absent.tsv does not exist" in said


def test_queries_are_called_by_id_or_number(tmp_path):
    rows = [ROWS[0] | {"id": 17}, {key: value for key, value in ROWS[1].items() if key != "id"}]
    assert [result.id for result in read_results([write_jsonl(tmp_path / "r.jsonl", rows)])] == ["17", "line-2"]
    rows = [{"passages": []}] * 3
    assert [result.id for result in read_results([write_jsonl(tmp_path / "r.jsonl", rows)])] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ([None, 1, 3, None], ["line-1", "1", "3", "line-4"]),
        ([2, None], ["2", "line-2"]),
        (["line-2", None, None], ["line-2", "other-line-2", "other-line-3"]),
    ],
)
def test_invented_ids_do_not_meet_real_ones(tmp_path, capsys, given, called):
    rows = [{"passages": [], "id": identifier} for identifier in given]
    assert [result.id for result in read_results([write_jsonl(tmp_path / "r.jsonl", rows)])] == called
    assert f"{given.count(None)} queries have no id: they are called" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "judgements"),
    [
        ("query-id\tcorpus-id\tscore\r\n17\td1\t2\r\n17\td2\t-1\r\n", {"17": {"d1": 2, "d2": -1}}),
        ("\ufeffquery-id\tcorpus-id\tscore\na b\tc d\t1\n", {"a b": {"c d": 1}}),
        ("1 0 d1 2\n1\t0\td2\t1\n2  Q0  d1  0\n", {"1": {"d1": 2, "d2": 1}, "2": {"d1": 0}}),
        ("1 0\td1 \t 2\n 1\t\t0  d2\t1 \n \t\n1\t0\td2\t1", {"1": {"d1": 2, "d2": 1}}),
        ("query-id corpus-id  score\n1  d1 2\n", {"1": {"d1": 2}}),
        ("query-id\tcorpus-id\tscore\n1\t\td1 2\n1\t d 2 \t0\n", {"1": {"d1": 2, "d 2": 0}}),
        ("", {}),
    ],
)
def test_forms_of_judgements(tmp_path, text, judgements):
    (tmp_path / "qrels").write_bytes(text.encode())
    assert read_judgements(tmp_path / "qrels") == judgements
