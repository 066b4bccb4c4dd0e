"""ControlNet-LLLite networks while drawing: they change the input of attention layers by a guide image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from library.families.base import Conditioning
from library.generate.control import takes_part
from library.generate.control_options import ControlFile
from library.generate.drawing import Drawing, Part
from library.generate.hints import at_size_of, hints
from library.models.vae import downscaling


class ImageNetwork(Protocol):
    """What is asked of a network that stands on the U-Net's layers and sees a guide image."""

    def set_cond_image(self, cond_image: torch.Tensor | None) -> None:
        """Guide images (B, 3, H, W) in [-1, 1] for inputs of B rows, or a multiple of them; None: change nothing."""
        ...

    def set_multiplier(self, multiplier: float) -> None: ...


@dataclass
class LLLite:
    """A ControlNet-LLLite of a run; `index` is the place of its guide image among those of a request."""

    network: ImageNetwork
    file: ControlFile
    index: int


class LLLiteControl(Part):
    """Shows each network its guide images, and silences it when it has had its share of the steps."""

    def __init__(self, controls: Sequence[LLLite]) -> None:
        self.controls = controls
        self._hints: list[torch.Tensor] = []  # of each network, (B, 3, H, W)
        self._shown_hw: tuple[int, int] | None = None

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        device = drawing.latents_BChw.device
        if drawing.first.is_controlled:
            self._hints = [
                hints(drawing.requests, control.index, control.file.preprocessor).to(device) * 2 - 1
                for control in self.controls
            ]
        try:
            yield
        finally:
            self._hints, self._shown_hw = [], None
            for control in self.controls:
                control.network.set_cond_image(None)

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        if self._hints:
            self._show(drawing)
            for control in self.controls:
                is_heard = takes_part(control.file, drawing)
                control.network.set_multiplier(control.file.weight if is_heard else 0.0)
        return conditioning

    def _show(self, drawing: Drawing) -> None:
        """Give the networks their images, once for each size that the latents have."""
        height, width = drawing.latents_BChw.shape[-2:]
        if self._shown_hw == (height, width):
            return
        self._shown_hw = (height, width)
        factor = downscaling(drawing.bundle.vae)
        for control, hint_BCHW in zip(self.controls, self._hints, strict=True):
            control.network.set_cond_image(at_size_of(hint_BCHW, drawing.latents_BChw, factor))
