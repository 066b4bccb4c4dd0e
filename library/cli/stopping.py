"""How work that can go on later is stopped: by Ctrl-C or SIGTERM, with what is under way written to its end."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from library.cli.ending import Ending

logger = logging.getLogger(__name__)

TERMINATED = 143  # exit code, 128 + SIGTERM


class _Terminated(KeyboardInterrupt):
    """SIGTERM has arrived."""


@contextmanager
def stoppable(ending: Ending) -> Iterator[None]:
    """Inside the block SIGTERM stops as Ctrl-C does, with its own exit code, and either leaves a word on what stays."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        logger.warning("stopped: what has been cached stays, and the same command goes on from there")
        if not isinstance(error, _Terminated):
            raise
        ending.code = TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
