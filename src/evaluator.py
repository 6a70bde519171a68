"""Evaluation: every example of a file once, on all ranks together, results in the order of the file."""

import time
from pathlib import Path

import torch

from src import device as devices
from src import distributed
from src.data import Data
from src.inputs import Inputs, Targets
from src.metrics import retrieval_metrics
from src.parallel import whole_weights
from src.reader import FusionInDecoder, token_log_probabilities
from src.results import ResultsWriter, result_row
from src.retrieval import Retrieval
from src.tasks import Example
from src.tracking import TensorBoard, log, with_progress


class Evaluator:
    """Retrieves, reads, generates, scores, writes.

    Args:
        reader: None evaluates retrieval alone.
        retrieval: None for a closed book and for passages that come with the data.
        own_passages: read the passages in the data files.
        n_context: passages per query.
        generation: `max_length`, `min_length`, `num_beams`, `length_penalty` of `FusionInDecoder.write`.
        results: directory for the result files; None writes none.
    """

    def __init__(
        self,
        reader: FusionInDecoder | None,
        retrieval: Retrieval | None,
        inputs: Inputs,
        *,
        device: torch.device,
        precision: str,
        n_context: int,
        own_passages: bool = False,
        generation: dict[str, int | float | None] | None = None,
        results: Path | None = None,
        write_passages: bool = True,
        tensorboard: TensorBoard | None = None,
    ) -> None:
        self.reader, self.retrieval, self.inputs = reader, retrieval, inputs
        self.device, self.precision = device, precision
        self.n_context, self.own_passages = n_context, own_passages
        self.generation = generation or {}
        self.results, self.write_passages = results, write_passages
        self.tensorboard = tensorboard

    def evaluate(self, name: str, data: Data, step: int) -> dict[str, float]:
        """Evaluate one file. Collective.

        Args:
            name: of the file without its ending; the results go to `{name}-step-{step}.jsonl`.

        Returns:
            The means over all examples: percentages, except eval_loss and mrr.
        """
        started = time.monotonic()
        was_training = self.reader is not None and self.reader.training
        if self.reader is not None:
            self.reader.eval()
        totals: dict[str, tuple[float, float]] = {}
        n_examples = 0
        path = self.results / f"{name}-step-{step}.jsonl" if self.results else None
        with _writer(path) as write, whole_weights(self.reader):
            batches = with_progress(data.evaluation_batches(), f"evaluating {name}", data.evaluation_rounds, "batches")
            for examples in batches:
                rows = self._evaluate_batch(examples, data, totals)
                n_examples += len(examples)
                if path is not None:
                    for of_rank in distributed.gather_on_main(rows):
                        for row in of_rank:
                            write(row)
                distributed.progress()
        if self.reader is not None:
            self.reader.train(was_training)
        n_examples = sum(distributed.gather_objects(n_examples))  # a task may skip lines
        means = {key: value / weight for key, (value, weight) in distributed.sum_statistics(totals).items()}
        metrics = {key: value if key in ("eval_loss", "mrr") else 100 * value for key, value in means.items()}
        log.info("Dataset: %s | %s", f"{name}.jsonl", " | ".join(f"{v:.6g} {k}" for k, v in metrics.items()))
        log.info(
            "Evaluated %d examples in %.1f s%s", n_examples, time.monotonic() - started, f": {path}" if path else ""
        )
        if self.tensorboard:
            self.tensorboard.add({f"{name}/{key}": value for key, value in metrics.items()}, step)
        return metrics

    def _evaluate_batch(
        self, examples: list[Example], data: Data, totals: dict[str, tuple[float, float]]
    ) -> list[dict]:
        """Add what is measured to `totals`; the rows of the result file."""

        def add(values: dict[str, float]) -> None:
            for key, value in values.items():
                total, weight = totals.get(key, (0.0, 0.0))
                totals[key] = (total + value, weight + 1.0)

        queries = [example.query for example in examples]
        passages, scores = self._passages(examples, queries, data.task.filters_by_id)
        for example, of_query in zip(examples, passages or [], strict=bool(passages)):
            if answers := data.task.retrieval_answers(example):
                add(retrieval_metrics(of_query, answers))
        generations: list[str | None] = [None] * len(examples)
        if self.reader is not None and examples:
            targets = self.inputs.targets(queries, [example.target for example in examples])
            generations, losses = self._read(queries, passages, targets)
            for example, generation, loss in zip(examples, generations, losses, strict=True):
                add(data.task.score(generation, example) | {"eval_loss": loss})
        return [
            result_row(
                example,
                generation,
                passages[i] if passages is not None else None,
                scores[i] if scores is not None else None,
                self.write_passages,
            )
            for i, (example, generation) in enumerate(zip(examples, generations, strict=True))
        ]

    def _passages(
        self, examples: list[Example], queries: list[str], filters_by_id: bool
    ) -> tuple[list[list[dict]] | None, list[list[float]] | None]:
        """What each query's reader is given, and the scores where it was searched for."""
        if self.retrieval is not None:
            exclude = [example.id for example in examples] if filters_by_id else None
            found = self.retrieval.search(queries, self.n_context, exclude)
            return found.passages, found.scores.tolist()
        if self.own_passages:
            return [example.passages[: self.n_context] for example in examples], None
        return None, None

    @torch.no_grad()
    def _read(
        self, queries: list[str], passages: list[list[dict]] | None, targets: Targets
    ) -> tuple[list[str], list[float]]:
        """Answers, and the target's mean token loss of each example, from one pass of the encoder."""
        ids, mask = self.inputs.reader(queries, passages)
        with devices.autocast(self.device, self.precision):
            hidden = self.reader.encode(ids, mask)  # (B, K, L) -> (B, K·L, d)
            logits = self.reader.logits(hidden, mask.flatten(1), targets.decoder_ids)
            rows = self.reader.write(hidden, mask.flatten(1), prompt=self.inputs.prompts(queries), **self.generation)
        losses = -token_log_probabilities(logits, targets.labels).sum(-1) / targets.lengths
        return self.inputs.reader_tokenizer.decode(rows), losses.tolist()


class _writer:
    """A function that writes rows to the file on rank 0, and drops them elsewhere and without a file."""

    def __init__(self, path: Path | None) -> None:
        self._file = ResultsWriter(path) if path is not None and distributed.is_main() else None

    def __enter__(self):
        return self._file.__enter__().write if self._file else lambda row: None

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.__exit__(*error)
