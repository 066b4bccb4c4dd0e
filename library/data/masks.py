"""Masks of training images, at the size of latents.

A mask follows its image through the same resize, cut and mirroring; each latent pixel then gets the mean of the 8 x 8
pixels it stands for. Shape letters: H W pixels, h w latent pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

from library.data.buckets import Cut
from library.data.headers import BadImage
from library.data.images import load_picture
from library.data.options import LATENT_STRIDE
from library.data.records import MaskFile
from library.options import OptionError


def latent_mask(mask_HW: np.ndarray, cut: Cut) -> np.ndarray:
    """(h, w) float32 in [0, 1] of a mask, uint8, that covers the whole image; its own size does not matter."""
    mask_HW = mask_HW.astype(np.float32) / 255
    if mask_HW.shape[::-1] != cut.resized_wh:
        shrinks = cut.resized_wh[0] <= mask_HW.shape[1] and cut.resized_wh[1] <= mask_HW.shape[0]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR  # neither goes beyond what is between black and white
        mask_HW = cv2.resize(mask_HW, cut.resized_wh, interpolation=how)
    width, height = cut.size_wh
    return averaged(
        mask_HW[cut.y : cut.y + height, cut.x : cut.x + width], (height // LATENT_STRIDE, width // LATENT_STRIDE)
    )


def averaged(mask_HW: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A mask in [0, 1] of any size by area at `size_hw`, float32."""
    if mask_HW.shape == size_hw:
        return mask_HW.astype(np.float32)
    (height, width), (h, w) = mask_HW.shape, size_hw
    if height % h or width % w:
        return cv2.resize(mask_HW.astype(np.float32), size_hw[::-1], interpolation=cv2.INTER_AREA)
    return mask_HW.reshape(h, height // h, w, width // w).mean(axis=(1, 3), dtype=np.float32)


def load_mask(file: MaskFile) -> np.ndarray:
    """(H, W) uint8: the red channel of an upright picture, which is all of a grey one; transparent parts are black.

    Raises OptionError for a file that can't be read any more.
    """
    try:
        return load_picture(file.path, file.orientation, background="black").rgb_HWC[..., 0]
    except BadImage as error:
        problem = f"{file.path} can't be read any more ({error})"
        raise OptionError("conditioning_data_dir", problem, "mend it and resume") from None
