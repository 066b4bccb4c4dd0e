"""Picture sheets of training samples: each picture as the model would get it, with its caption and what else is known.

What is drawn comes from library.data.inspect.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from library.data.inspect import LONGEST_SIDE, ShownSample
from library.generate.lettering import in_lines, line_height, with_font

COLUMNS, ROWS = 6, 4  # cards on a sheet
CARD, PICTURE = 236, LONGEST_SIDE  # pixels: width of a card, and the longer side of its picture
GAP, MARGIN, PADDING = 14, 28, 12  # pixels between cards, around all of them, inside a card
TITLE_SIZE, TEXT_SIZE = 22, 13  # pixels
TEXT_WIDTH = CARD - 2 * PADDING
CAPTION_LINES = 5  # what is longer ends in an ellipsis
PAPER, CARD_PAPER, INK, PALE_INK, ALARM_INK, BEHIND = "#eceff2", "#ffffff", "#1b1f24", "#646c76", "#b3261e", "#e3e6ea"
BATCH_COLOURS = ("#2f6f9f", "#b0682a")  # in turn, so that one sees where a batch ends
SAMPLES_PER_SHEET = COLUMNS * ROWS
BAND = line_height(TEXT_SIZE) + 8  # pixels: the top of a card, which names its batch


@dataclass(frozen=True)
class Card:
    """A sample and its tokens."""

    sample: ShownSample
    num_tokens: int
    num_cut_off: int


def dataset_sheet(title: str, subtitle: str, cards: Sequence[Card], batch_sizes: Sequence[int]) -> Image.Image:
    """Up to SAMPLES_PER_SHEET cards, row by row; `batch_sizes` are those of the cards' batches, card by card."""
    rows = [range(first, min(first + COLUMNS, len(cards))) for first in range(0, len(cards), COLUMNS)]
    heights = [max(_height(cards[index]) for index in row) for row in rows]
    top = MARGIN + line_height(TITLE_SIZE) + line_height(TEXT_SIZE) + GAP
    width = max(COLUMNS // 2, len(rows[0])) * (CARD + GAP) - GAP + 2 * MARGIN
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN), title, INK, TITLE_SIZE, width - 2 * MARGIN)
    _write(draw, (MARGIN, MARGIN + line_height(TITLE_SIZE)), subtitle, PALE_INK, TEXT_SIZE, width - 2 * MARGIN)
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (CARD + GAP)
            draw.rounded_rectangle((left, top, left + CARD, top + height), 8, CARD_PAPER)
            _draw_card(sheet, draw, (left, top), cards[index], batch_sizes[index])
        top += height + GAP
    return sheet


def _height(card: Card) -> int:
    """Of a card with all lines of its caption."""
    text, font = with_font(card.sample.caption, TEXT_SIZE)
    num_lines = 3 + len(in_lines(text, font, TEXT_WIDTH, CAPTION_LINES))
    return BAND + PICTURE + num_lines * line_height(TEXT_SIZE) + 3 * PADDING


def _draw_card(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], card: Card, batch_size: int
) -> None:
    (left, upper), sample = corner, card.sample
    colour = BATCH_COLOURS[sample.batch % len(BATCH_COLOURS)]
    draw.rounded_rectangle((left, upper, left + CARD, upper + BAND), 8, colour, corners=(True, True, False, False))
    text_left = left + PADDING
    of_batch = f"batch {sample.batch}" + (f", {sample.place} of {batch_size}" if batch_size > 1 else "")
    _write(draw, (text_left, upper + 4), of_batch, CARD_PAPER, TEXT_SIZE, TEXT_WIDTH)
    upper += BAND
    _paste(sheet, draw, (text_left, upper + PADDING), sample)
    upper += PICTURE + 2 * PADDING
    upper = _write(draw, (text_left, upper), os.path.basename(sample.path), INK, TEXT_SIZE, TEXT_WIDTH)
    upper = _write(draw, (text_left, upper), _of_picture(sample), PALE_INK, TEXT_SIZE, TEXT_WIDTH)
    ink = ALARM_INK if card.num_cut_off else PALE_INK
    upper = _write(draw, (text_left, upper), _of_sample(card), ink, TEXT_SIZE, TEXT_WIDTH)
    caption, ink = (sample.caption, INK) if sample.caption else ("(empty caption)", PALE_INK)
    _write(draw, (text_left, upper), caption, ink, TEXT_SIZE, TEXT_WIDTH, CAPTION_LINES)


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], sample: ShownSample) -> None:
    """The picture in the middle of its square."""
    left, upper = corner
    draw.rectangle((left, upper, left + PICTURE - 1, upper + PICTURE - 1), BEHIND)
    if sample.pixels_HWC is None:
        return
    picture = Image.fromarray(sample.pixels_HWC)
    scale = PICTURE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    sheet.paste(picture, (left + (PICTURE - size[0]) // 2, upper + (PICTURE - size[1]) // 2))


def _of_picture(sample: ShownSample) -> str:
    (width, height), (original_w, original_h) = sample.size_wh, sample.original_wh
    source = "latents" if sample.is_latents else f"{original_w}x{original_h}"
    return f"{width}x{height} from {source}" + (", mirrored" if sample.is_mirrored else "")


def _of_sample(card: Card) -> str:
    sample = card.sample
    repeats = [] if sample.repeats is None else ["1 repeat" if sample.repeats == 1 else f"{sample.repeats} repeats"]
    reg = ["reg."] if sample.is_reg else []
    weight = [] if sample.loss_weight == 1 else [f"weight {sample.loss_weight:g}"]
    cut_off = [f"{card.num_cut_off} cut off"] if card.num_cut_off else []
    tokens = "1 token" if card.num_tokens == 1 else f"{card.num_tokens} tokens"
    return ", ".join([*reg, *repeats, *weight, tokens, *cut_off])


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, ink: str, size: int, width: int, most: int = 1
) -> int:
    """Text in up to `most` lines; returns where the next line begins."""
    text, font = with_font(text, size)
    left, upper = corner
    for line in in_lines(text, font, width, most):
        draw.text((left, upper), line, ink, font)
        upper += line_height(size)
    return upper
