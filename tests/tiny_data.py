"""Small training folders for tests: varied images with captions, written in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((64, 64), (96, 64), (64, 96))


def tiny_images(
    folder: Path | str,
    n: int = 4,
    sizes: Sequence[tuple[int, int]] = SIZES,
    captions: Sequence[str] | None = None,
    *,
    seed: int = 0,
    extension: str = ".txt",
) -> list[Path]:
    """Write `n` images, PNG and JPEG by turns, and their captions into `folder`; returns the images' paths, sorted.

    `sizes` (width, height) and `captions` are used in turn; an empty sequence of captions writes no caption files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if captions is None:
        captions = [f"a picture, number {index}, tiny" for index in range(n)]
    paths = []
    for index in range(n):
        path = folder / f"image_{index:03d}{('.png', '.jpg')[index % 2]}"
        tiny_image(sizes[index % len(sizes)], seed=seed + index).save(path)
        if captions:
            path.with_suffix(extension).write_text(captions[index % len(captions)], encoding="utf-8")
        paths.append(path)
    return paths


def tiny_image(size_wh: tuple[int, int], *, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with one bright disc; every seed looks different, also when mirrored."""
    random = np.random.default_rng(seed)
    width, height = size_wh
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    colours = random.uniform(0, 255, (3, 3))
    pixels = colours[0] * x[..., None] + colours[1] * y[..., None] + colours[2] * (1 - x * y)[..., None]
    centre = random.uniform(0.2, 0.8, 2)
    pixels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.03] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
