"""Options of how prompts are weighed: against the negative prompt, and their words against each other."""

from __future__ import annotations

from dataclasses import dataclass

from library.generate.options import check_factor
from library.options import opt

NO_SCALE = "none"  # in a prompt's line: no negative scale for this one
NEGATIVE_SCALE = "Negative scale"  # its name in the text of pictures
EMPHASIS = "Emphasis"  # the name of what emphasis keeps there, and what web user interfaces call that
EMPHASIS_NAMES = {"original": "Original", "none": "No norm", "abs": "Abs"}


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

    def __post_init__(self) -> None:
        check_factor("--negative_scale", self.negative_scale, "1")
