"""Networks while a batch is drawn: their multipliers, weights calculated beforehand, and regions.

Shape letters: N networks, H W pixels of the region map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from library.generate.drawing import Drawing, Part
from library.generate.request import GenerationRequest

ANY_SIZE = (64, 64)  # of pictures, where none is drawn
CHANNELS = 3  # red, green and blue: so many networks have a channel of the region map


class AppliedNetwork(Protocol):
    """A network that is hooked to a model, whoever wrote it; see library.targets.adapter.Adapted."""

    def set_multiplier(self, multiplier: float) -> None: ...

    def back_up_weights(self) -> None: ...

    def restore_weights(self) -> None: ...

    def calculate_weights(self) -> None: ...

    def set_region(self, part: int, is_last: bool, mask_HW: torch.Tensor) -> None: ...

    def begin_generation(self, batch: int, num_parts: int, size: tuple[int, int], shared: dict[Any, Any]) -> None: ...

    def leave_region(self) -> None: ...


@dataclass(frozen=True)
class NetworkInUse:
    """A network, its multiplier where a prompt asks for none, and whether its weights are calculated beforehand."""

    network: AppliedNetwork
    multiplier: float
    is_calculated: bool = False


class Networks(Part):
    """The networks that take part in drawing, in their order.

    Weights that are calculated beforehand stay until a batch asks for other multipliers.
    """

    def __init__(self, networks: Sequence[NetworkInUse], device: torch.device) -> None:
        self._networks = [item.network for item in networks]
        self._defaults = tuple(item.multiplier for item in networks)
        self._calculated = [item.network for item in networks if item.is_calculated]
        self._now = self._defaults
        self._calculated_at: tuple[float, ...] | None = None
        self._device = device
        self._masks: dict[tuple[str, int | None], torch.Tensor] = {}

    @contextmanager
    def prepared(self, requests: Sequence[GenerationRequest]) -> Iterator[None]:
        """The multipliers of the batch; see also :func:`multipliers_of`."""
        first = requests[0]
        self._set(multipliers_of(first, self._defaults))
        if self._calculated and self._calculated_at != self._now:
            for network in self._calculated:
                network.back_up_weights() if self._calculated_at is None else network.restore_weights()
            for network in self._calculated:
                network.calculate_weights()
            self._calculated_at = self._now
        try:
            yield
        finally:
            self._set(self._defaults)

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        """In regional use each network gets its part of the prompt and its mask."""
        first = drawing.first
        if not first.is_regional:
            yield
            return
        shared: dict[Any, Any] = {}
        masks_NHW = self._region_masks(first)
        for part, network in enumerate(self._networks):
            network.set_region(part, part == len(self._networks) - 1, masks_NHW[part])
        for network in self._networks:
            size = first.width, first.height
            network.begin_generation(len(drawing.requests), len(first.part_texts), size, shared)
        try:
            yield
        finally:
            for network in self._networks:
                network.leave_region()

    @contextmanager
    def for_text_of(self, part: int | None) -> Iterator[None]:
        """The block in which the network of this part of the prompt alone acts on text encoders, and none for None.

        By the contract of regional use a network acts on every n-th row of n parts, beginning with its own: as the
        first one of one part it acts on all rows.
        """
        multipliers = self._now
        self._set(tuple(value if index == part else 0.0 for index, value in enumerate(multipliers)))
        network = self._networks[part] if part is not None and part < len(self._networks) else None
        try:
            if network is not None:
                network.set_region(0, False, torch.ones(1, 1, device=self._device))
                network.begin_generation(0, 1, ANY_SIZE, {})  # a batch of 0: no row is a negative prompt's
            yield
        finally:
            if network is not None:
                network.leave_region()
            self._set(multipliers)

    def _set(self, multipliers: tuple[float, ...]) -> None:
        for network, now, wanted in zip(self._networks, self._now, multipliers, strict=True):
            if now != wanted:
                network.set_multiplier(wanted)
        self._now = multipliers

    def _region_masks(self, request: GenerationRequest) -> torch.Tensor:
        assert request.region_map is not None
        key = request.region_map, request.region_colors
        if key not in self._masks:
            self._masks[key] = region_masks(*key, len(self._networks)).to(self._device)
        return self._masks[key]


def multipliers_of(request: GenerationRequest, defaults: tuple[float, ...]) -> tuple[float, ...]:
    """A multiplier for each network: what the request says, its last one for all further networks, or the defaults."""
    given = request.multipliers
    return (given + given[-1:] * len(defaults))[: len(defaults)] if given else defaults


def region_masks(path: str, num_colors: int | None, count: int) -> torch.Tensor:
    """(N, H, W) masks of `count` networks, 0 to 1 in float32.

    Without colours the first three networks have the red, green and blue channel. With them network i, below
    `num_colors`, has the pixels of one colour: bit 0 of i + 1 stands for red, bit 1 for green and bit 2 for blue, each
    255 or 0. All further networks have the whole picture.
    """
    with Image.open(path) as image:
        pixels_HWC = np.asarray(image.convert("RGB"))
    masks = np.ones((count, *pixels_HWC.shape[:2]), np.float32)
    for index in range(min(count, CHANNELS if num_colors is None else num_colors)):
        if num_colors is None:
            masks[index] = pixels_HWC[..., index] / 255
        else:
            color = [255 * (index + 1 >> bit & 1) for bit in range(CHANNELS)]
            masks[index] = (pixels_HWC == color).all(axis=-1)
    return torch.from_numpy(masks)
