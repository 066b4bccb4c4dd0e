"""From requests to latents to pictures: the one denoising function, for generators and for previews while training.

Nothing here draws from a global generator, changes a module or patches a library, so a preview leaves the training
that it interrupts bit for bit as it was.

Shape letters: B pictures, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from library.diffusion.samplers import begin_with, make_scheduler, stepper
from library.families.base import ModelBundle, ModelFamily
from library.generate.conditions import PromptEncoder
from library.generate.drawing import Drawing, Part
from library.generate.guidance import guided
from library.generate.request import GenerationRequest
from library.generate.start import Start, requested_start, vary
from library.models import vae

Progress = Callable[[int, int], None]  # told (steps done, steps in all) after every step


@torch.no_grad()
def denoise(
    family: ModelFamily,
    bundle: ModelBundle,
    requests: Sequence[GenerationRequest],
    *,
    encoder: PromptEncoder | None = None,
    parts: Sequence[Part] = (),
    start: Start = requested_start,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Unscaled VAE latents (B, C, h, w), float32, of requests with equal `batch_key` and equal numbers of text windows.

    Noise is drawn per picture from its own CPU generator in float32: first the start noise, then what the sampler adds
    at each step, so a picture depends neither on its batch nor on the device. `start` says where they start from beside
    noise: from the pictures that they name, where nothing else is given. `encoder` keeps encoded prompts from
    batch to batch; `parts` take part in their order. The U-Net runs as it is given (dtype, device, autocast, networks);
    the sampler runs in float32.
    """
    generators = [torch.Generator().manual_seed(request.noise_seed) for request in requests]
    with ExitStack() as block:
        for part in parts:
            block.enter_context(part.prepared(requests))
        drawing = begin(family, bundle, requests, encoder or PromptEncoder(family, bundle), generators, start)
        for part in parts:
            block.enter_context(part.taking_part(drawing))
        step = stepper(drawing.scheduler, generators)
        for drawing.index, timestep in enumerate(drawing.timesteps):  # noqa: B020  the place is the drawing's
            conditioning = drawing.conditioning
            for part in parts:
                conditioning = part.condition(drawing, conditioning)
            predictions_RChw = drawing.predict(drawing.latents_BChw, conditioning)
            prediction_BChw = guided(drawing.first, predictions_RChw.split(len(requests)))
            for part in parts:
                prediction_BChw = part.guide(drawing, prediction_BChw)
            drawing.latents_BChw = step(prediction_BChw, timestep, drawing.latents_BChw)
            for part in parts:
                part.after_step(drawing)
            if progress is not None:
                progress(drawing.index + 1, len(drawing.timesteps))
    return drawing.latents_BChw / family.latent_scale


def begin(
    family: ModelFamily,
    bundle: ModelBundle,
    requests: Sequence[GenerationRequest],
    encoder: PromptEncoder,
    generators: Sequence[torch.Generator],
    start: Start = requested_start,
) -> Drawing:
    """The batch before its first step: its prompts encoded, its noise drawn and, where it starts from pictures, mixed
    with their latents as diffusers' StableDiffusionImg2ImgPipeline does: the last steps * strength steps are left."""
    first, model = requests[0], bundle.source
    assert all(request.batch_key == first.batch_key for request in requests)
    scheduler = make_scheduler(
        first.sampler,
        v_prediction=model.v_prediction,
        zero_terminal_snr=model.zero_terminal_snr or first.zero_terminal_snr,
        sigmas=first.sigmas,
    )
    scheduler.set_timesteps(first.steps, device="cpu")  # the sampler's few scalars stay with the host: no waiting
    noise_BChw = start_noise(bundle, requests, generators).to(next(bundle.unet.parameters()).device)
    source_BChw = start(family, bundle, requests)
    if source_BChw is None:
        timesteps, latents_BChw = scheduler.timesteps, noise_BChw * scheduler.init_noise_sigma
    else:
        source_BChw = source_BChw.to(noise_BChw)
        timesteps = begin_with(scheduler, first.steps_done)
        latents_BChw = scheduler.add_noise(source_BChw, noise_BChw, timesteps[:1])
    return Drawing(
        family,
        bundle,
        requests,
        scheduler,
        timesteps,
        noise_BChw,
        latents_BChw,
        encoder(requests),
        source_BChw=source_BChw,
    )


def start_noise(
    bundle: ModelBundle, requests: Sequence[GenerationRequest], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """(B, C, h, w) standard normal noise, float32 on the CPU, picture i from `generators[i]`."""
    height, width = (vae.latent_size(bundle.vae, pixels) for pixels in (requests[0].height, requests[0].width))
    config: Any = bundle.vae.config
    shape = (config.latent_channels, height, width)
    noises = [torch.randn(shape, generator=generator) for generator in generators]
    varied = [vary(noise, request.start_noise, request.seed) for noise, request in zip(noises, requests, strict=True)]
    return torch.stack(varied)


class NotFiniteError(ValueError):
    """Latents or pictures that are no numbers."""


def check_finite(tensor: torch.Tensor, whose: str) -> None:
    """Raise NotFiniteError for anything but finite numbers."""
    if not tensor.isfinite().all():
        raise NotFiniteError(f"{whose} output is not finite: the weights or their precision are at fault")


@torch.no_grad()
def decode(bundle: ModelBundle, latents_BChw: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
    """Pictures of a model's latents, see :func:`pixels_of`."""
    return pixels_of(bundle.vae, latents_BChw, at_once)


def pixels_of(autoencoder: Any, latents_BChw: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
    """Pictures (B, H, W, 3), uint8 on the CPU, of unscaled latents, all or a number of them `at_once`.

    Raises NotFiniteError rather than make black pictures of what is no number.
    """
    parts = latents_BChw.split(at_once or len(latents_BChw))
    images_BCHW = torch.cat([vae.decode(autoencoder, part) for part in parts])  # [-1, 1]
    check_finite(images_BCHW, "the VAE's")
    pixels_BCHW = ((images_BCHW / 2 + 0.5) * 255).round().to(torch.uint8)
    return pixels_BCHW.permute(0, 2, 3, 1).cpu()
