"""How a program ends: every mistake as one sentence on the screen, with the details in a log file."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from library.options import OptionError

ODD_LETTERS = "backslashreplace"  # for names of files that are not UTF-8
USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes


def leave(code: int) -> NoReturn:
    """End the program with an exit code.

    One of several processes ends at once, without taking apart the group of processes and the interpreter: now and then
    a thread of torch's communication (gloo) aborts that, long after everything is written.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":  # set by launchers
        sys.exit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


WAYS_OUT = {  # of errors of the system that tell of the files and disks a tool was given
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose another place",
    errno.ELOOP: "check the links in its path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check the path",
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "choose a place on another disk",
    errno.EIO: "check the disk, or choose another place",
}


def _mistake(error: OSError) -> OptionError | None:
    """The sentence of an error that tells of files, if it does."""
    if error.errno not in WAYS_OUT or not (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)):
        return None
    reason = error.strerror or str(error)
    problem = f"{error.filename} can't be used ({reason})" if error.filename else f"the disk can't be used ({reason})"
    mistake = OptionError("", problem, WAYS_OUT[error.errno])
    mistake.__cause__ = error  # for the log file
    return mistake


class Ending:
    """A context around a program's work that turns exceptions into a sentence and an exit code.

    `renamed` replaces option names in messages, for code that knows an option under another script's name. What a tool
    (`is_tool`) can't do with the files it was given is a mistake in what it was given: files that can't be read or
    written, a full disk, numbers that are not finite.
    """

    def __init__(self, program: str, renamed: dict[str, str] | None = None, *, is_tool: bool = False) -> None:
        self.program = program
        self.renamed = renamed or {}
        self.is_tool = is_tool
        self.log_file: Path | None = None  # set once there is a folder for it
        self.code = 0

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or isinstance(error, SystemExit):
            return False
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            error = OptionError("", f"{str(error.filename)[:60]}... is too long for a path", "check the paths")
        if self.is_tool and isinstance(error, OSError):
            error = _mistake(error) or error
        if isinstance(error, OptionError):
            self.code = getattr(error, "exit_code", USER_MISTAKE)
            if self.is_tool:
                self.code = getattr(error, "tool_exit_code", self.code)
            self._say(str(error))
            cause = error.__cause__
            self._log(f"{error}\n{''.join(traceback.format_exception(cause))}" if cause else str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.code = INTERRUPTED
            self._say("interrupted")
        elif isinstance(error, Exception):
            self.code = FAILURE
            path = self._log("".join(traceback.format_exception(error)), anywhere=True)
            first_line = (str(error).strip().splitlines() or [""])[0]
            details = f"the details are in {path}" if path else "the details could not be written"
            self._say(f"{type(error).__name__}: {first_line}; {details}")
        else:
            return False
        return True

    def _say(self, sentence: str) -> None:
        for name, new in self.renamed.items():
            sentence = sentence.replace(name, new)
        sys.stderr.write(f"{self.program}: {sentence}\n")

    def _log(self, text: str, *, anywhere: bool = False) -> Path | None:
        """Append to the log file; `anywhere`: to a temporary file where there is none or it can't be written."""
        name = f"{Path(self.program).stem}_{time.strftime('%Y%m%d%H%M%S')}.log"
        elsewhere = [Path(tempfile.gettempdir()) / name] if anywhere else []
        for path in [*([self.log_file] if self.log_file else []), *elsewhere]:
            with (
                contextlib.suppress(OSError, ValueError),
                open(path, "a", encoding="utf-8", errors=ODD_LETTERS) as file,
            ):
                file.write(f"{self.program}, Python {platform.python_version()}, {platform.platform()}\n{text}\n")
                return path
        return None
