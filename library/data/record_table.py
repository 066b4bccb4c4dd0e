"""The images of one folder in columns: about a hundred bytes each, in place of an object each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from library.data.columns import Column, Paths, Texts
from library.data.records import ImageRecord


@dataclass(frozen=True, eq=False)
class RecordTable(Column[ImageRecord]):
    """Images of one folder, sorted by name. N images."""

    base: str  # the folder, with a separator behind it
    names: Texts
    sizes_N2: np.ndarray  # uint32: width, height, upright
    orientations_N: np.ndarray  # uint8
    alphas_N: np.ndarray  # bool
    num_bytes_N: np.ndarray  # int64
    captions: Texts
    links: frozenset[str] = frozenset()  # names of those that are links to files
    num_seen: int = -1  # images of the scan that it is from, as its index counts them; -1: all that are here
    seen_N: np.ndarray | None = None  # int32: their rows in that scan; None: all of them, in order

    def __len__(self) -> int:
        return len(self.names)

    def at(self, row: int) -> ImageRecord:
        width, height = self.sizes_N2[row].tolist()
        return ImageRecord(
            self.base + self.names.at(row),
            (width, height),
            int(self.orientations_N[row]),
            self.captions.at(row),
            int(self.num_bytes_N[row]),
            has_alpha=bool(self.alphas_N[row]),
        )

    @property
    def paths(self) -> Paths:
        return Paths(self.base, self.names)

    def take(self, rows: np.ndarray) -> RecordTable:
        """The images of these rows, which ascend."""
        if len(rows) == len(self):
            return self
        return replace(
            self,
            names=self.names.take(rows),
            sizes_N2=self.sizes_N2[rows],
            orientations_N=self.orientations_N[rows],
            alphas_N=self.alphas_N[rows],
            num_bytes_N=self.num_bytes_N[rows],
            captions=self.captions.take(rows),
            num_seen=self.num_in_scan,
            seen_N=rows.astype(np.int32) if self.seen_N is None else self.seen_N[rows],
        )

    @property
    def num_in_scan(self) -> int:
        """How many images the scan found."""
        return len(self) if self.num_seen < 0 else self.num_seen

    def of_scan(self, values: np.ndarray) -> np.ndarray:
        """What belongs to the images that are here, of something that there is for each image of the scan."""
        return values if self.seen_N is None else values[self.seen_N]

    def rows_here(self, seen: np.ndarray) -> np.ndarray:
        """The rows of images by their rows in the scan; -1 for those that were left out since."""
        if self.seen_N is None:
            return seen
        places = np.searchsorted(self.seen_N, seen)
        is_here = places < len(self.seen_N)
        is_here[is_here] = self.seen_N[places[is_here]] == seen[is_here]
        return np.where(is_here, places, -1)

    def without(self, paths: Collection[str]) -> RecordTable:
        """The same, less these images."""
        found = {self.paths.find(path) for path in paths}
        return self.take(np.delete(np.arange(len(self)), sorted(row for row in found if row is not None)))
