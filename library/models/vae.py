"""Images to latents and back, with the VAE's half-precision policy in one place.

Latents here are unscaled VAE samples: the family's `latent_scale` is applied by who feeds the U-Net. Autocast is off:
the VAE computes in the precision of its weights. float16 overflows in some VAEs; where the result is not finite the
same input is computed again in float32. bfloat16 has float32's range and needs no such care.

`vae` is diffusers' AutoencoderKL everywhere. Shape letters: B images, C channels, H W pixels or latent pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from library.checkpoints.safetensors_io import raw_bytes

logger = logging.getLogger(__name__)


def encode(vae: Any, images_BCHW: torch.Tensor, noise_BCHW: torch.Tensor) -> torch.Tensor:
    """Unscaled float32 latents, mean + std * noise, of images in [-1, 1].

    `noise_BCHW` is N(0, 1) of the latents' shape; H and W must be multiples of the VAE's factor (8).
    """

    def posterior(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distribution = vae.encode(images).latent_dist
        return distribution.mean, distribution.std

    mean, std = _robust(vae, posterior, images_BCHW)
    return mean + std * noise_BCHW.to(mean)


def decode(vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 images in [-1, 1] (clamped) of unscaled latents."""
    (images,) = _robust(vae, lambda latents: (vae.decode(latents).sample,), latents_BCHW)
    return images.clamp(-1, 1)


def fingerprint(vae: Any, dtype: torch.dtype | None = None) -> str:
    """A hash of what makes latents: names, precision and values of the encoder's weights, as they are or in `dtype`."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            tensor = tensor.to(dtype or tensor.dtype)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def latent_size(vae: Any, pixels: int) -> int:
    """Latent pixels of `pixels` along one side."""
    return pixels // downscaling(vae)


def downscaling(vae: Any) -> int:
    """Pixels per latent pixel along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _robust(
    vae: Any, compute: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The float32 results of `compute`, in the VAE's precision, or in float32 where float16 overflows."""
    weight = next(vae.parameters())
    with torch.autocast(weight.device.type, enabled=False):
        inputs = inputs.to(weight.device)
        results = tuple(result.float() for result in compute(inputs.to(weight.dtype)))
        if weight.dtype != torch.float16 or all(bool(result.isfinite().all()) for result in results):
            return results
        logger.warning("the VAE overflows in float16: computing in float32 (--no_half_vae does so from the start)")
        with _in_float32(vae):
            return tuple(result.float() for result in compute(inputs.float()))


@contextlib.contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    dtype = next(vae.parameters()).dtype
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
