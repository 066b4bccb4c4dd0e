"""Command line and dataset file -> one DatasetConfig per dataset, everything inherited and checked.

For every option the first value wins in this order: subset, its dataset, general, command line, built-in default.
Errors name the key with its place, as in `datasets[0].subsets[1].num_repeats`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from library.data import dataset_file
from library.data.dataset_file import Level
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    FolderOptions,
    LoaderOptions,
    SourceOptions,
)
from library.data.sources import count_images
from library.options import OptionError, convert, options_of, require

logger = logging.getLogger(__name__)
Group = TypeVar("Group")


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images and what happens to its images and captions."""

    folder: FolderOptions
    caption: CaptionOptions
    augment: AugmentOptions

    @property
    def image_dir(self) -> Path:
        assert self.folder.image_dir is not None
        return self.folder.image_dir


@dataclass(frozen=True)
class DatasetConfig:
    """Folders that share a resolution, buckets and a batch size."""

    bucket: BucketOptions
    batch_size: int
    subsets: tuple[SubsetConfig, ...]
    from_file: bool = False  # by --dataset_config; decides the form of the metadata


def load_configs(
    source: SourceOptions,
    bucket: BucketOptions,
    caption: CaptionOptions,
    augment: AugmentOptions,
    loader: LoaderOptions,
) -> tuple[DatasetConfig, ...]:
    """The run's datasets; raises OptionError on everything that can be known without reading an image."""
    configs = _configs(source, (bucket, caption, augment, loader, FolderOptions()))
    groups = [group for config in configs for group in (config.bucket, *(subset.caption for subset in config.subsets))]
    for sentence in dict.fromkeys(sentence for group in groups for sentence in group.without_effect()):
        logger.warning(sentence)
    return configs


def _configs(source: SourceOptions, groups: Sequence[Any]) -> tuple[DatasetConfig, ...]:
    if source.dataset_config is not None:
        ignored = [f"--{name}" for name in ("train_data_dir", "reg_data_dir") if getattr(source, name)]
        if ignored:
            logger.info("%s ignored: --dataset_config names the folders", " and ".join(ignored))
        return _from_file(source.dataset_config, groups)
    return (_from_folders(source, groups),)


def check_cacheable(configs: Sequence[DatasetConfig], cache: CacheOptions) -> None:
    """Raise OptionError where latents are to be cached of images that change with every draw."""
    for name in ("color_aug", "random_crop") if cache.enabled else ():
        for config in configs:
            for subset in config.subsets:
                require(
                    not getattr(subset.augment, name),
                    "--cache_latents",
                    f"contradicts {name} of {subset.image_dir}: cached latents stay the same in every epoch",
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
        "add [[datasets.subsets]] with image_dir",
    )
    if not any(count_images(subset.image_dir) for config in configs for subset in config.subsets):
        folders = [subset.image_dir for config in configs for subset in config.subsets]
        tree = "".join(f"\n  {folder}{os.sep}: {_why_empty(folder)}" for folder in folders)
        raise OptionError("--dataset_config", f"{path} leads to no training images; correct image_dir:{tree}")
    return configs


def _dataset(level: dataset_file.DatasetLevel, general: Level, groups: Sequence[Any]) -> DatasetConfig:
    levels = (level.own, general)
    bucket, places = _merged(BucketOptions, levels, groups)
    places.setdefault("resolution", f"{level.own.place}.resolution")
    bucket.check(lambda name: places.get(name, f"--{name}"))
    loader, _ = _merged(LoaderOptions, levels, groups)
    subsets: dict[Path, SubsetConfig] = {}
    for subset_level in level.subsets:
        subset = _subset((subset_level, *levels), groups)
        if subset.folder.num_repeats < 1:
            logger.info("%s: ignored, num_repeats is below 1", subset_level.place)
        elif subset.image_dir in subsets:
            logger.info("%s: ignored, %s is already part of this dataset", subset_level.place, subset.image_dir)
        else:
            subsets[subset.image_dir] = subset
    return DatasetConfig(bucket, loader.train_batch_size, tuple(subsets.values()), from_file=True)


def _subset(levels: Sequence[Level], groups: Sequence[Any]) -> SubsetConfig:
    folder, places = _merged(FolderOptions, levels, groups)
    place = f"{levels[0].place}.image_dir"
    if folder.image_dir is None:
        raise OptionError(place, "is missing", "name the folder of images")
    require(folder.image_dir.is_dir(), place, f"{str(folder.image_dir)!r} is not a folder")
    caption, _ = _merged(CaptionOptions, levels, groups)
    augment, _ = _merged(AugmentOptions, levels, groups)
    return SubsetConfig(folder, caption, augment)


def _merged(group: type[Group], levels: Sequence[Level], groups: Sequence[Any]) -> tuple[Group, dict[str, str]]:
    """The group from the nearest level that has each key, else from the command line; and the keys' places."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    fallback = next(given for given in groups if isinstance(given, group))
    for option in options_of(group):
        key = dataset_file.KEYS.get(option.name, option.name)
        values[option.name] = getattr(fallback, option.name)
        level = next((level for level in levels if level.values.get(key) is not None), None)
        if level is not None:
            places[option.name] = f"{level.place}.{key}"
            values[option.name] = convert(option, level.values[key], places[option.name])
    try:
        return group(**values), places
    except OptionError as error:
        name = error.where.removeprefix("--")
        if name not in places:
            raise
        raise OptionError(places[name], str(error).removeprefix(f"{error.where}: ")) from None


# ---------------------------------------------------------------------------------------------- class folders


class _ClassFolder(NamedTuple):
    """A sub-folder as its name reads: why it is passed over, or how it is used."""

    path: Path
    repeats: int | None  # None: not of the form <repeats>_<class>
    class_tokens: str

    @property
    def used(self) -> bool:
        return self.repeats is not None and self.repeats >= 1


def parse_folder_name(name: str) -> tuple[int | None, str]:
    """(repeats, class tokens) of "<repeats>_<class>"; repeats is None where no whole number comes first."""
    first, _, rest = name.partition("_")
    try:
        return int(first), rest
    except ValueError:
        return None, ""


def _from_folders(source: SourceOptions, groups: Sequence[Any]) -> DatasetConfig:
    bucket, caption, augment, loader, _ = groups
    if not source.train_data_dir:
        raise OptionError(
            "--train_data_dir",
            "no training images given",
            "name a folder here, or a dataset file with --dataset_config",
        )
    bucket.check()
    folders = [*_class_folders(source.train_data_dir, "--train_data_dir")]
    if source.reg_data_dir:
        folders += [replace(folder, is_reg=True) for folder in _class_folders(source.reg_data_dir, "--reg_data_dir")]
    subsets = tuple(SubsetConfig(folder, caption, augment) for folder in folders)
    return DatasetConfig(bucket, loader.train_batch_size, subsets)


def _class_folders(base: str, flag: str) -> Iterator[FolderOptions]:
    """The class folders in `base` that hold images, or `base` itself; raises OptionError with all it looked at."""
    path = Path(base)
    require(path.is_dir(), flag, f"{base!r} is not a folder", "name an existing folder of images or of class folders")
    children = [
        _ClassFolder(child, *parse_folder_name(child.name)) for child in sorted(path.iterdir()) if child.is_dir()
    ]
    counts = {child.path: count_images(child.path) for child in children}
    own_images = count_images(path)
    used = [child for child in children if child.used and counts[child.path]]
    if not used and not own_images:
        way_out = "name class folders <repeats>_<class>, for example 10_cat, or name the folder of images itself"
        raise OptionError(flag, f"no images found; {way_out}; looked at:{_tree(path, children, counts)}")
    for child in children:
        if child.repeats is None or (child.used and not counts[child.path]):
            logger.info("%s passed over: %s", child.path, _why_passed_over(child, counts[child.path]))
    if not used:
        logger.info("%s holds %d images itself: 1 repeat, no class", path, own_images)
        yield FolderOptions(image_dir=path)
        return
    if own_images:
        logger.info("%s: %d images directly in it passed over, there are class folders", path, own_images)
    for child in used:
        yield FolderOptions(child.path, child.repeats or 1, child.class_tokens)


def _tree(path: Path, children: Sequence[_ClassFolder], counts: Mapping[Path, int]) -> str:
    lines = [f"\n  {path}{os.sep}: no images directly in it"]
    lines += [f"\n    {child.path.name}{os.sep}: {_why_passed_over(child, counts[child.path])}" for child in children]
    return "".join(lines)


def _why_passed_over(child: _ClassFolder, num_images: int) -> str:
    if not num_images:
        return _why_empty(child.path)
    if child.repeats is None:
        name = child.path.name
        return f"{num_images} images, but the name does not begin with the repeats; rename it, for example to 10_{name}"
    return f"{num_images} images, but {child.repeats} repeats"


def _why_empty(folder: Path) -> str:
    """Why a folder gives no images, with a look one level deeper."""
    deeper = [child for child in sorted(folder.iterdir()) if child.is_dir() and count_images(child)]
    if deeper:
        return f"no images, but {count_images(deeper[0])} in {deeper[0].name}{os.sep}; only one level is looked at"
    num_files = sum(1 for _ in folder.iterdir())
    return f"{num_files} files, none of them an image" if num_files else "empty"
