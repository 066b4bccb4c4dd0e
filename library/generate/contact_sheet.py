"""Pictures of one prompt side by side, each with a line of text below it: how a model changes while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from library.generate.lettering import in_lines, line_height, with_font

CELL = 256  # pixels: the longer side of a picture on the sheet; smaller pictures keep their size
COLUMNS = 8  # pictures in a row
GAP, MARGIN = 12, 24  # pixels between pictures, and around all of them
TITLE_SIZE, CAPTION_SIZE = 20, 15  # pixels
TITLE_LINES = 3  # what is longer ends in an ellipsis
LEAST_WIDTH = 480  # pixels: the title of few and small pictures needs room, too
PAPER, INK, PALE_INK = "#f2f2f2", "#1c1c1c", "#5c5c5c"
MOST = 48  # pictures on a sheet


@dataclass(frozen=True)
class SheetPicture:
    """One picture and what stands below it."""

    image: Image.Image
    caption: str


def thumbnail(image: Image.Image) -> Image.Image:
    """The picture as small as it is on a sheet."""
    small = image.convert("RGB")
    small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return small


def thinned(pictures: Sequence[SheetPicture], most: int = MOST) -> list[SheetPicture]:
    """At most `most` of the pictures, spread evenly over all of them; the first and the last one always stay."""
    if len(pictures) <= most:
        return list(pictures)
    last = len(pictures) - 1
    return [pictures[round(index * last / (most - 1))] for index in range(most)]


def contact_sheet(title: str, subtitle: str, pictures: Sequence[SheetPicture]) -> Image.Image:
    """Rows of pictures under a title, which is broken into lines, and one line in a paler ink."""
    thumbnails = [thumbnail(picture.image) for picture in pictures]
    width = max(image.width for image in thumbnails)
    height = max(image.height for image in thumbnails)
    columns = min(COLUMNS, len(pictures))
    caption_font = ImageFont.load_default(CAPTION_SIZE)
    title, title_font = with_font(title, TITLE_SIZE)
    subtitle, subtitle_font = with_font(subtitle, CAPTION_SIZE)
    width = max(width, *(round(caption_font.getlength(picture.caption)) for picture in pictures))
    inner_width = max(LEAST_WIDTH, columns * (width + GAP) - GAP)
    title_lines = in_lines(title, title_font, inner_width, TITLE_LINES)
    (subtitle_line,) = in_lines(subtitle, subtitle_font, inner_width, 1)
    title_height = len(title_lines) * line_height(TITLE_SIZE)
    top = MARGIN + title_height + line_height(CAPTION_SIZE) + GAP
    row_height = height + line_height(CAPTION_SIZE) + GAP
    rows = -(-len(pictures) // columns)

    sheet = Image.new("RGB", (inner_width + 2 * MARGIN, top + rows * row_height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title_lines):
        draw.text((MARGIN, MARGIN + number * line_height(TITLE_SIZE)), line, INK, title_font)
    draw.text((MARGIN, MARGIN + title_height), subtitle_line, PALE_INK, subtitle_font)
    for index, (picture, image) in enumerate(zip(pictures, thumbnails, strict=True)):
        row, column = divmod(index, columns)
        left, upper = MARGIN + column * (width + GAP), top + row * row_height
        sheet.paste(image, (left + (width - image.width) // 2, upper + height - image.height))
        centre = left + width // 2
        draw.text((centre, upper + height + 4), picture.caption, INK, caption_font, anchor="ma")
    return sheet
