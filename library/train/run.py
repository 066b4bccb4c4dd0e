"""A run that is ready to start: what the loop works with, and how its parts answer together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.checkpoints.safetensors_io import read_header
from library.data.batch import Batch, Position
from library.data.dataset import TrainingData
from library.data.dataset_class import ForeignData
from library.data.loading import Tokenize
from library.diffusion.noise import NoiseSource
from library.diffusion.schedule import NoiseSchedule
from library.families.base import ModelBundle, ModelFamily
from library.options import OptionError
from library.targets.base import ParamGroup, TrainTarget
from library.text.tokens import Tokens, without_padding
from library.train import checkpoints, metadata
from library.train.callbacks import Callback
from library.train.config import RunConfig
from library.train.ema import WeightAverage, given_out_by
from library.train.guard import NonFiniteGuard, StopRequest
from library.train.last_good import LARGEST, LastGood
from library.train.logs import TrainLog, rates_by_log_name
from library.train.lr_schedulers import depends_on_length, length_kept, step_to
from library.train.model_files import ModelFiles
from library.train.optimizers import BuiltOptimizer
from library.train.placement import reduced
from library.train.plan import TrainPlan
from library.train.resume import FileNames, RunState, find_state
from library.train.updates import Updates

logger = logging.getLogger(__name__)

STOP_CHECK_EVERY = 8  # steps between agreements of several processes on whether to stop


@dataclass
class Run:
    """Everything a training run consists of."""

    config: RunConfig
    accelerator: Accelerator
    family: ModelFamily
    bundle: ModelBundle
    target: TrainTarget
    model: torch.nn.Module  # the prepared StepModule
    groups: Sequence[ParamGroup]
    optimizer: Any  # accelerate's wrapper
    built: BuiltOptimizer
    updates: Updates
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    schedule: NoiseSchedule
    data: TrainingData | ForeignData
    plan: TrainPlan
    seed: int
    settings: Mapping[str, Any]  # what a resumed run must share
    digest: Mapping[str, Any]
    names: FileNames
    guard: NonFiniteGuard
    stop: StopRequest
    start_step: int = 0
    step: int = 0  # updates done
    ended_early: bool = False  # by a callback, and so complete
    agreed_to_stop: bool = False  # several processes, all of them
    callbacks: list[Callback] = field(default_factory=list)  # called in this order, before files are saved
    average: WeightAverage | None = None  # one of the callbacks, with --ema_decay
    recent_losses: list[float] = field(default_factory=list)
    metadata_of: Any = None  # (step, epoch) -> metadata of a file; main process only

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def v_prediction(self) -> bool:
        return self.bundle.source.v_prediction

    @property
    def has_gradient_scaler(self) -> bool:
        return self.accelerator.scaler is not None

    @cached_property
    def unet_dtype(self) -> torch.dtype:
        return next(self.bundle.unet.parameters()).dtype

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.groups for parameter in group.parameters]

    @cached_property
    def checkpoints(self) -> checkpoints.Checkpointer:
        return checkpoints.Checkpointer(
            saving=self.config.saving,
            plan=self.plan,
            names=self.names,
            write_model=self.updates.together(self.files.write, whole=True),
            write_best=self.updates.together(self.files.write_best, whole=True),
            write_state=self.updates.together(self.write_state),
            is_healthy=self._is_healthy,
            begin_model=self.files.begin,
            removes_old=self.accelerator.is_main_process,
        )

    @cached_property
    def files(self) -> ModelFiles:
        """The files users take away. What changes, moves or replaces weights waits for their writer first."""
        files = ModelFiles(self)
        self.updates.before_change = files.background.wait
        return files

    @cached_property
    def last_good(self) -> LastGood:
        stay = {callback.state_name for callback in self.callbacks if not callback.is_of_the_weights}
        parts = {name: part for name, part in self._parts().items() if name not in stay}
        size = sum(self.updates.numel_of(parameter) * parameter.element_size() for parameter in self.parameters)
        return LastGood(parts, self.start_step, keeps=size <= LARGEST)

    @cached_property
    def tokenize(self) -> Tokenize:
        """Captions to what the text encoders take; travels to worker processes."""
        text = self.config.text
        tokenize = partial(
            self.family.tokenize,
            self.bundle.tokenizers,
            windows=text.token_windows,
            weighted=text.weighted_captions,
        )
        return tokenize if text.pads else partial(_tokenize_unpadded, tokenize)

    @cached_property
    def batches(self) -> Generator[Batch, None, None]:
        """This process's batches from the start step on, to the end of the last epoch."""
        start, workers = self.plan.position_after(self.start_step), self.config.loader.max_data_loader_n_workers
        return (batch for _, batch in self.batches_from(start, workers=workers))

    def batches_from(self, start: Position, *, workers: int) -> Iterator[tuple[Position, Batch]]:
        """This process's batches from anywhere in the run on, made by up to `workers` processes."""
        return self.data.loader(
            start=start,
            draw=NoiseSource(self.config.noise, self.seed),
            tokenize=self.tokenize,
            accumulation=self.plan.accumulation,
            max_train_steps=self.plan.steps,
            epochs=self.plan.epochs,
            prior_loss_weight=self.config.loss.prior_loss_weight,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            workers=workers,
        )

    def learning_rates(self) -> dict[str, float]:
        """The rates of the coming update by log name, as far as the optimizer has any."""
        return rates_by_log_name(self.built.group_names, self.built.rates(), self.built.factors(), self.built.log_names)

    @property
    def is_complete(self) -> bool:
        """Whether all updates are done, or a callback ended the run early."""
        return self.step >= self.plan.steps or self.ended_early

    def end_early(self, why: str) -> None:
        """For callbacks: let the run end after this update as it would at its last one. All processes must do it."""
        logger.info("the run ends after step %d of %d: %s", self.step, self.plan.steps, why)
        self.ended_early = True

    def stop_requested(self) -> bool:
        """Whether to stop before the next update."""
        return self.agree_to_stop(self.step)

    def agree_to_stop(self, count: int) -> bool:
        """Whether to stop before the next of something that all processes count alike; they agree every few counts."""
        if self.accelerator.num_processes == 1:
            return bool(self.stop)
        if self.agreed_to_stop or count % STOP_CHECK_EVERY:
            return self.agreed_to_stop
        asked = torch.tensor([self.stop.signal_number or 0], device=self.device)
        numbers = self.accelerator.gather(asked)
        assert isinstance(numbers, torch.Tensor)
        self.stop.signal_number = int(numbers.max()) or None
        self.agreed_to_stop = bool(self.stop)
        return self.agreed_to_stop

    # ------------------------------------------------------------------------------------------ callbacks

    def before_first_step(self) -> None:
        for callback in self._all_callbacks():
            callback.before_first_step(self.step)

    def after_step(self, step: int) -> None:
        for callback in self._all_callbacks():
            callback.after_step(step)

    def after_epoch(self, epoch: int, step: int) -> None:
        for callback in self._all_callbacks():
            callback.after_epoch(epoch, step)

    def _all_callbacks(self) -> list[Callback]:
        return [*self.callbacks, self.checkpoints]

    # ------------------------------------------------------------------------------------------ log

    def open_log(self) -> None:
        self.log = TrainLog(
            self.accelerator,
            self.guard,
            self.last_good,
            steps=self.plan.steps,
            epochs=self.plan.epochs,
            start=self.start_step,
            window=self.plan.steps_per_epoch,
        )
        self.log.recent.extend(self.recent_losses)

    def describe(self, facts: metadata.FileFacts) -> None:
        """Fix the metadata of the files this run writes."""
        self.metadata_of = partial(metadata.file_metadata, facts, metadata.constant_metadata(facts))

    # ------------------------------------------------------------------------------------------ weights

    @contextlib.contextmanager
    def weights_for_output(self) -> Iterator[None]:
        """Inside the block the model holds the weights to be looked at: by previews, by validation, in the best file.

        These are the average's with --ema_decay, else those that the optimizer gives out, which for all but the
        schedule-free ones are those being trained. Afterwards they are as before, bit for bit. To be used between
        updates; the modules' modes are the caller's.
        """
        self.files.background.wait()
        with self.average.applied() if self.average else given_out_by(self.optimizer, self.parameters):
            yield

    # ------------------------------------------------------------------------------------------ saving

    def tell_saved(self, path: Path) -> None:
        """Let the callbacks know that a model file or a state folder is complete on the disk."""
        for callback in self.callbacks:
            callback.on_saved(path)

    def write_state(self, folder: Path, step: int) -> None:
        parts = self._parts()
        shares = self.updates.write_shares(folder, parts)
        if not self.accelerator.is_main_process:
            return
        state = RunState(
            step=step,
            epoch=self.plan.epoch_of(max(step, 1)),
            settings=self.settings,
            data=self.digest,
            recent_losses=list(self.log.recent),
            skipped_steps=self.guard.total,
            planned_steps=self.plan.steps,
        )
        checkpoints.save_state(folder, state, trained=parts.pop("trained", None), others=parts, shares=shares)
        self.tell_saved(folder)

    def restore(self, folder: Path, state: RunState) -> None:
        """Put the state's weights, optimizer, schedule and counters in place."""
        parts = self._parts()
        has_other_length = state.planned_steps not in (None, self.plan.steps)
        is_other_schedule = has_other_length and depends_on_length(self.config.schedule)
        with length_kept(self.lr_scheduler) if is_other_schedule else contextlib.nullcontext():
            checkpoints.load_state(folder, trained=parts.pop("trained", None), others=parts)
        self.start_step = self.step = state.step
        self.recent_losses = state.recent_losses
        self.guard.total = state.skipped_steps
        logger.info("going on after step %d from %s", state.step, folder)

    def skip_to(self, step: int) -> None:
        """Start after `step` updates that another run did and whose state is lost; the schedule goes on there."""
        self.start_step = self.step = step
        if self.lr_scheduler is not None:
            step_to(self.lr_scheduler, step)

    def _parts(self) -> dict[str, Any]:
        """Everything with a state that changes while training."""
        parts = {
            "trained": checkpoints.RawTensors(self.target.trained_module()),
            "optimizer": self.built,
            "lr_scheduler": self.lr_scheduler,
            "scaler": self.accelerator.scaler,
            **{callback.state_name: callback for callback in self.callbacks if callback.state_name},
        }
        return self.updates.parts({name: part for name, part in parts.items() if part is not None})

    def finish(self) -> int:
        """Save what the run ends with: the final file, or, when it was asked to stop, model and state."""
        if self.is_complete and self._is_written_already():
            self.log.close()
            self.close_callbacks()
            logger.info("nothing left to do: %s is that of step %d", self.names.final_file(), self.step)
            return 0
        folder = self._save_the_end()
        self.accelerator.wait_for_everyone()
        self.close_callbacks()
        if folder is None:
            logger.info("%s", self.log.summary)
            logger.info("model saved.")
            return 0
        logger.info('stopped after step %d of %d; to go on, add: --resume "%s"', self.step, self.plan.steps, folder)
        return self.stop.exit_code

    def _save_the_end(self) -> Path | None:
        """Write the last files, after the callbacks or in spite of their errors; returns the state of a stopped run."""
        is_complete = self.is_complete
        try:
            self.files.background.wait()
            self.log.close()
            for callback in self.callbacks:
                callback.before_end(self.step)
            for callback in self.callbacks if is_complete else ():
                callback.at_end(self.step)
        finally:
            folder = None if is_complete else self.checkpoints.interrupted(self.step)
            if is_complete:
                self.checkpoints.at_end(self.step)
        return folder

    def _is_written_already(self) -> bool:
        """Whether nothing was trained since a run before, and the final file of that is there; the same everywhere."""
        if self.step > self.start_step:
            return False
        is_written = False
        if self.accelerator.is_main_process and self.names.final_file().is_file():
            with contextlib.suppress(OptionError):
                is_written = read_header(self.names.final_file()).metadata.get("ss_steps") == str(self.step)
        everywhere = reduced(self.accelerator, torch.tensor(float(is_written), device=self.device), "sum")
        return bool(everywhere)

    def close_callbacks(self) -> None:
        self.files.background.wait()
        for callback in self.callbacks:
            callback.close()

    def save_last_good(self) -> Path | None:
        """Go back to the last weights known to be good, and save them with their state; returns the state's folder.

        Of models too large to be kept in memory, the newest state that is on the disk, if there is one.
        """
        if not self.last_good.keeps:
            return find_state("latest", self.names)
        return self.checkpoints.interrupted(self.go_back())

    def go_back(self) -> int:
        """Go back to the last weights known to be good, if they are kept in memory; returns the step they are of."""
        if not self.last_good.keeps:
            return self.step
        self.files.background.wait()
        self.step = self.last_good.restore()
        self.guard.in_a_row = 0
        return self.step

    def _is_healthy(self) -> bool:
        self.log.settle()
        return self.guard.is_healthy

    def rescue(self) -> None:
        """After an error: save model and state where that is possible, unless nothing new has been learned."""
        self.files.background.wait()
        self.log.settle()
        if not self.guard.is_healthy or self.step in (self.start_step, self.last_good.restored_step):
            return
        if not self.updates.writes_alone:
            logger.warning("the work since the last save is lost: it takes all processes to save it")
            return
        try:
            folder = self.checkpoints.interrupted(self.step)
        except OptionError as error:
            logger.warning("the work since the last save is lost: %s", error)
            return
        logger.warning('the work up to step %d is saved; to go on, add: --resume "%s"', self.step, folder)


def _tokenize_unpadded(tokenize: Tokenize, captions: Sequence[str]) -> Tokens:
    return without_padding(tokenize(captions))
