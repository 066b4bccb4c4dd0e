"""The loss: each weighting against its formula, fillers, and the sum over processes."""

import pytest
import torch

from library.data.batch import Batch
from library.diffusion.loss import diffusion_loss, timestep_weightings, training_target
from library.diffusion.options import LossOptions
from library.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.make()


def batch_of(timesteps, weights=None, denominator=None):
    count = len(timesteps)
    generator = torch.Generator().manual_seed(7)
    return Batch(
        noise_BCHW=torch.randn(count, 4, 4, 4, generator=generator),
        timesteps_B=torch.tensor(timesteps),
        token_ids=(),
        captions=("",) * count,
        loss_weight_B=torch.tensor(weights or [1.0] * count),
        denominator=denominator or count,
        original_hw_B2=torch.zeros(count, 2, dtype=torch.long),
        crop_yx_B2=torch.zeros(count, 2, dtype=torch.long),
        target_hw_B2=torch.zeros(count, 2, dtype=torch.long),
        image_names=("x",) * count,
    )


def unit_error_loss(timesteps, options, v_prediction=False, **kwargs):
    """The loss where every element of every sample is off by exactly 1, so that only weights remain."""
    batch = batch_of(timesteps, **kwargs)
    weightings = timestep_weightings(options, v_prediction=v_prediction)
    return diffusion_loss(batch.noise_BCHW + 1, batch.noise_BCHW, batch, SCHEDULE, weightings).item()


def test_mean_over_batch():
    assert unit_error_loss([5, 500], LossOptions()) == pytest.approx(1.0)


@pytest.mark.parametrize(("timestep", "weight"), [(0, 0.0042536), (100, 0.5914), (146, 1.0), (147, 1.0), (900, 1.0)])
def test_min_snr_for_noise(timestep, weight):
    assert unit_error_loss([timestep], LossOptions(min_snr_gamma=5.0)) == pytest.approx(
        weight, rel=2e-2 if timestep == 146 else 2e-4
    )


@pytest.mark.parametrize("timestep", [0, 100, 500, 999])
def test_min_snr_for_velocity(timestep):
    snr = SCHEDULE.snr_T[timestep].item()
    expected = min(snr, 5.0) / (snr + 1)
    assert unit_error_loss([timestep], LossOptions(min_snr_gamma=5.0), v_prediction=True) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("timestep", [0, 100, 999])
def test_velocity_weighted_like_noise(timestep):
    snr = min(SCHEDULE.snr_T[timestep].item(), 1000.0)
    options = LossOptions(scale_v_pred_loss_like_noise_pred=True)
    assert unit_error_loss([timestep], options, v_prediction=True) == pytest.approx(snr / (snr + 1), rel=1e-5)


@pytest.mark.parametrize("timestep", [0, 100, 999])
def test_share_weighted_like_velocity(timestep):
    snr = min(SCHEDULE.snr_T[timestep].item(), 1000.0)
    expected = 1 + 0.25 * (snr + 1) / snr
    assert unit_error_loss([timestep], LossOptions(v_pred_like_loss=0.25)) == pytest.approx(expected, rel=1e-5)


def test_two_processes_sum_to_one():
    """Mean over processes of both shares = the loss of the whole batch, also where the last share has a filler."""
    whole = unit_error_loss([1, 2, 3], LossOptions(), weights=[1.0, 0.5, 1.0])
    shares = [
        unit_error_loss([1, 2], LossOptions(), weights=[1.0, 0.5], denominator=1.5),
        unit_error_loss([3, 3], LossOptions(), weights=[1.0, 0.0], denominator=1.5),
    ]
    assert sum(shares) / 2 == pytest.approx(whole)


def test_targets():
    batch, latents = batch_of([10, 700]), torch.randn(2, 4, 4, 4)
    assert training_target(latents, batch, SCHEDULE, v_prediction=False) is batch.noise_BCHW
    velocity = training_target(latents, batch, SCHEDULE, v_prediction=True)
    noised = SCHEDULE.add_noise(latents, batch.noise_BCHW, batch.timesteps_B)
    alpha = SCHEDULE.alphas_cumprod_T[batch.timesteps_B].view(-1, 1, 1, 1)
    # velocity and noised picture together give back the latents: x_0 = sqrt(alpha) x_t - sqrt(1 - alpha) v
    torch.testing.assert_close(alpha.sqrt() * noised - (1 - alpha).sqrt() * velocity, latents, rtol=1e-4, atol=1e-5)
