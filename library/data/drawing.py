"""One draw of an image: its pixels, cut and coloured by chance, and the mask that goes with them.

Everything random is a function of (seed, purpose, epoch, sample id). Shape letters: H W pixels, h w latent pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from library.data.buckets import Cut, Placement, central_cut, random_cut
from library.data.face_crop import Face, face_cut
from library.data.headers import BadImage
from library.data.images import augment_color, cut_out, load_picture
from library.data.masks import latent_mask, load_mask
from library.data.options import AugmentOptions
from library.data.records import ImageRecord, MaskFile
from library.options import OptionError
from library.randomness import python_random


class DrawnPicture(NamedTuple):
    """Pixels as they are before mirroring."""

    pixels_HWC: np.ndarray  # uint8
    cut: Cut
    alpha_hw: np.ndarray | None  # float32 in [0, 1] at the size of latents; None where not asked for or not there


def draw_picture(
    record: ImageRecord,
    placement: Placement,
    face: Face | None,
    augment: AugmentOptions,
    seed: int,
    place_in_run: tuple[int, int],
    *,
    with_alpha: bool,
) -> DrawnPicture:
    """Load an image and cut it: around its face, anywhere or in the centre; then vary its colours.

    `place_in_run` is (epoch, sample id). Raises OptionError for an image that can't be read any more.
    """
    try:
        picture = load_picture(record.path, record.orientation)
    except BadImage as error:
        problem = f"{record.path} can't be read any more ({error})"
        raise OptionError("training images", problem, "mend it and resume") from None
    cut = central_cut(placement)
    draw = python_random(seed, "crop", *place_in_run)
    if face is not None and augment.face_crop_aug_range:
        anywhere = augment.random_crop
        cut = face_cut(record.size_wh, placement.bucket_wh, face, augment.face_crop_aug_range, draw, anywhere=anywhere)
    elif augment.random_crop:
        cut = random_cut(placement, draw)
    pixels_HWC = cut_out(picture.rgb_HWC, cut, placement.interpolation)
    if augment.color_aug:
        pixels_HWC = augment_color(pixels_HWC, python_random(seed, "color", *place_in_run))
    alpha_HW = picture.alpha_HW if with_alpha else None
    return DrawnPicture(pixels_HWC, cut, None if alpha_HW is None else latent_mask(alpha_HW, cut))


class MaskFiles:
    """Masks from their files; those of cuts that come again are kept where `keeps` says so."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self._kept: dict[tuple[str, Cut], np.ndarray] = {}

    def __call__(self, file: MaskFile, cut: Cut) -> np.ndarray:
        """(h, w) float32 in [0, 1]."""
        key = (file.path, cut)
        if key in self._kept:
            return self._kept[key]
        mask_hw = latent_mask(load_mask(file), cut)
        if self.keeps:
            self._kept[key] = mask_hw
        return mask_hw


def joined_mask(masks_hw: list[np.ndarray], latent_hw: tuple[int, int], *, flipped: bool) -> torch.Tensor:
    """(1, h, w): the product of masks, mirrored with their image; ones where there are none."""
    mask_hw = np.ones(latent_hw, dtype=np.float32)
    for part_hw in masks_hw:
        mask_hw = mask_hw * part_hw
    return torch.from_numpy(np.ascontiguousarray(mask_hw[:, ::-1] if flipped else mask_hw))[None]
