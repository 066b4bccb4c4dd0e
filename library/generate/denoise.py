"""From requests to latents to pictures: the one denoising function, for generators and for previews while training.

Nothing here draws from a global generator, changes a module or patches a library, so a preview leaves the training
that it interrupts bit for bit as it was.

Shape letters: B pictures, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from library.diffusion.samplers import make_scheduler, stepper
from library.families.base import ModelBundle, ModelFamily
from library.generate.conditions import PromptEncoder
from library.generate.request import GenerationRequest
from library.models import vae

Progress = Callable[[int, int], None]  # told (steps done, steps in all) after every step


@torch.no_grad()
def denoise(
    family: ModelFamily,
    bundle: ModelBundle,
    requests: Sequence[GenerationRequest],
    *,
    encoder: PromptEncoder | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Unscaled VAE latents (B, C, h, w), float32, of requests with equal `batch_key` and equal numbers of text windows.

    Noise is drawn per picture from its own CPU generator in float32: first the start noise, then what the sampler adds
    at each step, so a picture depends neither on its batch nor on the device. `encoder` keeps encoded prompts from
    batch to batch. The U-Net runs as it is given (dtype, device, autocast, networks); the sampler runs in float32.
    """
    first = requests[0]
    assert all(request.batch_key == first.batch_key for request in requests)
    conditioning = (encoder or PromptEncoder(family, bundle))(requests)
    source = bundle.source
    scheduler = make_scheduler(
        first.sampler, v_prediction=source.v_prediction, zero_terminal_snr=source.zero_terminal_snr
    )
    scheduler.set_timesteps(first.steps, device="cpu")  # the sampler's few scalars stay with the host: no waiting
    weight = next(bundle.unet.parameters())
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    latents_BChw = start_noise(bundle, requests, generators).to(weight.device) * scheduler.init_noise_sigma
    step = stepper(scheduler, generators)
    num_rows = len(requests) * (2 if first.is_guided else 1)
    for index, timestep in enumerate(scheduler.timesteps):
        inputs_BChw = scheduler.scale_model_input(latents_BChw, timestep).to(weight.dtype)
        inputs_BChw = inputs_BChw.repeat(num_rows // len(requests), 1, 1, 1)
        timesteps_B = torch.full((num_rows,), timestep.item(), dtype=timestep.dtype, device=weight.device)
        prediction_BChw = family.predict(bundle.unet, inputs_BChw, timesteps_B, conditioning).float()
        if first.is_guided:
            prediction_BChw = guided(prediction_BChw, first.scale)
        latents_BChw = step(prediction_BChw, timestep, latents_BChw)
        if progress is not None:
            progress(index + 1, len(scheduler.timesteps))
    return latents_BChw / family.latent_scale


def guided(prediction_BChw: torch.Tensor, scale: float) -> torch.Tensor:
    """u + scale (c - u) of the rows [u..., c...]: classifier-free guidance (Ho and Salimans 2022)."""
    negative_BChw, positive_BChw = prediction_BChw.chunk(2)
    return negative_BChw + scale * (positive_BChw - negative_BChw)


def start_noise(
    bundle: ModelBundle, requests: Sequence[GenerationRequest], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """(B, C, h, w) standard normal noise, float32 on the CPU, picture i from `generators[i]`."""
    height, width = (vae.latent_size(bundle.vae, pixels) for pixels in (requests[0].height, requests[0].width))
    config: Any = bundle.vae.config
    shape = (config.latent_channels, height, width)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def decode(bundle: ModelBundle, latents_BChw: torch.Tensor) -> torch.Tensor:
    """Pictures (B, H, W, 3), uint8 on the CPU, of unscaled latents."""
    images_BCHW = vae.decode(bundle.vae, latents_BChw)  # [-1, 1]
    pixels_BCHW = ((images_BCHW / 2 + 0.5) * 255).round().to(torch.uint8)
    return pixels_BCHW.permute(0, 2, 3, 1).cpu()
