"""Our text-to-image against diffusers' pipeline: same weights, same noise, same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from library.diffusion.samplers import SAMPLERS
from library.families.base import ModelBundle
from library.families.sd import StableDiffusion
from library.generate.denoise import decode, denoise
from library.generate.request import GenerationRequest
from networks.lora import create_network
from tests.diffusers_reference import SCHEDULERS, diffusers_pipeline, load


def requests(sampler: str) -> list[GenerationRequest]:
    texts = (("a photo of a cat", 1), ("an old house, oil painting", 2))
    return [GenerationRequest(text, "blurry, dark", 64, 96, 8, 7.5, seed, sampler=sampler) for text, seed in texts]


def our_pictures(bundle: ModelBundle, sampler: str) -> np.ndarray:
    return decode(bundle, denoise(StableDiffusion(), bundle, requests(sampler))).numpy() / 255


def their_pictures(pipeline: StableDiffusionPipeline, sampler: str) -> np.ndarray:
    asked = requests(sampler)
    return pipeline(
        prompt=[item.prompt for item in asked],
        negative_prompt=[item.negative_prompt for item in asked],
        width=64,
        height=96,
        num_inference_steps=8,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(item.seed) for item in asked],
        output_type="np",
    ).images


def test_every_sampler_is_compared() -> None:
    assert set(SCHEDULERS) == {name for name in SAMPLERS if not name.startswith("k_")}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_same_picture(kind: str, sampler: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle = load(request.getfixturevalue(f"tiny_{kind}_path"))
    ours = our_pictures(bundle, sampler)
    theirs = their_pictures(diffusers_pipeline(bundle, tmp_path / "model", sampler), sampler)
    assert np.abs(ours - theirs).mean() < 1 / 255
    assert theirs.std() > 0.02


def test_same_picture_with_a_lora(tiny_sd1_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    bundle = load(tiny_sd1_path)
    pipeline = diffusers_pipeline(bundle, tmp_path / "model", "euler")
    plain = our_pictures(bundle, "euler")
    network = create_network(1.0, 4, 4.0, bundle.vae, bundle.text_encoders[0], bundle.unet)
    network.apply_to(bundle.text_encoders[0], bundle.unet)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if "up" in name else 0.1)
    network.eval().save_weights(tmp_path / "lora.safetensors", None, {})
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    ours, theirs = our_pictures(bundle, "euler"), their_pictures(pipeline, "euler")
    assert np.abs(ours - theirs).mean() < 1 / 255
    assert np.abs(ours - plain).mean() > 5 / 255
