"""ControlNets while drawing (Zhang et al. 2023, arXiv:2302.05543): one after the other from step to step, or summed.

Shape letters: B pictures, R rows of the U-Net, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from library.families.base import Conditioning, Residuals
from library.families.control import control_residuals
from library.generate.control_options import ControlFile
from library.generate.drawing import Drawing, Part
from library.generate.hints import at_size_of, hints
from library.models.vae import downscaling


@dataclass
class Control:
    """A ControlNet of a run; `index` is the place of its guide image among those of a request."""

    net: Any  # diffusers' ControlNetModel
    file: ControlFile
    index: int


def takes_part(file: ControlFile, drawing: Drawing) -> bool:
    """Whether a network has a say in the step at hand."""
    return has_say(file.weight, file.ratio, drawing.progress)


def has_say(weight: float, ratio: float, progress: float) -> bool:
    """Whether a network of this weight and share of the steps has a say when `progress`, a share too, is done."""
    return weight != 0 and ratio >= progress


class ControlNets(Part):
    """Adds what the ControlNets say to the conditioning of each step.

    As the trade does, several ones take turns from step to step, and a turn is left out where its network has had its
    share of the steps; with `sums` all of them speak in every step.
    """

    def __init__(self, controls: Sequence[Control], *, sums: bool) -> None:
        self.controls = controls
        self.sums = sums
        self._hints: list[torch.Tensor] = []  # of each network, (B, 3, H, W)

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        device = drawing.latents_BChw.device
        if drawing.first.is_controlled:
            self._hints = [
                hints(drawing.requests, control.index, control.file.preprocessor).to(device)
                for control in self.controls
            ]
        try:
            yield
        finally:
            self._hints = []

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        if not self._hints:
            return conditioning
        pairs = list(zip(self.controls, self._hints, strict=True))
        at_hand = pairs if self.sums else [pairs[drawing.index % len(pairs)]]
        residuals = conditioning.residuals
        for control, hint_BCHW in at_hand:
            if takes_part(control.file, drawing):
                residuals = self._residuals(drawing, conditioning, control, hint_BCHW).plus(residuals)
        return replace(conditioning, residuals=residuals)

    def _residuals(
        self, drawing: Drawing, conditioning: Conditioning, control: Control, hint_BCHW: torch.Tensor
    ) -> Residuals:
        inputs_RChw, timesteps_R = drawing.unet_inputs(drawing.latents_BChw, conditioning)
        hint_BCHW = at_size_of(hint_BCHW, inputs_RChw, downscaling(drawing.bundle.vae))
        conditioning = drawing.without_regions(conditioning)
        hint_RCHW = hint_BCHW.repeat(len(inputs_RChw) // len(hint_BCHW), 1, 1, 1)
        inputs_RChw = inputs_RChw[:, : control.net.config.in_channels]
        return control_residuals(control.net, inputs_RChw, timesteps_R, conditioning, hint_RCHW, control.file.weight)
