"""Options of the noise schedule."""

from __future__ import annotations

from dataclasses import dataclass

from library.diffusion.samplers import SIGMAS
from library.options import opt


@dataclass(frozen=True)
class ScheduleOptions:
    """The noise schedule."""

    zero_terminal_snr: bool = opt(
        False, help="schedule that begins with pure noise (Lin et al. 2023), for models trained so that don't say it"
    )
    sigmas: str = opt(
        "default",
        choices=list(SIGMAS),
        help="how the sampler's noise levels are spaced; ddim, pndm and euler_a know but the default",
    )
