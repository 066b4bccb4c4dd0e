"""How a program's process ends."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from library.checkpoints.safetensors_io import NonFiniteError
from library.cli.ending import Ending
from tests.runs import ENVIRONMENT, ROOT

PROGRAM = """
import atexit, sys
from library.cli.ending import leave
class Teardown:
    def __del__(self):
        print("teardown")
kept = Teardown()
atexit.register(print, "at exit")
print("done", end=" ")
leave(3)
"""


@pytest.mark.parametrize(("processes", "said"), [("1", "done at exit\nteardown\n"), ("2", "done at exit\n")])
def test_one_of_several_processes_leaves_without_teardown(processes, said):
    environment = {**ENVIRONMENT, "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/secret.pt"), 2,
         "/x/secret.pt can't be used (Permission denied); check its permissions, or choose another place"),
        (OSError(errno.ENOSPC, "No space left on device"), 2,
         "the disk can't be used (No space left on device); free some space or choose another place"),
        (OSError(errno.ELOOP, "Too many levels", "/x/loop"), 2, "/x/loop can't be used (Too many levels); check"),
        (NonFiniteError("a.pt: x holds NaN", "take another file"), 2, "a.pt: x holds NaN; take another file"),
        (OSError(errno.EBADF, "Bad file descriptor"), 1, "the details are in"),
    ],
)  # fmt: skip
def test_what_a_tool_cannot_do_with_its_files_is_one_sentence(error, code, said, capsys):
    with Ending("tool.py", is_tool=True) as ending:
        raise error
    told = capsys.readouterr().err
    assert ending.code == code and said in told and told.count("\n") == 1
    with Ending("train.py") as ending:
        raise error
    assert ending.code == 1, "a failure of a run, whose command line was right"
