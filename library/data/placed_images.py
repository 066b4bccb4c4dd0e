"""Every image that was found with its size for training, and the cache files that images share.

Shape letters: N images of all subsets, I items of the latent cache.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.buckets import Placement, covering, place_images
from library.data.cache_files import CacheItem
from library.data.cache_names import cache_file_names
from library.data.columns import Column
from library.data.config import DatasetConfig
from library.data.face_crop import face_in_name
from library.data.folder_contents import FolderContents
from library.data.record_table import RecordTable
from library.data.records import ImageRecord
from library.data.train_images import TrainImages

_Key = tuple[str, int, int | None]  # path, index of its placement, dataset that brings its latents


def placed_images(
    configs: Sequence[DatasetConfig], found: Sequence[FolderContents], with_latents: Collection[int] = ()
) -> tuple[TrainImages, CacheItems]:
    """Every image with its bucket, and the cache items they share: one per image and placement.

    `found` has what each subset's folder holds, dataset by dataset; `with_latents` are the numbers of the datasets that
    bring latents along.
    """
    subsets = [(number, subset) for number, config in enumerate(configs) for subset in config.subsets]
    records = tuple(contents.images for contents in found)
    counts = [len(images) for images in records]
    index_of: dict[Placement, int] = {}
    placement_N = np.concatenate([
        np.empty(0, np.int32),
        *(_placed(configs[number], subset.augment.resize_interpolation, images, index_of)
          for (number, subset), images in zip(subsets, records, strict=True)),
    ])  # fmt: skip
    crops = [configs[number].crops_faces(subset) for number, subset in subsets]
    faces = {
        row: face
        for row, record in _rows_of(records, crops)
        if (face := face_in_name(record.path)) is not None
    }  # fmt: skip
    given_N = np.repeat([number if number in with_latents else -1 for number, _ in subsets], counts).astype(np.int32)
    item_N = _shared_items(records, placement_N, given_N)
    images = TrainImages(records, tuple(index_of), placement_N, item_N, faces)
    num_items = int(item_N.max(initial=-1)) + 1
    row_I = np.zeros(num_items, np.int32)
    row_I[item_N] = np.arange(len(item_N))  # the last of those that share one
    by_subset = {"flipped": [subset.augment.flip_aug for _, subset in subsets],
                 "alpha": [subset.masks.alpha_mask for _, subset in subsets]}  # fmt: skip
    asked = {name: np.bincount(item_N, np.repeat(values, counts), num_items) > 0 for name, values in by_subset.items()}
    items = CacheItems(images, row_I, given_N[row_I], asked["flipped"], asked["alpha"], {})
    return images, CacheItems(images, row_I, given_N[row_I], asked["flipped"], asked["alpha"], _odd_names(items))


@dataclass(frozen=True, eq=False)
class CacheItems(Column[CacheItem]):
    """The items of the latent cache; those whose file is not called as their image are in `names`."""

    images: TrainImages  # all
    row_I: np.ndarray  # of an image that has the item
    given_I: np.ndarray  # the dataset that brings its latents; -1: none
    flipped_I: np.ndarray
    alpha_I: np.ndarray
    names: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.row_I)

    def at(self, row: int) -> CacheItem:
        image = self.images.at(int(self.row_I[row]))
        record, facts = image.record, image.record.metadata
        given_with = int(self.given_I[row]) if self.given_I[row] >= 0 else None
        return CacheItem(
            record.path,
            record.size_wh,
            record.orientation,
            image.placement,
            bool(self.flipped_I[row]),
            self.names.get(row) or usual_name(record.path),
            flipped_npz=facts.flipped_npz if facts and given_with is not None else None,
            has_image=facts is None or facts.has_image,
            alpha_too=bool(self.alpha_I[row]),
            given_with=given_with,
        )


def usual_name(path: str) -> str:
    """The cache file of an image that shares its name with no other."""
    return f"{os.path.splitext(path)[0]}.npz"


def _placed(
    config: DatasetConfig, interpolation: str | None, images: Sequence[ImageRecord], index_of: dict[Placement, int]
) -> np.ndarray:
    """The index of each image's placement in `index_of`, which grows."""

    def index(placement: Placement) -> int:
        return index_of.setdefault(placement._replace(interpolation=interpolation), len(index_of))

    if config.train_sizes is None and isinstance(images, RecordTable):
        sizes, which = np.unique(images.sizes_N2, axis=0, return_inverse=True)
        placements = place_images(map(tuple, sizes.tolist()), config.bucket)
        return np.array([index(placement) for placement in placements], np.int32)[which.reshape(-1)]
    return np.array([index(placement) for placement in _placements(config, images)], np.int32)


def _placements(config: DatasetConfig, records: Sequence[ImageRecord]) -> list[Placement]:
    if config.train_sizes is None:
        return place_images((record.size_wh for record in records), config.bucket)
    sizes = [record.metadata.train_wh if record.metadata else None for record in records]
    return [covering(record.size_wh, size) for record, size in zip(records, sizes, strict=True) if size]


def _rows_of(records: Sequence[Sequence[ImageRecord]], chosen: Sequence[bool]) -> Iterator[tuple[int, ImageRecord]]:
    """(row, record) of the images of the chosen subsets."""
    start = 0
    for images, is_chosen in zip(records, chosen, strict=True):
        if is_chosen:
            yield from enumerate(images, start)
        start += len(images)


def _shared_items(records: Sequence[Sequence[ImageRecord]], placement_N: np.ndarray, given_N: np.ndarray) -> np.ndarray:
    """The item of each row: one for each file, placement, and dataset that brings latents."""
    if _are_apart(records):
        return np.arange(len(placement_N), dtype=np.int32)
    index_of: dict[_Key, int] = {}
    paths = (record.path for images in records for record in images)
    keys = zip(paths, placement_N.tolist(), given_N.tolist(), strict=True)
    return np.array([index_of.setdefault(key, len(index_of)) for key in keys], np.int32)


def _are_apart(records: Sequence[Sequence[ImageRecord]]) -> bool:
    """Whether no file can be in them twice: each is a folder of its own."""
    bases = [images.base for images in records if isinstance(images, RecordTable)]
    return len(set(bases)) == len(records)


def _odd_names(items: CacheItems) -> dict[int, str]:
    """The files of items that are not called as their image: metadata lead elsewhere, or two would share one."""
    records = items.images.records
    if _are_apart(records) and not any(_share_stems(images) for images in records if isinstance(images, RecordTable)):
        return {}
    images = [items.images.at(row) for row in items.row_I.tolist()]
    given = {
        index: image.record.metadata.npz
        for index, image in enumerate(images)
        if items.given_I[index] >= 0 and image.record.metadata
    }
    others = [index for index in range(len(images)) if index not in given]
    taken = [name for name in given.values() if name]
    names = cache_file_names([(images[index].record.path, images[index].placement) for index in others], taken)
    named = dict(zip(others, names, strict=True)) | {index: name for index, name in given.items() if name}
    return {index: name for index, name in named.items() if name != usual_name(images[index].record.path)}


def _share_stems(images: RecordTable) -> bool:
    """Whether two names differ in their extensions alone; with a hash too many, one is said to."""
    stems = (hash(name[: name.rfind(".")]) for name in images.names)
    hashes = np.sort(np.fromiter(stems, np.int64, len(images)))
    return bool((hashes[1:] == hashes[:-1]).any())
