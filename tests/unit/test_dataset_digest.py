"""The digest of the training data: it tells a resumed run whether its samples would still be the same."""

import shutil
from dataclasses import fields, replace

import pytest

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CaptionOptions,
    FolderOptions,
    LoaderOptions,
    MaskOptions,
    SourceOptions,
)
from tests.tiny_data import tiny_image, tiny_images
from tests.tiny_runs import build

CAPTION = {
    "shuffle_caption": True,
    "caption_extension": ".text",
    "keep_tokens": 1,
    "caption_prefix": "a",
    "caption_suffix": "b",
    "caption_dropout_rate": 0.1,
    "caption_dropout_every_n_epochs": 2,
    "caption_tag_dropout_rate": 0.1,
    "token_warmup_min": 2,
    "token_warmup_step": 3,
    "caption_separator": ";",
    "keep_tokens_separator": "|||",
    "secondary_separator": ";;",
    "enable_wildcard": True,
}
AUGMENT = {
    "color_aug": True,
    "flip_aug": True,
    "random_crop": True,
    "face_crop_aug_range": (1.0, 2.0),
    "resize_interpolation": "box",
}
MASKS = {"alpha_mask": True}
FOLDER = {"num_repeats": 5, "class_tokens": "c", "is_reg": True}
BUCKET = {
    "resolution": (64, 128),
    "enable_bucket": True,
    "min_bucket_reso": 128,
    "max_bucket_reso": 512,
    "bucket_reso_steps": 8,
    "bucket_no_upscale": True,
}
OPTIONS = {"caption": CAPTION, "augment": AUGMENT, "masks": MASKS, "folder": FOLDER, "bucket": BUCKET}
PLACES = {"image_dir", "metadata_file", "conditioning_data_dir"}  # their contents count
WITHOUT_EFFECT = {"cache_info", "data_index", "custom_attributes"}
CHANGES = [(group, name, value) for group, values in OPTIONS.items() for name, value in values.items()]


@pytest.fixture
def folder(tmp_path):
    tiny_images(tmp_path / "train" / "2_cat", 3)
    tiny_images(tmp_path / "train" / "1_dog", 1)
    return tmp_path / "train"


def configs_of(folder):
    bucket = BucketOptions((64, 64))
    groups = (bucket, CaptionOptions(), AugmentOptions(), LoaderOptions())
    return load_configs(SourceOptions(str(folder)), *groups)


def digest_of(configs):
    return TrainingData.build(configs, seed=0, on_bad_image="stop").digest()


def test_every_option_is_tried():
    groups = {
        "caption": CaptionOptions,
        "augment": AugmentOptions,
        "masks": MaskOptions,
        "folder": FolderOptions,
        "bucket": BucketOptions,
    }
    for name, group in groups.items():
        assert {field.name for field in fields(group)} - PLACES - WITHOUT_EFFECT == set(OPTIONS[name])


@pytest.mark.parametrize(("group", "name", "value"), CHANGES)
def test_it_follows_every_option_of_datasets_and_subsets(folder, group, name, value):
    (config,) = configs_of(folder)
    before = digest_of([config])
    if group == "bucket":
        changed = replace(config, bucket=replace(config.bucket, **{name: value}))
    else:
        second = config.subsets[1]
        second = replace(second, **{group: replace(getattr(second, group), **{name: value})})
        changed = replace(config, subsets=(config.subsets[0], second))
    assert digest_of([changed]) != before


def test_it_follows_the_batch_size_but_not_the_way_of_writing(folder):
    (config,) = configs_of(folder)
    assert digest_of([replace(config, batch_size=2)]) != digest_of([config])
    assert digest_of([replace(config, from_file=True)]) == digest_of([config])


def test_it_follows_content_not_place(folder, tmp_path):
    digest = build(folder).digest()
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert build(moved).digest() == digest
    (moved / "2_cat" / "image_000.txt").write_text("another caption")
    assert build(moved).digest() != digest


def test_it_notices_another_image_of_the_same_name_and_size(folder):
    digest = build(folder).digest()
    tiny_image((64, 64), seed=9).save(folder / "2_cat" / "image_000.png")
    assert build(folder).digest() != digest
