"""Batches depend on nothing but the seed and the position in the run."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from library.data.batch import Position
from library.data.options import AugmentOptions, CacheOptions, CaptionOptions
from library.options import OptionError
from tests.tiny_data import tiny_images
from tests.tiny_runs import assert_equal, batches, build, cache, letters, run_facts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five training images x 2 in three shapes, twelve regularisation images."""
    root = tmp_path_factory.mktemp("data")
    tiny_images(root / "train" / "2_cat", 5, sizes=((70, 64), (96, 64), (64, 96)))
    tiny_images(root / "reg" / "1_animal", 12, sizes=((70, 64), (96, 64)), captions=[], seed=50)
    return root / "train", root / "reg"


def test_a_batch_holds_what_the_contract_says(folders):
    data = build(*folders)
    found = batches(data)
    assert len(found) == 2 * data.batches_per_epoch(1)
    for batch in found.values():
        size, (height, width) = batch.size, batch.target_hw_B2[0].tolist()
        assert batch.images_BCHW.shape == (size, 3, height, width) and batch.latents_BCHW is None
        assert batch.images_BCHW.abs().max() <= 1 and batch.images_BCHW.dtype == torch.float32
        assert batch.noise_BCHW.shape == batch.posterior_noise_BCHW.shape == (size, 4, height // 8, width // 8)
        assert batch.timesteps_B.dtype == batch.original_hw_B2.dtype == batch.crop_yx_B2.dtype == torch.int64
        assert batch.token_ids[0].shape == (size, 1, 77)
        assert torch.equal(batch.token_ids[0], letters(batch.captions).ids[0])
        assert batch.denominator == size
        weights = [0.5 if "animal" in name else 1.0 for name in batch.image_names]
        assert batch.loss_weight_B.tolist() == weights


def test_size_conditioning(folders):
    for batch in batches(build(*folders)).values():
        for (height, width), (top, left), target in zip(
            batch.original_hw_B2.tolist(), batch.crop_yx_B2.tolist(), batch.target_hw_B2.tolist(), strict=True
        ):
            assert {(64, 70): [64, 64], (64, 96): [48, 80], (96, 64): [80, 48]}[height, width] == target
            assert (top, left) == {(64, 70): (2, 0), (64, 96): (0, 4), (96, 64): (4, 0)}[height, width]


@pytest.mark.parametrize("cached", [None, "memory", "disk"])
def test_the_number_of_workers_changes_nothing(folders, cached):
    data = build(*folders, augment=AugmentOptions(flip_aug=True) if cached else None)
    if cached:
        cache(data, cache_latents_to_disk=cached == "disk")
    assert data.latents_in_memory == (cached == "memory")
    alone, one, four = (batches(data, workers=workers) for workers in (0, 1, 4))
    assert list(alone) == list(one) == list(four)
    for position, batch in alone.items():
        assert (batch.latents_BCHW is not None) == (cached is not None) == (batch.posterior_noise_BCHW is None)
        assert_equal(batch, one[position])
        assert_equal(batch, four[position])


def test_starting_anywhere_is_the_same_as_coming_by(folders):
    data = build(*folders)
    whole = batches(data, epochs=3)
    for start in (Position(1, 3), Position(2, 0), Position(3, 4), Position(1, data.batches_per_epoch(1))):
        rest = batches(build(*folders), start=start, epochs=3)
        first = start if start in whole else Position(2, 0)
        assert list(rest) == list(whole)[list(whole).index(first) :]
        for position, batch in rest.items():
            assert_equal(batch, whole[position])


def test_a_start_is_instant(folders):
    """Nothing is made of the million batches before."""
    data = build(*folders)
    start = Position(200_000, 1)
    ((position, _),) = list(batches(data, start=start, epochs=200_000, max_train_steps=10**7).items())[:1]
    assert position == start


def test_processes_together_are_one_process_with_a_larger_batch(folders):
    data, larger = build(*folders, batch_size=2), build(*folders, batch_size=4)
    assert data.batches_per_epoch(2) == larger.batches_per_epoch(1)
    halves = [batches(data, process_index=index, num_processes=2) for index in range(2)]
    for position, whole in batches(larger).items():
        parts = [half[position] for half in halves]
        assert parts[0].size == parts[1].size
        real = [[index < whole.size - offset for index in range(parts[0].size)] for offset in (0, parts[0].size)]
        images = torch.cat([part.images_BCHW[mask] for part, mask in zip(parts, real, strict=True)])
        noise = torch.cat([part.noise_BCHW[mask] for part, mask in zip(parts, real, strict=True)])
        assert torch.equal(images, whole.images_BCHW) and torch.equal(noise, whole.noise_BCHW)
        for part, mask in zip(parts, real, strict=True):
            assert [weight > 0 for weight in part.loss_weight_B.tolist()] == mask
        error = (
            torch.cat([part.loss_weight_B * part.noise_BCHW.mean((1, 2, 3)) / part.denominator for part in parts]).sum()
            / 2
        )
        expected = (whole.loss_weight_B * whole.noise_BCHW.mean((1, 2, 3))).sum() / whole.denominator
        assert torch.allclose(error, expected, atol=1e-6)


def test_cached_and_uncached_runs_draw_the_same(folders):
    augment = AugmentOptions(flip_aug=True)
    plain, cached = build(*folders, augment=augment), build(*folders, augment=augment)
    cache(cached)
    for (position, with_images), (_, with_latents) in zip(batches(plain).items(), batches(cached).items(), strict=True):
        assert with_images.captions == with_latents.captions, position
        assert torch.equal(with_images.noise_BCHW, with_latents.noise_BCHW)
        assert torch.equal(with_images.timesteps_B, with_latents.timesteps_B)
        assert torch.equal(with_images.crop_yx_B2, with_latents.crop_yx_B2)


def test_flips_show_both_sides_and_latents_follow(tmp_path):
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, :32] = 255
    (tmp_path / "1_a").mkdir()
    Image.fromarray(image).save(tmp_path / "1_a" / "half.png")
    data = build(tmp_path, augment=AugmentOptions(flip_aug=True), batch_size=1)
    sides = [float(batch.images_BCHW[0, 0, 0, 0]) for batch in batches(data, epochs=40).values()]
    assert set(sides) == {-1.0, 1.0} and 8 < sides.count(1.0) < 32
    data.cache_latents(lambda images, noise: avg_pool2d(images, 8)[:, [0, 0, 0, 0]], "vae", CacheOptions(True))
    assert [float(batch.latents_BCHW[0, 0, 0, 0]) for batch in batches(data, epochs=40).values()] == sides


def test_draws_differ_between_epochs_and_repeats(folders):
    data = build(folders[0])
    shown: dict[str, list[torch.Tensor]] = {}
    for batch in batches(data, epochs=3).values():
        for name, noise in zip(batch.image_names, batch.noise_BCHW, strict=True):
            shown.setdefault(name, []).append(noise)
    assert len(shown) == 5 and all(len(noises) == 6 for noises in shown.values())
    for noises in shown.values():
        assert len({tuple(noise.flatten()[:3].tolist()) for noise in noises}) == 6


def test_the_optimizer_step_drives_the_warm_up(folders):
    caption = CaptionOptions(token_warmup_step=0.5)
    data = build(folders[0], caption=caption, batch_size=1)
    per_epoch = data.batches_per_epoch(1)
    assert per_epoch == 10
    found = batches(data, accumulation=4, max_train_steps=12, epochs=4)
    for position, batch in found.items():
        step = (position.epoch - 1) * 3 + position.batch_index // 4
        assert batch.captions[0].count(",") + 1 == (3 if step >= 6 else step * 2 // 6 + 1)


def test_dropout_by_epoch_follows_the_true_epoch(folders):
    data = build(folders[0], caption=CaptionOptions(caption_dropout_every_n_epochs=2))
    empty = {position.epoch: set() for position in batches(data, epochs=4)}
    for position, batch in batches(data, epochs=4).items():
        empty[position.epoch].update(not caption for caption in batch.captions)
    assert empty == {1: {False}, 2: {True}, 3: {False}, 4: {True}}


def test_the_contracts_way_to_the_loader(folders):
    data = build(*folders)
    found = dict(data.loader(start=Position(2, 1), workers=1, **run_facts()))
    for position, batch in batches(data, start=Position(2, 1)).items():
        assert_equal(batch, found[position])


def test_an_image_that_vanishes_during_training_is_named(tmp_path):
    (path,) = tiny_images(tmp_path / "1_a", 1)
    data = build(tmp_path)
    path.unlink()
    for workers in (0, 1):
        with pytest.raises(OptionError) as caught:
            batches(data, workers=workers)
        assert str(caught.value) == (
            f"training images: {path} can't be read any more (No such file or directory); mend it and resume"
        )


def test_a_damaged_cache_file_is_named_with_one_way_out(tmp_path):
    (path,) = tiny_images(tmp_path / "1_a", 1)
    data = build(tmp_path, augment=AugmentOptions())
    cache(data, cache_latents_to_disk=True)
    path.with_suffix(".npz").write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(OptionError) as caught:
            batches(data, workers=workers)
        message = str(caught.value)
        assert message.startswith(f"--cache_latents_to_disk: {path.with_suffix('.npz')} can't be read any more (")
        assert message.endswith("; delete it and resume")


def test_a_batch_size_beyond_all_data_takes_no_memory(folders):
    data = build(folders[0], batch_size=10**30)
    assert data.batches_per_epoch(2) == len(data.datasets[0].bucket_counts) == len(batches(data, epochs=1))
