"""The noise schedule against values computed independently, and against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion.schedule import NoiseSchedule
from tests import objective_reference as reference

# t: (alpha-bar, signal-to-noise ratio, alpha-bar with zero terminal SNR)
VALUES = {
    0: (0.99915, 1175.4706, 0.99915),
    1: (0.99829603, 585.86405, 0.99823345),
    100: (0.89422348, 8.4538937, 0.88676128),
    500: (0.27633268, 0.38185044, 0.24101878),
    900: (0.01415114, 0.01435427, 0.00296039),
    999: (0.00466010, 0.00468192, 0.0),
}


@pytest.mark.parametrize(("timestep", "expected"), VALUES.items())
def test_tables(timestep, expected):
    alpha_bar, snr, rescaled = expected
    plain, zero = NoiseSchedule.make(), NoiseSchedule.make(zero_terminal_snr=True)
    assert plain.alphas_cumprod_T[timestep].item() == pytest.approx(alpha_bar, rel=2e-6)
    assert plain.snr_T[timestep].item() == pytest.approx(snr, rel=2e-4)
    assert zero.alphas_cumprod_T[timestep].item() == pytest.approx(rescaled, rel=2e-5, abs=1e-9)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_all_timesteps_against_the_formulas(zero_terminal_snr):
    """Lin et al. 2023 take the rescaled alphas apart into betas and multiply them up again: the same numbers."""
    schedule = NoiseSchedule.make(zero_terminal_snr=zero_terminal_snr)
    expected = reference.alphas_cumprod_T(zero_terminal_snr=zero_terminal_snr)
    np.testing.assert_allclose(schedule.alphas_cumprod_T.numpy(), expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(schedule.snr_T.numpy(), expected / (1 - expected), rtol=1e-5, atol=1e-12)


def test_last_but_one_timestep_with_zero_terminal_snr():
    assert NoiseSchedule.make(zero_terminal_snr=True).alphas_cumprod_T[998].item() == pytest.approx(
        1.9678881e-07, rel=1e-3
    )


def test_snr_follows_the_rescaled_betas():
    assert NoiseSchedule.make(zero_terminal_snr=True).snr_T[999].item() == 0.0


def test_noise_and_velocity_equal_diffusers():
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    schedule = NoiseSchedule.make()
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 411, 999])
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        schedule.velocity(latents, noise, timesteps), reference.get_velocity(latents, noise, timesteps)
    )
