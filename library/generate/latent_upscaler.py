"""The latent upscaler: a network that sharpens the latents of an enlarged picture, as an upscaler of highres fix.

The names of modules are the keys of its files. Shape letters: B pictures, C channels, h w latent pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from library.checkpoints.weights import load_tensors
from library.data.images import to_tensor
from library.models import vae as vae_code
from library.options import OptionError
from library.randomness import torch_generator

BLOCKS = 20
BLOCKS_PER_SKIP = 4  # a group of blocks that is skipped as a whole, beside each block for itself
WIDTH, INNER_WIDTH = 128, 64  # channels


class ResidualBlock(nn.Module):
    """x + two convolutions of x, through ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        inner_BChw = self.bn1(self.conv1(x_BChw)).relu()
        return (self.bn2(self.conv2(inner_BChw)) + x_BChw).relu()


class Upscaler(nn.Module):
    """Unscaled VAE latents of an enlarged picture to those of a sharp one of the same size."""

    def __init__(self, *, has_inner_biases: bool = False) -> None:
        """`has_inner_biases`: files exist with and without biases of conv2 and conv3."""
        super().__init__()
        self.conv1 = nn.Conv2d(4, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"resblock{number}", ResidualBlock(WIDTH))
        self.conv2 = nn.Conv2d(WIDTH, INNER_WIDTH, 3, padding=1, bias=has_inner_biases)
        self.bn2 = nn.BatchNorm2d(INNER_WIDTH)
        self.conv3 = nn.Conv2d(INNER_WIDTH, INNER_WIDTH, 3, padding=1, bias=has_inner_biases)
        self.bn3 = nn.BatchNorm2d(INNER_WIDTH)
        self.conv_final = nn.Conv2d(INNER_WIDTH, 4, 1)
        nn.init.zeros_(self.conv_final.weight)

    def forward(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        inner_BChw = self.bn1(self.conv1(latents_BChw)).relu()
        for group in range(0, BLOCKS, BLOCKS_PER_SKIP):
            skipped_BChw = inner_BChw
            for number in range(group + 1, group + BLOCKS_PER_SKIP + 1):
                inner_BChw = self.get_submodule(f"resblock{number}")(inner_BChw)
            inner_BChw = inner_BChw + skipped_BChw
        inner_BChw = self.bn2(self.conv2(inner_BChw)).relu()
        inner_BChw = self.bn3(self.conv3(inner_BChw))
        return latents_BChw + self.conv_final(inner_BChw)


class LatentUpscaler:
    """The network by the contract of upscalers, see library.generate.highres; for models of any family."""

    def __init__(self, network: Upscaler) -> None:
        self.network = network.eval().requires_grad_(False)

    def to(self, *arguments: Any, **named: Any) -> LatentUpscaler:
        self.network.to(*arguments, **named)
        return self

    def support_latents(self) -> bool:
        """It enlarges the picture first, so it wants pictures."""
        return False

    @torch.no_grad()
    def upscale(
        self,
        vae: Any,
        lowreso_images: Sequence[Image.Image] | None,
        lowreso_latents: torch.Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int = 1,
        vae_batch_size: int = 1,
    ) -> torch.Tensor:
        """Scaled latents (B, C, height / 8, width / 8) of `dtype`: enlarged (Lanczos), encoded, sharpened.

        What is sampled in encoding is the same for every picture, so a picture does not depend on its batch.
        """
        assert lowreso_images is not None and lowreso_latents is None, "see support_latents"
        device = next(self.network.parameters()).device
        latents = []
        for start in range(0, len(lowreso_images), vae_batch_size):
            images = [enlarged(image, width, height) for image in lowreso_images[start : start + vae_batch_size]]
            pixels_BCHW = torch.stack([to_tensor(np.asarray(image)) for image in images])
            shape = (vae.config.latent_channels, *(vae_code.latent_size(vae, side) for side in (height, width)))
            noise_Chw = torch.randn(shape, generator=torch_generator(0, "latent upscaler"))
            latents.append(vae_code.encode(vae, pixels_BCHW, noise_Chw.expand(len(images), *shape)))
        unscaled_BChw = torch.cat(latents).to(device, dtype)
        sharp_BChw = torch.cat([self.network(part) for part in unscaled_BChw.split(batch_size)])
        return sharp_BChw * vae.config.scaling_factor


def enlarged(image: Image.Image, width: int, height: int) -> Image.Image:
    """As the network expects it, before its latents are made."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def load_upscaler(file: str, flag: str) -> LatentUpscaler:
    """The upscaler with the weights of a file; OptionError naming `flag` for one that is not such a file."""
    return LatentUpscaler(network_of(load_tensors(file, flag), file, flag))


def network_of(tensors: Mapping[str, torch.Tensor], file: str, flag: str) -> Upscaler:
    """The network with these weights; raises OptionError, which names `file`, where they are not of such a network."""
    network = Upscaler(has_inner_biases="conv2.bias" in tensors)
    known = {name for name in tensors if re.fullmatch(r"(conv|bn|resblock)[\w.]+", name)}
    try:
        network.load_state_dict({name: tensors[name] for name in known})
    except RuntimeError:
        raise OptionError(flag, f"{file} does not hold a latent upscaler", "name the file of its weights") from None
    return network
