"""Contact sheets as one picture: a block for each prompt, labels above its columns and left of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from library.generate.contact_sheet import (
    CAPTION_SIZE,
    GAP,
    INK,
    MARGIN,
    PALE_INK,
    PAPER,
    TITLE_LINES,
    TITLE_SIZE,
    thumbnail,
)
from library.generate.grid import Block
from library.generate.lettering import in_lines, line_height, with_font

CELLS = (256, 192, 128, 96, 64, 48)  # pixels: the longer side of a picture, by how many there are
MOST_PIXELS = 100_000_000  # of a sheet: what browsers and picture viewers still show
LABEL_WIDTH = 180  # pixels: the most that labels left of rows take
LABEL_LINES = 3
EMPTY = "#dcdcdc"


@dataclass(frozen=True)
class Layout:
    """Sizes of one block, in pixels."""

    cell_wh: tuple[int, int]
    label_width: int  # 0 where no row has one
    columns: int
    header_height: int  # title, subtitle and labels of columns
    rows: int

    @property
    def width(self) -> int:
        return self.label_width + self.columns * (self.cell_wh[0] + GAP) - GAP

    @property
    def height(self) -> int:
        return self.header_height + self.rows * (self.cell_wh[1] + GAP)


def grid_sheet(blocks: Sequence[Block]) -> Image.Image:
    """All blocks below each other; pictures get smaller where there are many."""
    for cell in CELLS:
        layouts = [_layout(block, cell) for block in blocks]
        width = max(max(layout.width for layout in layouts), 480) + 2 * MARGIN
        height = sum(layout.height + MARGIN for layout in layouts) + MARGIN
        if width * height <= MOST_PIXELS:
            break
    sheet = Image.new("RGB", (width, height), PAPER)
    top = MARGIN
    for block, layout in zip(blocks, layouts, strict=True):
        _draw_block(sheet, block, layout, top, cell)
        top += layout.height + MARGIN
    return sheet


def _layout(block: Block, cell: int) -> Layout:
    sizes = [_size(path, cell) for row in block.rows for path in row.pictures if path is not None] or [(cell, cell)]
    cell_wh = (max(width for width, _ in sizes), max(height for _, height in sizes))
    labels = [part for row in block.rows for part in row.label.splitlines()]
    label_lines = max((len(_lines(name, max(cell_wh[0], 64), CAPTION_SIZE)) for name in block.columns), default=1)
    label_width = min(LABEL_WIDTH, max(map(_width, labels))) + GAP if labels else 0
    width = max(480, label_width + len(block.columns) * (cell_wh[0] + GAP) - GAP)
    title_lines = len(_lines(block.title, width, TITLE_SIZE))
    header = title_lines * line_height(TITLE_SIZE) + (1 + label_lines) * line_height(CAPTION_SIZE) + GAP
    return Layout(cell_wh, label_width, len(block.columns), header, len(block.rows))


def _size(path: object, cell: int) -> tuple[int, int]:
    with Image.open(str(path)) as image:  # reads its header alone
        scale = min(1, cell / max(image.size))
        return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _width(label: str) -> int:
    text, font = with_font(label, CAPTION_SIZE)
    return math.ceil(font.getlength(text))


def _lines(text: str, width: int, size: int) -> list[str]:
    text, font = with_font(text, size)
    return in_lines(text, font, width, TITLE_LINES if size == TITLE_SIZE else LABEL_LINES)


def _draw_block(sheet: Image.Image, block: Block, layout: Layout, top: int, cell: int) -> None:
    cell_width, cell_height = layout.cell_wh
    y = _write(sheet, block.title, (MARGIN, top), max(480, layout.width), TITLE_SIZE, INK)
    text, font = with_font(block.subtitle, CAPTION_SIZE)
    line = in_lines(text, font, max(480, layout.width), 1)[0]
    ImageDraw.Draw(sheet).text((MARGIN, y), line, PALE_INK, font)
    labels_top = y + line_height(CAPTION_SIZE) + GAP // 2
    lefts = [MARGIN + layout.label_width + column * (cell_width + GAP) for column in range(layout.columns)]
    for left, name in zip(lefts, block.columns, strict=True):
        _write(sheet, name, (left, labels_top), max(cell_width, 64), CAPTION_SIZE, INK)
    y = top + layout.header_height
    for row in block.rows:
        label_top = y
        for part in row.label.splitlines():
            label_top = _write(sheet, part, (MARGIN, label_top), LABEL_WIDTH, CAPTION_SIZE, INK)
        for left, path in zip(lefts, row.pictures, strict=True):
            if path is None:
                sheet.paste(EMPTY, (left, y, left + cell_width, y + cell_height))
                continue
            with Image.open(path) as image:
                small = thumbnail(image)
            small.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(small, (left, y))
        y += cell_height + GAP


def _write(sheet: Image.Image, text: str, place_xy: tuple[int, int], width: int, size: int, ink: str) -> int:
    """Write lines of text; returns where the next one would begin."""
    text, font = with_font(text, size)
    x, y = place_xy
    for line in _lines(text, width, size):
        ImageDraw.Draw(sheet).text((x, y), line, ink, font)
        y += line_height(size)
    return y
