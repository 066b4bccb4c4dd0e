"""Copies of pictures: equal files, and pictures that look alike."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from library.data import lookalikes
from library.data.images import find_broken
from library.data.lookalikes import GRID, Look, Looks, alike
from tests.tiny_data import tiny_image


def looks_of(*paths) -> dict[str, Look]:
    looks = Looks()
    assert not find_broken(map(str, paths), looks.note)
    return looks.by_path


def names(groups):
    return [[path.rpartition("/")[2] for path in group] for group in groups]


def test_a_picture_resized_and_saved_again_looks_alike(tmp_path):
    for seed in range(8):
        tiny_image((96, 80), seed=seed).save(tmp_path / f"{seed}.png")
    with Image.open(tmp_path / "3.png") as image:
        image.resize((211, 176), Image.Resampling.BICUBIC).save(tmp_path / "3 again.jpg", quality=60)
        image.save(tmp_path / "3 larger.webp", quality=50)
    assert names(alike(looks_of(*tmp_path.iterdir()))) == [["3 again.jpg", "3 larger.webp", "3.png"]]


def test_drawings_on_white_paper_do_not_look_alike(tmp_path):
    for index in range(4):
        page = np.full((100, 100, 3), 255, np.uint8)
        page[10 + 20 * index : 14 + 20 * index, 20:80] = 0
        Image.fromarray(page).save(tmp_path / f"{index}.png")
    assert alike(looks_of(*tmp_path.iterdir())) == []


def test_of_pictures_of_one_colour_nothing_is_said():
    plain = Look(bytes([7]) * (GRID * GRID * 3), False)
    assert alike({"a": plain, "b": plain}) == []


def test_of_equal_files_one_takes_part():
    look = random_looks(1)["0"]
    assert alike({"a": look, "b": look}, equal=[["a", "b"]]) == []
    assert alike({"a": look, "b": look, "c": look}, equal=[["a", "b"]]) == [["a", "c"]]


def random_looks(count: int) -> dict[str, Look]:
    random = np.random.default_rng(0)
    return {str(i): Look(random.integers(0, 256, GRID * GRID * 3, np.uint8).tobytes(), False) for i in range(count)}


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_comparing_in_parts_finds_what_comparing_all_finds(monkeypatch, at_once):
    """Forty pictures, each with up to three noisy copies of its own."""
    random = np.random.default_rng(1)
    looks, expected = {}, []
    for name, look in random_looks(40).items():
        copies = [f"{name}.{number}" for number in range(int(random.integers(0, 4)))]
        looks[name] = look
        for copy in copies:
            cells = np.frombuffer(look.colours, np.uint8).astype(int) + random.integers(-2, 3, GRID * GRID * 3)
            looks[copy] = Look(cells.clip(0, 255).astype(np.uint8).tobytes(), False)
        expected += [sorted([name, *copies])] if copies else []
    monkeypatch.setattr(lookalikes, "COMPARED_AT_ONCE", at_once)
    assert alike(looks) == sorted(expected)


@pytest.mark.parametrize(("alpha", "expected"), [(255, False), (254, True)])
def test_transparent_is_what_has_transparent_pixels(tmp_path, alpha, expected):
    image = tiny_image((32, 32)).convert("RGBA")
    image.putpixel((3, 3), (1, 2, 3, alpha))
    image.save(tmp_path / "a.png")
    (look,) = looks_of(tmp_path / "a.png").values()
    assert look.is_transparent is expected
