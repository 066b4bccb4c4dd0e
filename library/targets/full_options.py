"""Options of training a model's own weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.options import opt, require

NUM_BLOCKS = 23  # of SDXL's U-Net: time and size embedding, 9 input blocks, 3 in the middle, 9 output blocks, the end


@dataclass(frozen=True)
class FullOptions(ABC):
    """Training of the model's own weights."""

    usual_rate = ""  # 2e-6, the default, is usual
    without_text = "leave out --train_text_encoder"  # how to leave the text encoders untrained

    @property
    def trains_text(self) -> bool:
        """Whether text encoders are trained at any time of the run."""
        return self.text_updates > 0

    @property
    @abstractmethod
    def text_updates(self) -> float:
        """How many updates, from the first one, train the text encoders."""

    @abstractmethod
    def text_rates(self, num_encoders: int) -> Sequence[float | None]:
        """The learning rate of each text encoder; None for that of the U-Net, 0 for one that is not trained."""

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """The learning rates of the U-Net's blocks, if they have their own."""
        return None

    def check_before_start(self) -> None:  # noqa: B027 (nothing beside the model is read)
        """What files the options name can be read."""


@dataclass(frozen=True)
class FineTuneOptions(FullOptions):
    """Training of the model's own weights."""

    train_text_encoder: bool = opt(False, help="train the text encoder too")
    learning_rate_te: float | None = opt(help="learning rate of the text encoder; --learning_rate without this option")

    def __post_init__(self) -> None:
        check_rates(self, "learning_rate_te")

    @property
    def text_updates(self) -> float:
        return math.inf if self.train_text_encoder and self.learning_rate_te != 0 else 0

    def text_rates(self, num_encoders: int) -> Sequence[float | None]:
        return [self.learning_rate_te if self.trains_text else 0.0] * num_encoders

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        is_idle = self.learning_rate_te is not None and not self.train_text_encoder
        return ["--learning_rate_te has no effect without --train_text_encoder"] if is_idle else []


@dataclass(frozen=True)
class DreamBoothOptions(FullOptions):
    """Training of the model's own weights."""

    stop_text_encoder_training: int | None = opt(
        help="train the text encoder for this many updates; to the end without this option, never with -1"
    )
    learning_rate_te: float | None = opt(help="learning rate of the text encoder; --learning_rate without this option")

    def __post_init__(self) -> None:
        check_rates(self, "learning_rate_te")
        stop = self.stop_text_encoder_training
        way_out = "give a number of updates, or -1 to leave the text encoder as it is"
        require(stop is None or stop >= -1, "--stop_text_encoder_training", f"{stop} is out of range", way_out)

    @property
    def text_updates(self) -> float:
        stop = self.stop_text_encoder_training
        if self.learning_rate_te == 0:
            return 0
        return math.inf if stop is None else max(0, stop)

    def text_rates(self, num_encoders: int) -> Sequence[float | None]:
        return [self.learning_rate_te if self.trains_text else 0.0] * num_encoders

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        if self.learning_rate_te and not self.trains_text:
            return [f"--learning_rate_te has no effect beside {self._stop}"]
        return []

    @property
    def _stop(self) -> str:
        return f"--stop_text_encoder_training {self.stop_text_encoder_training}"


def parse_block_rates(value: Any) -> tuple[float, ...]:
    """For `opt(parse=...)`: 23 numbers with commas between them, or a list of them."""
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        rates = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"is not {NUM_BLOCKS} numbers with commas between them") from None
    if len(rates) != NUM_BLOCKS:
        raise ValueError(f"has {len(rates)} numbers, and an SDXL U-Net has {NUM_BLOCKS} blocks")
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError("holds a number that is no learning rate")
    return rates


@dataclass(frozen=True)
class SdxlFullOptions(FullOptions):
    """Training of the model's own weights."""

    train_text_encoder: bool = opt(False, help="train both text encoders too")
    learning_rate_te1: float | None = opt(
        help="learning rate of the first text encoder, 0 leaves it out; --learning_rate without this option"
    )
    learning_rate_te2: float | None = opt(
        help="learning rate of the second text encoder, 0 leaves it out; --learning_rate without this option"
    )
    block_lr: tuple[float, ...] | None = opt(
        cli=str,
        parse=parse_block_rates,
        help="23 learning rates with commas between them, 0 leaves a block out: time and size embedding, 9 input "
        "blocks, 3 in the middle, 9 output blocks, the end",
    )

    def __post_init__(self) -> None:
        check_rates(self, "learning_rate_te1", "learning_rate_te2")
        is_nothing = self.block_lr is not None and not any(self.block_lr) and not self.trains_text
        require(not is_nothing, "--block_lr", "holds only zeros, and nothing else is trained", "train some block")

    @property
    def text_updates(self) -> float:
        return math.inf if self.train_text_encoder and any(rate != 0 for rate in self._rates) else 0

    @property
    def _rates(self) -> tuple[float | None, float | None]:
        return self.learning_rate_te1, self.learning_rate_te2

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        return self.block_lr

    def text_rates(self, num_encoders: int) -> Sequence[float | None]:
        return self._rates if self.train_text_encoder else (0.0,) * num_encoders

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        given = [f"--learning_rate_te{number}" for number, rate in enumerate(self._rates, 1) if rate is not None]
        if given and not self.train_text_encoder:
            return [f"{' and '.join(given)} without effect: there is no --train_text_encoder"]
        return []


def check_rates(options: Any, *names: str) -> None:
    """Raise OptionError for a learning rate below 0."""
    for name in names:
        value = getattr(options, name)
        require(value is None or value >= 0, f"--{name}", f"{value} is negative")
