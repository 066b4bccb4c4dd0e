"""Tiny models for tests of networks, without a file: a text encoder and a U-Net with the trade's module paths."""

from __future__ import annotations

from typing import Any

import torch

from library.models.build import build_text_encoder, build_unet
from tests.tiny_models import TEXT_ENCODERS, UNETS


def tiny_parts(kind: str = "sd1", seed: int = 0) -> tuple[Any, Any]:
    """(text encoder, U-Net), frozen and in eval mode, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = build_text_encoder(TEXT_ENCODERS[kind]), build_unet(UNETS[kind])
    return tuple(part.requires_grad_(False).eval() for part in parts)  # type: ignore[return-value]


def full_size_parts(kind: str) -> tuple[Any, Any]:
    """(text encoder, U-Net) of SD 1.5 or SD 2.1 on the meta device: all layers, no weights."""
    from library.checkpoints.architecture import TextArchitecture, UNetArchitecture

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
    states = text_encoder(ids)
    unet_dtype = next(unet.parameters()).dtype
    noise = unet(latents.to(unet_dtype), torch.tensor([10, 700]), states.to(unet_dtype), return_dict=False)[0]
    return states, noise


@torch.no_grad()
def perturb(network: torch.nn.Module, *, seed: int = 1, std: float = 0.05) -> None:
    """Give every trainable parameter a random value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
