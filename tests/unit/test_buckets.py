"""Bucket lists and choices: the trade's vectors, and what holds for every image size."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import Placement, bucket_sizes, crop_ltrb, crop_yx, place_images
from library.data.options import BucketOptions
from library.options import OptionError


def options(resolution, low=256, high=1024, step=64, *, enable=True, no_upscale=False):
    return BucketOptions(
        resolution=(resolution, resolution) if isinstance(resolution, int) else resolution,
        enable_bucket=enable,
        min_bucket_reso=low,
        max_bucket_reso=high,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
    )


def sizes(text):
    return [tuple(map(int, size.split("×"))) for size in text.split(", ")]


def mirrored(portraits, square):
    return sorted({*portraits, *[(h, w) for w, h in portraits], square})


def test_sizes_512():
    assert bucket_sizes(options(512)) == sizes(
        "256×832, 256×896, 256×960, 256×1024, 320×704, 320×768, 384×640, 448×576, 512×512, 576×448, 640×384, "
        "704×320, 768×320, 832×256, 896×256, 960×256, 1024×256"
    )


def test_sizes_768():
    portraits = sizes("256×1024, 320×1024, 384×1024, 448×1024, 512×1024, 576×960, 576×1024, 640×896, 704×832")
    assert bucket_sizes(options(768)) == mirrored(portraits, (768, 768))


def test_sizes_512x768():
    assert bucket_sizes(options((512, 768))) == sizes(
        "256×1024, 320×1024, 384×896, 384×960, 384×1024, 448×832, 512×704, 512×768, 576×576, 576×640, 640×576, "
        "704×512, 768×512, 832×448, 896×384, 960×384, 1024×256, 1024×320, 1024×384"
    )


def test_sizes_1024():
    portraits = [(256, 2048), (320, 2048), (384, 2048), (448, 2048)]
    portraits += [(512, h) for h in (1856, 1920, 1984, 2048)] + [(576, h) for h in (1664, 1728, 1792)]
    portraits += [(640, h) for h in (1536, 1600)] + [(704, h) for h in (1408, 1472)] + [(768, h) for h in (1280, 1344)]
    portraits += [(832, 1216), (896, 1152), (960, 1088)]
    found = bucket_sizes(options(1024, 256, 2048))
    assert found == mirrored(portraits, (1024, 1024)) and len(found) == 41


CHOICES = [
    (options(512), (640, 480), (576, 448), (597, 448), (0, 8, 576, 440)),
    (options(512), (1920, 1080), (640, 384), (683, 384), (0, 12, 640, 372)),
    (options(512), (1080, 1920), (384, 640), (384, 683), (12, 0, 372, 640)),
    (options(512), (300, 900), (256, 832), (277, 832), (0, 32, 256, 800)),
    (options(512), (4000, 1000), (1024, 256), (1024, 256), (0, 0, 1024, 256)),
    (options(512), (1000, 1001), (512, 512), (512, 513), (0, 0, 511.488511, 512)),
    (options(1024, 256, 2048), (1920, 1080), (1344, 768), (1365, 768), (0, 6, 1344, 762)),
    (options(1024, 256, 2048), (3000, 2000), (1216, 832), (1248, 832), (0, 10, 1216, 820.666667)),
    (options(1024, 256, 2048), (640, 1600), (640, 1600), (640, 1600), (0, 0, 640, 1600)),
]


@pytest.mark.parametrize(("bucket", "image", "chosen", "resized", "ltrb"), CHOICES)
def test_choice_with_upscaling(bucket, image, chosen, resized, ltrb):
    assert place_images([image], bucket) == [Placement(chosen, resized)]
    assert crop_ltrb(image, chosen) == pytest.approx(ltrb, abs=1e-5)


def test_crop_of_a_mirrored_image():
    assert crop_yx((1080, 1920), (384, 640), flipped=True) == (0, 12)
    assert crop_yx((512, 512), (512, 512), flipped=True) == (0, 0)  # not the width, without bucketing either


@pytest.mark.parametrize(
    ("image", "chosen", "resized"),
    [
        ((1920, 1080), (640, 384), (683, 384)),
        ((600, 400), (576, 384), (600, 400)),
        ((700, 500), (512, 384), (538, 384)),
        ((3000, 2000), (576, 384), (576, 384)),
        ((512, 513), (512, 512), (512, 513)),
        ((350, 1000), (256, 704), (256, 731)),
    ],
)
def test_choice_without_upscaling(image, chosen, resized):
    assert place_images([image], options(512, no_upscale=True)) == [Placement(chosen, resized)]


def test_without_buckets_every_image_covers_the_resolution():
    found = place_images([(100, 50), (50, 100), (512, 512)], options(512, enable=False))
    assert [placement.bucket_wh for placement in found] == [(512, 512)] * 3
    assert [placement.resized_wh for placement in found] == [(1024, 512), (512, 1024), (512, 512)]


def test_min_and_max_are_rounded_to_the_step():
    assert bucket_sizes(options(512, 300, 1000)) == bucket_sizes(options(512, 256, 1024))


def test_no_bucket_without_height():
    assert all(min(size) >= 64 for size in bucket_sizes(options(256, 256, 8192)))


@pytest.mark.parametrize("image", [(40, 1000), (1000, 40), (10, 10), (10000, 50)])
def test_tiny_images_without_upscaling_keep_one_step(image):
    bucket, resized, _ = place_images([image], options(512, no_upscale=True))[0]
    assert min(bucket) == 64 and math.prod(bucket) <= 512 * 512
    assert resized[0] >= bucket[0] and resized[1] >= bucket[1]


@given(st.integers(8, 5000), st.integers(8, 5000), st.booleans(), st.sampled_from([64, 256, 512]))
def test_every_image_covers_its_bucket(width, height, no_upscale, resolution):
    bucket = options(resolution, min(256, resolution), no_upscale=no_upscale)
    ((chosen, resized, _),) = place_images([(width, height)], bucket)
    assert resized[0] >= chosen[0] and resized[1] >= chosen[1]
    assert all(side >= 64 and side % 64 == 0 for side in chosen)
    assert not no_upscale or math.prod(chosen) <= resolution**2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"min_bucket_reso": 32}, "min_bucket_reso"),
        ({"min_bucket_reso": 576}, "min_bucket_reso"),
        ({"max_bucket_reso": 448}, "max_bucket_reso"),
        ({"bucket_reso_steps": 576}, "bucket_reso_steps"),
        ({"resolution": None}, "resolution"),
    ],
)
def test_contradicting_sizes_are_named(given, named):
    wrong = BucketOptions(**{"resolution": (512, 512), "enable_bucket": True, **given})
    with pytest.raises(OptionError, match=f"^datasets\\[0\\].{named}: "):
        wrong.check("datasets[0].{}".format)


@pytest.mark.parametrize(
    "given",
    [
        {"resolution": (0, 64)},
        {"resolution": (64, 1_000_000)},
        {"bucket_reso_steps": 0},
        {"bucket_reso_steps": 32_768},
        {"min_bucket_reso": 20_000},
        {"max_bucket_reso": 20_000},
    ],
)
def test_sizes_of_no_use_are_refused(given):
    with pytest.raises(OptionError, match=f"^--{next(iter(given))}: "):
        BucketOptions(**given)


def test_a_resolution_of_any_sides_is_an_area_for_buckets():
    found = bucket_sizes(options(500))
    assert (448, 448) in found and (512, 512) not in found
    assert found == sorted({(w, h) for w, h in found} | {(h, w) for w, h in found})
    assert all(side % 64 == 0 for size in found for side in size)
    assert max(map(math.prod, found)) <= 49 * 64 * 64
    (placed,) = place_images([(600, 400)], options(500, no_upscale=True))
    assert placed == Placement((576, 384), (600, 400))
    for bucket in (options(500), options((500, 700), no_upscale=True)):
        bucket.check()


@pytest.mark.parametrize("side", [500, 4])
def test_without_buckets_sides_are_multiples_of_8(side):
    with pytest.raises(OptionError, match=f"^--resolution: {side} is not a multiple of 8; use {max(8, side - 4)}, or"):
        options((512, side), enable=False).check()


@pytest.mark.parametrize(("step", "used"), [(1, 8), (60, 64), (64, 64)])
def test_steps_the_model_can_not_use_are_rounded_up(step, used):
    given = options(256, low=64, high=512, step=step)
    assert bucket_sizes(given) == bucket_sizes(options(256, low=64, high=512, step=used))
    assert [f"{used} is used" in sentence for sentence in given.without_effect()] == [True] * (step != used)
