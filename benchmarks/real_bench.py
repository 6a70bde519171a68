"""What benchmarks.real_text measures, one row at a time: the commands, what is kept of them, the figures."""

import hashlib
import json
import random
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atlas.files.jsonl import JsonlCorpus, replacing
from atlas.metrics import exact_match, f1, normalize_answer
from benchmarks.runs import run_once

DEPTHS = (1, 5, 20)
QA = ("--task", "qa", "--qa_prompt_format", "{question}")
READING = (*QA, "--text_maxlength", "256", "--no-chat_template")
BATCH, EPOCHS, JUDGED = 8, 2, 8
# Chosen on dev.jsonl.
TRAINING = (
    *("--freeze_reader", "--train_retriever", "--in_batch_negatives", "--n_context", "1", "--dropout", "0"),
    *("--retriever_n_context", "6", "--bm25_weight", "0.5", "--per_gpu_batch_size", str(BATCH), "--shuffle"),
    *("--temperature_gold", "0.4", "--temperature_score", "0.0026"),
    *("--scheduler", "linear", "--warmup_steps", "10", "--weight_decay", "0.01"),
)
MINILM, RESET = "minilm", "minilm_reset_2"
RATE = {MINILM: "5e-5", RESET: "1e-4"}
QUESTION = ("--gold_score_mode", "question")
QUESTION_WEIGHT = 0.75
BOTH = (*QUESTION, "--gold_question_weight", str(QUESTION_WEIGHT))
FUSED, RERANKED = ("--bm25_weight", "0.67"), ("--rerank_by_reader", "10")
SHOTS, SHOT_EPOCHS = 64, 2
TUNING = (
    *("--per_gpu_batch_size", str(BATCH), "--lr", "2e-5", "--weight_decay", "0", "--scheduler", "linear"),
    *("--warmup_steps", "3", "--dropout", "0", "--shuffle", "--target_maxlength", "32"),
)
FIRST = ("--n_context", "1")
ANSWERING = ("--n_context", "3", "--retriever_n_context", "3", "--generation_max_length", "32")
RANKS = "0123456789abcdefghijk"  # how a rank is kept
# By what the judged passages are ordered: what the likelihoods of question and answer count.
TEACHERS = {"found": (0, 0), "answer": (0, 1), "question": (1, 0), "both": (QUESTION_WEIGHT, 1 - QUESTION_WEIGHT)}
CLOZE = {"": "questions", "train": "cloze", "all": "cloze-all"}  # what a row learns from is called in file names
WORDS, MASKED = 8, re.compile(r"(?<=[a-z,] )(?:[A-Z][\w'-]+(?: [A-Z][\w'-]+)*|\d[\d,.]*\d|\d)")  # of a cloze question


@dataclass(frozen=True)
class Row:
    """A retriever: where it starts, and what it learns from.

    `judged`: flags that say how its passages are judged; None: it is not trained. `labels`: by the right paragraph.
    """

    name: str
    start: str = MINILM
    judged: tuple[str, ...] | None = None
    questions: int = 250
    flags: tuple[str, ...] = ()  # more flags of train.py
    labels: bool = False
    cloze: str = ""  # sentences with a gap in the place of questions: of the passages of "train", or of "all"

    @property
    def trained(self) -> bool:
        return self.judged is not None or self.labels

    def facts(self) -> dict[str, object]:
        """Everything that its figures depend on."""
        return {name: value for name, value in asdict(self).items() if name != "name"}

    def key(self, seed: int) -> str:
        """What it is called in file names, by everything that its training depends on."""
        if not self.trained:
            return self.start
        taught = "labels" if self.labels else "-".join(word.removeprefix("--") for word in self.judged or ())
        what = f"{self.start} {taught or 'answer'} {self.questions} {CLOZE[self.cloze]}"
        return key_of(f"{what} {' '.join(self.flags)} {seed}")


class Ranks(NamedTuple):
    """The rank (from 1) at which each question's own paragraph was found; 0: not among the first 20. (n,) each."""

    alone: np.ndarray
    fused: np.ndarray  # with BM25


class Reranked(NamedTuple):
    """The ranks by a row's retriever and BM25, and with the first 10 in the order of the reader's judgement, (n,)."""

    fused: np.ndarray
    reranked: np.ndarray


class Asked(NamedTuple):
    """How many questions are asked: the first ones of the split."""

    searched: int
    reranked: int
    answered: int


class NotMeasured(Exception):
    """A figure is not there, and nothing may be run."""


class Kept:
    """What was measured, in a file: the same recipe is not run again, on whichever machine it was.

    `only`: nothing is run any more; what is not there raises NotMeasured.
    """

    def __init__(self, path: Path | None, only: bool = False) -> None:
        self.path, self.only = path, only
        kept = json.loads(path.read_text()) if path and path.exists() else {"figures": {}, "core_seconds": {}}
        self.figures: dict[str, dict] = kept["figures"]  # of all questions, by recipe
        self.core_seconds: dict[str, float] = kept["core_seconds"]  # of every run, by its name
        self.measuring: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by recipe
        self.writing = threading.Lock()

    def measured(self, recipe: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a recipe, measured unless they are there; kept with a name, for those who read the file."""
        with self.measuring[recipe]:
            if recipe not in self.figures:
                if self.only:
                    raise NotMeasured(name)
                self._keep(recipe, measure() | {"name": name})
        return self.figures[recipe]

    def close(self) -> None:
        """Nothing is run from here on: writing about figures must not start runs."""
        self.only = True

    def spent(self, name: str, core_seconds: float) -> None:
        """Note what a run took."""
        with self.writing:
            self.core_seconds[name] = round(core_seconds)

    def _keep(self, recipe: str, figures: dict) -> None:
        with self.writing:
            self.figures[recipe] = figures
            if self.path:
                with replacing(self.path) as beside:
                    beside.write_text(json.dumps({"figures": self.figures, "core_seconds": self.core_seconds}))


@dataclass
class Bench:
    """Runs what is measured, once, and reads the results.

    Several threads may measure at a time: what two of them need, the second one waits for.
    """

    home: Path
    asked: Asked
    split: str = "test"
    precision: str = "bf16"
    threads: int = 1  # of each run
    kept: Kept = field(default_factory=lambda: Kept(None))
    one_at_a_time: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def prepare(self) -> None:
        """Fetch texts and models, and write the questions to ask: those of an article one after the other."""
        self.run(
            "prepare",
            self.data / "smollm2/config.json",
            "preprocessing/prepare_real.py",
            "--output_directory",
            self.data,
        )
        lines = self._lines(self.split)
        for n in set(self.asked):
            write(self._first(n), sorted(lines[:n], key=lambda line: line["metadata"]["passage"]))

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def reading(self) -> tuple[object, ...]:
        return *READING, "--precision", self.precision, "--embedder_precision", self.precision

    @property
    def reader(self) -> tuple[object, ...]:
        return "--reader_model_type", self.data / "smollm2", "--cache_judgements", self.home / "judgements.sqlite"

    def run(self, name: str, done: Path, *words: object) -> None:
        """Run a script, unless the same command has made `done`."""
        with self.one_at_a_time[name]:
            seconds = run_once(self.home / "logs" / f"{name}.log", done, *words, threads=self.threads)
            self.kept.spent(name, self.threads * seconds)

    def recipe(self, *facts: object) -> str:
        """A hash of everything that a figure of retrieval depends on; of answers, facts say what else."""
        how = self.reading, TRAINING, RATE, BATCH, EPOCHS, FUSED, RERANKED, self.split
        return hashlib.sha256(repr((how, facts)).encode()).hexdigest()[:16]

    # ---- retrieval

    def train(self, row: Row, seed: int) -> Path:
        """The directory of a run that trains a row's retriever."""
        name, steps, given = row.key(seed), EPOCHS * row.questions // BATCH, self._given(row, seed)
        flags = self._learning(row, *given)
        if QUESTION[1] in flags:
            self._judge_examples(row, *given)
        script = ("-m", "benchmarks.from_labels") if row.labels else ("train.py",)
        self.run(
            *(f"train-{name}", self.home / "runs" / name / f"checkpoint/step-{steps}", *script, *self.reading, *flags),
            *("--name", name, "--checkpoint_dir", self.home / "runs", "--restart", "--seed", seed),
            *("--total_steps", steps, "--save_freq", steps, "--log_freq", max(1, steps // 20)),
            *("--refresh_index", -(-steps // 4), *row.flags),
        )
        return self.home / "runs" / name

    def losses(self, row: Row, seed: int) -> np.ndarray:
        """The retriever's loss in each pass over a row's examples, (EPOCHS,)."""
        recipe = self.recipe("losses", row.facts(), seed)
        found = self.kept.measured(recipe, f"losses-{row.key(seed)}", lambda: {"passes": self._losses(row, seed)})
        return np.array(found["passes"])

    def _losses(self, row: Row, seed: int) -> list[float]:
        logged = [line for line in JsonlCorpus(self.train(row, seed) / "metrics.jsonl") if line["kind"] == "train"]
        passes = np.array_split([line["loss/retriever_loss"] for line in logged], EPOCHS)
        return [round(float(one.mean()), 4) for one in passes]

    def _given(self, row: Row, seed: int) -> tuple[Path, tuple[object, ...]]:
        """What a row's retriever is given: its examples, and flags that name where it starts."""
        return self.examples(row, seed), self._alone(Row("start", row.start), seed)[1]

    def _learning(self, row: Row, examples: Path, start: Sequence[object]) -> tuple[object, ...]:
        """Flags of its training."""
        rate = "--lr_retriever", RATE[row.start]
        return *TRAINING, *self.reader, "--train_data", examples, *start, *rate, *(row.judged or ())

    def examples(self, row: Row, seed: int) -> Path:
        """A file of a row's training questions, which the seed draws, each with one of its answers as the target."""
        rng, lines = random.Random(seed), self._lines("train")
        if row.cloze:
            of_train = {line["metadata"]["passage"]: line["passages"][0] for line in lines}
            passages = of_train.values() if row.cloze == "train" else JsonlCorpus(self.data / "corpus.jsonl")
            lines = [line for passage in passages for line in cloze(passage, rng)]
        rng.shuffle(lines)
        path = self.home / f"{CLOZE[row.cloze] if row.cloze else 'train'}-{row.questions}-{seed}.jsonl"
        with self.one_at_a_time[path.name]:
            write(path, [line | {"target": line["answers"][0]} for line in lines[: row.questions]])
        return path

    def search(self, row: Row, seed: int) -> Ranks:
        """Where each question's paragraph is found: by the row's retriever, and with BM25."""
        recipe = self.recipe(self.asked.searched, row.facts(), seed)
        return Ranks(**self._kept_ranks(recipe, row.key(seed), lambda: self._search(row, seed)))

    def _search(self, row: Row, seed: int) -> dict[str, list[int]]:
        (alone, saved), asked = self._alone(row, seed), self._first(self.asked.searched)
        return {"alone": alone, "fused": self._ranks(f"{row.key(seed)}-fused", asked, *saved, *FUSED)}

    def rerank(self, row: Row) -> Reranked:
        """The same in the order of the reader's judgement, on the first seed."""
        recipe, name = self.recipe(self.asked.reranked, row.facts(), 0, "reranked"), f"{row.key(0)}-reranked"
        return Reranked(**self._kept_ranks(recipe, name, lambda: self._rerank(row)))

    def _rerank(self, row: Row) -> dict[str, list[int]]:
        name, asked, fused = row.key(0), self._first(self.asked.reranked), (*self._alone(row, 0)[1], *FUSED)
        found, reranked = self._ranks(f"{name}-fused", asked, *fused), (*fused, *RERANKED, *self.reader)
        results = self._results(f"{name}-fused", asked)
        self._judge(f"judge-{self.split}-{name}", results, RERANKED[1], *reranked, "--eval_data", asked)
        return {"fused": found, "reranked": self._ranks(f"{name}-reranked", asked, *reranked)}

    def recognise(self, row: Row, taught: Row) -> np.ndarray:
        """Where a row's retriever finds the paragraphs of the questions that another one, or it, learnt from, (n,)."""

        def measure() -> dict[str, list[int]]:
            return {"ranks": self._ranks(f"{row.key(0)}-alone", self.examples(taught, 0), *self._alone(row, 0)[1])}

        recipe = self.recipe("recognise", row.facts(), taught.facts())
        return self._kept_ranks(recipe, f"{row.key(0)}-of-{taught.key(0)}", measure)["ranks"]

    def _kept_ranks(self, recipe: str, name: str, measure: Callable[[], dict[str, list[int]]]) -> dict[str, np.ndarray]:
        """Ranks by what they are called. In the file a rank is one character: 0 to 9, and a to k for 10 to 20."""

        def text_of_ranks() -> dict[str, str]:
            return {key: "".join(RANKS[rank] for rank in ranks) for key, ranks in measure().items()}

        found = self.kept.measured(recipe, name, text_of_ranks)
        return {key: np.array([int(rank, 36) for rank in ranks]) for key, ranks in found.items() if key != "name"}

    def _alone(self, row: Row, seed: int) -> tuple[list[int], tuple[object, ...]]:
        """The ranks by a row's retriever, and flags that name it and the index that is saved on the way."""
        name, model, index = row.key(seed), self.model(row, seed), self.home / "indices" / row.key(seed)
        corpus = ("--passages", self.data / "corpus.jsonl", "--save_index_path", index)
        ranks = self._ranks(f"{name}-alone", self._first(self.asked.searched), *model, *corpus)
        return ranks, (*model, "--load_index_path", index)

    def model(self, row: Row, seed: int) -> tuple[object, ...]:
        """Flags that name a row's retriever."""
        trained = ("--model_path", self.train(row, seed)) if row.trained else ()
        return "--retriever_model_path", self.data / row.start, *trained

    def bm25(self, n: int) -> np.ndarray:
        """Where BM25 alone finds the first n questions' paragraphs, (n,)."""
        flags = ("--retriever_model_path", self.data / MINILM, "--passages", self.data / "corpus.jsonl")
        flags = (*flags, "--bm25_weight", "1")
        recipe, asked = self.recipe(n, "bm25"), self._first(n)
        return self._kept_ranks(recipe, "bm25", lambda: {"ranks": self._ranks("bm25", asked, *flags)})["ranks"]

    def _ranks(self, name: str, asked: Path, *flags: object) -> list[int]:
        found = self._evaluate(name, asked, "--retrieve_only", "--n_context", max(DEPTHS), *flags)
        return [rank_in(line) for line in JsonlCorpus(found)]

    def teacher(self, row: Row, seed: int) -> dict[str, np.ndarray]:
        """Of the questions whose own paragraph is judged, whether it is the best of those that are judged: as the start
        and BM25 find them, by the likelihood of the answer behind it, of the question, and of both, (n,) each.
        `judged`, (m,): whether it is judged, for all questions.
        """
        recipe = self.recipe("teacher", row.facts(), JUDGED, seed)
        found = self.kept.measured(recipe, f"teacher-{row.key(seed)}", lambda: self._teacher(row, seed))
        return {name: np.array(values, float) for name, values in found.items() if name != "name"}

    def _teacher(self, row: Row, seed: int) -> dict[str, list[float]]:
        results = self._judge_examples(row, *self._given(row, seed))
        pairs = {(pair["id"], pair["passage"]): pair for pair in JsonlCorpus(results.with_suffix(".judged"))}
        firsts: dict[str, list[float]] = {name: [] for name in ("judged", *TEACHERS)}
        for line in JsonlCorpus(results):
            own, ids = line["metadata"]["passage"], [passage["id"] for passage in line["passages"][:JUDGED]]
            firsts["judged"].append(own in ids)
            for name, (question, answer) in TEACHERS.items() if own in ids else ():
                by = [pairs[line["id"], key] for key in ids]
                scores = [question * pair["question"] + answer * pair["answer"] for pair in by]
                firsts[name].append(ids[int(np.argmax(scores))] == own)  # the first of those that are equal
        return {name: [float(value) for value in values] for name, values in firsts.items()}

    def _judge_examples(self, row: Row, examples: Path, start: Sequence[object]) -> Path:
        """Let the reader judge what the start finds for the examples: the result file of what was found."""
        name = f"judge-{row.start}-{examples.stem}"
        found = self.home / "runs" / name / f"{examples.stem}-step-0.jsonl"
        where = ("--name", name, "--checkpoint_dir", self.home / "runs", "--eval_data", examples)
        search = ("--retrieve_only", "--per_gpu_batch_size", 64, "--write_results", "--bm25_weight", "0.5")
        self.run(f"{name}-found", found, "evaluate.py", *self.reading, *start, *where, *search, "--n_context", JUDGED)
        self._judge(name, found, JUDGED, *self._learning(row, examples, start))
        return found

    def _judge(self, name: str, results: Path, k: int | str, *flags: object) -> None:
        """Let the reader judge the first k passages of each question of a result file, passage by passage."""
        where = ("--name", name, "--checkpoint_dir", self.home / "runs")
        done = results.with_suffix(".judged")
        self.run(name, done, "-m", "benchmarks.judge", results, k, *self.reading, *flags, *where)

    # ---- answers

    def answers(
        self, name: str, row: Row | None, *flags: object, shots: int = SHOTS, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """What the language model answers with the passages of a row, after so many examples: metric to (n,)."""
        how = (TUNING, SHOT_EPOCHS, shots, seed) if shots else ()
        recipe = self.recipe("answers", self.asked.answered, row and row.facts(), flags, ANSWERING, *how)
        name = f"answers-{key_of(name)}-{shots}-{seed}"
        found = self.kept.measured(recipe, name, lambda: scores(self._answers(name, row, flags, shots, seed)))
        return {metric: np.array(found[metric], float) for metric in METRICS}

    def _answers(
        self, name: str, row: Row | None, flags: Sequence[object], shots: int, seed: int
    ) -> list[tuple[str, list[str]]]:
        """Each answer, and the right ones."""
        steps, model = SHOT_EPOCHS * shots // BATCH, self.reader[:2]
        if row is not None:
            flags = (*self._alone(row, 0)[1], *flags)
        if shots:
            examples = self.examples(Row("", questions=shots), seed)
            self.run(
                *(f"tune-{name}", self.home / "runs" / name / f"checkpoint/step-{steps}", "train.py", *self.reading),
                *(*TUNING, *ANSWERING, *model, "--train_data", examples, "--total_steps", steps, "--save_freq", steps),
                *("--log_freq", 4, "--name", name, "--checkpoint_dir", self.home / "runs", "--restart", "--seed", seed),
                *flags,
            )
            model = (*model, "--model_path", self.home / "runs" / name)
        found = self._evaluate(name, self._first(self.asked.answered), *ANSWERING, *flags, *model)
        return [(line["generation"], line["answers"]) for line in JsonlCorpus(found)]

    def _evaluate(self, name: str, asked: Path, *flags: object) -> Path:
        """The result file of an evaluation."""
        results = self._results(name, asked)
        name = results.parent.name
        where = ("--name", name, "--checkpoint_dir", self.home / "runs", "--eval_data", asked, "--write_results")
        batch = ("--per_gpu_batch_size", 64 if "--retrieve_only" in flags else 8)
        self.run(name, results, "evaluate.py", *self.reading, *batch, *where, *flags)
        return results

    def _results(self, name: str, asked: Path) -> Path:
        return self.home / "runs" / f"{asked.stem}-{name}" / f"{asked.stem}-step-0.jsonl"

    def _first(self, n: int) -> Path:
        """A file of the split's first n questions."""
        return self.home / f"{self.split}-{n}.jsonl"

    def _lines(self, split: str) -> list[dict]:
        """Questions, each with its own paragraph, for runs that are given it (--use_file_passages)."""
        passages = {passage["id"]: passage for passage in JsonlCorpus(self.data / "corpus.jsonl")}
        lines = JsonlCorpus(self.data / f"{split}.jsonl")
        return [line | {"passages": [passages[line["metadata"]["passage"]]]} for line in lines]


def all_at_once(jobs: int, tasks: Iterable[Callable[[], object]]) -> None:
    """Run tasks in this order, so many at a time. After one that fails no further one begins.

    Raises:
        BaseException: of the task that failed first, when those that ran beside it are done.
    """
    waiting, taking, failures = iter(tasks), threading.Lock(), []

    def work() -> None:
        while not failures:
            with taking:
                task = next(waiting, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:
                failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def cloze(passage: dict, rng: random.Random) -> list[dict]:
    """Sentences of a passage, each with a name or a number masked, as questions that it answers."""
    lines = []
    for i, sentence in enumerate(re.split(r"(?<=[.!?]) +(?=[A-Z])", passage["text"])):
        if len(sentence.split()) >= WORDS and (spans := list(MASKED.finditer(sentence))):
            span = rng.choice(spans)
            question = f"{sentence[: span.start()]}___{sentence[span.end() :]}"
            of_passage = {"metadata": {"passage": passage["id"]}, "passages": [passage]}
            lines.append({"id": f"{passage['id']}-{i}", "question": question, "answers": [span.group()]} | of_passage)
    return lines


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


def scores(pairs: Sequence[tuple[str, list[str]]]) -> dict[str, list[float]]:
    """Each of the `METRICS` of answers, each with the right ones."""
    return {metric: [round(float(score(*pair)), 3) for pair in pairs] for metric, score in METRICS.items()}


def contained(generation: str, answers: Sequence[str]) -> bool:
    """Whether an answer stands somewhere in what was written, both normalized as for exact match."""
    said = f" {normalize_answer(generation)} "
    return any(f" {normalize_answer(answer)} " in said for answer in answers)


METRICS = {"exact match": exact_match, "F1": f1, "answer contained": contained}
