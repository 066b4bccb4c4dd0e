"""Messages: on the screen, above progress bars, and with times in a run's log file."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from library.options import OptionError
from library.progress import shows_bars

CHATTY = (
    "accelerate", "diffusers", "transformers", "torch", "PIL", "urllib3", "filelock", "httpx", "httpx2",
    "huggingface_hub",
)  # fmt: skip


class _BarFriendlyHandler(logging.StreamHandler):
    """Writes lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if shows_bars():
            tqdm.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def is_main_process() -> bool:
    """Whether this is the process that speaks: launchers number their processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def start_console(level: str | None = None, file: str | None = None) -> None:
    """Messages of the main process on the screen, or at the end of `file`; other processes show only warnings.

    `level` is the least weighty kind shown (INFO by default); with DEBUG the libraries speak as well. Raises
    OptionError for a file that can't be written.

    Called before torch is loaded, it also shortens how long OpenMP's threads spin while they wait for each other: on an
    idle machine that costs nothing, on a busy one their default slows training down many times.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    lowest = logging.getLevelName(level or "INFO")
    console = _file_handler(file, "--console_log_file") if file and is_main_process() else _BarFriendlyHandler()
    console.setLevel(lowest if is_main_process() else max(lowest, logging.WARNING))
    _install(console, "console")
    logging.getLogger().setLevel(min(lowest, logging.INFO))  # a run's own log is complete whatever is shown
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.INFO if level == "DEBUG" else logging.WARNING)
    # on machines without a GPU it warns of a kernel for 4-bit weights, which nothing here has
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def start_log_file(path: Path) -> None:
    """The main process's messages also at the end of `path`."""
    if is_main_process():
        _install(_file_handler(path, "--output_dir"), "log file")


def _file_handler(path: Path | str, flag: str) -> logging.Handler:
    try:
        # names of files may be any bytes
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OptionError(flag, f"can't write to {path} ({error.strerror})", "choose another place") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _install(handler: logging.Handler, name: str) -> None:
    """Add a handler in place of an earlier one of the same name: a program may start more than one run."""
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if each.get_name() == name]:
        root.removeHandler(earlier)
        earlier.close()
    handler.set_name(name)
    root.addHandler(handler)
