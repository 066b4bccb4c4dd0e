"""Pictures around faces: turned until the eyes are level, brought to a size, cut out.

Pixels are counted from the left and from the top; an image is (H, W, 3) uint8 in RGB order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from library.data.face_crop import Face
from library.data.images import resize

Point = tuple[float, float]  # x, y


class FoundFace(NamedTuple):
    """A face as a detector finds it; right and left are the person's."""

    left: float
    top: float
    width: float
    height: float
    right_eye: Point
    left_eye: Point

    @property
    def size(self) -> int:
        """The longer side, in whole pixels."""
        return max(int(self.width), int(self.height))

    @property
    def place(self) -> Face:
        """Centre and size in whole pixels, as names of files hold them."""
        middle = int(self.left + self.width / 2), int(self.top + self.height / 2)
        return Face(*middle, int(self.width), int(self.height))

    @property
    def angle(self) -> float:
        """By which the line from the right to the left eye falls, in degrees: 0 for an upright face."""
        (right_x, right_y), (left_x, left_y) = self.right_eye, self.left_eye
        return math.degrees(math.atan2(left_y - right_y, left_x - right_x))


@dataclass(frozen=True)
class FaceSettings:
    """What is made of a picture with a face. Sizes in pixels."""

    levels_eyes: bool = False
    crop_size: tuple[int, int] | None = None  # width, height of what is cut out
    crop_ratio: tuple[float, float] | None = None  # the same, in sizes of the face
    face_size: int | None = None  # to which the longer side of the face is brought
    fits: bool = False  # the picture is brought to the smallest size that holds the crop


def around_face(image: np.ndarray, face: FoundFace, settings: FaceSettings) -> tuple[np.ndarray, Face]:
    """The picture that is made, and where the face is in it."""
    x, y, face_width, face_height = face.place
    if settings.levels_eyes:
        image = turned(image, (x, y), face.angle)
    crop_wh = settings.crop_size
    if settings.crop_ratio is not None:
        crop_wh = (max(1, int(settings.crop_ratio[0] * face.size)), max(1, int(settings.crop_ratio[1] * face.size)))
    height, width = image.shape[:2]
    scale = scale_of((width, height), crop_wh, face.size, settings)
    if scale != 1:
        size_wh = (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))
        image = resize(image, size_wh)  # by area when it shrinks, by Lanczos when not
        x, y, face_width, face_height = (int(each * scale + 0.5) for each in (x, y, face_width, face_height))
    if crop_wh is not None:
        image, left, top = cut_around(image, (x, y), crop_wh)
        x, y = x - left, y - top
    return image, Face(x, y, face_width, face_height)


def turned(image: np.ndarray, centre: tuple[int, int], angle: float) -> np.ndarray:
    """Turned around a point by `angle` degrees against the clock; what comes in from outside is a reflection."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(centre, angle, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def scale_of(
    image_wh: tuple[int, int], crop_wh: tuple[int, int] | None, face_size: int, settings: FaceSettings
) -> float:
    """By how much the picture is resized; a crop of a given size always fits into it then.

    A crop in sizes of the face takes the picture as it is.
    """
    if settings.crop_ratio is not None:
        return 1.0
    scale = settings.face_size / max(face_size, 1) if settings.face_size else 1.0
    if crop_wh is None:
        return scale
    covers = max(crop / side for crop, side in zip(crop_wh, image_wh, strict=True))
    return covers if settings.fits else max(scale, covers)


def cut_around(image: np.ndarray, centre: tuple[int, int], crop_wh: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """(the part, its left, its top), with `centre` in its middle as far as the image reaches."""
    height, width = (min(crop, side) for crop, side in zip(crop_wh[::-1], image.shape[:2], strict=True))
    left = min(max(centre[0] - width // 2, 0), image.shape[1] - width)
    top = min(max(centre[1] - height // 2, 0), image.shape[0] - height)
    return image[top : top + height, left : left + width], left, top
