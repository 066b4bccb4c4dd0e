"""Images held out for validation: which ones, that training never sees them, and that measurements are always alike."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.options import (
    AugmentOptions,
    LoaderOptions,
    SourceOptions,
    ValidationSplitOptions,
)
from library.data.validation_set import STRATA, held_out
from library.diffusion.noise import NoiseSource
from library.diffusion.options import NoiseOptions
from library.options import OptionError
from library.train.validation import StratifiedNoise
from tests.tiny_data import tiny_images
from tests.tiny_runs import BUCKETS, EVERYTHING, assert_equal, batches, cache, letters

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=30, unique=True)


def built(folder, share, *, reg=None, seed=1, validation_seed=None, cached=False, toml=None):
    augment = AugmentOptions(flip_aug=True) if cached else AugmentOptions(True, True, True)
    source = SourceOptions(None if toml else str(folder), reg and str(reg), dataset_config=toml)
    split = ValidationSplitOptions(share, validation_seed)
    configs = load_configs(source, BUCKETS, EVERYTHING, augment, LoaderOptions(2), split)
    data = TrainingData.build(configs, seed=seed, on_bad_image="stop")
    if cached:
        cache(data)
    return data


def measured(data, *, workers=0, at_most=None, process_index=0, num_processes=1, noise=None):
    draw = StratifiedNoise(NoiseSource(noise or NoiseOptions(), 0))
    facts = {"draw": draw, "tokenize": letters, "process_index": process_index, "num_processes": num_processes}
    return list(data.validation.batches(at_most=at_most, workers=workers, **facts))


def names_in(found):
    return {Path(name).name for batch in found for name in batch.image_names}


@pytest.fixture
def folder(tmp_path):
    tiny_images(tmp_path / "images" / "2_disc", 8)
    return tmp_path / "images"


# ---------------------------------------------------------------------------------------------- which images


@given(NAMES, st.floats(0, 1), st.integers(0, 5), st.randoms())
def test_the_choice_follows_from_seed_and_names_alone(names, share, seed, random):
    held = held_out([f"/here/{name}.png" for name in names], share, seed)
    assert len(held) == int(share * len(names) + 0.5)
    random.shuffle(names)
    moved = held_out([f"/elsewhere/{name}.png" for name in names], share, seed)
    assert {Path(path).name for path in held} == {Path(path).name for path in moved}


@given(NAMES, st.floats(0, 1), st.integers(0, 5))
def test_a_new_image_moves_at_most_one_other(names, share, seed):
    before, after = held_out(names, share, seed), held_out([*names, "new"], share, seed)
    assert len(before ^ (after - {"new"})) <= 1


def test_another_seed_holds_out_others():
    names = [f"{number}.png" for number in range(100)]
    assert held_out(names, 0.2, 1) != held_out(names, 0.2, 2)


def test_training_never_sees_a_held_out_image(folder):
    data = built(folder, 0.25)
    shown, kept = names_in(batches(data).values()), names_in(measured(data))
    assert len(kept) == data.validation.num_images == 2 and len(shown) == 6 and not shown & kept
    assert data.num_train_images == 12, "repeats are for training"
    assert data.metadata()["ss_num_validation_images"] == 2


def test_regularisation_images_are_never_held_out(folder, tmp_path):
    tiny_images(tmp_path / "reg" / "1_thing", 8, seed=50)
    data = built(folder, 0.5, reg=tmp_path / "reg")
    assert data.num_reg_images == 8 and data.validation.num_images == 4


def test_the_validation_seed_decides_alone(folder):
    first, second = (built(folder, 0.25, seed=seed, validation_seed=7) for seed in (1, 2))
    for one, other in zip(measured(first), measured(second), strict=True):
        assert_equal(one, other)
    unlike = built(folder, 0.25, seed=1, validation_seed=8)
    assert not torch.equal(measured(first)[0].noise_BCHW, measured(unlike)[0].noise_BCHW)


def test_what_one_dataset_holds_out_no_other_trains_on(folder, tmp_path):
    images = (folder / "2_disc").as_posix()
    toml = tmp_path / "data.toml"
    toml.write_text(
        f"[[datasets]]\nresolution = 64\nvalidation_split = 0.25\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
        f"[[datasets]]\nresolution = 32\nenable_bucket = false\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
    )
    data = built(folder, 0.0, toml=toml)
    shown, kept = names_in(batches(data).values()), names_in(measured(data))
    assert (len(kept), len(shown)) == (2, 6) and not shown & kept


def test_a_dataset_of_nothing_but_validation(folder, tmp_path):
    tiny_images(tmp_path / "other", 3, seed=30)
    toml = tmp_path / "data.toml"
    images = (folder / "2_disc").as_posix()
    toml.write_text(
        f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
        f"[[datasets]]\nvalidation_split = 1\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'other').as_posix()}'\n"
    )
    data = built(folder, 0.0, toml=toml)
    assert (data.num_train_images, data.validation.num_images) == (8, 3)


@pytest.mark.parametrize(("share", "word"), [(0.01, "none of them"), (1.0, "no image to train on")])
def test_a_split_that_leaves_one_side_empty_is_refused(folder, share, word):
    with pytest.raises(OptionError, match=word):
        built(folder, share)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(OptionError, match="--validation_split"):
        ValidationSplitOptions(share)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("cached", [False, True])
def test_training_batches_are_those_of_a_folder_without_the_held_out_images(folder, tmp_path, cached):
    data = built(folder, 0.25, cached=cached)
    shutil.copytree(folder, tmp_path / "rest")
    for name in names_in(measured(data)):
        (tmp_path / "rest" / "2_disc" / name).unlink()
    rest = built(tmp_path / "rest", 0.0, cached=cached)
    expected = batches(rest)
    for position, batch in batches(data).items():
        moved = tuple(name.replace(str(folder), str(tmp_path / "rest")) for name in batch.image_names)
        assert_equal(replace(batch, image_names=moved), expected[position])


# ---------------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("cached", [False, True])
def test_two_measurements_are_alike_and_nothing_in_them_is_random(folder, cached):
    data = built(folder, 0.5, cached=cached)
    first, second = measured(data), measured(data, workers=2)
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)
    seen = {}
    for batch in first:
        pixels = batch.latents_BCHW if cached else batch.images_BCHW
        for name, caption, picture in zip(batch.image_names, batch.captions, pixels, strict=True):
            before = seen.setdefault(name, (caption, picture))
            assert caption == before[0] and torch.equal(picture, before[1])
            assert caption == f"a picture, number {int(Path(name).stem[-3:])}, tiny", "neither shuffled nor dropped"


def test_an_image_is_drawn_alike_whatever_is_measured_beside_it(folder):
    few, many = measured(built(folder, 0.25)), measured(built(folder, 0.5))
    noise = {}
    for batch in many:
        for name, timestep, sample in zip(batch.image_names, batch.timesteps_B, batch.noise_BCHW, strict=True):
            noise[name, int(timestep)] = sample
    for batch in few:
        for name, timestep, sample in zip(batch.image_names, batch.timesteps_B, batch.noise_BCHW, strict=True):
            assert torch.equal(noise[name, int(timestep)], sample)


@pytest.mark.parametrize(("low", "high"), [(None, None), (200, 400), (500, 500)])
def test_every_image_is_measured_in_every_part_of_the_timestep_range(folder, low, high):
    data = built(folder, 0.5)
    parts = {}
    noise = NoiseOptions(min_timestep=low, max_timestep=high)
    for batch in measured(data, noise=noise):
        for name, timestep in zip(batch.image_names, batch.timesteps_B.tolist(), strict=True):
            parts.setdefault(name, []).append(timestep)
    first, end = noise.timestep_range
    width = max(1, end - first)
    for timesteps in parts.values():
        expected = list(range(STRATA)) if width > 1 else [0] * STRATA
        assert sorted((timestep - first) * STRATA // width for timestep in timesteps) == expected


def test_processes_share_the_samples_out(folder):
    data = built(folder, 0.5)
    whole = sorted(sample for batch in measured(data) for sample in _samples(batch))
    parts = [batch for index in range(2) for batch in measured(data, process_index=index, num_processes=2)]
    assert sorted(sample for batch in parts for sample in _samples(batch)) == whole
    assert sum(batch.denominator for batch in parts) == len(whole), "together, the number of samples"


def _samples(batch):
    real = [weight > 0 for weight in batch.loss_weight_B]
    found = zip(batch.image_names, batch.timesteps_B.tolist(), real, strict=True)
    return [(Path(name).name, timestep) for name, timestep, is_real in found if is_real]


def test_at_most_so_many_batches_always_the_same(folder):
    data = built(folder, 0.5)
    few = measured(data, at_most=3)
    assert len(few) == 3 and data.validation.num_batches(1, 3) == 3
    for one, other in zip(few, measured(data)[:3], strict=True):
        assert_equal(one, other)
