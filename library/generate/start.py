"""What pictures start from: noise, pictures (img2img) or latents, and start noise of another kind.

Shape letters: B pictures, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from library.data.headers import BadImage, read_header
from library.data.images import load_picture, to_tensor
from library.diffusion.noise import pyramid_noise
from library.families.base import ModelBundle, ModelFamily
from library.generate.request import GenerationRequest
from library.generate.start_options import StartNoiseOptions
from library.models import vae
from library.options import OptionError
from library.randomness import python_random, torch_generator

# Says what a batch starts from beside noise: clean latents (B, C, h, w) as the U-Net sees them, or None for nothing.
Start = Callable[[ModelFamily, ModelBundle, Sequence[GenerationRequest]], torch.Tensor | None]

PYRAMID_LEVELS = 10  # at most; a level with a side of 1 is the last


def requested_start(
    family: ModelFamily, bundle: ModelBundle, requests: Sequence[GenerationRequest]
) -> torch.Tensor | None:
    """The latents of the pictures that the requests name, if they name any."""
    if not requests[0].image:
        return None
    pictures = [resized(picture(request.image, "--image_path"), request) for request in requests]
    return encoded(family, bundle, pictures, requests)


def encoded(
    family: ModelFamily, bundle: ModelBundle, pictures: Sequence[Image.Image], requests: Sequence[GenerationRequest]
) -> torch.Tensor:
    """Scaled latents (B, C, h, w), float32, sampled with noise of each picture's own seed."""
    pixels = [to_tensor(np.asarray(picture)) for picture in pictures]
    seeds = [request.noise_seed for request in requests]
    return family.latent_scale * vae_samples(bundle, pixels, seeds, "picture to start from")


def vae_samples(
    bundle: ModelBundle, images_CHW: Sequence[torch.Tensor], seeds: Sequence[int], purpose: str
) -> torch.Tensor:
    """Unscaled latents of images in [-1, 1], one by one: a picture depends on nothing that is drawn beside it."""
    latents = []
    for image_CHW, seed in zip(images_CHW, seeds, strict=True):
        height, width = (vae.latent_size(bundle.vae, side) for side in image_CHW.shape[1:])
        shape = (1, bundle.vae.config.latent_channels, height, width)  # pyright: ignore[reportAttributeAccessIssue]
        noise_1Chw = torch.randn(shape, generator=torch_generator(seed, purpose))
        latents.append(vae.encode(bundle.vae, image_CHW.unsqueeze(0), noise_1Chw))
    return torch.cat(latents)


def picture(path: str, flag: str) -> Image.Image:
    """An upright RGB picture; OptionError names `flag` and the file where it can't be read."""
    try:
        return Image.fromarray(load_picture(path, read_header(path).orientation).rgb_HWC)
    except BadImage as error:
        raise OptionError(flag, f"{path} {error}", "replace it") from None


def resized(image: Image.Image, request: GenerationRequest) -> Image.Image:
    """In the size of the request."""
    size = (request.width, request.height)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def vary(noise_Chw: torch.Tensor, options: StartNoiseOptions, seed: int) -> torch.Tensor:
    """A picture's start noise with pyramid noise and an offset, where its seed draws them."""
    if not options.is_on:
        return noise_Chw
    draw = python_random(seed, "start noise")
    pyramid, offset = draw.random(), draw.random()  # drawn in any case: one option does not change the other's draw
    discount_at, amount = draw.random(), draw.gauss(0.0, 1.0)
    if options.pyramid_noise_discount_range and pyramid < (options.pyramid_noise_prob or 0):
        low, high = options.pyramid_noise_discount_range
        generator = torch_generator(seed, "pyramid start noise")
        channels, height, width = noise_Chw.shape
        levels = pyramid_noise((channels, height, width), PYRAMID_LEVELS, low + (high - low) * discount_at, generator)
        noise_Chw = noise_Chw + levels
        noise_Chw = noise_Chw / noise_Chw.std()
    if options.noise_offset_range and offset < (options.noise_offset_prob or 0):
        low, high = options.noise_offset_range
        noise_Chw = noise_Chw + low + (high - low) * amount
    return noise_Chw
