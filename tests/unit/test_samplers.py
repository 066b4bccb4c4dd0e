"""Samplers: the trade's timesteps, and trajectories of a model that knows the answer."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import diffusers
import pytest
import torch

from library.diffusion.samplers import (
    SAMPLERS,
    SIGMAS,
    check_sigmas,
    check_steps,
    label_of,
    make_scheduler,
    stepper,
    takes_zero_terminal_snr,
)
from library.diffusion.schedule import NoiseSchedule
from library.options import OptionError

NAMES = [name for name in SAMPLERS if not name.startswith("k_")]

# First timesteps and their number at 10 steps, from diffusers 0.21.2 with the trade's settings.
TIMESTEPS = {
    "ddim": ([901, 801, 701], 10),
    "pndm": ([901, 851, 851], 19),
    "euler": ([999, 888, 777], 10),
    "heun": ([999, 888, 888], 19),
}

# Samplers whose last step ends at the least noise of training, sigma 0.0292, instead of at none.
KEEP_LEAST_NOISE = {"pndm", "dpmsolver", "dpmsolver++", "dpmsingle"}


def sample(sampler: str, clean_BCHW: torch.Tensor, seeds: list[int], *, steps: int, **model: Any) -> torch.Tensor:
    """Sample with the perfect model of a data set that holds nothing but `clean_BCHW`."""
    scheduler, v_prediction = make_scheduler(sampler, **model), model["v_prediction"]
    scheduler.set_timesteps(steps, device="cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    step = stepper(scheduler, generators)
    noise = [torch.randn(clean_BCHW.shape[1:], generator=generator) for generator in generators]
    latents = torch.stack(noise) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, timestep)
        signal, sigma = scales(scheduler.alphas_cumprod, float(timestep))
        noise = (inputs - signal * clean_BCHW) / sigma
        latents = step(signal * noise - sigma * clean_BCHW if v_prediction else noise, timestep, latents)
    return latents


def scales(alphas_cumprod: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha-bar), sqrt(1 - alpha-bar), linear between whole timesteps."""
    low = int(timestep)
    share = timestep - low
    alpha = alphas_cumprod[low] * (1 - share) + alphas_cumprod[min(low + 1, 999)] * share
    return alpha.sqrt(), (1 - alpha).sqrt()


@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps_are_the_trades(name: str) -> None:
    scheduler = make_scheduler(name, v_prediction=False)
    scheduler.set_timesteps(10)
    first, count = TIMESTEPS[name]
    assert scheduler.timesteps[:3].tolist() == first
    assert len(scheduler.timesteps) == count


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_leads_to_its_picture(name: str, v_prediction: bool) -> None:
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    result = sample(name, clean, [1, 2], steps=10, v_prediction=v_prediction)
    assert result.dtype == torch.float32
    tolerance = 0.2 if name in KEEP_LEAST_NOISE else 1e-3
    assert (result - clean).abs().max() < tolerance


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver++"])
def test_schedules_with_zero_terminal_snr(name: str) -> None:
    """Sampling begins at the last timestep, on the schedule of such models, and ends in the picture."""
    scheduler = make_scheduler(name, v_prediction=True, zero_terminal_snr=True)
    scheduler.set_timesteps(10)
    assert float(scheduler.timesteps[0]) == 999
    ours = NoiseSchedule.make(zero_terminal_snr=True).alphas_cumprod_T
    torch.testing.assert_close(scheduler.alphas_cumprod[:999], ours[:999], atol=1e-5, rtol=1e-3)
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    result = sample(name, clean, [1], steps=10, v_prediction=True, zero_terminal_snr=True)
    tolerance = 0.2 if name in KEEP_LEAST_NOISE else 1e-3
    assert (result - clean).abs().max() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_samplers_without_such_a_schedule_keep_theirs(name: str) -> None:
    if name not in ("ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++", "dpmsolver++_sde"):
        plain, asked = (make_scheduler(name, v_prediction=True, zero_terminal_snr=is_on) for is_on in (False, True))
        assert plain.config == asked.config


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", ["least_steps", "most_steps"])
def test_every_number_of_steps_offered_works(name: str, end: str) -> None:
    steps = getattr(SAMPLERS[name], end)
    check_steps("--steps", name, steps)
    result = sample(name, torch.zeros(1, 1, 2, 2), [0], steps=steps, v_prediction=False)
    assert result.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    clean = torch.zeros(4, 4, 8, 8)
    together = sample(name, clean, [5, 6, 7, 8], steps=8, v_prediction=False)
    for index, seed in enumerate([5, 6, 7, 8]):
        alone = sample(name, clean[:1], [seed], steps=8, v_prediction=False)
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("name", ["euler_a", "dpm_2_a", "dpmsolver++_sde"])
def test_ancestral_samplers_add_noise(name: str) -> None:
    ends = []
    for seed in (1, 2):
        scheduler = make_scheduler(name, v_prediction=False)
        scheduler.set_timesteps(4)
        step = stepper(scheduler, [torch.Generator().manual_seed(seed)])
        latents = torch.ones(1, 4, 8, 8)
        for timestep in scheduler.timesteps[:3]:
            latents = step(torch.zeros_like(latents), timestep, latents)
        ends.append(latents)
    assert (ends[0] - ends[1]).abs().mean() > 0.1


TAKERS = [name for name in NAMES if SAMPLERS[name].takes_sigmas]


def levels(sampler: str, sigmas: str, steps: int = 10) -> torch.Tensor:
    """The noise levels of whole steps, of the model's largest one and on; without that at the end."""
    scheduler = make_scheduler(sampler, v_prediction=False, sigmas=sigmas)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.unique().flip(0)[:steps].double()


@pytest.mark.parametrize("name", ["euler", "heun", "dpmsolver++", "dpmsolver++_sde", "dpmsingle", "lms"])
def test_noise_levels_follow_their_formulas(name: str) -> None:
    """Karras et al. (2022), equation 5, with rho = 7; and equal quotients."""
    first, last = 14.6146, 0.02917
    share = torch.linspace(0, 1, 10, dtype=torch.float64)
    karras = (first ** (1 / 7) + share * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    torch.testing.assert_close(levels(name, "karras"), karras, rtol=1e-3, atol=0)
    torch.testing.assert_close(levels(name, "exponential"), first * (last / first) ** share, rtol=1e-3, atol=0)


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("name", TAKERS)
def test_other_noise_levels_lead_to_the_same_picture(name: str, sigmas: str) -> None:
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tolerance = 0.2 if name == "dpmsolver" else 2e-2  # that one can't end at no noise
    for steps in (2, 10):
        result = sample(name, clean, [1], steps=steps, v_prediction=False, sigmas=sigmas)
        assert (result - clean).abs().max() < tolerance


def test_noise_levels_that_a_sampler_does_not_know() -> None:
    for name in NAMES:
        for sigmas in SIGMAS:
            if name in TAKERS or sigmas == "default":
                check_sigmas("--sigmas", name, sigmas)
                continue
            with pytest.raises(OptionError, match=f"--sigmas: {name} has noise levels of its own, not '{sigmas}' ones"):
                check_sigmas("--sigmas", name, sigmas)
    assert set(NAMES) - set(TAKERS) == {"ddim", "pndm", "euler_a"}
    assert label_of("dpmsolver++", "karras") == "DPM++ 2M Karras" and label_of("euler") == "Euler"


def test_aliases_are_the_samplers_they_name() -> None:
    for name in SAMPLERS:
        if name.startswith("k_"):
            assert SAMPLERS[name] is SAMPLERS[name.removeprefix("k_")]


def test_steps_out_of_range_name_the_sampler() -> None:
    with pytest.raises(OptionError, match="--steps: 3 is out of range for the sampler pndm; use 4 to 999"):
        check_steps("--steps", "pndm", 3)


def test_lms_without_scipy_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(OptionError, match="needs the package scipy; run `pip install scipy`"):
        make_scheduler("k_lms", v_prediction=False)


def test_the_table_needs_no_torch() -> None:
    code = "import sys, library.diffusion.samplers; sys.exit(any(n in sys.modules for n in ('torch', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_schedules_of_pure_noise_are_those_that_diffusers_has() -> None:
    for name, row in SAMPLERS.items():
        parameters = inspect.signature(getattr(diffusers, row.scheduler).__init__).parameters
        assert takes_zero_terminal_snr(name) == ("rescale_betas_zero_snr" in parameters), name
