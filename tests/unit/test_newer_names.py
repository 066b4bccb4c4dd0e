"""Caches under the trade's newer name, <base>_<width>x<height>_sd.npz: read like <base>.npz, never written."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.data.buckets import Placement, crop_ltrb
from library.data.cache import fill_disk
from library.data.cache_files import CacheItem
from tests.tiny_data import tiny_image

SIZE, PLACEMENT = (80, 65), Placement((64, 48), (64, 52))
SHAPE = (4, 6, 8)  # of its latents


@pytest.fixture
def item(tmp_path) -> CacheItem:
    tiny_image(SIZE).save(tmp_path / "a.png")
    return CacheItem(str(tmp_path / "a.png"), SIZE, 1, PLACEMENT, False, str(tmp_path / "a.npz"))


def write(path, value: float, **changes):
    """A file as a newer program of the trade writes it."""
    arrays = {
        "latents": np.full(SHAPE, value, np.float32),
        "original_size": np.array(SIZE),
        "crop_ltrb": np.array(crop_ltrb(SIZE, PLACEMENT.bucket_wh)),
    }
    np.savez(path, **{**arrays, **changes})
    return path


def cached(item, *, is_checked=True):
    """(its latents' mean, whether they had to be made; 5 if so)."""
    made = []

    def encode(images_BCHW, noise_BCHW):
        made.append(len(images_BCHW))
        return torch.full_like(noise_BCHW, 5.0)

    store = fill_disk([item], encode, 1, vae_fingerprint="vae", is_checked=is_checked)
    return store.load(0, flipped=False).mean().item(), bool(made)


@pytest.mark.parametrize("is_checked", [True, False])
def test_the_newer_name_is_read_and_left_alone(tmp_path, item, is_checked):
    write(tmp_path / "a_0080x0065_sd.npz", 3.0)
    assert cached(item, is_checked=is_checked) == (3.0, False)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a_0080x0065_sd.npz"]


def test_its_mirrored_latents_and_alpha_mask_are_read_too(tmp_path, item):
    mirrored, mask = np.full(SHAPE, 4.0, np.float32), np.full((6, 8), 0.5, np.float32)
    write(tmp_path / "a_0080x0065_sd.npz", 3.0, latents_flipped=mirrored, alpha_mask=mask)
    wanting = replace(item, flipped_too=True, alpha_too=True)
    store = fill_disk([wanting], lambda *_: pytest.fail("encoded"), 1, vae_fingerprint="vae")
    assert store.load(0, flipped=True).mean() == 4.0 and np.array_equal(store.load_alpha(0), mask)


def test_the_older_name_goes_first_where_it_is_valid(tmp_path, item):
    newer, older = write(tmp_path / "a_0080x0065_sd.npz", 3.0), write(tmp_path / "a.npz", 2.0)
    assert cached(item) == (2.0, False)
    older.write_bytes(older.read_bytes()[:-100])
    assert cached(item) == (3.0, False)
    newer.unlink()
    assert cached(item) == (5.0, True)


@pytest.mark.parametrize(
    "changes", [{"latents": np.zeros((4, 8, 6), np.float32)}, {"original_size": np.array((65, 80))}]
)
def test_one_of_no_use_is_left_alone_and_ours_written_under_the_older_name(tmp_path, item, changes):
    content = write(tmp_path / "a_0080x0065_sd.npz", 3.0, **changes).read_bytes()
    assert cached(item) == (5.0, True) and cached(item) == (5.0, False)
    assert (tmp_path / "a_0080x0065_sd.npz").read_bytes() == content and (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("name", ["a_0081x0065_sd.npz", "a_80x65_sd.npz", "a_0080x0065_sdxl.npz"])
def test_other_names_are_nobodys(tmp_path, item, name):
    write(tmp_path / name, 3.0)
    assert cached(item) == (5.0, True)


def test_images_that_share_the_name_have_no_claim_to_it(tmp_path, item):
    write(tmp_path / "a_0080x0065_sd.npz", 3.0)
    sharing = replace(item, npz=f"{item.path}.npz")  # as the files of a.png and a.jpg in one folder are named
    assert cached(sharing) == (5.0, True)


def test_processes_agree_on_the_file(tmp_path, item):
    write(tmp_path / "a_0080x0065_sd.npz", 3.0)
    for index in range(2):
        share = {"process_index": index, "num_processes": 2}
        store = fill_disk([item], lambda *_: pytest.fail("encoded"), 1, vae_fingerprint="vae", **share)
        assert store.load(0, flipped=False).mean() == 3.0
