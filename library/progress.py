"""Progress bars on a terminal; where the screen is a file or a pipe, a line now and then for the outermost one."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

FORCED = "PROGRESS_BARS"  # environment variable: 1 where standard error only leads to a terminal
SECONDS_BETWEEN_LINES = 60.0
LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"
ENDLESS_LINE = "{desc}: {n_fmt} in {elapsed}, {rate_fmt}{postfix}"  # of a number that nobody knows


def progress_bar(*, is_inner: bool = False, disable: bool = False, **settings: Any) -> tqdm:
    """A bar of tqdm with its `settings`; one that `is_inner` is drawn below another and vanishes at its end."""
    line = LINE if settings.get("total") is not None else ENDLESS_LINE
    if shows_bars():
        return tqdm(**{"leave": not is_inner, **settings}, disable=disable)
    calm = {"mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES, "bar_format": line}
    return _Lines(**settings | calm, disable=disable or is_inner or settings.get("leave") is False)


def shows_bars() -> bool:
    """Whether a line on the screen can be overwritten; a program that passes the text on to a terminal says so."""
    return os.environ.get(FORCED) == "1" or (sys.stderr is not None and sys.stderr.isatty())


class _Lines(tqdm):
    """Says how far it is in whole lines, which nothing overwrites."""

    _told: int | float = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n not in (self._told, self.initial):
            self._told = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing is on the screen that could be in the way."""

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True
            registry: Any = type(self)
            registry._decr_instances(self)
