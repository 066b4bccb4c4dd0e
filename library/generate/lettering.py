"""Text on pictures: fonts that have its letters, and lines that are no wider than there is room."""

from __future__ import annotations

import contextlib
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import ImageFont

# fonts of operating systems with more letters than Pillow's own, which has those of ASCII; the fullest ones first
FONTS = ("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msgothic.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf")
ELLIPSIS = " ..."
NO_LETTER = "\U0010ffff"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def line_height(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.4)


def with_font(text: str, size: int) -> tuple[str, Font]:
    """The text and a font that has its letters: the fullest there is.

    A letter that it lacks loses its accent, and one that has none is written as its number in Unicode: \\u732b.
    """
    if text.isascii():
        return text, ImageFont.load_default(size)
    letters = sorted(set(text))
    fonts = [*_installed(size), ImageFont.load_default(size)]
    lacking, font = min(
        ((_lacking(letters, font), font) for font in fonts), key=lambda pair: len(pair[0])
    )  # the first of those that lack least
    return "".join(_spelt(letter) if letter in lacking else letter for letter in text), font


def _installed(size: int) -> Iterator[Font]:
    for name in FONTS:
        with contextlib.suppress(OSError):
            yield ImageFont.truetype(name, size)


def _lacking(letters: Iterable[str], font: Font) -> frozenset[str]:
    """The letters that a font draws as it draws what no font has: as a box."""
    box = _mask(NO_LETTER, font)
    return frozenset(each for each in letters if not each.isspace() and _mask(each, font) == box)


def _mask(letter: str, font: Font) -> bytes:
    mask: Any = font.getmask(letter)
    return bytes(mask)


def _spelt(letter: str) -> str:
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    return plain if plain.isascii() else letter.encode("ascii", "backslashreplace").decode()


def in_lines(text: str, font: Font, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of `width` pixels, broken at blanks, else behind hyphens, else anywhere."""
    lines, rest = [], " ".join(text.split())
    while rest:
        fits = _fitting(rest, font, width)
        if len(lines) == most - 1 and fits < len(rest):
            return [*lines, rest[: _fitting(rest, font, width, ELLIPSIS)].rstrip() + ELLIPSIS]
        if fits < len(rest):
            blank = rest.rfind(" ", 0, fits + 1)
            fits = blank if blank > 0 else max(rest.rfind(mark, 0, fits) for mark in "-_") + 1 or max(1, fits)
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return lines or [""]


def _fitting(text: str, font: Font, width: int, ending: str = "") -> int:
    """How many letters of the text, with `ending` behind them, are no wider than `width`."""
    return bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count] + ending))
