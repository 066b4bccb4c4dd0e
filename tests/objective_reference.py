"""The objective in numpy and float64, written from the papers' formulas: what the tests of loss and noise compare with.

Shape letters: B samples, C channels, H W latent pixels, T = 1000 timesteps.
"""

from __future__ import annotations

import numpy as np
import torch

from library.data.batch import Batch
from library.diffusion.options import LossOptions


def alphas_cumprod_T(*, zero_terminal_snr: bool = False) -> np.ndarray:
    """DDPM with scaled-linear betas; with zero terminal SNR as in Lin et al. 2023, algorithm 1, betas and all."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    if zero_terminal_snr:
        roots = np.sqrt(alphas_cumprod)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = np.concatenate([roots[:1] ** 2, roots[1:] ** 2 / roots[:-1] ** 2])
        alphas_cumprod = np.cumprod(1 - (1 - alphas))
    return alphas_cumprod


def snr_T(*, zero_terminal_snr: bool = False) -> np.ndarray:
    alphas_cumprod = alphas_cumprod_T(zero_terminal_snr=zero_terminal_snr)
    return alphas_cumprod / (1 - alphas_cumprod)


def error(difference: np.ndarray, timesteps_B: np.ndarray, options: LossOptions, snr: np.ndarray) -> np.ndarray:
    """Elementwise error of differences (B, C, H, W); `snr` of each timestep's schedule (T,)."""
    c0, scale = options.huber_c, options.huber_scale
    with np.errstate(divide="ignore"):
        sigma_B = 1 / np.sqrt(snr[timesteps_B])  # noise over signal; infinite where there is no signal
    c = {
        "constant": np.full(len(timesteps_B), c0 * scale),
        "exponential": np.exp(np.log(c0) * timesteps_B / 1000) * scale,
        "snr": (1 - c0) / (1 + sigma_B) ** 2 + c0,
    }[options.huber_schedule].reshape(-1, 1, 1, 1)
    return {
        "l2": difference**2,
        "l1": np.abs(difference),
        "huber": 2 * c * (np.sqrt(difference**2 + c**2) - c),
        "smooth_l1": 2 * (np.sqrt(difference**2 + c**2) - c),
    }[options.loss_type]


def timestep_weight(loss_B: np.ndarray, snr_B: np.ndarray, options: LossOptions, *, v_prediction: bool) -> np.ndarray:
    """Losses with the weights of their timesteps; SNRs below that of the usual last timestep count as that one's."""
    floor = alphas_cumprod_T()[-1] / (1 - alphas_cumprod_T()[-1])
    m = np.minimum(snr_B, 1000)
    if options.min_snr_gamma:
        gamma = options.min_snr_gamma
        divisor = snr_B + 1 if v_prediction else np.maximum(snr_B, 1e-30)
        loss_B = loss_B * np.minimum(snr_B if v_prediction else np.maximum(snr_B, 1e-30), gamma) / divisor
    if options.scale_v_pred_loss_like_noise_pred:
        loss_B = loss_B * m / (m + 1)
    if options.v_pred_like_loss:
        loss_B = loss_B + options.v_pred_like_loss * loss_B * (np.maximum(m, floor) + 1) / np.maximum(m, floor)
    if options.debiased_estimation_loss:
        loss_B = loss_B / (m + 1) if v_prediction else loss_B / np.sqrt(np.maximum(m, floor))
    return loss_B


def bilinear(image_CHW: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Enlarged to `size_hw`; pixel centres at (i + 1/2), edges repeated."""
    for axis, size in zip((1, 2), size_hw, strict=True):
        old = image_CHW.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, None)
        low = np.minimum(place.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape([-1 if index == axis else 1 for index in range(3)])
        image_CHW = (1 - share) * np.take(image_CHW, low, axis) + share * np.take(image_CHW, high, axis)
    return image_CHW


def batch_of(timesteps, *, weights=None, denominator=None, noise_BCHW=None, device="cpu", **fields) -> Batch:
    """A batch that is nothing but its noise and timesteps, 4x4 latents unless noise is given."""
    count = len(timesteps)
    if noise_BCHW is None:
        noise_BCHW = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    pairs = torch.zeros(count, 2, dtype=torch.long, device=device)
    return Batch(
        noise_BCHW=noise_BCHW.to(device),
        timesteps_B=torch.tensor(timesteps, device=device),
        token_ids=(),
        captions=("",) * count,
        loss_weight_B=torch.tensor(weights or [1.0] * count, device=device),
        denominator=denominator or count,
        original_hw_B2=pairs,
        crop_yx_B2=pairs,
        target_hw_B2=pairs,
        image_names=("x",) * count,
        **fields,
    )
