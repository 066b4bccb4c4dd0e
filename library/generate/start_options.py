"""Options of what pictures start from: other pictures, the first stage of highres fix, noise of another kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.generate.options import LARGEST_FACTOR, check_factor
from library.options import named_values, opt, require
from library.packages import is_installed

DEFAULT_STRENGTH = 0.8
LARGEST_DISCOUNT = 10.0  # its powers go up to the tenth


@dataclass(frozen=True)
class StartOptions:
    """Pictures made from pictures."""

    image_path: str | None = opt(help="start from a picture: a file, or a folder whose pictures are taken in turn")
    mask_path: str | None = opt(
        help="draw anew only what is white in this mask, or in the masks of this folder, in turn; with networks it is "
        "the map of their regions"
    )
    strength: float | None = opt(
        help="how far a picture may go from the one it starts from: 0 to 1, the share of the steps that are done; "
        f"{DEFAULT_STRENGTH} without this option"
    )
    force_scheduler_zero_steps_offset: bool = opt(
        False, help="no effect: pictures always start at the very noise that is added to them"
    )

    def __post_init__(self) -> None:
        check_strength("--strength", self.strength)

    def notes(self) -> list[str]:
        """What is said about flags without effect."""
        said = "--force_scheduler_zero_steps_offset has no effect: its offset is always 0 here"
        return [said] if self.force_scheduler_zero_steps_offset else []


@dataclass(frozen=True)
class UpscalerChoice:
    """How the first stage of highres fix is enlarged: by a module, else as latents or as a picture."""

    module: str = ""
    arguments: str = ""  # "name=value;name=value"
    in_latents: bool = False


@dataclass(frozen=True)
class HighresOptions:
    """Highres fix: a small picture first, which is then enlarged and gone over."""

    highres_fix_scale: float | None = opt(
        help="draw at this share of the size first, then enlarge and go over it (highres fix); 0.5 is usual"
    )
    highres_fix_steps: int = opt(28, help="denoising steps of the first stage")
    highres_fix_strength: float | None = opt(
        help="--strength of the first stage, where it starts from a picture; the same without this option"
    )
    highres_fix_save_1st: bool = opt(False, help="save the pictures of the first stage, too")
    highres_fix_latents_upscaling: bool = opt(False, help="enlarge the latents in place of the picture")
    highres_fix_upscaler: str | None = opt(
        help="Python module that enlarges the first stage, for example tools.latent_upscaler"
    )
    highres_fix_upscaler_args: str | None = opt(help='arguments of that module, as "name=value;name=value"')
    highres_fix_disable_control_net: bool = opt(False, help="no ControlNet in the second stage")

    def __post_init__(self) -> None:
        scale, module = self.highres_fix_scale, self.highres_fix_upscaler
        for name in ("strength", "save_1st", "latents_upscaling", "upscaler", "upscaler_args", "disable_control_net"):
            is_given = getattr(self, f"highres_fix_{name}") not in (None, False)
            way_out = "add --highres_fix_scale 0.5"
            require(scale is not None or not is_given, f"--highres_fix_{name}", "there is no highres fix", way_out)
        require(scale is None or 0 < scale <= 1, "--highres_fix_scale", f"{scale} is out of range", "use 0.5 or so")
        check_strength("--highres_fix_strength", self.highres_fix_strength)
        is_there = module is None or is_installed(module)
        way_out = "use tools.latent_upscaler, or a module of your own beside these scripts"
        require(is_there, "--highres_fix_upscaler", f"there is no Python module {module!r}", way_out)
        arguments = "--highres_fix_upscaler_args"
        require(
            module is not None or not self.highres_fix_upscaler_args, arguments, "there is no --highres_fix_upscaler"
        )
        upscaler_arguments(self.highres_fix_upscaler_args or "")

    @property
    def upscaler(self) -> UpscalerChoice:
        return UpscalerChoice(
            self.highres_fix_upscaler or "", self.highres_fix_upscaler_args or "", self.highres_fix_latents_upscaling
        )


@dataclass(frozen=True)
class StartNoiseOptions:
    """Start noise of another kind, for a share of the pictures: for experiments with what models do with it."""

    pyramid_noise_prob: float | None = opt(
        help="probability that noise of lower resolutions is added to a picture's start noise, 0 to 1"
    )
    pyramid_noise_discount_range: tuple[float, ...] | None = opt(
        help="how much weaker each lower resolution is, drawn between these two numbers for each picture"
    )
    noise_offset_prob: float | None = opt(
        help="probability that a number is added to all of a picture's start noise, 0 to 1"
    )
    noise_offset_range: tuple[float, ...] | None = opt(
        help="two numbers a b: what is added is a + (b - a) times a normally distributed number"
    )

    def __post_init__(self) -> None:
        for name, numbers in (("pyramid_noise", "discount_range"), ("noise_offset", "range")):
            probability, between = getattr(self, f"{name}_prob"), getattr(self, f"{name}_{numbers}")
            flag, range_flag = f"--{name}_prob", f"--{name}_{numbers}"
            require(probability is None or 0 <= probability <= 1, flag, f"{probability} is out of range", "use 0 to 1")
            way_out = "give two numbers, for example 0.7 0.9" if name == "pyramid_noise" else "for example -0.1 0.1"
            require(between is None or len(between) == 2, range_flag, f"{len(between or ())} numbers", way_out)
            largest = LARGEST_DISCOUNT if name == "pyramid_noise" else LARGEST_FACTOR
            for number in between or ():
                check_factor(range_flag, number, "0.8" if name == "pyramid_noise" else "0.1", largest)
            require((probability is None) == (between is None), flag, f"goes together with {range_flag}", way_out)

    @property
    def is_on(self) -> bool:
        return bool(self.pyramid_noise_prob) or bool(self.noise_offset_prob)


def upscaler_arguments(text: str) -> dict[str, str]:
    """ "name=value;name=value" as a dict."""
    items = [item.strip() for item in text.split(";") if item.strip()]
    return named_values(items, "--highres_fix_upscaler_args")


def check_strength(where: str, strength: float | None) -> None:
    """Raise OptionError unless a picture can start from another one with this strength."""
    is_well = strength is None or (math.isfinite(strength) and 0 < strength <= 1)
    require(is_well, where, f"{strength} is out of range", "use a number above 0, up to 1; 0.8 is usual")
