"""Aspect-ratio buckets: which size an image is trained at.

Sizes are (width, height) in pixels. Rounding is floor(x + 0.5) everywhere, as in the trade's scripts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from library.data.options import BucketOptions

Size = tuple[int, int]


class Placement(NamedTuple):
    """How an image becomes a training image: resized to `resized_wh`, which covers `bucket_wh`, then cut to it."""

    bucket_wh: Size
    resized_wh: Size
    interpolation: str | None = None  # of resizing; None: by area or Lanczos

    @property
    def cropped_share(self) -> float:
        """The share of the resized image that is cut away (0-1)."""
        return 1 - math.prod(self.bucket_wh) / math.prod(self.resized_wh)


class Cut(NamedTuple):
    """One way to cut a training image out of its resized image, in pixels of the latter."""

    resized_wh: Size
    x: int
    y: int
    size_wh: Size


def central_cut(placement: Placement) -> Cut:
    """Equally much is cut away on opposite sides."""
    (width, height), (bucket_w, bucket_h) = placement.resized_wh, placement.bucket_wh
    return Cut(placement.resized_wh, (width - bucket_w) // 2, (height - bucket_h) // 2, placement.bucket_wh)


def random_cut(placement: Placement, draw: random.Random) -> Cut:
    """Anywhere, each place as likely as another."""
    (width, height), (bucket_w, bucket_h) = placement.resized_wh, placement.bucket_wh
    x = draw.randint(0, width - bucket_w)
    return Cut(placement.resized_wh, x, draw.randint(0, height - bucket_h), placement.bucket_wh)


def bucket_sizes(options: BucketOptions) -> list[Size]:
    """The sizes that images are sorted into, ascending by width, then height.

    The area is that of `resolution`, counted in squares of the step; min is rounded down and max up to the step.
    """
    assert options.resolution is not None
    if not options.enable_bucket:
        return [options.resolution]
    step = options.side_step
    low = options.min_bucket_reso // step * step
    high = -(-options.max_bucket_reso // step) * step
    area = (options.resolution[0] // step) * (options.resolution[1] // step)
    square = math.isqrt(area) * step
    sizes = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, area // (width // step) * step)
        if height:  # beyond `area` steps of width not one step of height is left
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def place_images(sizes: Iterable[Size], options: BucketOptions) -> list[Placement]:
    """The placement of each image size; equal sizes are computed once."""
    place = _FreeBuckets(options) if options.enable_bucket and options.bucket_no_upscale else _FixedBuckets(options)
    known: dict[Size, Placement] = {}
    placements = []
    for size in sizes:
        if size not in known:
            known[size] = place(size)
        placements.append(known[size])
    return placements


def covering(size_wh: Size, bucket_wh: Size) -> Placement:
    """The image scaled, its aspect ratio kept, to cover the bucket."""
    width, height = size_wh
    is_wider = width / height > bucket_wh[0] / bucket_wh[1]
    scale = bucket_wh[1] / height if is_wider else bucket_wh[0] / width
    return Placement(bucket_wh, (_rounded(width * scale), _rounded(height * scale)))


def aspect_error(size_wh: Size, placement: Placement) -> float:
    """Aspect ratio of the bucket minus that of the image."""
    return placement.bucket_wh[0] / placement.bucket_wh[1] - size_wh[0] / size_wh[1]


def crop_ltrb(size_wh: Size, bucket_wh: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the image *contained* in its bucket.

    These are the numbers models of the trade are conditioned on (SDXL). They don't describe the real cut; they are
    kept because trained weights depend on them.
    """
    ratio = size_wh[0] / size_wh[1]
    width, height = bucket_wh
    if width / height > ratio:
        contained_w, contained_h = height * ratio, float(height)
    else:
        contained_w, contained_h = float(width), width / ratio
    left, top = math.floor((width - contained_w) / 2), math.floor((height - contained_h) / 2)
    return left, top, left + contained_w, top + contained_h


def crop_yx(size_wh: Size, bucket_wh: Size, *, flipped: bool) -> tuple[int, int]:
    """(top, left) of :func:`crop_ltrb`, mirrored for a mirrored image."""
    left, top, right, _bottom = crop_ltrb(size_wh, bucket_wh)
    return int(top), int(bucket_wh[0] - right if flipped else left)


class _FixedBuckets:
    """Buckets known beforehand: the one of nearest aspect ratio, the image scaled to cover it."""

    def __init__(self, options: BucketOptions) -> None:
        self.sizes = bucket_sizes(options)
        self.ratios = np.array([width / height for width, height in self.sizes])

    def __call__(self, size_wh: Size) -> Placement:
        width, height = size_wh
        ratio = width / height
        bucket = size_wh if size_wh in self.sizes else self.sizes[int(np.abs(self.ratios - ratio).argmin())]
        return covering(size_wh, bucket)


class _FreeBuckets:
    """Buckets that follow the images, which are shrunk to the area of the resolution but never enlarged."""

    def __init__(self, options: BucketOptions) -> None:
        assert options.resolution is not None
        self.step = options.side_step
        self.area = math.prod(options.resolution)

    def __call__(self, size_wh: Size) -> Placement:
        width, height = size_wh
        ratio = width / height
        fitting = (float(width), float(height))
        if width * height > self.area:
            fitting = (math.sqrt(self.area * ratio), self.area / math.sqrt(self.area * ratio))
        if self._floored(min(fitting)) == 0:
            return self._sliver(size_wh)
        resized = size_wh if width * height <= self.area else self._shrunk(fitting, ratio)
        return Placement((resized[0] // self.step * self.step, resized[1] // self.step * self.step), resized)

    def _shrunk(self, fitting: tuple[float, float], ratio: float) -> Size:
        """One side exact in steps: of the two ways, the one nearer to the image's aspect ratio."""
        by_width = self._floored(fitting[0])
        by_width_height = self._floored(by_width / ratio)
        by_height = self._floored(fitting[1])
        error_by_width = abs(by_width / by_width_height - ratio) if by_width_height else math.inf
        error_by_height = abs(self._floored(by_height * ratio) / by_height - ratio)
        if error_by_width < error_by_height:
            return by_width, _rounded(by_width / ratio)
        return _rounded(by_height * ratio), by_height

    def _sliver(self, size_wh: Size) -> Placement:
        """An image shorter than one step: its short side becomes one step, its long side is cut to the area."""
        scale = self.step / min(size_wh)
        resized = tuple(max(self.step, _rounded(side * scale)) for side in size_wh)
        longest = max(self.step, self.area // self.step // self.step * self.step)
        bucket = tuple(min(longest, side // self.step * self.step) for side in resized)
        return Placement((bucket[0], bucket[1]), (resized[0], resized[1]))

    def _floored(self, length: float) -> int:
        return _rounded(length) // self.step * self.step


def _rounded(length: float) -> int:
    return int(length + 0.5)
