"""Updates of half-precision parameters: computed in float32, rounded so that small steps are not lost.

A bfloat16 number has 8 significant bits. A step below 1/512 of a weight vanishes when the sum is rounded to the
nearest such number, and with usual learning rates most steps are below that. Rounded up or down at random, with the
probability of the nearer side, the sum is right on average and steps add up (Gupta et al. 2015, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from library.randomness import seed_for

HALF = (torch.float16, torch.bfloat16)


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 `values` as bfloat16: up with the probability of the part that is cut off, else down.

    The expectation is the value itself; what bfloat16 holds exactly stays as it is, and so does what is not finite.
    """
    return round_with(values, rounding_noise(values.numel(), generator).view(values.shape))


def rounding_noise(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random numbers of 16 bits, as int32, on the generator's device."""
    return torch.randint(0, 1 << 16, (count,), dtype=torch.int32, device=generator.device, generator=generator)


def round_with(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 `values` as bfloat16, rounded by noise of :func:`rounding_noise`, which is used up."""
    # the upper 16 bits of a float32 are a bfloat16; noise in the lower ones carries over with the right probability
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


@dataclass(frozen=True)
class Rows:
    """The place of a parameter that is a run of a larger one's numbers: of `whole`, those from `start` on."""

    whole: int
    start: int


@dataclass(frozen=True)
class _Narrow:
    """A parameter's half-precision storage and gradient while it is wide."""

    parameter: torch.nn.Parameter
    data: torch.Tensor
    grad: torch.Tensor | None


class WideUpdates:
    """Makes half-precision parameters float32 while an optimizer works on them, whichever optimizer it is.

    Its state is float32 then too. bfloat16 parameters are rounded at random afterwards, with noise that depends on
    nothing but the seed, the step and the parameter; float16 ones, which have 11 bits, to the nearest number.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._places = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._seed = 0
        self._step: Callable[[], int] = lambda: 0
        self._narrow: list[_Narrow] = []
        self._rows: Mapping[int, Rows] = {}

    def draw_for(self, rows: Mapping[int, Rows]) -> None:
        """Say by `id` which parameters are parts of larger ones: each number has the noise it would have in these."""
        self._rows = rows

    def draw_with(self, seed: int, step: Callable[[], int]) -> None:
        """Let the noise follow from the run's seed and the number of updates done, the same on all processes."""
        self._seed, self._step = seed, step

    @torch.no_grad()
    def widen(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give those of half precision float32 storage, all in one buffer, and float32 gradients."""
        halves = [parameter for parameter in parameters if parameter.dtype in HALF]
        if not halves:
            return
        assert not self._narrow, "some parameters are wide already"
        self._narrow = [_Narrow(parameter, parameter.data, parameter.grad) for parameter in halves]
        sizes = [parameter.numel() for parameter in halves]
        wide = torch.empty(sum(sizes), dtype=torch.float32, device=halves[0].device).split(sizes)
        views = [part.view(parameter.shape) for part, parameter in zip(wide, halves, strict=True)]
        torch._foreach_copy_(views, [narrow.data for narrow in self._narrow])  # pyright: ignore
        for view, narrow in zip(views, self._narrow, strict=True):
            parameter = narrow.parameter
            parameter.grad = None  # a gradient must have its parameter's dtype
            parameter.data = view
            parameter.grad = None if narrow.grad is None else narrow.grad.float()

    @torch.no_grad()
    def narrow(self) -> None:
        """Round the parameters back into their own storage; their gradients are the half-precision ones again."""
        narrowed, self._narrow = self._narrow, []
        if not narrowed:
            return
        wide = [narrow.parameter.data for narrow in narrowed]
        if narrowed[0].data.dtype is torch.bfloat16:
            first = self._places[id(narrowed[0].parameter)]
            generator = torch.Generator(wide[0].device)
            generator.manual_seed(seed_for(self._seed, "rounding", self._step(), first))
            flat = torch.cat([values.flatten() for values in wide])
            wide = round_with(flat, self._noise(narrowed, generator)).split([values.numel() for values in wide])
        for values, narrow in zip(wide, narrowed, strict=True):
            narrow.data.copy_(values.view(narrow.data.shape))
            narrow.parameter.grad = None
            narrow.parameter.data = narrow.data
            narrow.parameter.grad = narrow.grad

    def _noise(self, narrowed: Sequence[_Narrow], generator: torch.Generator) -> torch.Tensor:
        """Noise for all numbers of these parameters, in a row."""
        places = [self._rows.get(id(narrow.parameter), Rows(narrow.parameter.numel(), 0)) for narrow in narrowed]
        whole = rounding_noise(sum(rows.whole for rows in places), generator).split([rows.whole for rows in places])
        sizes = [narrow.parameter.numel() for narrow in narrowed]
        return torch.cat(
            [noise[rows.start : rows.start + size] for noise, rows, size in zip(whole, places, sizes, strict=True)]
        )
