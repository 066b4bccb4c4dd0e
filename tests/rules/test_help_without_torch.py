"""The command line answers before anything heavy is loaded: in a real process, what `--help` and a typo import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.rules.import_rules import HEAVY
from tests.rules.source_files import ROOT, repository_sources

TOOLS = tuple(
    file.path
    for file in repository_sources()
    if file.path.startswith(("tools/", "finetune/", "networks/")) and '__name__ == "__main__"' in file.text
)
SCRIPTS = [*(file.path for file in repository_sources() if file.is_entry_script), *TOOLS]
RUN_AND_REPORT = """
import runpy, sys
script, heavy = sys.argv[1], sys.argv[2].split(",")
sys.argv = [script, *sys.argv[3:]]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    code = end.code
print("exit", code, "loaded", [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--no_such_flag", "1"], 2)], ids=["help", "typo"])
def test_answers_without_loading_torch(script, arguments, code):
    command = [sys.executable, "-c", RUN_AND_REPORT, script, ",".join(HEAVY), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"exit {code} loaded []"


def test_there_are_scripts_to_look_at():
    assert "train_network.py" in SCRIPTS
    assert "gen_img_diffusers.py" in SCRIPTS
