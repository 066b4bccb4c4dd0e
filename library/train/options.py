"""Options of the training run itself: its length, how a step is computed, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import not_one_of, opt, require

LR_SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant",
)  # fmt: skip


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

    optimizer_type: str = opt(
        "", help="AdamW (default), AdamW8bit, Lion8bit, SGDNesterov, AdaFactor ... or a class path"
    )
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


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning-rate schedule."""

    lr_scheduler: str = opt(
        "constant",
        help="linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, piecewise_constant",
    )
    lr_scheduler_type: str = opt("", help="class path of another schedule; takes precedence over --lr_scheduler")
    lr_scheduler_args: tuple[str, ...] | None = opt(help="further arguments of the schedule, as name=value")
    lr_warmup_steps: int = opt(0, help="optimizer updates over which the rate rises from 0")
    lr_scheduler_num_cycles: int = opt(1, help="restarts of cosine_with_restarts")
    lr_scheduler_power: float = opt(1, help="power of polynomial")

    def __post_init__(self) -> None:
        require(self.lr_warmup_steps >= 0, "--lr_warmup_steps", f"{self.lr_warmup_steps} is negative")
        cycles = self.lr_scheduler_num_cycles
        require(cycles >= 1, "--lr_scheduler_num_cycles", f"{cycles} is out of range", "use 1 or more")
        is_known = self.lr_scheduler in LR_SCHEDULERS or bool(self.lr_scheduler_type)
        require(is_known, "--lr_scheduler", not_one_of(self.lr_scheduler, LR_SCHEDULERS))

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        if self.lr_scheduler_type and (self.lr_scheduler != "constant" or self.lr_warmup_steps):
            return ["--lr_scheduler and --lr_warmup_steps have no effect beside --lr_scheduler_type"]
        return []
