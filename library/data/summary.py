"""What is said of the training data: report lines before the start, and the ss_* metadata of trained files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from library.data.buckets import Size, aspect_error
from library.data.captions import tag_frequency
from library.data.config import DatasetConfig, SubsetConfig
from library.data.loading import TrainImage

CAPTIONS_SHOWN = 3
CAPTION_LETTERS = 90


@dataclass(frozen=True)
class LoadedDataset:
    """One dataset with the images found for it."""

    config: DatasetConfig
    images_of: tuple[tuple[TrainImage, ...], ...]  # by subset of the config
    bucket_counts: tuple[tuple[Size, int], ...]  # samples per epoch by bucket, ascending; buckets in use only
    num_train: int  # images x repeats
    num_reg: int
    num_reg_per_epoch: int

    @property
    def images(self) -> list[TrainImage]:
        return [image for images in self.images_of for image in images]

    @property
    def subsets(self) -> list[tuple[SubsetConfig, tuple[TrainImage, ...]]]:
        return list(zip(self.config.subsets, self.images_of, strict=True))


# ---------------------------------------------------------------------------------------------- report


def report_lines(datasets: Sequence[LoadedDataset]) -> list[str]:
    """The data as a user wants to check it: folders, buckets with what is cut away, some captions."""
    lines = []
    for index, dataset in enumerate(datasets):
        width, height = dataset.config.bucket.resolution or (0, 0)
        kind = "buckets around" if dataset.config.bucket.enable_bucket else "all cut to"
        lines.append(f"dataset {index + 1}: batch size {dataset.config.batch_size}, {kind} {width}x{height}")
        for subset, images in dataset.subsets:
            reg = ", regularisation" if subset.folder.is_reg else ""
            lines.append(f"  {subset.image_dir}: {len(images)} images x {subset.folder.num_repeats}{reg}")
        if dataset.num_reg_per_epoch:
            lines.append(_regularisation_line(dataset))
        cropped: dict[Size, list[float]] = {}
        for image in dataset.images:
            cropped.setdefault(image.placement.bucket_wh, []).append(image.placement.cropped_share)
        for bucket, count in dataset.bucket_counts:
            lost = f"{mean(cropped[bucket]):.0%} of the picture cut away on average"
            lines.append(f"  {bucket[0]}x{bucket[1]}: {count} per epoch, {lost}")
    lines += [f"caption: {caption}" for caption in _some_captions(datasets)]
    return lines


def _regularisation_line(dataset: LoadedDataset) -> str:
    shown, total = dataset.num_reg_per_epoch, dataset.num_reg
    how = ", others each epoch until all were shown" if shown < total else ", shown again" if shown > total else ""
    return f"  regularisation: {shown} per epoch from {total}{how}, to balance {dataset.num_train} training images"


def _some_captions(datasets: Sequence[LoadedDataset]) -> list[str]:
    captions = dict.fromkeys(image.record.caption for dataset in datasets for image in dataset.images)
    shown = list(captions)[:CAPTIONS_SHOWN]
    return [
        repr(caption if len(caption) <= CAPTION_LETTERS else f"{caption[:CAPTION_LETTERS]}...") for caption in shown
    ]


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
        "ss_bucket_no_upscale": bucket.bucket_no_upscale,
        "ss_min_bucket_reso": bucket.min_bucket_reso,
        "ss_max_bucket_reso": bucket.max_bucket_reso,
        "ss_dataset_dirs": json.dumps(_add_folders({}, dataset, is_reg=False)),
        "ss_reg_dataset_dirs": json.dumps(_add_folders({}, dataset, is_reg=True)),
        "ss_tag_frequency": json.dumps(_tag_frequency(dataset)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _description(dataset: LoadedDataset) -> dict[str, Any]:
    """One entry of ss_datasets."""
    bucket = dataset.config.bucket
    return {
        "is_dreambooth": True,
        "batch_size_per_device": dataset.config.batch_size,
        "num_train_images": dataset.num_train,
        "num_reg_images": dataset.num_reg,
        "resolution": bucket.resolution,
        "enable_bucket": bucket.enable_bucket,
        "min_bucket_reso": bucket.min_bucket_reso,
        "max_bucket_reso": bucket.max_bucket_reso,
        "tag_frequency": _tag_frequency(dataset),
        "bucket_info": _bucket_info(dataset),
        "subsets": [
            {
                "img_count": len(images),
                "num_repeats": subset.folder.num_repeats,
                "color_aug": subset.augment.color_aug,
                "flip_aug": subset.augment.flip_aug,
                "random_crop": subset.augment.random_crop,
                "shuffle_caption": subset.caption.shuffle_caption,
                "keep_tokens": subset.caption.keep_tokens,
                "image_dir": subset.image_dir.name,
                "class_tokens": subset.folder.class_tokens,
                "is_reg": subset.folder.is_reg,
            }
            for subset, images in dataset.subsets
        ],
    }


def _bucket_info(dataset: LoadedDataset) -> dict[str, Any] | None:
    if not dataset.config.bucket.enable_bucket:
        return None
    errors = [abs(aspect_error(image.record.size_wh, image.placement)) for image in dataset.images]
    buckets = {
        str(index): {"resolution": size, "count": count} for index, (size, count) in enumerate(dataset.bucket_counts)
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _tag_frequency(dataset: LoadedDataset) -> dict[str, dict[str, int]]:
    """By the name of the folder; folders of one name are counted together."""
    captions: dict[str, list[str]] = {}
    for subset, images in dataset.subsets:
        captions.setdefault(subset.image_dir.name, []).extend(image.record.caption for image in images)
    return {name: tag_frequency(texts) for name, texts in captions.items()}


def _add_folders(
    folders: dict[str, dict[str, int]], dataset: LoadedDataset, *, is_reg: bool
) -> dict[str, dict[str, int]]:
    """Add name -> repeats and image count; a second folder of the same name becomes "name (2)"."""
    for subset, images in dataset.subsets:
        if subset.folder.is_reg != is_reg:
            continue
        name, number = subset.image_dir.name, 2
        while name in folders:
            name, number = f"{subset.image_dir.name} ({number})", number + 1
        folders[name] = {"n_repeats": subset.folder.num_repeats, "img_count": len(images)}
    return folders
