"""The steps of the training loop, which `train.py` writes down: retrieve, read, distil, update, evaluate, save."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from atlas import config
from atlas.checkpoint import Checkpoint, Contents, check_way, note_evaluation, save_checkpoint
from atlas.evaluation.evaluator import Evaluator
from atlas.model.atlas import Atlas, Losses, TrainingTensors
from atlas.model.load import Model
from atlas.model.signals import mode_of
from atlas.retrieval import Retrieval
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import data_parallel, finish_gradients, full_tensors_on_main, local_gradients
from atlas.runtime.session import Session, Stopped, StopSignals
from atlas.runtime.tracking import Means, log, progress_bar, three_decimals, training_line
from atlas.tasks import Example
from atlas.tasks.data import Data
from atlas.training.optim import Optimizers
from atlas.training.plan import Plan

# A run ends after so many updates that were skipped in a row: by then fp16's loss scale has been halved to below 1.
MOST_SKIPPED = 20


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
        self.atlas = _joint_model(model, settings)
        # some weights have no gradient while the retriever is frozen
        some_unused = bool(self.plan.retriever_starts_after)
        self.parallel = data_parallel(self.atlas, session.device, some_unused=some_unused)
        self._finished = self._saved = 0  # steps, by a run that is resumed; the newest checkpoint's
        self._newest: Path | None = None  # checkpoint
        self._evaluation_due, self._evaluated = False, 0  # of the newest checkpoint; the step evaluated last
        self._refreshed = 0  # steps after which the index was built again
        self._signals = StopSignals()
        self._bar = tqdm(disable=True)
        self._means = Means()
        self._started = self._prepared = 0.0  # times of the current step
        self._given: dict[str, int] = {}  # tokens and passages of the current step, without padding
        self._stopping = False  # whether a rank was asked to stop: the same on all ranks

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue after a checkpoint of this run."""
        self._finished = self._saved = checkpoint.step
        self._newest, self._evaluation_due = checkpoint.path, checkpoint.evaluation_due
        if checkpoint.examples is not None:
            self.data.resume(checkpoint.step, checkpoint.examples, checkpoint.examples_per_epoch)

    def steps(self) -> Iterator[int]:
        """The steps to take, up to `--total_steps`. SIGTERM or SIGUSR1 to any rank ends them early.

        If the run that is resumed ended before it had evaluated its last step, that comes first.

        Raises:
            Stopped: after the update, or during the evaluation, in which a rank was asked to stop.
            ValueError: something is in the way of the checkpoints that are to be saved.
        """
        finished, total = self._finished, self.plan.total_steps
        look = partial(check_way, self.session.directory, range(finished + 1, total + 1))
        distributed.on_main("looking where to save", look)
        self.atlas.train()
        with self._signals:
            if self._evaluation_due:
                self._build_index(finished, due=False)  # a refresh that is due comes after the evaluation
                self._evaluate(finished)
            self._bar = progress_bar("training", total, "steps", initial=finished)
            with self._bar:
                for step in range(finished + 1, total + 1):
                    yield step
                    if self._stopping and not (self.plan.is_last(step) and not self._evaluation_due):
                        self._end()

    def refresh_index(self, step: int) -> None:
        """Before a step: build the index if there is none yet, or if the passage encoder has moved and it is due.

        Raises:
            Stopped: a rank was asked to stop meanwhile.
        """
        if self.retrieval is None:
            return
        moved = self.plan.retriever_learns(step - 1) and not self.retrieval.retriever.query_side
        due = moved and self.plan.refreshes(step - 1)
        if due and self.retrieval.index is not None:
            log.info("Refreshing the index after step %d", step - 1)
        self._build_index(step - 1, due)

    def _build_index(self, finished: int, due: bool) -> None:
        if self.retrieval is None:
            return
        self._unless_stopped(finished, partial(self.retrieval.refresh, due, self._asked_to_stop, step=finished))
        if due:
            self._refreshed = finished

    def retrieve(self, step: int) -> TrainingTensors:
        """The next examples, the passages found for them, and the tensors of both."""
        self._started = time.monotonic()
        # Dropout depends on the examples alone: the same after a resume, on two ranks as in two accumulated steps.
        torch.manual_seed(_mix(self.settings.run.seed, self.data.first_example(step)))
        examples = self.data.training_batch(step, self.settings.run.shuffle)
        batch = self._batch(examples, step)
        self._prepared = time.monotonic()
        return batch

    def forward_backward(self, batch: TrainingTensors, step: int) -> Losses:
        """Losses of the reader and of the retriever, and the gradients of their sum."""
        with local_gradients(self.parallel, local=not self.plan.updates_after(step)):
            with devices.autocast(self.session.device, self.settings.optimisation.precision):
                losses = self.parallel(batch)
            self.optimizers.backward(losses.total / self.plan.accumulated(step))
        return losses

    def update(self, step: int, losses: Losses) -> None:
        """Move the weights if this step completes an update: the only wait for the device after the search.

        Raises:
            ValueError: too many updates in a row had gradients that are not finite.
        """
        if self.plan.updates_after(step):
            finish_gradients(self.parallel)
            moved, self._stopping = self.optimizers.step(self.plan.finished_before_update(step), self._signals.received)
            if not moved:
                skipped = self.optimizers.skipped
                log.warning("Step %d is skipped: its gradients are not finite (%d so far)", step, skipped)
            if self.optimizers.skipped_in_a_row == MOST_SKIPPED:
                raise ValueError(self._diverged(f"the last {MOST_SKIPPED} updates had gradients that are not finite"))
        self._count(losses)
        self._bar.update()

    def report(self, step: int) -> None:
        """Log the means of the statistics since the last report, if that is due."""
        if not self.plan.logs_after(step):
            return
        self.session.verification.raise_found()
        values: dict[str, float] = self._means.report()
        for rate in self._given:
            values[rate] *= distributed.world_size()  # the mean is that of a process
        values["lr"], values["skipped_steps"] = self.optimizers.learning_rate(step), self.optimizers.skipped
        values["peak_memory_gib"] = devices.peak_memory_gib(self.session.device)
        log.info("%s", training_line(step, self.plan.total_steps, values))
        self.session.reports.record("train", step, values)
        self.session.reports.draw(values, step)
        self._bar.set_postfix(loss=three_decimals(values["loss/train_loss"]))

    def save(self, step: int) -> None:
        """Write a checkpoint if that is due, or if a rank was asked to stop.

        Raises:
            ValueError: weights or moments are not finite; the checkpoints stay as they were.
        """
        if self._stopping or self.plan.saves_after(step):
            self._save(step)

    def evaluate(self, step: int) -> None:
        """Evaluate every file if that is due; a run that is asked to stop leaves it to the one that resumes."""
        if self._evaluates_after(step) and not self._stopping:
            self._evaluate(step)

    def _evaluates_after(self, step: int) -> bool:
        return bool(self.evaluator.files) and self.plan.evaluates_after(step)

    def _evaluate(self, step: int) -> None:
        self._unless_stopped(step, partial(self.evaluator.evaluate_all, step, self._asked_to_stop))
        self._evaluated = step
        if self._evaluation_due and self._saved == step:
            distributed.on_main("noting the evaluation", partial(note_evaluation, self.session.directory, step))
            self._evaluation_due = False

    def _unless_stopped(self, finished: int, work: Callable[[], object]) -> None:
        """Long work after so many finished steps. Raises: Stopped, once they are saved, if a rank was asked to stop."""
        try:
            work()
        except Stopped:
            self._stopping = True
        if self._stopping:
            self._save_finished(finished)
            self._end()

    def _asked_to_stop(self) -> bool:
        return self._signals.received

    def _end(self) -> None:
        """Raises: Stopped."""
        if self._saved:
            command = "same command, without --restart," if self.settings.optimisation.restart else "same command"
            log.info("Asked to stop: step %d is saved, and the %s resumes from there", self._saved, command)
        else:
            log.info("Asked to stop before a step was saved: the same command starts again")
        raise Stopped

    def _save_finished(self, finished: int) -> None:
        """Save the last of the finished steps after which the weights moved, if that has not been done.

        If the index was built again since, a run could not resume from there exactly: it resumes from an older step.
        """
        moved = finished if self.plan.updates_after(finished) else self.plan.finished_before_update(finished)
        if moved > self._saved and self._refreshed <= moved:
            self._save(moved)

    def _save(self, step: int) -> None:
        """Write the checkpoint of a step, after which the weights moved last. Rank 0 has or gathers what it writes."""
        self._evaluation_due = self._evaluates_after(step) and step > self._evaluated
        self.session.verification.finish()
        weights, moments = full_tensors_on_main(self.model.weights()), self.optimizers.state()
        adapters = {
            name: replace(adapter, weights=full_tensors_on_main(adapter.weights))
            for name, adapter in self.model.adapters().items()
        }

        def write() -> Path:
            trained = chain(
                weights.items(), moments.items(), *(adapter.weights.items() for adapter in adapters.values())
            )
            for name, tensor in trained:
                if not torch.isfinite(tensor).all():
                    raise ValueError(self._diverged(f"{name} is not finite after step {step}"))
            contents = Contents(
                step=step,
                model=weights,
                optimizer=moments,
                options=self.settings.sections(),
                configs=self.model.configs(),
                examples=self.data.examples_after(step),
                examples_per_epoch=self.data.places,
                evaluation_due=self._evaluation_due,
                index_encoder=self.retrieval.built_by if self.retrieval is not None else None,
                quantizer=self.retrieval.quantizer if self.retrieval is not None else None,
                adapters=adapters,
                bases=self.model.bases,
            )
            optimisation = self.settings.optimisation
            path = save_checkpoint(
                self.session.directory,
                contents,
                keep_optimizers=optimisation.save_optimizer,
                keep_checkpoints=optimisation.keep_checkpoints,
            )
            log.info("Saved %s", path)
            return path

        self._newest = distributed.on_main("saving", write)
        self._saved = step

    def _diverged(self, what: str) -> str:
        good = f"the last good checkpoint is {self._newest}" if self._newest else "no checkpoint was saved before"
        return (
            f"the training has diverged: {what}; {good}. Lower --lr or --lr_retriever, raise --warmup_steps, or use "
            "--precision fp32 or bf16 in place of fp16"
        )

    def _batch(self, examples: list[Example], step: int) -> TrainingTensors:
        settings, inputs = self.settings.model, self.model.inputs
        k = settings.retriever_n_context if settings.retrieves else settings.n_context
        queries, learns = [example.query for example in examples], self.plan.retriever_learns(step)
        exclude = self.data.task.excluded(examples)
        words = [example.words_to_find for example in examples]
        found = self.retrieval.search(queries, k, exclude, words=words, step=step) if self.retrieval else None
        passages = found.passages if found else None
        if settings.use_file_passages:
            passages = [example.passages[:k] for example in examples]
        learning, rows = self.settings.retriever_training, inputs.target_tokens([one.target for one in examples])
        answers = rows if learning.judges_by_answers else [[] for _ in rows]
        judged = inputs.judging(queries, passages, answers, learning.gold_score_mode) if learns else None
        only_judges = judged is not None and learning.freeze_reader
        reading = judged.rows if only_judges else inputs.training(queries, passages, rows)
        self._given = {"tokens_per_second": int(reading.lengths.sum())}
        if passages is not None:
            self._given["passages_per_second"] = sum(map(len, passages))
        targets = inputs.target_rows(queries, rows)
        if not learns:
            return TrainingTensors(*reading, targets)
        query_ids, query_mask = inputs.queries(queries)
        if self.model.retriever.query_side and self.retrieval.index.has_embeddings:
            # a frozen encoder: it would compute what the index holds
            embeddings = {"passage_embeddings": self.retrieval.index.embeddings_of(found.ids)}
        else:
            flat = [passage for of_query in found.passages for passage in of_query]
            embeddings = inputs.passages(flat)._asdict()
            embeddings = {f"passage_{name}": part for name, part in embeddings.items()}
        if learning.in_batch_negatives:
            names = (devices.move(part, query_ids.device) for part in found.names(exclude))
            embeddings |= dict(zip(("found", "own"), names, strict=True))
        return TrainingTensors(*reading, targets, query_ids, query_mask, **embeddings, judged=judged)

    def _count(self, losses: Losses) -> None:
        self._means.add("loss/train_loss", losses.total)
        for name, loss in (("reader", losses.reader), ("retriever", losses.retriever)):
            if loss is not None:
                self._means.add(f"loss/{name}_loss", loss)
        for name, correlation in losses.correlations.items():
            self._means.add(f"corr/{name}", correlation.mean, correlation.examples)
        self._means.add("runtime/retrieve", self._prepared - self._started)
        seconds = time.monotonic() - self._started
        self._means.add("runtime/train_step", seconds)
        for rate, count in self._given.items():
            self._means.add(rate, count / seconds, seconds)


def _joint_model(model: Model, settings: config.Config) -> Atlas:
    """Reader and retriever as one module that computes both losses."""
    learning = settings.retriever_training
    shares_weights = settings.optimisation.shard_grads and not learning.freeze_reader
    mode = None
    if learning.train_retriever:
        gather = distributed.gather_alike if learning.in_batch_negatives else None
        mode = mode_of(learning, model.reader)._replace(gather=gather, known=model.known)
    return Atlas(
        model.reader,
        model.retriever,
        n_context=1 if settings.model.closed_book else settings.model.n_context,
        mode=mode,
        temperature_gold=learning.temperature_gold,
        temperature_score=learning.temperature_score,
        correlate=learning.compute_crossattention_stats,
        group_by_length=not (shares_weights and distributed.world_size() > 1),
    )


def _mix(seed: int, example: int) -> int:
    """A seed for torch out of two numbers."""
    return int(np.random.SeedSequence([seed, example]).generate_state(1, np.uint64)[0])
