"""What a cache says of itself when it begins, the same for latents and text."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def report_counts(what: str, total: int, new: int, stale: Mapping[str, int]) -> None:
    """Say how many of `total` files are used as they are, are missing, and must be made anew, with the reasons."""
    num_stale = sum(stale.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(stale.items()))
    rebuilt = f", {num_stale} to be rebuilt ({reasons})" if stale else ""
    logger.info("%s: %d of %d cached before, %d new%s", what, total - new - num_stale, total, new, rebuilt)
