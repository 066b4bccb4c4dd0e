"""What a run says while it trains: console and log file, progress bar, trackers.

Numbers of a step are read back one step late, when the device has long finished it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import toml
import torch
from accelerate import Accelerator
from tqdm import tqdm

from library.options import OptionError
from library.train.guard import NonFiniteGuard
from library.train.last_good import LastGood
from library.train.output_options import LoggingOptions
from library.train.placement import trackers

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
        start: int,
        window: int,
    ) -> None:
        self.accelerator, self.guard, self.last_good = accelerator, guard, last_good
        self.recent: deque[float] = deque(maxlen=min(max(window, 1), LONGEST_AVERAGE))
        self.pending: StepRecord | None = None
        self.bar = tqdm(
            total=steps, initial=start, desc="steps", smoothing=0.05, disable=not accelerator.is_local_main_process
        )

    def push(self, record: StepRecord) -> None:
        """Hand over an update's numbers; those of the update before are written now."""
        self.settle()
        self.pending = record
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
        self.bar.set_postfix(loss=f"{self.average:.4f}", refresh=False)
        values = {"loss/current": loss, "loss/average": self.average, "grad_norm": float(record.grad_norm)}
        values |= dict(record.learning_rates) | {name: float(value) for name, value in record.extra.items()}
        self.accelerator.log(values, step=record.step)

    @property
    def average(self) -> float:
        """Mean of the last epoch's losses."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def end_epoch(self, epoch: int, step: int) -> None:
        self.settle()
        self.accelerator.log({"loss/epoch": self.average, "epoch": epoch}, step=step)

    def close(self) -> None:
        self.settle()
        self.bar.close()


def start_trackers(accelerator: Accelerator, options: LoggingOptions, default_name: str) -> None:
    """Open TensorBoard or Weights & Biases under <logging_dir>/<log_prefix><time>."""
    if trackers(options) is None:
        return
    if trackers(options) in ("wandb", "all"):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise OptionError(
                "--log_with", "wandb is not installed", "pip install wandb, or use --log_with tensorboard"
            ) from None
        if options.wandb_api_key:
            wandb.login(key=options.wandb_api_key)
    arguments = {}
    if options.log_tracker_config:
        try:
            arguments = toml.load(options.log_tracker_config)
        except (OSError, toml.TomlDecodeError) as error:
            raise OptionError("--log_tracker_config", f"can't be read ({error})") from None
    accelerator.init_trackers(options.log_tracker_name or default_name, init_kwargs=arguments)
