"""A picture of singular-value energy per block: how much of a change its strongest directions hold.

A row is a block. From left to right directions are added, strongest first, and the color says which share of the
block's squared Frobenius norm they hold together; a mark stands at the rank that was kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from library.checkpoints.safetensors_io import atomic_file
from networks.weights.block_names import block_order

if TYPE_CHECKING:
    import torch

MOST_DIRECTIONS = 1024  # of a module
WIDTH, STRIP_LEFT, STRIP_WIDTH = 1100, 96, 800  # pixels
ROW, GAP, TOP, BOTTOM = 22, 6, 92, 112
BACKGROUND, INK, FAINT, MARK = (255, 255, 255), (34, 38, 46), (120, 126, 138), (226, 62, 87)
EMPTY = (238, 240, 243)  # beyond the directions that are known
# from nothing to all: deep blue, teal, green, pale yellow, as evenly as the eye sees it
COLORS = np.array([(48, 18, 84), (57, 86, 140), (31, 150, 139), (115, 208, 85), (253, 231, 37)], np.float64)
MILESTONES = (0.9, 0.99)  # shares that get a thin line where they are reached
LEGEND = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Spectrum:
    """One module's: what its first 1, 2, ... directions hold together, in squared Frobenius norm."""

    held: np.ndarray
    energy: float  # of all directions
    rank: int  # kept

    @classmethod
    def of(cls, values: torch.Tensor, energy: float, rank: int) -> Spectrum:
        """From the first singular values, descending."""
        return cls(values[:MOST_DIRECTIONS].double().square().cumsum(0).cpu().numpy(), energy, rank)


@dataclass(frozen=True)
class _Row:
    block: str
    shares: np.ndarray  # of the block's energy, by the number of directions
    known: int  # directions of the module with most
    kept: float  # share
    rank: float  # mean


def draw_energy(spectra: Mapping[str, Sequence[Spectrum]], path: Path) -> None:
    """Write the picture of modules' spectra by block as a .png."""
    rows = [_row(block, spectra[block]) for block in sorted(spectra, key=block_order)]
    height = TOP + len(rows) * (ROW + GAP) + BOTTOM
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    most = max(max(row.known for row in rows), 1)
    _title(draw, rows)
    for number, row in enumerate(rows):
        _draw_row(image, draw, row, TOP + number * (ROW + GAP), most)
    bottom = TOP + len(rows) * (ROW + GAP)
    _draw_axis(draw, bottom, most)
    _draw_legend(image, draw, bottom + 62)
    with atomic_file(path) as file:
        image.save(file, "PNG")


def _row(block: str, spectra: Sequence[Spectrum]) -> _Row:
    known = max(1, *(len(each.held) for each in spectra))
    energy = sum(each.energy for each in spectra) or 1.0
    held, kept = np.zeros(known), 0.0
    for each in spectra:
        if len(each.held):
            held += np.concatenate([each.held, np.full(known - len(each.held), each.held[-1])])
            kept += each.held[min(each.rank, len(each.held)) - 1]
    rank = sum(each.rank for each in spectra) / len(spectra)
    return _Row(block, np.clip(held / energy, 0, 1), known, min(kept / energy, 1.0), rank)


# ---------------------------------------------------------------------------------------------- drawing


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _title(draw: ImageDraw.ImageDraw, rows: Sequence[_Row]) -> None:
    draw.text((24, 20), "Singular-value energy by block", INK, _font(22))
    draw.text(
        (24, 52),
        "color: share of the change's energy (squares) that the strongest directions hold together",
        FAINT,
        _font(14),
    )
    right = STRIP_LEFT + STRIP_WIDTH
    draw.text((right + 84, TOP - 14), "energy kept", FAINT, _font(14), anchor="rs")
    draw.text((right + 168, TOP - 14), "mean rank", FAINT, _font(14), anchor="rs")


def _draw_row(image: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, top: int, most: int) -> None:
    middle = top + ROW // 2
    draw.text((STRIP_LEFT - 14, middle), row.block, INK, _font(15), anchor="rm")
    places = np.arange(STRIP_WIDTH) * most // STRIP_WIDTH  # the direction of each column of pixels
    pixels = np.where((places < row.known)[:, None], _colors(row.shares[np.minimum(places, row.known - 1)]), EMPTY)
    strip = np.broadcast_to(pixels.astype(np.uint8), (ROW, STRIP_WIDTH, 3))
    image.paste(Image.fromarray(np.ascontiguousarray(strip)), (STRIP_LEFT, top))
    for share in MILESTONES:
        if row.shares[-1] >= share:
            _draw_milestone(
                draw, STRIP_LEFT + round((np.searchsorted(row.shares, share) + 1) / most * STRIP_WIDTH), top
            )
    x = STRIP_LEFT + round(min(row.rank / most, 1.0) * STRIP_WIDTH)
    draw.rectangle((x - 2, top - 3, x + 1, top + ROW + 2), fill=MARK, outline=BACKGROUND)
    right = STRIP_LEFT + STRIP_WIDTH
    draw.text((right + 84, middle), f"{100 * row.kept:.2f} %", INK, _font(15), anchor="rm")
    draw.text((right + 168, middle), f"{row.rank:.1f}".removesuffix(".0"), INK, _font(15), anchor="rm")


def _draw_milestone(draw: ImageDraw.ImageDraw, x: float, top: float) -> None:
    draw.line((x, top, x, top + ROW - 1), fill=INK)


def _draw_axis(draw: ImageDraw.ImageDraw, top: int, most: int) -> None:
    for tick in _ticks(most):
        x = STRIP_LEFT + round(tick / most * STRIP_WIDTH)
        draw.line((x, top, x, top + 5), fill=FAINT)
        draw.text((x, top + 8), str(tick), FAINT, _font(13), anchor="mt")
    draw.text((STRIP_LEFT + STRIP_WIDTH / 2, top + 28), "directions, strongest first", FAINT, _font(14), anchor="mt")


def _ticks(most: int) -> list[int]:
    """Round numbers from 0 to `most`, about eight of them."""
    step = 1
    while most / step > 9:
        step = step * 2 if str(step)[0] in "15" else step // 2 * 5
    return list(range(0, most + 1, step))


def _draw_legend(image: Image.Image, draw: ImageDraw.ImageDraw, top: int) -> None:
    width, height = 240, 12
    bar = np.broadcast_to(_colors(np.linspace(0, 1, width)).astype(np.uint8), (height, width, 3))
    image.paste(Image.fromarray(np.ascontiguousarray(bar)), (STRIP_LEFT, top))
    for share in LEGEND:
        text = f"{100 * share:.0f} %"
        draw.text((STRIP_LEFT + share * width, top + height + 5), text, FAINT, _font(12), anchor="mt")
    x = STRIP_LEFT + width + 60
    draw.rectangle((x - 2, top - 3, x + 1, top + height + 2), fill=MARK)
    draw.text((x + 12, top + height / 2), "mean of the ranks that were kept", FAINT, _font(14), anchor="lm")
    _draw_milestone(draw, x + 270, top - 5)
    reached = " and ".join(f"{100 * share:.0f} %" for share in MILESTONES)
    draw.text((x + 282, top + height / 2), f"{reached} reached", FAINT, _font(14), anchor="lm")
    draw.rectangle((x + 440, top, x + 440 + height, top + height), fill=EMPTY, outline=FAINT)
    draw.text((x + 462, top + height / 2), "none, or not computed", FAINT, _font(14), anchor="lm")


def _colors(shares: np.ndarray) -> np.ndarray:
    """(..., 3) from 0 to 255 for shares from 0 to 1."""
    places = np.linspace(0, 1, len(COLORS))
    return np.stack([np.interp(shares, places, COLORS[:, channel]) for channel in range(3)], axis=-1)
