"""Images held out for validation: which ones, and the batches that are measured, always the same.

Nothing of a measurement is left to chance: an image's noise, timesteps and caption are a function of the validation
seed and of its name, so that numbers of different steps, and of runs with one seed, can be compared. Every image is
measured at several timesteps, one in each part of their range, which takes most of the noise out of the mean.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import numpy as np

from library.data.batch import Batch, Position
from library.data.buckets import Size
from library.data.cache import LatentStore
from library.data.cache_files import CacheItem
from library.data.config import DatasetConfig, SubsetConfig
from library.data.epoch_plan import Pool
from library.data.images import usable_cores
from library.data.loading import RunFacts, Samples, load_batches
from library.data.same_files import file_keys
from library.data.text_cache import TextStore
from library.data.train_images import TrainImages
from library.options import OptionError
from library.randomness import seed_for
from library.wording import counted

logger = logging.getLogger(__name__)

STRATA = 4  # parts of the timestep range, each of which every image is measured in
# what would let two measurements differ; replaced where an option group has it
FIXED = {
    "shuffle_caption": False, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0, "color_aug": False, "flip_aug": False,
    "random_crop": False, "face_crop_aug_range": None,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- split


@dataclass(frozen=True)
class ImageSplit:
    """The images of a run, in their order."""

    training: TrainImages
    validation: TrainImages


def split_images(configs: Sequence[DatasetConfig], images: TrainImages, seed: int) -> ImageSplit:
    """Hold out each dataset's share of its images, except regularisation images.

    What one dataset holds out no other trains on, so that a folder may be used at several resolutions. `seed` decides
    for datasets without a validation_seed. Raises OptionError when nothing is left on one of the two sides.
    """
    shares = [config.split.validation_split for config in configs]
    if not any(shares):
        return ImageSplit(images, images.take(np.empty(0, np.int32)))
    dataset_of = [number for number, config in enumerate(configs) for _ in config.subsets]
    subsets = [subset for config in configs for subset in config.subsets]
    paths = [image.record.path for image in images]
    subset_M = images.subset_M.tolist()
    measurable: list[list[int]] = [[] for _ in configs]
    for place, subset in enumerate(subset_M):
        if not subsets[subset].folder.is_reg:
            measurable[dataset_of[subset]].append(place)
    keys = file_keys(paths)
    held = [
        _keys_held_out([paths[place] for place in found], keys, share, seed_of(config, seed))
        for found, share, config in zip(measurable, shares, configs, strict=True)
    ]
    chosen = [
        place for found, held_keys in zip(measurable, held, strict=True) for place in found
        if keys[paths[place]] in held_keys
    ]  # fmt: skip
    anywhere = frozenset().union(*held)
    rest = [place for place, path in enumerate(paths) if keys[path] not in anywhere]
    _check(len(chosen), sum(not subsets[subset_M[place]].folder.is_reg for place in rest), max(shares))
    training, validation = (images.take(np.array(places, np.int32)) for places in (rest, chosen))
    if elsewhere := len(images) - len(training) - len(validation):
        count = counted(elsewhere, "image")
        logger.info("validation: %s left out of other datasets, because one holds the same out", count)
    return ImageSplit(training, validation)


def _keys_held_out(paths: Sequence[str], keys: Mapping[str, str], share: float, seed: int) -> frozenset[str]:
    """As :func:`held_out`, with one path for each file; these are the files' keys."""
    one_path = {keys[path]: path for path in reversed(paths)}
    return frozenset(keys[path] for path in held_out(one_path.values(), share, seed))


def held_out(paths: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """The share (0-1) of the images to hold out, rounded to whole images.

    It follows from the seed and the files' names, not from their order or folder; a new image moves at most one other.
    """
    unique = sorted(set(paths), key=lambda path: (seed_for(seed, "validation split", os.path.basename(path)), path))
    return frozenset(unique[: int(share * len(unique) + 0.5)])


def seed_of(config: DatasetConfig, seed: int) -> int:
    """The dataset's validation_seed, or the run's seed."""
    return seed if config.split.validation_seed is None else config.split.validation_seed


def _check(num_validation: int, num_training: int, share: float) -> None:
    if not num_validation:
        raise OptionError(
            "--validation_split", f"{share:g} of {num_training} images is none of them", "hold more out, or nothing"
        )
    if not num_training:
        raise OptionError("--validation_split", f"{share:g} leaves no image to train on", "use less; 0.1 is usual")


def with_own_items(images: TrainImages, items: Sequence[CacheItem]) -> tuple[TrainImages, Sequence[CacheItem]]:
    """The images with only those cache items that are theirs, in the same order.

    Kept apart, the latents of training images are encoded in the groups of a run that never had the others.
    """
    used, own = np.unique(images.item_M, return_inverse=True)
    return images.with_items(own.reshape(-1).astype(np.int32)), [items[old] for old in used.tolist()]


# ---------------------------------------------------------------------------------------------- batches


class ValidationSet:
    """The images held out of a run's datasets, as samples to be measured."""

    def __init__(
        self, configs: Sequence[DatasetConfig], images: TrainImages, items: Sequence[CacheItem], seed: int
    ) -> None:
        self.items = items
        self.store: LatentStore | None = None
        self.texts: TextStore | None = None
        self.num_images = len(images)
        subsets = [_fixed(subset) for config in configs for subset in config.subsets]
        dataset_of = [number for number, config in enumerate(configs) for _ in config.subsets]
        namesakes: Counter[tuple[str, int]] = Counter()
        image_of_sample: dict[int, int] = {}
        pools: dict[tuple[int, Size], list[int]] = {}
        for index, image in enumerate(images):
            number = dataset_of[image.subset]
            key = (os.path.basename(image.record.path), seed_of(configs[number], seed))
            ids = sample_ids(*key, namesakes[key])
            namesakes[key] += 1
            image_of_sample.update(dict.fromkeys(ids, index))
            pools.setdefault((number, image.placement.bucket_wh), []).extend(ids)
        nothing = np.empty(0, dtype=np.int64)
        self.samples = Samples(
            images,
            subsets,
            image_of_sample,
            tuple(
                Pool(f"{number}/{width}x{height}", np.array(ids), nothing, 0, configs[number].batch_size)
                for (number, (width, height)), ids in sorted(pools.items())
            ),
            seed=0,  # the ids already follow from the seed: the same image is drawn alike in every run
        )

    def num_batches(self, num_processes: int, at_most: int | None) -> int:
        """Batches of one measurement, over all processes."""
        total = sum(pool.num_batches(num_processes) for pool in self.samples.pools)
        return total if at_most is None else min(total, at_most)

    def batches(self, *, at_most: int | None, workers: int, **run: Any) -> Iterator[Batch]:
        """This process's share of the batches of one measurement; `run` are fields of RunFacts.

        With `at_most`, the first ones of an order that is mixed once and for all.
        """
        facts = RunFacts(accumulation=1, max_train_steps=1, epochs=1, prior_loss_weight=1.0, **run)
        in_memory = self.store is not None and self.store.in_memory and (self.texts is None or self.texts.in_memory)
        workers = 0 if in_memory else min(workers, usable_cores())
        loader = load_batches(self.samples, self.store, facts, start=Position(1, 0), workers=workers, texts=self.texts)
        return (batch for _, batch in islice(loader, self.num_batches(facts.num_processes, at_most)))


def sample_ids(name: str, seed: int, namesake: int) -> list[int]:
    """The sample ids of an image, one for each stratum: id modulo STRATA is the stratum."""
    first = seed_for(seed, "validation sample", name, namesake) // STRATA * STRATA
    return [first + stratum for stratum in range(STRATA)]


def _fixed(subset: SubsetConfig) -> SubsetConfig:
    """The subset without anything that varies from draw to draw."""
    return replace(
        subset,
        caption=replace(subset.caption, **_present(subset.caption)),
        augment=replace(subset.augment, **_present(subset.augment)),
    )


def _present(group: Any) -> dict[str, Any]:
    return {field.name: FIXED[field.name] for field in fields(group) if field.name in FIXED}
