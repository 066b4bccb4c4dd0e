"""The prompts of previews: .txt, .toml and .json files, read and checked before anything heavy is loaded.

All three become the prompt lines that generation reads, so that a preview and a generated picture are asked for in
the same terms.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.data.config import DatasetConfig
from library.data.dataset_file import parse_file
from library.diffusion.samplers import SAMPLERS, check_packages
from library.generate.options import LEAST_SIZE, SIZE_STEP, PictureOptions
from library.generate.prompt_line import LINE_OPTIONS, LineOptions, PromptLine, parse_prompt_line, read_raw_lines
from library.generate.request import checked_line
from library.options import OptionError, build, did_you_mean, not_one_of, opt, options_of, require
from library.train.config import RunConfig
from library.train.preview_options import PreviewOptions

logger = logging.getLogger(__name__)

FLAG = "--sample_prompts"
STEPS = 30
WINDOWS = 3  # longest prompt, in windows of 75 tokens
PREVIEW_LINE_OPTIONS: LineOptions = {name: LINE_OPTIONS[name] for name in "nwhdls"} | {
    "ss": ("sampler", "a sampler", str)
}
DYNAMIC_PROMPT = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*(?<!\\)\}")
OTHER_MODELS = {
    "controlnet_image": "only ControlNets look at a picture",
    "guidance_scale": "this is for models that take guidance as an input; `scale` is the guidance of this one",
}


@dataclass(frozen=True)
class PromptEntry:
    """A prompt as a table of a .toml file or an object of a .json file."""

    prompt: str | None = opt(help="what the picture shows")
    negative_prompt: str = opt("", help="what it should not show")
    sample_steps: int | None = opt(help="denoising steps")
    width: int | None = opt(help="width in pixels")
    height: int | None = opt(help="height in pixels")
    scale: float | None = opt(help="classifier-free guidance; 1 or less switches it off")
    seed: int | None = opt(help="seed of the picture")
    sample_sampler: str | None = opt(help="sampling method")


def read_previews(options: PreviewOptions) -> tuple[PromptLine, ...]:
    """The prompts of the file that the options name.

    Raises OptionError, which names the line or the key, for a file that is missing or broken.
    """
    lines = [_within_limits(line) for line in _read(Path(options.sample_prompts or ""))]
    for line in lines:
        name = line.sampler or options.sample_sampler
        require(name in SAMPLERS, f"{line.where}: sampler", not_one_of(name, SAMPLERS))
        check_packages(line.where if line.sampler else "--sample_sampler", name)
    return tuple(checked_line(line, options.sample_sampler) for line in lines)


def preview_defaults(config: RunConfig, datasets: Sequence[DatasetConfig], *, usual_side: int = 512) -> PictureOptions:
    """What holds for prompts that don't say otherwise: the largest size trained at, 30 steps, guidance 7.5.

    `usual_side` in pixels where no size is known.
    """
    sizes = [dataset.bucket.resolution for dataset in datasets if dataset.bucket.resolution is not None]
    largest = max(sizes, key=math.prod, default=(usual_side, usual_side))
    width, height = (max(LEAST_SIZE, side // SIZE_STEP * SIZE_STEP) for side in largest)
    return PictureOptions(
        W=width,
        H=height,
        steps=STEPS,
        sampler=config.preview.sample_sampler,
        clip_skip=config.text.clip_skip,
        max_embeddings_multiples=WINDOWS,
    )


def _read(path: Path) -> Sequence[PromptLine]:
    kind = path.suffix.lower()
    require(kind in (".txt", ".toml", ".json"), FLAG, f"{path} is neither .txt nor .toml nor .json")
    if kind == ".txt":
        return [_prompt_line(line.text, line.where) for line in read_raw_lines(path, FLAG)]
    content = parse_file(path, FLAG)
    lines = list(_toml_lines(path, content) if kind == ".toml" else _json_lines(path, content))
    require(bool(lines), FLAG, f"{path} holds no prompt", "write one [[prompt.subset]] or object per prompt")
    return lines


def _toml_lines(path: Path, content: Mapping[str, Any]) -> Iterator[PromptLine]:
    """The tables [[prompt.subset]], each over what [prompt] says for all; [prompt] alone is one prompt."""
    for key in content:
        require(key == "prompt", f"{path}: {key}", "unknown key", "prompts stand in [prompt] and [[prompt.subset]]")
    shared = content.get("prompt", {})
    require(isinstance(shared, dict), f"{path}: prompt", "is not a table", "write [prompt] and [[prompt.subset]]")
    subsets = shared.get("subset")
    common = {name: value for name, value in shared.items() if name != "subset"}
    if subsets is None:
        subsets = [{}] if common else []
    require(isinstance(subsets, list), f"{path}: prompt.subset", "is not a list of tables", "write [[prompt.subset]]")
    for index, subset in enumerate(subsets):
        require(isinstance(subset, dict), f"{path}: prompt.subset[{index}]", f"{subset!r} is not a table")
        yield _entry(common | subset, f"{path}: prompt.subset[{index}]")


def _json_lines(path: Path, content: Any) -> Iterator[PromptLine]:
    """The elements of a list: texts are prompt lines, objects are tables."""
    require(isinstance(content, list), str(path), "is not a list", 'write ["a prompt", {"prompt": "another"}]')
    for index, item in enumerate(content):
        where = f"{path}: [{index}]"
        require(isinstance(item, (str, dict)), where, f"{item!r} is neither a text nor an object")
        if isinstance(item, dict):
            yield _entry(item, where)
        elif item.strip() and not item.strip().startswith("#"):
            yield _prompt_line(item, where)


def _prompt_line(text: str, where: str) -> PromptLine:
    """A line of text. Its braces stay: a preview shows how one and the same prompt is learned."""
    if DYNAMIC_PROMPT.search(text):
        logger.warning("%s: {...|...} is used as it stands: previews draw no variants", where)
    return parse_prompt_line(text, where, PREVIEW_LINE_OPTIONS)


def _entry(values: Mapping[str, Any], where: str) -> PromptLine:
    known = [option.name for option in options_of(PromptEntry)]
    for key in values:
        if key in OTHER_MODELS:
            logger.warning("%s.%s has no effect: %s", where, key, OTHER_MODELS[key])
        elif key not in known:
            raise OptionError(f"{where}.{key}", "unknown key", did_you_mean(key, known))
    entry = build(PromptEntry, values, lambda name: f"{where}.{name}")
    require(entry.prompt is not None, where, "no prompt given", 'add prompt = "..."')
    return PromptLine(
        prompt=(entry.prompt or "").strip(),
        negative_prompt=entry.negative_prompt.strip(),
        width=entry.width,
        height=entry.height,
        steps=entry.sample_steps,
        scale=entry.scale,
        seeds=() if entry.seed is None else (entry.seed,),
        where=where,
        sampler=entry.sample_sampler,
    )


def _within_limits(line: PromptLine) -> PromptLine:
    """The line with a size that can be drawn: files of prompts rely on sizes being rounded down."""
    width, height = (
        None if side is None else max(LEAST_SIZE, side // SIZE_STEP * SIZE_STEP) for side in (line.width, line.height)
    )
    if (width, height) != (line.width, line.height):
        given, drawn = (
            " x ".join("default" if side is None else str(side) for side in size)
            for size in ((line.width, line.height), (width, height))
        )
        logger.warning("%s: the size %s is drawn as %s (multiples of %d)", line.where, given, drawn, SIZE_STEP)
    return replace(line, width=width, height=height)
