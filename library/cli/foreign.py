"""What belongs to other programs: flags of the trade's other scripts, and the ways of a GUI that writes our files.

foreign_flags.json lists, by script, the flags that not every training script has; "other model families" are those
this program has no model for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from library.options import Option

OTHER_FAMILIES = "other model families"
TRAINS = re.compile(r"(sdxl_)?train_|sdxl_train|fine_tune|other model families")  # what shares configuration files
# keys that the kohya_ss GUI adds to its files for itself: no script has them as flags
GUI_KEYS = {
    "epoch": "the length of the run is max_train_steps or max_train_epochs",
    "noise_offset_type": "noise_offset and multires_noise_iterations say it",
}
GUI_NOTHING = {"dynamo_backend": "no"}  # values by which the GUI says that an option is off
RATES = "text_encoder_lr"  # a list in later versions of the trade's scripts: one for each text encoder
MOST_SCRIPTS_NAMED = 3
ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def _scripts_of() -> Mapping[str, tuple[str, ...]]:
    """Flag name (without dashes) -> the scripts that have it."""
    found: dict[str, list[str]] = {}
    for script, names in json.loads(Path(__file__).with_name("foreign_flags.json").read_text(encoding="utf-8")).items():
        for name in names:
            found.setdefault(name, []).append(script)
    return {name: tuple(scripts) for name, scripts in found.items()}


def why_not_here(flag: str) -> str | None:
    """For a flag typed on a command line: whose it is, and the way out; None for a flag that nobody has."""
    scripts = _scripts_of().get(flag.lstrip("-"))
    if scripts is None:
        return None
    return f"{flag}: is a flag of {_names(scripts)}, not of this script; remove it"


def note_on_key(name: str, models: str = "sd") -> str | None:
    """Why a key of a configuration file has no effect on a script for these models; None for one that is unknown."""
    if name in GUI_KEYS:
        return f"{name} has no effect: it is a note of the GUI, {GUI_KEYS[name]}"
    scripts = [script for script in _scripts_of().get(name, ()) if TRAINS.match(script)]
    if not scripts:
        return None
    is_for_others = models == "sd" and all(script.startswith("sdxl_") or script == OTHER_FAMILIES for script in scripts)
    return f"{name} has no effect{' for SD1/SD2' if is_for_others else ''}: it belongs to {_names(scripts)}"


def as_meant(option: Option, value: Any) -> tuple[Any, str]:
    """(a file's value as the command line would have it, what to say of it); None stands for "not given".

    A GUI writes empty texts and lists for fields that were left empty, and a list of rates, one per text encoder.
    """
    if value in ("", []) or (option.name in GUI_NOTHING and value == GUI_NOTHING[option.name]):
        return None, ""
    if option.name == RATES and isinstance(value, list) and not option.many:
        return value[0], _note_on_rates(value)
    return value, ""


def with_one_rate(argv: Sequence[str], options: Mapping[str, Option]) -> tuple[list[str], str]:
    """(a command line with one rate after --text_encoder_lr, what to say of the others); see :func:`as_meant`.

    Unchanged where the script's `options` take several rates, or none.
    """
    words, flag = list(argv), f"--{RATES}"
    if flag not in words or RATES not in options or options[RATES].many:
        return words, ""
    first = words.index(flag) + 1
    rates = list(takewhile(_is_number, words[first:]))
    return words[: first + 1] + words[first + max(1, len(rates)) :], _note_on_rates(rates)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _note_on_rates(rates: Sequence[Any]) -> str:
    differ = all(_is_number(str(rate)) for rate in rates) and len(set(map(float, rates))) > 1
    return f"{RATES}: {rates[0]} is used, SD1/SD2 has one text encoder" if differ else ""


def _names(scripts: tuple[str, ...] | list[str]) -> str:
    scripts = [script for script in scripts if (ROOT / script).is_file()] or scripts  # rather those that are here
    shown = [script for script in scripts if script != OTHER_FAMILIES] or [OTHER_FAMILIES]
    more = " and others" if len(shown) > MOST_SCRIPTS_NAMED else ""
    return " and ".join(shown) if len(shown) < 3 else ", ".join(shown[:MOST_SCRIPTS_NAMED]) + more
