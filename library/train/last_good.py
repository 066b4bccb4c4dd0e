"""The last state that is known to be good, kept in memory while a run may still go wrong.

Weights are known to be good once a later loss computed with them is finite. A copy of what is trained, with the
optimizer, is taken every few updates and confirmed by the next finite loss; when a run diverges, the confirmed copy is
what is saved. Whole models with their optimizers are too large for that: of them only states on the disk are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

COPY_EVERY = 50  # updates
LARGEST = 2 * 2**30  # bytes of trained weights, of which two copies with optimizer states are kept in memory


@dataclass(frozen=True)
class Copy:
    """State dicts by name, on the CPU, as they were after `step` updates."""

    step: int
    states: Mapping[str, Any]


class LastGood:
    """Keeps copies of the state dicts of `parts`: modules, optimizers, schedules."""

    def __init__(self, parts: Mapping[str, Any], start_step: int, *, keeps: bool = True) -> None:
        """Without `keeps` there are no copies, and `restore` is not to be called."""
        self.parts, self.start_step, self.keeps = parts if keeps else {}, start_step, keeps
        self.candidate = self.confirmed = self._copy(start_step)
        self.restored_step: int | None = None

    def note(self, step: int, *, is_finite: bool) -> None:
        """Hear whether the loss of update `step` was finite: if so, the weights before that update were good."""
        if is_finite and self.candidate.step < step:
            self.confirmed = self.candidate

    def consider(self, step: int) -> None:
        """Take a copy after update `step` when one is due: after 1, 2, 4, 8 ... updates, later after every COPY_EVERY.

        With the early ones a run that goes wrong soon does not lose everything.
        """
        if not self.keeps:
            return
        every = min(COPY_EVERY, max(1, self.candidate.step - self.start_step))
        if step - self.candidate.step >= every and self.confirmed is self.candidate:
            self.candidate = self._copy(step)

    def restore(self) -> int:
        """Put the confirmed copy back into the parts; returns its step."""
        assert self.keeps
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies that are still on their way
        for name, part in self.parts.items():
            part.load_state_dict(self.confirmed.states[name])
        self.restored_step = self.confirmed.step
        return self.confirmed.step

    def _copy(self, step: int) -> Copy:
        return Copy(step, {name: _on_cpu(part.state_dict()) for name, part in self.parts.items()})


def _on_cpu(value: Any) -> Any:
    """A copy of a state dict that shares nothing with it."""
    if isinstance(value, torch.Tensor):
        # into pinned memory, so that the host need not wait for the device, which copies before it changes the values
        copied = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return copied.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value
