"""When what happens in a run: pure functions of the step."""

from collections.abc import Callable
from dataclasses import dataclass

from atlas.config import Config, refresh_schedule


@dataclass(frozen=True)
class Plan:
    """How long a run is, and what happens when. Steps are counted from 1."""

    total_steps: int
    accumulation_steps: int
    log_freq: int
    eval_freq: int
    save_freq: int
    refreshes: Callable[[int], bool]  # whether the schedule asks for a new index after so many steps
    retriever_starts_after: int | None  # steps after which the retriever learns; None: never

    @classmethod
    def of(cls, config: Config) -> "Plan":
        """The plan that the flags describe."""
        frozen_steps = max(0, config.retriever_training.freeze_retriever_steps)
        return cls(
            total_steps=config.optimisation.total_steps,
            accumulation_steps=config.optimisation.accumulation_steps,
            log_freq=config.run.log_freq,
            eval_freq=config.run.eval_freq,
            save_freq=config.run.save_freq,
            refreshes=refresh_schedule(config.index.refresh_index),
            retriever_starts_after=frozen_steps if config.retriever_training.train_retriever else None,
        )

    def is_last(self, step: int) -> bool:
        """Whether no step comes after this one."""
        return step == self.total_steps

    def updates_after(self, step: int) -> bool:
        """Whether the weights move at the end of this step."""
        return step % self.accumulation_steps == 0 or self.is_last(step)

    def finished_before_update(self, step: int) -> int:
        """Steps finished before the first step of this one's update."""
        return (step - 1) // self.accumulation_steps * self.accumulation_steps

    def accumulated(self, step: int) -> int:
        """How many steps share an update with this one: fewer at the very end."""
        return min(self.accumulation_steps, self.total_steps - self.finished_before_update(step))

    def logs_after(self, step: int) -> bool:
        """Whether statistics are logged after this step."""
        return step % self.log_freq == 0 or self.is_last(step)

    def evaluates_after(self, step: int) -> bool:
        """Whether the model is evaluated after this step."""
        return step % self.eval_freq == 0 or self.is_last(step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, or became due in a step since the last update.

        Gradients that wait for more are not saved, so a checkpoint waits for the end of an update.
        """
        due = self.finished_before_update(step) // self.save_freq != step // self.save_freq
        return self.updates_after(step) and (due or self.is_last(step))

    def retriever_learns(self, step: int) -> bool:
        """Whether this step has a loss for the retriever."""
        return self.retriever_starts_after is not None and step > self.retriever_starts_after
