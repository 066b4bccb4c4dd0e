"""SDXL pictures against diffusers' pipeline: same weights, same noise, same picture, with and without a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.generate.denoise import decode, denoise
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from networks.lora import create_network
from tests.diffusers_reference import SCHEDULERS

FAMILY = StableDiffusionXL()
REQUESTS = [
    GenerationRequest(text, "blurry, dark", 64, 96, 8, 7.5, seed, sampler="euler")
    for text, seed in (("a photo of a cat", 1), ("an old house, oil painting", 2))
]


@pytest.fixture
def bundle(tiny_sdxl_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)


@pytest.fixture
def pipeline(bundle: ModelBundle, tmp_path: Path) -> Any:
    FAMILY.save(bundle, tmp_path / "model", dtype=None, metadata={}, as_diffusers=True)
    made = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", local_files_only=True, add_watermarker=False)
    made.scheduler = SCHEDULERS["euler"]
    made.set_progress_bar_config(disable=True)
    return made


def our_pictures(bundle: ModelBundle) -> np.ndarray:
    return decode(bundle, denoise(FAMILY, bundle, REQUESTS)).numpy() / 255


def their_pictures(pipeline: Any) -> np.ndarray:
    noise = [torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(item.seed)) for item in REQUESTS]
    return pipeline(
        prompt=[item.prompt for item in REQUESTS],
        negative_prompt=[item.negative_prompt for item in REQUESTS],
        width=64,
        height=96,
        num_inference_steps=8,
        guidance_scale=7.5,
        latents=torch.stack(noise),
        output_type="np",
    ).images


def test_same_picture(bundle: ModelBundle, pipeline: Any) -> None:
    ours, theirs = our_pictures(bundle), their_pictures(pipeline)
    assert np.abs(ours - theirs).mean() < 1 / 255
    assert theirs.std() > 0.02


def test_same_picture_with_a_lora(bundle: ModelBundle, pipeline: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = our_pictures(bundle)
    encoders = list(bundle.text_encoders)
    network = create_network(1.0, 4, 4.0, bundle.vae, encoders, bundle.unet, conv_dim="2", conv_alpha="2")
    network.apply_to(encoders, bundle.unet)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if "up" in name else 0.1)
    network.eval().save_weights(tmp_path / "lora.safetensors", None, {})
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    ours, theirs = our_pictures(bundle), their_pictures(pipeline)
    assert np.abs(ours - theirs).mean() < 1 / 255
    assert np.abs(ours - plain).mean() > 5 / 255
