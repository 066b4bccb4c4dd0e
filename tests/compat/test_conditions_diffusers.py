"""What prompts become, against diffusers: textual inversion, sizes of SDXL, clip skip, other noise levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.generate.denoise import decode, denoise
from library.generate.request import GenerationRequest
from library.generate.size_options import SizeOptions
from library.models.added_words import add_words, read_word
from library.models.options import AttentionOptions
from tests.diffusers_reference import BETAS, SCHEDULERS, diffusers_pipeline, load

REQUEST = GenerationRequest("a photo of a cat", "blurry, dark", 64, 96, 6, 7.5, 3, sampler="euler")
SIZES = SizeOptions(original_height=300, original_width=200, original_height_negative=50, crop_top=16, crop_left=8)


def ours(family: Any, bundle: ModelBundle, request: GenerationRequest) -> np.ndarray:
    return decode(bundle, denoise(family, bundle, [request])).numpy() / 255


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean, in steps of 1/255, of pictures that are rounded to such steps."""
    return float(np.abs((one * 255).round() - (other * 255).round()).mean())


def theirs(pipeline: Any, request: GenerationRequest, **more: Any) -> np.ndarray:
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(request.seed))
    return pipeline(
        prompt=request.prompt, negative_prompt=request.negative_prompt, width=64, height=96,
        num_inference_steps=request.steps, guidance_scale=request.scale, latents=noise, output_type="np", **more,
    ).images  # fmt: skip


def test_textual_inversion(tiny_sd1_path: Path, tmp_path: Path) -> None:
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "zwork"}, tmp_path / "zwork.pt"
    )
    bundle = load(tiny_sd1_path)
    pipeline = diffusers_pipeline(bundle, tmp_path / "model", "euler")
    pipeline.load_textual_inversion(tmp_path / "zwork.pt", token="zwork")
    request = replace(REQUEST, prompt="a photo of zwork, oil painting", negative_prompt="zwork dark")
    without = ours(StableDiffusion(), bundle, request)
    word = read_word(str(tmp_path / "zwork.pt"), "--textual_inversion_embeddings")
    bundle.tokenizers = add_words(bundle.tokenizers, bundle.text_encoders, [word], "--textual_inversion_embeddings")
    made, reference = ours(StableDiffusion(), bundle, request), theirs(pipeline, request)
    assert distance(made, reference) < 0.05
    assert distance(made, without) > 0.2


@pytest.fixture(scope="module")
def bundle(tiny_sdxl_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusionXL().load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)


@pytest.fixture(scope="module")
def pipeline(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sdxl")
    StableDiffusionXL().save(bundle, folder, dtype=None, metadata={}, as_diffusers=True)
    made = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    made.scheduler = SCHEDULERS["euler"]
    made.set_progress_bar_config(disable=True)
    return made


def test_sizes_of_sdxl(bundle: ModelBundle, pipeline: Any) -> None:
    request = replace(REQUEST, sizes=SIZES)
    made = ours(StableDiffusionXL(), bundle, request)
    reference = theirs(
        pipeline, request, original_size=(300, 200), negative_original_size=(50, 200), target_size=(96, 64),
        crops_coords_top_left=(16, 8), negative_crops_coords_top_left=(16, 8), negative_target_size=(96, 64),
    )  # fmt: skip
    assert distance(made, reference) < 0.05
    assert distance(made, ours(StableDiffusionXL(), bundle, REQUEST)) > 0.2


def test_clip_skip_of_sdxl(bundle: ModelBundle, pipeline: Any) -> None:
    """diffusers counts from the layer that is usual: its 1 is the trade's 3."""
    request = replace(REQUEST, clip_skip=3, negative_prompt="")
    made = ours(StableDiffusionXL(), bundle, request)
    encoded = pipeline.encode_prompt(request.prompt, None, "cpu", 1, False, clip_skip=1)
    empty = pipeline.encode_prompt("", None, "cpu", 1, False, clip_skip=1)
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(request.seed))
    reference = pipeline(
        prompt_embeds=encoded[0], pooled_prompt_embeds=encoded[2], negative_prompt_embeds=empty[0],
        negative_pooled_prompt_embeds=empty[2], width=64, height=96, num_inference_steps=6, guidance_scale=7.5,
        latents=noise, output_type="np",
    ).images  # fmt: skip
    assert distance(made, reference) < 0.05
    assert distance(made, ours(StableDiffusionXL(), bundle, replace(request, clip_skip=None))) > 0.2


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
def test_noise_levels(tiny_sd1_path: Path, tmp_path: Path, sigmas: str) -> None:
    from diffusers import DPMSolverMultistepScheduler

    bundle = load(tiny_sd1_path)
    request = replace(REQUEST, sampler="dpmsolver++", sigmas=sigmas)
    pipeline = diffusers_pipeline(bundle, tmp_path / "model", "euler")
    pipeline.scheduler = DPMSolverMultistepScheduler(**BETAS, **{f"use_{sigmas}_sigmas": True})
    made = ours(StableDiffusion(), bundle, request)
    assert distance(made, theirs(pipeline, request)) < 0.05
    assert distance(made, ours(StableDiffusion(), bundle, replace(request, sigmas="default"))) > 0.2
