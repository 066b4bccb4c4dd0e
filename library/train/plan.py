"""The run's arithmetic: steps, epochs, save points. Computed once, printed before the start, asked by the loop.

A step is an optimizer update. A batch is one batch over all processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.data.batch import Position
from library.options import require
from library.train.course_options import StartOptions
from library.train.options import TrainingOptions
from library.train.output_options import SavingOptions


@dataclass(frozen=True)
class TrainPlan:
    """Counts of one run; epochs and steps are counted from 1, "after step 0" is the start."""

    steps: int
    epochs: int
    batches_per_epoch: int
    accumulation: int
    save_every_n_steps: int | None = None
    save_every_n_epochs: int | None = None

    @classmethod
    def make(cls, training: TrainingOptions, saving: SavingOptions, batches_per_epoch: int) -> TrainPlan:
        accumulation = training.gradient_accumulation_steps
        steps_per_epoch = -(-batches_per_epoch // accumulation)
        steps = training.max_train_epochs * steps_per_epoch if training.max_train_epochs else training.max_train_steps
        epochs = -(-steps // steps_per_epoch)
        save_every_n_epochs = saving.save_every_n_epochs
        if saving.save_n_epoch_ratio:
            save_every_n_epochs = max(1, epochs // saving.save_n_epoch_ratio)
        return cls(steps, epochs, batches_per_epoch, accumulation, saving.save_every_n_steps, save_every_n_epochs)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulation)

    def steps_before(self, start: StartOptions) -> int:
        """Updates that a run beginning at --initial_step or --initial_epoch leaves out; OptionError if that is all."""
        if start.initial_step is not None:
            flag, given, done = "--initial_step", start.initial_step, start.initial_step
        else:
            given = start.initial_epoch or 1
            flag, done = "--initial_epoch", (given - 1) * self.steps_per_epoch
        require(
            done < self.steps, flag, f"{given} leaves nothing to train: the run has {self.steps} steps", "train longer"
        )
        return done

    def epoch_of(self, step: int) -> int:
        """The epoch (from 1) to which update number `step` (from 1) belongs."""
        return (step - 1) // self.steps_per_epoch + 1

    def position_after(self, step: int) -> Position:
        """The first batch of update `step` + 1."""
        epochs_done, steps_done = divmod(step, self.steps_per_epoch)
        return Position(epochs_done + 1, steps_done * self.accumulation)

    def batches_of(self, step: int) -> int:
        """How many batches update `step` averages: the last one of an epoch may have fewer."""
        first = self.position_after(step - 1).batch_index
        return min(self.accumulation, self.batches_per_epoch - first)

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def saves_at(self, step: int) -> bool:
        """Whether a numbered step file is due; the last step has the final file instead."""
        every = self.save_every_n_steps
        return bool(every) and step % every == 0 and step < self.steps

    def saves_after_epoch(self, epoch: int) -> bool:
        """Whether a numbered epoch file is due; the last epoch has the final file instead."""
        every = self.save_every_n_epochs
        return bool(every) and epoch % every == 0 and epoch < self.epochs
