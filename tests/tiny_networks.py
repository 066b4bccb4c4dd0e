"""Tiny models for tests of networks, without a file: a text encoder and a U-Net with the trade's module paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from library.models.build import build_text_encoder, build_unet
from tests.full_size import meta_modules
from tests.tiny_models import SECOND_TEXT_ENCODER, TEXT_ENCODERS, UNETS


def tiny_parts(kind: str = "sd1", seed: int = 0) -> tuple[Any, Any]:
    """(text encoder, U-Net), frozen and in eval mode, with random weights; of SDXL a list of both text encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [build_text_encoder(TEXT_ENCODERS[kind]), build_unet(UNETS[kind])]
        if kind == "sdxl":
            parts.append(build_text_encoder(SECOND_TEXT_ENCODER))
    first, unet, *second = (part.requires_grad_(False).eval() for part in parts)
    return [first, *second] if second else first, unet


def full_size_parts(kind: str) -> tuple[Any, Any]:
    """(text encoder, U-Net) of SD 1.5, SD 2.1 or SDXL on the meta device: all layers, no weights."""
    from library.checkpoints.architecture import TextArchitecture, UNetArchitecture

    if kind == "sdxl":
        modules = meta_modules(kind)
        return [modules["text_encoder"], modules["text_encoder_2"]], modules["unet"]
    channels, depths = (320, 640, 1280, 1280), (1, 1, 1, 0)
    if kind == "sd1":
        unet = UNetArchitecture(4, 4, channels, (8, 8, 8, 8), depths, 2, 768, linear_projection=False)
        text = TextArchitecture(49408, 77, 768, 3072, layers=12, heads=12, activation="quick_gelu")
    else:
        unet = UNetArchitecture(4, 4, channels, (5, 10, 20, 20), depths, 2, 1024, linear_projection=True)
        text = TextArchitecture(49408, 77, 1024, 4096, layers=23, heads=16, activation="gelu")
    with torch.device("meta"):
        return build_text_encoder(text), build_unet(unet)


def outputs(text_encoder: Any, unet: Any, *, seed: int = 0, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """(text states, U-Net output) for fixed inputs of `size` latent pixels; the U-Net sees the text states.

    Below 16 the innermost GroupNorms see so few values that rounding alone changes gradients by percents.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 49408, (2, 77), generator=generator)
    latents = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    unet_dtype = next(unet.parameters()).dtype
    added = None
    if isinstance(text_encoder, list):  # every layer of the first one takes part, though SDXL leaves out the last
        first, second = text_encoder
        second_states, pooled = second(ids, layer_from_end=2, normalized=False)
        states = torch.cat([first(ids), second_states], dim=-1)
        sizes = torch.tensor([[64.0, 96, 0, 8, 64, 64], [200, 100, 4, 0, 128, 64]])
        added = {"text_embeds": pooled.to(unet_dtype), "time_ids": sizes}
    else:
        states = text_encoder(ids)
    timesteps = torch.tensor([10, 700])
    noise = unet(latents.to(unet_dtype), timesteps, states.to(unet_dtype), added_cond_kwargs=added, return_dict=False)[
        0
    ]
    return states, noise


@torch.no_grad()
def perturb(network: torch.nn.Module, *, seed: int = 1, std: float = 0.05) -> None:
    """Give every trainable parameter a random value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def region_file(folder: Path, *colors: tuple[int, int, int]) -> str:
    """A picture of equally wide stripes, 64 pixels in all, for networks that work by regions."""
    pixels = np.repeat(np.array([colors], np.uint8), 64 // len(colors), axis=1).repeat(64, axis=0)
    path = folder / f"{'_'.join(map(str, colors))}.png"
    Image.fromarray(pixels).save(path)
    return str(path)
