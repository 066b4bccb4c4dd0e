"""Upscalers of highres fix: the contract of modules, whatever they take and return."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.families.base import ModelBundle
from library.families.sd import StableDiffusion
from library.generate.conditions import PromptEncoder
from library.generate.highres import create_upscaler
from library.generate.images import Engine
from library.generate.request import GenerationRequest
from library.generate.start_options import UpscalerChoice
from library.options import OptionError
from tests.diffusers_reference import load

MODULE = """
from PIL import Image
import torch

class Upscaler:
    def __init__(self, latents="no", returns="pictures"):
        self.latents, self.returns, self.told = latents == "yes", returns, []
    def to(self, target):
        self.told.append(target)
    def support_latents(self):
        return self.latents
    def upscale(self, vae, lowreso_images, lowreso_latents, dtype, width, height, batch_size, vae_batch_size):
        assert (lowreso_images is None) == self.latents != (lowreso_latents is None)
        given = lowreso_latents if self.latents else lowreso_images
        self.told.append((type(given), len(given), width, height, batch_size, vae_batch_size))
        if self.returns == "pictures":
            return [Image.new("RGB", (width // 2, height // 2), (200, 30, 30))] * len(given)
        return torch.full((len(given), 4, height // 8, width // 8), 0.5, dtype=dtype)

def create_upscaler(**arguments):
    return Upscaler(**arguments)
"""
FIRST = GenerationRequest("a cat", "", 64, 64, 2, 3.0, 1, sampler="euler")
SECOND = dataclasses.replace(FIRST, width=128, height=96, first_stage=FIRST, strength=0.5)


@pytest.fixture(scope="module")
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    return load(tiny_sd1_path)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_upscaler.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "half_upscaler.py").write_text("def create_upscaler():\n    return 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def made(bundle: ModelBundle, *requests: GenerationRequest) -> tuple[list[Image.Image], list[object]]:
    family = StableDiffusion()
    upscaler = create_upscaler(requests[0].upscaler)
    engine = Engine(family, bundle, PromptEncoder(family, bundle), upscaler=upscaler)
    return engine.pictures(requests, show_progress=False), upscaler.told


@pytest.mark.parametrize("latents", ["yes", "no"])
@pytest.mark.parametrize("returns", ["pictures", "latents"])
def test_own_modules(bundle: ModelBundle, latents: str, returns: str) -> None:
    choice = UpscalerChoice("own_upscaler", f"latents={latents};returns={returns}")
    requests = [dataclasses.replace(SECOND, upscaler=choice, seed=seed) for seed in (1, 2)]
    pictures, told = made(bundle, *requests)
    assert [picture.size for picture in pictures] == [(128, 96)] * 2
    assert told == [torch.device("cpu"), torch.float32, (torch.Tensor if latents == "yes" else list, 2, 128, 96, 2, 2)]


def test_a_second_stage_has_other_noise_than_the_first() -> None:
    assert (FIRST.noise_seed, SECOND.noise_seed, SECOND.seed) == (1, 2, 1)
    assert dataclasses.replace(SECOND, seed=2**64 - 1).noise_seed == 0


def test_the_first_stage_is_part_of_what_makes_a_batch() -> None:
    other = dataclasses.replace(SECOND, first_stage=dataclasses.replace(FIRST, steps=3))
    assert SECOND.batch_key == dataclasses.replace(SECOND, seed=5).batch_key != other.batch_key
    assert FIRST.batch_key != dataclasses.replace(FIRST, image="a.png", strength=0.5).batch_key


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (UpscalerChoice("json"), "json has no function create_upscaler"),
        (UpscalerChoice("half_upscaler"), "has no method to"),
        (UpscalerChoice("own_upscaler", "size=2"), "own_upscaler does not take them"),
    ],
    ids=["no function", "no method", "arguments"],
)
def test_modules_that_do_not_keep_the_contract(choice: UpscalerChoice, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        create_upscaler(choice)


def test_without_a_module_there_is_no_upscaler() -> None:
    assert create_upscaler(UpscalerChoice(in_latents=True)) is None
