"""Options of a run's course: where it starts, how it is measured on the way, when it ends early, what is averaged."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require


@dataclass(frozen=True)
class StartOptions:
    """Where the run starts, when its state is lost and only a trained file is left."""

    initial_step: int | None = opt(help="optimizer updates already done: data order and schedule go on there")
    initial_epoch: int | None = opt(help="the epoch (from 1) to start with; --initial_step wins over it")
    skip_until_initial_step: bool = opt(False, help="without effect: earlier steps are always left out")

    def __post_init__(self) -> None:
        step, epoch = self.initial_step, self.initial_epoch
        require(step is None or step >= 0, "--initial_step", f"{step} is out of range", "use 0 or more")
        require(epoch is None or epoch >= 1, "--initial_epoch", f"{epoch} is out of range", "epochs count from 1")

    @property
    def skipping(self) -> list[str]:
        """Names of the options given that would leave steps out."""
        return [
            name for name, start in (("initial_step", 0), ("initial_epoch", 1)) if (getattr(self, name) or 0) > start
        ]

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect."""
        notes = []
        if self.initial_step is not None and self.initial_epoch is not None:
            notes.append("--initial_epoch has no effect beside --initial_step")
        if self.skip_until_initial_step:
            given = self.initial_step is not None or self.initial_epoch is not None
            why = "the steps before are left out without it" if given else "no --initial_step or --initial_epoch"
            notes.append(f"--skip_until_initial_step has no effect: {why}")
        return notes


@dataclass(frozen=True)
class ValidationOptions:
    """When the images held out by --validation_split are measured, and what follows from it."""

    validate_every_n_steps: int | None = opt(help="measure after every n-th optimizer update")
    validate_every_n_epochs: int | None = opt(
        help="measure after every n-th epoch; every epoch when neither this nor --validate_every_n_steps is given"
    )
    max_validation_steps: int | None = opt(help="measure at most this many batches each time, always the same ones")
    save_best: bool = opt(False, help="keep the weights of the lowest validation loss in <output_name>-best")
    early_stop_patience: int | None = opt(help="end the run after this many measurements without a new lowest loss")

    def __post_init__(self) -> None:
        for name in (
            "validate_every_n_steps",
            "validate_every_n_epochs",
            "max_validation_steps",
            "early_stop_patience",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", f"{value} is out of range", "use 1 or more")

    @property
    def every_n_epochs(self) -> int | None:
        """After how many epochs to measure; None when only steps count."""
        if self.validate_every_n_epochs is None and self.validate_every_n_steps is None:
            return 1
        return self.validate_every_n_epochs

    def check_split(self, *, is_split: bool) -> list[str]:
        """What can't be or does nothing unless images are held out: OptionError, or a sentence for each."""
        if is_split:
            without_best = self.early_stop_patience is not None and not self.save_best
            return ["--early_stop_patience: the final file is not the best one; add --save_best"] * without_best
        way_out = "hold images out with --validation_split, for example 0.1"
        require(not self.save_best, "--save_best", "needs a validation loss", way_out)
        patience = self.early_stop_patience
        require(patience is None, "--early_stop_patience", "needs a validation loss", way_out)
        names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
        return [f"--{name} has no effect without --validation_split" for name in names if getattr(self, name)]


@dataclass(frozen=True)
class AverageOptions:
    """The exponential moving average of what is trained."""

    ema_decay: float | None = opt(
        help="keep a moving average of the weights with this decay (0-1; 0.999 is usual) and save it as <file>-ema"
    )

    def __post_init__(self) -> None:
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "--ema_decay", f"{decay} is out of range", "use 0.999, for example")
