"""Options of the noise schedule."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt


@dataclass(frozen=True)
class ScheduleOptions:
    """The noise schedule."""

    zero_terminal_snr: bool = opt(
        False, help="schedule that begins with pure noise (Lin et al. 2023), for models trained so that don't say it"
    )
