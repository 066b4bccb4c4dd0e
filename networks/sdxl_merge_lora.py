"""Merge networks: as merge_lora.py, which takes SDXL as well, under the name and with the flags that SDXL's users know.

See docs/models_and_loras.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.tools import Tool
from networks.merge_lora import REQUIRED, merge
from networks.weights.merge_options import MergeOptions

TOOL = Tool(__doc__, MergeOptions, merge, required=REQUIRED)

if __name__ == "__main__":
    sys.exit(TOOL.run())
