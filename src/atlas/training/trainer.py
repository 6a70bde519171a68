"""The steps of the training loop, which `train.py` writes down: retrieve, read, distil, update, evaluate, save."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from atlas import config
from atlas.checkpoint import Checkpoint, Contents, save_checkpoint
from atlas.evaluation.evaluator import Evaluator
from atlas.model.atlas import Atlas, Losses, TrainingTensors
from atlas.model.load import Model
from atlas.model.signals import MODES
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import data_parallel, finish_gradients, full_tensors_on_main, local_gradients
from atlas.runtime.session import Session, Stopped, StopSignals
from atlas.runtime.tracking import Means, log, progress_bar
from atlas.tasks import Example
from atlas.tasks.data import Data
from atlas.training.optim import Optimizers
from atlas.training.plan import Plan

# Stands in where a task skips all lines of a rank's batch: the other ranks wait for this one in every collective.
PLACEHOLDER = Example(query="", target="", answers=[], passages=[])


class Trainer:
    """What a training step does, part by part. Each method is one line of the loop in `train.py`.

    Args:
        retrieval: None for a closed book and for passages that come with the data.
    """

    def __init__(
        self,
        settings: config.Config,
        model: Model,
        optimizers: Optimizers,
        retrieval: Retrieval | None,
        data: Data,
        evaluator: Evaluator,
        session: Session,
    ) -> None:
        self.settings, self.plan, self.session = settings, Plan.of(settings), session
        self.model, self.optimizers, self.retrieval = model, optimizers, retrieval
        self.data, self.evaluator = data, evaluator
        self.atlas = _joint_model(model, settings.model, settings.retriever_training)
        # some weights have no gradient while the retriever is frozen
        some_unused = bool(self.plan.retriever_starts_after)
        self.parallel = data_parallel(self.atlas, session.device, some_unused=some_unused)
        self._finished, self._evaluation_due = 0, False  # by a run that is resumed
        self._signals = StopSignals()
        self._bar = tqdm(disable=True)
        self._means = Means()
        self._started = self._prepared = 0.0  # times of the current step
        self._weight = 1.0  # of this rank's examples: 0 if there are none
        self._stopping = False  # whether a rank was asked to stop: the same on all ranks

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue after a checkpoint of this run."""
        self._finished, self._evaluation_due = checkpoint.step, checkpoint.evaluation_due
        if checkpoint.examples is not None:
            self.data.resume(checkpoint.step, checkpoint.examples)

    def steps(self) -> Iterator[int]:
        """The steps to take, up to `--total_steps`. SIGTERM or SIGUSR1 to any rank ends them early.

        If the run that is resumed was stopped before it could evaluate, the evaluation comes first.

        Raises:
            Stopped: after the update in which a rank was asked to stop.
        """
        finished, total = self._finished, self.plan.total_steps
        self.atlas.train()
        if self._evaluation_due:
            self.refresh_index(finished + 1)
            self.evaluator.evaluate_all(finished)
        self._bar = progress_bar("training", total, "steps", initial=finished)
        with self._bar, self._signals:
            for step in range(finished + 1, total + 1):
                yield step
                if self._stopping and not self.plan.is_last(step):
                    raise Stopped

    def refresh_index(self, step: int) -> None:
        """Before a step: build the index if there is none yet, or if the passage encoder has moved and it is due."""
        if self.retrieval is None:
            return
        moved = self.plan.retriever_has_moved(step - 1) and not self.retrieval.retriever.query_side
        due = moved and self.plan.refreshes(step - 1)
        if due and self.retrieval.index is not None:
            log.info("Refreshing the index after step %d", step - 1)
        self.retrieval.refresh(due)

    def retrieve(self, step: int) -> TrainingTensors:
        """The next examples, the passages found for them, and the tensors of both."""
        self._started = time.monotonic()
        # Dropout depends on the examples alone: the same after a resume, on two ranks as in two accumulated steps.
        torch.manual_seed(_mix(self.settings.run.seed, self.data.first_example(step)))
        examples = self.data.training_batch(step, self.settings.run.shuffle)
        self._weight = 1.0 if examples else 0.0
        batch = self._batch(examples or [PLACEHOLDER], step)
        self._prepared = time.monotonic()
        return batch

    def forward_backward(self, batch: TrainingTensors, step: int) -> Losses:
        """Losses of the reader and of the retriever, and the gradients of their sum."""
        with local_gradients(self.parallel, local=not self.plan.updates_after(step)):
            with devices.autocast(self.session.device, self.settings.optimisation.precision):
                losses = self.parallel(batch)
            self.optimizers.backward(self._weight * losses.total / self.plan.accumulated(step))
        return losses

    def update(self, step: int, losses: Losses) -> None:
        """Move the weights if this step completes an update: the only wait for the device after the search."""
        if self.plan.updates_after(step):
            finish_gradients(self.parallel)
            moved, self._stopping = self.optimizers.step(self.plan.finished_before_update(step), self._signals.received)
            if not moved:
                skipped = self.optimizers.skipped
                log.warning("Step %d is skipped: its gradients are not finite (%d so far)", step, skipped)
        self._count(losses)
        self._bar.update()

    def report(self, step: int) -> None:
        """Log the means of the statistics since the last report, if that is due."""
        if not self.plan.logs_after(step):
            return
        self.session.verification.raise_found()
        report, lr = self._means.report(), self.optimizers.learning_rate(step)
        statistics = " | ".join(f"{name}: {value:.6g}" for name, value in report.items())
        memory = devices.peak_memory_gib(self.session.device)
        log.info("%d / %d | %s | lr: %.6g | Memory: %.2f GiB", step, self.plan.total_steps, statistics, lr, memory)
        self.session.tensorboard.add({**report, "lr": lr, "skipped_steps": self.optimizers.skipped}, step)
        self._bar.set_postfix(loss=f"{report.get('loss/train_loss', float('nan')):.4g}")

    def evaluate(self, step: int) -> None:
        """Evaluate every file if that is due; a run that was asked to stop leaves it to the one that resumes."""
        if self.plan.evaluates_after(step) and (self.plan.is_last(step) or not self._stopping):
            self.evaluator.evaluate_all(step)

    def save(self, step: int) -> None:
        """Write a checkpoint if that is due, or if a rank was asked to stop. Rank 0 writes what it has or gathers."""
        stopping = self._stopping and not self.plan.is_last(step)
        if not stopping and not self.plan.saves_after(step):
            return
        self.session.verification.finish()
        weights, moments = full_tensors_on_main(self.model.weights()), self.optimizers.state()
        if distributed.is_main():
            contents = Contents(
                step=step,
                model=self.model.unused_retriever | weights,
                optimizer=moments,
                options=dataclasses.asdict(self.settings),
                configs=self.model.configs(),
                examples=self.data.examples_after(step),
                evaluation_due=stopping and self.plan.evaluates_after(step),
                index_encoder=self.retrieval.built_by if self.retrieval is not None else None,
            )
            optimisation = self.settings.optimisation
            keep = {
                "keep_optimizers": optimisation.save_optimizer,
                "keep_checkpoints": optimisation.keep_checkpoints,
            }
            with distributed.busy():
                path = save_checkpoint(self.session.directory, contents, **keep)
            log.info("Saved %s", path)
        distributed.wait_for_all("saving")
        if stopping:
            log.info("Asked to stop: step %d is saved, and the same command resumes from there", step)

    def _batch(self, examples: list[Example], step: int) -> TrainingTensors:
        settings, inputs = self.settings.model, self.model.inputs
        k = settings.retriever_n_context if settings.retrieves else settings.n_context
        queries, learns = [example.query for example in examples], self.plan.retriever_learns(step)
        exclude = [example.id for example in examples] if self.data.task.filters_by_id else None
        found = self.retrieval.search(queries, k, exclude) if self.retrieval else None
        passages = found.passages if found else None
        if settings.use_file_passages:
            passages = [example.passages[:k] for example in examples]
        ids, mask = inputs.reader(queries, passages)
        targets = inputs.targets(queries, [example.target for example in examples])
        if not learns:
            return TrainingTensors(ids, mask, targets)
        query_ids, query_mask = inputs.queries(queries)
        if self.model.retriever.query_side and self.retrieval.index.has_embeddings:
            # a frozen encoder: it would compute what the index holds
            embeddings = self.retrieval.index.embeddings_of(found.ids)
            return TrainingTensors(ids, mask, targets, query_ids, query_mask, passage_embeddings=embeddings)
        flat = [passage for of_query in found.passages for passage in of_query]
        return TrainingTensors(ids, mask, targets, query_ids, query_mask, *inputs.passages(flat))

    def _count(self, losses: Losses) -> None:
        self._means.add("loss/train_loss", losses.total, self._weight)
        self._means.add("loss/reader_loss", losses.reader, self._weight)
        if losses.retriever is not None:
            self._means.add("loss/retriever_loss", losses.retriever, self._weight)
        for name, correlation in losses.correlations.items():
            self._means.add(f"corr/{name}", correlation.mean, self._weight * correlation.examples)
        self._means.add("runtime/retrieve", self._prepared - self._started)
        self._means.add("runtime/train_step", time.monotonic() - self._started)


def _joint_model(model: Model, settings: config.Model, learning: config.RetrieverTraining) -> Atlas:
    """Reader and retriever as one module that computes both losses."""
    return Atlas(
        model.reader,
        model.retriever,
        n_context=1 if settings.closed_book else settings.n_context,
        mode=MODES[learning.gold_score_mode] if learning.train_retriever else None,
        temperature_gold=learning.temperature_gold,
        temperature_score=learning.temperature_score,
        correlate=learning.compute_crossattention_stats,
    )


def _mix(seed: int, example: int) -> int:
    """A seed for torch out of two numbers."""
    return int(np.random.SeedSequence([seed, example]).generate_state(1, np.uint64)[0])
