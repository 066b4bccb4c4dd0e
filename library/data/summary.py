"""What trained files say of their data: the ss_* metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from library.data.buckets import Size
from library.data.captions import tag_frequency
from library.data.config import DatasetConfig, SubsetConfig, base_name
from library.data.record_table import RecordTable
from library.data.train_images import TrainImages, joined


@dataclass(frozen=True)
class LoadedDataset:
    """One dataset with the images found for it."""

    config: DatasetConfig
    images_of: tuple[TrainImages, ...]  # by subset of the config
    bucket_counts: tuple[tuple[Size, int], ...]  # samples per epoch by bucket, ascending; buckets in use only
    num_train: int  # images x repeats
    num_reg: int
    num_reg_per_epoch: int

    @property
    def images(self) -> TrainImages:
        return joined(self.images_of)

    @property
    def subsets(self) -> list[tuple[SubsetConfig, TrainImages]]:
        return list(zip(self.config.subsets, self.images_of, strict=True))


# ---------------------------------------------------------------------------------------------- metadata


def metadata(datasets: Sequence[LoadedDataset], *, samples_per_step: int) -> dict[str, Any]:
    """The ss_* keys about the data; values become text by str(), those that are JSON are text already.

    `samples_per_step` is processes x accumulation. The keys differ, as in the trade, between runs with a dataset
    file and runs without.
    """
    counts = {
        "ss_num_train_images": sum(dataset.num_train for dataset in datasets),
        "ss_num_reg_images": sum(dataset.num_reg for dataset in datasets),
    }
    if datasets[0].config.from_file:
        return counts | _of_dataset_file(datasets)
    return counts | _of_folders(datasets[0], samples_per_step)


def _of_dataset_file(datasets: Sequence[LoadedDataset]) -> dict[str, Any]:
    frequencies: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        frequencies = _tag_frequency(dataset) | frequencies  # the first dataset wins
    folders: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        _add_folders(folders, dataset, is_reg=False)
    return {
        "ss_datasets": json.dumps([_description(dataset) for dataset in datasets]),
        "ss_tag_frequency": json.dumps(frequencies),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _of_folders(dataset: LoadedDataset, samples_per_step: int) -> dict[str, Any]:
    bucket, subset = dataset.config.bucket, dataset.config.subsets[0]
    low, high = _bucket_limits(dataset.config)
    return {
        "ss_batch_size_per_device": dataset.config.batch_size,
        "ss_total_batch_size": dataset.config.batch_size * samples_per_step,
        "ss_resolution": bucket.resolution,
        "ss_color_aug": subset.augment.color_aug,
        "ss_flip_aug": subset.augment.flip_aug,
        "ss_random_crop": subset.augment.random_crop,
        "ss_shuffle_caption": subset.caption.shuffle_caption,
        "ss_keep_tokens": subset.caption.keep_tokens,
        "ss_enable_bucket": bucket.enable_bucket,
        "ss_bucket_no_upscale": bucket.enable_bucket and bucket.bucket_no_upscale,
        "ss_min_bucket_reso": low,
        "ss_max_bucket_reso": high,
        "ss_dataset_dirs": json.dumps(_add_folders({}, dataset, is_reg=False)),
        "ss_reg_dataset_dirs": json.dumps(_add_folders({}, dataset, is_reg=True)),
        "ss_tag_frequency": json.dumps(_tag_frequency(dataset)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _description(dataset: LoadedDataset) -> dict[str, Any]:
    """One entry of ss_datasets."""
    bucket = dataset.config.bucket
    low, high = _bucket_limits(dataset.config)
    return {
        "is_dreambooth": not dataset.config.is_metadata,
        "batch_size_per_device": dataset.config.batch_size,
        "num_train_images": dataset.num_train,
        "num_reg_images": dataset.num_reg,
        "resolution": bucket.resolution,
        "enable_bucket": bucket.enable_bucket,
        "min_bucket_reso": low,
        "max_bucket_reso": high,
        "tag_frequency": _tag_frequency(dataset),
        "bucket_info": _bucket_info(dataset),
        "subsets": [_subset_description(subset, images) for subset, images in dataset.subsets],
    }


def _bucket_limits(config: DatasetConfig) -> tuple[int | None, int | None]:
    """Shortest and longest side of buckets, as far as these options have an effect."""
    bucket = config.bucket
    is_free = config.train_sizes is not None or not bucket.enable_bucket
    return (None, None) if is_free else (bucket.min_bucket_reso, bucket.max_bucket_reso)


def _subset_description(subset: SubsetConfig, images: TrainImages) -> dict[str, Any]:
    """One entry of `subsets` in ss_datasets."""
    folder = subset.folder
    place = {"image_dir": base_name(folder.image_dir)} if folder.image_dir else {}
    kind = {"class_tokens": folder.class_tokens, "is_reg": folder.is_reg}
    return {
        "img_count": len(images),
        "num_repeats": folder.num_repeats,
        "color_aug": subset.augment.color_aug,
        "flip_aug": subset.augment.flip_aug,
        "random_crop": subset.augment.random_crop,
        "shuffle_caption": subset.caption.shuffle_caption,
        "keep_tokens": subset.caption.keep_tokens,
        **place,
        **({"metadata_file": subset.name} if subset.is_metadata else kind),
    }


def _bucket_info(dataset: LoadedDataset) -> dict[str, Any] | None:
    if not dataset.config.bucket.enable_bucket:
        return None
    images = dataset.images
    of_buckets_M = images.by_placement(lambda placement: placement.bucket_wh[0] / placement.bucket_wh[1])
    errors = np.abs(of_buckets_M - images.size_M2[:, 0] / images.size_M2[:, 1]).tolist()
    buckets = {
        str(index): {"resolution": size, "count": count} for index, (size, count) in enumerate(dataset.bucket_counts)
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _tag_frequency(dataset: LoadedDataset) -> dict[str, dict[str, int]]:
    """By the name of the folder or metadata file; those of one name are counted together."""
    counts: dict[str, Counter[str]] = {}
    for subset, images in dataset.subsets:
        separator = subset.caption.caption_separator
        texts = (text.replace("\n", separator) for text in _counted_texts(images))
        counts.setdefault(subset.name, Counter()).update(tag_frequency(texts, separator))
    return {name: dict(counter) for name, counter in counts.items()}


def _counted_texts(images: TrainImages) -> Iterable[str]:
    """What is split into tags: of a metadata file its tags, not its sentences."""
    if images.are_all_of_one_folder:
        table = images.records[int(images.subset_M[0])]
        assert isinstance(table, RecordTable)
        return table.captions
    records = (image.record for image in images)
    return (record.caption if record.metadata is None else record.metadata.tags for record in records)


def _add_folders(
    folders: dict[str, dict[str, int]], dataset: LoadedDataset, *, is_reg: bool
) -> dict[str, dict[str, int]]:
    """Add name -> repeats and image count; a second folder of the same name becomes "name (2)"."""
    for subset, images in dataset.subsets:
        if subset.folder.is_reg != is_reg:
            continue
        name, number = subset.name, 2
        while name in folders:
            name, number = f"{subset.name} ({number})", number + 1
        folders[name] = {"n_repeats": subset.folder.num_repeats, "img_count": len(images)}
    return folders
