"""Options of how prompts are weighed: against the negative prompt, and their words against each other."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt

NO_SCALE = "none"  # in a prompt's line: no negative scale for this one


@dataclass(frozen=True)
class GuidanceOptions:
    """How prompts are weighed."""

    negative_scale: float | None = opt(
        help="weigh the negative prompt on its own: both prompts are then measured against an empty one; half as long "
        "again per picture"
    )
    emb_normalize_mode: str = opt(
        "original",
        choices=["original", "none", "abs"],
        help="what the text states keep when words have weights: original: their mean, abs: the mean of their absolute "
        "values, none: nothing",
    )
