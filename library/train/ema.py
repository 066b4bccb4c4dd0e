"""The exponential moving average of what is trained, and the weights that are shown and saved.

Its noise of single updates averaged out, the mean of the last weights usually draws better pictures than the last
weights themselves (Polyak and Juditsky 1992; for diffusion models Song and Ermon 2020, appendix D).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from library.train.callbacks import Callback
from library.train.rounding import HALF


class WeightAverage(Callback):
    """A float32 average of `parameters`, on their device, updated after every step.

    average <- d average + (1 - d) parameters, with d = min(decay, (1 + n) / (10 + n)) at update n (from 0), so that
    the weights of the start are soon forgotten.
    """

    state_name = "average"

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters: list[torch.Tensor] = list(parameters)
        self.decay = decay
        self.num_updates = 0
        self.averages = [parameter.detach().float().clone() for parameter in self.parameters]

    def after_step(self, step: int) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = [parameter.detach().float() for parameter in self.parameters]  # float32 already: nothing is copied
        torch._foreach_lerp_(self.averages, current, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average; afterwards they are what they were, bit for bit."""
        with kept(self.parameters):
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.averages)  # pyright: ignore[reportPrivateImportUsage]
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
        self.num_updates = int(state["num_updates"])


@contextlib.contextmanager
def kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Whatever happens to the values inside the block, they are put back afterwards; the copy is on the CPU."""
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextlib.contextmanager
def given_out_by(optimizer: Any, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside the block the parameters are those that a schedule-free optimizer gives out (Defazio et al. 2024).

    Such an optimizer trains at one point and gives out an average; `eval` and `train` go there and back, the way back
    only up to rounding. For any other optimizer nothing happens. `optimizer` is the one accelerate has wrapped.
    """
    if not gives_out_others(optimizer):
        yield
        return
    with kept(parameters):
        with _in_float32(parameters):
            optimizer.eval()
        try:
            yield
        finally:
            with _in_float32(parameters):
                optimizer.train()


def gives_out_others(optimizer: Any) -> bool:
    """Whether an optimizer, as accelerate has wrapped it, gives out other weights than those it trains."""
    return callable(getattr(optimizer.optimizer, "eval", None))


@contextlib.contextmanager
def _in_float32(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside the block half-precision parameters are float32, as the state of their optimizer is."""
    halves = [(parameter, parameter.data) for parameter in parameters if parameter.dtype in HALF]
    for parameter, data in halves:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in halves:
            data.copy_(parameter.data)
            parameter.data = data
