"""The images of a run in columns: which record, which size to train at, which cached latents.

Shape letters: S subsets, N rows of all images, M images of a selection.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from library.data.buckets import Placement
from library.data.columns import Column
from library.data.face_crop import Face
from library.data.loading import TrainImage
from library.data.record_table import RecordTable
from library.data.records import ImageRecord

DESCRIBED_TOGETHER = 1 << 14


class ImagePaths(Column[str]):
    """The paths of images."""

    def __init__(self, images: TrainImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def at(self, row: int) -> str:
        records, place = self.images.place_of(row)
        return records.base + records.names.at(place) if isinstance(records, RecordTable) else records[place].path


@dataclass(frozen=True, eq=False)
class TrainImages(Column[TrainImage]):
    """Images of a run, subset by subset: all that were placed, or a selection of their rows."""

    records: tuple[Sequence[ImageRecord], ...]  # by subset
    placements: tuple[Placement, ...]  # different ones
    placement_N: np.ndarray  # int32: of each row
    item_N: np.ndarray  # int32: its item in the latent cache
    faces: Mapping[int, Face] = field(default_factory=dict)  # by row
    rows_M: np.ndarray | None = None  # int32, ascending; None: all

    def __len__(self) -> int:
        return len(self.placement_N) if self.rows_M is None else len(self.rows_M)

    def at(self, row: int) -> TrainImage:
        row = row if self.rows_M is None else int(self.rows_M[row])
        subset = bisect_right(self._starts, row) - 1
        return TrainImage(
            self.records[subset][row - self._starts[subset]],
            subset,
            self.placements[self.placement_N[row]],
            int(self.item_N[row]),
            self.faces.get(row),
        )

    def place_of(self, place: int) -> tuple[Sequence[ImageRecord], int]:
        """The records of the subset that an image is from, and its place among them."""
        row = place if self.rows_M is None else int(self.rows_M[place])
        subset = bisect_right(self._starts, row) - 1
        return self.records[subset], row - self._starts[subset]

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each subset; subsets without images share theirs with the next one."""
        return list(accumulate(map(len, self.records[:-1]), initial=0))

    def first_of(self, subset: int) -> int:
        """The first row of a subset."""
        return self._starts[subset]

    # ------------------------------------------------------------------------------------------ selections

    @property
    def rows(self) -> np.ndarray:
        """(M,) the row of each image."""
        return np.arange(len(self), dtype=np.int32) if self.rows_M is None else self.rows_M

    def take(self, places: np.ndarray) -> TrainImages:
        """The images at these places, which ascend."""
        return self if len(places) == len(self) else replace(self, rows_M=self.rows[places].astype(np.int32))

    def of_subsets(self, subsets: range) -> TrainImages:
        """Those of some subsets, one behind the other."""
        subset_M = self.subset_M
        first, end = np.searchsorted(subset_M, [subsets.start, subsets.stop])
        return self.take(np.arange(first, end))

    def with_items(self, item_M: np.ndarray) -> TrainImages:
        """The same with other items of the latent cache."""
        item_N = self.item_N.copy()
        item_N[self.rows] = item_M
        return replace(self, item_N=item_N)

    # ------------------------------------------------------------------------------------------ files

    @cached_property
    def paths(self) -> ImagePaths:
        """The path of each image."""
        return ImagePaths(self)

    @property
    def num_folders(self) -> int:
        """How many subsets they may come from."""
        return len(self.records)

    @property
    def has_each_file_once(self) -> bool:
        """Whether no file can be there twice, under whatever names: every subset is a folder without links."""
        tables = [records for records in self.records if isinstance(records, RecordTable)]
        bases = {table.base for table in tables}
        return len(bases) == len(self.records) and not any(table.links for table in tables)

    @property
    def are_all_of_one_folder(self) -> bool:
        """Whether they are the images of one subset, a folder, without exception."""
        subsets = np.unique(self.subset_M)
        records = self.records[subsets[0]] if len(subsets) == 1 else None
        return isinstance(records, RecordTable) and len(records) == len(self)

    def find(self, path: str) -> int | None:
        """The place of the first image of a path."""
        start = 0
        for records in self.records:
            if isinstance(records, RecordTable):
                row = records.paths.find(path)
            else:
                row = next((row for row, record in enumerate(records) if record.path == path), None)
            if row is not None:
                place = int(np.searchsorted(self.rows, row + start))
                if place < len(self) and self.rows[place] == row + start:
                    return place
            start += len(records)
        return None

    # ------------------------------------------------------------------------------------------ columns

    @property
    def subset_M(self) -> np.ndarray:
        """Index into the run's subsets."""
        return (np.searchsorted(self._starts, self.rows, side="right") - 1).astype(np.int32)

    @property
    def placement_M(self) -> np.ndarray:
        """Index into `placements`."""
        return self.placement_N[self.rows]

    @property
    def item_M(self) -> np.ndarray:
        return self.item_N[self.rows]

    @property
    def has_face_M(self) -> np.ndarray:
        return np.isin(self.rows, list(self.faces))

    def by_placement(self, value: Callable[[Placement], Any]) -> np.ndarray:
        """(M, ...) something of each image's placement."""
        values = np.array([value(placement) for placement in self.placements])
        return values[self.placement_M] if len(values) else np.empty(0)

    @property
    def size_M2(self) -> np.ndarray:
        """int64: width and height of each picture, upright."""
        return self._of_records(
            lambda table: table.sizes_N2, lambda records: [each.size_wh for each in records], np.empty((0, 2))
        )

    @property
    def num_bytes_M(self) -> np.ndarray:
        """int64: of each file."""
        return self._of_records(
            lambda table: table.num_bytes_N, lambda records: [each.num_bytes for each in records], np.empty(0)
        )

    @property
    def orientation_M(self) -> np.ndarray:
        """int64: of Exif, 1-8."""
        return self._of_records(
            lambda table: table.orientations_N, lambda records: [each.orientation for each in records], np.empty(0)
        )

    @property
    def caption_bytes_M(self) -> np.ndarray:
        """int64: the length of each caption."""
        return self._of_records(
            lambda table: table.captions.lengths_N,
            lambda records: [len(each.caption.encode()) for each in records],
            np.empty(0),
        )

    def _of_records(
        self,
        of_table: Callable[[RecordTable], np.ndarray],
        of_others: Callable[[Sequence[ImageRecord]], list[Any]],
        nothing: np.ndarray,
    ) -> np.ndarray:
        columns = [
            of_table(records)
            if isinstance(records, RecordTable)
            else np.array(of_others(records)).reshape(-1, *nothing.shape[1:])
            for records in self.records
        ]
        column = columns[0] if len(columns) == 1 else np.concatenate([nothing, *columns])
        return (column if self.rows_M is None else column[self.rows_M]).astype(np.int64)


def joined(parts: Sequence[TrainImages]) -> TrainImages:
    """Selections of the same images, one behind the other, as one."""
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([part.rows for part in parts])
    return replace(parts[0], rows_M=None if len(rows) == len(parts[0].placement_N) else rows)


def each_path_once(images: TrainImages) -> TrainImages:
    """The first image of each path."""
    if images.has_each_file_once:
        return images
    first: dict[str, int] = {}
    for place, path in enumerate(images.paths):
        first.setdefault(path, place)
    return images.take(np.array(list(first.values()), np.int32))


def described_images(images: TrainImages) -> Iterator[tuple[str, str]]:
    """(what an image is apart from its folder, its caption) of each, for a digest.

    The first is `repr` of its record without folders and caption, its placement, and its subset.
    """
    placements = [repr(placement) for placement in images.placements]
    placement_M, subset_M, rows_M = images.placement_M, images.subset_M, images.rows
    for subset, records in enumerate(images.records):
        first, end = np.searchsorted(subset_M, [subset, subset + 1])
        rows = rows_M[first:end] - images.first_of(subset)
        of_records = _described_table(records, rows) if isinstance(records, RecordTable) else (
            (repr(without_folders(records[row])), records[row].caption) for row in rows.tolist())  # fmt: skip
        for (text, caption), placement in zip(of_records, placement_M[first:end].tolist(), strict=True):
            yield f"({text}, {placements[placement]}, {subset})", caption


def _described_table(table: RecordTable, rows: np.ndarray) -> Iterator[tuple[str, str]]:
    """As `repr` of the records, in a tenth of the time."""
    for start in range(0, len(rows), DESCRIBED_TOGETHER):
        some = rows[start : start + DESCRIBED_TOGETHER]
        columns = zip(
            table.names.some(some), table.captions.some(some), table.sizes_N2[some].tolist(),
            table.orientations_N[some].tolist(), table.num_bytes_N[some].tolist(), table.alphas_N[some].tolist(),
            strict=True,
        )  # fmt: skip
        for name, caption, (width, height), orientation, num_bytes, has_alpha in columns:
            yield (
                (
                    f"ImageRecord(path={name!r}, size_wh=({width}, {height}), orientation={orientation}, caption='', "
                    f"num_bytes={num_bytes}, has_alpha={has_alpha}, mask=None, metadata=None)"
                ),
                caption,
            )


def without_folders(record: ImageRecord) -> ImageRecord:
    """The record with the bare names of its files, and without its caption."""
    mask, metadata = record.mask, record.metadata
    return replace(
        record,
        path=os.path.basename(record.path),
        caption="",
        mask=mask and replace(mask, path=os.path.basename(mask.path)),
        metadata=metadata and replace(metadata, npz=None, flipped_npz=None),
    )


class ImagesByPath(Mapping[str, TrainImage]):
    """Images, each of another path, by their paths."""

    def __init__(self, images: TrainImages) -> None:
        self.all = images

    def __getitem__(self, path: str) -> TrainImage:
        place = self.all.find(path)
        if place is None:
            raise KeyError(path)
        return self.all.at(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all.paths)

    def __len__(self) -> int:
        return len(self.all)
