"""Command line and dataset file -> one DatasetConfig per dataset, everything inherited and checked.

For every option the first value wins in this order: subset, its dataset, general, command line, built-in default.
Errors name the key with its place, as in `datasets[0].subsets[1].num_repeats`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from library.data import dataset_file
from library.data.class_folders import class_folders, why_empty
from library.data.dataset_file import Level
from library.data.listing import has_images
from library.data.metadata_file import Size, common_train_sizes, metadata_entries
from library.data.options import (
    BUCKET_SIDES,
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    DatasetOptions,
    FolderOptions,
    LoaderOptions,
    MaskOptions,
    SourceOptions,
    ValidationSplitOptions,
)
from library.data.same_files import path_key
from library.options import OptionError, convert, options_of, require
from library.packages import is_installed

logger = logging.getLogger(__name__)
Group = TypeVar("Group")
METADATA = "metadata_file"
OF_ANY_DATASET = {"resolution", "max_data_loader_n_workers"}  # options that somebody's class of dataset has a use for
NO_SPLIT = ValidationSplitOptions()
NO_MASKS = MaskOptions()


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images, or the images of one metadata file, and what happens to them and their captions."""

    folder: FolderOptions
    caption: CaptionOptions
    augment: AugmentOptions
    masks: MaskOptions = MaskOptions()
    network_multiplier: float = 1.0  # of its dataset

    @property
    def is_metadata(self) -> bool:
        return self.folder.metadata_file is not None

    @property
    def source(self) -> Path:
        """What names the images: their metadata file, or their folder."""
        source = self.folder.metadata_file or self.folder.image_dir
        assert source is not None
        return source

    @property
    def name(self) -> str:
        """What metadata call it: the base name of its folder or metadata file."""
        return base_name(self.source)

    @property
    def image_dir(self) -> Path:
        """The folder of the images; of a metadata file without one, the file's own."""
        return self.folder.image_dir or self.source.parent


def base_name(path: Path) -> str:
    """The last part of a path; of "." the name of that folder."""
    return os.path.basename(os.path.abspath(path))


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a resolution, buckets and a batch size."""

    bucket: BucketOptions
    batch_size: int
    subsets: tuple[SubsetConfig, ...]
    from_file: bool = False  # by --dataset_config; decides the form of the metadata
    train_sizes: tuple[Size, ...] | None = None  # of metadata files: each image has its own, in place of `bucket`
    split: ValidationSplitOptions = NO_SPLIT

    @property
    def is_metadata(self) -> bool:
        return any(subset.is_metadata for subset in self.subsets)

    def crops_faces(self, subset: SubsetConfig) -> bool:
        """Whether images of a subset are cut around the faces their names tell of; buckets leave no room for it."""
        return subset.augment.face_crop_aug_range is not None and not self.bucket.enable_bucket


def load_configs(
    source: SourceOptions,
    bucket: BucketOptions,
    caption: CaptionOptions,
    augment: AugmentOptions,
    loader: LoaderOptions,
    split: ValidationSplitOptions = NO_SPLIT,
    masks: MaskOptions = NO_MASKS,
) -> tuple[DatasetConfig, ...]:
    """The run's datasets; raises OptionError on everything that can be known without reading an image.

    Empty where --dataset_class brings its own.
    """
    folder = FolderOptions(num_repeats=source.dataset_repeats)
    configs = _configs(source, (bucket, caption, augment, loader, folder, DatasetOptions(), split, masks))
    configs = tuple(config if config.from_file else replace(config, split=split) for config in configs)
    groups = [group for config in configs for group in (config.bucket, *(subset.caption for subset in config.subsets))]
    for sentence in dict.fromkeys(sentence for group in groups for sentence in group.without_effect()):
        logger.warning(sentence)
    if any(subset.folder.custom_attributes for config in configs for subset in config.subsets):
        logger.info("custom_attributes are kept with their subsets and change nothing")
    return configs


def _configs(source: SourceOptions, groups: Sequence[Any]) -> tuple[DatasetConfig, ...]:
    if source.dataset_class:
        _tell_ignored(source.given("dataset_config", "train_data_dir", "reg_data_dir", "in_json"), "--dataset_class")
        return ()
    if source.dataset_config is not None:
        _tell_ignored(source.given("train_data_dir", "reg_data_dir", "in_json"), "--dataset_config")
        return _from_file(source.dataset_config, groups)
    if source.in_json:
        _tell_ignored(source.given("reg_data_dir"), "--in_json")
        return (_from_metadata(source, groups),)
    return (_from_folders(source, groups),)


def check_dataset_class(source: SourceOptions, cache: CacheOptions, *others: Any) -> list[str]:
    """Raise OptionError for a --dataset_class that can't work; returns a sentence on `others` without effect on it."""
    name = source.dataset_class
    if not name:
        return []
    way_out = "write package.module.Class"
    require(all(part.isidentifier() for part in f"{name}.".split(".")[:-1]), "--dataset_class", f"{name!r}", way_out)
    require("." in name, "--dataset_class", f"{name} names no module", way_out)
    package = name.partition(".")[0]
    way_out = "put the class into a module of its own on PYTHONPATH"
    require(package != "__main__", "--dataset_class", f"{name} names this program itself", way_out)
    if not is_installed(package):
        raise OptionError("--dataset_class", f"there is no module {package} for {name}", "put it on PYTHONPATH")
    problem = f"contradicts --dataset_class {name}, whose images are not known beforehand"
    require(not cache.enabled, "--cache_latents", problem, "leave the caching to the class")
    changed = [
        f"--{option.name}"
        for group in others
        for option in options_of(type(group))
        if option.name not in OF_ANY_DATASET and getattr(group, option.name) != option.default
    ]
    return [f"{' and '.join(changed)}: no effect, --dataset_class makes its own batches"] if changed else []


def _tell_ignored(flags: Sequence[str], winner: str) -> None:
    if flags:
        logger.info("%s ignored: %s names the images", " and ".join(flags), winner)


def face_crop_notes(configs: Sequence[DatasetConfig], cache: CacheOptions) -> list[str]:
    """A sentence where --face_crop_aug_range has no effect."""
    asked = [(config, subset) for config in configs for subset in config.subsets if subset.augment.face_crop_aug_range]
    if asked and cache.enabled:
        return ["--face_crop_aug_range has no effect with cached latents: they stay the same in every epoch"]
    if any(not config.crops_faces(subset) for config, subset in asked):
        return ["--face_crop_aug_range has no effect with --enable_bucket"]
    return []


def check_cacheable(configs: Sequence[DatasetConfig], cache: CacheOptions) -> None:
    """Raise OptionError where latents are to be cached of images that change with every draw."""
    for name in ("color_aug", "random_crop") if cache.enabled else ():
        for config in configs:
            for subset in config.subsets:
                require(
                    not getattr(subset.augment, name),
                    "--cache_latents",
                    f"contradicts {name} of {subset.source}: cached latents stay the same in every epoch",
                    f"leave out {name} or the caching",
                )


# ---------------------------------------------------------------------------------------------- dataset file


def _from_file(path: Path, groups: Sequence[Any]) -> tuple[DatasetConfig, ...]:
    content = dataset_file.read(path)
    datasets = [_dataset(level, content.general, groups) for level in content.datasets]
    configs = tuple(config for config in datasets if config.subsets)
    require(
        bool(configs),
        "--dataset_config",
        f"{path} names no folder of images",
        "add [[datasets.subsets]] with image_dir, or with metadata_file",
    )
    subsets = [subset for config in configs for subset in config.subsets]
    if not any(subset.is_metadata or has_images(subset.image_dir) for subset in subsets):
        tree = "".join(f"\n  {subset.source}{os.sep}: {why_empty(subset.source)}" for subset in subsets)
        raise OptionError("--dataset_config", f"{path} leads to no training images; correct image_dir:{tree}")
    return configs


def _dataset(level: dataset_file.DatasetLevel, general: Level, groups: Sequence[Any]) -> DatasetConfig:
    levels = (level.own, general)
    bucket, places = _merged(BucketOptions, levels, groups)
    if bucket.resolution is None:
        places["resolution"] = f"{level.own.place}.resolution"
    loader, _ = _merged(LoaderOptions, levels, groups)
    own, _ = _merged(DatasetOptions, levels, groups)
    split, _ = _merged(ValidationSplitOptions, levels, groups)
    subsets: dict[str, SubsetConfig] = {}  # by what is equal for all names of their source
    train_sizes: list[tuple[Size, ...] | None] = []
    for subset_level in level.subsets:
        subset = replace(_subset((subset_level, *levels), groups), network_multiplier=own.network_multiplier)
        if subset.folder.num_repeats < 1:
            logger.info("%s: ignored, num_repeats is below 1", subset_level.place)
        elif path_key(subset.source) in subsets:
            logger.info("%s: ignored, %s is already part of this dataset", subset_level.place, subset.source)
        elif (sizes := _train_sizes(subset, f"{subset_level.place}.{METADATA}")) == ():
            logger.info("%s: ignored, %s has no entries", subset_level.place, subset.source)
        else:
            subsets[path_key(subset.source)] = subset
            train_sizes.append(sizes)
    config = DatasetConfig(
        bucket,
        loader.train_batch_size,
        tuple(subsets.values()),
        from_file=True,
        split=split,
    )
    return _checked(config, train_sizes, places)


def _checked(
    config: DatasetConfig, train_sizes: Sequence[tuple[Size, ...] | None], places: Mapping[str, str]
) -> DatasetConfig:
    """The dataset with its sizes settled: those of its metadata files if all images have one, else of its buckets.

    `train_sizes` are those of each subset.
    """

    def where(name: str) -> str:
        return places.get(name, f"--{name}")

    known = [sizes for sizes in train_sizes if sizes is not None]
    if not known or len(known) < len(train_sizes):
        if config.is_metadata and config.bucket.resolution is None:
            way_out = "let finetune/prepare_buckets_latents.py write it, or give a resolution"
            raise OptionError(where("resolution"), "is not given, and not every image has a train_resolution", way_out)
        if config.subsets:
            config.bucket.check(where)
        return config
    require(
        not config.bucket.bucket_no_upscale,
        where("bucket_no_upscale"),
        "contradicts the metadata, where every image has its train_resolution",
        "leave one of them out",
    )
    idle = [where(name) for name in ("resolution", *BUCKET_SIDES) if _is_given(config.bucket, name)]
    if idle or not config.bucket.enable_bucket:
        names = ", ".join(subset.source.name for subset in config.subsets)
        without = f"; no effect beside that: {', '.join(idle)}" if idle else ""
        logger.info("%s: trained in buckets, the train_resolution of its images%s", names, without)
    sizes = tuple(sorted({size for sizes in known for size in sizes}))
    return replace(config, bucket=replace(config.bucket, enable_bucket=True), train_sizes=sizes)


def _is_given(options: BucketOptions, name: str) -> bool:
    return getattr(options, name) != getattr(BucketOptions, name)


def _subset(levels: Sequence[Level], groups: Sequence[Any]) -> SubsetConfig:
    folder, _ = _merged(FolderOptions, levels, groups)
    place = f"{levels[0].place}.image_dir"
    if folder.image_dir is not None:
        require(os.path.isdir(folder.image_dir), place, f"{str(folder.image_dir)!r} is not a folder")
    elif folder.metadata_file is None:
        raise OptionError(place, "is missing", "name the folder of images")
    caption, _ = _merged(CaptionOptions, levels, groups)
    augment, _ = _merged(AugmentOptions, levels, groups)
    masks, places = _merged(MaskOptions, levels, groups)
    if folder.is_reg and "conditioning_data_dir" not in places:
        masks = _of_regularisation(masks)
    return SubsetConfig(folder, caption, augment, masks)


def _of_regularisation(masks: MaskOptions) -> MaskOptions:
    """The folder of masks on the command line is for training images."""
    return replace(masks, conditioning_data_dir=None)


def _merged(group: type[Group], levels: Sequence[Level], groups: Sequence[Any]) -> tuple[Group, dict[str, str]]:
    """The group from the nearest level that has each key, else from the command line; and the keys' places."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    fallback = next(given for given in groups if isinstance(given, group))
    for option in options_of(group):
        key = dataset_file.KEYS.get(option.name, option.name)
        values[option.name] = getattr(fallback, option.name)
        for level in reversed(levels):  # the nearest one last; those it overrules must be right as well
            if level.values.get(key) is not None:
                places[option.name] = f"{level.place}.{key}"
                values[option.name] = convert(option, level.values[key], places[option.name])
    try:
        return group(**values), places
    except OptionError as error:
        name = error.where.removeprefix("--")
        if name not in places:
            raise
        raise OptionError(places[name], str(error).removeprefix(f"{error.where}: ")) from None


# ---------------------------------------------------------------------------------------------- command line


def _from_folders(source: SourceOptions, groups: Sequence[Any]) -> DatasetConfig:
    bucket, caption, augment, loader, *_, masks = groups
    if not source.train_data_dir:
        raise OptionError(
            "--train_data_dir",
            "no training images given",
            "name a folder here, or a dataset file with --dataset_config",
        )
    bucket.check()
    folders = [*class_folders(source.train_data_dir, "--train_data_dir", source.dataset_repeats)]
    if source.dataset_repeats > 1 and any(folder.class_tokens is not None for folder in folders):
        logger.warning("--dataset_repeats has no effect: the names of the class folders say the repeats")
    if source.reg_data_dir:
        folders += [replace(folder, is_reg=True) for folder in class_folders(source.reg_data_dir, "--reg_data_dir")]
    subsets = tuple(
        SubsetConfig(folder, caption, augment, _of_regularisation(masks) if folder.is_reg else masks)
        for folder in folders
    )
    return DatasetConfig(bucket, loader.train_batch_size, subsets)


def _from_metadata(source: SourceOptions, groups: Sequence[Any]) -> DatasetConfig:
    bucket, caption, augment, loader, folder, *_, masks = groups
    assert source.in_json is not None
    image_dir = Path(source.train_data_dir) if source.train_data_dir else None
    if image_dir is not None:
        require(os.path.isdir(image_dir), "--train_data_dir", f"{str(image_dir)!r} is not a folder")
    folder = replace(folder, image_dir=image_dir, metadata_file=Path(source.in_json))
    subset = SubsetConfig(folder, caption, augment, masks)
    sizes = _train_sizes(subset, "--in_json")
    require(sizes != (), "--in_json", f"{source.in_json} has no entries", "name the file with captions and tags")
    return _checked(DatasetConfig(bucket, loader.train_batch_size, (subset,)), [sizes], {})


def _train_sizes(subset: SubsetConfig, where: str) -> tuple[Size, ...] | None:
    """Those that a metadata file gives its images, none if it has no entries; None where images have no size of
    their own."""
    return common_train_sizes(metadata_entries(subset.source, where)) if subset.is_metadata else None
