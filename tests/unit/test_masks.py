"""Masks: they follow their images, and the loss of what they hide is 0."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from library.data.buckets import Cut
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.mask_settings import settle_masks
from library.data.masks import averaged, latent_mask, load_mask
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    MaskOptions,
    SourceOptions,
)
from library.data.records import MaskFile
from library.options import OptionError
from tests.tiny_data import tiny_images
from tests.tiny_runs import BUCKETS, batches

NO_BUCKETS = BucketOptions((64, 64))


def pattern(size_wh, seed):
    """A smooth grey picture that looks different when moved or mirrored."""
    width, height = size_wh
    y, x = np.mgrid[0:height, 0:width]
    waves = np.sin(x / (7 + seed)) + np.cos(y / (9 + seed)) + x / width
    return ((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8)


def masked_folder(
    root: Path, *, alpha=False, sizes=((160, 128), (128, 190), (130, 130)), names="picture_{}_60_55_40_44"
):
    """Grey images whose own brightness is their mask; with `alpha`, black ones whose transparency shows as white."""
    folder, masks = root / "train" / "2_grey", root / "masks"
    folder.mkdir(parents=True)
    masks.mkdir()
    for index, size in enumerate(sizes):
        grey = Image.fromarray(pattern(size, index))
        name = names.format(index)
        if alpha:
            black = Image.new("L", size)
            Image.merge("RGBA", (black, black, black, grey)).save(folder / f"{name}.png")
        else:
            grey.convert("RGB").save(folder / f"{name}.png")
            grey.save(masks / f"{name}.png")
    return root / "train"


def build(train, masks, *, bucket=BUCKETS, augment=None, batch_size=2, caption=None, reg=None, masked_loss=True):
    configs = load_configs(
        SourceOptions(str(train), reg and str(reg)),
        bucket,
        caption or CaptionOptions(),
        augment or AugmentOptions(),
        LoaderOptions(batch_size),
        masks=masks,
    )
    return TrainingData.build(settle_masks(configs, masked_loss=masked_loss), seed=1, on_bad_image="stop")


EVERY_CUT = {
    "centre": (BUCKETS, AugmentOptions(flip_aug=True)),
    "anywhere": (BUCKETS, AugmentOptions(flip_aug=True, random_crop=True)),
    "face": (NO_BUCKETS, AugmentOptions(flip_aug=True, face_crop_aug_range=(1.0, 1.5))),
    "face anywhere": (NO_BUCKETS, AugmentOptions(flip_aug=True, face_crop_aug_range=(1.0, 1.5), random_crop=True)),
}


@pytest.mark.parametrize("kind", ["file", "alpha"])
@pytest.mark.parametrize("cut", EVERY_CUT)
def test_the_mask_follows_its_image(tmp_path, kind, cut):
    bucket, augment = EVERY_CUT[cut]
    train = masked_folder(tmp_path, alpha=kind == "alpha")
    masks = MaskOptions(alpha_mask=True) if kind == "alpha" else MaskOptions(conditioning_data_dir=tmp_path / "masks")
    seen = set()
    for batch in batches(build(train, masks, bucket=bucket, augment=augment), epochs=4).values():
        brightness = avg_pool2d((batch.images_BCHW[:, :1] + 1) / 2, 8)
        expected = 1 - brightness if kind == "alpha" else brightness
        assert batch.mask_B1HW.dtype == torch.float32
        assert torch.allclose(batch.mask_B1HW, expected, atol=0.02)
        seen.update(round(float(mask[..., :3].mean()), 3) for mask in batch.mask_B1HW)
    assert len(seen) > (3 if cut == "centre" else 6)


@pytest.mark.parametrize("kind", ["file", "alpha"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_latents_have_the_same_masks(tmp_path, kind, on_disk):
    train = masked_folder(tmp_path, alpha=kind == "alpha")
    masks = MaskOptions(alpha_mask=True) if kind == "alpha" else MaskOptions(conditioning_data_dir=tmp_path / "masks")
    augment = AugmentOptions(flip_aug=True)
    plain = batches(build(train, masks, augment=augment))
    for _ in range(2 if on_disk else 1):  # made, then read
        data = build(train, masks, augment=augment)
        data.cache_latents(
            lambda images, noise: avg_pool2d(images, 8)[:, [0, 0, 0, 0]],
            "vae",
            CacheOptions(cache_latents=True, cache_latents_to_disk=on_disk),
        )
        for position, batch in batches(data).items():
            assert batch.images_BCHW is None
            assert torch.equal(batch.mask_B1HW, plain[position].mask_B1HW)


def test_alpha_and_file_multiply(tmp_path):
    train = masked_folder(tmp_path, alpha=True, sizes=((64, 64),))
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(tmp_path / "masks" / "picture_0_60_55_40_44.jpg", quality=100)
    both = MaskOptions(alpha_mask=True, conditioning_data_dir=tmp_path / "masks")
    mask = next(iter(batches(build(train, both, bucket=NO_BUCKETS)).values())).mask_B1HW[0, 0]
    alpha = next(iter(batches(build(train, MaskOptions(alpha_mask=True), bucket=NO_BUCKETS)).values())).mask_B1HW[0, 0]
    assert torch.allclose(mask[:, :4], alpha[:, :4], atol=0.01) and mask[:, 4:].max() < 0.01


def test_opaque_images_and_regularisation_count_as_a_whole(tmp_path, caplog):
    train = masked_folder(tmp_path)
    tiny_images(tmp_path / "reg" / "1_any", 3, seed=7)
    masks = MaskOptions(conditioning_data_dir=tmp_path / "masks")
    with caplog.at_level(logging.INFO):
        data = build(train, masks, reg=tmp_path / "reg")
    assert "masks: 3 of 6 images are masked by files" in caplog.text
    assert "masks: 3 images without one, counted as a whole: 1_any/image_000.png, 1_any/image_001.jpg, " in caplog.text
    for batch in batches(data).values():
        for name, mask in zip(batch.image_names, batch.mask_B1HW, strict=True):
            assert bool((mask == 1).all()) == ("1_any" in name)
    alpha = next(iter(batches(build(train, MaskOptions(alpha_mask=True))).values()))
    assert alpha.mask_B1HW.eq(1).all()


def test_without_masks_a_batch_has_none(tmp_path):
    train = masked_folder(tmp_path, alpha=True)
    data = build(train, MaskOptions(), masked_loss=False)
    assert all(batch.mask_B1HW is None for batch in batches(data).values())


# ---------------------------------------------------------------------------------------------- files


def test_masks_of_several_folders_lie_in_folders_of_their_names(tmp_path):
    train = masked_folder(tmp_path, sizes=((64, 64),), names="same")
    tiny_images(tmp_path / "train" / "1_dog", 1)
    (tmp_path / "train" / "1_dog" / "image_000.png").rename(tmp_path / "train" / "1_dog" / "same.png")
    (tmp_path / "masks" / "1_dog").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "masks" / "1_dog" / "same.webp")
    data = build(train, MaskOptions(conditioning_data_dir=tmp_path / "masks"), bucket=NO_BUCKETS, batch_size=1)
    for batch in batches(data).values():
        assert (batch.mask_B1HW.max() == 0) == ("1_dog" in batch.image_names[0])


def test_masks_of_metadata_lie_in_folders_as_their_images(tmp_path):
    for number, name in enumerate("xy"):
        tiny_images(tmp_path / "images" / name, 1, captions=(), sizes=[(64, 64)], seed=number)
        (tmp_path / "masks" / name).mkdir(parents=True)
        Image.new("L", (64, 64), 255 * number).save(tmp_path / "masks" / name / "image_000.png")
    entries = {f"{name}/image_000": {"caption": name} for name in "xy"}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    source = SourceOptions(str(tmp_path / "images"), in_json=str(tmp_path / "meta.json"))
    masks = MaskOptions(conditioning_data_dir=tmp_path / "masks")
    groups = (NO_BUCKETS, CaptionOptions(), AugmentOptions(), LoaderOptions(1))

    def data():
        configs = settle_masks(load_configs(source, *groups, masks=masks), masked_loss=True)
        return TrainingData.build(configs, seed=1, on_bad_image="stop")

    for batch in batches(data()).values():
        assert batch.mask_B1HW.max() == (batch.captions == ("y",))
    (tmp_path / "masks" / "x" / "image_000.png").rename(tmp_path / "masks" / "image_000.png")
    assert len(batches(data())) == 4  # one of its own, one in the folder itself
    (tmp_path / "masks" / "y" / "image_000.png").unlink()
    with pytest.raises(OptionError) as caught:
        data()
    assert "images of several folders have one mask" in str(caught.value)


def test_missing_masks_are_listed(tmp_path):
    train = masked_folder(tmp_path)
    for index in (0, 2):
        (tmp_path / "masks" / f"picture_{index}_60_55_40_44.png").unlink()
    with pytest.raises(OptionError) as caught:
        build(train, MaskOptions(conditioning_data_dir=tmp_path / "masks"))
    assert str(caught.value) == (
        "conditioning_data_dir: 2 images have no mask: 2_grey/picture_0_60_55_40_44.png, "
        "2_grey/picture_2_60_55_40_44.png; add pictures of these names, white where the image counts "
        "and black where it does not"
    )


@pytest.mark.parametrize("damage", [b"no image", None])
def test_broken_masks_are_listed_with_broken_images(tmp_path, damage):
    train = masked_folder(tmp_path)
    path = tmp_path / "masks" / "picture_1_60_55_40_44.png"
    path.write_bytes(damage or path.read_bytes()[:-60])
    masks = MaskOptions(conditioning_data_dir=tmp_path / "masks")
    with pytest.raises(OptionError, match="1 broken image") as caught:
        build(train, masks)
    assert str(path) in str(caught.value)
    configs = load_configs(
        SourceOptions(str(train)), BUCKETS, CaptionOptions(), AugmentOptions(), LoaderOptions(), masks=masks
    )
    data = TrainingData.build(settle_masks(configs, masked_loss=True), seed=1, on_bad_image="skip")
    assert data.num_train_images == 4, "its image is left out too"


def test_a_mask_of_another_shape_is_stretched_and_said(tmp_path, caplog):
    train = masked_folder(tmp_path)
    Image.new("L", (50, 100), 255).save(tmp_path / "masks" / "picture_1_60_55_40_44.png")
    with caplog.at_level(logging.INFO):
        build(train, MaskOptions(conditioning_data_dir=tmp_path / "masks"))
    assert "masks: 1 mask of another shape than the image, stretched: 2_grey/picture_1_60_55_40_44.png" in caplog.text


def test_the_data_digest_follows_masks_but_not_their_place(tmp_path):
    train = masked_folder(tmp_path)
    masks = tmp_path / "masks"
    digest = build(train, MaskOptions(conditioning_data_dir=masks)).digest()
    moved = masks.rename(tmp_path / "moved")
    assert build(train, MaskOptions(conditioning_data_dir=moved)).digest() == digest
    Image.new("L", (160, 128)).save(moved / "picture_0_60_55_40_44.png")
    assert build(train, MaskOptions(conditioning_data_dir=moved)).digest() != digest
    assert build(train, MaskOptions(alpha_mask=True)).digest() != digest


# ---------------------------------------------------------------------------------------------- options


def test_masked_loss_wants_masks_and_masks_want_masked_loss(tmp_path, caplog):
    train = masked_folder(tmp_path)
    with pytest.raises(OptionError, match="^--masked_loss: there are no masks; "):
        build(train, MaskOptions())
    with pytest.raises(OptionError, match="^conditioning_data_dir: .*nowhere' is not a folder"):
        build(train, MaskOptions(conditioning_data_dir=tmp_path / "nowhere"))
    data = build(train, MaskOptions(conditioning_data_dir=tmp_path / "masks"), masked_loss=False)
    assert "conditioning_data_dir has no effect without --masked_loss" in caplog.text
    assert all(batch.mask_B1HW is None for batch in batches(data).values())


# ---------------------------------------------------------------------------------------------- pixels


def test_a_latent_pixel_gets_the_mean_of_its_pixels():
    random = np.random.default_rng(0)
    mask = random.integers(0, 256, (32, 48), dtype=np.uint8)
    expected = mask[8:24, 4:28].reshape(2, 8, 3, 8).mean((1, 3)) / 255
    assert np.allclose(latent_mask(mask, Cut((48, 32), 4, 8, (24, 16))), expected, atol=1e-6)
    assert np.allclose(averaged(expected, (2, 3)), expected)
    assert averaged(np.ones((50, 30)), (6, 3)).shape == (6, 3)  # of another program, at a size that does not divide


@pytest.mark.parametrize("size", [(24, 16), (96, 64), (31, 77)])
def test_a_mask_of_any_size_covers_the_image(size):
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[:, : size[0] // 2] = 255
    found = latent_mask(mask, Cut((64, 64), 0, 0, (64, 64)))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    assert found[:, :3].min() > 0.99 and found[:, 5:].max() < 0.01


def test_red_counts_and_transparency_is_black(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(200, 0, 0, 255), (0, 255, 255, 255), (255, 255, 255, 0)]):
        image.putpixel((x, 0), colour)
    image.save(tmp_path / "m.png")
    assert load_mask(MaskFile(str(tmp_path / "m.png"), (3, 1), 1, 0)).tolist() == [[200, 0, 0]]
    assert load_mask(MaskFile(str(tmp_path / "m.png"), (1, 3), 6, 0)).shape == (3, 1)
    with pytest.raises(OptionError, match="^conditioning_data_dir: .*can't be read any more"):
        load_mask(MaskFile(str(tmp_path / "gone.png"), (1, 3), 1, 0))


def test_a_dataset_class_brings_no_masks(caplog):
    assert settle_masks((), masked_loss=True) == ()
    assert "--masked_loss has no effect with --dataset_class" in caplog.text
