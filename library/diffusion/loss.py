"""From prediction to loss: elementwise error, mask, mean per sample, sample weight, timestep weightings, mean.

Weightings are plain functions (loss_B, snr_B) -> loss_B and are applied in the order of `timestep_weightings`. Nothing
here decides by a tensor's value, so nothing makes the host wait for the device.

Shape letters: B samples, C channels, H W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from library.data.batch import Batch
from library.diffusion.options import LossOptions
from library.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule

Weighting = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
HIGHEST_SNR = 1000.0  # keeps the weights of the first timesteps within reach
# the same for the last timesteps, where zero terminal SNR has an SNR of (almost) 0 and a weight that divides by it has
# no bound: the lowest SNR of the schedule without it, rounded down
LOWEST_SNR = 0.0046819


def training_target(
    latents_BCHW: torch.Tensor, batch: Batch, schedule: NoiseSchedule, *, v_prediction: bool
) -> torch.Tensor:
    """What the model should predict: the noise without input perturbation, or the velocity made of it."""
    if v_prediction:
        return schedule.velocity(latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
    return batch.noise_BCHW


def diffusion_loss(
    prediction_BCHW: torch.Tensor,
    target_BCHW: torch.Tensor,
    batch: Batch,
    schedule: NoiseSchedule,
    options: LossOptions,
    *,
    v_prediction: bool,
) -> torch.Tensor:
    """The batch's loss, a float32 scalar: this process's share of the mean over the real samples of all processes."""
    loss_B = sample_losses(prediction_BCHW, target_BCHW, batch, schedule, options, v_prediction=v_prediction)
    return loss_B.sum() / batch.denominator


def sample_losses(
    prediction_BCHW: torch.Tensor,
    target_BCHW: torch.Tensor,
    batch: Batch,
    schedule: NoiseSchedule,
    options: LossOptions,
    *,
    v_prediction: bool,
) -> torch.Tensor:
    """Each sample's loss, float32 (B,), with its weight and the weights of its timestep."""
    difference_BCHW = prediction_BCHW.float() - target_BCHW.float()
    error_BCHW = elementwise_error(difference_BCHW, batch.timesteps_B, schedule, options)
    if batch.mask_B1HW is not None:
        error_BCHW = error_BCHW * batch.mask_B1HW
    loss_B = error_BCHW.mean(dim=(1, 2, 3)) * batch.loss_weight_B
    snr_B = schedule.snr_T[batch.timesteps_B]
    for weighting in timestep_weightings(options, v_prediction=v_prediction):
        loss_B = weighting(loss_B, snr_B)
    return loss_B


# ---------------------------------------------------------------------------------------------- error


def elementwise_error(
    difference_BCHW: torch.Tensor, timesteps_B: torch.Tensor, schedule: NoiseSchedule, options: LossOptions
) -> torch.Tensor:
    """How much each difference d counts: d^2, |d|, or the pseudo-Huber loss of --huber_c and its schedule.

    With the threshold c, "huber" is 2c (sqrt(d^2 + c^2) - c), which is near d^2 for small d, and "smooth_l1" is
    2 (sqrt(d^2 + c^2) - c), which is near 2|d| for large d (Khrapov et al. 2024, section 3). Both are computed as
    d^2 / (sqrt(d^2 + c^2) + c), the same number without the difference of two near ones.
    """
    if options.loss_type == "l2":
        return difference_BCHW.square()
    if options.loss_type == "l1":
        return difference_BCHW.abs()
    threshold_B111 = huber_threshold(timesteps_B, schedule, options).view(-1, 1, 1, 1)
    square_BCHW = difference_BCHW.square()
    error_BCHW = 2.0 * square_BCHW / ((square_BCHW + threshold_B111.square()).sqrt() + threshold_B111)
    return error_BCHW * threshold_B111 if options.loss_type == "huber" else error_BCHW


def huber_threshold(timesteps_B: torch.Tensor, schedule: NoiseSchedule, options: LossOptions) -> torch.Tensor:
    """The c of the pseudo-Huber loss at each timestep, float32 (B,), above 0 (Khrapov et al. 2024, section 4).

    With c0 = --huber_c, both schedules fall from 1 without noise to c0: c0^(t / 1000), and (1 - c0) / (1 + sigma)^2
    + c0, where sigma = 1 / sqrt(SNR).
    """
    c0 = options.huber_c
    if options.huber_schedule == "exponential":
        return options.huber_scale * c0 ** (timesteps_B.float() / NUM_TIMESTEPS)
    if options.huber_schedule == "constant":
        return torch.full_like(timesteps_B, options.huber_scale * c0, dtype=torch.float32)
    root_snr_B = schedule.snr_T[timesteps_B].sqrt()
    return (1.0 - c0) * (root_snr_B / (root_snr_B + 1.0)).square() + c0


# ---------------------------------------------------------------------------------------------- weights of timesteps


def timestep_weightings(options: LossOptions, *, v_prediction: bool) -> tuple[Weighting, ...]:
    """The weightings that are switched on, in the order in which they apply."""
    weightings: list[Weighting] = []
    if options.min_snr_gamma:
        weightings.append(min_snr(options.min_snr_gamma, v_prediction=v_prediction))
    if options.scale_v_pred_loss_like_noise_pred:
        weightings.append(like_noise_prediction)
    if options.v_pred_like_loss:
        weightings.append(with_share_like_v_prediction(options.v_pred_like_loss))
    if options.debiased_estimation_loss:
        weightings.append(debiased_for_velocity if v_prediction else debiased)
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
    snr_B = snr_B.clamp(max=HIGHEST_SNR)
    return loss_B * snr_B / (snr_B + 1.0)


def with_share_like_v_prediction(share: float) -> Weighting:
    """Noise error plus `share` times the same error weighted as velocity error, (SNR + 1) / SNR."""

    def weigh(loss_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
        snr_B = snr_B.clamp(LOWEST_SNR, HIGHEST_SNR)
        return loss_B + share * loss_B * (snr_B + 1.0) / snr_B

    return weigh


def debiased(loss_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
    """Noise error weighted by 1 / sqrt(SNR) (Yu et al. 2023, "Debias the Training of Diffusion Models")."""
    return loss_B / snr_B.clamp(LOWEST_SNR, HIGHEST_SNR).sqrt()


def debiased_for_velocity(loss_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
    """The same for velocity error: 1 / (SNR + 1)."""
    return loss_B / (snr_B.clamp(max=HIGHEST_SNR) + 1.0)
