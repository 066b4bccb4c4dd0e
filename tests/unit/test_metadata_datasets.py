"""Datasets of metadata files: their images, sizes and latents, and what is said when something does not fit."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import toml
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.findings import sizes_in_words
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    SourceOptions,
)
from library.options import OptionError
from tests.tiny_data import tiny_image
from tests.tiny_runs import BUCKETS, assert_equal, batches

SIZES = {"a": (64, 48), "b": (48, 64), "c": (64, 48), "d": (48, 64)}  # to train at
NOTHING = CaptionOptions()


def encode(images_BCHW, noise_BCHW):
    return avg_pool2d(images_BCHW, 8).mean(1, keepdim=True) + 0.1 * noise_BCHW


def save_latents(path, size_wh, *, value=0.0, original=(80, 60), flipped=None, **changes):
    shape = (4, size_wh[1] // 8, size_wh[0] // 8)
    arrays = {
        "latents": np.full(shape, value, np.float32), "original_size": np.array(original),
        "crop_ltrb": np.array((0, 0, *size_wh)),
    }  # fmt: skip
    if flipped is not None:
        arrays["latents_flipped"] = np.full(shape, flipped, np.float32)
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})


@pytest.fixture
def folder(tmp_path):
    """Four images of 80x60 and their metadata, which say a size for each."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(SIZES):
        tiny_image((80, 60), seed=number).save(folder / f"{name}.png")
    write(tmp_path, {name: {"tags": f"tag {name}", "train_resolution": size} for name, size in SIZES.items()})
    return folder


def write(root, metadata):
    (root / "meta.json").write_text(json.dumps(metadata))


def add_latents(folder, **changes):
    for number, (name, size) in enumerate(SIZES.items()):
        save_latents(folder / f"{name}.npz", size, value=number + 1.0, **changes)


def source(folder, **options):
    return SourceOptions(str(folder), in_json=str(folder.parent / "meta.json"), **options)


def configs_of(folder, *, bucket=None, caption=NOTHING, augment=None, batch_size=2, **options):
    groups = (bucket or BucketOptions(), caption, augment or AugmentOptions(), LoaderOptions(batch_size))
    return load_configs(source(folder, **options), *groups)


def build(folder, *, on_bad_image="stop", seed=1, **options):
    return TrainingData.build(configs_of(folder, **options), seed=seed, on_bad_image=on_bad_image)


def with_latents(data, vae="vae", **options):
    data.cache_latents(encode, vae, CacheOptions(**options))
    return data


def values(data):
    """What the latents of every sample of an epoch are filled with, by image."""
    return {
        name.rpartition("/")[2][0]: latents.mean().item()
        for batch in batches(data, epochs=1).values()
        for name, latents in zip(batch.image_names, batch.latents_BCHW, strict=True)
    }


# ---------------------------------------------------------------------------------------------- sizes


def test_the_size_of_a_picture_on_its_side_is_turned(folder, caplog):
    exif = Image.Exif()
    exif[0x112] = 6
    for name in "ab":  # 60x80 when upright
        tiny_image((80, 60), seed=3).save(folder / f"{name}.png", exif=exif)
    with caplog.at_level(logging.INFO):
        data = build(folder)
    placed = {Path(image.record.path).stem: image.placement.bucket_wh for image in data.datasets[0].images}
    assert placed == {"a": (48, 64), "b": (48, 64), "c": (64, 48), "d": (48, 64)}
    assert "the train_resolution of 1 photo is that of the camera's sensor, its sides are swapped: " in caplog.text


def test_images_that_several_entries_name_are_told(folder, caplog):
    entries = {"a": {"caption": "x"}, "a.png": {"caption": "y"}, "b": {}, str(folder / "a.png"): {"caption": "z"}}
    write(folder.parent, entries)
    data = build(folder, bucket=BUCKETS)
    assert data.num_train_images == 4
    assert "1 image named by several entries and trained once for each: " in caplog.text


def test_tags_join_captions_with_the_separator_of_the_dataset(folder):
    write(folder.parent, {"a": {"caption": "one\ntwo", "tags": "x; y"}})
    options = CaptionOptions(caption_separator=";", enable_wildcard=True)
    (image,) = build(folder, bucket=BUCKETS, caption=options).datasets[0].images
    assert image.record.caption == "one; x; y\ntwo; x; y"


def test_every_image_is_trained_at_its_own_size(folder, caplog):
    with caplog.at_level(logging.INFO):
        data = build(folder, dataset_repeats=3)
    assert "meta.json: trained in buckets, the train_resolution of its images" in caplog.text
    assert data.num_train_images == 12
    assert data.datasets[0].bucket_counts == (((48, 64), 6), ((64, 48), 6))
    for batch in batches(data, epochs=1).values():
        width, height = SIZES[batch.image_names[0].rpartition("/")[2][0]]
        assert batch.images_BCHW.shape[2:] == (height, width)
        assert batch.original_hw_B2.tolist() == [[60, 80]] * batch.size
    assert data.datasets[0].config.bucket.enable_bucket
    assert sizes_in_words(data.datasets[0].config) == "buckets of the train_resolution of each image"


def test_images_keep_their_aspect_ratio(folder):
    """The trade's tool takes the size to train at for the image's own, and distorts it."""
    data = build(folder)
    assert {image.placement.resized_wh for image in data.datasets[0].images} == {(64, 48), (85, 64)}


def test_without_a_size_for_each_there_are_normal_buckets(folder):
    write(folder.parent, {"a": {"train_resolution": [64, 48]}, "b": {"caption": "b"}})
    with pytest.raises(OptionError, match="^--resolution: is not given, and not every image has a train_resolution"):
        build(folder)
    (dataset,) = build(folder, bucket=BUCKETS).datasets
    assert {image.placement.bucket_wh for image in dataset.images} == {(64, 64)} and dataset.config.train_sizes is None


def test_sizes_and_no_upscaling_contradict_each_other(folder):
    bucket = BucketOptions((64, 64), enable_bucket=True, bucket_no_upscale=True)
    with pytest.raises(OptionError, match="^--bucket_no_upscale: contradicts the metadata"):
        build(folder, bucket=bucket)


def test_sizes_that_have_no_effect_beside_the_metadata_are_named(folder, caplog):
    with caplog.at_level("INFO"):
        build(folder, bucket=BucketOptions((512, 512), enable_bucket=True, bucket_reso_steps=8))
    assert "the train_resolution of its images; no effect beside that: --resolution, --bucket_reso_steps" in caplog.text


# ---------------------------------------------------------------------------------------------- entries


def test_captions_come_from_the_metadata(folder):
    captions = {image.record.caption for image in build(folder).datasets[0].images}
    assert captions == {"tag a", "tag b", "tag c", "tag d"}


def test_entries_that_lead_nowhere_are_all_named_at_once(folder, caplog):
    write(folder.parent, {"a": {}, "gone": {}, "x/y": {}, "b": {"train_resolution": None}})
    with pytest.raises(OptionError) as caught:
        build(folder, bucket=BUCKETS)
    assert "2 broken images; mend or remove them" in str(caught.value)
    assert "\n  gone: is in " in str(caught.value) and "\n  x/y: is in " in str(caught.value)
    data = build(folder, bucket=BUCKETS, on_bad_image="skip")
    assert data.num_train_images == 2 and set(data.scan.broken) == {"gone", "x/y"}
    assert "captions: 4 images" not in caplog.text


def test_equal_keys_of_two_files_do_not_overwrite_each_other(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tiny_image((80, 60), seed=9).save(other / "a.png")
    (tmp_path / "second.json").write_text(json.dumps({"a": {"caption": "another"}}))
    write(tmp_path, {"a": {"caption": "one"}})
    content = {
        "datasets": [
            {
                "resolution": 64,
                "subsets": [
                    {"metadata_file": str(tmp_path / "meta.json"), "image_dir": str(folder)},
                    {"metadata_file": str(tmp_path / "second.json"), "image_dir": str(other), "num_repeats": 2},
                    {"metadata_file": str(tmp_path / "meta.json"), "image_dir": str(other)},  # the same file: dropped
                ],
            }
        ]
    }
    (tmp_path / "d.toml").write_text(toml.dumps(content))
    groups = (BucketOptions(), NOTHING, AugmentOptions(), LoaderOptions())
    configs = load_configs(SourceOptions(dataset_config=tmp_path / "d.toml"), *groups)
    data = TrainingData.build(configs, seed=1, on_bad_image="stop")
    shown = sorted(caption for batch in batches(data, epochs=1).values() for caption in batch.captions)
    assert shown == ["another", "another", "one"]


def test_keys_are_looked_up_beside_the_file_without_an_image_dir(folder):
    (folder / "here.json").write_text(json.dumps({"a": {"caption": "x"}}))
    options = SourceOptions(in_json=str(folder / "here.json"))
    groups = (BucketOptions((64, 64)), NOTHING, AugmentOptions(), LoaderOptions())
    data = TrainingData.build(load_configs(options, *groups), seed=1, on_bad_image="stop")
    assert [image.record.path for image in data.datasets[0].images] == [str(folder / "a.png")]


# ---------------------------------------------------------------------------------------------- latents


def test_latents_beside_the_images_are_used_without_being_asked(folder, caplog):
    add_latents(folder, original=(80, 60))
    data = build(folder)
    assert data.brings_latents and data.needs_vae
    with caplog.at_level(logging.INFO):
        with_latents(data)
    assert not data.needs_vae and not data.latents_in_memory
    assert values(data) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert "latents: 4 taken from the files beside the images; 4 can't be checked" in caplog.text
    for batch in batches(data, workers=2, epochs=1).values():
        assert batch.images_BCHW is None and batch.posterior_noise_BCHW is None


@pytest.mark.parametrize("layout", ["inside", "beside", "beside under the new name"])
def test_mirrored_latents_of_both_layouts(folder, layout):
    add_latents(folder, flipped=-1.0 if layout == "inside" else None)
    for name, size in SIZES.items() if layout != "inside" else ():
        flipped = {"latents": np.full((4, size[1] // 8, size[0] // 8), -1.0, np.float32)}
        if layout == "beside under the new name":
            flipped["latents_flipped"] = flipped.pop("latents")
        np.savez(folder / f"{name}_flip.npz", **flipped)
    data = with_latents(build(folder, augment=AugmentOptions(flip_aug=True), dataset_repeats=8))
    found = {latents.mean().item() for batch in batches(data, epochs=1).values() for latents in batch.latents_BCHW}
    assert found == {-1.0, 1.0, 2.0, 3.0, 4.0}


def test_latents_without_images(folder):
    add_latents(folder, original=(100, 50))
    for name in "abc":
        (folder / f"{name}.png").unlink()
    data = with_latents(build(folder), cache_latents=True)  # d has an image of another size, and is encoded
    found = values(data)
    assert {name: found[name] for name in "abc"} == {"a": 1, "b": 2, "c": 3} and abs(found["d"]) < 1
    batch = next(batch for batch in batches(data, epochs=1).values() if "/a.npz" in str(batch.image_names))
    assert batch.original_hw_B2.tolist()[0] == [50, 100]
    assert data.digest() == build(folder).digest()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"augment": AugmentOptions(color_aug=True)}, "color_aug changes the images"),
        ({"augment": AugmentOptions(random_crop=True)}, "random_crop changes the images"),
    ],
)
def test_latents_are_left_alone_where_images_vary(folder, caplog, options, why):
    add_latents(folder)
    with caplog.at_level(logging.INFO):
        data = build(folder, **options)
    assert not data.brings_latents and f"the latents beside the images are not used: {why}" in caplog.text
    (folder / "a.png").unlink()
    with pytest.raises(OptionError, match=f"a.npz: there is no image, and its latents can't be used: {why}"):
        build(folder, **options)


def test_all_or_none_of_a_datasets_latents_are_used(folder, caplog):
    add_latents(folder)
    (folder / "b.npz").unlink()
    with caplog.at_level(logging.INFO):
        assert not build(folder).brings_latents
    assert "are not used: 1 of 4 images have none" in caplog.text
    caplog.clear()
    write(folder.parent, {"a": {"train_resolution": [64, 48]}, "c": {}})
    with caplog.at_level(logging.INFO):
        assert not build(folder, bucket=BUCKETS).brings_latents
    assert "are not used: 1 of 2 images have no train_resolution" in caplog.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"latents": np.zeros((4, 6, 7), np.float32)}, "other size"),
        ({"latents": np.full((4, 6, 8), np.nan, np.float32)}, "not finite"),
        ({"original_size": np.array((60, 80))}, "other size"),
        ({"latents": None, "arr_0": np.zeros(3)}, "not a latent cache"),
        ({"fingerprint": np.array('{"vae": "other"}')}, "older code"),
    ],
)
def test_one_bad_file_sends_the_dataset_back_to_its_images(folder, caplog, changes, why):
    add_latents(folder)
    save_latents(folder / "a.npz", SIZES["a"], **changes)
    data = with_latents(build(folder))
    assert f"latents beside 4 images are not used (1 {why}); the images themselves are" in caplog.text
    assert data.needs_vae
    assert all(batch.latents_BCHW is None for batch in batches(data, epochs=1).values())


def test_a_bad_file_without_an_image_is_an_error(folder):
    add_latents(folder)
    (folder / "a.png").unlink()
    save_latents(folder / "a.npz", (64, 64))
    for options in ({}, {"cache_latents": True}, {"cache_latents_to_disk": True}):
        with pytest.raises(OptionError, match=r"can't be used, and no image; .*\n  .*a.npz: other size"):
            with_latents(build(folder), **options)
    (folder / "a.npz").write_bytes(b"")
    with pytest.raises(OptionError, match="a.npz: holds no latents, and there is no image"):
        build(folder)


def test_a_missing_mirrored_file_counts_as_missing(folder, caplog):
    add_latents(folder)
    with_latents(build(folder, augment=AugmentOptions(flip_aug=True)))
    assert "are not used (4 without mirrored latents)" in caplog.text


def test_broken_images_are_found_when_they_are_needed_after_all(folder):
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[: len(content) // 2])
    add_latents(folder)
    assert values(with_latents(build(folder)))["a"] == 1  # nobody looks at the image
    (folder / "b.npz").write_bytes(b"")
    with pytest.raises(OptionError, match="1 broken image, and latents beside them"):
        with_latents(build(folder))


@pytest.mark.parametrize("to_disk", [False, True])
def test_with_caching_asked_for_only_bad_files_are_made_anew(folder, to_disk):
    add_latents(folder)
    save_latents(folder / "a.npz", (64, 64), value=9.0)
    data = with_latents(build(folder), cache_latents=True, cache_latents_to_disk=to_disk)
    found = values(data)
    assert {name: found[name] for name in "bcd"} == {"b": 2, "c": 3, "d": 4} and abs(found["a"]) < 1
    with np.load(folder / "a.npz") as arrays:
        assert ("fingerprint" in arrays) == to_disk
    if to_disk:  # a run without the flag then knows all four
        again = with_latents(build(folder))
        assert not again.needs_vae and values(again) == found
        other = with_latents(build(folder), vae="another")
        assert other.needs_vae


def test_latents_of_metadata_equal_those_that_were_cached(folder):
    cached = with_latents(build(folder), cache_latents_to_disk=True)
    plain = with_latents(build(folder))
    assert not plain.needs_vae
    for position, batch in batches(cached).items():
        assert_equal(batch, batches(plain)[position])


def test_a_dataset_of_images_beside_one_of_latents(folder, tmp_path):
    add_latents(folder)
    tiny_image((64, 64), seed=5).save(tmp_path / "z.png")
    content = {
        "general": {"resolution": 64, "batch_size": 2},
        "datasets": [
            {"subsets": [{"metadata_file": str(tmp_path / "meta.json"), "image_dir": str(folder)}]},
            {"subsets": [{"image_dir": str(tmp_path)}]},
        ],
    }
    (tmp_path / "d.toml").write_text(toml.dumps(content))
    groups = (BucketOptions(), NOTHING, AugmentOptions(), LoaderOptions())
    configs = load_configs(SourceOptions(dataset_config=tmp_path / "d.toml"), *groups)
    data = with_latents(TrainingData.build(configs, seed=1, on_bad_image="stop"))
    assert data.needs_vae
    for workers in (0, 1):
        found = batches(data, epochs=1, workers=workers).values()
        assert {(batch.images_BCHW is None, "z.png" in batch.image_names[0]) for batch in found} == {
            (True, False),
            (False, True),
        }
        assert all(torch.isfinite(batch.noise_BCHW).all() for batch in found)


def test_other_names_are_found_for_the_cache_of_another_dataset(folder, tmp_path):
    """One that trains the same images at another size does not write over the latents that came along."""
    add_latents(folder)
    content = {
        "general": {"batch_size": 2},
        "datasets": [
            {"subsets": [{"metadata_file": str(tmp_path / "meta.json"), "image_dir": str(folder)}]},
            {"resolution": 32, "subsets": [{"image_dir": str(folder)}]},
        ],
    }
    (tmp_path / "d.toml").write_text(toml.dumps(content))
    groups = (BucketOptions(), NOTHING, AugmentOptions(), LoaderOptions())
    configs = load_configs(SourceOptions(dataset_config=tmp_path / "d.toml"), *groups)
    with_latents(TrainingData.build(configs, seed=1, on_bad_image="stop"), cache_latents_to_disk=True)
    with np.load(folder / "a.npz") as arrays:
        assert arrays["latents"].mean() == 1.0
    assert (folder / "a.png.npz").is_file()
