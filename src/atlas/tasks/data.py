"""Batches of examples from a data file: the same examples at every number of ranks."""

from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import numpy as np
import torch

from atlas.config import Config, evaluation_name
from atlas.files.jsonl import DataError, JsonlCorpus
from atlas.model.tokenization import ReaderTokenizer
from atlas.runtime import distributed
from atlas.runtime.device import evaluation_batch_size
from atlas.runtime.tracking import log, read_shares
from atlas.tasks import TASKS, Example, Task, TaskSetup, example_rng

T = TypeVar("T")


class Data:
    """A data file (or several, one after the other) as batches of examples.

    The global batch of a step is the next `world_size · batch_size` places; rank r takes the r-th run of `batch_size`.
    So W ranks see in one step what one rank sees in W steps. A place is a line. If the task makes several examples of a
    line, a place is one of these; those of a line follow one another unless they are shuffled.

    Raises:
        ValueError: there is no line.
    """

    def __init__(
        self, corpus: JsonlCorpus, task: Task, *, seed: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        if len(corpus) == 0:
            raise ValueError(f"{', '.join(map(str, corpus.sources))}: there is no line with data in it")
        self.corpus, self.task, self.seed = corpus, task, seed
        self.places = len(corpus) * task.examples_per_line
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._resumed = (0, 0)  # a step, and the examples that had been seen after it
        self._order = (-1, np.empty(0, np.int64))  # the epoch that was shuffled last, and its order

    @classmethod
    def open(
        cls,
        paths: tuple[str, ...],
        config: Config,
        tokenizer: ReaderTokenizer | None,
        *,
        training: bool = False,
        batch_size: int | None = None,
    ) -> Self:
        """The data in some files for this rank, every line of which has been read once. Collective.

        Args:
            tokenizer: the reader's, for tasks that build queries with it.
            batch_size: by default `--per_gpu_batch_size`.

        Raises:
            DataError: a bad line, before anything expensive starts.
            ValueError: there is no line, or the task skips all of them.
        """
        with distributed.main_first(f"opening {', '.join(paths)}"):  # rank 0 unpacks and finds the lines once
            corpus = JsonlCorpus(paths)
        setup = TaskSetup(
            flags=config.tasks,
            tokenizer=tokenizer,
            text_maxlength=config.model.text_maxlength,
            answers_needed=not config.model.retrieve_only,
            passages_needed=config.model.use_file_passages,
            training=training,
        )
        data = cls(
            corpus,
            TASKS[config.tasks.task](setup),
            seed=config.run.seed,
            batch_size=batch_size or config.run.per_gpu_batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        data._check_all()
        return data

    @classmethod
    def open_each(cls, config: Config, tokenizer: ReaderTokenizer | None, device: torch.device) -> dict[str, Self]:
        """The evaluation data: name of the file without its ending -> data. Collective. Raises: as `open`."""
        run, tokens = config.run, config.model.n_context * config.model.text_maxlength
        rows = run.per_gpu_eval_batch_size or evaluation_batch_size(device, run.per_gpu_batch_size, tokens)
        files = {evaluation_name(path): path for path in run.eval_data}
        return {name: cls.open((path,), config, tokenizer, batch_size=rows) for name, path in files.items()}

    def _check_all(self) -> None:
        """Each rank checks its share of the lines. Collective."""
        used = sum(distributed.gather_objects(read_shares("reading the data", len(self), "lines", self.check)))
        name = ", ".join(map(str, self.corpus.sources))
        if used == 0:
            raise ValueError(f"{name}: no line is left, because the task skips {self.task.skips}")
        if used < len(self):
            log.info("%s: %d of %d lines are skipped (%s)", name, len(self) - used, len(self), self.task.skips)

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self.corpus)

    def check(self, lines: range, read: Callable[[int], object]) -> int:
        """Read lines once, so that a bad one is found before anything expensive starts.

        Args:
            read: called from time to time with the number of lines read since the last call.

        Returns:
            How many of them the task does not skip.

        Raises:
            DataError: naming file, line and what is wrong.
        """
        used = 0
        for start in range(0, len(lines), 1000):
            chunk = lines[start : start + 1000]
            used += sum(self._of_line(line, self.task.check) for line in chunk)
            read(len(chunk))
        return used

    def example(self, place: int, epoch: int) -> Example | None:
        """The example at a place; None if the task skips it. Raises: DataError."""
        line, number = divmod(place, self.task.examples_per_line)
        rng = example_rng(self.seed, epoch, line)
        return self._of_line(line, lambda record: self.task.example(record, rng, number))

    def _of_line(self, line: int, function: Callable[[dict], T]) -> T:
        try:
            return function(self.corpus[line])
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{self.corpus.where(line)}: {error}") from error

    def resume(self, step: int, examples: int) -> None:
        """Continue after so many examples, which a run on perhaps another number of ranks has seen in `step` steps."""
        self._resumed = (step, examples)

    def examples_after(self, step: int) -> int:
        """How many examples all ranks together have seen after so many steps, skipped ones included."""
        finished, examples = self._resumed
        return examples + (step - finished) * self.world_size * self.batch_size

    def first_example(self, step: int) -> int:
        """The number of the first example that this rank sees in a step, counted over all ranks, steps and epochs."""
        return self.examples_after(step - 1) + self.rank * self.batch_size

    def training_batch(self, step: int, shuffle: bool) -> list[Example]:
        """This rank's examples of a step, counted from 1. After the last line comes the first one again.

        The places of a step do not depend on other steps, so a line that the task skips makes the batch smaller, or
        empty.
        """
        first, examples = self.first_example(step), []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.places)
            place = self._shuffled(epoch)[place] if shuffle else place
            examples.append(self.example(int(place), epoch))
        return [example for example in examples if example is not None]

    def evaluation_batches(self) -> Iterator[list[Example]]:
        """The whole file once. Every rank gets the same number of batches; its last ones may be empty."""
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
            # half the memory of int64, which every rank takes: 120 MB for 30 million lines
            places = np.arange(self.places, dtype=np.int32 if self.places < 2**31 else np.int64)
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(places))
        return self._order[1]
