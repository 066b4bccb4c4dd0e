"""Gradual latent: pictures begin small and are enlarged step by step while they are drawn (sampler Euler a).

Shape letters: B pictures, C channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import conv2d, interpolate, pad

from library.families.base import Conditioning
from library.generate.drawing import Drawing, Part
from library.generate.resolution_options import GradualLatentOptions, Unsharp

SIZE_STEP = 8  # latent pixels: the U-Net halves them three times


class GradualLatent(Part):
    """Replaces the sampler of batches that ask for it by one whose steps can enlarge, and says when they do.

    Enlarging begins with the first step below `gradual_latent_timesteps`; the last step enlarges to the whole size
    what is still smaller then, so that pictures always have the size that they are asked for in.
    """

    def __init__(self) -> None:
        self._scheduler: EnlargingEulerAncestral | None = None

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        options = drawing.first.gradual_latent
        if options != GradualLatentOptions():
            whole_hw = (drawing.latents_BChw.shape[2], drawing.latents_BChw.shape[3])
            scheduler = EnlargingEulerAncestral.like(drawing.scheduler, options, whole_hw)
            drawing.scheduler = self._scheduler = scheduler
            size_hw = scaled_size(whole_hw, options.gradual_latent_ratio)
            drawing.latents_BChw = enlarged(drawing.latents_BChw, size_hw, options.unsharp)
        try:
            yield
        finally:
            self._scheduler = None

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        if self._scheduler is not None:
            self._scheduler.plan_step(float(drawing.timestep), is_last=drawing.is_last_step)
        return conditioning


class EnlargingEulerAncestral(EulerAncestralDiscreteScheduler):
    """Euler a whose step enlarges latents where it is told to."""

    options: GradualLatentOptions
    whole_hw: tuple[int, int]
    ratio: float
    steps_since: int  # since the last enlargement
    size_hw: tuple[int, int] | None  # that the step at hand enlarges to

    @classmethod
    def like(cls, scheduler: Any, options: GradualLatentOptions, whole_hw: tuple[int, int]) -> EnlargingEulerAncestral:
        """In the place where `scheduler`, an EulerAncestralDiscreteScheduler before its first step, is."""
        made: Any = cls.from_config(scheduler.config)
        made.set_timesteps(scheduler.num_inference_steps, device="cpu")
        if scheduler.begin_index is not None:
            made.set_begin_index(scheduler.begin_index)
        made.options, made.whole_hw, made.size_hw = options, whole_hw, None
        made.ratio, made.steps_since = options.gradual_latent_ratio, options.gradual_latent_every_n_steps
        return made

    def plan_step(self, timestep: float, *, is_last: bool) -> None:
        """Decide whether the step at `timestep` enlarges, and to what size."""
        options = self.options
        self.size_hw = None
        if self.ratio < 1 and is_last:
            self.ratio = 1.0
        elif (
            self.ratio < 1
            and timestep < (options.gradual_latent_timesteps or 0)
            and self.steps_since >= options.gradual_latent_every_n_steps
        ):
            self.ratio = min(self.ratio + options.gradual_latent_ratio_step, 1.0)
        else:
            self.steps_since += 1
            return
        self.size_hw, self.steps_since = scaled_size(self.whole_hw, self.ratio), 1

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Sequence[torch.Generator] | torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As the class above; an enlarging step computes ancestral sampling (Karras et al. 2022, k-diffusion's form)
        x + d (sigma_down - sigma) + sigma_up noise, of which either the first two together or each is enlarged."""
        if self.size_hw is None:
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)  # pyright: ignore[reportArgumentType]
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_to = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        clean = self._clean(model_output, sample, sigma)
        sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        derivative, unsharp = (sample - clean) / sigma, self.options.unsharp
        if unsharp is None or unsharp.after_denoising:
            next_sample = enlarged(sample + derivative * (sigma_down - sigma), self.size_hw, unsharp)
        else:
            sample = enlarged(sample, self.size_hw, unsharp)
            next_sample = sample + enlarged(derivative, self.size_hw, None) * (sigma_down - sigma)
        noise = randn_tensor(next_sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)  # pyright: ignore[reportArgumentType]
        next_sample = next_sample + noise * sigma_up * self.options.gradual_latent_s_noise
        self._step_index += 1
        return (next_sample, clean)

    def _clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.config["prediction_type"] == "v_prediction":
            return model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
        return sample - sigma * model_output


def scaled_size(whole_hw: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Sides of `ratio` of the whole, in multiples of 8 and at least 8; the whole itself for 1."""
    if ratio >= 1:
        return whole_hw
    height, width = (min(side, max(SIZE_STEP, int(side * ratio) // SIZE_STEP * SIZE_STEP)) for side in whole_hw)
    return height, width


def enlarged(latents_BChw: torch.Tensor, size_hw: tuple[int, int], unsharp: Unsharp | None) -> torch.Tensor:
    """In another size (bicubic), then sharpened."""
    latents_BChw = interpolate(latents_BChw, size_hw, mode="bicubic", align_corners=False)
    return latents_BChw if unsharp is None else sharpened(latents_BChw, unsharp)


def sharpened(latents_BChw: torch.Tensor, unsharp: Unsharp) -> torch.Tensor:
    """x + strength (x - blurred x); the picture is mirrored at its edges."""
    half, channels = unsharp.size // 2, latents_BChw.shape[1]
    places = torch.arange(-half, half + 1, dtype=latents_BChw.dtype, device=latents_BChw.device)
    weights = (-(places**2) / (2 * unsharp.sigma**2)).exp()
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    kernel_C1kk = kernel.expand(channels, 1, -1, -1)
    blurred = conv2d(pad(latents_BChw, [half] * 4, mode="reflect"), kernel_C1kk, groups=channels)
    return latents_BChw + unsharp.strength * (latents_BChw - blurred)
