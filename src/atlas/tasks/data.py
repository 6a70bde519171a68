"""Batches of examples from a data file: the same examples at every number of ranks."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from atlas.config import Config, evaluation_name
from atlas.config import Model as ModelSettings
from atlas.files.jsonl import BadLine, DataError, JsonlCorpus
from atlas.files.qrels import Judgements, read_judgements
from atlas.model.inputs import Inputs, count_filling
from atlas.model.prompts import SENTINEL, PromptInputs, check_of_questions
from atlas.model.tokenization import AnyReaderTokenizer
from atlas.runtime import distributed
from atlas.runtime.bad_lines import bad_lines_file, report_bad_lines
from atlas.runtime.device import evaluation_batch_size
from atlas.runtime.tracking import log, read_shares
from atlas.tasks import TASKS, Example, Judged, Task, TaskSetup, example_rng

MOST_LOOKED_AT = 20_000  # questions of a file whose length in tokens is looked at: a second or two


class Data:
    """A data file (or several, one after the other) as batches of examples.

    The global batch of a step is the next `world_size · batch_size` places; rank r takes the r-th run of `batch_size`.
    So W ranks see in one step what one rank sees in W steps. A place is a line that the task does not skip. If the task
    makes several examples of a line, a place is one of these; those of a line follow one another unless they are
    shuffled.

    Raises:
        ValueError: a file has no line.
    """

    def __init__(
        self, corpus: JsonlCorpus, task: Task, *, seed: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        for path, lines in zip(corpus.sources, corpus.rows_of_files(), strict=True):
            if not lines:
                raise ValueError(f"{path}: there is no line with data in it")
        self.corpus, self.task, self.seed = corpus, task, seed
        self.judgements: Judgements | None = None  # by the queries' ids
        self.check_query: Callable[[str, Sequence[str]], None] | None = None  # says what is too long for the reader
        self._cut_lines: Counter[str] = Counter()  # lines of which something was cut, by what it is
        self._unread: set[str] = set()  # fields that the task does not read
        self._judged_lines = 0  # lines with an id that is in the judgements
        self._bad: list[BadLine] | None = None  # lines that cannot be read; None: the first one is an error
        self._kept: np.ndarray | None = None  # the lines that the task does not skip; None: all of them
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._resumed = (0, 0)  # a step, and the examples that had been seen after it
        self._order = (-1, np.empty(0, np.int64))  # the epoch that was shuffled last, and its order

    @classmethod
    def open(
        cls,
        paths: tuple[str, ...],
        config: Config,
        tokenizer: AnyReaderTokenizer | None,
        *,
        training: bool = False,
        batch_size: int | None = None,
        qrels: str | None = None,
    ) -> Self:
        """The data in some files for this rank, every line of which has been read once. Collective.

        Args:
            tokenizer: the reader's, for tasks that build queries with it.
            batch_size: by default `--per_gpu_batch_size`.
            qrels: the file of judgements.

        Raises:
            DataError: a bad line, before anything expensive starts.
            ValueError: a file has no line, or the task skips all of its lines.
        """
        with distributed.main_first(f"opening {', '.join(paths)}"):  # rank 0 unpacks and finds the lines once
            corpus = JsonlCorpus(paths)
        setup = TaskSetup(
            flags=config.tasks,
            tokenizer=tokenizer,
            text_maxlength=config.model.text_maxlength,
            answers_needed=config.retriever_training.needs_answers if training else not config.model.retrieve_only,
            passages_needed=config.model.use_file_passages,
            training=training,
        )
        task, place = TASKS[config.tasks.task](setup), (distributed.rank(), distributed.world_size())
        size = batch_size or config.run.per_gpu_batch_size
        data = cls(corpus, task, seed=config.run.seed, batch_size=size, rank=place[0], world_size=place[1])
        if qrels is not None:
            data.judgements = read_judgements(Path(qrels))
        if tokenizer is not None and not tokenizer.fuses:
            learning = config.retriever_training if training else None
            data.check_query = check_of_questions(config.model, tokenizer, learning)
        what = "train_data" if training else f"eval_data.{evaluation_name(paths[0])}"
        data._check_all(bad_lines_file(config.run, what))
        if qrels is not None:
            data._report_judgements(qrels)
        if tokenizer is not None and not config.model.retrieve_only:
            if not config.model.closed_book:
                data._report_long_questions(config.model, tokenizer)
            if setup.answers_needed:
                data._report_long_answers(config.model, tokenizer, training)
        return data

    @classmethod
    def open_each(cls, config: Config, tokenizer: AnyReaderTokenizer | None, device: torch.device) -> dict[str, Self]:
        """The evaluation data: name of the file without its ending -> data. Collective. Raises: as `open`."""
        run, tokens = config.run, config.model.tokens_of_a_question
        rows = evaluation_batch_size(device, run.per_gpu_eval_batch_size, run.per_gpu_batch_size, tokens)
        files = zip(run.eval_data, run.qrels or [None] * len(run.eval_data), strict=True)
        return {
            evaluation_name(path): cls.open((path,), config, tokenizer, batch_size=rows, qrels=qrels)
            for path, qrels in files
        }

    def _check_all(self, bad_lines: Path | None = None) -> None:
        """Each rank checks its share of the lines, and all of them keep the same ones. Collective.

        Args:
            bad_lines: leave out lines that cannot be read, and write them to this file.
        """
        self._bad = None if bad_lines is None else []
        share = read_shares("reading the data", len(self.corpus), "lines", self.check)
        of_ranks = distributed.gather_objects(
            (np.packbits(share), len(share), self._cut_lines, sorted(self._unread), self._judged_lines)
        )
        shares, sizes, cuts, unread, judged = zip(*of_ranks, strict=True)
        for what, n in sum(map(Counter, cuts), Counter()).items():
            log.warning("%s: %d of %d lines have %s, which is cut", self.name, n, len(self.corpus), what)
        if fields := sorted(set().union(*unread)):
            more = f" and {len(fields) - 20} more" if len(fields) > 20 else ""
            log.info("%s: fields that are not read: %s%s", self.name, ", ".join(fields[:20]), more)
        self._judged_lines = sum(judged)
        bad = [] if bad_lines is None else report_bad_lines(self.corpus, self._bad, bad_lines)
        counts = [np.unpackbits(bits, count=n).view(bool) for bits, n in zip(shares, sizes, strict=True)]
        self.keep(np.concatenate(counts), len(bad))

    def _report_judgements(self, qrels: str) -> None:
        """Say how many lines are judged. Raises: ValueError if none is."""
        if not self._judged_lines:
            raise ValueError(
                f"--qrels {qrels}: none of its {len(self.judgements)} queries is the id of a line of {self.name}"
            )
        log.info("%s: %s judges %d of the %d lines", self.name, qrels, self._judged_lines, len(self))

    def _report_long_questions(self, settings: ModelSettings, tokenizer: AnyReaderTokenizer) -> None:
        """Warn of questions that leave no room for a passage. Collective."""

        def count(examples: list[Example]) -> int:
            return count_filling([example.query for example in examples], settings, tokenizer)

        filling, looked_at = self._count("questions", count)
        if filling:
            said = "%s: %d of %s fill --text_maxlength %d: their passages are not read; raise it"
            log.warning(said, self.name, filling, looked_at, settings.text_maxlength)

    def _report_long_answers(self, settings: ModelSettings, tokenizer: AnyReaderTokenizer, training: bool) -> None:
        """Warn of targets that are cut, or in an evaluation of lines whose answers are all too long. Collective."""
        longest = settings.target_maxlength if training else settings.generation_max_length
        if longest in (None, -1):
            return
        extra = len((settings.decoder_format or "").encode()) + 2
        whole = replace(settings, target_maxlength=None)
        inputs = (Inputs if tokenizer.fuses else PromptInputs)(whole, tokenizer, None, device=torch.device("cpu"))

        def count(examples: list[Example]) -> int:
            texts = [text for example in examples if (text := example.target if training else _shortest(example))]
            # A token has at least one byte: short ones need no tokenizer.
            suspects = [text for text in texts if len(text.encode()) + extra > longest]
            # Of a generation there is a start token, and EOS need not be written.
            return sum(len(row) > longest for row in inputs.target_tokens(suspects))

        longer, looked_at = self._count("targets" if training else "lines", count)
        if longer and training:
            said = "%s: %d of %s are longer than --target_maxlength %d and are cut: raise it"
            log.warning(said, self.name, longer, looked_at, longest)
        elif longer:
            said = "%s: %d of %s have no answer that can be written with --generation_max_length %d: raise it"
            log.warning(said, self.name, longer, looked_at, longest)

    def _count(self, what: str, count: Callable[[list[Example]], int]) -> tuple[int, str]:
        """How many examples are of a kind, and of how many. Of many lines only a part is looked at. Collective."""
        every = -(-len(self) // MOST_LOOKED_AT)
        lines = range(0, len(self), every)

        def of_share(share: range, read: Callable[[int], object]) -> int:
            found = 0
            for start in range(0, len(share), 1000):
                places = [lines[i] * self.task.examples_per_line for i in share[start : start + 1000]]
                examples = [self.example(place, epoch=0) for place in places]
                found += count([example for example in examples if example])
                read(len(places))
            return found

        found = sum(distributed.gather_objects(read_shares(f"reading the {what}", len(lines), "lines", of_share)))
        return found, f"{len(lines)} {what}" + (f" (one in {every} was looked at)" if every > 1 else "")

    def __len__(self) -> int:
        """How many lines there are, without those that the task skips."""
        return len(self.corpus) if self._kept is None else len(self._kept)

    @property
    def places(self) -> int:
        """How many places an epoch has."""
        return len(self) * self.task.examples_per_line

    @property
    def name(self) -> str:
        """The files, for messages."""
        return ", ".join(map(str, self.corpus.sources))

    def check(self, lines: range, read: Callable[[int], object]) -> np.ndarray:
        """Read lines once, so that a bad one is found before anything expensive starts.

        Args:
            read: called from time to time with the number of lines read since the last call.

        Returns:
            Which of them the task does not skip, (lines,) bool.

        Raises:
            DataError: naming file, line and what is wrong.
        """
        counts = np.empty(len(lines), bool)
        for start in range(0, len(lines), 1000):
            chunk = lines[start : start + 1000]
            for i, line in enumerate(chunk, start):
                counts[i] = self.corpus.read(line, self._counts, self._bad) or False
                self._cut_lines.update(self.task.cuts.keys())
                self.task.cuts.clear()
            read(len(chunk))
        return counts

    def _counts(self, record: dict) -> bool:
        """Whether a line has an example that can be scored. Raises: ValueError, as `Task.process`."""
        counts = self.task.check(record)
        self._unread.update(self.task.unread(record))
        if not counts or (self.judgements is None and self.check_query is None):
            return counts
        example = self.task.example(record, random.Random(0), 0)
        if self.check_query is not None:
            drawn = example.answers if record.get("target") is None else []  # one of them is the target
            self.check_query(example.query, [example.target, *drawn])
        if self.judgements is None:
            return counts
        judged = str(example.id) in self.judgements
        self._judged_lines += judged
        return judged or bool(example.answers)

    def keep(self, counts: np.ndarray, bad: int = 0) -> None:
        """Leave out the lines that the task skips, so that batches are full.

        Args:
            counts: what `check` returns for all lines, (lines of all files,) bool.
            bad: how many of them cannot be read, which has been said.

        Raises:
            ValueError: no line of a file is left.
        """
        skips = self.task.skips
        if self.judgements is not None:
            skips = f"{skips}, and lines without answers that --qrels does not judge"
        for path, lines in zip(self.corpus.sources, self.corpus.rows_of_files(), strict=True):
            if not counts[lines.start : lines.stop].any():
                also = " and bad lines are left out" if bad else ""
                raise ValueError(f"{path}: no line is left, because the task skips {skips}{also}")
        if not counts.all():
            self._kept = np.flatnonzero(counts).astype(_smallest_type(len(counts)))
            if skipped := len(counts) - len(self._kept) - bad:
                log.info("%s: %d of %d lines are skipped (%s)", self.name, skipped, len(counts), skips)

    def line(self, place: int) -> int:
        """The line of a place, counted from 0 over all files, with those that the task skips."""
        index = place // self.task.examples_per_line
        return index if self._kept is None else int(self._kept[index])

    def example(self, place: int, epoch: int) -> Example | None:
        """The example at a place; None if the task makes fewer of this line. Raises: DataError."""
        line, number = self.line(place), place % self.task.examples_per_line
        rng = example_rng(self.seed, epoch, line)
        example = self.corpus.read(line, lambda record: self.task.example(record, rng, number))
        if self.judgements is None or example is None:
            return example
        relevance = self.judgements.get(str(example.id))
        return replace(example, judged=Judged(relevance) if relevance else None)

    def resume(self, step: int, examples: int, places: int | None) -> None:
        """Continue after so many examples, which a run on perhaps another number of ranks has seen in `step` steps.

        Args:
            places: how many an epoch had in that run. None: its version counted the lines that the task skips as well.
                The examples are converted then: the run continues at the same line of the same epoch.
        """
        if places is None and self._kept is not None:
            per_line = self.task.examples_per_line
            epoch, place = divmod(examples, len(self.corpus) * per_line)
            line, number = divmod(place, per_line)
            place = int(np.searchsorted(self._kept, line)) * per_line + (number if line in self._kept else 0)
            log.warning(
                "The checkpoint was saved by a version that counted lines that the task skips: its %d examples are %d "
                "without them. From here on every batch is full. With --shuffle the rest of this epoch is another "
                "choice of lines than it would have been",
                examples,
                epoch * self.places + place,
            )
            examples = epoch * self.places + place
        elif places not in (None, self.places):
            log.warning("An epoch has %d examples now, and had %d when the checkpoint was saved", self.places, places)
        self._resumed = (step, examples)

    def examples_after(self, step: int) -> int:
        """How many examples all ranks together have seen after so many steps."""
        finished, examples = self._resumed
        return examples + (step - finished) * self.world_size * self.batch_size

    def first_example(self, step: int) -> int:
        """The number of the first example that this rank sees in a step, counted over all ranks, steps and epochs."""
        return self.examples_after(step - 1) + self.rank * self.batch_size

    def training_batch(self, step: int, shuffle: bool) -> list[Example]:
        """This rank's examples of a step, counted from 1: `batch_size` of them. After the last line comes the first.

        Raises:
            DataError: the task makes no example of a line that it did not skip when the data was checked.
        """
        first, examples = self.first_example(step), []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.places)
            place = int(self._shuffled(epoch)[place]) if shuffle else place
            example = self.example(place, epoch)
            if example is None:
                raise DataError(
                    f"{self.corpus.where(self.line(place))}: the task {type(self.task).__name__} makes no example of "
                    "this line, although its `check` counts it; in training a line is skipped always or never"
                )
            examples.append(example)
        return examples

    def evaluation_batches(self) -> Iterator[list[Example]]:
        """The whole file once. Every rank gets the same number of batches; its last ones may be smaller or empty."""
        everybody = self.world_size * self.batch_size
        for start in range(0, self.places, everybody):
            first = start + self.rank * self.batch_size
            places = range(min(first, self.places), min(first + self.batch_size, self.places))
            examples = [self.example(place, epoch=0) for place in places]
            yield [example for example in examples if example is not None]

    @property
    def evaluation_rounds(self) -> int:
        """How many batches `evaluation_batches` gives."""
        return -(-self.places // (self.world_size * self.batch_size))

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            places = np.arange(self.places, dtype=_smallest_type(self.places))
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(places))
        return self._order[1]


def _smallest_type(n: int) -> type[np.integer]:
    """For numbers below n: every rank keeps them, and 30 million take 120 MB in int32."""
    return np.int32 if n <= 2**31 else np.int64


def _shortest(example: Example) -> str:
    """The shortest answer, with what the decoder writes before it."""
    if not example.answers:
        return ""
    found, shortest = SENTINEL.match(example.target), min(example.answers, key=len)
    return f"{found[0]} {shortest}" if found and not SENTINEL.match(shortest) else shortest
