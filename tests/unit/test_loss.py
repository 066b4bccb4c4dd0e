"""The loss: each error and weighting against its formula, masks, fillers, and the sum over processes."""

import itertools

import numpy as np
import pytest
import torch

from library.diffusion.loss import diffusion_loss, huber_threshold, sample_losses, training_target
from library.diffusion.options import LossOptions
from library.diffusion.schedule import NoiseSchedule
from library.options import OptionError
from tests import objective_reference as reference
from tests.objective_reference import batch_of

SCHEDULE = NoiseSchedule.make()
TIMESTEPS = [0, 1, 100, 500, 900, 998, 999]
HUBER = [
    {"loss_type": loss, "huber_schedule": schedule}
    for loss in ("huber", "smooth_l1")
    for schedule in ("constant", "exponential", "snr")
]
ERRORS = [{"loss_type": "l2"}, {"loss_type": "l1"}, *HUBER]
WEIGHTS = [
    {**gamma, **share, **debiased}
    for gamma in ({}, {"min_snr_gamma": 5.0})
    for share in ({}, {"v_pred_like_loss": 0.25})
    for debiased in ({}, {"debiased_estimation_loss": True})
]
VELOCITY_WEIGHTS = [
    {**gamma, **scale, **debiased}
    for gamma in ({}, {"min_snr_gamma": 5.0})
    for scale in ({}, {"scale_v_pred_loss_like_noise_pred": True})
    for debiased in ({}, {"debiased_estimation_loss": True})
]
COMBINATIONS = [(weights, False) for weights in WEIGHTS] + [(weights, True) for weights in VELOCITY_WEIGHTS]


def unit_error_loss(timesteps, options, v_prediction=False, schedule=SCHEDULE, **kwargs):
    """The loss where every element of every sample is off by exactly 1, so that only weights remain."""
    batch = batch_of(timesteps, **kwargs)
    return diffusion_loss(
        batch.noise_BCHW + 1, batch.noise_BCHW, batch, schedule, options, v_prediction=v_prediction
    ).item()


def test_mean_over_batch():
    assert unit_error_loss([5, 500], LossOptions()) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- weights of timesteps


@pytest.mark.parametrize(("timestep", "weight"), [(0, 0.0042536), (100, 0.5914), (146, 1.0), (147, 1.0), (900, 1.0)])
def test_min_snr_for_noise(timestep, weight):
    assert unit_error_loss([timestep], LossOptions(min_snr_gamma=5.0)) == pytest.approx(
        weight, rel=2e-2 if timestep == 146 else 2e-4
    )


@pytest.mark.parametrize("timestep", [0, 100, 500, 999])
def test_min_snr_for_velocity(timestep):
    snr = reference.snr_T()[timestep]
    expected = min(snr, 5.0) / (snr + 1)
    assert unit_error_loss([timestep], LossOptions(min_snr_gamma=5.0), v_prediction=True) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("timestep", [0, 100, 999])
def test_velocity_weighted_like_noise(timestep):
    snr = min(reference.snr_T()[timestep], 1000.0)
    options = LossOptions(scale_v_pred_loss_like_noise_pred=True)
    assert unit_error_loss([timestep], options, v_prediction=True) == pytest.approx(snr / (snr + 1), rel=1e-5)


@pytest.mark.parametrize("timestep", [0, 100, 999])
def test_share_weighted_like_velocity(timestep):
    snr = min(reference.snr_T()[timestep], 1000.0)
    expected = 1 + 0.25 * (snr + 1) / snr
    assert unit_error_loss([timestep], LossOptions(v_pred_like_loss=0.25)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("timestep", "noise_weight", "velocity_weight"),
    [  # 1 / sqrt(SNR) and 1 / (SNR + 1) of 1000 (the highest that counts), 8.4538937, 0.38185044, 0.00468192
        (0, 0.0316228, 0.000999001), (100, 0.343931, 0.105776), (500, 1.618280, 0.723667), (999, 14.61472, 0.995340),
    ],
)  # fmt: skip
def test_debiased_estimation(timestep, noise_weight, velocity_weight):
    options = LossOptions(debiased_estimation_loss=True)
    assert unit_error_loss([timestep], options) == pytest.approx(noise_weight, rel=2e-5)
    assert unit_error_loss([timestep], options, v_prediction=True) == pytest.approx(velocity_weight, rel=2e-5)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("schedule", "scale", "timestep", "expected"),
    [
        ("constant", 1.0, 0, 0.1),
        ("constant", 3.0, 700, 0.3),
        ("exponential", 1.0, 0, 1.0),
        ("exponential", 1.0, 500, 0.1**0.5),
        ("exponential", 2.0, 900, 2 * 0.1**0.9),
        ("snr", 1.0, 0, 0.9 / (1 + 1175.4706**-0.5) ** 2 + 0.1),
        ("snr", 1.0, 500, 0.9 / (1 + 0.38185044**-0.5) ** 2 + 0.1),
        ("snr", 5.0, 500, 0.9 / (1 + 0.38185044**-0.5) ** 2 + 0.1),  # has no scale
    ],
)
def test_huber_threshold(schedule, scale, timestep, expected):
    options = LossOptions(loss_type="huber", huber_schedule=schedule, huber_scale=scale)
    (threshold,) = huber_threshold(torch.tensor([timestep]), SCHEDULE, options).tolist()
    assert threshold == pytest.approx(expected, rel=1e-5)


def test_huber_is_squared_near_zero_and_absolute_far_away():
    """2c (sqrt(d^2 + c^2) - c) -> d^2 for d << c and 2c|d| for d >> c; small differences keep their digits."""
    options = LossOptions(loss_type="huber", huber_schedule="constant", huber_c=0.5)
    batch = batch_of([10])
    for difference, expected in ((1e-4, 1e-8), (1e4, 1e4 - 0.5)):
        loss = diffusion_loss(
            torch.full((1, 4, 4, 4), difference), torch.zeros(1, 4, 4, 4), batch, SCHEDULE, options, v_prediction=False
        )
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: "-".join(error.values()))
def test_every_combination_follows_the_formulas(error, zero_terminal_snr):
    """All errors x all weightings x masks against numpy in float64, and nothing infinite anywhere."""
    generator = torch.Generator().manual_seed(1)
    prediction, target = (torch.randn(len(TIMESTEPS), 4, 4, 4, generator=generator) for _ in range(2))
    weights = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0]
    mask = torch.rand(len(TIMESTEPS), 1, 4, 4, generator=generator)
    schedule = NoiseSchedule.make(zero_terminal_snr=zero_terminal_snr)
    snr = reference.snr_T(zero_terminal_snr=zero_terminal_snr)
    steps = np.array(TIMESTEPS)
    for (settings, v_prediction), mask_B1HW in itertools.product(COMBINATIONS, (None, mask)):
        options = LossOptions(**error, **settings)
        batch = batch_of(TIMESTEPS, weights=weights, mask_B1HW=mask_B1HW)
        found = sample_losses(prediction, target, batch, schedule, options, v_prediction=v_prediction)
        elementwise = reference.error((prediction.double() - target.double()).numpy(), steps, options, snr)
        if mask_B1HW is not None:
            elementwise = elementwise * mask_B1HW.double().numpy()
        loss_B = elementwise.mean(axis=(1, 2, 3)) * np.array(weights)
        expected = reference.timestep_weight(loss_B, snr[steps], options, v_prediction=v_prediction)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_losses_and_gradients_are_always_finite(zero_terminal_snr):
    """Also where prediction and target are equal, far apart, and at every timestep; times 0 for fillers."""
    schedule = NoiseSchedule.make(zero_terminal_snr=zero_terminal_snr)
    timesteps = list(range(1000))
    batch = batch_of(timesteps, weights=[float(step % 3 != 0) for step in timesteps])
    noise = batch.noise_BCHW
    for error, (settings, v_prediction), offset in itertools.product(ERRORS, COMBINATIONS, (0.0, 1e-30, 1e6)):
        prediction = (noise + offset).requires_grad_()
        options = LossOptions(**error, **settings, huber_c=1e-4)
        loss = diffusion_loss(prediction, noise, batch, schedule, options, v_prediction=v_prediction)
        loss.backward()
        assert loss.isfinite() and prediction.grad.isfinite().all(), (error, settings, v_prediction, offset)


def test_zero_terminal_snr_has_no_weight_above_the_usual_schedules_highest():
    """Weights that divide by an SNR of 0 stay at what the last timestep has without rescaling."""
    zero = NoiseSchedule.make(zero_terminal_snr=True)
    for options in (LossOptions(debiased_estimation_loss=True), LossOptions(v_pred_like_loss=1.0)):
        usual = unit_error_loss([999], options)
        assert unit_error_loss([999], options, schedule=zero) == pytest.approx(usual, rel=1e-5)
        assert unit_error_loss([998], options, schedule=zero) == pytest.approx(usual, rel=1e-5)


# ---------------------------------------------------------------------------------------------- masks, processes


def test_a_mask_weights_each_pixel_before_the_mean():
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, :2] = 1.0  # 2 of 16 pixels count
    mask[1] = 0.5
    batch = batch_of([5, 500], mask_B1HW=mask)
    losses = sample_losses(
        batch.noise_BCHW + 1, batch.noise_BCHW, batch, SCHEDULE, LossOptions(masked_loss=True), v_prediction=False
    )
    torch.testing.assert_close(losses, torch.tensor([2 / 16, 0.5]))


def test_masked_pixels_have_no_gradient():
    mask = (torch.arange(16).view(1, 1, 4, 4) < 8).float()
    batch = batch_of([5], mask_B1HW=mask)
    prediction = (batch.noise_BCHW + 1).requires_grad_()
    diffusion_loss(prediction, batch.noise_BCHW, batch, SCHEDULE, LossOptions(), v_prediction=False).backward()
    assert torch.equal(prediction.grad != 0, mask.bool().expand(1, 4, 4, 4))


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


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"huber_c": 0.0}, "--huber_c"),
        ({"huber_c": -1.0, "loss_type": "huber"}, "--huber_c"),
        ({"huber_scale": 0.0}, "--huber_scale"),
        ({"min_snr_gamma": 0.0}, "--min_snr_gamma"),
        ({"v_pred_like_loss": -0.1}, "--v_pred_like_loss"),
    ],
)
def test_values_out_of_range(settings, flag):
    with pytest.raises(OptionError, match=f"^{flag}: "):
        LossOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({}, None),
        ({"loss_type": "huber", "huber_c": 0.2}, None),
        ({"loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_scale": 2.0}, None),
        ({"huber_c": 0.2}, "--huber_c has no effect with --loss_type l2"),
        (
            {"huber_c": 0.2, "huber_schedule": "constant", "loss_type": "l1"},
            "--huber_schedule and --huber_c have no effect with --loss_type l1",
        ),
        ({"loss_type": "huber", "huber_scale": 2.0}, "--huber_scale has no effect with --huber_schedule snr"),
        (
            {"debiased_estimation_loss": True, "min_snr_gamma": 5.0},
            "--debiased_estimation_loss and --min_snr_gamma both weight timesteps: their weights are multiplied",
        ),
    ],
)
def test_notes(settings, note):
    assert LossOptions(**settings).notes() == ([note] if note else [])
