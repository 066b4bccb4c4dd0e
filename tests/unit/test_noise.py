"""Noise and timesteps: each kind against its formula, and a draw that depends on nothing but seed, epoch and sample."""

import itertools

import numpy as np
import pytest
import torch

from library.data.batch import Batch
from library.data.options import AugmentOptions
from library.diffusion.loss import diffusion_loss, training_target
from library.diffusion.noise import NoiseSource, complete_noise, noised_latents
from library.diffusion.options import LossOptions, NoiseOptions
from library.diffusion.schedule import NoiseSchedule
from library.options import OptionError
from library.randomness import torch_generator
from tests import objective_reference as reference
from tests.objective_reference import batch_of
from tests.tiny_data import tiny_images
from tests.tiny_runs import assert_equal, batches, build

SHAPE = (4, 12, 20)
EVERYTHING = NoiseOptions(
    noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=0.2, multires_noise_iterations=6,
    ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True,
)  # fmt: skip


def draw(shape=SHAPE, *, seed=1, epoch=1, sample=7, **options):
    return NoiseSource(NoiseOptions(**options), seed)(epoch, sample, shape)


def batch_from(draws) -> Batch:
    """What the loader makes of draws of one shape."""
    stacked = [torch.stack([getattr(one, name) for one in draws]) if getattr(draws[0], name) is not None else None
               for name in ("offset_noise_C11", "noise_offset", "input_perturbation_CHW")]  # fmt: skip
    return batch_of(
        [one.timestep for one in draws],
        noise_BCHW=torch.stack([one.noise_CHW for one in draws]),
        offset_noise_BC11=stacked[0],
        noise_offset_B=stacked[1],
        input_perturbation_BCHW=stacked[2],
    )


def completed(latents_BCHW, draws, **options):
    return complete_noise(batch_from(draws), latents_BCHW, NoiseOptions(**options)).noise_BCHW


# ---------------------------------------------------------------------------------------------- what depends on what


def test_a_draw_is_a_function_of_seed_epoch_and_sample():
    source = NoiseSource(EVERYTHING, 1)
    first = source(1, 7, SHAPE)
    again = source(1, 7, SHAPE)
    assert first.timestep == again.timestep
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if isinstance(a, torch.Tensor)) and not any(
        value is None for value in first
    )
    for other in (NoiseSource(EVERYTHING, 2)(1, 7, SHAPE), source(2, 7, SHAPE), source(1, 8, SHAPE)):
        for name in ("noise_CHW", "offset_noise_C11", "noise_offset", "input_perturbation_CHW"):
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_no_option_changes_what_another_draws():
    plain, offset = draw(), draw(noise_offset=0.1)
    both = draw(noise_offset=0.1, ip_noise_gamma=0.1, multires_noise_iterations=3, min_timestep=0)
    assert plain.timestep == offset.timestep == both.timestep
    assert torch.equal(both.input_perturbation_CHW, draw(ip_noise_gamma=0.1).input_perturbation_CHW)
    waiting = draw(noise_offset=0.1, adaptive_noise_scale=0.3)
    assert torch.equal(waiting.noise_CHW, plain.noise_CHW)
    torch.testing.assert_close(waiting.noise_CHW + 0.1 * waiting.offset_noise_C11, offset.noise_CHW)


def test_plain_noise_is_standard_normal():
    noise = torch.stack([draw(sample=sample).noise_CHW for sample in range(200)])
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01


# ---------------------------------------------------------------------------------------------- offset


def test_offset_shifts_each_channel():
    """noise + offset * N(0, 1) of shape (C, 1, 1) (Guttenberg 2023)."""
    shifts = torch.stack(
        [draw(sample=sample, noise_offset=0.1).noise_CHW - draw(sample=sample).noise_CHW for sample in range(300)]
    )
    torch.testing.assert_close(shifts, shifts[..., :1, :1].expand_as(shifts), rtol=0, atol=1e-5)
    values = shifts[..., 0, 0]
    assert abs(values.std().item() - 0.1) < 0.005 and abs(values.mean().item()) < 0.01
    assert values.flatten().unique().numel() == values.numel(), "every channel has its own"


def test_random_strength_is_uniform_per_sample():
    def ratio(sample):
        plain, full = draw(sample=sample), draw(sample=sample, noise_offset=0.1)
        random = draw(sample=sample, noise_offset=0.1, noise_offset_random_strength=True)
        return ((random.noise_CHW - plain.noise_CHW) / (full.noise_CHW - plain.noise_CHW))[:, 0, 0].median().item()

    ratios = np.array([ratio(sample) for sample in range(300)])
    assert (ratios > -1e-3).all() and (ratios < 1 + 1e-3).all()
    assert abs(ratios.mean() - 0.5) < 0.06 and abs(ratios.std() - 12**-0.5) < 0.03


@pytest.mark.parametrize("scale", [0.5, -0.5, -20.0])
@pytest.mark.parametrize("levels", [None, 4])
def test_adaptive_offset_against_its_formula(scale, levels):
    """max(0, offset + scale * |mean over H, W|), for each sample and channel; pyramid noise is normalised after it."""
    settings = {"noise_offset": 0.1, "adaptive_noise_scale": scale, "multires_noise_iterations": levels}
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2)) + 0.3
    draws = [draw(sample=sample, **settings) for sample in range(3)]
    found = completed(latents, draws, **settings)
    for index, one in enumerate(draws):
        mean = np.abs(latents[index].double().numpy().mean(axis=(1, 2), keepdims=True))
        strength = np.maximum(0.1 + scale * mean, 0)
        expected = one.noise_CHW.double().numpy() + strength * one.offset_noise_C11.double().numpy()
        if levels:
            expected /= expected.std(ddof=1)
        np.testing.assert_allclose(found[index].numpy(), expected, rtol=1e-5, atol=1e-6)
    if scale == -20.0:
        assert levels or torch.equal(found[0], draws[0].noise_CHW), "no strength below 0"


def test_adaptive_and_random_strength():
    """The drawn share is of --noise_offset alone: max(0, u * offset + scale * |mean|)."""
    settings = {"noise_offset": 0.4, "adaptive_noise_scale": 0.5, "noise_offset_random_strength": True}
    draws = [draw(sample=sample, **settings) for sample in range(4)]
    strengths = [one.noise_offset.item() for one in draws]
    assert all(0 <= strength < 0.4 for strength in strengths) and len(set(strengths)) == 4
    latents = torch.full((4, *SHAPE), -2.0)
    found = completed(latents, draws, **settings)
    for index, one in enumerate(draws):
        expected = one.noise_CHW + (strengths[index] + 1.0) * one.offset_noise_C11
        torch.testing.assert_close(found[index], expected)


def test_a_scale_of_nothing_is_the_plain_offset():
    plain = draw(noise_offset=0.1, multires_noise_iterations=4)
    settings = {"noise_offset": 0.1, "adaptive_noise_scale": 1e-12, "multires_noise_iterations": 4}
    (found,) = completed(torch.randn(1, *SHAPE), [draw(**settings)], **settings)
    torch.testing.assert_close(found, plain.noise_CHW)


# ---------------------------------------------------------------------------------------------- pyramid noise


@pytest.mark.parametrize(("shape", "iterations"), [(SHAPE, 1), (SHAPE, 2), (SHAPE, 10), ((4, 96, 64), 6)])
@pytest.mark.parametrize("offset", [None, 0.2])
def test_pyramid_noise_against_its_formula(shape, iterations, offset):
    """Sum over levels of discount^i * enlarged N(0, 1), sides / r^i with r = 2 + 2u, divided by its deviation."""
    height, width = shape[1:]
    expected = draw(shape, noise_offset=offset).noise_CHW.double().numpy()
    generator = torch_generator(1, "pyramid noise", 1, 7)
    sizes = []
    for level in range(iterations):
        r = 2 + 2 * float(torch.rand((), generator=generator))
        sizes.append((max(1, int(height / r**level)), max(1, int(width / r**level))))
        small = torch.randn((1, shape[0], *sizes[-1]), generator=generator)[0].double().numpy()
        expected = expected + 0.7**level * reference.bilinear(small, (height, width))
        if 1 in sizes[-1]:
            break
    expected /= expected.std(ddof=1)
    found = draw(shape, noise_offset=offset, multires_noise_iterations=iterations, multires_noise_discount=0.7)
    np.testing.assert_allclose(found.noise_CHW.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert sizes[0] == (height, width) and len(sizes) <= iterations
    assert iterations < 10 or len(sizes) < 10, "the first level with a side of 1 is the last"


def test_pyramid_noise_is_strong_in_low_frequencies():
    def power_of_means(**options):
        return (
            torch.stack([draw(sample=sample, **options).noise_CHW.mean((1, 2)) for sample in range(100)]).var().item()
        )

    strong = power_of_means(multires_noise_iterations=6, multires_noise_discount=0.8)
    weak = power_of_means(multires_noise_iterations=6, multires_noise_discount=0.3)
    assert strong > 3 * weak > 3 * power_of_means()


def test_pyramid_noise_has_unit_deviation_within_each_sample():
    for sample in range(5):
        noise = draw(sample=sample, multires_noise_iterations=6, multires_noise_discount=0.9).noise_CHW
        assert noise.std().item() == pytest.approx(1.0, abs=1e-5)


# ---------------------------------------------------------------------------------------------- input perturbation


def test_input_perturbation_is_seen_and_not_predicted():
    """y = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) (epsilon + gamma xi), target epsilon (Ning et al. 2023)."""
    schedule, latents = NoiseSchedule.make(), torch.randn(2, *SHAPE)
    draws = [draw(sample=sample, ip_noise_gamma=0.3) for sample in range(2)]
    batch = complete_noise(batch_from(draws), latents, NoiseOptions(ip_noise_gamma=0.3))
    epsilon = torch.stack([draw(sample=sample).noise_CHW for sample in range(2)])
    assert torch.equal(training_target(latents, batch, schedule, v_prediction=False), epsilon)
    alpha = reference.alphas_cumprod_T()[batch.timesteps_B.numpy()].reshape(-1, 1, 1, 1)
    velocity = alpha**0.5 * epsilon.double().numpy() - (1 - alpha) ** 0.5 * latents.double().numpy()
    np.testing.assert_allclose(
        training_target(latents, batch, schedule, v_prediction=True).numpy(), velocity, rtol=1e-4, atol=1e-5
    )
    perturbed = epsilon + torch.stack([one.input_perturbation_CHW for one in draws])
    expected = alpha**0.5 * latents.double().numpy() + (1 - alpha) ** 0.5 * perturbed.double().numpy()
    np.testing.assert_allclose(noised_latents(latents, batch, schedule).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_input_perturbation_has_the_strength_asked_for():
    fixed = torch.stack([draw(sample=sample, ip_noise_gamma=0.3).input_perturbation_CHW for sample in range(100)])
    assert abs(fixed.std().item() - 0.3) < 0.005 and abs(fixed.mean().item()) < 0.005
    random = torch.stack(
        [
            draw(sample=sample, ip_noise_gamma=0.3, ip_noise_gamma_random_strength=True).input_perturbation_CHW
            for sample in range(100)
        ]
    )
    shares = (random / fixed).flatten(1)
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares), rtol=1e-4, atol=1e-4)  # one share a sample
    assert shares.min() >= 0 and shares.max() < 1 and abs(shares[:, 0].mean().item() - 0.5) < 0.09
    assert draw().input_perturbation_CHW is None


# ---------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({}, 0, 999),
        ({"min_timestep": 900}, 900, 999),
        ({"max_timestep": 3}, 0, 2),
        ({"min_timestep": 5, "max_timestep": 5}, 5, 5),
    ],
)
def test_timesteps_are_uniform_in_their_range(settings, low, high):
    steps = np.array([draw((1, 1, 2), sample=sample, **settings).timestep for sample in range(3000)])
    assert steps.min() >= low and steps.max() <= high
    assert abs(steps.mean() - (low + high) / 2) <= 0.03 * (high - low)
    assert high - low > 100 or set(steps) == set(range(low, high + 1))


# ---------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_images(root / "1_cat", 5, sizes=((64, 64), (96, 64)))
    return lambda batch_size: build(root, augment=AugmentOptions(), batch_size=batch_size)


def test_noise_does_not_depend_on_workers(data):
    source = NoiseSource(EVERYTHING, 1)
    alone, two = (batches(data(2), draw=source, workers=workers, epochs=1) for workers in (0, 2))
    assert list(alone) == list(two)
    for position, batch in alone.items():
        assert batch.offset_noise_BC11.shape == (batch.size, 4, 1, 1) and batch.noise_offset_B.shape == (batch.size,)
        assert batch.input_perturbation_BCHW.shape == batch.noise_BCHW.shape
        assert_equal(batch, two[position])


def test_noise_does_not_depend_on_the_batch(data):
    """Completed noise of a batch of 4 is that of batches of 1, with pyramid noise and adaptive offset."""
    source = NoiseSource(EVERYTHING, 1)

    def by_image(batch_size):
        found = {}
        for batch in batches(data(batch_size), draw=source, epochs=1).values():
            latents = torch.nn.functional.avg_pool2d(batch.images_BCHW, 8).mean(1, keepdim=True) * torch.ones(4, 1, 1)
            noise = complete_noise(batch, latents, EVERYTHING).noise_BCHW
            found |= dict(zip(batch.image_names, noise, strict=True))
        return found

    single, four = by_image(1), by_image(4)
    assert single.keys() == four.keys() and len(single) == 5
    for name, noise in single.items():
        torch.testing.assert_close(noise, four[name], rtol=1e-6, atol=1e-6)


def test_the_objective_never_waits_for_the_device():
    """On the meta device no tensor has a value: whatever asks for one raises."""
    latents = torch.randn(2, 4, 8, 8, device="meta")
    for levels, zero, v_prediction in itertools.product((None, 4), (False, True), (False, True)):
        noise = NoiseOptions(0.1, adaptive_noise_scale=0.2, multires_noise_iterations=levels, ip_noise_gamma=0.1)
        schedule = NoiseSchedule.make(zero_terminal_snr=zero, device="meta")
        for loss_type, huber in itertools.product(
            ("l1", "l2", "huber", "smooth_l1"), ("constant", "exponential", "snr")
        ):
            batch = batch_of(
                [3, 999],
                noise_BCHW=torch.randn(2, 4, 8, 8),
                offset_noise_BC11=torch.randn(2, 4, 1, 1, device="meta"),
                noise_offset_B=torch.randn(2, device="meta"),
                input_perturbation_BCHW=torch.randn(2, 4, 8, 8, device="meta"),
                mask_B1HW=torch.rand(2, 1, 8, 8, device="meta"),
                device="meta",
            )
            batch = complete_noise(batch, latents, noise)
            prediction = noised_latents(latents, batch, schedule).requires_grad_()
            target = training_target(latents, batch, schedule, v_prediction=v_prediction)
            options = LossOptions(
                min_snr_gamma=5.0, debiased_estimation_loss=True, loss_type=loss_type, huber_schedule=huber,
                scale_v_pred_loss_like_noise_pred=v_prediction, v_pred_like_loss=None if v_prediction else 0.1,
            )  # fmt: skip
            diffusion_loss(prediction, target, batch, schedule, options, v_prediction=v_prediction).backward()
            assert prediction.grad.shape == prediction.shape


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"adaptive_noise_scale": 0.1}, "--adaptive_noise_scale"),
        ({"multires_noise_iterations": -1}, "--multires_noise_iterations"),
        ({"multires_noise_discount": 1.5}, "--multires_noise_discount"),
        ({"multires_noise_discount": -0.1}, "--multires_noise_discount"),
        ({"ip_noise_gamma": -0.1}, "--ip_noise_gamma"),
        ({"min_timestep": 1000}, "--min_timestep"),
        ({"max_timestep": 0}, "--max_timestep"),
        ({"min_timestep": 10, "max_timestep": 5}, "--min_timestep"),
    ],
)
def test_values_out_of_range(settings, flag):
    with pytest.raises(OptionError, match=f"^{flag}: "):
        NoiseOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"noise_offset": 0.1, "adaptive_noise_scale": 0.1, "noise_offset_random_strength": True}, None),
        ({"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}, None),
        ({"multires_noise_iterations": 6, "multires_noise_discount": 0.1}, None),
        ({"noise_offset": 0.0, "adaptive_noise_scale": 0.0}, None),
        (
            {"noise_offset": 0.0, "adaptive_noise_scale": 0.1},
            "--adaptive_noise_scale has no effect without --noise_offset",
        ),
        (
            {"noise_offset_random_strength": True},
            "--noise_offset_random_strength has no effect without --noise_offset",
        ),
        (
            {"multires_noise_discount": 0.1},
            "--multires_noise_discount has no effect without --multires_noise_iterations",
        ),
        (
            {"ip_noise_gamma_random_strength": True},
            "--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma",
        ),
    ],
)
def test_notes(settings, note):
    assert NoiseOptions(**settings).notes() == ([note] if note else [])
