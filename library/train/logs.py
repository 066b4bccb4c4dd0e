"""What a run says while it trains: console and log file, progress bar, trackers.

Numbers of a step are read back one step late, when the device has long finished it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from accelerate import Accelerator

from library.options import options_of, read_toml
from library.progress import progress_bar
from library.train.guard import NonFiniteGuard
from library.train.last_good import LastGood
from library.train.output_options import LoggingOptions
from library.wording import counted

logger = logging.getLogger(__name__)

LOG_NAMES = {
    "text encoder": "lr/textencoder", "text encoder 1": "lr/textencoder1", "text encoder 2": "lr/textencoder2",
    "unet": "lr/unet",
}  # fmt: skip
BAR_NAMES = {"max_norm/keys_scaled": "Keys Scaled", "max_norm/average_key_norm": "Average key norm"}
LONGEST_AVERAGE = 10_000  # steps; keeps the moving average of huge data sets within reason


@dataclass(frozen=True)
class StepRecord:
    """One update's numbers, still on the device."""

    step: int
    epoch: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    is_finite: torch.Tensor
    learning_rates: Mapping[str, float]
    image_names: tuple[str, ...]
    extra: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


class TrainLog:
    """Writes each update's numbers once the next one is under way."""

    def __init__(
        self,
        accelerator: Accelerator,
        guard: NonFiniteGuard,
        last_good: LastGood,
        *,
        steps: int,
        epochs: int,
        start: int,
        window: int,
    ) -> None:
        self.accelerator, self.guard, self.last_good, self.epochs = accelerator, guard, last_good, epochs
        self.recent: deque[float] = deque(maxlen=min(max(window, 1), LONGEST_AVERAGE))
        self.pending: StepRecord | None = None
        self.begun, self.steps_done = time.monotonic(), 0
        self.bar = progress_bar(
            total=steps, initial=start, desc="steps", smoothing=0.05, disable=not accelerator.is_local_main_process
        )

    def push(self, record: StepRecord) -> None:
        """Hand over an update's numbers; those of the update before are written now."""
        self.settle()
        self.pending = record
        self.steps_done += 1
        self.bar.update()

    def settle(self) -> None:
        """Write the numbers that are still pending."""
        record, self.pending = self.pending, None
        if record is None:
            return
        is_finite = bool(record.is_finite)
        self.guard.note(record.step, is_finite, record.image_names)
        self.last_good.note(record.step, is_finite=is_finite)
        loss = float(record.loss)
        if math.isfinite(loss):
            self.recent.append(loss)
        extra = {name: float(value) for name, value in record.extra.items()}
        shown = {label: extra[name] for name, label in BAR_NAMES.items() if name in extra}
        self.bar.set_postfix({"loss": f"{self.average:.4f}", **shown}, refresh=False)
        values = {"loss/current": loss, "loss/average": self.average, "grad_norm": float(record.grad_norm)}
        values |= dict(record.learning_rates) | extra
        self.accelerator.log(values, step=record.step)

    @property
    def average(self) -> float:
        """Mean of the last epoch's losses."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def begin_epoch(self, epoch: int) -> None:
        logger.info("epoch %d/%d", epoch, self.epochs)

    def end_epoch(self, epoch: int, step: int) -> None:
        self.settle()
        self.accelerator.log({"loss/epoch": self.average, "epoch": epoch}, step=step)

    @property
    def summary(self) -> str:
        """What was done since the run began, in words."""
        seconds = round(time.monotonic() - self.begun)
        minutes = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        return f"{counted(self.steps_done, 'step')} in {minutes}, average loss {self.average:.4f}"

    def close(self) -> None:
        self.settle()
        self.bar.close()


def rates_by_log_name(
    groups: Sequence[str],
    rates: Sequence[float | None],
    factors: Sequence[float],
    own_names: Sequence[str | None] = (),
) -> dict[str, float]:
    """What the trade calls the rates of parameter groups: by part for up to two groups, else by number.

    Of more groups only those of text encoders that come first are called by their part. `factors` are those that an
    optimizer found for its rates (D-Adaptation's d), if it does: their products are logged of the first group or, of
    more than two, of each that goes by its number. Groups without a rate are left out. `own_names` are those of
    targets that log otherwise: they take the place of all this, but for the products.
    """
    if any(own_names):
        return _rates_by_own_name([str(name) for name in own_names], rates, factors)
    are_parts = all(group in LOG_NAMES for group in groups) and len(set(groups)) == len(groups)
    are_many, names = len(groups) > 2 and not are_parts, []
    for index, group in enumerate(groups):
        name = LOG_NAMES.get(group, "")
        is_leading_text = group != "unet" and not any("group" in before for before in names)
        goes_by_part = name and name not in names and (not are_many or is_leading_text)
        names.append(name if goes_by_part else f"lr/group{index}")
    logged = {name: rate for name, rate in zip(names, rates, strict=True) if rate is not None}
    for index, (name, factor) in enumerate(zip(names, factors, strict=False)):
        if not are_many and index == 0:
            logged["lr/d*lr"] = factor * (rates[0] or 0.0)
        elif are_many and name == f"lr/group{index}":
            logged[f"lr/d*lr/group{index}"] = factor * (rates[index] or 0.0)
    return logged


def _rates_by_own_name(
    names: Sequence[str], rates: Sequence[float | None], factors: Sequence[float]
) -> dict[str, float]:
    logged = {name: rate for name, rate in zip(names, rates, strict=True) if rate is not None}
    for name, rate, factor in zip(names, rates, factors, strict=False):
        logged[f"lr/d*{name}" if name == "lr" else f"lr/d*lr/{name.removeprefix('lr/')}"] = factor * (rate or 0.0)
    return logged


def start_trackers(
    accelerator: Accelerator, options: LoggingOptions, default_name: str, settings: Mapping[str, Any]
) -> None:
    """Open TensorBoard or Weights & Biases under <logging_dir>/<log_prefix><time>; `settings` go there if asked."""
    if not options.trackers:
        return
    arguments = read_toml(options.log_tracker_config, "--log_tracker_config") if options.log_tracker_config else {}
    if options.uses_wandb and accelerator.is_main_process:
        import wandb  # pyright: ignore[reportMissingImports]

        if options.wandb_api_key:
            wandb.login(key=options.wandb_api_key)
        given = {"name": options.wandb_run_name, "dir": accelerator.project_dir}
        given = {name: value for name, value in given.items() if value}
        arguments["wandb"] = given | arguments.get("wandb", {})
    config = dict(settings) if options.log_config else None
    accelerator.init_trackers(options.log_tracker_name or default_name, config=config, init_kwargs=arguments)


def settings_to_show(groups: Iterable[Any]) -> dict[str, bool | int | float | str]:
    """The options of `groups` by name as trackers take them: no keys and tokens, and of files and folders only names.

    Options that are not set are left out.
    """
    shown = {}
    for group in groups:
        for option in options_of(type(group)):
            value = getattr(group, option.name)
            if value is not None and not option.secret:
                shown[option.name] = _shown(value)
    return shown


def _shown(value: Any) -> bool | int | float | str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_shown(item)) for item in value)
    if isinstance(value, (bool, int, float)):
        return value
    name, equals, text = str(value).rpartition("=")  # network_args and the like are name=value
    is_place = isinstance(value, Path) or os.path.isabs(text) or os.path.exists(text)
    return name + equals + (PureWindowsPath(text).name or text if is_place or PureWindowsPath(text).drive else text)
