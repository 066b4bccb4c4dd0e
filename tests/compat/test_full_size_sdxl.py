"""A picture of full-size SDXL, drawn here and by diffusers in float32: the same weights and noise, the same picture.

The parts are loaded one after the other, each way in a process of its own, so that the U-Net's 10 GB are the most that
is held at a time.
"""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.generate.conditions import PromptEncoder
from library.generate.denoise import decode, denoise
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from tests.diffusers_reference import check, fresh_scheduler
from tests.full_size import require_room, write_full_size

FAMILY = StableDiffusionXL()
REQUEST = GenerationRequest("a photo of a cat", "blurry, dark", 64, 64, 2, 5.0, 7, sampler="euler")
PLAN = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
FILE = 7e9  # bytes, in half precision
MEMORY = 12.5e9


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.full_size
def test_same_picture(scratch: Path) -> None:
    require_room(scratch, disk=2.1 * FILE, memory=MEMORY)
    model, folder = scratch / "model.safetensors", scratch / "folder"
    write_full_size(model, "sdxl", torch.float16)
    in_a_process(save_as_folder, model, folder)
    check(in_a_process(drawn_here, model), in_a_process(drawn_there, folder), "SDXL")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Memory that was used and freed does not count for what comes next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def save_as_folder(model: Path, folder: Path) -> None:
    half = replace(PLAN, unet=torch.float16, text_encoders=torch.float16, vae=torch.float16)
    bundle = FAMILY.load(ModelOptions(str(model)), AttentionOptions(), half)
    FAMILY.save(bundle, folder, dtype=torch.float16, metadata={}, as_diffusers=True)


def drawn_here(model: Path) -> np.ndarray:
    bundle = loaded(model, "text_encoders")
    encoder = PromptEncoder(FAMILY, bundle)
    bundle.unet = torch.nn.Linear(1, 1)  # where texts go
    with torch.no_grad():
        encoder([REQUEST])  # keeps what the texts mean
    bundle.text_encoders = ()
    gc.collect()
    rest = loaded(model, "unet", "vae")
    bundle.unet, bundle.vae = rest.unet, rest.vae
    return decode(bundle, denoise(FAMILY, bundle, [REQUEST], encoder=encoder)).numpy() / 255


def loaded(model: Path, *parts: str) -> ModelBundle:
    return FAMILY.load(ModelOptions(str(model)), AttentionOptions(), replace(PLAN, parts=frozenset(parts)))


def drawn_there(folder: Path) -> np.ndarray:
    texts = pipeline_of(folder, unet=None, vae=None)
    with torch.no_grad():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = texts.encode_prompt(REQUEST.prompt, negative_prompt=REQUEST.negative_prompt)
    del texts
    gc.collect()
    pipeline = pipeline_of(folder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    pipeline.scheduler = fresh_scheduler("euler")
    return pipeline(
        **dict(zip(names, encoded, strict=True)),
        width=REQUEST.width,
        height=REQUEST.height,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        output_type="np",
    ).images


def pipeline_of(folder: Path, **without: None) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, add_watermarker=False, **without
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
