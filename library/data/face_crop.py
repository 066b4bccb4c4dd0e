"""Cutting around faces: images whose file names say where the face is, as face detectors of the trade name them.

"name_cx_cy_w_h.png": centre and size of the face in pixels of the file. With --face_crop_aug_range lo,hi the training
image is cut so that its short side is between lo and hi times as long as the face, as far as the image allows.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

from library.data.buckets import Cut, Size

logger = logging.getLogger(__name__)

PIECES = 5  # of a name with a face position: at least one for the name, and four numbers
SMALLEST_SHIFTED = 40  # pixels of the file: the position of smaller faces is not varied


class Face(NamedTuple):
    """Centre and size, in pixels of the image file."""

    x: int
    y: int
    width: int
    height: int


def face_in_name(path: str) -> Face | None:
    """The face position that a file name ends with, or None."""
    pieces = os.path.splitext(os.path.basename(path))[0].split("_")
    try:
        face = Face(*map(int, pieces[-4:])) if len(pieces) >= PIECES else None
    except ValueError:
        return None
    return face if face and face.x > 0 and max(face.width, face.height) > 0 else None


def face_cut(
    image_wh: Size,
    target_wh: Size,
    face: Face,
    scale_range: tuple[float, float],
    draw: random.Random,
    *,
    anywhere: bool,
) -> Cut:
    """One cut around the face; `anywhere` (--random_crop) lets the face lie far from its centre.

    An image that has the target's size is taken as it is; a smaller one is enlarged until it covers it.
    """
    if image_wh == target_wh:
        return Cut(image_wh, 0, 0, target_wh)
    low, high = scale_range
    side, short_side = max(face.width, face.height), min(target_wh)
    covering = max(target / length for target, length in zip(target_wh, image_wh, strict=True))
    smallest = max(covering, min(1.0, short_side / (side * high)))
    largest = max(smallest, min(1.0, short_side / (side * low)))
    scale = draw.uniform(smallest, largest) if smallest < largest else smallest
    width, height = (
        max(target, math.floor(length * scale + 0.5)) for target, length in zip(target_wh, image_wh, strict=True)
    )
    shift = side if low != high and side > short_side // 10 and side >= SMALLEST_SHIFTED else 0
    places = {}
    for axis, centre, length, target in (  # the vertical first
        ("y", face.y * scale, height, target_wh[1]),
        ("x", face.x * scale, width, target_wh[0]),
    ):
        middle = math.floor(centre + 0.5)
        start = middle - target // 2
        if anywhere:
            reach = max(length - middle, middle)
            start += draw.randint(0, reach) + draw.randint(0, reach) - reach
        elif shift:
            start += draw.randint(-shift // 20, shift // 20)
        places[axis] = min(max(start, 0), length - target)
    return Cut((width, height), places["x"], places["y"], target_wh)


def report_faces(have_one: Sequence[bool]) -> None:
    """Log how many of the images to be cut around faces say where theirs is."""
    if not all(have_one):
        say = logger.info if any(have_one) else logger.warning
        say(
            "--face_crop_aug_range: %d of %d images have a face position in their name (name_cx_cy_w_h); "
            "the others are cut as without it",
            sum(have_one),
            len(have_one),
        )
