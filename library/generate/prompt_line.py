"""Prompt lines: a prompt with its own options, as `a photo of a cat --n blurry --w 640 --h 448 --s 30`.

Generation and the previews during training read the same lines.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptLine:
    """One prompt; None stands for "as the command line says"."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    scale: float | None = None
    seeds: tuple[int, ...] = ()  # one per picture; the last one serves all further pictures
    where: str = "--prompt"  # for messages: the flag, or file and line number
    sampler: str | None = None
    clip_prompt: str | None = None


# name of a line's option -> (field of PromptLine, what its value must be, parser of the value)
LineOptions = Mapping[str, tuple[str, str, Callable[[str], Any]]]


def parse_prompt_line(line: str, where: str = "--prompt", options: LineOptions | None = None) -> PromptLine:
    """Split a line at " --" into the prompt and its options; a line that begins with "--" has an empty prompt.

    `options` are LINE_OPTIONS where not given; their names are matched in any case. A value that is no number raises
    OptionError; unknown options are left out of the prompt, as they always were, and named in one warning.
    """
    options = LINE_OPTIONS if options is None else options
    prompt, *parts = f" {line.strip()}".split(" --")
    values: dict[str, Any] = {}
    unknown = []
    for part in parts:
        name, _, text = part.strip().partition(" ")
        if name.lower() not in options:
            unknown.append(f"--{part.strip()}")
            continue
        field, kind, parse = options[name.lower()]
        try:
            values[field] = parse(text.strip())
        except ValueError:
            raise OptionError(where, f"--{name} {text.strip()!r} is not {kind}") from None
    if unknown:
        known = ", ".join(f"--{name}" for name in options)
        logger.warning("%s: no effect: %s; prompt lines know %s", where, ", ".join(unknown), known)
    if DYNAMIC_PROMPT.search(prompt):
        logger.warning("%s: {...|...} is used as it stands: alternatives are not drawn", where)
    return PromptLine(prompt.strip(), where=where, **values)


def read_prompt_file(
    path: str | Path, flag: str = "--from_file", options: LineOptions | None = None
) -> list[PromptLine]:
    """The prompts of a text file (UTF-8, with or without a byte order mark); blank lines and # comments are skipped.

    Raises OptionError, which names `flag`, for a file that is missing, holds no prompt or is no UTF-8 text.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise OptionError(flag, f"{path} is not UTF-8 text (line {line})", "save it as UTF-8") from None
    except OSError as error:
        raise OptionError(flag, f"can't read {path} ({error.strerror})", "name a text file of prompts") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    prompts = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not prompts:
        raise OptionError(flag, f"{path} holds no prompt", "write one prompt per line")
    return [parse_prompt_line(line, f"{path}, line {number}", options) for number, line in prompts]


def finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def seed_list(text: str) -> tuple[int, ...]:
    return tuple(int(seed) for seed in text.split(",") if seed.strip()) or (int(text),)


LINE_OPTIONS: LineOptions = {
    "n": ("negative_prompt", "a text", str),
    "w": ("width", "a whole number", int),
    "h": ("height", "a whole number", int),
    "d": ("seeds", "a seed or several joined by commas", seed_list),
    "l": ("scale", "a number", finite_number),
    "s": ("steps", "a whole number", int),
    "c": ("clip_prompt", "a text", str),
}

DYNAMIC_PROMPT = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*(?<!\\)\}")
