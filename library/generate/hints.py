"""Guide images as networks see them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from library.generate.control_options import GUIDE, Preprocessor
from library.generate.request import GenerationRequest
from library.generate.start import picture, resized


def hints(requests: Sequence[GenerationRequest], index: int, preprocessor: Preprocessor) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1] on the CPU: the guide image number `index` of each request, at its size."""
    return torch.stack([_hint(request, index, preprocessor) for request in requests])


def _hint(request: GenerationRequest, index: int, preprocessor: Preprocessor) -> torch.Tensor:
    pixels_HWC = np.array(resized(picture(request.guide_images[index], GUIDE), request))
    return to_hint(preprocessed(pixels_HWC, preprocessor))


def preprocessed(pixels_HWC: np.ndarray, preprocessor: Preprocessor) -> np.ndarray:
    """What a network is shown of an RGB picture; both (H, W, 3) uint8."""
    if preprocessor.thresholds is None:
        return pixels_HWC
    edges_HW = cv2.Canny(pixels_HWC, *preprocessor.thresholds)
    return np.repeat(edges_HW[:, :, None], 3, axis=2)


def to_hint(pixels_HWC: np.ndarray) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1] of (H, W, 3) uint8."""
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 255


def at_size_of(hint_BCHW: torch.Tensor, latents_BChw: torch.Tensor, factor: int) -> torch.Tensor:
    """The hint `factor` times as high and wide as the latents, which some methods draw at other sizes for a while."""
    height, width = (size * factor for size in latents_BChw.shape[-2:])
    if hint_BCHW.shape[-2:] == (height, width):
        return hint_BCHW
    return F.interpolate(hint_BCHW, (height, width), mode="bilinear", antialias=True)
