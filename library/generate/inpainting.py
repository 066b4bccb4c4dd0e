"""Inpainting: what a mask leaves black stays as it was, with models of both kinds.

Shape letters: B pictures, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from library.data.images import to_tensor
from library.generate.drawing import Drawing, Part
from library.generate.request import GenerationRequest
from library.generate.start import picture, resized, vae_samples


class Inpainting(Part):
    """Keeps what the masks of a batch leave black: after each step it is the source with the noise of the next one.

    Goes last among the parts. Grey mixes both. As diffusers' StableDiffusionInpaintPipeline does for models of four
    channels; the latents of what is kept are in the end exactly those of the source.
    """

    def __init__(self) -> None:
        self._mask_B1hw: torch.Tensor | None = None

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        if drawing.first.mask:
            height, width = drawing.latents_BChw.shape[2:]
            masks = [latent_mask(request, width, height) for request in drawing.requests]
            self._mask_B1hw = torch.stack(masks).to(drawing.latents_BChw)
        try:
            yield
        finally:
            self._mask_B1hw = None

    def after_step(self, drawing: Drawing) -> None:
        if self._mask_B1hw is None:
            return
        kept_BChw = drawing.source_BChw
        assert kept_BChw is not None, "a mask goes with a picture"
        if not drawing.is_last_step:
            next_timestep = drawing.timesteps[drawing.index + 1 : drawing.index + 2]
            kept_BChw = drawing.scheduler.add_noise(kept_BChw, drawing.noise_BChw, next_timestep)
        drawing.latents_BChw = torch.lerp(kept_BChw, drawing.latents_BChw, self._mask_B1hw)


class InpaintingModel(Part):
    """What U-Nets with nine input channels are told beside the latents: the mask, and the picture without its inside.

    Without a mask all is drawn anew, and without a picture, of grey. As diffusers' StableDiffusionInpaintPipeline.
    """

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        channels = drawing.latents_BChw.shape[1]
        if drawing.bundle.unet.config.in_channels == 2 * channels + 1:  # pyright: ignore[reportAttributeAccessIssue]
            drawing.beside_BChw = _mask_and_rest(drawing).to(drawing.latents_BChw)
        yield


def latent_mask(request: GenerationRequest, width: int, height: int) -> torch.Tensor:
    """(1, h, w) in [0, 1]: the share of each latent pixel that is drawn anew."""
    return _grey(_mask(request).resize((width, height), Image.Resampling.BOX))


def _mask_and_rest(drawing: Drawing) -> torch.Tensor:
    """(B, 1 + C, h, w): masks of zeros and ones, and scaled latents of what they leave, grey where they are white."""
    size_hw = tuple(drawing.latents_BChw.shape[2:])
    masks, rests = [], []
    for request in drawing.requests:
        mask_1HW = torch.ones(1, request.height, request.width)
        rest_CHW = torch.zeros(3, request.height, request.width)
        if request.mask:
            mask_1HW = (_grey(_mask(request).resize((request.width, request.height))) >= 0.5).float()
        if request.image:
            source = resized(picture(request.image, "--image_path"), request)
            rest_CHW = to_tensor(np.asarray(source)) * (1 - mask_1HW)
        masks.append(interpolate(mask_1HW.unsqueeze(0), size_hw))
        rests.append(rest_CHW)
    seeds = [request.noise_seed for request in drawing.requests]
    latents_BChw = vae_samples(drawing.bundle, rests, seeds, "what a mask leaves")
    return torch.cat([torch.cat(masks), drawing.family.latent_scale * latents_BChw.cpu()], dim=1)


def _mask(request: GenerationRequest) -> Image.Image:
    """The luminance of a request's mask, transparent parts white."""
    return picture(request.mask, "--mask_path").convert("L")


def _grey(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).unsqueeze(0)
