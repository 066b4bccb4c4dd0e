"""Validation: the loss of images that are never trained on, and what follows from it: the best file, an early end.

Noise, timesteps and captions of a measurement are always the same (library/data/validation_set.py), so a number can
be compared with that of any other step, and with that of another run with the same seed. Logged are

    loss/validation             the mean over the held-out images, in the run's own objective
    loss/validation/best        the lowest one so far
    loss/validation/relative    this one by the one before the first update: below 1, something was learned
    loss/validation/divergence  this one minus the mean training loss of the last epoch: grows when images are learned
                                by heart
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from library.data.batch import NoiseDraw
from library.data.validation_set import STRATA
from library.diffusion.noise import NoiseSource
from library.randomness import python_random
from library.train.callbacks import Callback
from library.train.loop import batch_loss
from library.train.placement import evaluating, reduced, to_device
from library.train.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StratifiedNoise:
    """Draws validation samples as `source` does, but each at a timestep of its own part of the range."""

    source: NoiseSource

    def __call__(self, epoch: int, sample_id: int, latent_chw: tuple[int, int, int]) -> NoiseDraw:
        low, high = self.source.options.timestep_range
        within = python_random(self.source.seed, "validation timestep", sample_id).random()
        place = (sample_id % STRATA + within) / STRATA  # in [0, 1)
        draw = self.source(epoch, sample_id, latent_chw)
        return draw._replace(timestep=low + int(place * max(1, high - low)))


@dataclass
class Course:
    """What the measurements of a run have shown so far."""

    start: float | None = None  # the loss before the first update
    loss: float = math.nan  # the last one measured
    measured_at: int = -1  # after this step
    best: float = math.inf
    best_step: int = 0
    num_without_improvement: int = 0  # measurements since the best one

    def note(self, step: int, loss: float) -> bool:
        """Take in a new number; returns whether it is the lowest so far."""
        self.loss, self.measured_at = loss, step
        if loss < self.best:
            self.best, self.best_step, self.num_without_improvement = loss, step, 0
            return True
        self.num_without_improvement += 1
        return False


class Validation(Callback):
    """Measures the held-out images of a run when they are due, keeps the best file, ends the run when asked to."""

    state_name = "validation"

    def __init__(self, run: Run) -> None:
        assert run.data.validation is not None
        self.run, self.options, self.images = run, run.config.validation, run.data.validation
        self.course = Course()

    def before_first_step(self, step: int) -> None:
        """The loss that everything is compared with: for a network, that of the model as it was."""
        if self.course.start is None:
            self.course.start = self.course.loss = self.measured()
            self._log(step)
            logger.info("validation before the first step: loss %.5f", self.course.start)
        self._end_if_hopeless()

    def after_step(self, step: int) -> None:
        """An epoch's end is also measured here, so that every state saved at this step knows of it."""
        plan, every, every_epoch = self.run.plan, self.options.validate_every_n_steps, self.options.every_n_epochs
        is_due = every is not None and step % every == 0
        if every_epoch is not None and plan.ends_epoch(step):
            is_due = is_due or plan.epoch_of(step) % every_epoch == 0
        if is_due:
            self._measure(step)
            self._end_if_hopeless()

    def at_end(self, step: int) -> None:
        """The final weights are measured in any case: they may be the best."""
        if self.course.measured_at != step:
            self._measure(step)

    def file_metadata(self, step: int) -> dict[str, str]:
        return {"ss_validation_loss": str(self.course.loss)} if step == self.course.measured_at else {}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.course)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.course = Course(**state)

    def _measure(self, step: int) -> None:
        course = self.course
        is_best = course.note(step, self.measured())
        self._log(step)
        what = "the lowest so far" if is_best else f"lowest {course.best:.5f} after step {course.best_step}"
        logger.info("validation after step %d: loss %.5f, %.5f at the start, %s", step, course.loss, course.start, what)
        if is_best and self.options.save_best:
            self.run.checkpoints.keep_best(step)

    @torch.no_grad()
    def measured(self) -> float:
        """The mean loss over all samples of all processes."""
        run, num_processes = self.run, self.run.accelerator.num_processes
        batches = self.images.batches(
            at_most=self.options.max_validation_steps,
            workers=run.config.loader.max_data_loader_n_workers,
            draw=StratifiedNoise(NoiseSource(run.config.noise, self.images.samples.seed)),
            tokenize=run.tokenize,
            process_index=run.accelerator.process_index,
            num_processes=num_processes,
        )
        total, num_samples = torch.zeros((), device=run.device), 0.0
        shown = tqdm(
            batches,
            "validation",
            self.images.num_batches(num_processes, self.options.max_validation_steps),
            leave=False,
            disable=not run.accelerator.is_local_main_process,
        )
        with run.weights_for_output(), evaluating(run.model):
            for batch in shown:
                loss = batch_loss(run, to_device(batch, run.device), trains_text=False)
                total += loss * batch.denominator
                num_samples += batch.denominator
        return float(reduced(run.accelerator, total, "mean")) / num_samples

    def _log(self, step: int) -> None:
        self.run.log.settle()
        course, average = self.course, self.run.log.average
        values = {"loss/validation": course.loss}
        if course.start:
            values["loss/validation/relative"] = course.loss / course.start
        if math.isfinite(course.best):
            values["loss/validation/best"] = course.best
        if math.isfinite(average):
            values["loss/validation/divergence"] = course.loss - average
        self.run.accelerator.log(values, step=step)

    def _end_if_hopeless(self) -> None:
        patience, course = self.options.early_stop_patience, self.course
        if patience is not None and course.num_without_improvement >= patience:
            self.run.end_early(
                f"{course.num_without_improvement} validations without a loss below the {course.best:.5f}"
                f" after step {course.best_step}"
            )
