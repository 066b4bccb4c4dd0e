"""Noise and timesteps of one training sample, drawn where the sample is loaded.

Every draw is a function of (seed, epoch, sample id), so it is the same whatever the batch size, the number of workers
and processes, and wherever a run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.diffusion.options import NoiseOptions
from library.randomness import python_random, torch_generator


@dataclass(frozen=True)
class NoiseSource:
    """Draws the noise and timestep of a sample; plain data, so that it travels to worker processes."""

    options: NoiseOptions
    seed: int

    def __call__(self, epoch: int, sample_id: int, latent_chw: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        """(noise, timestep): noise has the latent's shape, float32; the timestep is 0-999."""
        generator = torch_generator(self.seed, "noise", epoch, sample_id)
        noise_CHW = torch.randn(latent_chw, generator=generator)
        if self.options.noise_offset:
            noise_CHW += self.options.noise_offset * torch.randn((latent_chw[0], 1, 1), generator=generator)
        low, high = self.options.timestep_range
        timestep = python_random(self.seed, "timestep", epoch, sample_id).randrange(low, max(high, low + 1))
        return noise_CHW, timestep
