"""The strengths that merging tools are given. Importing this brings no torch."""

from __future__ import annotations

from collections.abc import Sequence

from library.options import require
from library.wording import counted

LARGEST_RATIO = 1e4  # more than any merge has a use for; single precision has room for it


def check_ratios(ratios: Sequence[float], models: int, flag: str = "--ratios") -> None:
    """OptionError unless there is one for each model, and each is a number of a sensible size."""
    given = counted(len(ratios), "ratio")
    require(len(ratios) == models, flag, f"{given} for {counted(models, 'model')}", "give one for each, in their order")
    for ratio in ratios:
        require(abs(ratio) <= LARGEST_RATIO, flag, f"{ratio:g} is no strength", f"use numbers up to {LARGEST_RATIO:g}")
