"""What there is to know of the training data before it is trained on: facts only, nothing is judged here.

An image is named by its path; where the same file is part of several datasets it appears once for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.data.buckets import Placement, Size
from library.data.caption_lengths import CaptionLengths, CountTokens, caption_lengths
from library.data.checked_images import look_states
from library.data.columns import PathsAt
from library.data.config import DatasetConfig
from library.data.equal_pictures import equal_pictures
from library.data.folder_contents import FolderContents
from library.data.loading import TrainImage
from library.data.lookalikes import MOST_COMPARED, TRANSPARENT, alike
from library.data.options import BucketOptions
from library.data.record_table import RecordTable
from library.data.same_files import file_keys
from library.data.scan import Scan
from library.data.summary import LoadedDataset
from library.data.train_images import ImagesByPath, TrainImages, each_path_once, joined


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


def enlargements(images: TrainImages) -> np.ndarray:
    """(M,) :func:`enlargement` of each image."""
    resized_M2 = images.by_placement(attrgetter("resized_wh")).reshape(-1, 2)
    return (resized_M2 / images.size_M2).max(axis=1) if len(images) else np.empty(0)


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
    images: TrainImages
    uncaptioned: Sequence[str]
    caption_extension: str
    cut_moves: bool = False  # the cut is random, or follows a face

    @property
    def empty_captions(self) -> tuple[str, ...]:
        """Images whose caption file holds nothing."""
        empty = np.flatnonzero(self.images.caption_bytes_M == 0)
        if len(empty) <= len(self.uncaptioned) == len(self.images):
            return ()
        missing = frozenset(self.uncaptioned)
        return tuple(path for place in empty.tolist() if (path := self.images.paths[place]) not in missing)


@dataclass(frozen=True)
class BucketUse:
    """The images of one size in one dataset, and the batches that an epoch makes of them."""

    dataset: int  # from 1
    size_wh: Size
    images: TrainImages
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
    def shares_M(self) -> np.ndarray:
        """The share (0-1) of each picture that is cut away."""
        return self.images.by_placement(attrgetter("cropped_share"))

    @property
    def cropped(self) -> float:
        """That share on average over the images."""
        return float(self.shares_M.mean())

    @property
    def num_enlarged(self) -> int:
        """Pictures that are enlarged."""
        return int((enlargements(self.images) > 1).sum())


@dataclass(frozen=True)
class Regularisation:
    """How a dataset's regularisation images are used."""

    dataset: int  # from 1
    images: int
    with_repeats: int
    per_epoch: int
    training: int  # training images x repeats, which they are to balance
    alone: int = 0  # of those per epoch, in batches of one: they come in more sizes than an epoch shows of them


@dataclass(frozen=True)
class Findings:
    """Everything that reports say of the data."""

    datasets: tuple[DatasetUse, ...]
    folders: tuple[FolderUse, ...]
    buckets: tuple[BucketUse, ...]
    regularisation: tuple[Regularisation, ...]
    token_limit: int
    captions: CaptionLengths = field(default_factory=CaptionLengths)
    scan: Scan = field(default_factory=Scan)
    equal: Sequence[tuple[str, ...]] = ()  # groups of files with the same content
    alike: tuple[tuple[str, ...], ...] = ()  # groups of pictures that look the same
    num_validation: int = 0

    @cached_property
    def whole(self) -> TrainImages | None:
        """The images in columns, each file's once, as the first dataset uses it; None where there are none."""
        return each_path_once(joined([folder.images for folder in self.folders])) if self.folders else None

    @cached_property
    def images(self) -> Mapping[str, TrainImage]:
        """Path -> image; where a file is used several times, as the first dataset uses it."""
        return ImagesByPath(self.whole) if self.whole is not None else {}

    def bucket_of(self, path: str) -> BucketOptions:
        """The bucket options of the first dataset that uses an image."""
        numbers = (folder.dataset for folder in self.folders if folder.images.find(path) is not None)
        return self.datasets[next(numbers) - 1].bucket

    def cut_moves(self, image: TrainImage) -> bool:
        """Whether another part of the image is seen each time it is drawn."""
        return self.folders[image.subset].cut_moves

    @cached_property
    def rotated(self) -> list[str]:
        """Pictures that their file says to turn or to mirror."""
        if self.whole is None:
            return []
        return [self.whole.paths[place] for place in np.flatnonzero(self.whole.orientation_M != 1).tolist()]

    @cached_property
    def transparent(self) -> Sequence[str]:
        """Pictures with transparent parts."""
        return PathsAt(self.whole.paths, np.flatnonzero(self._looks == TRANSPARENT)) if self.whole is not None else ()

    @cached_property
    def _looks(self) -> np.ndarray:
        assert self.whole is not None
        return look_states(self.whole, self.scan.looks)

    @property
    def passed_over(self) -> list[str]:
        """Files beside the images that are no images of a kind that is read."""
        return [path for contents in self.scan.contents for path in contents.passed_over]

    @cached_property
    def unnamed(self) -> list[str]:
        """Images in the folders of metadata files that none of these names."""
        paths = [path for contents in self.scan.contents for path in contents.unnamed]
        if not paths:
            return []
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
        return int(np.count_nonzero(self._looks)) if self.whole is not None else 0


def find(
    datasets: Sequence[LoadedDataset],
    scan: Scan,
    *,
    num_processes: int,
    token_limit: int,
    count_tokens: CountTokens,
    num_validation: int = 0,
    counter: str | None = None,
) -> Findings:
    """Facts about the data of a run. `count_tokens` gives the length of each caption, without begin and end.

    What `counter` names as counting is not counted again at the next start, where an index is kept.
    """
    folders = list(_folders(datasets, scan))
    captions = caption_lengths(datasets, count_tokens, token_limit, scan.index, counter)
    equal, similar = _copies(folders, scan)
    scan.index.arrange()
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
        captions=captions,
        scan=scan,
        equal=equal,
        alike=similar,
        num_validation=num_validation,
    )  # fmt: skip


def sizes_in_words(config: DatasetConfig) -> str:
    """Which sizes a dataset is trained at."""
    if config.train_sizes is not None:
        return "buckets of the train_resolution of each image"
    width, height = config.bucket.resolution or (0, 0)
    return f"{'buckets around' if config.bucket.enable_bucket else 'all cut to'} {width}x{height}"


def _copies(folders: Sequence[FolderUse], scan: Scan) -> tuple[Sequence[tuple[str, ...]], tuple[tuple[str, ...], ...]]:
    """(groups of equal files, groups of pictures that look alike); a file under two names is no copy."""
    if not folders:
        return (), ()
    images = joined([folder.images for folder in folders])
    places = np.arange(len(images))
    if not images.has_each_file_once:
        keys = file_keys(images.paths)
        first: dict[str, int] = {}
        for place, path in enumerate(images.paths):
            first.setdefault(keys[path], place)
        places = np.array(list(first.values()))
    equal = equal_pictures(images, places, scan.index)
    if len(places) > MOST_COMPARED:
        return equal, ()
    copies, looks = equal.copies(), {}
    for place in places.tolist():
        path = images.paths[place]
        look = None if path in copies else scan.looks.of(path, *images.place_of(place))
        if look is not None:
            looks[path] = look
    return equal, tuple(map(tuple, alike(looks)))


def _folders(datasets: Sequence[LoadedDataset], scan: Scan) -> Iterable[FolderUse]:
    contents = iter(scan.contents)
    for number, dataset in enumerate(datasets, 1):
        for subset, images in dataset.subsets:
            found = next(contents, None)
            yield FolderUse(
                dataset=number,
                source=subset.source,
                is_reg=subset.folder.is_reg,
                repeats=subset.folder.num_repeats,
                class_tokens=subset.folder.class_tokens,
                images=images,
                uncaptioned=_used(found, images) if found else (),
                caption_extension=found.caption_extension if found else "",
                cut_moves=subset.augment.random_crop or dataset.config.crops_faces(subset),
            )


def _buckets(number: int, dataset: LoadedDataset, num_processes: int) -> Iterable[BucketUse]:
    """Ascending by size."""
    images, samples = dataset.images, dict(dataset.bucket_counts)
    sizes = sorted({placement.bucket_wh for placement in images.placements})
    number_of = {size: number for number, size in enumerate(sizes)}
    bucket_M = images.by_placement(lambda placement: number_of[placement.bucket_wh])
    for size in sizes:
        places = np.flatnonzero(bucket_M == number_of[size])
        if len(places):
            batch_size = dataset.config.batch_size * num_processes
            yield BucketUse(number, size, images.take(places), samples.get(size, 0), batch_size)


def _used(found: FolderContents, images: TrainImages) -> Sequence[str]:
    """The paths of images without a caption file, of those that are used."""
    is_table = isinstance(found.images, RecordTable)
    if len(found.uncaptioned) == 0 or (is_table and len(images) == len(found.images)):
        return found.uncaptioned
    used = frozenset(images.paths)
    return tuple(path for path in found.uncaptioned if path in used)


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


def samples_in_short_batches(buckets: Iterable[BucketUse]) -> int:
    """Samples of an epoch whose batch has at most half the images that were asked for."""
    return sum(bucket.last_batch for bucket in buckets if bucket.last_batch <= bucket.batch_size / 2)


def megapixels(size_wh: Size) -> float:
    return math.prod(size_wh) / 1e6
