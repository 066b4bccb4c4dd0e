"""ControlNets against diffusers' pipelines: same weights, same noise, same guide image, same picture.

Largest pixel difference found: 1/255 (rounding).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from library.families.base import LoadPlan, ModelBundle, ModelFamily
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.generate.control import Control, ControlNets
from library.generate.control_options import ControlFile, Preprocessor
from library.generate.denoise import decode, denoise
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from tests.diffusers_reference import SCHEDULERS
from tests.tiny_control import guide_image, tiny_control_net

FAMILIES: dict[str, tuple[ModelFamily, Any, Any]] = {
    "sd1": (StableDiffusion(), StableDiffusionControlNetPipeline, "tiny_sd1_path"),
    "sd2": (StableDiffusion(), StableDiffusionControlNetPipeline, "tiny_sd2_path"),
    "sdxl": (StableDiffusionXL(), StableDiffusionXLControlNetPipeline, "tiny_sdxl_path"),
}
PLAN = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
REQUEST = GenerationRequest("a photo of a cat", "blurry, dark", 64, 96, 6, 7.5, 1, sampler="ddim")


def our_picture(family: ModelFamily, bundle: ModelBundle, request: GenerationRequest, part: ControlNets) -> np.ndarray:
    return decode(bundle, denoise(family, bundle, [request], parts=[part])).numpy() / 255


def control(net: Any, weight: float, index: int) -> Control:
    return Control(net, ControlFile("", "", Preprocessor(), weight, 1.0), index)


def their_picture(pipeline: Any, images: list[Image.Image], weights: list[float]) -> np.ndarray:
    several = len(images) > 1
    return pipeline(
        prompt=REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        image=images if several else images[0],
        width=64,
        height=96,
        num_inference_steps=6,
        guidance_scale=7.5,
        controlnet_conditioning_scale=weights if several else weights[0],
        latents=torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(1)),
        output_type="np",
    ).images


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("sd1", [1.0]), ("sd1", [0.4]), ("sd1", [0.7, 0.5]), ("sd2", [1.0]), ("sdxl", [1.0]), ("sdxl", [0.7, 0.5])],
)
def test_same_picture(kind: str, weights: list[float], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family, pipeline_class, fixture = FAMILIES[kind]
    bundle = family.load(ModelOptions(str(request.getfixturevalue(fixture))), AttentionOptions(), PLAN)
    paths = [guide_image(tmp_path / f"{seed}.png", seed, size=(64, 96)) for seed, _ in enumerate(weights)]
    nets = [tiny_control_net(kind, seed) for seed, _ in enumerate(weights)]
    asked = dataclasses.replace(REQUEST, guide_images=tuple(map(str, paths)))
    controls = [control(net, weight, index) for index, (net, weight) in enumerate(zip(nets, weights, strict=True))]
    ours = our_picture(family, bundle, asked, ControlNets(controls, sums=True))

    family.save(bundle, tmp_path / "model", dtype=None, metadata={}, as_diffusers=True)
    more = {"add_watermarker": False} if kind == "sdxl" else {"safety_checker": None}
    net = nets[0] if len(nets) == 1 else MultiControlNetModel(nets)
    pipeline = pipeline_class.from_pretrained(tmp_path / "model", controlnet=net, local_files_only=True, **more)
    scheduler, prediction = SCHEDULERS["ddim"], "v_prediction" if bundle.source.v_prediction else "epsilon"
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    pipeline.set_progress_bar_config(disable=True)
    theirs = their_picture(pipeline, [Image.open(path) for path in paths], weights)
    assert np.abs(ours - theirs).mean() < 1 / 255
    assert np.abs(ours - theirs).max() < 3 / 255
    plain = our_picture(family, bundle, REQUEST, ControlNets([], sums=True))
    assert np.abs(ours - plain).mean() > 5 / 255
