"""Training: retrieve, read, distil, update; evaluate and save on the way."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atlas.model.atlas import Atlas, Losses, TrainingTensors
from atlas.model.inputs import Inputs
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import data_parallel, finish_gradients, local_gradients
from atlas.runtime.tracking import Means, TensorBoard, log, progress_bar
from atlas.tasks import Example
from atlas.tasks.data import Data
from atlas.training.optim import Optimizers

ECHO_SECONDS = 10.0
# Stands in where a task skips all lines of a rank's batch: the other ranks wait for this one in every collective.
PLACEHOLDER = Example(query="", target="", answers=[], passages=[])


@dataclass(frozen=True)
class Plan:
    """How long, and what happens when. Steps are counted from 1; `refresh` is asked with the steps finished."""

    total_steps: int
    accumulation_steps: int
    log_freq: int
    eval_freq: int
    save_freq: int
    freeze_retriever_steps: int
    shuffle: bool
    refresh: Callable[[int], bool]

    def updates_after(self, step: int) -> bool:
        """Whether the weights move at the end of this step."""
        return step % self.accumulation_steps == 0 or step == self.total_steps

    def first_of_update(self, step: int) -> int:
        """Steps finished before the first one whose gradients are in the same update."""
        return (step - 1) // self.accumulation_steps * self.accumulation_steps

    def accumulated(self, step: int) -> int:
        """How many steps share an update with this one: fewer at the very end."""
        first = self.first_of_update(step)
        return min(self.accumulation_steps, self.total_steps - first)


class StopSignals:
    """Notes SIGTERM and SIGUSR1 inside the block, which would end the process; a second one does so as ever.

    What comes within `ECHO_SECONDS` is not a second one: schedulers may signal every process of a job, and torchrun
    passes on to its own what it has heard.
    """

    def __init__(self) -> None:
        self.received = False
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no handlers
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._received_at = True, time.monotonic()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)


class Trainer:
    """The training loop.

    Args:
        retrieval: None for a closed book and for passages that come with the data.
        own_passages: read the passages in the data files.
        n_retrieve: passages per query in training.
        train_retriever: whether the retriever learns at all.
        evaluate, save: called with the steps finished; `save` also with whether they are still to be evaluated.
    """

    def __init__(
        self,
        model: Atlas,
        optimizers: Optimizers,
        retrieval: Retrieval | None,
        inputs: Inputs,
        data: Data,
        plan: Plan,
        *,
        device: torch.device,
        precision: str,
        seed: int,
        n_retrieve: int,
        train_retriever: bool,
        evaluate: Callable[[int], None],
        save: Callable[..., None],
        own_passages: bool = False,
        tensorboard: TensorBoard | None = None,
    ) -> None:
        self.model, self.optimizers, self.retrieval, self.inputs = model, optimizers, retrieval, inputs
        self.data, self.plan, self.device, self.precision, self.seed = data, plan, device, precision, seed
        self.n_retrieve, self.train_retriever, self.own_passages = n_retrieve, train_retriever, own_passages
        self.evaluate, self.save, self.tensorboard = evaluate, save, tensorboard
        self.parallel = data_parallel(model, device, some_unused=train_retriever and plan.freeze_retriever_steps > 0)
        self.means = Means()

    def train(self, finished: int = 0, evaluation_due: bool = False) -> bool:
        """Take the steps after `finished` up to `total_steps`; the last one is always evaluated and saved.

        SIGTERM or SIGUSR1 to any rank ends it early: the update is finished and saved.

        Args:
            evaluation_due: evaluate first: a run that was stopped in haste had left that undone.

        Returns:
            Whether it ended early.
        """
        self.model.train()
        if evaluation_due:
            self._refresh(finished)
            self.evaluate(finished)
        save_is_due = False
        with progress_bar("training", self.plan.total_steps, "steps", initial=finished) as bar, StopSignals() as stop:
            for step in range(finished + 1, self.plan.total_steps + 1):
                self._refresh(step - 1)
                stopped = self._step(step, stop.received)
                bar.update()
                last = step == self.plan.total_steps
                if step % self.plan.log_freq == 0 or last:
                    report = self._report(step)
                    bar.set_postfix(loss=f"{report.get('loss/train_loss', float('nan')):.4g}")
                evaluate = step % self.plan.eval_freq == 0 or last
                if stopped and not last:
                    self.save(step, evaluation_due=evaluate)
                    log.info("Asked to stop: step %d is saved, and the same command goes on from there", step)
                    return True
                if evaluate:
                    self.evaluate(step)
                save_is_due = save_is_due or step % self.plan.save_freq == 0 or last
                if save_is_due and self.plan.updates_after(step):  # gradients that wait for more are not saved
                    self.save(step, evaluation_due=False)
                    save_is_due = False
        return False

    def _step(self, step: int, stop: bool) -> bool:
        """Forward, backward, and an update where it is due. One wait for the device, in the update.

        Returns:
            Whether a rank was asked to stop; told with an update only.
        """
        started = time.monotonic()
        torch.manual_seed(_mix(self.seed, step, distributed.rank()))  # dropout: the same after a restart
        examples = self.data.training_batch(step, self.plan.shuffle)
        weight = 1.0 if examples else 0.0
        batch = self._batch(examples or [PLACEHOLDER], step)
        prepared = time.monotonic()
        with local_gradients(self.parallel, local=not self.plan.updates_after(step)):
            with devices.autocast(self.device, self.precision):
                losses = self.parallel(batch)
            self.optimizers.backward(weight * losses.total / self.plan.accumulated(step))
        stopped = False
        if self.plan.updates_after(step):
            finish_gradients(self.parallel)
            moved, stopped = self.optimizers.step(self.plan.first_of_update(step), stop)
            if not moved:
                skipped = self.optimizers.skipped
                log.warning("Step %d is skipped: its gradients are not finite (%d so far)", step, skipped)
        self._count(losses, weight, started, prepared)
        return stopped

    def _batch(self, examples: list[Example], step: int) -> TrainingTensors:
        """Retrieve for the examples and make tensors of all that the step needs."""
        queries, learns = [example.query for example in examples], self._retriever_learns(step)
        exclude = [example.id for example in examples] if self.data.task.filters_by_id else None
        found = self.retrieval.search(queries, self.n_retrieve, exclude) if self.retrieval else None
        passages = found.passages if found else None
        if self.own_passages:
            passages = [example.passages[: self.n_retrieve] for example in examples]
        ids, mask = self.inputs.reader(queries, passages)
        targets = self.inputs.targets(queries, [example.target for example in examples])
        if not learns:
            return TrainingTensors(ids, mask, targets)
        query_ids, query_mask = self.inputs.queries(queries)
        if self.model.retriever.query_side and self.retrieval.index.has_embeddings:
            # a frozen encoder: what the index holds is what it would say again
            embeddings = self.retrieval.index.embeddings_of(found.ids)
            return TrainingTensors(ids, mask, targets, query_ids, query_mask, passage_embeddings=embeddings)
        flat = [passage for of_query in found.passages for passage in of_query]
        return TrainingTensors(ids, mask, targets, query_ids, query_mask, *self.inputs.passages(flat))

    def _retriever_learns(self, step: int) -> bool:
        return self.train_retriever and step > self.plan.freeze_retriever_steps

    def _refresh(self, finished: int) -> None:
        """Embed the corpus where there is no index yet, and again where the schedule says so."""
        if self.retrieval is None:
            return
        if self.retrieval.index is None:
            self.retrieval.build()
        elif self.refresh_is_due(finished):
            log.info("Refreshing the index after step %d", finished)
            self.retrieval.build()

    def refresh_is_due(self, finished: int) -> bool:
        """Whether the schedule asks for a new index, and the passage encoder has moved so that it would be another."""
        moved = self.train_retriever and finished > max(0, self.plan.freeze_retriever_steps)
        return moved and not self.model.retriever.query_side and self.plan.refresh(finished)

    def _count(self, losses: Losses, weight: float, started: float, prepared: float) -> None:
        self.means.add("loss/train_loss", losses.total, weight)
        self.means.add("loss/reader_loss", losses.reader, weight)
        if losses.retriever is not None:
            self.means.add("loss/retriever_loss", losses.retriever, weight)
        for name, correlation in losses.correlations.items():
            self.means.add(f"corr/{name}", correlation.mean, weight * correlation.examples)
        self.means.add("runtime/retrieve", prepared - started)
        self.means.add("runtime/train_step", time.monotonic() - started)

    def _report(self, step: int) -> dict[str, float]:
        report = self.means.report()
        lr = self.optimizers.learning_rate(step)
        statistics = " | ".join(f"{name}: {value:.6g}" for name, value in report.items())
        log.info(
            "%d / %d | %s | lr: %.6g | Memory: %.2f GiB",
            step,
            self.plan.total_steps,
            statistics,
            lr,
            devices.peak_memory_gib(self.device),
        )
        if self.tensorboard:
            self.tensorboard.add({**report, "lr": lr, "skipped_steps": self.optimizers.skipped}, step)
        return report


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed for torch out of three numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
