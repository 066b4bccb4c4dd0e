"""Pictures from pictures against diffusers' pipelines: same weights, same latents, same noise, same picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from library.checkpoints.sd import ModelState, single_file_state
from library.families.base import LoadPlan, ModelBundle, ModelFamily
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.generate.denoise import decode, denoise
from library.generate.drawing import Part
from library.generate.inpainting import Inpainting, InpaintingModel
from library.generate.request import GenerationRequest
from library.generate.start import requested_start
from library.models.options import AttentionOptions
from tests.diffusers_reference import arguments, check, diffusers_pipeline, load, with_our_scheduler

SD = StableDiffusion()
WIDTH, HEIGHT = 64, 96
SAMPLERS = ("ddim", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A picture and a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    smooth = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / "image.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[24:72, 16:48] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return str(folder / "image.png"), str(folder / "mask.png")


def requests(sampler: str, image: str, **values: Any) -> list[GenerationRequest]:
    texts = (("a photo of a cat", 1), ("an old house, oil painting", 2))
    values = {"strength": 0.6, **values}
    return [
        GenerationRequest(text, "blurry, dark", WIDTH, HEIGHT, 10, 7.5, seed, sampler=sampler, image=image, **values)
        for text, seed in texts
    ]


def ours(
    family: ModelFamily, bundle: ModelBundle, asked: list[GenerationRequest], parts: tuple[Part, ...] = ()
) -> np.ndarray:
    return decode(bundle, denoise(family, bundle, asked, parts=parts)).numpy() / 255


@pytest.fixture(scope="module")
def sd1(tiny_sd1_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelBundle, Any]:
    bundle = load(tiny_sd1_path)
    return bundle, diffusers_pipeline(bundle, tmp_path_factory.mktemp("sd1") / "model", "ddim").components


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_img2img(sd1: tuple[ModelBundle, Any], files: tuple[str, str], sampler: str) -> None:
    bundle, components = sd1
    asked = requests(sampler, files[0])
    pipeline = with_our_scheduler(StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False), sampler)
    latents = requested_start(SD, bundle, asked)
    theirs = pipeline(image=latents, **arguments(asked)).images
    check(ours(SD, bundle, asked), theirs, f"img2img, {sampler}")


def test_img2img_of_sdxl(tiny_sdxl_path: Path, tmp_path: Path, files: tuple[str, str]) -> None:
    family = StableDiffusionXL()
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = family.load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)
    family.save(bundle, tmp_path / "model", dtype=None, metadata={}, as_diffusers=True)
    components = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", local_files_only=True).components
    pipeline = with_our_scheduler(StableDiffusionXLImg2ImgPipeline(**components, add_watermarker=False), "euler")
    asked = requests("euler", files[0])
    theirs = pipeline(
        image=requested_start(family, bundle, asked),
        original_size=(HEIGHT, WIDTH),
        target_size=(HEIGHT, WIDTH),
        **arguments(asked),
    ).images
    check(ours(family, bundle, asked), theirs, "img2img, SDXL")


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_inpainting(sd1: tuple[ModelBundle, Any], files: tuple[str, str], sampler: str) -> None:
    bundle, components = sd1
    image, mask = files
    asked = requests(sampler, image, mask=mask)
    pipeline = with_our_scheduler(StableDiffusionInpaintPipeline(**components, requires_safety_checker=False), sampler)
    latents = requested_start(SD, bundle, asked)
    pipeline._encode_vae_image = lambda *_, **__: latents
    theirs = pipeline(image=Image.open(image), mask_image=Image.open(mask), width=WIDTH, height=HEIGHT,
                      **arguments(asked)).images  # fmt: skip
    check(ours(SD, bundle, asked, (Inpainting(),)), theirs, f"inpainting, {sampler}")


def nine_channels(state: ModelState) -> ModelState:
    """The same model with a first layer that looks at the mask and at what it leaves, too."""
    weight = state.unet["conv_in.weight"]
    more = torch.randn(weight.shape[0], 5, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    return replace(state, unet={**state.unet, "conv_in.weight": torch.cat([weight, more], dim=1)})


def test_inpainting_models(tmp_path: Path, files: tuple[str, str]) -> None:
    from library.checkpoints.safetensors_io import save_file
    from tests.tiny_models import tiny_state

    save_file(single_file_state(nine_channels(tiny_state("sd1"))), tmp_path / "inpainting.safetensors")
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    options = ModelOptions(str(tmp_path / "inpainting.safetensors"), may_inpaint=True)
    bundle = SD.load(options, AttentionOptions(), plan)
    components = diffusers_pipeline(bundle, tmp_path / "model", "ddim").components
    image, mask = files
    asked = requests("euler", image, mask=mask)
    seen: list[torch.Tensor] = []

    class Seen(Part):
        def after_step(self, drawing: Any) -> None:
            seen[:] = [drawing.beside_BChw]

    mine = ours(SD, bundle, asked, (InpaintingModel(), Seen()))
    pipeline = with_our_scheduler(StableDiffusionInpaintPipeline(**components, requires_safety_checker=False), "euler")
    encoded = [seen[0][:, 1:], requested_start(SD, bundle, asked)]  # asked for in this order, the first once more
    pipeline._encode_vae_image = lambda image, **_: encoded[1 if image.abs().min() > 0 else 0]
    theirs = pipeline(image=Image.open(image), mask_image=Image.open(mask), width=WIDTH, height=HEIGHT,
                      **arguments(asked)).images  # fmt: skip
    check(mine, theirs, "a model of nine channels")
