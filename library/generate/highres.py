"""Highres fix: from the first stage of pictures to what their second stage starts from.

Upscaler modules keep the trade's contract. `create_upscaler(**arguments)` (texts by name) returns an object with
`to(dtype)` or `to(device)`, `support_latents() -> bool` and `upscale(vae, lowreso_images, lowreso_latents, dtype,
width, height, batch_size, vae_batch_size)`, of which either images (a list of PIL images) or latents (scaled) are
given; it returns a list of PIL images or a tensor of scaled latents.

Shape letters: B pictures, C channels, h w latent pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from library.families.base import ModelBundle, ModelFamily
from library.generate.request import GenerationRequest
from library.generate.start import Start, encoded, resized
from library.generate.start_options import UpscalerChoice, upscaler_arguments
from library.models import vae
from library.options import OptionError

FLAG = "--highres_fix_upscaler"
METHODS = ("to", "support_latents", "upscale")


def create_upscaler(choice: UpscalerChoice) -> Any:
    """The module's upscaler, None where no module is asked for; OptionError for one that does not keep the contract."""
    if not choice.module:
        return None
    module = importlib.import_module(choice.module)
    if not callable(getattr(module, "create_upscaler", None)):
        raise OptionError(FLAG, f"{choice.module} has no function create_upscaler", "name a module that has one")
    try:
        upscaler = module.create_upscaler(**upscaler_arguments(choice.arguments))
    except TypeError as error:
        raise OptionError(f"{FLAG}_args", f"{choice.module} does not take them ({error})") from None
    missing = [name for name in METHODS if not callable(getattr(upscaler, name, None))]
    if missing:
        raise OptionError(FLAG, f"the upscaler of {choice.module} has no method {missing[0]}")
    return upscaler


class Enlarger:
    """Enlarges first stages in the way that a run chose."""

    def __init__(self, family: ModelFamily, bundle: ModelBundle, upscaler: Any, at_once: int | None = None) -> None:
        """`at_once`: pictures that the VAE takes at a time."""
        self.family, self.bundle, self.upscaler, self.at_once = family, bundle, upscaler, at_once
        self.weight = next(bundle.unet.parameters())
        if upscaler is not None:
            upscaler.to(self.weight.device)
            upscaler.to(self.weight.dtype)

    def wants_pictures(self, choice: UpscalerChoice) -> bool:
        """Whether the first stage is needed as pictures, not as latents."""
        return not (choice.in_latents if self.upscaler is None else self.upscaler.support_latents())

    def start(
        self,
        requests: Sequence[GenerationRequest],
        latents_BChw: torch.Tensor,
        pictures: Sequence[Image.Image] | None,
    ) -> Start:
        """What the second stages `requests` start from; `latents_BChw` of the first are unscaled."""
        scaled_BChw = self.family.latent_scale * latents_BChw
        if self.upscaler is not None:
            enlarged = self._by_module(requests, scaled_BChw, pictures)
        elif pictures is None:
            sides = (requests[0].height, requests[0].width)
            size_hw = tuple(vae.latent_size(self.bundle.vae, pixels) for pixels in sides)
            enlarged = interpolate(scaled_BChw, size_hw, mode="bilinear", align_corners=False)
        else:
            enlarged = pictures

        def start(
            family: ModelFamily, bundle: ModelBundle, requests: Sequence[GenerationRequest]
        ) -> torch.Tensor | None:
            if isinstance(enlarged, torch.Tensor):
                return enlarged.float()
            return encoded(family, bundle, [resized(image, requests[0]) for image in enlarged], requests)

        return start

    def _by_module(
        self,
        requests: Sequence[GenerationRequest],
        scaled_BChw: torch.Tensor,
        pictures: Sequence[Image.Image] | None,
    ) -> Any:
        first, count = requests[0], len(requests)
        with torch.no_grad():
            return self.upscaler.upscale(
                self.bundle.vae,
                None if pictures is None else list(pictures),
                None if pictures is not None else scaled_BChw.to(self.weight.dtype),
                self.weight.dtype,
                first.width,
                first.height,
                batch_size=count,
                vae_batch_size=self.at_once or count,
            )
