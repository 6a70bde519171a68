"""Questions in other formats through whole evaluations: BEIR's with judgements, KILT's with provenance; Unicode."""

from types import SimpleNamespace

import pytest
import torch

from atlas.command_line import parse_config
from atlas.evaluation.evaluator import Evaluator, _by_judgements, _Reading
from atlas.metrics import contains_answer, judged_metrics, simple_tokens
from atlas.tasks import Example, Judged
from atlas.tasks.data import Data
from score_retrieval import score_files
from tests.kit import command_line, last_metrics, make_task, read_jsonl, run, world, write_jsonl

SEARCH = {"train_data": None, "reader_model_type": None, "retrieve_only": True, "qa_prompt_format": "{question}"}


def answering():
    """id of a question -> id of the passage that answers it."""
    by_fact = {(p["section"], p["title"]): p["id"] for p in read_jsonl(world() / "passages.jsonl")}
    return {
        row["id"]: by_fact[tuple(row["question"].removeprefix("what is the ").removesuffix("?").split(" of "))]
        for row in read_jsonl(world() / "dev.jsonl")
    }


@pytest.mark.processes
def test_beir_from_its_files_to_the_scores(tmp_path, capsys):
    """Two judged queries are passages of the corpus themselves, as in ArguAna; unjudged ones are left out."""
    passages, relevant = read_jsonl(world() / "passages.jsonl"), answering()
    questions = read_jsonl(world() / "dev.jsonl")
    queries = [{"_id": row["id"], "text": row["question"], "metadata": {}} for row in questions]
    queries += [{"_id": p["id"], "text": f"{p['title']}: {p['section']} {p['text']}"} for p in passages[:2]]
    judged = [(q, p, 2) for q, p in list(relevant.items())[:8]]
    judged += [("p0", "p1", 1), ("p1", "p0", 1), ("absent", "p0", 1)]
    corpus = [{"_id": p["id"], "title": f"{p['title']}: {p['section']}", "text": p["text"]} for p in passages]
    qrels = tmp_path / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{p}\t{r}\n" for q, p, r in judged))
    directory = run(
        tmp_path,
        "evaluate",
        **SEARCH,
        eval_data=write_jsonl(tmp_path / "queries.jsonl", queries),
        passages=write_jsonl(tmp_path / "corpus.jsonl", corpus),
        qrels=qrels,
        leave_out_own_passage=True,
        n_context=10,
    )
    rows, log = read_jsonl(directory / "queries-step-0.jsonl"), (directory / "run.log").read_text()
    assert [row["id"] for row in rows] == [*list(relevant)[:8], "p0", "p1"]
    assert f"queries.jsonl: {qrels} judges 10 of the 10 lines" in log
    assert "3 of 13 lines are skipped (no line, and lines without answers that --qrels does not judge)" in log
    for row in rows[-2:]:
        assert row["id"] not in [passage["id"] for passage in row["passages"]] and len(row["passages"]) == 10

    found = last_metrics(directory, "queries")
    assert found.keys() == {f"judged_{m}@{k}" for m in ("recall", "ndcg") for k in (1, 5, 10)} | {"judged_mrr"}
    capsys.readouterr()
    score_files([directory / "queries-step-0.jsonl"], qrels, None, "", (1, 5, 10))
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert {f"judged_{name}": float(value) for name, value in said.items()} == pytest.approx(found, abs=0.006)
    assert found["judged_recall@10"] > 0


@pytest.mark.processes
def test_provenance_of_kilt_is_scored_by_pages(tmp_path):
    """Of pages with several passages the first one found counts; answers are scored as without provenance."""
    page_of = {p["id"]: i // 5 for i, p in enumerate(read_jsonl(world() / "passages.jsonl"))}
    passages = [p | {"wikipedia_id": page_of[p["id"]]} for p in read_jsonl(world() / "passages.jsonl")]
    relevant = answering()
    rows = [
        {
            "id": row["id"],
            "input": row["question"],
            "output": [
                {"answer": row["answers"][0], "provenance": [{"wikipedia_id": str(page_of[relevant[row["id"]]])}]}
            ],
        }
        for row in read_jsonl(world() / "dev.jsonl")
    ]
    directory = run(
        tmp_path,
        "evaluate",
        **SEARCH | {"task": "kilt"},
        eval_data=write_jsonl(tmp_path / "nq-dev-kilt.jsonl", rows),
        passages=write_jsonl(tmp_path / "pages.jsonl", passages),
        n_context=10,
    )
    found = last_metrics(directory, "nq-dev-kilt")
    expected = []
    for row in read_jsonl(directory / "nq-dev-kilt-step-0.jsonl"):
        pages = list(dict.fromkeys(str(passage["wikipedia_id"]) for passage in row["passages"]))
        expected.append(judged_metrics(pages, {str(page_of[relevant[row["id"]]]): 1}, (1, 5, 10)))
    for name in expected[0]:
        mean = sum(of_query[name] for of_query in expected) / len(expected)
        assert found[f"judged_{name}"] == pytest.approx(mean if name == "mrr" else 100 * mean, rel=1e-4)
    assert "recall@5" in found and "mrr" in found


def test_metrics_by_judgements():
    at = (1, 5, 10)
    passages = [{"id": "a", "page": 1}, {"id": "b", "page": 1}, {"id": "c", "page": 2}, {"id": "d"}, {"id": "e"}]
    by_id = _by_judgements(passages, Judged({"c": 1, "e": 2, "x": 1}), at)
    assert (
        by_id["judged_recall@1"] == 0
        and by_id["judged_recall@5"] == by_id["judged_recall@10"] == 2 / 3
        and by_id["judged_mrr"] == 1 / 3
    )
    by_page = _by_judgements(passages, Judged({"2": 1}, "page"), at)
    assert by_page["judged_mrr"] == 1 / 2 and by_page["judged_recall@1"] == 0 and by_page["judged_recall@5"] == 1
    assert _by_judgements(passages, Judged({"2": 1}, "wikipedia_id"), at) == {}
    assert _by_judgements(passages, Judged({"a": 0}), at) == {}


def test_judgements_of_a_field_that_no_passage_has_are_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atlas.runtime.tracking.log.propagate", True)
    config = parse_config(command_line(tmp_path, **SEARCH), program="evaluate")
    session = SimpleNamespace(directory=tmp_path, device=torch.device("cpu"))
    evaluator = Evaluator(config, SimpleNamespace(reader=None, inputs=None, known=None), None, {}, session)
    evaluator.answering.passages = lambda retrieval, examples, *rest: (
        [[{"id": "5", "text": "x"}]] * len(examples),
        None,
    )
    examples, totals = [Example("q", "", [], judged=Judged({"5": 1}, "wikipedia_id"))] * 2, {}
    evaluator._evaluate_batch(examples, SimpleNamespace(task=make_task("kilt")), totals)
    for _ in range(2):
        evaluator._report_unmeasured("dev")
    assert (
        caplog.text.count("dev: judgements are not measured where no passage that was found has a `wikipedia_id`") == 1
    )
    assert not any(name.startswith("judged") for name in totals)


def judged_data(tmp_path, rows, qrels):
    (tmp_path / "qrels").write_text(qrels)
    arguments = command_line(
        tmp_path, **SEARCH, eval_data=write_jsonl(tmp_path / "data.jsonl", rows), qrels=tmp_path / "qrels"
    )
    config = parse_config(arguments, program="evaluate")
    return Data.open(config.run.eval_data, config, None, qrels=config.run.qrels[0])


def test_lines_are_kept_for_their_answers_or_their_judgements(tmp_path):
    rows = [
        {"question": "a", "answers": ["x"]},
        {"_id": 1, "text": "b"},
        {"_id": 2, "text": "c"},
        {"id": 3, "question": "d", "answers": ["y"]},
    ]
    data = judged_data(tmp_path, rows, "1 0 p1 1\n3 0 p2 0\n3 0 p3 2\n")
    examples = [example for batch in data.evaluation_batches() for example in batch]
    assert [example.id for example in examples] == [None, 1, 3]
    assert [example.judged for example in examples] == [None, Judged({"p1": 1}), Judged({"p2": 0, "p3": 2})]
    with pytest.raises(ValueError, match="--qrels .*qrels: none of its 1 queries is the id of a line of .*data.jsonl"):
        judged_data(tmp_path, rows[:1], "1 0 p1 1\n")


def evaluated(tmp_path, task, generation, answer, **flags):
    """What an evaluation measures of one answer, without the models that would write it."""
    config = parse_config(command_line(tmp_path, train_data=None, task=task, **flags), program="evaluate")
    session = SimpleNamespace(directory=tmp_path, device=torch.device("cpu"))
    evaluator = Evaluator(config, SimpleNamespace(reader=object(), inputs=None, known=None), None, {}, session)
    evaluator._read = lambda *examples: [_Reading(generation, 0.0)]
    example, totals = Example("q", "", [answer]), {}
    (row,) = evaluator._evaluate_batch([example], SimpleNamespace(task=make_task(task)), totals)
    assert (row["generation"], row["answers"]) == (generation, [answer])  # as they are
    return {name: value for name, (value, _) in totals.items() if name != "eval_loss"}


@pytest.mark.parametrize("task", ["qa", "base", "kilt"])
def test_spellings_of_one_word_are_one_with_nfc(tmp_path, task):
    composed, decomposed = "Caf\u00e9 de l'\u00cele", "Cafe\u0301 de l'I\u0302le"
    assert composed != decomposed
    for generation, answer in ((composed, decomposed), (decomposed, composed)):
        as_published = evaluated(tmp_path, task, generation, answer)
        names = {"qa": ("exact_match", "f1"), "base": ("accuracy",), "kilt": ("accuracy", "exact_match", "f1")}[task]
        assert as_published.keys() == set(names) and as_published[names[0]] == 0
        assert evaluated(tmp_path, task, generation, answer, metric_unicode="nfc") == dict.fromkeys(names, 1.0)
        assert contains_answer(generation, [simple_tokens(answer)])  # recall@k takes them for one in any case
