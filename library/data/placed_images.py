"""Every image that was found with its size for training, and the cache files that images share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from library.data.buckets import Placement, covering, place_images
from library.data.cache_files import CacheItem
from library.data.cache_names import cache_file_names
from library.data.config import DatasetConfig
from library.data.face_crop import Face, face_in_name
from library.data.loading import TrainImage
from library.data.sources import FolderContents, ImageRecord


class _Draft(NamedTuple):
    record: ImageRecord
    subset: int
    placement: Placement
    flips: bool
    alpha: bool  # its mask comes from its alpha channel
    face: Face | None
    given_with: int | None  # the dataset, where it brings latents for all its images

    @property
    def key(self) -> tuple[str, Placement, int | None]:
        return self.record.path, self.placement, self.given_with


def placed_images(
    configs: Sequence[DatasetConfig], found: Sequence[FolderContents], with_latents: Collection[int] = ()
) -> tuple[list[TrainImage], list[CacheItem]]:
    """Every image with its bucket, and the cache items they share: one per image and placement.

    `found` has what each subset's folder holds, dataset by dataset; `with_latents` are the numbers of the datasets that
    bring latents along.
    """
    drafts = list(_drafts(configs, found, with_latents))
    npz_of = _npz_names(drafts)
    flipped = {draft.key for draft in drafts if draft.flips}
    with_alpha = {draft.key for draft in drafts if draft.alpha}
    index_of = {key: index for index, key in enumerate(npz_of)}
    items: dict[int, CacheItem] = {}
    for draft in drafts:
        record, facts = draft.record, draft.record.metadata
        items[index_of[draft.key]] = CacheItem(
            record.path,
            record.size_wh,
            record.orientation,
            draft.placement,
            draft.key in flipped,
            npz_of[draft.key],
            flipped_npz=facts.flipped_npz if facts and draft.given_with is not None else None,
            has_image=facts is None or facts.has_image,
            alpha_too=draft.key in with_alpha,
            given_with=draft.given_with,
        )
    images = [
        TrainImage(draft.record, draft.subset, draft.placement, index_of[draft.key], draft.face) for draft in drafts
    ]
    return images, [items[index] for index in range(len(index_of))]


def _drafts(
    configs: Sequence[DatasetConfig], found: Sequence[FolderContents], with_latents: Collection[int]
) -> Iterator[_Draft]:
    contents = enumerate(found)
    for number, config in enumerate(configs):
        for subset in config.subsets:
            index, folder = next(contents)
            given_with = number if number in with_latents else None
            placements = _placements(config, folder.images)
            crops_faces = config.crops_faces(subset)
            for record, placement in zip(folder.images, placements, strict=True):
                yield _Draft(
                    record,
                    index,
                    placement._replace(interpolation=subset.augment.resize_interpolation),
                    subset.augment.flip_aug,
                    subset.masks.alpha_mask,
                    face_in_name(record.path) if crops_faces else None,
                    given_with,
                )


def _placements(config: DatasetConfig, records: Sequence[ImageRecord]) -> list[Placement]:
    if config.train_sizes is None:
        return place_images((record.size_wh for record in records), config.bucket)
    sizes = [record.metadata.train_wh if record.metadata else None for record in records]
    return [covering(record.size_wh, size) for record, size in zip(records, sizes, strict=True) if size]


def _npz_names(drafts: Sequence[_Draft]) -> dict[tuple[str, Placement, int | None], str]:
    """The file of each cache item: the one its metadata leads to, or one beside the image that no other item has."""
    given = {draft.key: draft.record.metadata.npz for draft in drafts if _is_given(draft) and draft.record.metadata}
    others = list(dict.fromkeys(draft.key for draft in drafts if draft.key not in given))
    taken = [name for name in given.values() if name]
    names = cache_file_names([(path, placement) for path, placement, _ in others], taken)
    named = dict(zip(others, names, strict=True)) | {key: name for key, name in given.items() if name}
    return {draft.key: named[draft.key] for draft in drafts}


def _is_given(draft: _Draft) -> bool:
    return draft.given_with is not None
