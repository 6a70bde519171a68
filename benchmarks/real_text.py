"""What a language model's judgement teaches a retriever on real text: Wikipedia's paragraphs and SQuAD's questions.

    make real                                 the headline rows on one seed: at most an hour on two cores
    python -m benchmarks.real_text --all      every row on --seeds seeds; writes docs/real-text.md

Everything is done by the scripts: prepare_real.py, train.py, evaluate.py. What was run is kept in --directory (some
25 GB in the end) and not run again, and all runs share what the language model thinks of a passage
(--cache_judgements). The figures of --all are in --results as well: rows that are there are not run at all, so that a
page can be made on several machines, and --kept_only writes what there is so far. Settings were chosen on questions of
dev.jsonl, about articles that no training or test question is about, and are frozen in real_bench.py. Differences are
tested by randomly flipping the signs of the questions' differences.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from atlas.runtime.device import cpu_prefers_bf16
from atlas.runtime.launch import available_cores
from benchmarks.compressed import table
from benchmarks.evidence import percent, significance, verdict
from benchmarks.real_bench import (
    BOTH,
    DEPTHS,
    FIRST,
    FUSED,
    JUDGED,
    METRICS,
    QUESTION,
    RERANKED,
    RESET,
    SHOTS,
    Asked,
    Bench,
    Kept,
    NotMeasured,
    Ranks,
    Row,
    all_at_once,
    ndcg,
    recall,
)

Found = TypeVar("Found")
Answers = dict[tuple[str, int], list[Callable[[], dict[str, np.ndarray]]]]  # by row and examples, one for each seed


@dataclass(frozen=True)
class Group:
    """Rows of the page that are compared with the first one."""

    title: str
    text: str
    rows: tuple[Row, ...]
    seeds: int = 1


INTRODUCTION = """# What a language model teaches a retriever on real text

You need this page if you want to know whether a small language model can teach a retriever, or order what it finds, on text of
your own. Written by `python -m benchmarks.real_text --all`. `make real` measures some of its rows again in less than an hour, on
500 questions and 100 answers, so that its figures differ a little.

Passages are the 3,648 Wikipedia paragraphs of SQuAD's development set and of SQuADShifts, questions those asked about them;
{asked:,} test questions are about articles that no training question is about. The right passage is the paragraph that a question
was asked about, and nothing else.

The retriever is MiniLM, which has seen SQuAD's training questions, but none of these. The teacher is SmolLM2-135M-Instruct, of which
4 bits a weight are known; it is never trained, but where answers are counted. A question is judged by how likely the language model
finds it behind a passage, and the answer behind both. Settings were chosen on dev articles. A ± is the standard deviation over
seeds, which draw the questions; p compares recall@1 with the first row, by randomly flipping the signs of the questions'
differences."""  # noqa: E501
SUMMARY = """In short: where the right paragraph is among eight, the language model, asked how likely question and answer are behind each, picks it
for {teacher} %. From 1,000 questions MiniLM learns from that about what it learns from labels: recall@1 {some} ({more_labels} from labels);
{few} from 250 ({labels}), and as much, {gap}, from 250 sentences with a gap, for which nobody has to ask anything.
Trained on 2,500 questions and fused with BM25 (recall@1 {bm25}) it reaches {fused}. Where the language model also puts the first 10
passages in order, by the question alone, the right one is first for {reranked} % (of {k:,} questions; BM25 {bm25_of_k}). That needs
no training: with MiniLM as it is, it is first for {as_it_is} %."""  # noqa: E501
TEACHER = """The language model judges the {k} passages that BM25 and MiniLM together find first. For {judged:.1f} % of {questions:,} training
questions the right paragraph is among them. For these, it is the best one so often:"""  # noqa: E501
REASONS = """It is not the judgement that keeps MiniLM from gaining 8 points: labels bring {labels} from the same 250 questions and {more_labels}
from 1,000, and the best of the judged passages is nearly always the right one (see above). Nor is MiniLM too small: of the 2,500
questions that it learnt from, it finds the right paragraph first for {after} % ({before} % before). It learns these by heart, and their 48
articles, more than how to find paragraphs of others: the loss is {first:.3f} on average when the questions come first, {second:.3f} when they come
again, and 250 questions bring {few}, 1,000 {some}, 2,500 {many}. A lower rate changes nothing (2e-5 in place of 5e-5, 1,000 questions, on dev
articles). Questions about other articles are what was not tried: there are no more in the packages. A query encoder alone gains
nothing, from labels either ({query}): the index stays what it was. From low down more questions still help: {low_few} from 250,
{low_some} from 1,000, {low_many} from 2,500."""  # noqa: E501
ORDER = """Recall@1 of the first {asked:,} test questions. The retriever and BM25 find passages together, and the first 10 come in the
order in which the language model finds the question likely behind them; p compares that with BM25 alone."""  # noqa: E501
ANSWERS = """What the language model answers to the first {asked:,} test questions when it is given no passage, the right one, or what is found
first; before, and after it was trained on 64 questions (all weights). One passage serves it better than three, on dev questions too
(exact match 29.3 and 22.7, by the trained retriever with BM25)."""  # noqa: E501


class Way(NamedTuple):
    """Where the passages that the language model is given come from: of a row's index, or as the flags say."""

    row: Row | None
    flags: tuple[str, ...] = ()


START, RESET_START = Row("MiniLM as it is"), Row("last two layers reset", RESET)
TRAINED = Row("both encoders, from question and answer", judged=BOTH)
UNLABELLED = Row("both, from the question alone", judged=QUESTION)
ANSWER = Row("both, from the answer alone", judged=())
LABELS = Row("both, from labels", labels=True)
RESET_TRAINED = Row("both, from question and answer", RESET, BOTH)
RESET_MORE = tuple(replace(RESET_TRAINED, name=f"{n:,} questions", questions=n) for n in (1000, 2500))
MORE = tuple(replace(TRAINED, name=f"{n:,} questions", questions=n) for n in (1000, 2500))
MORE_LABELS = Row("1,000 questions, from labels", labels=True, questions=1000)
QUERY_LABELS = Row("query encoder, from labels", labels=True, flags=("--query_side_retriever_training",))
SENTENCES = Row("250 sentences of training articles", judged=BOTH, cloze="train")
OF_ALL = Row("250 sentences of all paragraphs", judged=BOTH, cloze="all")
CLOSED, WITH_RETRIEVAL = "book closed", "the same, fused with BM25"
REORDERED = (START, UNLABELLED, TRAINED)
RETRIEVERS = {
    "first passage of BM25": Way(START, ("--bm25_weight", "1", *FIRST)),
    "first passage of MiniLM": Way(START, FIRST),
    "first of the trained retriever": Way(TRAINED, FIRST),
    WITH_RETRIEVAL: Way(TRAINED, (*FUSED, *FIRST)),
    "the same, in the reader's order": Way(TRAINED, (*FUSED, *FIRST, *RERANKED)),
    "three passages of BM25": Way(START, ("--bm25_weight", "1")),
    "three of the trained retriever, fused with BM25": Way(TRAINED, FUSED),
}


GROUPS = (
    Group(
        "What is learnt, and from what",
        "From 250 questions, or as many sentences.",
        (
            START,
            TRAINED,
            UNLABELLED,
            ANSWER,
            LABELS,
            Row("query encoder, from question and answer", judged=BOTH, flags=("--query_side_retriever_training",)),
            QUERY_LABELS,
            replace(SENTENCES, name="both, from sentences with a gap"),
        ),
        seeds=3,
    ),
    Group(
        "From low down",
        "The same encoder with random weights in its last two layers: what they knew of retrieval is gone.",
        (RESET_START, RESET_TRAINED, Row("both, from labels", RESET, labels=True)),
        seeds=3,
    ),
    Group(
        "How many questions",
        "From question and answer, where the row does not say otherwise.",
        (START, replace(TRAINED, name="250 questions"), *MORE, MORE_LABELS),
    ),
    Group(
        "How many questions, from low down",
        "From question and answer.",
        (RESET_START, replace(RESET_TRAINED, name="250 questions"), *RESET_MORE),
    ),
    Group(
        "Without a question",
        "From sentences with a masked name or number: of training articles, or of all paragraphs that are searched.",
        (START, SENTENCES, OF_ALL),
    ),
    Group(
        "How the reader judges",
        "By the answer behind each passage: `ppmean` is its mean likelihood. `loop` is not measured: its prompts have "
        "five passages each, in the place of one.",
        (
            START,
            replace(ANSWER, name="ppmean"),
            *(Row(mode, judged=("--gold_score_mode", mode)) for mode in ("pdist", "emdr")),
        ),
    ),
    Group(
        "Where candidates come from",
        "From question and answer.",
        (
            START,
            replace(TRAINED, name="from the index and BM25"),
            Row("from the index alone", judged=BOTH, flags=("--bm25_weight", "0")),
            Row("without a refresh", judged=BOTH, flags=("--refresh_index", "-1")),
            Row("no negatives of other questions", judged=BOTH, flags=("--no-in_batch_negatives",)),
        ),
    ),
)


def measured(measures: Iterable[Callable[[], Found]]) -> list[Found]:
    """Those that are there, or may be measured."""
    found = []
    for measure in measures:
        with suppress(NotMeasured):
            found.append(measure())
    return found


def of_seeds(bench: Bench, row: Row, seeds: int) -> list[Ranks]:
    """Of each seed that is there."""
    return measured(partial(bench.search, row, seed) for seed in range(seeds if row.trained else 1))


def firsts(found: Sequence[Ranks]) -> list[np.ndarray]:
    """Whether each question's paragraph is first, by seed."""
    return [recall(one.alone, 1) for one in found]


def retrieval_table(bench: Bench, group: Group, seeds: int) -> str:
    """Recall and nDCG of each row, and how certain the difference of recall@1 from the first row is."""
    start, lines = None, []
    for row in group.rows:
        if not (found := of_seeds(bench, row, min(seeds, group.seeds))):
            continue
        cells = [
            row.name,
            str(len(found)) if row.trained else "",
            *(percent([recall(one.alone, k) for one in found]) for k in DEPTHS),
        ]
        cells.append(percent([ndcg(one.alone) for one in found]))
        cells.append(percent([recall(one.fused, 1) for one in found]))
        cells.append("" if start is None else verdict(significance(firsts(found), start)))
        start = firsts(found) if start is None else start
        lines.append(cells)
    return table(
        ["", "seeds", *(f"recall@{k}" for k in DEPTHS), "nDCG@10", "@1 fused with BM25", "p (recall@1)"], lines
    )


def reranked_table(bench: Bench, rows: Sequence[Row]) -> str:
    """Recall@1 with BM25, and with the first passages in the order of the reader's judgement, of the same questions."""
    bm25 = [recall(bench.bm25(bench.asked.reranked), 1)]
    lines = [["BM25 alone", percent(bm25), "", ""]]
    for row in rows:
        for found in measured([partial(bench.rerank, row)]):
            sides = [[recall(ranks, 1)] for ranks in found]
            lines.append([row.name, *map(percent, sides), verdict(significance(sides[1], bm25))])
    return table(["", "fused with BM25", "fused and reranked", "p"], lines)


def bm25_line(bench: Bench) -> str:
    ranks = bench.bm25(bench.asked.searched)
    at = ", ".join(f"{100 * recall(ranks, k).mean():.1f}" for k in DEPTHS)
    return f"BM25 alone: recall@1, 5 and 20 of {at}, nDCG@10 of {100 * ndcg(ranks).mean():.1f}."


def answers_of(bench: Bench, retrievers: dict[str, Way], shots: Sequence[int], seeds: int) -> Answers:
    """What has to be measured for a table of answers."""
    ways = {
        CLOSED: Way(None, ("--closed_book",)),
        "the right paragraph": Way(None, ("--use_file_passages", *FIRST)),
    } | retrievers
    return {
        (name, n): [
            partial(bench.answers, name, way.row, *way.flags, shots=n, seed=seed) for seed in range(seeds if n else 1)
        ]
        for name, way in ways.items()
        for n in shots
    }


def titled(name: str, shots: int) -> str:
    """What a row of answers is called on the page."""
    return f"{name}, {shots or 'no'} examples"


def answers_table(answers: Answers) -> str:
    """Exact match, F1 and answer contained, by what the language model is given and after how many examples."""
    lines = []
    for row, seeds in answers.items():
        if found := measured(seeds):
            lines.append([titled(*row), str(len(found)), *(percent([one[key] for one in found]) for key in METRICS)])
    return table(["", "seeds", *METRICS], lines)


def teacher_part(bench: Bench) -> str:
    """How often the reader's judgement puts the right paragraph first. Raises: NotMeasured."""
    found = bench.teacher(MORE[-1], 0)
    names = {
        "BM25 and MiniLM together, as they find them": "found",
        "likelihood of the answer behind passage and question": "answer",
        "likelihood of the question behind the passage": "question",
        "both, 1 to 3": "both",
    }
    rows = table(["best by", "right paragraph first"], [[name, percent([found[key]])] for name, key in names.items()])
    text = TEACHER.format(questions=len(found["judged"]), judged=100 * found["judged"].mean(), k=JUDGED)
    return f"## What the teacher knows\n\n{text}\n\n{rows}"


def headline(bench: Bench, jobs: int) -> str:
    """What `make real` prints."""
    bench.prepare()
    rows = (START, UNLABELLED)
    answers = answers_of(bench, {"the first passage": Way(UNLABELLED, (*FUSED, *FIRST))}, (SHOTS,), 1)
    start, trained = ((partial(bench.search, row, 0), partial(bench.rerank, row)) for row in rows)
    *others, of_trained = (measure for seeds in answers.values() for measure in seeds)
    bm25 = partial(bench.bm25, bench.asked.searched)
    all_at_once(jobs, [trained[0], *others, trained[1], *start, bm25, of_trained])  # those that wait for others last
    parts = [bm25_line(bench), retrieval_table(bench, Group("", "", rows), 1), reranked_table(bench, rows)]
    return "\n\n".join([*parts, answers_table(answers)])


def difference(bench: Bench, one: Row, other: Row, seeds: int) -> tuple[float, str]:
    """By how many points a row's recall@1 is higher than another's, and how certain that is. Raises: NotMeasured."""
    sides = [firsts(of_seeds(bench, row, seeds)) for row in (one, other)]
    if not all(sides):
        raise NotMeasured(f"{one.name}, or {other.name}")
    return 100 * float(np.mean(sides[0]) - np.mean(sides[1])), f"p {verdict(significance(*sides))}"


def aims(bench: Bench, answers: Answers, seeds: int) -> str:
    """A table of the goals that were set beforehand, and of the results."""
    compared = (
        ("recall@1 of MiniLM, by judgement alone: 8 points more", 8, [(row, START) for row in (TRAINED, *MORE)]),
        ("from low down: 25 points more", 25, [(row, RESET_START) for row in (RESET_TRAINED, *RESET_MORE)]),
        ("judgement is worth as much as labels", 0, [(TRAINED, LABELS), (MORE[0], MORE_LABELS)]),
    )
    lines = []
    for name, aim, pairs in compared:
        for one, other in pairs:
            for more, p in measured([partial(difference, bench, one, other, seeds)]):
                lines.append([name, f"{more:+.1f} ({one.questions:,} questions, {p})", reached(more, aim)])
    lines += without_labels(bench, seeds)
    for name, what, aim, right in (
        (WITH_RETRIEVAL, "with retrieval", "above 25", lambda em: em > 25),
        (CLOSED, "book closed", "below 3", lambda em: em < 3),
    ):
        if found := measured(answers[name, SHOTS]):
            em = 100 * float(np.mean([one["exact match"] for one in found]))
            line = [f"exact match after {SHOTS} examples, {what}: {aim}", f"{em:.1f}"]
            lines.append([*line, "reached" if right(em) else "missed"])
    return table(["aim", "found", ""], lines)


def reached(more: float, aim: float) -> str:
    return "reached" if more >= aim else f"missed by {aim - more:.1f}"


def without_labels(bench: Bench, seeds: int) -> Iterator[list[str]]:
    """How much more than BM25 the row without labels finds, fused with it and reranked, where that is measured."""
    fused = [one.fused for one in of_seeds(bench, UNLABELLED, seeds)]
    reranked = [one.reranked for one in measured([partial(bench.rerank, UNLABELLED)])]
    for order, found, n in (("fused", fused, bench.asked.searched), ("reranked", reranked, bench.asked.reranked)):
        if found:
            sides = [recall(ranks, 1) for ranks in found], [recall(bench.bm25(n), 1)]
            more = 100 * float(np.mean(sides[0]) - np.mean(sides[1]))
            figure = f"{more:+.1f} ({n:,} questions asked, p {verdict(significance(*sides))})"
            yield [f"without any label, {order}: 4 points more than BM25", figure, reached(more, 4)]


def figures(bench: Bench, seeds: int) -> dict[str, object]:
    """What `SUMMARY` and `REASONS` say. Raises: NotMeasured."""
    rows = {"few": TRAINED, "some": MORE[0], "many": MORE[1], "labels": LABELS, "more_labels": MORE_LABELS}
    rows |= {"query": QUERY_LABELS, "gap": SENTENCES}
    gains = {name: f"{difference(bench, row, START, seeds)[0]:+.1f}" for name, row in rows.items()}
    low = zip(("low_few", "low_some", "low_many"), (RESET_TRAINED, *RESET_MORE), strict=True)
    gains |= {name: f"{difference(bench, row, RESET_START, seeds)[0]:+.1f}" for name, row in low}
    first, second = bench.losses(MORE[-1], 0)
    ranks = {
        "before": bench.recognise(START, MORE[-1]),
        "after": bench.recognise(MORE[-1], MORE[-1]),
        "bm25": bench.bm25(bench.asked.searched),
        "fused": bench.search(MORE[-1], 0).fused,
        "bm25_of_k": bench.bm25(bench.asked.reranked),
        "reranked": bench.rerank(UNLABELLED).reranked,
        "as_it_is": bench.rerank(START).reranked,
    }
    at_1 = {name: percent([recall(of_row, 1)]) for name, of_row in ranks.items()}
    teacher = percent([bench.teacher(MORE[-1], 0)["both"]])
    return gains | at_1 | {"first": first, "second": second, "teacher": teacher, "k": bench.asked.reranked}


def everything(bench: Bench, answers: Answers, seeds: int) -> Iterator[Callable[[], object]]:
    """All that the page needs, of the first seed first, and what takes longest last."""
    yield from (partial(bench.bm25, n) for n in bench.asked[:2])
    rows = [(row, group.seeds) for group in GROUPS for row in group.rows]
    rows.sort(key=lambda one: one[0].questions)
    for seed in range(seeds):
        of_seed = [row for row, seeds_of_row in rows if seed < (seeds_of_row if row.trained else 1)]
        yield from (partial(bench.search, row, seed) for row in of_seed)
        yield from (measure for row in answers.values() for measure in row[seed : seed + 1])
    yield from (partial(measure, MORE[-1], 0) for measure in (bench.teacher, bench.losses))
    yield from (partial(bench.recognise, row, MORE[-1]) for row in (START, MORE[-1]))
    yield from (partial(bench.rerank, row) for row in REORDERED)


def page(bench: Bench, jobs: int, seeds: int) -> str:
    """The text of docs/real-text.md."""
    answers = answers_of(bench, RETRIEVERS, (0, SHOTS), seeds)
    if not bench.kept.only:
        bench.prepare()
        all_at_once(jobs, everything(bench, answers, seeds))
        bench.kept.close()
    told = measured([partial(figures, bench, seeds)])  # one, or none yet
    parts = [INTRODUCTION.format(asked=bench.asked.searched), *(SUMMARY.format(**found) for found in told)]
    parts += [bm25_line(bench), *measured([partial(teacher_part, bench)])]
    for group in GROUPS:
        parts += [f"## {group.title}", group.text, retrieval_table(bench, group, seeds)]
    text = ORDER.format(asked=bench.asked.reranked)
    parts += ["## In the order of the reader's judgement", text, reranked_table(bench, REORDERED)]
    parts += ["## Answers", ANSWERS.format(asked=bench.asked.answered), answers_table(answers)]
    parts += ["## What was aimed at", aims(bench, answers, seeds)]
    parts += [REASONS.format(**found) for found in told]
    missing = [f"{row.name} ({group.title})" for group in GROUPS for row in group.rows if not of_seeds(bench, row, 1)]
    missing += [f"{row.name} (reranked)" for row in REORDERED if not measured([partial(bench.rerank, row)])]
    missing += [f"{titled(*row)} (Answers)" for row, of_row in answers.items() if not measured(of_row)]
    if missing:
        parts.append(f"Not measured yet: {'; '.join(missing)}.")
    hours = sum(bench.kept.core_seconds.values()) / 3600
    parts.append(f"All of this took {hours:.1f} core-hours.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("real"), help="where all runs are kept (real)")
    parser.add_argument("--all", action="store_true", help="every row; write the page")
    parser.add_argument("--seeds", type=int, default=3, help="of --all (3)")
    parser.add_argument("--kept_only", action="store_true", help="with --all: run nothing, leave out what is missing")
    parser.add_argument("--results", type=Path, default=Path("docs/real-text.json"), help="figures of --all")
    parser.add_argument("--output", type=Path, default=Path("docs/real-text.md"), help="the page of --all")
    parser.add_argument("--jobs", type=int, default=min(2, available_cores()), help="runs at a time (2, or 1)")
    fast = "bf16" if cpu_prefers_bf16(torch.device("cpu")) else "fp32"
    parser.add_argument("--precision", default=fast, help=f"of all runs ({fast}, the faster one on this CPU)")
    options = parser.parse_args()
    threads = max(1, available_cores() // options.jobs)
    if options.all:
        kept = Kept(options.results, options.kept_only)
        bench = Bench(
            options.directory, Asked(6838, 1000, 300), precision=options.precision, threads=threads, kept=kept
        )
        options.output.write_text(page(bench, options.jobs, options.seeds), encoding="utf-8")
        print(options.output)
    else:
        bench = Bench(options.directory, Asked(500, 500, 100), precision=options.precision, threads=threads)
        print(headline(bench, options.jobs))


if __name__ == "__main__":
    sys.exit(main())
