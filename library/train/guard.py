"""Guards of the work: a non-finite update is never applied, and a request to stop is heard at the end of a step."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from library.options import OptionError

logger = logging.getLogger(__name__)


def apply_if_finite(optimizer: AcceleratedOptimizer, is_finite: torch.Tensor) -> None:
    """Step the optimizer unless `is_finite` (a 0-dim bool tensor on the device) is False.

    Torch's fused optimizers take the decision on the device, so that the host need not wait; a gradient scaler takes
    it by itself; for the others one flag is read back.
    """
    if optimizer.scaler is not None:
        optimizer.step()
    elif getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
        with decided_on_device(optimizer.optimizer, is_finite):
            optimizer.step()
    elif bool(is_finite):
        optimizer.step()


@contextlib.contextmanager
def decided_on_device(optimizer: Any, is_finite: torch.Tensor) -> Iterator[None]:
    """Inside the block a fused optimizer's step changes nothing where `is_finite` is False."""
    optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


class NonFiniteGuard:
    """Counts updates that were skipped, names their images, and says when a run can't recover."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def note(self, step: int, is_finite: bool, image_names: tuple[str, ...]) -> None:
        if is_finite:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        shown = ", ".join(image_names[:8]) + (" ..." if len(image_names) > 8 else "")
        logger.warning("step %d: loss or gradient is not finite, the update was skipped; images: %s", step, shown)

    @property
    def is_healthy(self) -> bool:
        """Whether the last update that is known of had a finite loss."""
        return self.in_a_row == 0

    @property
    def gives_up(self) -> bool:
        return self.in_a_row >= self.limit


REASONS = (
    "the usual reasons are a learning rate or alpha that is too high (lower --learning_rate), fp16, or a damaged model"
)


class TrainingDiverged(OptionError):
    """Too many updates in a row without a finite loss; `step` is that of the state `saved`, if there is one."""

    exit_code = 1

    def __init__(self, count: int, saved: object | None, step: int) -> None:
        learned = "" if step else " (nothing was learned by then)"
        state = "no state was saved before" if saved is None else f"the last good state is {saved}{learned}"
        super().__init__("", f"stopped after {count} updates in a row without a finite loss; {state}", REASONS)


class Stopped(Exception):
    """Something beside training is broken off, because the run was asked to stop."""


class StopRequest:
    """Set by SIGINT or SIGTERM (Ctrl-C, a batch system's warning); the loop asks after each step.

    A second signal ends the program at once.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def check(self) -> None:
        """Raise Stopped once the signal came."""
        if self:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal_number or 0)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block; the handlers before it come back afterwards."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self.signal_number = number
        logger.warning("stopping: this step is finished, then model and state are saved (once more to stop at once)")
