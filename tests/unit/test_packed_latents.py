"""Latents in packs: the same as in files of their own; what is trusted, and what a killed run may leave."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.data.buckets import Placement
from library.data.cache import fill_disk, fill_memory
from library.data.cache_audit import latent_states
from library.data.packed_files import FIXED, HEADER, Packs
from library.data.packed_latents import fill_packs, packed_states
from library.options import OptionError
from tests.tiny_data import tiny_image
from tests.unit.test_cache import TinyEncoder, make_item

PACK = "latents_64x48.pack"


@pytest.fixture
def items(tmp_path):
    """Four images of one size, two of them mirrored as well, and one of another size."""
    items = [make_item(tmp_path / f"{n}.png", flipped_too=n % 2 == 0, seed=n) for n in range(4)]
    return [*items, make_item(tmp_path / "wide.png", placement=Placement((96, 32), (96, 78)))]


def packed(items, *, vae="vae", **settings):
    encode = TinyEncoder()
    return fill_packs(items, encode, 2, vae_fingerprint=vae, **settings), encode.num_images


def assert_same(first, second, items):
    for index, item in enumerate(items):
        for flipped in (False, True)[: 1 + item.flipped_too]:
            assert torch.equal(first.load(index, flipped=flipped), second.load(index, flipped=flipped))


def test_packs_hold_what_files_and_memory_hold(items, tmp_path):
    store, num_encoded = packed(items)
    assert sorted(path.name for path in tmp_path.glob("*.pack")) == [PACK, "latents_96x32.pack"]
    assert num_encoded == 7 and not list(tmp_path.glob("*.npz")) and not store.in_memory
    assert_same(store, fill_memory(items, TinyEncoder(), 2), items)
    again, num_encoded = packed(items)
    assert num_encoded == 0
    assert_same(again, store, items)
    assert_same(pickle.loads(pickle.dumps(again)), store, items)
    unchecked, _ = packed(items, is_checked=False)
    assert_same(unchecked, store, items)


def test_npz_files_become_records(items):
    files = fill_disk(items, TinyEncoder(), 2, vae_fingerprint="vae")
    store, num_encoded = packed(items)
    assert num_encoded == 0
    assert_same(store, files, items)
    _, num_encoded = packed(items, vae="other")
    assert num_encoded == 7


def test_only_what_changed_is_made_anew(items):
    packed(items)
    tiny_image((80, 65), seed=9).save(items[1].path)
    store, num_encoded = packed(items)
    assert num_encoded == 3, "its group of two, one of them also mirrored"
    assert_same(store, fill_memory(items, TinyEncoder(), 2), items)
    assert packed(items)[1] == 0, "the record written last counts"


@pytest.mark.parametrize("what", ["half a header", "half a record", "zeros", "other bytes"])
def test_what_a_killed_run_leaves_at_the_end_is_cut_off(items, tmp_path, what):
    packed(items[:3])
    whole = (tmp_path / PACK).read_bytes()
    tail = {
        "half a header": whole[:500],
        "half a record": whole[: HEADER + 40],
        "zeros": bytes(3000),
        "other bytes": b"x" * 2000,
    }
    (tmp_path / PACK).write_bytes(whole + tail[what])
    store, num_encoded = packed(items)
    assert num_encoded == 4, "the group of the one that was not there, and one of another size"
    assert (tmp_path / PACK).read_bytes()[: len(whole)] == whole
    assert_same(store, fill_memory(items, TinyEncoder(), 2), items)


def test_a_damaged_record_is_made_anew(items, tmp_path):
    packed(items)
    content = bytearray((tmp_path / PACK).read_bytes())
    content[HEADER + 100] ^= 1
    (tmp_path / PACK).write_bytes(bytes(content))
    assert [state.reason for state in packed_states(items, "vae")] == ["unreadable", *["valid"] * 4]
    store, _ = packed(items)
    assert_same(store, fill_memory(items, TinyEncoder(), 2), items)


@pytest.mark.parametrize("content", [b"my own notes", b"x" * 5000, b"latent2\n" + b"x" * 5000])
def test_a_file_that_is_no_pack_stays(items, tmp_path, content):
    (tmp_path / PACK).write_bytes(content)
    encode = TinyEncoder()
    with pytest.raises(OptionError, match=rf"{PACK} would be overwritten, but is no pack of latents; move it"):
        fill_packs(items, encode, 2, vae_fingerprint="vae")
    assert encode.num_images == 0 and (tmp_path / PACK).read_bytes() == content
    assert not (tmp_path / "latents_96x32.pack").exists()
    states = latent_states(items, "vae", packed=True)
    assert {state.file for state in states if state.verdict == "another file"} == {str(tmp_path / PACK)}
    assert packed(items, share=(0, 2))[1] > 0, "the pack of this process has another name"


@pytest.mark.parametrize("content", [b"", b"lat", b"latent1\n", bytes(3000)])
def test_the_beginning_of_a_pack_is_one(items, tmp_path, content):
    """What a killed run or a power cut leaves where nothing was before."""
    (tmp_path / PACK).write_bytes(content)
    store, num_encoded = packed(items)
    assert num_encoded == 7
    assert_same(store, fill_memory(items, TinyEncoder(), 2), items)


@pytest.mark.parametrize("damage", ["cut off", "its header"])
def test_what_a_damaged_pack_does_not_show_is_damaged(items, tmp_path, damage):
    packed(items)
    content = bytearray((tmp_path / PACK).read_bytes())
    if damage == "cut off":
        del content[HEADER + 40 :]
    else:
        content[FIXED.size] ^= 1  # the text
    (tmp_path / PACK).write_bytes(bytes(content))
    assert [state.verdict for state in latent_states(items, "vae", packed=True)] == [*["damaged"] * 4, "valid"]
    (tmp_path / PACK).unlink()
    assert [state.verdict for state in latent_states(items, "vae", packed=True)] == [*["missing"] * 4, "valid"]


def test_a_full_disk_leaves_whole_packs(items, tmp_path, monkeypatch):
    """What could be written of the record that failed is cut off, and a pack of nothing goes."""
    packed(items[4:])
    write, room = os.write, HEADER + 100

    def some_of_it(descriptor, content):
        nonlocal room
        if len(content) < HEADER:
            return write(descriptor, content)
        written = write(descriptor, content[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", some_of_it)
    with pytest.raises(OptionError, match=rf"can't write .*{PACK} \(the disk is full\); free some space") as caught:
        packed(items)
    assert "--cache_latents (in memory)" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("*.pack")] == ["latents_96x32.pack"]
    room = 6 * HEADER
    with pytest.raises(OptionError, match="the disk is full"):
        packed(items)
    verdicts = [state.verdict for state in latent_states(items, "vae", packed=True)]
    assert 0 < verdicts.count("valid") < 5 and set(verdicts) == {"valid", "missing"}


def test_processes_write_packs_of_their_own_and_read_all(items, tmp_path):
    stores = [packed(items, share=(number, 2))[0] for number in (0, 1)]
    assert sorted(path.name for path in tmp_path.glob("*.pack")) == [
        "latents_64x48.0.pack", "latents_64x48.1.pack", "latents_96x32.0.pack",
    ]  # fmt: skip
    for store in stores:
        assert_same(store, fill_memory(items, TinyEncoder(), 2), items)
    assert packed(items)[1] == 0, "one process takes up what two wrote"


def test_latents_that_nobody_wrote(items):
    store, _ = packed(items, share=(0, 2))
    with pytest.raises(OptionError, match="are gone from their pack"):
        store.load(2, flipped=False)


def test_images_known_from_a_pack_need_no_look(items):
    packed(items)
    assert all(Packs().decoded_before(item) for item in items)
    os.utime(items[0].path, (1, 1))
    assert not Packs().decoded_before(items[0])
    assert packed(items)[1] == 0, "its bytes are the same"


def test_packs_hold_no_alpha(items):
    with pytest.raises(OptionError, match="packs hold no alpha masks"):
        packed([replace(items[0], alpha_too=True)])


def test_reading_is_of_mapped_pages(items, tmp_path):
    store, _ = packed(items)
    loaded = store.load(0, flipped=False)
    assert isinstance(store._pages[str(tmp_path / PACK)], np.memmap) and loaded.dtype == torch.float32
    loaded.add_(1)
    assert not torch.equal(store.load(0, flipped=False), loaded), "what is drawn is a copy"


def test_without_a_check_headers_still_count(items):
    packed([replace(item, flipped_too=False) for item in items])
    tiny_image((80, 65), seed=9).save(items[1].path)
    _, num_encoded = packed(items, is_checked=False)
    assert num_encoded == 6, "the two groups of images that are wanted mirrored as well"
    assert packed(items, is_checked=False, vae="other")[1] == 7
