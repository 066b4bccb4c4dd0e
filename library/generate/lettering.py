"""Text on pictures: fonts that have its letters, and lines that are no wider than there is room."""

from __future__ import annotations

import contextlib
import unicodedata
from bisect import bisect_right

from PIL import ImageFont

# fonts of operating systems with more letters than Pillow's own, which has those of ASCII; the fullest ones first
FONTS = ("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msgothic.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf")
ELLIPSIS = " ..."
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def line_height(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.4)


def with_font(text: str, size: int) -> tuple[str, Font]:
    """The text and a font that has its letters; where there is none, accents are dropped and other letters are "?"."""
    if not text.isascii():
        for name in FONTS:
            with contextlib.suppress(OSError):
                return text, ImageFont.truetype(name, size)
        letters = [letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)]
        text = "".join(letters).encode("ascii", "replace").decode()
    return text, ImageFont.load_default(size)


def in_lines(text: str, font: Font, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of `width` pixels, broken at blanks where there are any."""
    lines, rest = [], " ".join(text.split())
    while rest:
        fits = _fitting(rest, font, width)
        if len(lines) == most - 1 and fits < len(rest):
            return [*lines, rest[: _fitting(rest, font, width, ELLIPSIS)].rstrip() + ELLIPSIS]
        blank = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else -1
        fits = blank if blank > 0 else max(1, fits)
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return lines or [""]


def _fitting(text: str, font: Font, width: int, ending: str = "") -> int:
    """How many letters of the text, with `ending` behind them, are no wider than `width`."""
    return bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count] + ending))
