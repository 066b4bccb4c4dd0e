"""Noise and timesteps of one training sample, drawn where the sample is loaded, and the noised latents.

Every draw is a function of (seed, purpose, epoch, sample id), so it is the same whatever the batch size, the number of
workers and processes, and wherever a run was resumed; and no option changes what another one draws.

Shape letters: B samples, C channels, H W latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import interpolate

from library.data.batch import Batch, NoiseDraw
from library.diffusion.options import NoiseOptions
from library.diffusion.schedule import NoiseSchedule
from library.randomness import python_random, torch_generator


@dataclass(frozen=True)
class NoiseSource:
    """Draws the noise and timestep of a sample; plain data, so that it travels to worker processes."""

    options: NoiseOptions
    seed: int

    def __call__(self, epoch: int, sample_id: int, latent_chw: tuple[int, int, int]) -> NoiseDraw:
        """Noise of the latent's shape, float32, and a timestep, 0-999.

        An offset whose strength depends on the latents is drawn here and added by `complete_noise`.
        """
        options, place = self.options, (epoch, sample_id)
        generator = torch_generator(self.seed, "noise", *place)
        noise_CHW, offset_noise_C11 = torch.randn(latent_chw, generator=generator), None
        if options.noise_offset:
            offset_noise_C11 = torch.randn((latent_chw[0], 1, 1), generator=generator)
        if options.multires_noise_iterations:
            noise_CHW = noise_CHW + self._pyramid_noise(latent_chw, *place)
        strength = self._strength(options.noise_offset, "noise offset", place, options.noise_offset_random_strength)
        if not options.offset_is_adaptive:
            noise_CHW = _finished(noise_CHW, None if offset_noise_C11 is None else strength * offset_noise_C11, options)
        low, high = options.timestep_range
        return NoiseDraw(
            noise_CHW=noise_CHW,
            timestep=python_random(self.seed, "timestep", *place).randrange(low, max(high, low + 1)),
            offset_noise_C11=offset_noise_C11 if options.offset_is_adaptive else None,
            noise_offset=torch.tensor(strength) if options.offset_is_adaptive else None,
            input_perturbation_CHW=self._input_perturbation(latent_chw, *place),
        )

    def _pyramid_noise(self, latent_chw: tuple[int, int, int], epoch: int, sample_id: int) -> torch.Tensor:
        generator = torch_generator(self.seed, "pyramid noise", epoch, sample_id)
        options = self.options
        return pyramid_noise(
            latent_chw, options.multires_noise_iterations or 0, options.multires_noise_discount, generator
        )

    def _input_perturbation(self, latent_chw: tuple[int, int, int], epoch: int, sample_id: int) -> torch.Tensor | None:
        """gamma * xi, xi from N(0, 1) (Ning et al. 2023, "Input Perturbation Reduces Exposure Bias", algorithm 1)."""
        options, purpose = self.options, "input perturbation"
        if not options.ip_noise_gamma:
            return None
        gamma = self._strength(
            options.ip_noise_gamma, purpose, (epoch, sample_id), options.ip_noise_gamma_random_strength
        )
        return gamma * torch.randn(latent_chw, generator=torch_generator(self.seed, purpose, epoch, sample_id))

    def _strength(self, highest: float | None, purpose: str, place: tuple[int, int], is_random: bool) -> float:
        """`highest`, or a number drawn uniformly from [0, highest) for the sample."""
        share = python_random(self.seed, f"{purpose} strength", *place).random() if is_random else 1.0
        return (highest or 0.0) * share


def pyramid_noise(
    latent_chw: tuple[int, int, int], iterations: int, discount: float, generator: torch.Generator
) -> torch.Tensor:
    """Noise of ever lower resolution, enlarged, each level weaker by `discount` than the one before (Whitaker 2023).

    Level i is smaller by r^i, r uniform in [2, 4) and drawn for each level; the first with a side of 1 is the last.
    """
    channels, height, width = latent_chw
    total_CHW = torch.zeros(latent_chw)
    for level in range(iterations):
        shrink = (2.0 + 2.0 * torch.rand((), generator=generator).item()) ** level
        size_hw = (max(1, int(height / shrink)), max(1, int(width / shrink)))
        level_1CHW = torch.randn((1, channels, *size_hw), generator=generator)
        enlarged_1CHW = interpolate(level_1CHW, (height, width), mode="bilinear", align_corners=False)
        total_CHW += discount**level * enlarged_1CHW[0]
        if min(size_hw) == 1:
            break
    return total_CHW


def complete_noise(batch: Batch, latents_BCHW: torch.Tensor, options: NoiseOptions) -> Batch:
    """The batch with all of its noise: what depends on the latents (scaled, float32) is added on their device.

    The offset's strength is max(0, noise_offset + adaptive_noise_scale * |mean of the latents|) per sample and channel.
    """
    if batch.offset_noise_BC11 is None:
        return batch
    assert batch.noise_offset_B is not None and options.adaptive_noise_scale is not None
    mean_BC11 = latents_BCHW.mean(dim=(2, 3), keepdim=True).abs()
    strength_BC11 = batch.noise_offset_B.view(-1, 1, 1, 1) + options.adaptive_noise_scale * mean_BC11
    noise_BCHW = _finished(batch.noise_BCHW, strength_BC11.clamp(min=0.0) * batch.offset_noise_BC11, options)
    return replace(batch, noise_BCHW=noise_BCHW, offset_noise_BC11=None, noise_offset_B=None)


def noised_latents(latents_BCHW: torch.Tensor, batch: Batch, schedule: NoiseSchedule) -> torch.Tensor:
    """What the model sees: latents mixed with the batch's noise and, where there is one, its input perturbation."""
    noise_BCHW = batch.noise_BCHW
    if batch.input_perturbation_BCHW is not None:
        noise_BCHW = noise_BCHW + batch.input_perturbation_BCHW
    return schedule.add_noise(latents_BCHW, noise_BCHW, batch.timesteps_B)


def _finished(noise_CHW: torch.Tensor, offset_CHW: torch.Tensor | None, options: NoiseOptions) -> torch.Tensor:
    """Noise and offset together; pyramid noise is brought back to a standard deviation of 1 within each sample.

    The deviation of a whole batch would make a sample's noise depend on what shares its batch.
    """
    if offset_CHW is not None:
        noise_CHW = noise_CHW + offset_CHW
    if options.multires_noise_iterations:
        noise_CHW = noise_CHW / noise_CHW.std(dim=(-3, -2, -1), keepdim=True)
    return noise_CHW
