"""Progress bars of the training data: one look, and only on the process that speaks."""

from __future__ import annotations

import os

from tqdm import tqdm

from library.progress import progress_bar

SHOWN_AFTER = 2.0  # seconds: shorter work needs no bar


def progress(what: str, total: int | None, *, stays: bool = False, unit: str = "image") -> tqdm:
    """A bar over `total` images, or other units, None where nobody knows; one that `stays` is shown at once and left on
    the screen, unless there are none.

    Launchers number their processes in RANK; without one there is only this process.
    """
    silent = os.environ.get("RANK", "0") != "0" or (stays and total == 0)
    settings = {"total": total, "desc": what, "unit": unit, "delay": 0 if stays else SHOWN_AFTER}
    return progress_bar(**settings, is_inner=not stays, disable=silent)
