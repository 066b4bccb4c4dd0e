"""How a program's process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
