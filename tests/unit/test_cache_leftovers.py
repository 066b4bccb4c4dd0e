"""Which files count as left over: only caches, and only those that belong to nothing."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from library.data.buckets import Placement
from library.data.cache_files import CacheItem
from library.data.cache_leftovers import latent_leftovers, text_leftovers
from library.data.text_cache_files import TextItem
from tests.tiny_data import tiny_image

ARRAYS = {"latents": np.zeros((4, 8, 8)), "original_size": np.array((64, 64)), "crop_ltrb": np.zeros(4)}


@pytest.fixture
def item(tmp_path):
    """An image of the data set, with its cache."""
    tiny_image((64, 64)).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", **ARRAYS)
    placement = Placement((64, 64), (64, 64))
    return CacheItem(str(tmp_path / "a.png"), (64, 64), 1, placement, False, str(tmp_path / "a.npz"))


def found(leftovers, tmp_path):
    return {os.path.relpath(leftover.file, tmp_path): leftover.reason for leftover in leftovers.files}


@pytest.mark.parametrize(
    ("name", "is_left_over"),
    [
        ("gone.npz", True), ("a.png.npz", True), ("a.png.96x64.npz", True), ("a.png.96x64.96x70.area.npz", True),
        ("a_0096x0096_sd.npz", True), ("a_0064x0064_sd.npz", False), ("gone_0064x0064_sd.npz", True),
        ("other.npz", False), ("other.jpg.npz", False), ("other_0010x0010_sd.npz", False),
        ("other.jpg.64x64.npz", False),
        ("two.dots.npz", False), ("two.npz", True), ("a_te_outputs.npz", False), ("gone.NPZ", False),
    ],
)  # fmt: skip
def test_names(tmp_path, item, name, is_left_over):
    """The data set has a.png; other.jpg and two.dots.webp lie beside it."""
    for image in ("other.jpg", "two.dots.webp"):
        tiny_image((8, 8)).save(tmp_path / image)
    with open(tmp_path / name, "wb") as file:
        np.savez(file, **ARRAYS)
    assert set(found(latent_leftovers([item]), tmp_path)) == ({name} if is_left_over else set())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"text", None])
def test_what_does_not_prove_to_be_a_cache_stays(tmp_path, item, content):
    if content is None:
        np.savez(tmp_path / "gone.npz", latents=np.zeros(3))
    else:
        (tmp_path / "gone.npz").write_bytes(content)
    assert not latent_leftovers([item]).files
    assert not text_leftovers([TextItem(item.path, ("a",), "a", (), str(tmp_path / "a_te_outputs.npz"))]).files


def test_an_array_of_the_users_keeps_a_file(tmp_path, item):
    text = {"hidden_state1": np.zeros(3), "hidden_state2": np.zeros(3), "pool2": np.zeros(3)}
    latents = ARRAYS | {"latents_flipped": np.zeros((4, 8, 8)), "alpha_mask": np.zeros((8, 8)), "fingerprint": "{}"}
    for ending, arrays in {"": latents, "_te_outputs": text | {"pool2_v11": np.zeros(3), "fingerprint": "{}"}}.items():
        np.savez(tmp_path / f"gone{ending}.npz", **arrays)
        np.savez(tmp_path / f"mine{ending}.npz", **arrays, measurements=np.zeros(3))
    assert set(found(latent_leftovers([item]), tmp_path)) == {"gone.npz"}
    of_text = text_leftovers([TextItem(item.path, ("a",), "a", (), str(tmp_path / "a_te_outputs.npz"))])
    assert set(found(of_text, tmp_path)) == {"gone_te_outputs.npz"}


def test_unfinished_files(tmp_path, item):
    """Old ones of any cache; not what only looks a little like one."""
    unfinished = {"a.npz.0123abcd.tmp", "latents_64x64.pack.0123abcd.tmp", "latents_64x64.1.pack.0123abcd.tmp"}
    for name in [*unfinished, "mine.pack.0123abcd.tmp", "latents_64x64.pack.tmp", "latents_64x64.pack"]:
        (tmp_path / name).write_bytes(b"PK")
        os.utime(tmp_path / name, (1, 1))
    assert set(found(latent_leftovers([item]), tmp_path)) == unfinished


def test_what_can_not_be_removed_is_told(tmp_path, item, monkeypatch):
    np.savez(tmp_path / "gone.npz", **ARRAYS)
    leftovers = latent_leftovers([item])

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "remove", refuse)
    assert leftovers.remove() == {str(tmp_path / "gone.npz"): "Read-only file system"}


def test_latents_that_metadata_lead_to_stay(tmp_path, item):
    """Also those whose image is not there, and mirrored ones in a file of their own."""
    (tmp_path / "a.png").unlink()
    np.savez(tmp_path / "a_flip.npz", **ARRAYS)
    brought = replace(item, path=item.npz, has_image=False, flipped_npz=str(tmp_path / "a_flip.npz"))
    assert not latent_leftovers([brought]).files


def test_folders_outside_the_data_set_are_not_looked_into(tmp_path, item):
    (tmp_path / "below").mkdir()
    np.savez(tmp_path / "below" / "gone.npz", **ARRAYS)
    assert not latent_leftovers([item]).files


def test_text(tmp_path, item):
    for name in ("a_te_outputs.npz", "gone_te_outputs.npz", "a_te_outputs.1a2b3c4d.npz", "other_te_outputs.npz"):
        np.savez(tmp_path / name, hidden_state1=np.zeros(3))
    tiny_image((8, 8)).save(tmp_path / "other.jpg")
    text = TextItem(item.path, ("a",), "a", (), str(tmp_path / "a_te_outputs.npz"))
    leftovers = text_leftovers([text])
    assert found(leftovers, tmp_path) == {
        "gone_te_outputs.npz": "its image is gone",
        "a_te_outputs.1a2b3c4d.npz": "its image is in the data, but not with this size or caption",
    }
    assert (
        leftovers.remove() == {}
        and not (tmp_path / "gone_te_outputs.npz").exists()
        and (tmp_path / "a_te_outputs.npz").exists()
    )
    assert (tmp_path / "other_te_outputs.npz").exists() and (tmp_path / "a.npz").exists()
