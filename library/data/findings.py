"""What there is to know of the training data before it is trained on: facts only, nothing is judged here.

An image is named by its path; where the same file is part of several datasets it appears once for each of them.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from library.data.buckets import Placement, Size
from library.data.captions import process_caption
from library.data.config import DatasetConfig, SubsetConfig
from library.data.images import usable_cores
from library.data.loading import TrainImage
from library.data.lookalikes import alike, equal_files
from library.data.options import BucketOptions, CaptionOptions
from library.data.records import ImageRecord
from library.data.same_files import file_keys
from library.data.scan import Scan
from library.data.summary import LoadedDataset

CountTokens = Callable[[Sequence[str]], list[int]]


class Box(NamedTuple):
    """A part of a picture, in shares (0-1) of its width and height."""

    left: float
    top: float
    width: float
    height: float


def kept_part(placement: Placement) -> Box:
    """What a cut in the centre keeps of the picture."""
    (bucket_w, bucket_h), (resized_w, resized_h) = placement.bucket_wh, placement.resized_wh
    left, top = (resized_w - bucket_w) // 2, (resized_h - bucket_h) // 2
    return Box(left / resized_w, top / resized_h, bucket_w / resized_w, bucket_h / resized_h)


def enlargement(image: TrainImage) -> float:
    """How many times as long the picture's sides become; below 1 it shrinks."""
    (width, height), (resized_w, resized_h) = image.record.size_wh, image.placement.resized_wh
    return max(resized_w / width, resized_h / height)


@dataclass(frozen=True)
class DatasetUse:
    """How a dataset's images become batches."""

    dataset: int  # from 1
    batch_size: int  # of one process
    bucket: BucketOptions
    sizes: str  # in words


@dataclass(frozen=True)
class FolderUse:
    """One subset: a folder or a metadata file."""

    dataset: int  # from 1
    source: Path
    is_reg: bool
    repeats: int
    class_tokens: str | None
    images: tuple[TrainImage, ...]
    uncaptioned: tuple[str, ...]
    caption_extension: str
    cut_moves: bool = False  # the cut is random, or follows a face

    @property
    def empty_captions(self) -> tuple[str, ...]:
        """Images whose caption file holds nothing."""
        missing = frozenset(self.uncaptioned)
        records = (image.record for image in self.images)
        return tuple(record.path for record in records if not record.caption and record.path not in missing)


@dataclass(frozen=True)
class BucketUse:
    """The images of one size in one dataset, and the batches that an epoch makes of them."""

    dataset: int  # from 1
    size_wh: Size
    images: tuple[TrainImage, ...]
    samples: int  # per epoch: images x repeats, and the regularisation images that share these batches
    batch_size: int  # asked for, over all processes

    @property
    def batches(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def last_batch(self) -> int:
        """Images in the last batch of an epoch."""
        return self.samples - (self.batches - 1) * self.batch_size

    @cached_property
    def cropped(self) -> float:
        """The share of a picture that is cut away, on average over the images."""
        return mean(image.placement.cropped_share for image in self.images)


@dataclass(frozen=True)
class Regularisation:
    """How a dataset's regularisation images are used."""

    dataset: int  # from 1
    images: int
    with_repeats: int
    per_epoch: int
    training: int  # training images x repeats, which they are to balance
    alone: int = 0  # of those per epoch, in batches of one: they come in more sizes than an epoch shows of them


class LongCaption(NamedTuple):
    """A caption with more tokens than are read."""

    record: ImageRecord
    caption: str
    tokens: int


@dataclass(frozen=True)
class Findings:
    """Everything that reports say of the data."""

    datasets: tuple[DatasetUse, ...]
    folders: tuple[FolderUse, ...]
    buckets: tuple[BucketUse, ...]
    regularisation: tuple[Regularisation, ...]
    token_limit: int
    tokens: Mapping[str, int]  # caption with prefix and suffix -> tokens
    longest_captions: tuple[LongCaption, ...]  # the longest first, whether cut off or not
    scan: Scan = field(default_factory=Scan)
    equal: tuple[tuple[str, ...], ...] = ()  # groups of files with the same content
    alike: tuple[tuple[str, ...], ...] = ()  # groups of pictures that look the same
    num_validation: int = 0

    @cached_property
    def images(self) -> dict[str, TrainImage]:
        """Path -> image; where a file is used several times, as the first dataset uses it."""
        found: dict[str, TrainImage] = {}
        for image in (image for folder in self.folders for image in folder.images):
            found.setdefault(image.record.path, image)
        return found

    def bucket_of(self, path: str) -> BucketOptions:
        """The bucket options of the first dataset that uses an image."""
        numbers = (folder.dataset for folder in self.folders if any(i.record.path == path for i in folder.images))
        return self.datasets[next(numbers) - 1].bucket

    def cut_moves(self, image: TrainImage) -> bool:
        """Whether another part of the image is seen each time it is drawn."""
        return self.folders[image.subset].cut_moves

    @cached_property
    def cut_off(self) -> tuple[LongCaption, ...]:
        return tuple(long for long in self.longest_captions if long.tokens > self.token_limit)

    @cached_property
    def rotated(self) -> list[str]:
        """Pictures that their file says to turn or to mirror."""
        return [path for path, image in self.images.items() if image.record.orientation != 1]

    @cached_property
    def transparent(self) -> list[str]:
        return [path for path in self.images if path in self.scan.looks and self.scan.looks[path].is_transparent]

    @property
    def passed_over(self) -> list[str]:
        """Files beside the images that are no images of a kind that is read."""
        return [path for contents in self.scan.contents for path in contents.passed_over]

    @cached_property
    def unnamed(self) -> list[str]:
        """Images in the folders of metadata files that none of these names."""
        paths = [path for contents in self.scan.contents for path in contents.unnamed]
        keys = file_keys([*paths, *self.images])
        used = {keys[path] for path in self.images}
        return [path for path in dict.fromkeys(paths) if keys[path] not in used]

    @property
    def captions_alone(self) -> list[str]:
        """Caption files without an image."""
        return list(dict.fromkeys(path for contents in self.scan.contents for path in contents.alone))

    @property
    def sharing_captions(self) -> list[str]:
        """Images of one name with several extensions, which have one caption file for all."""
        return list(dict.fromkeys(path for contents in self.scan.contents for path in contents.sharing))

    @cached_property
    def num_looked_at(self) -> int:
        """Pictures that this start decoded; of others a valid cache says that they were decoded before."""
        return sum(path in self.scan.looks for path in self.images)


def find(
    datasets: Sequence[LoadedDataset],
    scan: Scan,
    *,
    num_processes: int,
    token_limit: int,
    count_tokens: CountTokens,
    num_validation: int = 0,
) -> Findings:
    """Facts about the data of a run. `count_tokens` gives the length of each caption, without begin and end."""
    folders = list(_folders(datasets, scan))
    tokens, longest = _captions(datasets, count_tokens)
    sizes = {image.record.path: image.record.num_bytes for folder in folders for image in folder.images}
    one_path = {key: path for path, key in reversed(file_keys(sizes).items())}  # a file under two names is no copy
    equal = equal_files([(path, sizes[path]) for path in one_path.values()], usable_cores(), scan.index)
    looks = {path: scan.looks[path] for path in one_path.values() if path in scan.looks}
    uses = (
        DatasetUse(number, dataset.config.batch_size, dataset.config.bucket, sizes_in_words(dataset.config))
        for number, dataset in enumerate(datasets, 1)
    )
    return Findings(
        datasets=tuple(uses),
        folders=tuple(folders),
        buckets=tuple(bucket for number, dataset in enumerate(datasets, 1)
                      for bucket in _buckets(number, dataset, num_processes)),
        regularisation=tuple(
            _regularisation(number, dataset) for number, dataset in enumerate(datasets, 1) if dataset.num_reg
        ),
        token_limit=token_limit,
        tokens=tokens,
        longest_captions=tuple(longest),
        scan=scan,
        equal=tuple(map(tuple, equal)),
        alike=tuple(map(tuple, alike(looks, equal))),
        num_validation=num_validation,
    )  # fmt: skip


def sizes_in_words(config: DatasetConfig) -> str:
    """Which sizes a dataset is trained at."""
    if config.train_sizes is not None:
        return "buckets of the train_resolution of each image"
    width, height = config.bucket.resolution or (0, 0)
    return f"{'buckets around' if config.bucket.enable_bucket else 'all cut to'} {width}x{height}"


def _folders(datasets: Sequence[LoadedDataset], scan: Scan) -> Iterable[FolderUse]:
    contents = iter(scan.contents)
    for number, dataset in enumerate(datasets, 1):
        for subset, images in dataset.subsets:
            found = next(contents, None)
            used = frozenset(image.record.path for image in images)
            yield FolderUse(
                dataset=number,
                source=subset.source,
                is_reg=subset.folder.is_reg,
                repeats=subset.folder.num_repeats,
                class_tokens=subset.folder.class_tokens,
                images=images,
                uncaptioned=tuple(path for path in found.uncaptioned if path in used) if found else (),
                caption_extension=found.caption_extension if found else "",
                cut_moves=subset.augment.random_crop or dataset.config.crops_faces(subset),
            )


def _buckets(number: int, dataset: LoadedDataset, num_processes: int) -> Iterable[BucketUse]:
    """Ascending by size."""
    images: dict[Size, list[TrainImage]] = {}
    for image in dataset.images:
        images.setdefault(image.placement.bucket_wh, []).append(image)
    samples = dict(dataset.bucket_counts)
    for size in sorted(images):
        batch_size = dataset.config.batch_size * num_processes
        yield BucketUse(number, size, tuple(images[size]), samples.get(size, 0), batch_size)


def _regularisation(number: int, dataset: LoadedDataset) -> Regularisation:
    in_buckets = sum(count for _, count in dataset.bucket_counts)
    return Regularisation(
        number,
        images=sum(len(images) for subset, images in dataset.subsets if subset.folder.is_reg),
        with_repeats=dataset.num_reg,
        per_epoch=dataset.num_reg_per_epoch,
        training=dataset.num_train,
        alone=dataset.num_train + dataset.num_reg_per_epoch - in_buckets,
    )


def _captions(datasets: Sequence[LoadedDataset], count_tokens: CountTokens) -> tuple[dict[str, int], list[LongCaption]]:
    """Tokens by caption, and the longest caption of each image, the longest first."""
    written: list[tuple[ImageRecord, tuple[str, ...]]] = []
    for dataset in datasets:
        for subset, images in dataset.subsets:
            written += [(image.record, written_captions(image.record.caption, subset)) for image in images]
    unique = list(dict.fromkeys(caption for _, captions in written for caption in captions))
    tokens = dict(zip(unique, count_tokens(unique), strict=True))
    longest: dict[str, LongCaption] = {}
    for record, captions in written:
        caption = max(captions, key=tokens.__getitem__)
        known = longest.get(record.path)
        if known is None or known.tokens < tokens[caption]:
            longest[record.path] = LongCaption(record, caption, tokens[caption])
    return tokens, sorted(longest.values(), key=lambda long: -long.tokens)


def written_captions(caption: str, subset: SubsetConfig) -> tuple[str, ...]:
    """What the text encoder may be given of a stored caption when nothing of it is dropped: one text for each line.

    Of alternatives ({a|b}) one is taken.
    """
    whole = _undropped(subset.caption)
    return tuple(
        process_caption(line, whole, random.Random(0), epoch=1, step=0, max_train_steps=1)
        for line in caption.split("\n")
    )


@functools.lru_cache(maxsize=16)
def _undropped(options: CaptionOptions) -> CaptionOptions:
    return replace(
        options,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )


def samples_in_short_batches(buckets: Iterable[BucketUse]) -> int:
    """Samples of an epoch whose batch has at most half the images that were asked for."""
    return sum(bucket.last_batch for bucket in buckets if bucket.last_batch <= bucket.batch_size / 2)


def megapixels(size_wh: Size) -> float:
    return math.prod(size_wh) / 1e6
