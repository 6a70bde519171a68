"""A loaded model that answers questions: it searches, reads, and says which passages it answered from."""

import contextlib
import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers.generation.streamers import BaseStreamer

from atlas.asking.answers import Answer, Passage
from atlas.config import Config
from atlas.embedding import passage_embedder
from atlas.evaluation.answering import Answering, Encoded
from atlas.files.jsonl import decode
from atlas.model.load import Model
from atlas.model.reader import token_log_probabilities
from atlas.model.signals import watched_logits
from atlas.model.tokenization import AnyReaderTokenizer
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from atlas.tasks import Example, Task

Question = str | Mapping[str, Any]  # a text, or a line of data of the model's task
EXAMPLES_FROM = 200  # lines of a file


class AnsweringModel:
    """Reader, retriever and index, ready to be asked; `atlas.load` makes it. Threads may share one: they take turns.

    Args:
        retrieval: None where the model answers without a search.
        task: how a question becomes a query.
        name: what people call it.
        examples: files of data to take examples from.

    Attributes:
        k: how many passages are read where nothing else is asked for.
        batch_size: how many questions are answered together, as in an evaluation.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        retrieval: Retrieval | None,
        task: Task,
        device: torch.device,
        name: str,
        examples: Sequence[Path] = (),
    ) -> None:
        self.config, self.model, self.retrieval, self.task = config, model, retrieval, task
        self.device, self.name, self.example_files = device, name, examples
        self.k = config.model.n_context
        run, tokens = config.run, config.model.tokens_of_a_question
        self.batch_size = devices.evaluation_batch_size(
            device, run.per_gpu_eval_batch_size, run.per_gpu_batch_size, tokens
        )
        self._answering = Answering(
            model, config.model, config.retriever_training, device, config.optimisation.precision
        )
        self._one_at_a_time = threading.RLock()

    def __repr__(self) -> str:
        k = min(self.k, self.passages) if self.retrieval else self.k
        return f"<{self.name}: {k} of {self.passages:,} passages are read, on {devices.describe(self.device)}>"

    @property
    def passages(self) -> int:
        """How many there are to search."""
        return len(self.retrieval.passages) if self.retrieval else 0

    @overload
    def ask(self, question: Question, k: int | None = None, *, judge: bool = True) -> Answer: ...
    @overload
    def ask(
        self, question: Question, k: int | None = None, *, stream: Literal[True], judge: bool = True
    ) -> "AnswerStream": ...
    @overload
    def ask(self, question: Sequence[Question], k: int | None = None, *, judge: bool = True) -> list[Answer]: ...

    def ask(
        self, question: Question | Sequence[Question], k: int | None = None, *, stream: bool = False, judge: bool = True
    ) -> "Answer | AnswerStream | list[Answer]":
        """Answer a question, or each of a list, in batches.

        Args:
            question: a text; or an object with the fields of a line of data, as the model's task reads it.
            k: how many passages to find and to read.
            stream: of a single question, return an `AnswerStream`: the answer's text in pieces.
            judge: also say what the answer's score is and how useful each passage was. It takes a pass of the decoder
                for each passage.

        Raises:
            ValueError: an empty question, or one without the fields that the task needs; k below 1.
        """
        k = self._checked(k)
        if self.config.model.retrieve_only:
            raise ValueError(f"{self.name} has no reader, so it can search but not answer")
        if isinstance(question, str | Mapping):
            if stream:
                work = partial(self._answer, [self._example(question)], k, judge)
                return AnswerStream(work, self.model.inputs.reader_tokenizer, self._skipped(question))
            (answer,) = self._answer([self._example(question)], k, judge)
            return answer
        if stream:
            raise ValueError("stream=True answers a single question: give one, not a list")
        examples = [self._example(one) for one in question]
        starts = range(0, len(examples), self.batch_size)
        return [answer for i in starts for answer in self._answer(examples[i : i + self.batch_size], k, judge)]

    @overload
    def search(self, question: Question, k: int | None = None) -> list[Passage]: ...
    @overload
    def search(self, question: Sequence[Question], k: int | None = None) -> list[list[Passage]]: ...

    def search(
        self, question: Question | Sequence[Question], k: int | None = None
    ) -> list[Passage] | list[list[Passage]]:
        """The best k passages for a question, or for each of a list: a list of `Passage`, or a list of such lists.

        Raises:
            ValueError: as `ask`; the model answers without a search.
        """
        k = self._checked(k)
        if isinstance(question, str | Mapping):
            return self.search([question], k)[0]
        examples, found = [example for _, example in map(self._example, question)], []
        for start in range(0, len(examples), self.batch_size):
            with self._one_at_a_time:
                batch = examples[start : start + self.batch_size]
                hits = self._answering.find(self._searching(), batch, k, self.task.excluded(batch))
            found += _passages(hits.passages, hits.scores.tolist())
        return found

    def embed(self, question: Question | Sequence[Question]) -> torch.Tensor:
        """The query encoder's embedding of a question, (D,), or of each of a list, (n, D): fp32 on the CPU.

        Raises:
            ValueError: as `search`.
        """
        if isinstance(question, str | Mapping):
            return self.embed([question])[0]
        retrieval = self._searching()
        queries = [self._example(one)[1].query for one in question]
        batches = [queries[i : i + self.batch_size] for i in range(0, len(queries), self.batch_size)]
        with self._one_at_a_time:
            parts = [retrieval.embed(batch).cpu() for batch in batches]
        return torch.cat([torch.zeros(0, retrieval.retriever.dim), *parts])

    @torch.no_grad()
    def embed_passages(self, passages: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """The passage encoder's embeddings of n passages with `text` and perhaps `title`: (n, D) fp32 on the CPU.

        Raises:
            ValueError: as `search`.
        """
        retrieval = self._searching()
        embed = passage_embedder(retrieval.retriever.passage_encoder, self.device, retrieval.embedder.precision)
        batches = [passages[i : i + self.batch_size] for i in range(0, len(passages), self.batch_size)]
        with self._one_at_a_time:
            rows = [self.model.inputs.passages([dict(passage) for passage in batch]) for batch in batches]
            parts = [embed(batch.ids, batch.mask).float().cpu() for batch in rows]
        return torch.cat([torch.zeros(0, retrieval.retriever.dim), *parts])

    def examples(self, n: int = 5) -> list[str]:
        """Up to n questions from the data that the model was evaluated or trained on; none if it is not there."""
        for path in self.example_files:
            try:
                with open(path, "rb") as file:
                    records = [decode(line) for line in islice(file, EXAMPLES_FROM) if line.strip()]
            except (OSError, ValueError):  # packed, or no longer what it was: there are other files, and no need
                continue
            fields = ((record, self.task.question_field(record)) for record in records)
            questions = list(dict.fromkeys(str(record[field]) for record, field in fields if record.get(field)))
            with contextlib.suppress(ValueError, IndexError):  # a text alone may be no question of the task
                self.check(questions[0])
                return questions[:: max(1, len(questions) // n)][:n]
        return []

    def check(self, question: Question) -> None:
        """Raises: ValueError where `ask` or `search` would because of the question."""
        self._example(question)

    def _searching(self) -> Retrieval:
        if self.retrieval is None:
            raise ValueError(f"{self.name} answers without a search: give an index to search in one")
        return self.retrieval

    def _checked(self, k: int | None) -> int:
        if k is None:
            return self.k
        if type(k) is not int or k < 1:
            raise ValueError(f"k is {k!r:.40}: give the number of passages, at least 1")
        return k

    def _example(self, question: Question) -> tuple[str, Example]:
        """The question as a text, and as an example of the task."""
        if not isinstance(question, str | Mapping):
            raise ValueError(f"a question is a text or an object with the fields of a line, found {question!r:.40}")
        record = {self.task.question_field({}): question} if isinstance(question, str) else dict(question)
        try:
            json.dumps(record, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("the question is not text in UTF-8") from None
        example = self.task.example(record, random.Random(0), 0)
        if example is None:
            raise ValueError(f"the task skips {self.task.skips}: {json.dumps(record, ensure_ascii=False):.60}")
        if self.config.model.use_file_passages and example.passages is None:
            raise ValueError(f"{self.name} reads the passages that come with a question: give them, or give an index")
        return str(record.get(self.task.question_field(record), example.query)), example

    def _skipped(self, question: Question) -> int:
        """How many tokens of the decoder's output are no answer: its start, and the prompt."""
        prompts = self.model.inputs.prompts([self._example(question)[1].query])
        return 1 + len(prompts[0]) if prompts else 1

    def _answer(
        self, asked: Sequence[tuple[str, Example]], k: int, judge: bool, streamer: BaseStreamer | None = None
    ) -> list[Answer]:
        """Answer a batch."""
        if not asked:
            return []
        questions, examples = zip(*asked, strict=True)
        queries = [example.query for example in examples]
        with self._one_at_a_time:
            clock = _Clock(self.device)
            exclude, embedded = self.task.excluded(examples), partial(clock.stop, "embed")
            texts, scores = self._answering.passages(self.retrieval, examples, k, exclude, embedded)
            if self.retrieval is not None:
                clock.stop("search")
            passages = _passages(texts, scores) if texts is not None else [[]] * len(queries)
            with self._answering.computing():
                encoded = self._answering.encode(queries, texts)
                with self.model.reader.reading_twice(encoded.fused.hidden):
                    as_written = streamer if self.config.model.generation_num_beams == 1 else None
                    rows = self._answering.write(encoded, as_written)
                    clock.stop("read")
                    certain: list[float | None] = [None] * len(rows)
                    if judge:
                        certain, passages = self._judged(encoded, rows, passages)
                        clock.stop("judge")
        answers = self.model.inputs.reader_tokenizer.decode(rows)
        parts = zip(questions, queries, answers, certain, passages, strict=True)
        return [Answer(*part, seconds=clock.seconds) for part in parts]

    def _judged(
        self, encoded: Encoded, rows: Sequence[list[int]], passages: Sequence[Sequence[Passage]]
    ) -> tuple[list[float], list[list[Passage]]]:
        """The scores of the answers, and the passages with what the reader makes of them, given its answer."""
        rows = self._answering.whole(encoded, rows)
        reading = self._answering.reading(encoded, rows)
        logits, attended = watched_logits(reading)
        labels, lengths = reading.targets.labels, reading.targets.lengths
        certain = token_log_probabilities(logits, labels).sum(-1) / lengths.clamp(min=1)  # (B,)
        fields = [[passage.fields for passage in of_query] for of_query in passages]
        judged = self._answering.judgements(encoded, fields, rows)
        # A reader whose attention cannot be told by passages has none.
        attention = attended["attention"].tolist() if attended else [[None] * len(row) for row in judged]
        judged_passages = [
            [Passage(p.fields, p.score, *pair) for p, *pair in zip(of_query, *both, strict=False)]
            for of_query, *both in zip(passages, judged, attention, strict=True)
        ]
        return certain.exp().tolist(), judged_passages


class AnswerStream:
    """The text of an answer, piece by piece as it is written: iterate over it. `answer` has all of it afterwards."""

    def __init__(
        self, work: Callable[[BaseStreamer], list[Answer]], tokenizer: AnyReaderTokenizer, skipped: int
    ) -> None:
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._work, self._streamer = work, _Pieces(self._pieces, tokenizer, skipped)
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # whoever iterates again gets nothing, and waits for nothing
        self._finish()

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for it. Raises: what `ask` raises; `Cancelled`."""
        return self._finish()

    def cancel(self) -> None:
        """Let the model write no further token."""
        self._streamer.cancelled = True

    def _finish(self) -> Answer:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer

    def _run(self) -> None:
        try:
            (self._answer,) = self._work(self._streamer)
            self._streamer.say(self._answer.text)
        except Exception as error:  # raised where the pieces are read
            self._error = error
        self._pieces.put(None)


class Cancelled(Exception):  # noqa: N818 (nothing went wrong)
    """An answer that nobody waits for any more."""


class _Pieces(BaseStreamer):
    """Turns tokens into pieces of text. Decoding may still change what follows the last space, so that waits."""

    def __init__(self, pieces: "queue.SimpleQueue[str | None]", tokenizer: AnyReaderTokenizer, skipped: int) -> None:
        self.pieces, self.tokenizer, self.skipped = pieces, tokenizer, skipped
        self.tokens: list[int] = []
        self.said, self.cancelled = "", False

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled:
            raise Cancelled
        self.tokens += value.flatten().tolist()
        (text,) = self.tokenizer.decode([self.tokens[self.skipped :]])
        self.say(text[: max(0, text.rfind(" "))])

    def end(self) -> None:
        """Called by transformers; the rest of the text follows when the answer is whole."""

    def say(self, text: str) -> None:
        if len(text) > len(self.said):
            self.pieces.put(text[len(self.said) :])
            self.said = text


class _Clock:
    """The seconds that each stage takes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}
        self.last = time.perf_counter()

    def stop(self, stage: str) -> None:
        devices.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now


def _passages(texts: Sequence[Sequence[dict]], scores: Sequence[Sequence[float]] | None) -> list[list[Passage]]:
    scores = scores if scores is not None else [[None] * len(of_query) for of_query in texts]
    pairs = (zip(*pair, strict=True) for pair in zip(texts, scores, strict=True))
    return [[Passage(text, score) for text, score in of_query] for of_query in pairs]
