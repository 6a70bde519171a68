"""What a language model's judgement teaches a retriever on real text: Wikipedia's paragraphs and SQuAD's questions.

    make real                                 the headline rows on one seed: at most an hour on two cores
    python -m benchmarks.real_text --all      every row on all seeds; writes docs/real-text.md

Everything is done by the scripts: prepare_real.py, train.py, evaluate.py. What was run is kept in --directory and not
run again, and all runs share what the language model thinks of a passage (--cache_judgements). The figures of --all are
in --results as well: rows that are there are not run at all. Settings were chosen on questions of dev.jsonl, about
articles that no training or test question is about, and are frozen in real_bench.py. Differences are tested by randomly
flipping the signs of the questions' differences.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from atlas.runtime.device import available_cores
from benchmarks.compressed import table
from benchmarks.evidence import percent, significance, verdict
from benchmarks.real_bench import (
    BOTH,
    DEPTHS,
    FUSED,
    QUESTION,
    RESET,
    SHOTS,
    Bench,
    Kept,
    Row,
    ndcg,
    recall,
)


@dataclass(frozen=True)
class Group:
    """Rows of the page that are compared with the first one."""

    title: str
    text: str
    rows: tuple[Row, ...]
    seeds: int = 1


INTRODUCTION = """# What a language model teaches a retriever on real text

Written by `python -m benchmarks.real_text --all`. Passages are the 3,648 Wikipedia paragraphs of SQuAD's development set and of
SQuADShifts, questions those asked about them; {asked:,} test questions are about articles that no training question is about. The
right passage is the paragraph that a question was asked about, and nothing else.

The retriever is MiniLM, which has seen SQuAD's training questions, but none of these. The teacher is SmolLM2-135M-Instruct, of which
4 bits a weight are known; it is never trained, but where answers are counted. A question is judged by how likely the language model
finds it behind a passage, and the answer behind both. Settings were chosen on dev articles. A ± is the standard deviation over
seeds, which draw the questions; p compares recall@1 with the first row, by randomly flipping the signs of the questions'
differences."""  # noqa: E501
ANSWERS = """What the language model answers when it is given no passage, three passages, or the right one; before, and after it was
trained on 64 questions (all weights)."""  # noqa: E501
START, RESET_START = Row("MiniLM as it is"), Row("last two layers reset", RESET)
TRAINED = Row("both encoders, from question and answer", judged=BOTH, rerank=True)


def groups() -> list[Group]:
    """Everything that is measured of retrieval."""
    few = 250
    return [
        Group(
            "What is learnt, and from what",
            "Trained on 500 questions.",
            (
                replace(START, rerank=True),
                TRAINED,
                Row("both, from the question alone", judged=QUESTION, rerank=True),
                Row("both, from the answer alone", judged=()),
                Row("both, from labels", labels=True),
                Row("query encoder, from question and answer", judged=BOTH, flags=("--query_side_retriever_training",)),
            ),
            seeds=3,
        ),
        Group(
            "From low down",
            "The same encoder with random weights in its last two layers: what they knew of retrieval is gone.",
            (RESET_START, Row("both, from question and answer", RESET, BOTH), Row("labels", RESET, labels=True)),
            seeds=3,
        ),
        Group(
            "How many questions",
            "From question and answer.",
            (START, *(Row(f"{n:,} questions", judged=BOTH, questions=n) for n in (few, 500, 1000, 2500))),
        ),
        Group(
            "How the reader judges",
            f"On {few} questions.",
            (
                START,
                Row("question and answer", judged=BOTH, questions=few),
                *(
                    Row(mode, judged=("--gold_score_mode", mode), questions=few)
                    for mode in ("ppmean", "pdist", "loop", "emdr", "question")
                ),
            ),
        ),
        Group(
            "Where candidates come from",
            f"On {few} questions, from question and answer.",
            (
                START,
                Row("from the index and BM25", judged=BOTH, questions=few),
                Row("from the index alone", judged=BOTH, questions=few, flags=("--bm25_weight", "0")),
                Row("without a refresh", judged=BOTH, questions=few, flags=("--refresh_index", "-1")),
                Row("no negatives of other questions", judged=BOTH, questions=few, flags=("--no-in_batch_negatives",)),
            ),
        ),
    ]


def retrieval_table(bench: Bench, group: Group, seeds: int) -> str:
    """Recall and nDCG of each row, and how certain the difference of recall@1 from the first row is."""
    start, lines, rerank = None, [], any(row.rerank for row in group.rows)
    for row in group.rows:
        found = [bench.search(row, seed) for seed in range(min(seeds, group.seeds) if row.trained else 1)]
        cells = [row.name, *(percent([recall(one.alone, k) for one in found]) for k in DEPTHS)]
        cells.append(percent([ndcg(one.alone) for one in found]))
        cells.append(percent([recall(one.fused, 1) for one in found]))
        if rerank:
            cells.append(percent([recall(one.reranked, 1) for one in found]) if row.rerank else "")
        firsts = [recall(one.alone, 1) for one in found]
        cells.append("" if start is None else verdict(significance(firsts, start)))
        start = firsts if start is None else start
        lines.append(cells)
    more = ["@1 fused and reranked"] if rerank else []
    return table(["", *(f"recall@{k}" for k in DEPTHS), "nDCG@10", "@1 fused with BM25", *more, "p (recall@1)"], lines)


def bm25_line(bench: Bench) -> str:
    ranks = bench.bm25().alone
    at = ", ".join(f"{100 * recall(ranks, k).mean():.1f}" for k in DEPTHS)
    return f"BM25 alone: recall@1, 5 and 20 of {at}, nDCG@10 of {100 * ndcg(ranks).mean():.1f}."


class Way(NamedTuple):
    """Where the passages that the language model is given come from: of a row's index, or as the flags say."""

    row: Row | None
    flags: tuple[object, ...] = ()


def answers_table(bench: Bench, retrievers: dict[str, Way], seeds: int, shots: Sequence[int]) -> str:
    """Exact match, F1 and answer contained, by what the language model is given and after how many examples."""
    ways = {"book closed": Way(None, ("--closed_book",))} | retrievers
    ways["the right paragraph"] = Way(None, ("--use_file_passages", "--n_context", "1"))
    lines = []
    for name, way in ways.items():
        for n in shots:
            runs = range(seeds if n else 1)
            measured = [bench.answers(name, way.row, *way.flags, shots=n, seed=seed) for seed in runs]
            cells = [percent([one[key] for one in measured]) for key in measured[0]]
            lines.append([f"{name}, {n} examples" if n else f"{name}, no examples", *cells])
    return table(["", "exact match", "F1", "answer contained"], lines)


def headline(home: Path, threads: int) -> str:
    """What `make real` prints."""
    bench = Bench(home, asked=500, answered=100, threads=threads)
    bench.prepare()
    row = Row("both encoders, from the question alone", judged=QUESTION, questions=250, rerank=True)
    found = retrieval_table(bench, Group("", "", (START, row)), 1)
    answers = answers_table(bench, {"three passages": Way(row, FUSED)}, 1, (SHOTS,))
    return "\n\n".join([bm25_line(bench), found, answers])


def page(home: Path, threads: int, kept: Kept) -> str:
    """The text of docs/real-text.md."""
    bench = Bench(home, asked=1000, answered=300, threads=threads, kept=kept)
    bench.prepare()
    parts = [INTRODUCTION.format(asked=bench.asked), bm25_line(bench)]
    for group in groups():
        parts += [f"## {group.title}", group.text, retrieval_table(bench, group, 3)]
    retrievers = {
        "three passages of BM25": Way(START, ("--bm25_weight", "1")),
        "three passages of MiniLM": Way(START),
        "three of the trained retriever": Way(TRAINED),
        "the same, fused with BM25": Way(TRAINED, FUSED),
    }
    parts += ["## Answers", ANSWERS, answers_table(bench, retrievers, 3, (0, SHOTS))]
    hours = sum(kept.core_seconds.values()) / 3600
    parts.append(f"All of this took {hours:.1f} core-hours.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("real"), help="where all runs are kept (real)")
    parser.add_argument("--all", action="store_true", help="every row, on three seeds; write the page")
    parser.add_argument("--results", type=Path, default=Path("docs/real-text.json"), help="figures of --all")
    parser.add_argument("--output", type=Path, default=Path("docs/real-text.md"), help="the page of --all")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each run (all cores)")
    options = parser.parse_args()
    if options.all:
        options.output.write_text(page(options.directory, options.threads, Kept(options.results)), encoding="utf-8")
        print(options.output)
    else:
        print(headline(options.directory, options.threads))


if __name__ == "__main__":
    sys.exit(main())
