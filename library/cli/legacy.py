"""Old spellings of the trade and flags that need no effect here: known in this file and nowhere else.

A flag of the second kind is accepted because batch files carry it; one sentence says why nothing is to be done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from library.options import OptionError, opt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LegacyOptions:
    """Old spellings, and flags without effect."""

    caption_extention: str | None = opt(help="old spelling of --caption_extension")
    use_8bit_adam: bool = opt(False, help="old form of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = opt(False, help="old form of --optimizer_type Lion")
    tokenizer_cache_dir: str | None = opt(help="without effect: the CLIP vocabulary is part of this program")
    persistent_data_loader_workers: bool = opt(False, help="without effect: workers always live as long as the run")
    lowram: bool = opt(False, help="without effect: weights always go straight to their device")


WITHOUT_EFFECT = {
    "tokenizer_cache_dir": "the CLIP vocabulary is part of this program, nothing is downloaded",
    "persistent_data_loader_workers": "workers always live as long as the run",
    "lowram": "weights are always read straight to their device, one copy at a time",
}
OPTIMIZER_SWITCHES = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Values by option name with old spellings in today's form; raises OptionError where both contradict."""
    values = dict(values)
    if values.get("caption_extention"):
        values["caption_extension"] = values["caption_extention"]
    chosen = [name for name in OPTIMIZER_SWITCHES if values.get(name)]
    if len(chosen) + bool(values.get("optimizer_type")) > 1:
        given = [f"--{name}" for name in chosen] + ["--optimizer_type"] * bool(values.get("optimizer_type"))
        raise OptionError(" and ".join(given), "name one optimizer")
    for name in chosen:
        values["optimizer_type"] = OPTIMIZER_SWITCHES[name]
    return values


def notes(values: dict[str, Any]) -> list[str]:
    """A sentence for each flag given that has no effect."""
    return [f"--{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if values.get(name)]
