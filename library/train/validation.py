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

from library.data.batch import NoiseDraw
from library.data.validation_set import STRATA
from library.diffusion.noise import NoiseSource
from library.progress import progress_bar
from library.randomness import python_random
from library.train.callbacks import Callback
from library.train.guard import REASONS
from library.train.loop import batch_loss
from library.train.placement import evaluating, reduced, to_device
from library.train.run import Run
from library.wording import counted

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
    is_of_the_weights = False  # the best file of a run stays the best one

    def __init__(self, run: Run) -> None:
        assert run.data.validation is not None
        self.run, self.options, self.images = run, run.config.validation, run.data.validation
        self.course = Course()

    def before_first_step(self, step: int) -> None:
        """The loss that everything is compared with: for a network, that of the model as it was."""
        if self.course.start is None:
            loss = self.measured()
            if loss is None:
                return
            self.course.start = self.course.loss = loss
            self._log(step)
            logger.info("validation before the first step: loss %.5f", self.course.start)
            if not math.isfinite(self.course.start):
                logger.warning("the validation loss is not finite before anything was learned: is the model damaged?")
        elif self._is_due(step) and self.course.measured_at != step:
            self._measure(step)  # it was broken off when the run was stopped
        self._end_if_hopeless(way_out="; a larger --early_stop_patience, or none, lets it go on")

    def after_step(self, step: int) -> None:
        """An epoch's end is also measured here, so that every state saved at this step knows of it."""
        if self._is_due(step):
            self._measure(step)
            self._end_if_hopeless()

    def _is_due(self, step: int) -> bool:
        plan, every, every_epoch = self.run.plan, self.options.validate_every_n_steps, self.options.every_n_epochs
        if step == 0:
            return False
        if every is not None and step % every == 0:
            return True
        return every_epoch is not None and plan.ends_epoch(step) and plan.epoch_of(step) % every_epoch == 0

    def at_end(self, step: int) -> None:
        """The final weights are measured in any case: they may be the best."""
        course = self.course
        if course.measured_at != step:
            self._measure(step)
        if course.measured_at >= 0 and not math.isfinite(course.best):
            file = "; there is no -best file" if self.options.save_best else ""
            logger.warning("no validation of this run had a finite loss%s; %s", file, REASONS)

    def file_metadata(self, step: int) -> dict[str, str]:
        return {"ss_validation_loss": str(self.course.loss)} if step == self.course.measured_at else {}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.course)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.course = Course(**state)

    def _measure(self, step: int) -> None:
        course, loss = self.course, self.measured()
        if loss is None:
            return
        is_best = course.note(step, loss)
        self._log(step)
        best = "none was so far"
        if math.isfinite(course.best):
            best = f"lowest {course.best:.5f} after step {course.best_step}"
        if math.isfinite(course.loss):
            what = "the lowest so far" if is_best else best
            logger.info(
                "validation after step %d: loss %.5f, %.5f at the start, %s", step, course.loss, course.start, what
            )
        else:
            logger.warning(
                "validation after step %d: the loss is not finite (lower --learning_rate); %s", step, best
            )  # fmt: skip
        if is_best and self.options.save_best:
            self.run.checkpoints.keep_best(step)

    @torch.no_grad()
    def measured(self) -> float | None:
        """The mean loss over all samples of all processes; None where the run was asked to stop meanwhile."""
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
        shown = progress_bar(
            iterable=batches,
            desc="validation",
            total=self.images.num_batches(num_processes, self.options.max_validation_steps),
            is_inner=True,
            disable=not run.accelerator.is_local_main_process,
        )
        with run.weights_for_output(), evaluating(run.model):
            for index, batch in enumerate(shown):
                if run.agree_to_stop(index):
                    logger.info("validation is broken off")
                    return None
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

    def _end_if_hopeless(self, way_out: str = "") -> None:
        patience, course = self.options.early_stop_patience, self.course
        if patience is None or course.num_without_improvement < patience:
            return
        number = counted(course.num_without_improvement, "validation")
        if math.isfinite(course.best):
            lowest = f"a loss below the {course.best:.5f} after step {course.best_step}"
        else:
            lowest = "a finite loss: nothing useful was learned, lower --learning_rate"
        self.run.end_early(f"{number} without {lowest}{way_out}")
