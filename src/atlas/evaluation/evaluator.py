"""Evaluation: every example of a file once, on all ranks together, results in the order of the file."""

import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from atlas.config import Config
from atlas.evaluation.answering import Answering, Encoded
from atlas.evaluation.results import result_row, results_writer
from atlas.metrics import NO_PERCENTAGES, RECALL_AT, judged_metrics, retrieval_metrics, spoken
from atlas.model.inputs import Targets
from atlas.model.load import Model
from atlas.model.pretrained import evaluating
from atlas.model.reader import token_log_probabilities
from atlas.retrieval import Retrieval
from atlas.runtime import distributed
from atlas.runtime.parallel import gathered_weights
from atlas.runtime.session import Session, Stopped
from atlas.runtime.tracking import log, with_progress
from atlas.tasks import Example, Judged, Task
from atlas.tasks.data import Data

OF_RETRIEVAL = ("recall@", "mrr", "judged_")  # metrics that the log has last


class Evaluator:
    """Retrieves, reads, generates, scores, writes.

    Args:
        model: without a reader, or with one that is to judge alone, retrieval alone is evaluated.
        retrieval: None for a closed book and for passages that come with the data.
        files: name of the file without its ending -> data.
    """

    def __init__(
        self, settings: Config, model: Model, retrieval: Retrieval | None, files: dict[str, Data], session: Session
    ) -> None:
        self.reader, self.inputs, self.retrieval, self.files = model.reader, model.inputs, retrieval, files
        self.settings, self.session = settings.model, session
        precision = settings.optimisation.precision
        self.answering = Answering(model, settings.model, settings.retriever_training, session.device, precision)
        self.results_directory = session.directory if settings.run.write_results else None
        self._unmeasured: set[str] = set()  # fields of passages that are judged, and which no passage has
        self.recall_at = [k for k in RECALL_AT if k <= self.settings.n_context]
        self.in_nfc = settings.run.metric_unicode == "nfc"
        self.write_passages = self.results_directory is not None and not settings.run.dont_write_passages
        self.write_evidence = settings.run.write_evidence and self.write_passages and not settings.model.closed_book

    def evaluate_all(self, step: int, asked_to_stop: Callable[[], bool] | None = None) -> None:
        """Evaluate every file. Collective. Arguments and errors as for `evaluate`."""
        for name, data in self.files.items():
            self.evaluate(name, data, step, asked_to_stop)

    def evaluate(
        self, name: str, data: Data, step: int, asked_to_stop: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Evaluate one file. Collective.

        Args:
            name: of the file without its ending; the results go to `{name}-step-{step}.jsonl`.
            asked_to_stop: whether this rank is to stop; asked before every batch.

        Returns:
            The means over all examples: percentages, except eval_loss and the mrr's.

        Raises:
            Stopped: on every rank, if one was asked to stop; no results are written.
        """
        started = time.monotonic()
        totals: dict[str, tuple[float, float]] = {}
        n_examples = 0
        path = self.results_directory / f"{name}-step-{step}.jsonl" if self.results_directory else None
        with _row_writer(path) as write, gathered_weights(self.reader), evaluating(self.reader):
            lines = _Lines(data.task, write, totals)
            batches = with_progress(data.evaluation_batches(), f"evaluating {name}", data.evaluation_rounds, "batches")
            for examples in batches:
                if asked_to_stop is not None and distributed.any_rank(asked_to_stop()):
                    raise Stopped
                rows = self._evaluate_batch(examples, data, totals)
                n_examples += len(examples)
                if path is not None or data.task.joins:
                    starts = [example.first_of_line for example in examples]
                    for of_rank in distributed.gather_on_main(list(zip(starts, rows, strict=True))):
                        for first, row in of_rank:
                            lines.add(row, first)
            lines.finish()
            self.session.verification.finish()  # nothing is said or written of what damaged files gave
        n_examples = sum(distributed.gather_objects(n_examples))  # a task may skip lines
        means = {key: value / weight for key, (value, weight) in distributed.sum_statistics(totals).items()}
        metrics = {key: value if key in NO_PERCENTAGES else 100 * value for key, value in means.items()}
        seconds, place = time.monotonic() - started, f": {path}" if path else ""
        log.info("%s, step %d: %s | %d examples in %.1f s%s", name, step, _listed(metrics), n_examples, seconds, place)
        self._report_unmeasured(name)
        facts = {"file": name, "seconds": seconds, "examples": n_examples, "metrics": metrics}
        self.session.reports.record("evaluation", step, facts | {"results": path.name if path else None})
        self.session.reports.draw({f"{name}/{key}": value for key, value in metrics.items()}, step)
        return metrics

    def _report_unmeasured(self, name: str) -> None:
        for field in sorted(self._unmeasured):
            log.info("%s: judgements are not measured where no passage that was found has a `%s`", name, field)
        self._unmeasured.clear()

    def _evaluate_batch(
        self, examples: list[Example], data: Data, totals: dict[str, tuple[float, float]]
    ) -> list[dict]:
        """Add what is measured to `totals`; the rows of the result file."""
        queries = [example.query for example in examples]
        exclude = data.task.excluded(examples)
        passages, scores = self.answering.passages(self.retrieval, examples, self.settings.n_context, exclude)
        for example, of_query in zip(examples, passages, strict=True) if passages is not None else ():
            if answers := data.task.retrieval_answers(example):
                _add(totals, retrieval_metrics(of_query, answers, self.recall_at))
            if example.judged is not None:
                judged = _by_judgements(of_query, example.judged, self.recall_at)
                _add(totals, judged)
                if not judged and any(relevance > 0 for relevance in example.judged.relevance.values()):
                    self._unmeasured.add(example.judged.field)
        readings = [_Reading()] * len(examples)
        if examples and not self.settings.retrieve_only:
            readings = self._read(examples, queries, passages)
            for example, reading in zip(examples, readings, strict=True):
                compared = _in_nfc(reading.generation, example) if self.in_nfc else (reading.generation, example)
                _add(totals, data.task.score(*compared) | {"eval_loss": reading.loss})
        return [
            result_row(
                example,
                reading.generation,
                passages[i] if passages is not None else None,
                scores[i] if scores is not None else None,
                self.write_passages,
                reading.choice_logits,
                reading.judgements,
            )
            for i, (example, reading) in enumerate(zip(examples, readings, strict=True))
        ]

    @torch.no_grad()
    def _read(self, examples: list[Example], queries: list[str], passages: list[list[dict]] | None) -> list["_Reading"]:
        """What the reader makes of each example, from one pass of the encoder."""
        targets = self.inputs.targets(queries, [example.target for example in examples])
        with self.answering.computing():
            encoded = self.answering.encode(queries, passages)
            with self.reader.reading_twice(encoded.fused.hidden):
                logits = self.reader.logits(encoded.fused.hidden, encoded.fused.mask, targets.decoder_ids)
                rows = self.answering.write(encoded)
            judged = self._judgements(encoded, rows, passages)
        losses = (-token_log_probabilities(logits, targets.labels).sum(-1) / targets.lengths).tolist()
        choices = self._choice_logits(examples, logits, targets)
        return list(map(_Reading, self.inputs.reader_tokenizer.decode(rows), losses, choices, judged))

    def _judgements(
        self, encoded: Encoded, rows: list[list[int]], passages: list[list[dict]] | None
    ) -> Sequence[list[float] | None]:
        """The reader's judgement of each example's passages, given its answer, if that is to be written."""
        if not self.write_evidence or passages is None:
            return [None] * len(rows)
        judged = self.answering.judgements(encoded, passages, self.answering.whole(encoded, rows))
        return [row[: len(of_query)] for row, of_query in zip(judged, passages, strict=True)]

    def _choice_logits(
        self, examples: list[Example], logits: torch.Tensor, targets: Targets
    ) -> list[dict[str, float] | None]:
        """The logits (B, T, V) of each example's choices right after `<extra_id_0>`.

        The rest of the target does not matter: the decoder has not seen it there.
        """
        if not any(example.choices for example in examples):
            return [None] * len(examples)
        said = (targets.labels == self.inputs.reader_tokenizer.sentinel_ids[0]).int()  # (B, T)
        if not said[:, :-1].any(1).all():
            raise ValueError("--target_maxlength leaves no room for the letter behind `<extra_id_0>`: raise it")
        tokens = sorted({token for example in examples for token in example.choices.values()})
        rows = torch.arange(len(logits), device=logits.device)
        of_tokens = logits[rows, said.argmax(1) + 1][:, tokens].tolist()  # (B, T, V) -> (B, V) -> (B, tokens)
        return [
            {choice: row[tokens.index(token)] for choice, token in example.choices.items()}
            for example, row in zip(examples, of_tokens, strict=True)
        ]


def _listed(metrics: Mapping[str, float]) -> str:
    """The metrics for a reader of the log: `exact match 45.20, F1 51.30, loss 1.234, recall@1 …`."""
    names = sorted(metrics, key=lambda name: name.startswith(OF_RETRIEVAL))
    parts = [f"{spoken(name)} {metrics[name]:.{3 if name in NO_PERCENTAGES else 2}f}" for name in names]
    return ", ".join(parts) or "nothing measured"


def _by_judgements(passages: list[dict], judged: Judged, at: Sequence[int]) -> dict[str, float]:
    """`judged_recall@k`, `judged_ndcg@k` and `judged_mrr`; none if no passage has the field that is judged."""
    if not any(judged.field in passage for passage in passages):
        return {}
    values = [str(passage.get(judged.field)) for passage in passages]
    return {f"judged_{name}": value for name, value in judged_metrics(values, judged.relevance, at).items()}


def _in_nfc(generation: str, example: Example) -> tuple[str, Example]:
    """Both with the characters composed that Unicode can spell in several ways."""
    answers = [unicodedata.normalize("NFC", answer) for answer in example.answers]
    return unicodedata.normalize("NFC", generation), replace(example, answers=answers)


class _Reading(NamedTuple):
    """What the reader made of an example: its answer, the target's mean token loss, the logits of its choices, and
    its judgement of each passage."""

    generation: str | None = None
    loss: float | None = None
    choice_logits: dict[str, float] | None = None
    judgements: list[float] | None = None


class _Lines:
    """Puts the rows of each line's examples together, in their order: on rank 0, over batches and ranks."""

    def __init__(self, task: Task, write: Callable[[dict], object], totals: dict[str, tuple[float, float]]) -> None:
        self.task, self.write, self.totals = task, write, totals
        self.rows: list[dict] = []

    def add(self, row: dict, first_of_line: bool) -> None:
        if first_of_line:
            self.finish()
        self.rows.append(row)

    def finish(self) -> None:
        """Measure and write the line whose rows are there, if there is one."""
        if self.rows:
            row, values = self.task.join(self.rows)
            _add(self.totals, values)
            self.write(row)
            self.rows = []


def _add(totals: dict[str, tuple[float, float]], values: dict[str, float]) -> None:
    for key, value in values.items():
        total, weight = totals.get(key, (0.0, 0.0))
        totals[key] = (total + value, weight + 1.0)


def _row_writer(path: Path | None) -> AbstractContextManager[Callable[[dict], object]]:
    """A function that writes rows to the file on rank 0, and drops them on other ranks and without a file."""
    return results_writer(path) if path is not None and distributed.is_main() else nullcontext(lambda row: None)
