"""Options of the training run itself: its length, how a step is computed, optimizer, schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from library.options import named_values, not_one_of, opt, require
from library.train.optimizer_table import (
    NAMES,
    TABLE,
    adapts_rate,
    arguments_of,
    is_schedule_free,
    parse_arguments,
    picks_own_rate,
    row_of,
)

LR_SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant",
    "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "adafactor",
)  # fmt: skip
OWN_RATE = "AdaFactor with relative_step chooses its own rate"
# the schedules in which a setting counts
COUNTS_IN = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "lr_decay_steps": ("warmup_stable_decay",),
}


def steps_or_share(value: Any) -> int | float:
    """For `opt(parse=...)`: a whole number of updates, or as a float the share of them: 100, "100", 0.1 or "10%"."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) if not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if text.endswith("%"):
        if 0 <= number <= 100:
            return number / 100
    elif number.is_integer() and number >= 0:
        return int(number)
    elif 0 < number < 1:
        return number
    raise ValueError('is neither a number of updates (100) nor a share of them (0.1 or "10%")')


@dataclass(frozen=True)
class TrainingOptions:
    """The length of the run and how a step is computed."""

    max_train_steps: int = opt(1600, help="optimizer updates in all")
    max_train_epochs: int | None = opt(help="passes over the data; replaces --max_train_steps")
    seed: int | None = opt(help="every random draw follows from it; drawn and reported when not given")
    gradient_checkpointing: bool = opt(False, help="recompute activations in the backward pass: less memory, more time")
    gradient_accumulation_steps: int = opt(1, help="batches per optimizer update")
    mixed_precision: str = opt(
        "no", choices=["no", "fp16", "bf16"], help="dtype of the frozen model and of activations"
    )
    max_nonfinite_steps: int = opt(10, help="stop after this many updates in a row without a finite loss")
    plan: bool = opt(
        False, help="no training: print and write what would happen, with everything odd about the data, and end"
    )

    def __post_init__(self) -> None:
        require(
            self.max_train_steps >= 1, "--max_train_steps", f"{self.max_train_steps} trains nothing", "use 1 or more"
        )
        require(
            self.max_train_epochs is None or self.max_train_epochs >= 1,
            "--max_train_epochs",
            f"{self.max_train_epochs} trains nothing",
            "use 1 or more",
        )
        require(
            self.gradient_accumulation_steps >= 1,
            "--gradient_accumulation_steps",
            f"{self.gradient_accumulation_steps} is out of range",
            "use 1 or more",
        )
        require(
            self.max_nonfinite_steps >= 1,
            "--max_nonfinite_steps",
            f"{self.max_nonfinite_steps} is out of range",
            "use 1 or more",
        )
        require(
            self.seed is None or 0 <= self.seed < 2**63, "--seed", f"{self.seed} is out of range", "use 0 to 2^63 - 1"
        )


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer."""

    optimizer_type: str = opt("", help=f"AdamW without this option; one of {', '.join(NAMES)} or a class path")
    optimizer_args: tuple[str, ...] | None = opt(
        help="further arguments of the optimizer, as name=value (Python literals)"
    )
    learning_rate: float = opt(2.0e-6, help="learning rate of parts that have none of their own")
    max_grad_norm: float = opt(1.0, help="clip the global gradient norm to this; 0 switches clipping off")

    def __post_init__(self) -> None:
        require(self.learning_rate >= 0, "--learning_rate", f"{self.learning_rate} is negative")
        require(
            self.max_grad_norm >= 0,
            "--max_grad_norm",
            f"{self.max_grad_norm} is negative",
            "use 0 to switch clipping off",
        )
        parse_arguments(self.optimizer_args, "--optimizer_args")  # checks their form

    def notes(self) -> list[str]:
        """A sentence for each setting that another one makes useless."""
        if not self.picks_own_rate:
            return []
        given = parse_arguments(self.optimizer_args, "--optimizer_args")
        notes = []
        if not given.get("relative_step", True):
            notes.append("--optimizer_args relative_step=False has no effect: warmup_init=True needs relative_step")
        if self.learning_rate != OptimizerOptions.learning_rate:
            notes.append(f"--learning_rate has no effect: {OWN_RATE}")
        return notes

    @property
    def picks_own_rate(self) -> bool:
        """Whether it is Adafactor with relative steps, which has neither a rate nor a schedule from outside."""
        return picks_own_rate(self.optimizer_type, self.optimizer_args)

    @property
    def is_schedule_free(self) -> bool:
        """Whether it averages its weights in place of a schedule."""
        return is_schedule_free(self.optimizer_type)

    @property
    def has_no_schedule(self) -> bool:
        return self.picks_own_rate or self.is_schedule_free

    @property
    def adapts_rate(self) -> bool:
        """Whether it finds the size of its steps, so that the rate is a factor of about 1."""
        return adapts_rate(self.optimizer_type)


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning-rate schedule."""

    lr_scheduler: str = opt("constant", help=f"one of {', '.join(LR_SCHEDULERS)}")
    lr_scheduler_type: str = opt("", help="class path of another schedule; takes precedence over --lr_scheduler")
    lr_scheduler_args: tuple[str, ...] | None = opt(help="further arguments of the schedule, as name=value")
    lr_warmup_steps: int | float = opt(
        0, cli=str, parse=steps_or_share, help="updates over which the rate rises from 0; or a share: 0.1 or 10%"
    )
    lr_decay_steps: int | float | None = opt(
        cli=str,
        parse=steps_or_share,
        help="warmup_stable_decay: updates at the end over which the rate falls; or a share: 0.1 or 10%",
    )
    lr_scheduler_num_cycles: int = opt(
        1, help="restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay"
    )
    lr_scheduler_power: float = opt(1, help="power of polynomial")
    lr_scheduler_timescale: int | None = opt(
        help="inverse_sqrt: the rate goes with 1 / sqrt(step / this); the warm-up or 10000 without this option"
    )
    lr_scheduler_min_lr_ratio: float | None = opt(
        help="cosine_with_min_lr, warmup_stable_decay: the rate they end at, as a share of the first"
    )

    def __post_init__(self) -> None:
        cycles, timescale, ratio = (
            self.lr_scheduler_num_cycles,
            self.lr_scheduler_timescale,
            self.lr_scheduler_min_lr_ratio,
        )
        require(cycles >= 1, "--lr_scheduler_num_cycles", f"{cycles} is out of range", "use 1 or more")
        require(self.lr_scheduler_power >= 0, "--lr_scheduler_power", f"{self.lr_scheduler_power} is negative")
        require(
            timescale is None or timescale >= 1,
            "--lr_scheduler_timescale",
            f"{timescale} is out of range",
            "use 1 or more",
        )
        require(
            ratio is None or 0 <= ratio <= 1, "--lr_scheduler_min_lr_ratio", f"{ratio} is out of range", "use 0 to 1"
        )
        is_known = self.lr_scheduler in LR_SCHEDULERS or bool(self.lr_scheduler_type)
        require(is_known, "--lr_scheduler", not_one_of(self.lr_scheduler, LR_SCHEDULERS))
        given = named_values(self.lr_scheduler_args, "--lr_scheduler_args")
        has_end = ratio is not None or not {"min_lr", "min_lr_rate"}.isdisjoint(given)
        require(
            self.name != "cosine_with_min_lr" or has_end,
            "--lr_scheduler",
            "cosine_with_min_lr needs --lr_scheduler_min_lr_ratio",
            "0.1 is usual; for a rate of 0 at the end use cosine",
        )

    @property
    def name(self) -> str:
        """The schedule in force: a class path or one of LR_SCHEDULERS; constant with a warm-up is one of its own."""
        if self.lr_scheduler_type:
            return self.lr_scheduler_type
        return "constant_with_warmup" if self.lr_scheduler == "constant" and self.lr_warmup_steps else self.lr_scheduler

    def warmup_steps(self, num_steps: int) -> int:
        """The updates of the warm-up in a run of `num_steps`, which may be over before."""
        return _resolved(self.lr_warmup_steps, num_steps)

    def is_all_warmup(self, num_steps: int) -> bool:
        """Whether a run of `num_steps` is over before its warm-up."""
        warms_up = not self.lr_scheduler_type and self.name != "piecewise_constant"
        return warms_up and self.warmup_steps(num_steps) > num_steps

    def decay_steps(self, num_steps: int) -> int:
        """The updates of the decay in a run of `num_steps`; OptionError where it does not fit behind the warm-up."""
        decay = _resolved(self.lr_decay_steps or 0, num_steps)
        rest = max(0, num_steps - self.warmup_steps(num_steps))
        require(decay <= rest, "--lr_decay_steps", f"{decay} is longer than the {rest} steps after the warm-up")
        return decay

    @property
    def depends_on_length(self) -> bool:
        """Whether a longer run has other rates; not known of a class of its own, and then False."""
        if self.lr_scheduler_type:
            return False
        has_share = any(0 < (part or 0) < 1 for part in (self.lr_warmup_steps, self.lr_decay_steps))
        return has_share or self.name not in ("constant", "constant_with_warmup", "piecewise_constant", "inverse_sqrt")

    def check_length(self, num_steps: int) -> None:
        """Raise OptionError where the decay does not fit into a run of `num_steps`."""
        if not self.lr_scheduler_type:
            self.decay_steps(num_steps)

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        default = {field.name: field.default for field in fields(self)}
        given = [name for name in default if getattr(self, name) != default[name]]
        if self.lr_scheduler_type:
            mine = ("lr_scheduler_type", "lr_scheduler_args")
            return [f"--{name} has no effect beside --lr_scheduler_type" for name in given if name not in mine]
        notes = [
            f"--{name} has no effect: it counts in {' and '.join(COUNTS_IN[name])}"
            for name in given
            if self.name not in COUNTS_IN.get(name, (self.name,))
        ]
        if self.name == "piecewise_constant" and self.lr_warmup_steps:
            notes.append("--lr_warmup_steps has no effect: piecewise_constant has no warm-up")
        if self.name == "warmup_stable_decay" and not self.lr_decay_steps:
            notes.append("--lr_scheduler warmup_stable_decay: the rate never falls without --lr_decay_steps")
        return notes

    def notes_beside(self, optimizer: OptimizerOptions) -> list[str]:
        """Raise OptionError for a schedule that is another optimizer's; returns notes."""
        is_given = bool(self.lr_scheduler_type or self.lr_warmup_steps or self.lr_scheduler != "constant")
        if optimizer.picks_own_rate:
            is_given = is_given and (self.lr_scheduler != "adafactor" or bool(self.lr_scheduler_type))
            return [f"--lr_scheduler and --lr_warmup_steps have no effect: {OWN_RATE}"] if is_given else []
        require(
            self.name != "adafactor",
            "--lr_scheduler",
            "adafactor is AdaFactor's own, with --optimizer_args relative_step=True",
            "use constant_with_warmup or another schedule",
        )
        if optimizer.is_schedule_free:
            why = f"{optimizer.optimizer_type} has none; its own warm-up is --optimizer_args warmup_steps=100"
            return [f"--lr_scheduler and --lr_warmup_steps have no effect: {why}"] if is_given else []
        require(
            row_of(optimizer.optimizer_type) is not TABLE["dadaptsgd"] or not self.lr_warmup_steps,
            "--lr_warmup_steps",
            "DAdaptSGD can't begin with a rate of 0",
            "leave it out, the optimizer begins with tiny steps anyway",
        )
        if row_of(optimizer.optimizer_type) is TABLE["adafactor"]:
            return self._adafactor_advice(optimizer)
        return []

    def _adafactor_advice(self, optimizer: OptimizerOptions) -> list[str]:
        """What goes well with a rate from outside (Shazeer and Stern 2018; transformers' documentation)."""
        arguments = arguments_of(TABLE["adafactor"], optimizer.optimizer_args)
        advice = []
        if optimizer.max_grad_norm:
            advice.append("--max_grad_norm: AdaFactor clips by itself; 0 is usual beside it")
        if self.name != "constant_with_warmup":
            advice.append("--lr_scheduler: constant_with_warmup is usual beside AdaFactor with relative_step=False")
        if arguments.get("clip_threshold", 1.0) != 1.0:
            advice.append("--optimizer_args clip_threshold: 1.0 is usual")
        return advice


def _resolved(steps: int | float, num_steps: int) -> int:
    """Updates, from their number or, as a float, from their share of all."""
    return round(steps * num_steps) if isinstance(steps, float) else steps
