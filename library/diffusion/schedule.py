"""The noise schedule of Stable Diffusion: DDPM with 1000 steps of scaled-linear betas, 0.00085 to 0.012.

Shape letters: B samples, C channels, H W latent pixels, T = 1000 timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables over timesteps (float32), on the device where training runs; indexing them never leaves the device."""

    alphas_cumprod_T: torch.Tensor  # the product of (1 - beta), called alpha-bar in DDPM (Ho et al. 2020)
    snr_T: torch.Tensor  # signal-to-noise ratio, alpha-bar / (1 - alpha-bar)

    @classmethod
    def make(cls, *, zero_terminal_snr: bool = False, device: torch.device | str = "cpu") -> NoiseSchedule:
        betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if zero_terminal_snr:
            alphas_cumprod = rescaled_to_zero_terminal_snr(alphas_cumprod)
        snr = alphas_cumprod / (1.0 - alphas_cumprod)
        return cls(alphas_cumprod.float().to(device), snr.float().to(device))

    def add_noise(
        self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise (DDPM, equation 4)."""
        signal, noise = self._scales(timesteps_B, latents_BCHW)
        return signal * latents_BCHW + noise * noise_BCHW

    def velocity(self, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        """v_t = sqrt(alpha-bar_t) noise - sqrt(1 - alpha-bar_t) x_0 (Salimans and Ho 2022, appendix D)."""
        signal, noise = self._scales(timesteps_B, latents_BCHW)
        return signal * noise_BCHW - noise * latents_BCHW

    def _scales(self, timesteps_B: torch.Tensor, like_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas_cumprod = self.alphas_cumprod_T[timesteps_B].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt().to(like_BCHW.dtype), (1.0 - alphas_cumprod).sqrt().to(like_BCHW.dtype)


def rescaled_to_zero_terminal_snr(alphas_cumprod_T: torch.Tensor) -> torch.Tensor:
    """alpha-bar shifted and scaled so that its last value is 0 and its first stays (Lin et al. 2023, algorithm 1)."""
    roots = alphas_cumprod_T.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * first / (first - last)) ** 2
