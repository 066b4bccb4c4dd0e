"""The training data of a run: found, checked, sorted into buckets, cached, served in batches."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from library.data.assembly import Assembly
from library.data.batch import Batch, Position
from library.data.buckets import Size, place_images
from library.data.cache import Encode, LatentStore, fill_disk, fill_memory
from library.data.cache_files import CacheItem, cache_file_names, decoded_before
from library.data.config import DatasetConfig, SubsetConfig, check_cacheable
from library.data.images import find_broken, usable_cores
from library.data.loading import RunFacts, Samples, TrainImage, load_batches
from library.data.options import CacheOptions
from library.data.sources import FolderContents, report_broken, report_captions, report_passed_over, scan_folder
from library.data.summary import LoadedDataset, metadata, report_lines
from library.options import OptionError

logger = logging.getLogger(__name__)


class TrainingData:
    """All datasets of a run. Make it with :meth:`build`."""

    def __init__(self, datasets: Sequence[LoadedDataset], items: Sequence[CacheItem], samples: Samples) -> None:
        self.datasets = tuple(datasets)
        self._items = items
        self._samples = samples
        self._store: LatentStore | None = None

    @classmethod
    def build(cls, configs: Sequence[DatasetConfig], *, seed: int, on_bad_image: str) -> TrainingData:
        """Find the images, read captions, check every image to its last byte, and sort them into buckets.

        `on_bad_image` "stop": all broken images in one OptionError; "skip": in one warning, and the run does without.
        """
        subsets = [subset for config in configs for subset in config.subsets]
        found = [_scan(subset) for subset in subsets]
        report_passed_over(found)
        report_captions(
            (contents, subset.caption.caption_extension, subset.folder.class_tokens)
            for contents, subset in zip(found, subsets, strict=True)
        )
        images, items = _placed_images(configs, found)
        broken = {path: reason for contents in found for path, reason in contents.broken.items()}
        unchecked = {item.path: None for item in items if not decoded_before(item.path, item.npz)}
        broken |= find_broken(unchecked)
        report_broken(broken, on_bad_image)
        if broken:
            images, items = _placed_images(configs, [contents.without(broken) for contents in found])
        assembly = Assembly(images, subsets)
        starts = accumulate((len(config.subsets) for config in configs), initial=0)
        datasets = [
            assembly.add(config, range(start, start + len(config.subsets)))
            for config, start in zip(configs, starts, strict=False)
        ]
        if not any(dataset.num_train for dataset in datasets):
            looked_at = ", ".join(str(subset.image_dir) for subset in subsets)
            raise OptionError(
                "training images", f"none left to train on in {looked_at}", "add images that are not is_reg"
            )
        return cls(datasets, items, assembly.samples(seed))

    # ------------------------------------------------------------------------------------------ facts

    @property
    def num_train_images(self) -> int:
        """Training images x repeats, over all datasets."""
        return sum(dataset.num_train for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images x repeats; an epoch shows as many of them as there are training images."""
        return sum(dataset.num_reg for dataset in self.datasets)

    @property
    def is_empty(self) -> bool:
        return self.num_train_images == 0

    @property
    def latents_in_memory(self) -> bool:
        return self._store is not None and self._store.in_memory

    def batches_per_epoch(self, num_processes: int) -> int:
        """Batches over all processes; the same for every epoch."""
        return sum(pool.num_batches(num_processes) for pool in self._samples.pools)

    def bucket_summary(self) -> list[list[tuple[Size, int]]]:
        """For each dataset: its buckets in use as ((width, height), samples per epoch), ascending."""
        return [list(dataset.bucket_counts) for dataset in self.datasets]

    def report_lines(self) -> list[str]:
        """The data as a user wants to check it before the start."""
        return report_lines(self.datasets)

    def metadata(self, *, num_processes: int = 1, accumulation: int = 1) -> dict[str, Any]:
        """The ss_* keys about the data, for str()."""
        return metadata(self.datasets, samples_per_step=num_processes * accumulation)

    def digest(self) -> str:
        """Changes with whatever samples are made of: names and sizes of images, captions, all options of the datasets.

        It doesn't when the folders move, nor for an image replaced by one of its name with as many bytes and pixels.
        """
        digest = hashlib.blake2b(digest_size=16)
        for dataset in self.datasets:
            digest.update(repr(_without_place(dataset.config)).encode())
        for image in self._samples.images:
            record = replace(image.record, path=os.path.basename(image.record.path))
            digest.update(repr((record, image.placement, image.subset)).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------ latents

    def cache_latents(
        self, encode: Encode, fingerprint: str, cache: CacheOptions, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        """Encode all images, or take latents from valid cache files; batches then hold latents.

        `encode` turns images (B, 3, H, W) in [-1, 1] and noise (B, 4, H/8, W/8) into unscaled latents, shaped like
        the noise; `fingerprint` identifies the VAE's weights. On disk every process encodes its own share: let them
        wait for each other before the first batch. In memory every process encodes everything.
        """
        check_cacheable([dataset.config for dataset in self.datasets], cache)
        if cache.cache_latents_to_disk:
            self._store = fill_disk(
                self._items,
                encode,
                cache.vae_batch_size,
                vae_fingerprint=fingerprint,
                process_index=process_index,
                num_processes=num_processes,
            )
        else:
            self._store = fill_memory(self._items, encode, cache.vae_batch_size)

    # ------------------------------------------------------------------------------------------ batches

    def loader(self, *, start: Position, workers: int, **run: Any) -> Iterator[tuple[Position, Batch]]:
        """The run's batches from `start` on, made by up to `workers` processes; `run` are the fields of RunFacts.

        Latents in memory need none: taking them costs less than handing them over.
        """
        workers = 0 if self.latents_in_memory else min(workers, usable_cores())
        return load_batches(self._samples, self._store, RunFacts(**run), start=start, workers=workers)


# ---------------------------------------------------------------------------------------------- assembly


def _without_place(config: DatasetConfig) -> DatasetConfig:
    """The same, wherever its folders are and wherever it was written."""
    subsets = tuple(replace(subset, folder=replace(subset.folder, image_dir=None)) for subset in config.subsets)
    return replace(config, subsets=subsets, from_file=False)


def _scan(subset: SubsetConfig) -> FolderContents:
    contents = scan_folder(
        subset.image_dir,
        caption_extension=subset.caption.caption_extension,
        class_tokens=subset.folder.class_tokens,
    )
    if not (contents.images or contents.broken or contents.unreadable_captions):
        logger.warning("%s: no images, passed over", subset.image_dir)
    return contents


def _placed_images(
    configs: Sequence[DatasetConfig], found: Sequence[FolderContents]
) -> tuple[list[TrainImage], list[CacheItem]]:
    """Every image with its bucket, and the cache items they share: one per image and placement."""
    drafts = []
    subset_index = 0
    for config in configs:
        for subset in config.subsets:
            records = found[subset_index].images
            placements = place_images((record.size_wh for record in records), config.bucket)
            for record, placement in zip(records, placements, strict=True):
                drafts.append((record, subset_index, placement, subset.augment.flip_aug))
            subset_index += 1
    keys = [(record.path, placement) for record, _, placement, _ in drafts]
    npz_of = dict(zip(keys, cache_file_names(keys), strict=True))
    flipped = {key for key, (*_, flip) in zip(keys, drafts, strict=True) if flip}
    index_of = {key: index for index, key in enumerate(npz_of)}
    items: dict[int, CacheItem] = {}
    images = []
    for key, (record, subset_index, placement, _) in zip(keys, drafts, strict=True):
        images.append(TrainImage(record, subset_index, placement, index_of[key]))
        items[index_of[key]] = CacheItem(
            record.path, record.size_wh, record.orientation, placement, key in flipped, npz_of[key]
        )
    return images, [items[index] for index in range(len(index_of))]
