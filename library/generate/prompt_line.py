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

from library.generate.guidance_options import NO_SCALE
from library.options import OptionError, require

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
    strength: float | None = None  # of img2img, or of a second stage
    ds_depth_1: int | None = None  # Deep Shrink and gradual latent: as the flags of these names, for this line alone
    ds_timesteps_1: int | None = None
    ds_depth_2: int | None = None
    ds_timesteps_2: int | None = None
    ds_ratio: float | None = None
    gradual_latent_timesteps: int | None = None
    gradual_latent_ratio: float | None = None
    gradual_latent_every_n_steps: int | None = None
    gradual_latent_ratio_step: float | None = None
    gradual_latent_s_noise: float | None = None
    gradual_latent_unsharp_params: str | None = None
    clip_skip: int | None = None
    windows: int | None = None  # most windows of 75 tokens
    turn: int | None = None  # which file of --image_path is this prompt's, from 0; None: they are taken in turn
    file_name: str = ""
    raw_prompt: str = ""  # what a dynamic prompt was before it was drawn
    # of the networks, in their order; the last one serves all further ones; None: the command line's
    multipliers: tuple[float, ...] | None = None
    negative_scale: float | str | None = None  # "none": off, whatever the command line says
    original_width: int | None = None  # what SDXL is told, as the flags of these names
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    sigmas: str | None = None
    weighting: str | None = None


@dataclass(frozen=True)
class RawLine:
    """A line as it was written, which may be a dynamic prompt, and its place."""

    text: str
    where: str = "--prompt"


OPTION_MARK = " --"  # in front of each option
FILE_NAME = (
    'the name of a file of the kind .png, .webp or .jpg (without a folder, which is --outdir, without any of :*?"<>|, '
    "and not that of a device, as CON is on Windows)"
)
BAD_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f]')  # to one system or another
DEVICES = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(?:\..*)?", re.IGNORECASE)
OTHER_FORMATS = re.compile(r"\.(?:gif|bmp|tiff?|avif|hei[cf]|jxl|jp2|ico|tga|psd|svg)$", re.IGNORECASE)
LONGEST_NAME = 200  # bytes; file systems take 255, and numbers may follow

# name of a line's option -> (field of PromptLine, what its value must be, parser of the value)
LineOptions = Mapping[str, tuple[str, str, Callable[[str], Any]]]


def parse_prompt_line(line: str, where: str = "--prompt", options: LineOptions | None = None) -> PromptLine:
    """Split a line at " --" into the prompt and its options; a line that begins with "--" has an empty prompt.

    `options` are LINE_OPTIONS where not given; their names are matched in any case. A value that is no number raises
    OptionError; unknown options are left out of the prompt, as they always were, and named in one warning.
    """
    options = LINE_OPTIONS if options is None else options
    require(NOT_UTF8.search(line) is None, where, "is not UTF-8 text", "write it in UTF-8")
    prompt, *parts = f" {line.strip()}".split(OPTION_MARK)
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
    return PromptLine(prompt.strip(), where=where, **values)


def read_raw_lines(path: str | Path, flag: str = "--from_file") -> list[RawLine]:
    """The prompts of a text file (UTF-8, with or without a byte order mark); blank lines and # comments are skipped.

    Raises OptionError, which names `flag`, for a file that is missing or holds no prompt. What is no UTF-8 text shows
    when its line is parsed.
    """
    return lines_of_text(read_bytes_as_text(path, flag), path, flag)


def read_bytes_as_text(path: str | Path, flag: str) -> str:
    """A file's text, with marks in place of what is no UTF-8; OptionError, which names `flag`, where it is missing."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise OptionError(flag, f"can't read {path} ({error.strerror})", "name a text file of prompts") from None


def lines_of_text(text: str, path: str | Path, flag: str = "--from_file") -> list[RawLine]:
    """The prompts in a file's text, see :func:`read_raw_lines`."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    prompts = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not prompts:
        raise OptionError(flag, f"{path} holds no prompt", "write one prompt per line")
    return [RawLine(line, f"{path}, line {number}") for number, line in prompts]


def seeds_of_line(text: str, where: str) -> tuple[int, ...]:
    """The seeds that the last --d names in a dynamic prompt's text outside of braces; OptionError as parsing a line."""
    own = [part.strip() for part in f" {text}".split(OPTION_MARK)[1:] if part.strip().partition(" ")[0].lower() == "d"]
    if own and own[-1].lower() == "d":
        raise OptionError(
            where, "--d has no seed outside of braces; seeds draw what braces stand for", "write --d 1,2,3"
        )
    return parse_prompt_line(f" --{own[-1]}", where, LINE_OPTIONS).seeds if own else ()


def finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def file_name(text: str) -> str:
    """A picture's name, without a folder, that every system takes; its suffix is left open but for other formats."""
    if not text.strip(".") or BAD_IN_NAMES.search(text) or len(text.encode()) > LONGEST_NAME:
        raise ValueError(text)
    if DEVICES.fullmatch(text) or OTHER_FORMATS.search(text):
        raise ValueError(text)
    return text


def number_list(text: str) -> tuple[float, ...]:
    return tuple(finite_number(number) for number in text.split(",") if number.strip()) or (finite_number(text),)


def scale_or_none(text: str) -> float | str:
    return NO_SCALE if text.lower() == NO_SCALE else finite_number(text)


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
    "t": ("strength", "a number", finite_number),
    "dsd1": ("ds_depth_1", "a whole number", int),
    "dst1": ("ds_timesteps_1", "a whole number", int),
    "dsd2": ("ds_depth_2", "a whole number", int),
    "dst2": ("ds_timesteps_2", "a whole number", int),
    "dsr": ("ds_ratio", "a number", finite_number),
    "glt": ("gradual_latent_timesteps", "a whole number", int),
    "glr": ("gradual_latent_ratio", "a number", finite_number),
    "gle": ("gradual_latent_every_n_steps", "a whole number", int),
    "gls": ("gradual_latent_ratio_step", "a number", finite_number),
    "glsn": ("gradual_latent_s_noise", "a number", finite_number),
    "glus": ("gradual_latent_unsharp_params", "a list of numbers", str),
    "f": ("file_name", FILE_NAME, file_name),
    "nl": ("negative_scale", f"a number or {NO_SCALE}", scale_or_none),
    "ow": ("original_width", "a whole number", int),
    "oh": ("original_height", "a whole number", int),
    "nw": ("original_width_negative", "a whole number", int),
    "nh": ("original_height_negative", "a whole number", int),
    "ct": ("crop_top", "a whole number", int),
    "cl": ("crop_left", "a whole number", int),
    "am": ("multipliers", "a multiplier or several joined by commas", number_list),
}

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what bytes of another encoding become
