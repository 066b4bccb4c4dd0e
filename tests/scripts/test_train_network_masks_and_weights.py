"""Masks and emphasis in whole runs: what they must change, and what they must not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.runs import equal_files, train_network
from tests.scripts.conftest import short_run
from tests.tiny_data import tiny_images


@pytest.fixture
def options(tmp_path, tiny_sd1_path):
    tiny_images(tmp_path / "data" / "2_disc", 6)
    return short_run(tmp_path, tmp_path / "data", tiny_sd1_path)


def masks_of(folder, images, level):
    """A mask of one grey level, 0-255, for every image."""
    folder.mkdir()
    for path in images.rglob("*.*"):
        if path.suffix in (".png", ".jpg"):
            Image.new("L", (64, 64), level).save(folder / f"{path.stem}.png")
    return folder


def trained(options, tmp_path, name, **changes):
    assert train_network(**{**options, "output_name": name, "max_train_steps": 2, **changes}) == 0
    return tmp_path / "out" / f"{name}.safetensors"


@pytest.mark.parametrize("cached", [False, True])
def test_white_masks_change_nothing_and_black_ones_leave_nothing_to_learn(options, tmp_path, capfd, cached):
    images = tmp_path / "data"
    settings = {"masked_loss": True, "cache_latents": cached}
    plain = trained(options, tmp_path, "plain", cache_latents=cached)
    white = masks_of(tmp_path / "white", images, 255)
    assert equal_files(plain, trained(options, tmp_path, "white", conditioning_data_dir=white, **settings))
    black = trained(
        options, tmp_path, "black", conditioning_data_dir=masks_of(tmp_path / "black", images, 0), **settings
    )
    assert all((tensor == 0).all() for name, tensor in load_file(black).items() if "lora_up" in name)
    assert "images are masked by files" in capfd.readouterr().err


def test_transparency_is_left_out_of_the_loss(options, tmp_path):
    for path in [*(tmp_path / "data").rglob("*.png"), *(tmp_path / "data").rglob("*.jpg")]:
        pixels = np.asarray(Image.open(path).convert("RGBA")).copy()
        pixels[..., 3] = 255
        pixels[: len(pixels) // 2, :, 3] = 0
        Image.fromarray(pixels).save(path.with_suffix(".png"))
        if path.suffix == ".jpg":
            path.unlink()
    whole = trained(options, tmp_path, "whole")
    masked = trained(options, tmp_path, "masked", alpha_mask=True)
    assert not equal_files(whole, masked)
    for how in ({"cache_latents": True}, {"cache_latents_to_disk": True}, {"cache_latents_to_disk": True}):
        whole = trained(options, tmp_path, "whole", **how)
        assert not equal_files(whole, trained(options, tmp_path, "masked", alpha_mask=True, **how))


def with_captions(options, tmp_path, caption):
    for path in (tmp_path / "data").rglob("*.txt"):
        path.write_text(caption)
    return options


def test_emphasis_counts_and_its_absence_changes_nothing(options, tmp_path):
    with_captions(options, tmp_path, "a cat, on a mat")
    plain = trained(options, tmp_path, "plain")
    assert equal_files(plain, trained(options, tmp_path, "weighted", weighted_captions=True))
    with_captions(options, tmp_path, "a (cat:1.8), on a mat")
    emphasised = trained(options, tmp_path, "emphasised", weighted_captions=True)
    assert not equal_files(plain, emphasised)
    long = {"weighted_captions": True, "max_token_length": 150, "clip_skip": 2, "shuffle_caption": True}
    longer = trained(options, tmp_path, "longer", **long)
    assert not equal_files(emphasised, longer)


def test_75_tokens_are_the_usual_length(options, tmp_path):
    plain = trained(options, tmp_path, "plain")
    assert equal_files(plain, trained(options, tmp_path, "given", max_token_length=75))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"masked_loss": True}, ["--masked_loss", "there are no masks", "conditioning_data_dir"]),
        ({"masked_loss": True, "conditioning_data_dir": "nowhere"}, ["conditioning_data_dir", "nowhere"]),
        ({"face_crop_aug_range": "3"}, ["--face_crop_aug_range", "two numbers"]),
        ({"face_crop_aug_range": "3,1"}, ["--face_crop_aug_range", "write 1,3"]),
        ({"resize_interpolation": "lanczoss"}, ["--resize_interpolation", "did you mean lanczos"]),
        ({"max_token_length": 100}, ["--max_token_length", "100"]),
        ({"keep_tokens_separator": ","}, ["--keep_tokens_separator", "caption separator"]),
    ],
)
def test_mistakes(options, change, words, capfd):
    assert train_network(**{**options, **change}) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message
