"""Options of drawing at another resolution for a while: Deep Shrink and gradual latent."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

from library.generate.options import check_factor
from library.generate.prompt_line import PromptLine
from library.options import OptionError, opt, options_of, require

Overridable = TypeVar("Overridable", "DeepShrinkOptions", "GradualLatentOptions")


@dataclass(frozen=True)
class DeepShrinkOptions:
    """Deep Shrink: larger pictures without doubled motifs, as early steps see them smaller inside the U-Net."""

    ds_depth_1: int | None = opt(
        help="block of the U-Net before which the picture is made smaller: 0 to 3, for SDXL 0 to 8; 3 is usual. "
        "Without this option there is no Deep Shrink"
    )
    ds_timesteps_1: int = opt(650, help="shrink before --ds_depth_1 down to this timestep (1000 to 0)")
    ds_depth_2: int | None = opt(help="block before which it is made smaller from then on")
    ds_timesteps_2: int = opt(650, help="shrink before --ds_depth_2 down to this timestep")
    ds_ratio: float = opt(0.5, help="how much smaller")

    def __post_init__(self) -> None:
        for name in ("ds_depth_1", "ds_depth_2"):
            depth = getattr(self, name)
            require(
                depth is None or 0 <= depth <= 8, f"--{name}", f"{depth} is out of range", "use 0 to 3, SDXL 0 to 8"
            )
        require(0 < self.ds_ratio <= 1, "--ds_ratio", f"{self.ds_ratio} is out of range", "use 0.5 or so")

    def depth_at(self, timestep: float) -> int | None:
        """The block before which the hidden states are made smaller at a timestep; None where they are not."""
        if self.ds_depth_1 is None:
            return None
        if timestep >= self.ds_timesteps_1:
            return self.ds_depth_1
        return self.ds_depth_2 if timestep >= self.ds_timesteps_2 else None


@dataclass(frozen=True)
class GradualLatentOptions:
    """Gradual latent: small latents first, enlarged step by step while they are drawn (sampler euler_a)."""

    gradual_latent_timesteps: int | None = opt(
        help="enlarge latents from this timestep (1000 to 0) on; 650 is usual. Without this option there is no gradual "
        "latent"
    )
    gradual_latent_ratio: float = opt(0.5, help="size of the latents at the beginning, as a share of the whole")
    gradual_latent_ratio_step: float = opt(0.125, help="what each enlargement adds to that share")
    gradual_latent_every_n_steps: int = opt(3, help="steps from one enlargement to the next")
    gradual_latent_s_noise: float = opt(1.0, help="multiplier of the noise that an enlarging step adds")
    gradual_latent_unsharp_params: str | None = opt(
        help='sharpen what is enlarged: "size,sigma,strength" of an unsharp mask, and as a fourth number 0 to sharpen '
        "before noise and denoising meet instead of after, for example 3,0.5,0.5"
    )

    def __post_init__(self) -> None:
        ratio, ratio_step, every = (
            self.gradual_latent_ratio, self.gradual_latent_ratio_step, self.gradual_latent_every_n_steps,
        )  # fmt: skip
        require(0 < ratio <= 1, "--gradual_latent_ratio", f"{ratio} is out of range", "use 0.5 or so")
        require(0 < ratio_step <= 1, "--gradual_latent_ratio_step", f"{ratio_step} is out of range", "use 0.125 or so")
        require(every >= 1, "--gradual_latent_every_n_steps", f"{every} is out of range", "use 1 or more")
        noise = self.gradual_latent_s_noise
        is_well = math.isfinite(noise) and noise >= 0
        require(is_well, "--gradual_latent_s_noise", f"{noise} is out of range", "use 1 or so")
        check_factor("--gradual_latent_s_noise", noise, "1")
        self.unsharp  # noqa: B018  checks its form

    @property
    def unsharp(self) -> Unsharp | None:
        """How enlarged latents are sharpened, if at all."""
        text, flag = self.gradual_latent_unsharp_params, "--gradual_latent_unsharp_params"
        if not text:
            return None
        way_out = 'write "size,sigma,strength" or "size,sigma,strength,target", for example 3,0.5,0.5'
        try:
            size, sigma, strength, *rest = map(float, text.split(","))
        except ValueError:
            require(False, flag, f"{text!r} is not a list of three or four numbers", way_out)
            raise
        require(len(rest) <= 1, flag, f"{text!r} is not a list of three or four numbers", way_out)
        require(size == int(size) and size % 2 == 1 and size > 0, flag, f"the size {size:g} is not odd", "use 3 or 5")
        require(0 < sigma < math.inf and math.isfinite(strength), flag, f"sigma {sigma:g} is out of range", "use 0.5")
        check_factor(flag, strength, "a strength of 0.5")
        return Unsharp(int(size), sigma, strength, not rest or bool(rest[0]))


@dataclass(frozen=True)
class Unsharp:
    """An unsharp mask: x + strength (x - x blurred by a Gaussian)."""

    size: int  # pixels of the kernel's side, odd
    sigma: float
    strength: float
    after_denoising: bool = True  # of the denoised latents; else of those that the step begins with


SWITCHES = {"ds_depth_1": 3, "gradual_latent_timesteps": 650}  # what a line's other options of the kind switch on


def overridden(options: Overridable, line: PromptLine) -> Overridable:
    """The options with what the line says; any of them in a line switches the feature on for that line.

    Raises OptionError, which names the line, for values that are out of range.
    """
    names = [option.name for option in options_of(type(options))]
    own = {name: getattr(line, name) for name in names if getattr(line, name, None) is not None}
    switch = next(name for name in names if name in SWITCHES)
    if own and switch not in own and getattr(options, switch) is None:
        own[switch] = SWITCHES[switch]
    try:
        changed = dataclasses.replace(options, **own)
    except OptionError as error:
        raise OptionError(line.where, str(error)) from None
    return type(options)() if getattr(changed, switch) is None else changed
