"""Messages: on the screen, above progress bars, and with times in a run's log file."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

CHATTY = ("accelerate", "diffusers", "transformers", "torch", "PIL", "urllib3", "filelock")


class _BarFriendlyHandler(logging.StreamHandler):
    """Writes lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def is_main_process() -> bool:
    """Whether this is the process that speaks: launchers number their processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def start_console() -> None:
    """Messages of the main process on the screen; other processes show only warnings.

    Called before torch is loaded, it also shortens how long OpenMP's threads spin while they wait for each other: on an
    idle machine that costs nothing, on a busy one their default slows training down many times.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    console = _BarFriendlyHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    _install(console, "console")
    logging.getLogger().setLevel(logging.INFO)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def start_log_file(path: Path) -> None:
    """The main process's messages also at the end of `path`."""
    if is_main_process():
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _install(file, "log file")


def _install(handler: logging.Handler, name: str) -> None:
    """Add a handler in place of an earlier one of the same name: a program may start more than one run."""
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if each.get_name() == name]:
        root.removeHandler(earlier)
        earlier.close()
    handler.set_name(name)
    root.addHandler(handler)
