"""Cached latents: what is stored, when it is trusted, when it is rebuilt."""

import io
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from library.data.buckets import Placement, crop_ltrb
from library.data.cache import fill_disk, fill_memory
from library.data.cache_files import CacheItem, read_latents, state_of
from library.data.cache_names import cache_file_names
from library.data.headers import read_header
from library.data.images import load_picture, place, to_tensor
from library.options import OptionError
from tests.tiny_data import tiny_image

PLACEMENT = Placement((64, 48), (64, 52))
SIZE = (80, 65)


class TinyEncoder:
    """Averages 8x8 pixels and adds the noise; remembers how many images it saw at once."""

    def __init__(self):
        self.batches = []

    def __call__(self, images_BCHW, noise_BCHW):
        assert images_BCHW.dtype == torch.float32 and images_BCHW.abs().max() <= 1
        self.batches.append(len(images_BCHW))
        return avg_pool2d(images_BCHW, 8).mean(1, keepdim=True) + 0.1 * noise_BCHW

    @property
    def num_images(self):
        return sum(self.batches)


def make_item(path, *, flipped_too=False, placement=PLACEMENT, orientation=None, seed=0, size=SIZE):
    options = {}
    if orientation is not None:
        options["exif"] = tiny_image((1, 1)).getexif()
        options["exif"][0x0112] = orientation
    if not path.exists():
        tiny_image(size, seed=seed).save(path, **options)
    header = read_header(str(path))
    return CacheItem(
        str(path), header.size_wh, header.orientation, placement, flipped_too, f"{os.path.splitext(path)[0]}.npz"
    )


def cached(items, encode=None, *, vae="vae", batch_size=1, **share):
    encode = encode or TinyEncoder()
    return fill_disk(items, encode, batch_size, vae_fingerprint=vae, **share), encode


def mirrored_pixels(item):
    return to_tensor(place(load_picture(item.path, item.orientation).rgb_HWC, item.placement)[:, ::-1])


# ---------------------------------------------------------------------------------------------- contents


def test_the_file_has_the_keys_of_the_trade(tmp_path):
    item = make_item(tmp_path / "a.png", flipped_too=True)
    cached([item])
    with np.load(tmp_path / "a.npz") as arrays:
        assert set(arrays) == {"latents", "latents_flipped", "original_size", "crop_ltrb", "fingerprint"}
        assert arrays["latents"].shape == arrays["latents_flipped"].shape == (4, 6, 8)
        assert arrays["latents"].dtype == arrays["latents_flipped"].dtype == np.float32
        assert tuple(arrays["original_size"]) == SIZE
        assert tuple(arrays["crop_ltrb"]) == crop_ltrb(SIZE, (64, 48))
        assert json.loads(str(arrays["fingerprint"]))["vae"] == "vae"
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "a.png"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_memory_and_disk_agree_whatever_the_batch(tmp_path, batch_size):
    items = [make_item(tmp_path / f"{n}.png", flipped_too=n % 2 == 0, seed=n) for n in range(5)]
    items += [make_item(tmp_path / "wide.png", placement=Placement((96, 32), (96, 78)))]
    on_disk, encode = cached(items, batch_size=batch_size)
    in_memory = fill_memory(items, TinyEncoder(), 2)
    assert in_memory.in_memory and not on_disk.in_memory
    assert encode.num_images == 9 and max(encode.batches) <= batch_size
    assert set(in_memory.latents) == {(64, 48), (96, 32)}
    assert in_memory.latents[64, 48].shape == (8, 4, 6, 8) and in_memory.latents[64, 48].dtype == torch.float32
    for index, item in enumerate(items):
        for flipped in (False, True) if item.flipped_too else (False,):
            assert torch.equal(on_disk.load(index, flipped=flipped), in_memory.load(index, flipped=flipped))


def test_mirrored_latents_are_of_the_mirrored_image_and_only_where_asked(tmp_path):
    items = [make_item(tmp_path / "a.png", flipped_too=True), make_item(tmp_path / "b.png", seed=1)]
    on_disk, encode = cached(items, lambda images, noise: avg_pool2d(images, 8)[:, [0, 0, 0, 0]])
    assert torch.equal(on_disk.load(0, flipped=True)[0], avg_pool2d(mirrored_pixels(items[0]), 8)[0])
    with np.load(items[1].npz) as arrays:
        assert "latents_flipped" not in arrays


def test_the_noise_is_the_images_own(tmp_path):
    """Equal pixels give equal latents in any run, in any order, under any name."""
    items = [make_item(tmp_path / "a.png"), make_item(tmp_path / "b.png", seed=1)]
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    on_disk, _ = cached([*items, make_item(tmp_path / "copy.png")])
    again = fill_memory(items[::-1], TinyEncoder(), 1)
    assert torch.equal(on_disk.load(0, flipped=False), again.load(1, flipped=False))
    assert torch.equal(on_disk.load(0, flipped=False), on_disk.load(2, flipped=False))
    assert not torch.equal(on_disk.load(0, flipped=False), on_disk.load(1, flipped=False))


def test_non_finite_latents_name_the_image(tmp_path):
    items = [make_item(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate(("well", "bad", "fine"))]
    target = avg_pool2d(to_tensor(place(load_picture(items[1].path).rgb_HWC, PLACEMENT)), 8).mean()

    def encode(images, noise):
        is_bad = (images.mean((1, 2, 3)) - target).abs() < 1e-5
        return noise + torch.where(is_bad, torch.nan, 0.0)[:, None, None, None]

    for fill in (lambda: fill_memory(items, encode, 3), lambda: cached(items, encode, batch_size=3)):
        with pytest.raises(OptionError) as caught:
            fill()
        assert "bad.png" in str(caught.value) and "--no_half_vae" in str(caught.value)
        assert "well.png" not in str(caught.value) and "fine.png" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- validity


def changed_image(item):
    tiny_image(SIZE, seed=99).save(item.path)
    return item


def touched_image(item):
    os.utime(item.path, (1, 1))
    return item


def other_placement(item):
    return make_item_like(item, placement=Placement((48, 64), (79, 64)))


def other_resize(item):
    return make_item_like(item, placement=Placement((64, 48), (80, 65)))


def wanting_mirrored(item):
    return make_item_like(item, flipped_too=True)


def broken_file(item):
    with open(item.npz, "r+b") as file:
        file.truncate(100)
    return item


def overwritten(item, content):
    Path(item.npz).write_bytes(content)
    return item


def flipped_byte(item):
    content = bytearray(Path(item.npz).read_bytes())
    content[250] ^= 0xFF  # within the latents
    return overwritten(item, content)


def rewritten(item, *, without=(), **arrays):
    with np.load(item.npz) as found:
        kept = {key: found[key] for key in found if key not in without}
    np.savez(item.npz, **{**kept, **arrays})
    return item


def make_item_like(item, **changes):
    return replace(item, **changes)


def older_code(item):
    with np.load(item.npz) as found:
        fingerprint = json.loads(str(found["fingerprint"]))
    return rewritten(item, fingerprint=np.array(json.dumps({**fingerprint, "code": 0})))


def wanting_alpha(item):
    return make_item_like(item, alpha_too=True)


def other_resizing(item):
    return make_item_like(item, placement=item.placement._replace(interpolation="nearest"))


STALE = {
    wanting_alpha: "1 without alpha mask",
    other_resizing: "1 other resizing",
    changed_image: "1 image changed",
    other_placement: "1 other size",
    other_resize: "1 other size",
    wanting_mirrored: "1 without mirrored latents",
    broken_file: "1 unreadable",
    older_code: "1 older code",
    lambda item: overwritten(item, b""): "1 unreadable",
    lambda item: overwritten(item, bytes(500)): "1 unreadable",
    lambda item: flipped_byte(item): "1 unreadable",
    lambda item: rewritten(item, fingerprint=np.array("[1, 2]")): "1 unreadable",
    lambda item: rewritten(item, fingerprint=np.array("null")): "1 unreadable",
    lambda item: rewritten(item, latents=np.zeros((3, 6, 8), np.float32)): "1 other size",
    lambda item: rewritten(item, latents=np.full((4, 6, 8), np.nan)): "1 not finite",
    lambda item: rewritten(item, latents=np.zeros((4, 6, 8), int)): "1 unreadable",
}


@pytest.mark.parametrize("change", STALE)
def test_a_stale_file_is_rebuilt_and_said(tmp_path, caplog, change):
    items = [make_item(tmp_path / "a.png"), make_item(tmp_path / "b.png", seed=1)]
    cached(items, batch_size=1)
    items[0] = change(items[0])
    with caplog.at_level(logging.INFO):
        _, encode = cached(items)
    assert encode.num_images == (2 if items[0].flipped_too else 1)
    assert f"1 to be rebuilt ({STALE[change]})" in caplog.text
    assert "latents: 1 of 2 cached before, 0 new" in caplog.text
    _, encode = cached(items)
    assert encode.num_images == 0


def test_another_vae_rebuilds_everything(tmp_path, caplog):
    items = [make_item(tmp_path / "a.png"), make_item(tmp_path / "b.png")]
    cached(items)
    with caplog.at_level(logging.INFO):
        _, encode = cached(items, vae="another")
    assert encode.num_images == 2 and "2 to be rebuilt (2 other VAE)" in caplog.text


def test_a_touched_or_copied_image_stays_valid(tmp_path):
    item = make_item(tmp_path / "a.png")
    first, _ = cached([item])
    latents = first.load(0, flipped=False)
    again, encode = cached([touched_image(item)])
    assert encode.num_images == 0 and torch.equal(again.load(0, flipped=False), latents)
    with np.load(item.npz) as arrays:  # so that the next start need not read the image
        assert json.loads(str(arrays["fingerprint"]))["mtime_ns"] == 10**9
    assert torch.equal(first.load(0, flipped=False), latents)  # a run that was there before goes on


def test_an_image_replaced_by_one_of_equal_size_and_time_is_noticed(tmp_path, caplog):
    item = make_item(tmp_path / "a.bmp")
    cached([item])
    before = os.stat(item.path)
    tiny_image(SIZE, seed=1).save(item.path)
    os.utime(item.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(item.path).st_size == before.st_size
    with caplog.at_level(logging.INFO):
        assert cached([item])[1].num_images == 1
    assert "(1 image changed)" in caplog.text


def test_no_damage_whatever_goes_unnoticed_or_stops_the_run(tmp_path):
    item = make_item(tmp_path / "a.png")
    cached([item])
    content = Path(item.npz).read_bytes()
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        overwritten(item, damaged)
        state = state_of(item, "vae")
        with np.load(io.BytesIO(content)) as arrays:
            expected = arrays["latents"]
        if state.reason == "valid":  # a byte that says nothing, such as a date
            assert np.array_equal(load(item), expected)
    for length in range(0, len(content), 97):
        assert state_of(overwritten(item, content[:length]), "vae").reason == "unreadable"


def load(item, image_hash=None):
    return read_latents(item, flipped=False, vae_fingerprint="vae", image_hash=image_hash)


FOREIGN = ["fingerprint"]


def foreign(item, **arrays):
    """The file as a program of the trade writes it."""
    return rewritten(item, without=FOREIGN, **arrays)


def test_a_file_of_the_trade_is_used_and_said_once(tmp_path, caplog):
    items = [foreign(item) for item in build_two(tmp_path)]
    with caplog.at_level(logging.INFO):
        store, encode = cached(items)
    assert encode.num_images == 0 and store.load(0, flipped=False).shape == (4, 6, 8)
    assert caplog.text.count("2 cache files of another program used") == 1


def build_two(tmp_path):
    items = [make_item(tmp_path / "a.png"), make_item(tmp_path / "b.png")]
    cached(items)
    return items


@pytest.mark.parametrize(
    "arrays",
    [
        {"latents": np.zeros((4, 8, 6), np.float32)},
        {"latents": np.zeros((3, 6, 8), np.float32)},
        {"latents": np.zeros(5)},
        {"original_size": np.array(SIZE[::-1])},
        {"original_size": np.array(80)},
    ],
)
def test_a_file_of_the_trade_with_other_sizes_is_rebuilt(tmp_path, caplog, arrays):
    first, second = build_two(tmp_path)
    foreign(first, **arrays)
    with caplog.at_level(logging.INFO):
        _, encode = cached([first, second])
    assert encode.num_images == 1 and "(1 other size)" in caplog.text


def test_a_file_of_the_trade_with_latents_that_are_not_finite_is_rebuilt(tmp_path, caplog):
    item = foreign(build_two(tmp_path)[0], latents=np.full((4, 6, 8), np.inf, np.float32))
    with caplog.at_level(logging.INFO):
        assert cached([item])[1].num_images == 1
    assert "(1 not finite)" in caplog.text


def test_a_file_of_the_trade_older_than_its_image_is_rebuilt(tmp_path):
    first, second = build_two(tmp_path)
    foreign(first)
    os.utime(first.npz, (1, 1))
    assert cached([first, second])[1].num_images == 1


def test_a_file_of_the_trade_for_a_rotated_image_is_rebuilt(tmp_path, caplog):
    item = make_item(tmp_path / "a.jpg", orientation=3)
    cached([item])
    foreign(item)
    with caplog.at_level(logging.INFO):
        assert cached([item])[1].num_images == 1
    assert "(1 not rotated)" in caplog.text


# ---------------------------------------------------------------------------------------------- alpha


def make_transparent(path, size=SIZE):
    image = tiny_image(size).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(size))
    image.save(path)


def test_the_alpha_channel_lies_beside_its_latents(tmp_path):
    make_transparent(tmp_path / "a.png")
    items = [make_item_like(make_item(tmp_path / name, seed=1), alpha_too=True) for name in ("a.png", "opaque.png")]
    on_disk, _ = cached(items)
    in_memory = fill_memory(items, TinyEncoder(), 1)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["alpha_mask"].shape == (6, 8) and arrays["alpha_mask"].dtype == np.float32
    for index in range(2):
        assert np.array_equal(on_disk.load_alpha(index), in_memory.load_alpha(index))
    assert on_disk.load_alpha(0)[0].max() < on_disk.load_alpha(0)[-1].min() and on_disk.load_alpha(1).min() == 1
    _, encode = cached(items)
    assert encode.num_images == 0
    _, encode = cached([make_item_like(item, alpha_too=False) for item in items])
    assert encode.num_images == 0, "a file may hold more than is asked of it"


def test_alpha_survives_a_new_stamp_and_damage_is_noticed(tmp_path):
    make_transparent(tmp_path / "a.png")
    item = make_item_like(make_item(tmp_path / "a.png"), alpha_too=True)
    before = cached([item])[0].load_alpha(0)
    touched_image(item)
    on_disk, encode = cached([item])
    assert encode.num_images == 0 and np.array_equal(on_disk.load_alpha(0), before)
    for broken in (np.full((6, 8), 2.0), np.full((6, 8), np.nan), np.ones(4)):
        rewritten(item, alpha_mask=broken)
        _, encode = cached([item])
        assert encode.num_images == 1
    Path(item.npz).write_bytes(b"")
    with pytest.raises(OptionError, match="can't be read any more"):
        on_disk.load_alpha(0)


def test_one_image_resized_in_two_ways_has_two_files(tmp_path):
    path = str(tmp_path / "a.png")
    ways = [PLACEMENT._replace(interpolation=name) for name in (None, "box", "nearest")]
    names = cache_file_names([(path, placement) for placement in ways])
    assert len(set(names)) == 3 and all(name.startswith(path) for name in names)
