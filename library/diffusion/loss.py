"""From prediction to loss: elementwise error, mean per sample, sample weight, timestep weightings, mean.

Weightings are plain functions (loss_B, snr_B) -> loss_B and are applied in the order of `timestep_weightings`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from library.data.batch import Batch
from library.diffusion.options import LossOptions
from library.diffusion.schedule import NoiseSchedule

Weighting = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
HIGHEST_SNR = 1000.0  # keeps the weights of the first timesteps within reach


def training_target(
    latents_BCHW: torch.Tensor, batch: Batch, schedule: NoiseSchedule, *, v_prediction: bool
) -> torch.Tensor:
    """What the model should predict: the noise, or the velocity."""
    if v_prediction:
        return schedule.velocity(latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
    return batch.noise_BCHW


def diffusion_loss(
    prediction_BCHW: torch.Tensor,
    target_BCHW: torch.Tensor,
    batch: Batch,
    schedule: NoiseSchedule,
    weightings: tuple[Weighting, ...],
) -> torch.Tensor:
    """The batch's loss, a float32 scalar: this process's share of the mean over the real samples of all processes."""
    loss_B = (prediction_BCHW.float() - target_BCHW.float()).square().mean(dim=(1, 2, 3))
    loss_B = loss_B * batch.loss_weight_B
    snr_B = schedule.snr_T[batch.timesteps_B]
    for weighting in weightings:
        loss_B = weighting(loss_B, snr_B)
    return loss_B.sum() / batch.denominator


def timestep_weightings(options: LossOptions, *, v_prediction: bool) -> tuple[Weighting, ...]:
    """The weightings that are switched on, in the order in which they apply."""
    weightings: list[Weighting] = []
    if options.min_snr_gamma:
        weightings.append(min_snr(options.min_snr_gamma, v_prediction=v_prediction))
    if options.scale_v_pred_loss_like_noise_pred:
        weightings.append(like_noise_prediction)
    if options.v_pred_like_loss:
        weightings.append(with_share_like_v_prediction(options.v_pred_like_loss))
    return tuple(weightings)


def min_snr(gamma: float, *, v_prediction: bool) -> Weighting:
    """min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for velocity (Hang et al. 2023, section 3.4)."""

    def weigh(loss_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
        if v_prediction:
            return loss_B * snr_B.clamp(max=gamma) / (snr_B + 1.0)
        return loss_B * (gamma / snr_B).clamp(max=1.0)

    return weigh


def like_noise_prediction(loss_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
    """Velocity error weighted as noise error: SNR / (SNR + 1)."""
    return loss_B * _noise_like_scale(snr_B)


def with_share_like_v_prediction(share: float) -> Weighting:
    """Noise error plus `share` times the same error weighted as velocity error."""

    def weigh(loss_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
        return loss_B + share * loss_B / _noise_like_scale(snr_B)

    return weigh


def _noise_like_scale(snr_B: torch.Tensor) -> torch.Tensor:
    snr_B = snr_B.clamp(max=HIGHEST_SNR)
    return snr_B / (snr_B + 1.0)
