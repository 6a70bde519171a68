"""Score the passages in result files: recall@k, nDCG@k and MRR, by answer strings or by relevance judgements.

    python preprocessing/score_retrieval.py test-step-31.jsonl
    python preprocessing/score_retrieval.py test-step-31.jsonl --qrels qrels/test.tsv --trec_run test.run

Lines of a result file have `passages` (whose order counts, not their `score`), `answers`, and `id` if the data file had
one. Where no line has one, a query is identified by its number, from 1. Averages are over all queries that have an
answer or, with --qrels, a relevant passage. With answers, a passage is relevant if its text contains one, and

  recall@k  is 1 if one of the first k passages is relevant, else 0 (DPR calls this top-k accuracy)
  mrr       is 1 / the rank of the first relevant passage, 0 if there is none (not in percent)
  ndcg@k    is DCG / DCG of the same passages in the best order, since the relevant ones in the corpus are not known

With --qrels, in TREC's format (`query 0 passage relevance`) or BEIR's (a header `query-id corpus-id score`), a passage
is relevant if its relevance is above 0, and as in trec_eval

  recall@k  is the share of the query's relevant passages that are among the first k
  mrr       is as above, over all retrieved passages
  ndcg@k    is DCG / DCG of the best order of all judged passages

DCG = sum of relevance / log2(rank + 1) over ranks 1 to k: the gain is the relevance itself, not 2^relevance - 1.

trec_eval orders the passages of --trec_run by their scores, and equal ones by their ids. So that it finds the order of
the result file, equal scores are written apart (as the next smaller 32-bit numbers), and the scores of a query with
scores that are missing or out of order are written as -rank.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from atlas.files.jsonl import DataError, JsonlCorpus
from atlas.files.qrels import Judgements, read_judgements
from atlas.metrics import RECALL_AT, contains_answer, judged_metrics, ranking_metrics, simple_tokens
from fetch import keeping_another
from flags import at_least, exit_on_user_error


class Result(NamedTuple):
    id: str
    answers: list[str]
    passages: list[dict]


def parse_result(record: dict) -> dict:
    """A line of a result file. Raises: ValueError."""
    passages, answers = record.get("passages"), record.get("answers")
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        raise ValueError(
            f"`passages` must be a list of objects, found {passages!r:.40}; use --write_results in the run"
        )
    if not all(isinstance(passage.get("text"), str) and isinstance(passage.get("id"), str) for passage in passages):
        raise ValueError("a passage needs `id` and `text` (strings)")
    for score in (passage.get("score") for passage in passages):
        if score is not None and type(score) is not float and not (type(score) is int and abs(score) < 1e300):
            raise ValueError(f"the `score` of a passage is a number or null, found {score!r:.40}")
    if answers is not None and not (isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)):
        raise ValueError(f"`answers` must be a list of strings, found {answers!r:.40}")
    return record


def read_results(paths: Sequence[Path]) -> Iterator[Result]:
    """The rows of result files. Raises: FileNotFoundError; DataError with file and line, also for a repeated query."""
    rows = JsonlCorpus(paths, parse=parse_result)
    names = name_queries(rows)
    for name, row in zip(names, tqdm(rows, "Results", unit=" queries", disable=None), strict=True):
        yield Result(name, row.get("answers") or [], row["passages"])


def name_queries(rows: JsonlCorpus) -> list[str]:
    """What each query is called: its id. Without any ids, its number from 1; beside others that have one, `line-N`.

    Raises: DataError where two lines have one id.
    """
    given = [row.get("id") for row in rows]
    first: dict[str, int] = {}
    for number, identifier in enumerate(given):
        if identifier is not None and first.setdefault(str(identifier), number) != number:
            before = rows.where(first[str(identifier)])
            raise DataError(f"{rows.where(number)}: its query has the id {identifier}, as that of {before}")
    invented = "line-" if first else ""
    while any(f"{invented}{number}" in first for number in range(1, len(given) + 1)):
        invented = f"other-{invented}"
    missing = sum(identifier is None for identifier in given)
    if missing:
        print(f"{missing:,} queries have no id: they are called {invented}N, where N is their number, from 1")
    return [str(f"{invented}{n}" if identifier is None else identifier) for n, identifier in enumerate(given, 1)]


def by_answers(result: Result, at: Sequence[int]) -> dict[str, float] | None:
    """The query's metrics by its answers; None if it has none."""
    answers = [simple_tokens(answer) for answer in result.answers]
    relevances = [int(contains_answer(passage["text"], answers)) for passage in result.passages]
    return ranking_metrics(relevances, relevances, 1, at) if answers else None


def by_judgements(result: Result, judgements: Judgements, at: Sequence[int]) -> dict[str, float] | None:
    """The query's metrics by judgements; None without relevant passages."""
    return judged_metrics([passage["id"] for passage in result.passages], judgements.get(result.id, {}), at) or None


def check_unique(result: Result) -> None:
    """Raises: DataError if a passage was retrieved twice, which trec_eval refuses."""
    retrieved = [passage["id"] for passage in result.passages]
    if twice := [identifier for identifier, times in Counter(retrieved).items() if times > 1]:
        raise DataError(
            f"query {result.id}: the passage {twice[0]} was retrieved twice; --qrels and --trec_run need unique ids"
        )


def run_scores(scores: Sequence[float | None]) -> list[str]:
    """The scores of a ranked list as text, changed where trec_eval would not find the list's order in them.

    trec_eval sorts by the scores as 32-bit numbers, and equal ones by the passages' ids. So a score that is not below
    the one before becomes the next smaller number. Where scores are missing, not finite or in another order, all of the
    list are replaced by -rank.
    """
    by_rank = [str(-rank) for rank in range(1, len(scores) + 1)]
    if None in scores or sorted(scores, reverse=True) != list(scores):
        return by_rank
    with np.errstate(over="ignore"):
        as_read = np.array(scores, np.float32)
    written, previous = [], np.float32(np.inf)
    for score, number in zip(scores, as_read, strict=True):
        previous = min(number, np.nextafter(previous, np.float32(-np.inf)))
        written.append(str(score if previous == number else previous))
    return written if np.isfinite(as_read).all() and (np.isfinite(previous) or not written) else by_rank


def run_lines(result: Result, scores: Sequence[str], tag: str) -> Iterator[str]:
    """Lines `query Q0 passage rank score tag`, ranks from 1. Raises: DataError if an id contains white space."""
    for rank, (passage, score) in enumerate(zip(result.passages, scores, strict=True), 1):
        if len(f"{result.id} {passage['id']}".split()) != 2:
            raise DataError(
                f"--trec_run: the id {passage['id']!r} or {result.id!r} contains white space, which separates fields"
            )
        yield f"{result.id} Q0 {passage['id']} {rank} {score} {tag}\n"


def score_files(paths: Sequence[Path], qrels: Path | None, run: Path | None, tag: str, at: Sequence[int]) -> None:
    """Print the means and write the run. Raises: FileNotFoundError, DataError."""
    judgements = read_judgements(qrels) if qrels else None
    scores, longest, changed = [], 0, 0
    with ExitStack() as stack:
        if run:
            run.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(stack.enter_context(keeping_another(run)), "w", encoding="utf-8"))
        for result in read_results(paths):
            if judgements is not None or run:
                check_unique(result)
            scores.append(by_answers(result, at) if judgements is None else by_judgements(result, judgements, at))
            longest = max(longest, len(result.passages))
            if run:
                found = [passage.get("score") for passage in result.passages]
                written = run_scores(found)
                changed += written != list(map(str, found))
                file.writelines(run_lines(result, written, tag))
    scored: list[dict[str, float]] = [metrics for metrics in scores if metrics is not None]
    if not scored and not run:
        raise DataError(f"no query has {'answers' if judgements is None else f'a relevant passage in {qrels}'}")
    print(f"{len(scored):,} of {len(scores):,} queries have {'answers' if judgements is None else 'relevant passages'}")
    if judgements is not None:
        print(f"{len(judgements):,} queries are in {qrels}")
    print_means(scored, longest, at)
    if run:
        print(f"{run}: the passages of {len(scores):,} queries")
    if changed:
        print(
            f"{changed:,} of them have scores that are equal, missing or out of order: other ones keep the order there"
        )


def print_means(scored: Sequence[dict[str, float]], longest: int, at: Sequence[int]) -> None:
    """Print the mean of each metric, those at k up to the longest list's length."""
    for name in scored[0] if scored else ():
        k = int(name.partition("@")[2] or 0)
        mean = sum(metrics[name] for metrics in scored) / len(scored)
        if k <= longest:
            print(f"{name:<12}{mean:.4f}" if name == "mrr" else f"{name:<12}{100 * mean:.2f}")
    if tuple(at) != RECALL_AT and at[-1] > longest:
        print(f"nothing at a k above {longest}: no query has more passages")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS", help="result files of runs with --write_results"
    )
    parser.add_argument("--qrels", type=Path, help="relevance judgements in TREC's or BEIR's format")
    parser.add_argument("--k", type=at_least(1, int), nargs="+", default=RECALL_AT, help=f"default: {RECALL_AT}")
    parser.add_argument("--trec_run", type=Path, metavar="FILE", help="write `query Q0 passage rank score tag` lines")
    parser.add_argument("--tag", default="atlas", help="the last field of the run's lines (default: atlas)")
    arguments = parser.parse_args()
    if len(arguments.tag.split()) != 1:
        parser.error(f"--tag {arguments.tag!r}: give one word, as white space separates the fields of a line")
    with exit_on_user_error(stopped="nothing was written"):
        score_files(arguments.results, arguments.qrels, arguments.trec_run, arguments.tag, sorted(set(arguments.k)))


if __name__ == "__main__":
    main()
