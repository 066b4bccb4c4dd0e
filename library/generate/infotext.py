"""Infotext: how web user interfaces write down what made a picture, written, and read back into a prompt line.

prompt, which may have several lines
Negative prompt: what it does not show
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Clip skip: 2

Both ways go through one table, ROWS, in the order in which user interfaces write.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.diffusion.samplers import SAMPLERS, SIGMAS, label_of
from library.generate.critic_options import ClipVisionOptions, CriticOptions
from library.generate.guidance_options import EMPHASIS, EMPHASIS_NAMES, NEGATIVE_SCALE
from library.generate.prompt_line import PromptLine, finite_number
from library.generate.resolution_options import DeepShrinkOptions, GradualLatentOptions
from library.generate.size_options import SizeOptions, text_name
from library.generate.start_options import StartNoiseOptions
from library.options import OptionError, options_of

if TYPE_CHECKING:
    from library.generate.model_names import Hashes, ModelNames
    from library.generate.request import GenerationRequest

logger = logging.getLogger(__name__)

NEGATIVE = "Negative prompt:"
VERSION = "Training scripts for Stable Diffusion"  # user interfaces name themselves there, behind all else
FIRST_STRENGTH = "highres_fix_strength"  # of a first stage that starts from a picture; user interfaces have no such
WINDOWS = "Max embeddings multiples"  # this program's own: user interfaces cut no prompt off
VALUE = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
SEPARATORS = re.compile(r'[,:"\n]|^\s|\s$')  # a text that holds one is written in quotes
NETWORK = re.compile(r"\s*<(?:lora|lyco|hypernet):[^>]*>")
NO_SCHEDULE = ("DDIM", "PNDM")  # samplers whose timesteps user interfaces give no choice of
UNIFORM = "Uniform"  # what user interfaces call timesteps at equal distances
ALIKE = (UNIFORM, "Automatic")
KINDS: dict[Any, Callable[[str], Any]] = {int: int, float: finite_number, str: str}


@dataclass(frozen=True)
class Row:
    """One value of the last line."""

    name: str
    written: Callable[[GenerationRequest, ModelNames], Any]  # None or "": it is left out
    field: str = ""  # of PromptLine; "": it is told, or read together with another one
    read: Callable[[str], Any] = str
    hint: str = ""  # the flag that does the same, where a prompt line can't say it


def _first(request: GenerationRequest) -> GenerationRequest:
    """The first stage of highres fix, whose values user interfaces write as the picture's own."""
    return request.first_stage or request


def _of_second(value: Callable[[GenerationRequest], Any]) -> Callable[[GenerationRequest, ModelNames], Any]:
    return lambda request, _names: value(request) if request.is_second_stage else None


def _strength(request: GenerationRequest, _names: ModelNames) -> float | None:
    return request.strength if request.is_second_stage or request.image else None


def _schedule(request: GenerationRequest, _names: ModelNames) -> str | None:
    if SAMPLERS[request.sampler].label in NO_SCHEDULE:
        return None
    return UNIFORM if request.sigmas == "default" else request.sigmas.capitalize()


def _upscaler(request: GenerationRequest) -> str:
    return request.upscaler.module or ("Latent" if request.upscaler.in_latents else "Lanczos")


def _hashes(hashes: Hashes) -> str:
    return ", ".join(f"{name}: {value}" for name, value in hashes)


def _emphasis(request: GenerationRequest, _names: ModelNames) -> str | None:
    return None if request.weighting == "original" else EMPHASIS_NAMES[request.weighting]


def _size_rows() -> list[Row]:
    """What SDXL is told of sizes."""
    rows = []
    for option in options_of(SizeOptions):

        def written(request: GenerationRequest, _names: ModelNames, name: str = option.name) -> Any:
            return request.sizes.given.get(name)

        rows.append(Row(text_name(option.name), written, option.name, int))
    return rows


def _noise_rows() -> list[Row]:
    """Start noise of another kind, by the names of its flags."""
    rows = []
    for option in options_of(StartNoiseOptions):

        def written(request: GenerationRequest, _names: ModelNames, name: str = option.name) -> Any:
            value = getattr(_first(request).start_noise, name)
            return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else value

        rows.append(Row(option.name, written, hint=option.flag))
    return rows


def _first_strength(request: GenerationRequest, _names: ModelNames) -> float | None:
    return request.first_stage.strength if request.first_stage is not None and request.first_stage.image else None


def _look_rows() -> list[Row]:
    """Guidance by networks that look at the picture, and pictures in place of pooled text, by the names of flags."""
    rows = []
    for option in (*options_of(CriticOptions), *options_of(ClipVisionOptions)):

        def written(_request: GenerationRequest, names: ModelNames, name: str = option.name) -> Any:
            return dict(names.looks).get(name)

        rows.append(Row(option.name, written, hint=option.flag))
    return rows


def _resolution_rows() -> list[Row]:
    """Deep Shrink and gradual latent, by the names of their flags: user interfaces have none for them."""
    switches = {"deep_shrink": "ds_depth_1", "gradual_latent": "gradual_latent_timesteps"}
    groups = {"deep_shrink": DeepShrinkOptions, "gradual_latent": GradualLatentOptions}
    rows = []
    for group, kind in groups.items():
        for option in options_of(kind):

            def written(request: GenerationRequest, _n: ModelNames, group: str = group, name: str = option.name) -> Any:
                options = getattr(request, group)
                return None if getattr(options, switches[group]) is None else getattr(options, name)

            rows.append(Row(option.name, written, option.name, KINDS[option.kind]))
    return rows


ROWS = (
    Row("Steps", lambda request, _: _first(request).steps, "steps", int),
    Row("Sampler", lambda request, _: SAMPLERS[request.sampler].label),
    Row("Schedule type", _schedule),
    Row("CFG scale", lambda request, _: request.scale, "scale", finite_number),
    Row("Seed", lambda request, _: request.seed, "seeds", lambda text: (int(text),)),
    Row("Size", lambda request, _: f"{_first(request).width}x{_first(request).height}"),
    Row("Model hash", lambda _, names: names.model_hash),
    Row("Model", lambda _, names: names.model),
    Row("VAE hash", lambda _, names: names.vae_hash),
    Row("VAE", lambda _, names: names.vae, hint="--vae"),
    Row("Denoising strength", _strength, "strength", finite_number),
    Row("Clip skip", lambda request, _: request.clip_skip, "clip_skip", int),
    Row("RNG", lambda _request, _names: "CPU"),
    Row(
        "Noise Schedule",
        lambda request, _: "Zero Terminal SNR" if request.zero_terminal_snr else None,
        hint="--zero_terminal_snr",
    ),
    Row(WINDOWS, lambda request, _: request.max_windows if request.max_windows > 1 else None, "windows", int),
    Row(EMPHASIS, _emphasis, "weighting", {label: name for name, label in EMPHASIS_NAMES.items()}.get),
    Row(NEGATIVE_SCALE, lambda request, _: request.negative_scale, "negative_scale", finite_number),
    *_size_rows(),
    *_resolution_rows(),
    *_noise_rows(),
    Row("Init image", lambda request, _: Path(_first(request).image).name, hint="--image_path"),
    Row("Mask", lambda request, _: Path(_first(request).mask).name, hint="--mask_path"),
    Row(
        "Guide images",
        lambda request, _: ", ".join(Path(path).name for path in _first(request).guide_images),
        hint="--guide_image_path (with its ControlNets)",
    ),
    *_look_rows(),
    Row("Hires resize", _of_second(lambda request: f"{request.width}x{request.height}")),
    Row("Hires steps", _of_second(lambda request: request.steps)),
    Row("Hires upscaler", _of_second(_upscaler)),
    Row(FIRST_STRENGTH, _first_strength),
    Row("Lora hashes", lambda _, names: _hashes(names.network_hashes)),
    Row("TI hashes", lambda _, names: _hashes(names.embedding_hashes)),
    Row("Version", lambda _request, _names: VERSION),
)


def infotext(request: GenerationRequest, names: ModelNames) -> str:
    """The specification as web user interfaces write and read it."""
    lines = [f"{request.prompt} {names.tags(request.multipliers)}".strip()]
    if request.negative_prompt:
        lines.append(f"{NEGATIVE} {request.negative_prompt}")
    values = {row.name: row.written(request, names) for row in ROWS}
    lines.append(", ".join(f"{name}: {_as_text(value)}" for name, value in values.items() if value not in (None, "")))
    return "\n".join(lines)


def _as_text(value: Any) -> str:
    """Whole numbers without a point, other numbers so that they are read as the same, odd texts in JSON's quotes."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if SEPARATORS.search(text) else text


def parse_infotext(text: str, where: str = "infotext") -> PromptLine:
    """What a picture was made of; what the text does not tell is None. OptionError, which names `where`, if broken.

    A picture of two stages (highres fix) is read with the size and the steps of the second one.
    """
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
    for row in ROWS:
        if row.hint and row.name in values:
            logger.warning("%s: it was made with %s: %s; %s does so here", where, row.name, values[row.name], row.hint)
    fields = {row.field: _read(values, row.name, where, row.read) for row in ROWS if row.field and row.name in values}
    sampler, sigmas = _sampler(values.get("Sampler", ""), values.get("Schedule type", ""), where)
    width, height = _read(values, "Size", where, _size, (None, None))
    if width is not None:
        enlarged = _read(values, "Hires upscale", where, finite_number, 1.0)
        whole = (int(width * enlarged), int(height * enlarged))
        width, height = _read(values, "Hires resize", where, _size, whole)
        if "Hires resize" in values:
            _tell_stages(values, whole, (width, height), where)
    if steps := _read(values, "Hires steps", where, int, 0):  # 0 stands for as many as in the first stage
        fields["steps"] = steps
    return PromptLine(
        prompt=NETWORK.sub("", prompt),
        negative_prompt="\n".join(lines[cut:]).removeprefix(NEGATIVE).strip(),
        width=width,
        height=height,
        where=where,
        sampler=sampler,
        sigmas=sigmas,
        **fields,
    )


def _tell_stages(values: dict[str, str], first: tuple[int, int], whole: tuple[int, int], where: str) -> None:
    """Say which flags make the two stages of highres fix again."""
    flags = f"--highres_fix_scale {first[0] / whole[0]:g} --highres_fix_steps {values['Steps']}"
    upscaler = values.get("Hires upscaler", "")
    if upscaler == "Latent":
        flags += " --highres_fix_latents_upscaling"
    elif upscaler not in ("", "Lanczos"):
        flags += f" --highres_fix_upscaler {upscaler}"
    if FIRST_STRENGTH in values:
        flags += f" --{FIRST_STRENGTH} {values[FIRST_STRENGTH]}"
    logger.warning("%s: it was drawn in two stages; %s does so here", where, flags)


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


def _sampler(label: str, schedule: str, where: str) -> tuple[str | None, str | None]:
    """The sampler that user interfaces call so, and how its noise levels are spaced.

    Older ones write the schedule behind the sampler's name: "DPM++ 2M Karras".
    """
    plain = {row.label.lower(): name for name, row in reversed(list(SAMPLERS.items()))}  # the first of a label's names
    names = {
        label_of(name, sigmas).lower(): (name, sigmas)
        for name in plain.values()
        for sigmas in (SIGMAS if SAMPLERS[name].takes_sigmas else ("default",))
    }
    start, _, end = label.rpartition(" ")
    if label.lower() not in names and start.lower() in plain:
        label, schedule = start, end
    spaced = label if schedule in ("", *ALIKE) else f"{label} {schedule}"
    found = names.get(spaced.lower())
    if found is None and label.lower() in plain:
        logger.warning("%s: its schedule %r is not known here: %s takes its place", where, schedule, UNIFORM)
        return plain[label.lower()], "default"
    if found is None and label:
        logger.warning("%s: its sampler %r is not known here; --sampler takes its place", where, label)
    return found or (None, None)
