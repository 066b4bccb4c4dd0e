"""Merge networks: an older form of merge_lora.py, which replaces it. See docs/models_and_loras.md."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.tools import Tool
from library.options import OptionError
from networks.merge_lora import REQUIRED, merge
from networks.weights.merge_options import OldMergeOptions
from networks.weights.network_file import NetworkFile

logger = logging.getLogger(__name__)

WAY_OUT = "use networks/merge_lora.py, which says what it makes of that"


def merge_as_before(options: OldMergeOptions) -> None:
    """Raises OptionError where the older tool and merge_lora.py would write different files."""
    logger.warning("merge_lora_old.py is superseded: merge_lora.py takes the same flags and does this work")
    if options.sd_model is None:
        _check_agreement(options)
    merge(options.current())


def _check_agreement(options: OldMergeOptions) -> None:
    """The older formula knows no alphas, and loses the sign of a ratio."""
    if any(ratio < 0 for ratio in options.ratios):
        raise OptionError("--ratios", f"{min(options.ratios):g} is negative", WAY_OUT)
    alphas: dict[str, float] = {}
    for path in options.models:
        with NetworkFile(Path(path).expanduser(), "--models") as file:
            for name in file.pairs:
                alpha = file.rank(name) * file.scale(name)
                if alphas.setdefault(name, alpha) != alpha:
                    raise OptionError("--models", f"{path} has another alpha ({alpha:g}) of {name}", WAY_OUT)


TOOL = Tool(__doc__, OldMergeOptions, merge_as_before, required=REQUIRED)

if __name__ == "__main__":
    sys.exit(TOOL.run())
