"""What a run's settings come to over its steps: learning rates, the optimizer's memory, the files that will be there.

Optimizer and schedule are tried out on stand-ins of the trained parameters, so the numbers are those of the very
classes that will run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library.options import OptionError
from library.targets.base import ParamGroup
from library.train.checkpoints import outdated_epoch, outdated_step
from library.train.config import RunConfig
from library.train.lr_schedulers import build_lr_scheduler
from library.train.optimizers import BuiltOptimizer, build_optimizer
from library.train.output_options import SavingOptions
from library.train.plan import TrainPlan
from library.train.resume import FileNames

STAND_IN = 128  # rows and columns: enough for optimizers that keep small tensors in full precision
DRAWN = 240  # points of a curve
MOST_TRIED = 20_000  # steps of a schedule that can only be followed step by step


# ---------------------------------------------------------------------------------------------- optimizer and schedule


def stand_ins(groups: Sequence[ParamGroup], device: torch.device | str = "cpu") -> list[ParamGroup]:
    """The same groups with one small parameter each, of the precision of theirs."""
    return [replace(group, parameters=(_stand_in(group, device),)) for group in groups]


def _stand_in(group: ParamGroup, device: torch.device | str) -> torch.nn.Parameter:
    dtype = group.parameters[0].dtype if group.parameters else torch.float32
    return torch.nn.Parameter(torch.full((STAND_IN, STAND_IN), 0.01, dtype=dtype, device=device))


def try_out(config: RunConfig, groups: Sequence[ParamGroup], num_steps: int, device: torch.device) -> None:
    """Raise OptionError for arguments that optimizer or schedule take at first and fail with at a later step."""
    with quietly():
        built = build_optimizer(config.optimizer, stand_ins(groups, device))
        scheduler = build_lr_scheduler(config.schedule, built, num_steps)
        try:
            _step_once(built)
        except Exception as error:  # whatever an optimizer of anybody's raises
            name = type(built.optimizer).__name__
            problem = f"{name} can't make a step with these settings ({_first_line(error)})"
            where = "--optimizer_args" if config.optimizer.optimizer_args else "--optimizer_type"
            raise OptionError(where, problem, "change --optimizer_args, or use AdamW") from None
        if scheduler is None:
            return
        done = 0
        try:
            while done < min(num_steps, MOST_TRIED):
                done += 1
                scheduler.step()
                if not all(math.isfinite(float(rate or 0.0)) for rate in built.rates()):
                    raise ValueError("the rate is not finite")
        except Exception as error:
            name = config.schedule.name.rpartition(".")[2]
            where = "--lr_scheduler_args" if config.schedule.lr_scheduler_args else "--lr_scheduler"
            problem = f"{name} fails after step {done} of {num_steps} ({_first_line(error)})"
            raise OptionError(where, problem, "change the arguments, or use another schedule") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _step_once(built: BuiltOptimizer) -> list[torch.Tensor]:
    """One step with small gradients; returns the parameters."""
    parameters = [parameter for group in built.optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    built.wide.widen(parameters)
    try:
        built.optimizer.step()
    finally:
        built.wide.narrow()
    return parameters


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without messages: for what is built a second time, only to be looked at."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def state_bytes_per_parameter(built: BuiltOptimizer) -> float | None:
    """Bytes that the optimizer keeps for each trained parameter; None where that can't be tried on this machine.

    `built` is over stand-ins, on which it makes one step.
    """
    try:
        parameters = _step_once(built)
        kept = [built.optimizer.state.get(parameter, {}) for parameter in parameters]
        tensors = [value for state in kept for value in state.values() if isinstance(value, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
        return size / sum(parameter.numel() for parameter in parameters)
    except Exception:  # an optimizer for GPUs only, or one that asks for a closure
        return None


@dataclass(frozen=True)
class RateCourse:
    """The learning rate of one group over the run."""

    group: str
    points: tuple[tuple[int, float], ...]  # (update from 1, its rate), the first and the last update among them

    @property
    def first(self) -> float:
        return self.points[0][1]

    @property
    def peak(self) -> float:
        return max(rate for _, rate in self.points)

    @property
    def last(self) -> float:
        return self.points[-1][1]


def rate_courses(config: RunConfig, groups: Sequence[ParamGroup], num_steps: int) -> list[RateCourse]:
    """The rates that --lr_scheduler gives each group; none where the optimizer chooses its own.

    Empty too for a schedule of somebody else's that is too long to be followed step by step.
    """
    with quietly():
        built = build_optimizer(config.optimizer, stand_ins(groups))
        if built.chooses_own_rate:
            return []
        scheduler = build_lr_scheduler(config.schedule, built, num_steps)
        updates = _drawn_updates(num_steps, config.schedule.warmup_steps(num_steps))
        if scheduler is None:
            rates = [[rate or 0.0 for rate in built.rates()] for _ in updates]
        elif isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            by_group = [[float(base * factor(update - 1)) for update in updates] for base, factor in factors]
            rates = [list(row) for row in zip(*by_group, strict=True)]
        elif num_steps <= MOST_TRIED:
            rates = _followed(built, scheduler, updates)
        else:
            return []
    return [
        RateCourse(name, tuple((update, row[index]) for update, row in zip(updates, rates, strict=True)))
        for index, name in enumerate(built.group_names)
    ]


def _drawn_updates(num_steps: int, num_warmup_steps: int) -> list[int]:
    """Updates at which a curve is drawn: evenly spread, and the corners."""
    spread = {1 + round(index * (num_steps - 1) / (DRAWN - 1)) for index in range(DRAWN)}
    corners = {num_warmup_steps, num_warmup_steps + 1}
    return sorted(spread | {update for update in corners if 1 <= update <= num_steps})


def _followed(
    built: BuiltOptimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, updates: Sequence[int]
) -> list[list[float]]:
    wanted, found = frozenset(updates), []
    for update in range(1, updates[-1] + 1):
        if update in wanted:
            found.append([rate or 0.0 for rate in built.rates()])
        scheduler.step()
    return found


# ---------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class FileToCome:
    """A model file that the run will write, at the latest when it gets there."""

    path: Path
    step: int
    epoch: int
    with_average: bool  # <file>-ema beside it
    with_state: bool
    removed_at: int | None = None  # the step at which the run removes it again
    state_removed_at: int | None = None
    is_of_epoch: bool = False


def files_to_come(
    plan: TrainPlan, saving: SavingOptions, names: FileNames, *, start_step: int, has_average: bool
) -> list[FileToCome]:
    """The files that a run writes after `start_step`, in order; without those of its best weights."""
    steps = range(plan.save_every_n_steps, plan.steps, plan.save_every_n_steps) if plan.save_every_n_steps else range(0)
    ages = (saving.save_last_n_steps, saving.save_last_n_steps_state or saving.save_last_n_steps)
    gone, state_gone = ({outdated_step(later, plan, age): later for later in reversed(steps)} for age in ages)
    files = [
        FileToCome(names.step_file(step), step, plan.epoch_of(step), has_average, saving.save_state,
                   gone.get(step), state_gone.get(step))
        for step in steps
    ]  # fmt: skip
    epochs = (
        range(plan.save_every_n_epochs, plan.epochs, plan.save_every_n_epochs) if plan.save_every_n_epochs else range(0)
    )
    ages = (saving.save_last_n_epochs, saving.save_last_n_epochs_state or saving.save_last_n_epochs)
    ends = {epoch: epoch * plan.steps_per_epoch for epoch in epochs}
    gone, state_gone = ({outdated_epoch(later, plan, age): ends[later] for later in reversed(epochs)} for age in ages)
    files += [
        FileToCome(names.epoch_file(epoch), ends[epoch], epoch, has_average, saving.save_state,
                   gone.get(epoch), state_gone.get(epoch), is_of_epoch=True)
        for epoch in epochs
    ]  # fmt: skip
    with_state = saving.save_state or saving.save_state_on_train_end
    files.append(FileToCome(names.final_file(), plan.steps, plan.epochs, has_average, with_state))
    return sorted((file for file in files if file.step > start_step), key=lambda file: file.step)


def most_on_disk(files: Sequence[FileToCome], file_bytes: int, state_bytes: int) -> int:
    """The most bytes that these files take at any time."""
    changes: list[tuple[int, int, int]] = []  # (step, order within it, bytes)
    for file in files:
        own = file_bytes * (2 if file.with_average else 1)
        turn = 2 if file.is_of_epoch else 0  # files of steps are written, and old ones removed, before those of epochs
        changes.append((file.step, turn, own + (state_bytes if file.with_state else 0)))
        changes += [(file.removed_at, turn + 1, -own)] if file.removed_at is not None else []
        if file.with_state and file.state_removed_at is not None:
            changes.append((file.state_removed_at, turn + 1, -state_bytes))
    total = most = 0
    for _, _, size in sorted(changes):
        total += size
        most = max(most, total)
    return most


def check_free_space(folder: Path, free_bytes: int, needed_bytes: int, *, with_state: bool = False) -> None:
    """Raise OptionError where the first files of the run would not fit."""
    if free_bytes < needed_bytes:
        raise OptionError(
            "--output_dir",
            f"{folder} has {free_bytes / 2**20:.0f} MiB free; one file{' with its state' if with_state else ''} takes "
            f"{needed_bytes / 2**20:.0f} MiB",
            "free some space or choose another folder",
        )
