"""Score the passages in result files: recall@k, nDCG@k and MRR, by answer strings or by relevance judgements.

    python preprocessing/score_retrieval.py test-step-31.jsonl
    python preprocessing/score_retrieval.py test-step-31.jsonl --qrels qrels/test.tsv --trec_run test.run

Lines of a result file have `passages` (whose order counts, not their `score`), `answers`, and `id` if the data file had
one; without it a query is identified by its number, from 1. Averages are over all queries that have an answer or, with
--qrels, a relevant passage. With answers, a passage is relevant if its text contains one, and

  recall@k  is 1 if one of the first k passages is relevant, else 0 (DPR calls this top-k accuracy)
  mrr       is 1 / the rank of the first relevant passage, 0 if there is none (not in percent)
  ndcg@k    is DCG / DCG of the same passages in the best order, since the relevant ones in the corpus are not known

With --qrels, in TREC's format (`query 0 passage relevance`) or BEIR's (a header `query-id corpus-id score`, with tabs),
a passage is relevant if its relevance is above 0, and as in trec_eval

  recall@k  is the share of the query's relevant passages that are among the first k
  mrr       is as above, over all retrieved passages
  ndcg@k    is DCG / DCG of the best order of all judged passages

DCG = sum of relevance / log2(rank + 1) over ranks 1 to k: the gain is the relevance itself, not 2^relevance - 1.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from atlas.files.jsonl import DataError, JsonlCorpus, open_existing, replacing
from atlas.metrics import RECALL_AT, contains_answer, simple_tokens
from flags import at_least, exit_on_user_error

Judgements = dict[str, dict[str, int]]  # query to passage to relevance


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
    if answers is not None and not (isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)):
        raise ValueError(f"`answers` must be a list of strings, found {answers!r:.40}")
    return record


def read_results(paths: Sequence[Path]) -> Iterator[Result]:
    """The rows of result files. Raises: FileNotFoundError; DataError with file and line, also for a repeated query."""
    rows, seen = JsonlCorpus(paths, parse=parse_result), set()
    for number, row in enumerate(tqdm(rows, "Results", unit=" queries", disable=None)):
        identifier = str(row["id"] if row.get("id") is not None else number + 1)
        if identifier in seen:
            raise DataError(f"{rows.where(number)}: an earlier line has the same query, {identifier}")
        seen.add(identifier)
        yield Result(identifier, row.get("answers") or [], row["passages"])


def read_judgements(path: Path) -> Judgements:
    """Judgements in TREC's or BEIR's format. Raises: FileNotFoundError; DataError with file and line."""
    judgements: Judgements = {}
    with open_existing(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").rstrip("\r\n")
                fields = text.split("\t" if "\t" in text else None)
                if not fields or (number == 1 and fields[-1] == "score"):
                    continue
                if len(fields) not in (3, 4):
                    raise ValueError(f"expected query, [iteration,] passage, relevance; found {len(fields)} fields")
                query, passage, relevance = fields[0], fields[-2], int(fields[-1])
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            judgements.setdefault(query, {})[passage] = relevance
    return judgements


def ndcg(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """nDCG@k (Järvelin and Kekäläinen 2002) with trec_eval's gain and discount; 0 if nothing in `ideal` is relevant.

    `relevances` are those of the retrieved passages by rank; `ideal` are those of all passages that could be retrieved.
    """

    def dcg(gains: Sequence[int]) -> float:
        return sum(max(gain, 0) / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], 1))

    best = dcg(sorted(ideal, reverse=True))
    return dcg(relevances) / best if best else 0.0


def score(relevances: Sequence[int], ideal: Sequence[int], to_find: int, at: Sequence[int]) -> dict[str, float]:
    """Metrics of one query, with `relevances` and `ideal` as for `ndcg`.

    recall@k is the share of `to_find` relevant passages; if more are retrieved, it is 1.
    """
    first = next((rank for rank, relevance in enumerate(relevances, 1) if relevance > 0), None)
    relevant = {k: sum(relevance > 0 for relevance in relevances[:k]) for k in at}
    return (
        {f"recall@{k}": min(relevant[k], to_find) / to_find for k in at}
        | {f"ndcg@{k}": ndcg(relevances, ideal, k) for k in at}
        | {"mrr": 1 / first if first else 0.0}
    )


def by_answers(result: Result, at: Sequence[int]) -> dict[str, float] | None:
    """The query's metrics by its answers; None if it has none."""
    answers = [simple_tokens(answer) for answer in result.answers]
    relevances = [int(contains_answer(passage["text"], answers)) for passage in result.passages]
    return score(relevances, relevances, 1, at) if answers else None


def by_judgements(result: Result, judgements: Judgements, at: Sequence[int]) -> dict[str, float] | None:
    """The query's metrics by judgements; None without relevant passages. Raises: DataError if ids are not unique."""
    judged = judgements.get(result.id, {})
    retrieved = [passage["id"] for passage in result.passages]
    if len(set(retrieved)) < len(retrieved):
        raise DataError(f"query {result.id}: a passage was retrieved twice; --qrels needs passages with unique ids")
    to_find = sum(relevance > 0 for relevance in judged.values())
    if not to_find:
        return None
    return score([judged.get(passage, 0) for passage in retrieved], list(judged.values()), to_find, at)


def run_lines(result: Result, tag: str) -> Iterator[str]:
    """Lines `query Q0 passage rank score tag`, ranks from 1. Raises: DataError if an id contains white space."""
    for rank, passage in enumerate(result.passages, 1):
        if len(f"{result.id} {passage['id']}".split()) != 2:
            raise DataError(
                f"--trec_run: the id {passage['id']!r} or {result.id!r} contains white space, which separates fields"
            )
        # trec_eval sorts by score, then by id. Passages without a score get one that decreases with the rank.
        yield f"{result.id} Q0 {passage['id']} {rank} {passage.get('score', -rank)} {tag}\n"


def score_files(paths: Sequence[Path], qrels: Path | None, run: Path | None, tag: str, at: Sequence[int]) -> None:
    """Print the means and write the run. Raises: FileNotFoundError, DataError."""
    judgements = read_judgements(qrels) if qrels else None
    scores, longest = [], 0
    with ExitStack() as stack:
        if run:
            run.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(stack.enter_context(replacing(run)), "w", encoding="utf-8"))
        for result in read_results(paths):
            scores.append(by_answers(result, at) if judgements is None else by_judgements(result, judgements, at))
            longest = max(longest, len(result.passages))
            if run:
                file.writelines(run_lines(result, tag))
    scored: list[dict[str, float]] = [metrics for metrics in scores if metrics is not None]
    if not scored and not run:
        raise DataError(f"no query has {'answers' if judgements is None else f'a relevant passage in {qrels}'}")
    print(f"{len(scored):,} of {len(scores):,} queries have {'answers' if judgements is None else 'relevant passages'}")
    if judgements is not None:
        print(f"{len(judgements):,} queries are in {qrels}")
    for name in scored[0] if scored else ():
        k = int(name.partition("@")[2] or 0)
        mean = sum(metrics[name] for metrics in scored) / len(scored)
        if k <= longest:
            print(f"{name:<12}{mean:.4f}" if name == "mrr" else f"{name:<12}{100 * mean:.2f}")
    if run:
        print(f"{run}: the passages of {len(scores):,} queries")


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
    with exit_on_user_error(stopped="nothing was written"):
        score_files(arguments.results, arguments.qrels, arguments.trec_run, arguments.tag, sorted(set(arguments.k)))


if __name__ == "__main__":
    main()
