"""Files of cached latents: their names, the sharing of the work, and other programs and runs beside them."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.buckets import Placement
from library.data.cache_names import cache_file_names
from library.options import OptionError
from tests.tiny_data import tiny_image
from tests.unit.test_cache import PLACEMENT, SIZE, TinyEncoder, cached, foreign, make_item, other_placement, overwritten


def test_names_are_those_of_the_trade_where_they_can_be():
    other = Placement((48, 64), (79, 64))
    larger = Placement((64, 48), (80, 65))
    names = cache_file_names(
        [
            ("d/a.png", PLACEMENT), ("d/a.png", PLACEMENT),  # in two datasets of equal size
            ("d/b.png", PLACEMENT), ("d/b.jpg", PLACEMENT),  # two images of one stem
            ("d/c.png", PLACEMENT), ("d/c.png", other),  # one image at two sizes
            ("d/e.png", PLACEMENT), ("d/e.png", larger),  # one image, equal buckets, differently cut
            ("d/f.1.png", PLACEMENT),
        ]
    )  # fmt: skip
    assert names == [
        "d/a.npz", "d/a.npz",
        "d/b.png.npz", "d/b.jpg.npz",
        "d/c.png.64x48.npz", "d/c.png.48x64.npz",
        "d/e.png.64x48.64x52.npz", "d/e.png.64x48.80x65.npz",
        "d/f.1.npz",
    ]  # fmt: skip


def test_processes_share_the_work(tmp_path):
    items = [make_item(tmp_path / f"{n}.png", seed=n) for n in range(5)]
    counts = [cached(items, batch_size=2, process_index=index, num_processes=2)[1].num_images for index in range(2)]
    assert counts == [3, 2]
    store, encode = cached(items)
    assert encode.num_images == 0 and all(store.load(n, flipped=False).isfinite().all() for n in range(5))


def test_an_interrupted_run_keeps_what_it_had_and_leaves_no_pieces(tmp_path):
    items = [make_item(tmp_path / f"{n}.png", seed=n) for n in range(4)]
    encode = TinyEncoder()

    def stopping(images, noise):
        if encode.num_images == 3:
            raise KeyboardInterrupt
        return encode(images, noise)

    with pytest.raises(KeyboardInterrupt):
        cached(items, stopping, batch_size=1)
    assert sorted(name for name in os.listdir(tmp_path) if not name.endswith("png")) == ["0.npz", "1.npz", "2.npz"]
    assert cached(items)[1].num_images == 1


def test_a_file_that_can_not_be_written(tmp_path):
    item = replace(make_item(tmp_path / "a.png"), npz=str(tmp_path / ("a" * 250 + ".npz")))  # its temporary is too long
    with pytest.raises(OptionError, match=r"^--cache_latents_to_disk: can't write .*a.npz .*in memory"):
        cached([item])
    assert os.listdir(tmp_path) == ["a.png"]


def test_an_image_that_breaks_after_the_scan_is_named(tmp_path):
    item = make_item(tmp_path / "a.png")
    with open(item.path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(OptionError, match=r"a.png can't be read \(.*mend or remove it"):
        cached([item])


# ---------------------------------------------------------------------------------------------- files of the user


def own_array_file(path):
    np.savez(path, precious=np.arange(5))


def own_single_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def own_text(path):
    Path(path).write_text("notes")


@pytest.mark.parametrize("make", [own_array_file, own_single_array, own_text, os.mkdir])
def test_a_file_that_is_no_cache_is_never_overwritten(tmp_path, make):
    items = [make_item(tmp_path / "a.png"), make_item(tmp_path / "b.png", seed=1)]
    make(items[1].npz)
    before = None if os.path.isdir(items[1].npz) else Path(items[1].npz).read_bytes()
    encode = TinyEncoder()
    with pytest.raises(OptionError, match=r"^--cache_latents_to_disk: .*b.npz would be overwritten, but is no latent"):
        cached(items, encode)
    assert encode.num_images == 0
    assert before is None or Path(items[1].npz).read_bytes() == before


# ---------------------------------------------------------------------------------------------- two runs, one cache


def by_another_vae(item):
    cached([item], vae="another")


def at_another_size(item):
    cached([other_placement(item)])


def of_another_image(item):
    tiny_image(SIZE, seed=9).save(item.path)
    cached([item])


def by_another_program(item):
    foreign(item)


@pytest.mark.parametrize("rewrite", [by_another_vae, at_another_size, of_another_image, by_another_program])
def test_a_file_that_another_run_has_rewritten_is_noticed(tmp_path, rewrite):
    item = make_item(tmp_path / "a.png")
    for store in (cached([item])[0], cached([item])[0]):  # one that wrote the file, one that found it
        rewrite(item)
        with pytest.raises(OptionError, match=r"another run has rewritten .*a.npz; resume when that run has ended$"):
            store.load(0, flipped=False)
        cached([item])


def test_what_another_process_wrote_is_checked_as_well(tmp_path):
    items = [make_item(tmp_path / f"{n}.png", seed=n) for n in range(2)]
    stores = [cached(items, process_index=index, num_processes=2)[0] for index in range(2)]
    assert all(store.load(n, flipped=False).shape == (4, 6, 8) for store in stores for n in range(2))
    by_another_vae(items[1])
    with pytest.raises(OptionError, match="another run has rewritten"):
        stores[0].load(1, flipped=False)


def test_another_run_that_adds_mirrored_latents_disturbs_nobody(tmp_path):
    item = make_item(tmp_path / "a.png")
    store, _ = cached([item])
    before = store.load(0, flipped=False)
    cached([replace(item, flipped_too=True)])
    assert torch.equal(store.load(0, flipped=False), before)


def test_a_file_damaged_during_the_run_is_named_with_one_way_out(tmp_path):
    item = make_item(tmp_path / "a.png")
    store, _ = cached([item])
    overwritten(item, Path(item.npz).read_bytes()[:300])
    with pytest.raises(OptionError, match=r"^--cache_latents_to_disk: .*a.npz can't be read any more \(.*; delete it"):
        store.load(0, flipped=False)


# ---------------------------------------------------------------------------------------------- groups


class GroupEncoder(TinyEncoder):
    """As real encoders do, makes latents that depend a little on what is encoded together."""

    def __call__(self, images_BCHW, noise_BCHW):
        return super().__call__(images_BCHW, noise_BCHW) + len(images_BCHW) + images_BCHW.mean()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_latents_are_the_same_after_an_interruption_and_by_several_processes(tmp_path, num_processes):
    items = [make_item(tmp_path / f"{n}.png", seed=n, flipped_too=n % 2 == 0) for n in range(7)]
    whole, _ = cached(items, GroupEncoder(), batch_size=3)
    expected = [whole.load(n, flipped=False) for n in range(7)]
    for n in (1, 2, 5):
        os.remove(items[n].npz)
    kept = os.stat(items[0].npz).st_mtime_ns
    for index in range(num_processes):
        again, _ = cached(items, GroupEncoder(), batch_size=3, process_index=index, num_processes=num_processes)
    assert all(torch.equal(again.load(n, flipped=False), expected[n]) for n in range(7))
    assert os.stat(items[0].npz).st_mtime_ns == kept


def test_only_the_first_process_shows_a_bar(tmp_path, monkeypatch, capsys):
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        cached([make_item(tmp_path / f"{rank}.png")])
        assert ("caching latents" in capsys.readouterr().err) == shown


def test_files_can_be_taken_unchecked(tmp_path, caplog):
    """--skip_cache_check: what is there counts, whatever it is, until it is read; what is not there is made."""
    items = [make_item(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    cached(items[:2])
    size = os.path.getsize(items[0].npz)
    tiny_image(SIZE, seed=9).save(items[0].path)
    (tmp_path / "1.npz").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        store, encode = cached(items, is_checked=False)
    assert encode.num_images == 1 and os.path.getsize(items[0].npz) == size
    assert "2 cache files taken unchecked, as --skip_cache_check asks" in caplog.text
    assert store.load(0, flipped=False).shape == (4, 6, 8)
    with pytest.raises(OptionError) as caught:
        store.load(1, flipped=False)
    assert "1.npz does not fit this run (it can't be read: " in str(caught.value)
    assert str(caught.value).endswith("; leave out --skip_cache_check, and what does not fit is made anew")


@pytest.mark.parametrize(
    ("changes", "vae", "why"),
    [
        ({"placement": Placement((96, 64), (96, 78))}, "vae", "other size"),
        ({}, "other", "other VAE"),
        ({"flipped_too": True}, "vae", "without mirrored latents"),
        ({"alpha_too": True}, "vae", "without alpha mask"),
    ],
)
def test_what_was_taken_unchecked_and_does_not_fit_is_named(tmp_path, changes, vae, why):
    item = make_item(tmp_path / "a.png")
    cached([item])
    store, encode = cached([replace(item, **changes)], vae=vae, is_checked=False)
    assert not encode.num_images
    with pytest.raises(OptionError) as caught:
        store.load(0, flipped=item.flipped_too or "flipped_too" in changes)
        store.load_alpha(0)
    assert str(caught.value).startswith("--skip_cache_check: ") and f"does not fit this run ({why})" in str(
        caught.value
    )
