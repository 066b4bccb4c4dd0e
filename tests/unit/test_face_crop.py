"""Cutting around the face that a file name tells of."""

import logging
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.config import face_crop_notes
from library.data.face_crop import Face, face_cut, face_in_name
from library.data.options import AugmentOptions, BucketOptions, CacheOptions
from library.options import OptionError
from tests.tiny_data import tiny_images
from tests.tiny_runs import build

FACE = Face(400, 300, 100, 80)


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_10_20_30_40.png", Face(10, 20, 30, 40)),
        ("some/my_old_cat_10_20_30_40.jpg", Face(10, 20, 30, 40)),
        ("10_20_30_40.png", None),
        ("folder_with_many_parts/cat.png", None),
        ("a_10_20_30_x.png", None),
        ("a_0_20_30_40.png", None),
        ("a_10_20_0_0.png", None),
    ],
)
def test_the_face_is_read_from_the_name(name, face):
    assert face_in_name(name) == face


def cuts(image=(1000, 800), target=(256, 256), face=FACE, range_=(1.5, 3.0), anywhere=False, tries=300):
    return [face_cut(image, target, face, range_, random.Random(seed), anywhere=anywhere) for seed in range(tries)]


def test_the_face_takes_the_asked_share_of_the_short_side():
    scales = [cut.resized_wh[0] / 1000 for cut in cuts()]
    assert min(scales) == pytest.approx(256 / (100 * 3.0), abs=0.01)  # a third of the short side
    assert max(scales) == pytest.approx(1.0, abs=0.01)  # 256 / 150 would enlarge the picture
    larger_face = [cut.resized_wh[0] / 1000 for cut in cuts(face=Face(400, 300, 240, 200))]
    assert min(larger_face) == pytest.approx(256 / (240 * 3.0), abs=0.01)
    assert max(larger_face) == pytest.approx(256 / (240 * 1.5), abs=0.01)


def test_the_face_lies_in_the_middle_give_or_take_a_twentieth():
    for cut in cuts():
        scale = cut.resized_wh[0] / 1000
        for position, centre, side in ((cut.x, 400, 1000), (cut.y, 300, 800)):
            free = centre * scale - 128 >= 6 and (side - centre) * scale - 128 >= 6
            assert not free or abs(position + 128 - centre * scale) <= 100 / 20 + 1


def test_no_shift_without_a_range_nor_for_small_faces():
    assert len({cut[1:3] for cut in cuts(range_=(2.0, 2.0))}) == 1
    small = cuts(face=Face(400, 300, 30, 30), target=(64, 64), range_=(1.0, 64 / 30))
    assert {(cut.x + 32 - round(400 * cut.resized_wh[0] / 1000)) for cut in small} <= {-1, 0, 1}


def test_random_crop_reaches_far():
    places = [cut.x / cut.resized_wh[0] for cut in cuts(anywhere=True)]
    assert min(places) == 0.0 and max(places) > 0.5


def test_an_image_of_the_right_size_stays_and_a_small_one_is_enlarged():
    assert set(cuts(image=(256, 256))) == {((256, 256), 0, 0, (256, 256))}
    assert {cut.resized_wh for cut in cuts(image=(200, 128), face=Face(90, 60, 20, 20))} == {(400, 256)}


SIDES = st.integers(16, 3000)


@given(SIDES, SIDES, st.sampled_from([(64, 64), (128, 64), (512, 768)]), st.data(), st.booleans(), st.integers(0, 9))
def test_every_cut_lies_inside_its_image(width, height, target, data, anywhere, seed):
    face = Face(*(data.draw(st.integers(1, side)) for side in (width, height, width, height)))
    low = data.draw(st.floats(0.1, 5))
    cut = face_cut((width, height), target, face, (low, low * 2), random.Random(seed), anywhere=anywhere)
    assert cut.size_wh == target
    assert 0 <= cut.x <= cut.resized_wh[0] - target[0] and 0 <= cut.y <= cut.resized_wh[1] - target[1]


@pytest.mark.parametrize("value", [(0, 1), (-1, 2), (3, 1)])
def test_ranges_that_are_none(value):
    with pytest.raises(OptionError, match="^--face_crop_aug_range: "):
        AugmentOptions(face_crop_aug_range=value)


def test_where_it_has_no_effect_and_whose_names_say_nothing(tmp_path, caplog):
    tiny_images(tmp_path / "1_cat", 2)
    augment = AugmentOptions(face_crop_aug_range=(1.0, 2.0))
    with caplog.at_level(logging.INFO):
        build(tmp_path, augment=augment, bucket=BucketOptions((64, 64)))
    assert "--face_crop_aug_range: 0 of 2 images have a face position in their name" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        data = build(tmp_path, augment=augment)
    assert "face position" not in caplog.text
    configs = [dataset.config for dataset in data.datasets]
    assert face_crop_notes(configs, CacheOptions()) == ["--face_crop_aug_range has no effect with --enable_bucket"]
    (note,) = face_crop_notes(configs, CacheOptions(cache_latents=True))
    assert "no effect with cached latents" in note
    assert not face_crop_notes([replace(configs[0], subsets=())], CacheOptions())
