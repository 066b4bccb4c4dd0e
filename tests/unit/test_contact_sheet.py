"""Sheets of pictures: everything is on them, legible and inside, whatever the number, the sizes and the letters."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from library.generate import lettering
from library.generate.contact_sheet import CELL, COLUMNS, GAP, MARGIN, SheetPicture, contact_sheet, thinned, thumbnail


def plain(colour: str, size_wh: tuple[int, int] = (64, 64), caption: str = "step 100") -> SheetPicture:
    return SheetPicture(Image.new("RGB", size_wh, colour), caption)


def area(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of the pixels of one colour."""
    y, x = np.nonzero((np.asarray(sheet) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(2))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_pictures_stand_side_by_side_in_their_order():
    sheet = contact_sheet("a cat", "ddim", [plain("red"), plain("lime"), plain("blue")])
    red, lime, blue = (area(sheet, colour) for colour in ("red", "lime", "blue"))
    assert all(box[2] - box[0] == box[3] - box[1] == 64 for box in (red, lime, blue)), "as large as they are"
    assert red[2] + GAP <= lime[0] and lime[2] + GAP <= blue[0]
    assert red[1] == lime[1] == blue[1]
    assert sheet.height - red[3] > MARGIN, "there is room for the captions"


def test_large_pictures_shrink_and_rows_are_broken():
    pictures = [plain("gray", (512, 768))] * COLUMNS + [plain("red", (512, 768))]
    sheet = contact_sheet("a cat", "ddim", pictures)
    left, upper, right, lower = area(sheet, "red")
    assert left == MARGIN and (right - left, lower - upper) == (CELL * 2 // 3 + 1, CELL)
    assert upper > MARGIN + CELL + GAP


@pytest.mark.parametrize(
    "title", ["", "word " * 500, "x" * 5000, "Kätzchen 猫 " * 100], ids=["none", "long", "one", "é"]
)
def test_texts_stay_inside(title):
    sheet = np.asarray(contact_sheet(title, title, [plain("red", caption="epoch 12, step 123456")]))
    paper = sheet[0, 0]
    border = np.concatenate([sheet[:, :8].reshape(-1, 3), sheet[:, -8:].reshape(-1, 3), sheet[-8:].reshape(-1, 3)])
    assert (border == paper).all()
    assert sheet.shape[0] < 400


def test_letters_that_no_font_has(monkeypatch):
    monkeypatch.setattr(lettering, "FONTS", ())
    text, font = lettering.with_font("Kätzchen 猫, crème", 15)
    assert text == "Katzchen \\u732b, creme"
    assert isinstance(font, ImageFont.FreeTypeFont)


def test_a_font_without_the_letters_is_as_good_as_none(monkeypatch):
    font = ImageFont.load_default(15)
    monkeypatch.setattr(lettering, "_installed", lambda size: [font])
    assert lettering.with_font("Kätzchen 猫 ©", 15) == ("Katzchen \\u732b ©", font)


def test_names_of_files_break_behind_hyphens_or_anywhere():
    font = ImageFont.load_default(15)
    assert lettering.in_lines("my_cat-step00000100", font, 128, 3) == ["my_cat-", "step00000100"]
    halves = lettering.in_lines("m" * 12, font, 128, 3)
    assert len(halves) == 2 and "".join(halves) == "m" * 12


def test_many_pictures_are_thinned_from_the_first_to_the_last():
    pictures = [plain("red", caption=str(number)) for number in range(500)]
    kept = [int(picture.caption) for picture in thinned(pictures, 48)]
    assert len(kept) == 48 and (kept[0], kept[-1]) == (0, 499)
    assert {later - earlier for earlier, later in zip(kept, kept[1:], strict=False)} <= {10, 11}
    assert thinned(pictures[:48], 48) == pictures[:48]


def test_thumbnails_never_grow():
    assert thumbnail(Image.new("RGBA", (64, 32))).size == (64, 32)
    assert thumbnail(Image.new("L", (1024, 512))).size == (CELL, CELL // 2)
