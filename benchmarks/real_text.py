"""What a language model's judgement teaches a retriever on real text: Wikipedia's paragraphs and SQuAD's questions.

    make real                                 the headline rows on one seed: at most an hour on two cores
    python -m benchmarks.real_text --all      every row on all seeds; writes docs/real-text.md

Everything is done by the scripts: prepare_real.py, train.py, evaluate.py. What was run is kept in --directory and not
run again, and all runs share what the language model thinks of a passage (--cache_judgements). Settings were chosen on
questions of dev.jsonl, about articles that no training or test question is about, and are frozen here. Differences are
tested by randomly flipping the signs of the questions' differences.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atlas.files.jsonl import JsonlCorpus
from atlas.metrics import exact_match, f1, normalize_answer
from atlas.runtime.device import available_cores
from benchmarks.compressed import table
from benchmarks.evidence import percent, significance, verdict
from benchmarks.runs import run_once

DEPTHS = (1, 5, 20)
QA = ("--task", "qa", "--qa_prompt_format", "{question}")
READING = (*QA, "--text_maxlength", "256", "--no-chat_template", "--precision", "bf16", "--embedder_precision", "bf16")
BATCH, EPOCHS, JUDGED = 8, 2, 12
# Chosen on dev.jsonl.
TRAINING = (
    *("--freeze_reader", "--train_retriever", "--in_batch_negatives", "--n_context", "1", "--dropout", "0.1"),
    *("--retriever_n_context", "8", "--bm25_weight", "0.5", "--per_gpu_batch_size", str(BATCH), "--shuffle"),
    *("--temperature_gold", "0.4", "--temperature_score", "0.0026"),
    *("--scheduler", "linear", "--warmup_steps", "10", "--weight_decay", "0.01"),
)
MINILM, RESET = "minilm", "minilm_reset_2"
RATE = {MINILM: "2e-5", RESET: "1e-4"}
QUESTION = ("--gold_score_mode", "question")
BOTH = (*QUESTION, "--gold_question_weight", "0.75")
FUSED, RERANKED = ("--bm25_weight", "0.67"), ("--rerank_by_reader", "10")
SHOTS, SHOT_EPOCHS = 64, 3
TUNING = (
    *("--per_gpu_batch_size", str(BATCH), "--lr", "2e-5", "--weight_decay", "0", "--scheduler", "linear"),
    *("--warmup_steps", "3", "--dropout", "0", "--shuffle", "--target_maxlength", "32"),
)
ANSWERING = ("--n_context", "3", "--retriever_n_context", "3", "--generation_max_length", "32")


@dataclass(frozen=True)
class Row:
    """A retriever: where it starts, and what it learns from.

    `judged`: flags that say how its passages are judged; None: it is not trained. `labels`: by the right paragraph.
    """

    name: str
    start: str = MINILM
    judged: tuple[str, ...] | None = None
    questions: int = 1000
    flags: tuple[str, ...] = ()  # more flags of train.py
    labels: bool = False
    rerank: bool = False  # also measured in the order of the reader's judgement

    def key(self, seed: int) -> str:
        """Its name in file names."""
        return key_of(f"{self.name} {self.questions} {seed}")


class Ranks(NamedTuple):
    """The rank (from 1) at which each question's own paragraph was found; 0: not among the first 20. (n,) each."""

    alone: np.ndarray
    fused: np.ndarray | None = None  # with BM25
    reranked: np.ndarray | None = None  # fused, and the first 20 in the order of the reader's judgement


@dataclass(frozen=True)
class Bench:
    """Runs what is measured, once, and reads the results. `asked` questions are evaluated, of the split's first."""

    home: Path
    asked: int
    answered: int
    split: str = "test"
    threads: int = 1

    def prepare(self) -> None:
        """Fetch texts and models, and write the questions to ask: those of an article one after the other."""
        self.run(
            "prepare",
            self.data / "smollm2/config.json",
            "preprocessing/prepare_real.py",
            "--output_directory",
            self.data,
        )
        for n in {self.asked, self.answered}:
            lines = sorted(self._lines(self.split)[:n], key=lambda line: line["metadata"]["passage"])
            write(self.home / f"{self.split}-{n}.jsonl", lines)

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def reader(self) -> tuple[object, ...]:
        return "--reader_model_type", self.data / "smollm2", "--cache_judgements", self.home / "judgements.sqlite"

    def run(self, name: str, done: Path, *words: object) -> float:
        """Seconds of a script, which is not run again if the same command has made `done`."""
        return run_once(self.home / "logs" / f"{name}.log", done, *words, threads=self.threads)

    # ---- retrieval

    def train(self, row: Row, seed: int) -> Path:
        """The directory of a run that trains a row's retriever."""
        name, steps, examples = row.key(seed), EPOCHS * row.questions // BATCH, self.examples(row.questions, seed)
        flags = (
            *(*TRAINING, *self.reader, "--train_data", examples, "--passages", self.data / "corpus.jsonl"),
            *("--retriever_model_path", self.data / row.start, "--lr_retriever", RATE[row.start]),
            *(row.judged or ()),
        )
        if QUESTION[1] in flags:
            self._judge_examples(f"judge-{name}", examples, row.start, *flags)
        script = ("-m", "benchmarks.from_labels") if row.labels else ("train.py",)
        self.run(
            *(f"train-{name}", self.home / "runs" / name / f"checkpoint/step-{steps}", *script, *READING, *flags),
            *("--name", name, "--checkpoint_dir", self.home / "runs", "--restart", "--seed", seed),
            *("--total_steps", steps, "--save_freq", steps, "--log_freq", max(1, steps // 20)),
            *("--refresh_index", max(1, steps // 4), *row.flags),
        )
        return self.home / "runs" / name

    def examples(self, n: int, seed: int) -> Path:
        """A file of n training questions, which the seed draws, each with one of its answers as the target."""
        path = self.home / f"train-{n}-{seed}.jsonl"
        lines = self._lines("train")
        random.Random(seed).shuffle(lines)
        write(path, [line | {"target": line["answers"][0]} for line in lines[:n]])
        return path

    def search(self, row: Row, seed: int) -> Ranks:
        """Where each question's paragraph is found: by the row's retriever, with BM25, and in the reader's order."""
        name, index, model = row.key(seed), self.index(row, seed), self.model(row, seed)
        corpus = ("--passages", self.data / "corpus.jsonl", "--save_index_path", index)
        found = [self._ranks(f"{name}-alone", *model, *corpus)]
        fused = (*model, "--load_index_path", index, *FUSED)
        found.append(self._ranks(f"{name}-fused", *fused))
        if row.rerank:
            reranked = (*fused, *RERANKED, *self.reader)
            results = self._results(f"{self.split}-{self.asked}-{name}-fused", self.asked)
            self._judge(
                f"judge-{self.split}-{name}", results, RERANKED[1], *reranked, "--eval_data", self.data / "dev.jsonl"
            )
            found.append(self._ranks(f"{name}-reranked", *reranked))
        return Ranks(*found)

    def model(self, row: Row, seed: int) -> tuple[object, ...]:
        """Flags that name a row's retriever."""
        trained = () if row.judged is None and not row.labels else ("--model_path", self.train(row, seed))
        return "--retriever_model_path", self.data / row.start, *trained

    def index(self, row: Row, seed: int) -> Path:
        """The saved index of a row's passages, which `search` makes."""
        return self.home / "indices" / row.key(seed)

    def core_hours(self) -> float:
        """Of all runs that are kept, whenever they were made."""
        logs = [log.read_text().rsplit("\nseconds: ", 1) for log in (self.home / "logs").glob("*.log")]
        return sum(float(parts[1]) for parts in logs if len(parts) > 1) * self.threads / 3600

    def bm25(self) -> Ranks:
        """The same for BM25 alone."""
        model = ("--retriever_model_path", self.data / MINILM, "--passages", self.data / "corpus.jsonl")
        return Ranks(self._ranks("bm25", *model, "--bm25_weight", "1"))

    def _ranks(self, name: str, *flags: object) -> np.ndarray:
        name = f"{self.split}-{self.asked}-{name}"
        path, results = self.home / "ranks" / f"{name}.npy", self._results(name, self.asked)
        self._evaluate(name, self.asked, "--retrieve_only", "--n_context", max(DEPTHS), *flags)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            np.save(path, [rank_in(line) for line in JsonlCorpus(results)])
        return np.load(path)

    def _judge_examples(self, name: str, examples: Path, start: str, *flags: object) -> None:
        """Let the reader judge what the start finds for the examples."""
        found = self.home / "runs" / name / f"{examples.stem}-step-0.jsonl"
        model = ("--retriever_model_path", self.data / start, "--passages", self.data / "corpus.jsonl")
        where = ("--name", name, "--checkpoint_dir", self.home / "runs", "--eval_data", examples)
        search = ("--retrieve_only", "--per_gpu_batch_size", 64, "--write_results", "--bm25_weight", "0.5")
        self.run(f"{name}-found", found, "evaluate.py", *READING, *model, *where, *search, "--n_context", JUDGED)
        self._judge(name, found, JUDGED, *flags)

    def _judge(self, name: str, results: Path, k: int | str, *flags: object) -> None:
        """Let the reader judge the first k passages of each question of a result file, passage by passage."""
        where = ("--name", name, "--checkpoint_dir", self.home / "runs")
        done = results.with_suffix(".judged")
        self.run(name, done, "-m", "benchmarks.judge", results, k, *READING, *flags, *where)

    # ---- answers

    def answers(self, name: str, *flags: object, shots: int = SHOTS, seed: int = 0) -> dict[str, np.ndarray]:
        """What the language model answers with these passages, after so many examples: metric to (n,)."""
        name, steps = f"answers-{key_of(name)}-{shots}-{seed}", SHOT_EPOCHS * shots // BATCH
        model: tuple[object, ...] = self.reader[:2]
        if shots:
            self.run(
                *(f"tune-{name}", self.home / "runs" / name / f"checkpoint/step-{steps}", "train.py", *READING),
                *(*TUNING, *ANSWERING, *model, "--train_data", self.examples(shots, seed), "--total_steps", steps),
                *("--save_freq", steps, "--log_freq", 4, "--name", name, "--checkpoint_dir", self.home / "runs"),
                *("--restart", "--seed", seed, *flags),
            )
            model = (*model, "--model_path", self.home / "runs" / name)
        name = f"{self.split}-{self.answered}-{name}"
        self._evaluate(name, self.answered, *ANSWERING, *flags, *model)
        lines = list(JsonlCorpus(self._results(name, self.answered)))
        pairs = [(line["generation"], line["answers"]) for line in lines]
        return {
            "exact match": np.array([exact_match(*pair) for pair in pairs], float),
            "F1": np.array([f1(*pair) for pair in pairs], float),
            "answer contained": np.array([contained(*pair) for pair in pairs], float),
        }

    def _evaluate(self, name: str, n: int, *flags: object) -> None:
        asked = self.home / f"{self.split}-{n}.jsonl"
        where = ("--name", name, "--checkpoint_dir", self.home / "runs", "--eval_data", asked, "--write_results")
        batch = ("--per_gpu_batch_size", 64 if "--retrieve_only" in flags else 8)
        self.run(name, self._results(name, n), "evaluate.py", *READING, *batch, *where, *flags)

    def _results(self, name: str, n: int) -> Path:
        return self.home / "runs" / name / f"{self.split}-{n}-step-0.jsonl"

    def _lines(self, split: str) -> list[dict]:
        """Questions, each with its own paragraph, for runs that are given it (--use_file_passages)."""
        passages = {passage["id"]: passage for passage in JsonlCorpus(self.data / "corpus.jsonl")}
        lines = JsonlCorpus(self.data / f"{split}.jsonl")
        return [line | {"passages": [passages[line["metadata"]["passage"]]]} for line in lines]


def key_of(name: str) -> str:
    """A name for files."""
    return re.sub(r"\W+", "-", name)


def write(path: Path, lines: Sequence[dict]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def rank_in(line: dict) -> int:
    """The rank of a question's own paragraph in a line of results; 0: it is not there."""
    found = [passage["id"] for passage in line["passages"]]
    return found.index(line["metadata"]["passage"]) + 1 if line["metadata"]["passage"] in found else 0


def recall(ranks: np.ndarray, k: int) -> np.ndarray:
    """Whether each question's paragraph is among the first k, (n,)."""
    return ((ranks > 0) & (ranks <= k)).astype(float)


def ndcg(ranks: np.ndarray, k: int = 10) -> np.ndarray:
    """nDCG@k of each question, of which one passage is relevant, (n,)."""
    return np.where((ranks > 0) & (ranks <= k), 1 / np.log2(np.maximum(ranks, 1) + 1), 0.0)


def contained(generation: str, answers: Sequence[str]) -> bool:
    """Whether an answer stands somewhere in what was written, both normalized as for exact match."""
    said = f" {normalize_answer(generation)} "
    return any(f" {normalize_answer(answer)} " in said for answer in answers)


# ---- the page


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
            "Trained on 1,000 questions.",
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
            (START, *(Row(f"{n:,} questions", judged=BOTH, questions=n) for n in (few, 1000, 2500, 8500))),
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
        trained = row.judged is not None or row.labels
        found = [bench.search(row, seed) for seed in range(min(seeds, group.seeds) if trained else 1)]
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


def answers_table(bench: Bench, retrievers: dict[str, tuple[object, ...]], seeds: int, shots: Sequence[int]) -> str:
    """Exact match, F1 and answer contained, by what the language model is given and after how many examples."""
    ways = {"book closed": ("--closed_book",)} | retrievers
    ways["the right paragraph"] = ("--use_file_passages", "--n_context", "1")
    lines = []
    for name, flags in ways.items():
        for n in shots:
            measured = [bench.answers(name, *flags, shots=n, seed=seed) for seed in range(seeds if n else 1)]
            cells = [percent([one[key] for one in measured]) for key in measured[0]]
            lines.append([f"{name}, {n} examples" if n else f"{name}, no examples", *cells])
    return table(["", "exact match", "F1", "answer contained"], lines)


def headline(home: Path, threads: int) -> str:
    """What `make real` prints."""
    bench = Bench(home, asked=500, answered=100, threads=threads)
    bench.prepare()
    row = Row("both encoders, from the question alone", judged=QUESTION, questions=250, rerank=True)
    found = retrieval_table(bench, Group("", "", (START, row)), 1)
    retriever = {"three passages": (*bench.model(row, 0), "--load_index_path", bench.index(row, 0), *FUSED)}
    return "\n\n".join([bm25_line(bench), found, answers_table(bench, retriever, 1, (SHOTS,))])


def page(home: Path, threads: int) -> str:
    """The text of docs/real-text.md."""
    bench = Bench(home, asked=1500, answered=500, threads=threads)
    bench.prepare()
    parts = [INTRODUCTION.format(asked=bench.asked), bm25_line(bench)]
    for group in groups():
        parts += [f"## {group.title}", group.text, retrieval_table(bench, group, 3)]
    retrievers: dict[str, tuple[object, ...]] = {
        "three passages of BM25": (
            *bench.model(START, 0),
            "--load_index_path",
            bench.index(START, 0),
            "--bm25_weight",
            1,
        ),
        "three passages of MiniLM": (*bench.model(START, 0), "--load_index_path", bench.index(START, 0)),
        "three of the trained retriever": (*bench.model(TRAINED, 0), "--load_index_path", bench.index(TRAINED, 0)),
    }
    retrievers["the same, fused with BM25"] = (*retrievers["three of the trained retriever"], *FUSED)
    parts += ["## Answers", ANSWERS, answers_table(bench, retrievers, 3, (0, SHOTS))]
    parts.append(f"All of this took {bench.core_hours():.0f} core-hours.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("real"), help="where everything is kept (real)")
    parser.add_argument("--all", action="store_true", help="every row, on three seeds; write the page")
    parser.add_argument("--output", type=Path, default=Path("docs/real-text.md"), help="the page")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each run (all cores)")
    options = parser.parse_args()
    if options.all:
        options.output.write_text(page(options.directory, options.threads), encoding="utf-8")
        print(options.output)
    else:
        print(headline(options.directory, options.threads))


if __name__ == "__main__":
    sys.exit(main())
