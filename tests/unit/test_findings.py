"""What is found out about training data before training."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import Placement, place_images
from library.data.findings import enlargement, find, kept_part
from library.data.images import place
from library.data.loading import TrainImage
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions
from library.data.records import ImageRecord
from library.text.lengths import count_tokens
from library.text.tokens import ClipTokenizer
from tests.tiny_data import tiny_image, tiny_images
from tests.tiny_runs import build, cache

COUNT = partial(count_tokens, ClipTokenizer())


def found(data, num_processes=1, token_limit=75, count=COUNT):
    return find(data.datasets, data.scan, num_processes=num_processes, token_limit=token_limit, count_tokens=count)


# ---------------------------------------------------------------------------------------------- one picture


sides = st.integers(40, 400)


@given(sides, sides, st.booleans())
def test_what_a_cut_keeps(width, height, no_upscale):
    options = BucketOptions((96, 96), True, 64, 256, 32, bucket_no_upscale=no_upscale)
    (placement,) = place_images([(width, height)], options)
    kept = kept_part(placement)
    assert kept.left >= 0 and kept.top >= 0
    assert kept.left + kept.width <= 1 + 1e-9 and kept.top + kept.height <= 1 + 1e-9
    assert kept.width * kept.height == pytest.approx(1 - placement.cropped_share)


def test_the_box_is_what_training_sees():
    placement = Placement((64, 96), (90, 97))
    pixels = np.zeros((97, 90, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(90)[None], np.arange(97)[:, None]
    seen, kept = place(pixels, placement), kept_part(placement)
    assert tuple(seen[0, 0, :2]) == (round(kept.left * 90), round(kept.top * 97))
    assert (kept.width * 90, kept.height * 97) == pytest.approx((64, 96))


def test_enlargement():
    record = ImageRecord("x.png", (50, 40), 1, "", 1)
    assert enlargement(TrainImage(record, 0, Placement((96, 80), (100, 80)), 0)) == 2.0


# ---------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("reg", [None, 7, 30])
def test_batches_are_those_of_the_run(tmp_path, num_processes, reg):
    tiny_images(tmp_path / "train" / "3_a", 5, sizes=((64, 64), (96, 64), (64, 96)))
    if reg:
        tiny_images(tmp_path / "reg" / "1_b", reg, sizes=((64, 64), (96, 64)), seed=50)
    data = build(tmp_path / "train", tmp_path / "reg" if reg else None, batch_size=4)
    findings = found(data, num_processes)
    assert sum(bucket.batches for bucket in findings.buckets) == data.batches_per_epoch(num_processes)
    assert sum(bucket.samples for bucket in findings.buckets) == 30 if reg else 15
    assert all(0 < bucket.last_batch <= bucket.batch_size for bucket in findings.buckets)
    assert sum(len(bucket.images) for bucket in findings.buckets) == 5 + (reg or 0)


def test_regularisation_images_that_make_batches_of_one(tmp_path):
    tiny_images(tmp_path / "train" / "1_a", 1, sizes=((64, 64),))
    tiny_images(tmp_path / "reg" / "1_b", 3, sizes=((64, 64), (96, 64), (64, 96)))
    data = build(tmp_path / "train", tmp_path / "reg", batch_size=4)
    findings = found(data)
    assert sum(bucket.batches for bucket in findings.buckets) + 1 == data.batches_per_epoch(1) == 2
    (use,) = findings.regularisation
    assert (use.images, use.with_repeats, use.per_epoch, use.training, use.alone) == (3, 3, 1, 1, 1)


# ---------------------------------------------------------------------------------------------- captions


def test_captions_are_counted_as_they_are_trained(tmp_path):
    tiny_images(tmp_path / "1_a", 3, captions=["one two three", "word " * 80, "one two three"])
    caption = CaptionOptions(caption_prefix="now", caption_suffix="then", caption_dropout_rate=1.0)
    findings = found(build(tmp_path, caption=caption))
    assert sorted(tokens for _, tokens in findings.captions.examples) == [5, 82]
    assert (findings.captions.num_different, findings.captions.longest, findings.captions.num_cut_off) == (2, 82, 1)
    long, *_ = findings.captions.longest_captions
    assert long.record.path.endswith("image_001.jpg") and long.tokens == 82
    assert not found(build(tmp_path, caption=caption), token_limit=150).captions.num_cut_off


def test_of_several_lines_the_longest_counts(tmp_path):
    tiny_images(tmp_path / "1_a", 1, captions=["short\nthis one is longer\nso"])
    findings = found(build(tmp_path, caption=CaptionOptions(enable_wildcard=True)))
    assert [tokens for _, tokens in findings.captions.examples] == [1, 4, 1]
    assert findings.captions.longest_captions[0].caption == "this one is longer"


def test_emphasis_is_not_counted():
    assert count_tokens(ClipTokenizer(), ["a (red:1.3) [cat]"], weighted=True) == [3]
    assert count_tokens(ClipTokenizer(), ["a (red:1.3) [cat]"]) == [11]
    assert count_tokens(ClipTokenizer(), ["word " * 100], weighted=True) == [100]


def test_missing_and_empty_captions(tmp_path):
    paths = tiny_images(tmp_path / "2_sks cat", 4)
    paths[1].with_suffix(".txt").write_text(" \n")
    paths[2].with_suffix(".txt").unlink()
    (folder,) = found(build(tmp_path)).folders
    assert (folder.repeats, folder.class_tokens, len(folder.images)) == (2, "sks cat", 4)
    assert folder.uncaptioned == (str(paths[2]),) and folder.empty_captions == (str(paths[1]),)


# ---------------------------------------------------------------------------------------------- pictures


def test_odd_pictures_are_named(tmp_path):
    folder = tmp_path / "1_a"
    paths = tiny_images(folder, 4)
    turned = tiny_image((96, 64), seed=9)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "copy.png").write_bytes(paths[0].read_bytes())
    clear = tiny_image((64, 64), seed=10).convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(folder / "clear.png")
    (folder / "animation.gif").write_bytes(b"GIF89a")
    (folder / "cut.png").write_bytes(paths[2].read_bytes()[:-30])
    findings = found(build(tmp_path, on_bad_image="skip"))

    def names(items):
        return [item.rpartition("/")[2] for item in items]

    assert names(findings.rotated) == ["turned.jpg"] and names(findings.transparent) == ["clear.png"]
    assert [names(group) for group in findings.equal] == [["copy.png", "image_000.png"]]
    assert names(findings.passed_over) == ["animation.gif"] and names(findings.scan.broken) == ["cut.png"]
    assert findings.num_looked_at == len(findings.images) == 7


@pytest.mark.parametrize("random_crop", [False, True])
def test_a_cut_that_moves_is_known(tmp_path, random_crop):
    tiny_images(tmp_path / "1_a", 2)
    findings = found(build(tmp_path, augment=AugmentOptions(random_crop=random_crop)))
    assert {findings.cut_moves(image) for image in findings.images.values()} == {random_crop}


def test_pictures_with_cached_latents_are_not_looked_at_again(tmp_path):
    tiny_images(tmp_path / "1_a", 3)
    still = AugmentOptions()
    assert found(build(tmp_path, augment=still)).num_looked_at == 3
    cache(build(tmp_path, augment=still), cache_latents_to_disk=True)
    tiny_image((64, 64), seed=9).save(tmp_path / "1_a" / "new.png")
    findings = found(build(tmp_path, augment=still))
    assert findings.num_looked_at == 1 and len(findings.images) == 4
