"""Infotext: how web user interfaces write down what made a picture, read back into a prompt line.

prompt, which may have several lines
Negative prompt: what it does not show
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Clip skip: 2
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

from library.diffusion.samplers import SAMPLERS, SIGMAS, label_of
from library.generate.guidance_options import EMPHASIS, EMPHASIS_NAMES, NEGATIVE_SCALE
from library.generate.prompt_line import PromptLine, finite_number
from library.generate.size_options import SizeOptions, text_name
from library.options import OptionError, options_of

logger = logging.getLogger(__name__)

NEGATIVE = "Negative prompt:"
WINDOWS = "Max embeddings multiples"  # this program's own: user interfaces cut no prompt off
VALUE = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
NETWORK = re.compile(r"\s*<(?:lora|lyco|hypernet):[^>]*>")


def parse_infotext(text: str, where: str = "infotext") -> PromptLine:
    """What a picture was made of; what the text does not tell is None. OptionError, which names `where`, if broken."""
    *lines, last = text.strip().split("\n") or [""]
    values = _values(last)
    if "Steps" not in values:
        lines, values = [*lines, last], {}
    starts = [index for index, line in enumerate(lines) if line.startswith(NEGATIVE)]
    cut = starts[0] if starts else len(lines)
    prompt = "\n".join(lines[:cut]).strip()
    networks = [tag.strip() for tag in NETWORK.findall(prompt)]
    if networks:
        logger.warning("%s: it was made with %s; --network_weights names networks here", where, " ".join(networks))
    sampler, sigmas = _sampler(f"{values.get('Sampler', '')} {values.get('Schedule type', '')}".strip(), where)
    width, height = _read(values, "Size", where, _size, (None, None))
    return PromptLine(
        prompt=NETWORK.sub("", prompt),
        negative_prompt="\n".join(lines[cut:]).removeprefix(NEGATIVE).strip(),
        width=width,
        height=height,
        steps=_read(values, "Steps", where, int),
        scale=_read(values, "CFG scale", where, finite_number),
        seeds=() if "Seed" not in values else (_read(values, "Seed", where, int),),
        where=where,
        sampler=sampler,
        sigmas=sigmas,
        negative_scale=_read(values, NEGATIVE_SCALE, where, finite_number),
        weighting={label: name for name, label in EMPHASIS_NAMES.items()}.get(values.get(EMPHASIS, "")),
        **{option.name: _read(values, text_name(option.name), where, int) for option in options_of(SizeOptions)},
        clip_skip=_read(values, "Clip skip", where, int),
        windows=_read(values, WINDOWS, where, int),
    )


def _values(line: str) -> dict[str, str]:
    """The names and values of the last line; a quoted value is read as JSON."""
    values = {}
    for name, value in VALUE.findall(line):
        try:
            values[name.strip()] = json.loads(value) if value.startswith('"') else value.strip()
        except ValueError:
            values[name.strip()] = value
    return values


def _read(values: dict[str, str], name: str, where: str, kind: Callable[[str], Any], missing: Any = None) -> Any:
    if name not in values:
        return missing
    try:
        return kind(values[name])
    except ValueError:
        raise OptionError(where, f"{name}: {values[name]!r} can't be read") from None


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _sampler(label: str, where: str) -> tuple[str | None, str | None]:
    """The sampler that user interfaces call so, and how its noise levels are spaced."""
    label = label.removesuffix(" Automatic").removesuffix(" Uniform")
    names = {
        label_of(name, sigmas).lower(): (name, sigmas)
        for name, row in reversed(list(SAMPLERS.items()))  # the first of a label's names
        for sigmas in (SIGMAS if row.takes_sigmas else ("default",))
    }
    if label and label.lower() not in names:
        logger.warning("%s: its sampler %r is not known here; --sampler takes its place", where, label)
    return names.get(label.lower(), (None, None))
