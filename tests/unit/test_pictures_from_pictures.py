"""Starting from pictures: noise levels of every sampler, what masks keep, what a picture depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.diffusion.samplers import SAMPLERS, begin_with, make_scheduler, stepper
from library.families.base import ModelBundle
from library.families.sd import StableDiffusion
from library.generate.denoise import denoise
from library.generate.drawing import Drawing, Part
from library.generate.inpainting import Inpainting
from library.generate.request import GenerationRequest
from library.generate.start import requested_start, vary
from library.generate.start_options import StartNoiseOptions
from tests.diffusers_reference import load

SD = StableDiffusion()


@pytest.fixture(scope="module")
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    return load(tiny_sd1_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures a.png and b.png of 64 x 64 pixels, and mask.png, white in its right half."""
    path = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate("ab"):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(path / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(path / "mask.png")
    return path


def asked(folder: Path, seed: int = 1, **values: Any) -> GenerationRequest:
    base = GenerationRequest("a cat", "", 64, 64, 4, 3.0, seed, sampler="euler_a", image=str(folder / "a.png"))
    return dataclasses.replace(base, **{"strength": 0.5, **values})


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("k_")])
def test_a_perfect_prediction_leads_back_to_the_source(sampler: str) -> None:
    """With the very noise that was added as prediction, every sampler must end at the picture it started from."""
    pytest.importorskip("scipy")
    scheduler = make_scheduler(sampler, v_prediction=False)
    scheduler.set_timesteps(12, device="cpu")
    timesteps = begin_with(scheduler, 6)
    source, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = scheduler.add_noise(source, noise, timesteps[:1])
    step = stepper(scheduler, [torch.Generator().manual_seed(1)])
    alphas = scheduler.alphas_cumprod
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        place = timestep.double()  # between two timesteps for samplers that look between them
        below, above = int(place.floor()), int(place.ceil())
        logs = ((1 - alphas) / alphas).double().sqrt().log()
        sigma = torch.exp(logs[below] + (logs[above] - logs[below]) * (place - below)).float()
        prediction = (scaled * (1 + sigma**2).sqrt() - source) / sigma
        latents = step(prediction, timestep, latents)
    assert (latents - source).abs().mean() < 0.03  # the DPM solvers end at the noise of timestep 0, which is 0.03


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6])
def test_pndm_lays_its_warm_up_where_it_begins(num_steps: int) -> None:
    scheduler = make_scheduler("pndm", v_prediction=False)
    scheduler.set_timesteps(10, device="cpu")
    timesteps = begin_with(scheduler, num_steps)
    assert timesteps[0] == 1 + 100 * (num_steps - 1)
    assert timesteps[-1] == 1
    assert len(timesteps) == (num_steps + 9 if num_steps >= 4 else num_steps + (num_steps > 1))


def test_strength_and_source_count_and_batches_do_not(bundle: ModelBundle, folder: Path) -> None:
    requests = [asked(folder), asked(folder, 2), asked(folder, image=str(folder / "b.png"))]
    together = denoise(SD, bundle, requests)
    alone = [denoise(SD, bundle, [request])[0] for request in requests]
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().max() < 1e-3
    source = requested_start(SD, bundle, requests[:1])
    assert source is not None
    source = source[0] / SD.latent_scale
    gone = [
        (denoise(SD, bundle, [asked(folder, strength=strength)])[0] - source).abs().mean() for strength in (0.3, 1.0)
    ]
    assert gone[0] < (alone[0] - source).abs().mean() < gone[1]
    assert (alone[0] - alone[2]).abs().mean() > 0.1


def test_the_number_of_steps_is_that_of_the_strength(bundle: ModelBundle, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    denoise(SD, bundle, [asked(folder, steps=10, strength=0.35)], progress=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_masks_keep_what_is_black(bundle: ModelBundle, folder: Path) -> None:
    seen: list[torch.Tensor] = []

    class Seen(Part):
        def after_step(self, drawing: Drawing) -> None:
            seen.append(drawing.latents_BChw.clone())

    request = asked(folder, mask=str(folder / "mask.png"), strength=1.0)
    source = requested_start(SD, bundle, [request])
    assert source is not None
    denoise(SD, bundle, [request], parts=(Inpainting(), Seen()))
    assert torch.equal(seen[-1][..., :4], source[..., :4])
    assert (seen[-1][..., 4:] - source[..., 4:]).abs().mean() > 0.1
    levels = [(step[..., :4] - source[..., :4]).std() for step in seen[:-1]]
    assert all(before > after > 0 for before, after in zip(levels, levels[1:], strict=False)), "as noisy as the rest"


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_start_noise_is_drawn_per_picture_from_its_seed(probability: float) -> None:
    options = StartNoiseOptions(pyramid_noise_prob=probability, pyramid_noise_discount_range=(0.7, 0.9))
    offsets = StartNoiseOptions(noise_offset_prob=probability, noise_offset_range=(1.0, 1.5))
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = [vary(noise, options, seed) for seed in range(40)]
    assert all(torch.equal(vary(noise, options, seed), changed[seed]) for seed in (0, 39))
    share = sum(not torch.equal(item, noise) for item in changed) / len(changed)
    assert abs(share - probability) < 0.25
    assert all(abs(item.std() - 1) < 0.05 for item in changed)
    moved = [(vary(noise, offsets, seed) - noise).mean().item() for seed in range(40)]
    assert sum(move != 0 for move in moved) / 40 == pytest.approx(probability, abs=0.25)
    if probability == 1.0:
        assert np.mean(moved) == pytest.approx(1.0, abs=0.3)
        assert np.std(moved) == pytest.approx(0.5, abs=0.2)
