"""Which image files hold the same picture to the eye; for byte by byte, see equal_pictures.py.

The look of a picture is its colours on a grid of GRID x GRID cells. Two pictures look alike where these differ little,
measured against the contrast of the pictures themselves: two drawings on white paper have nearly all cells in common
and are still not the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from library.data.columns import Paths
from library.data.index import LOOKS_IN_FULL, DataIndex, Fact
from library.data.record_table import RecordTable
from library.data.records import ImageRecord

GRID = 10
MAX_DIFFERENCE = 5.0  # of 255, root mean square over cells and colours
MAX_RELATIVE_DIFFERENCE = 0.15  # of the pictures' contrast: a correlation above 1 - 0.15^2 / 2 = 0.99
MIN_CONTRAST = 2.0  # of 255: below it a picture is one colour, of which nothing can be said
COMPARED_AT_ONCE = 1024
MOST_COMPARED = LOOKS_IN_FULL  # pictures; comparing more would take minutes
COLOURS = GRID * GRID * 3  # bytes of a look's colours
UNKNOWN, OPAQUE, TRANSPARENT = range(3)


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a picture that was decoded."""

    colours: bytes  # RGB of GRID x GRID cells, row by row; empty where there are more pictures than are compared
    is_transparent: bool  # some pixel is

    def packed(self) -> bytes:
        """As an index keeps it."""
        return bytes([self.is_transparent]) + self.colours

    @classmethod
    def unpacked(cls, packed: bytes) -> Look | None:
        """None for what was not packed so."""
        return cls(packed[1:], bool(packed[0])) if len(packed) == 1 + GRID * GRID * 3 else None


BARE = (Look(b"", False), Look(b"", True))  # by transparency


@dataclass
class LookTable:
    """The looks of images of one folder. N images; K of them with colours."""

    paths: Paths  # sorted by name
    state_N: np.ndarray  # uint8: UNKNOWN, OPAQUE or TRANSPARENT
    colours_K: bytearray
    place_N: np.ndarray  # int32: of the colours of an image; -1: none are kept

    @classmethod
    def empty(cls, paths: Paths) -> LookTable:
        """Nothing is known."""
        count = len(paths)
        return cls(paths, np.zeros(count, np.uint8), bytearray(), np.full(count, -1, np.int32))

    def add(self, rows: np.ndarray, states: np.ndarray, colours: np.ndarray | None) -> None:
        """Looks of some rows: their states, and (len(rows), COLOURS) uint8 where they are kept."""
        self.state_N[rows] = states
        if colours is not None:
            first = len(self.colours_K) // COLOURS
            self.colours_K += colours.tobytes()
            self.place_N[rows] = np.arange(first, first + len(rows))

    def at(self, row: int) -> Look | None:
        """The look of one image, where it is known."""
        if self.state_N[row] == UNKNOWN:
            return None
        start = int(self.place_N[row]) * COLOURS
        return Look(
            bytes(self.colours_K[start : start + COLOURS]) if start >= 0 else b"", self.state_N[row] == TRANSPARENT
        )


@dataclass
class Looks(Mapping[str, Look]):
    """The looks of pictures that were decoded, by path. Threads may note at the same time."""

    by_path: dict[str, Look] = field(default_factory=dict)
    tables: dict[str, LookTable] = field(default_factory=dict)  # of whole folders, by their paths' base
    num_with_colours: int = 0  # in the tables

    def take_known(self, images: RecordTable, index: DataIndex) -> None:
        """Take the looks of a folder's images, as they were when it was scanned, from the index's columns."""
        if images.seen_N is not None:
            return
        paths = images.paths
        table = LookTable.empty(paths)
        for match in index.of_seen(Fact.LOOK, paths.base, len(paths)):
            packed = match.part.fixed(1 + COLOURS)
            states = match.part.fixed(1) if packed is None else packed
            if states is None:
                continue
            is_transparent = states[match.rows_M, 0]
            is_sound = is_transparent <= 1
            rows, files = match.rows_M[is_sound], match.files_M[is_sound]
            has_room = packed is not None and self.num_with_colours + len(rows) <= MOST_COMPARED
            self.num_with_colours += len(rows) if has_room else 0
            colours = packed[rows, 1:] if packed is not None and has_room else None
            table.add(files, np.where(is_transparent[is_sound] == 1, TRANSPARENT, OPAQUE), colours)
        if table.state_N.any():
            self.tables[paths.base] = table

    def states_of(self, images: RecordTable) -> np.ndarray | None:
        """UNKNOWN, OPAQUE or TRANSPARENT of each image of a folder; None where its looks are in no table."""
        table = self.tables.get(images.base)
        if table is None or len(table.paths) != images.num_in_scan:
            return None
        states_N, paths = images.of_scan(table.state_N).copy(), images.paths
        for path, look in self.by_path.items():
            if (row := paths.find(path)) is not None:
                states_N[row] = TRANSPARENT if look.is_transparent else OPAQUE
        return states_N

    def of(self, path: str, records: Sequence[ImageRecord], row: int) -> Look | None:
        """The look of a record, where it is known; `path` is the record's."""
        table = self.tables.get(records.base) if isinstance(records, RecordTable) else None
        if path in self.by_path or table is None or not isinstance(records, RecordTable):
            return self.by_path.get(path)
        return table.at(row if records.seen_N is None else int(records.seen_N[row]))

    def __getitem__(self, path: str) -> Look:
        if path in self.by_path:
            return self.by_path[path]
        table = self.tables.get(os.path.join(os.path.dirname(path), ""))
        row = None if table is None else table.paths.find(path)
        look = None if table is None or row is None else table.at(row)
        if look is None:
            raise KeyError(path)
        return look

    def __iter__(self) -> Iterator[str]:
        yield from self.by_path
        for table in self.tables.values():
            known = (table.paths.at(row) for row in np.flatnonzero(table.state_N).tolist())
            yield from (path for path in known if path not in self.by_path)

    def __len__(self) -> int:
        return sum(1 for _ in self) if self.by_path else sum(map(_num_known, self.tables.values()))

    def note(self, path: str, image: Image.Image) -> Look:
        """Keep the look of an image that is decoded, maybe at a part of its size; returns it."""
        cells = image.convert("RGB").resize((GRID, GRID), Image.Resampling.BILINEAR)
        look = Look(cells.tobytes(), _has_transparent_pixels(image))
        self.add(path, look)
        return look

    def add(self, path: str, look: Look) -> None:
        """Keep a look, without its colours where there are too many to compare."""
        has_room = len(self.by_path) + self.num_with_colours < MOST_COMPARED
        self.by_path[path] = look if has_room else BARE[look.is_transparent]


def _num_known(table: LookTable) -> int:
    return int(np.count_nonzero(table.state_N))


def _has_transparent_pixels(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return sum(image.convert("RGBA").getchannel("A").histogram()[:255]) > 0


# ---------------------------------------------------------------------------------------------- alike


def alike(looks: Mapping[str, Look], equal: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Groups of pictures that look alike, each sorted; of every group of `equal` files only the first takes part.

    Pictures of one colour are left out, and nothing is compared where there are more than MOST_COMPARED.
    """
    copies = {path for group in equal for path in group[1:]}
    paths = [path for path in sorted(looks) if path not in copies]
    if not 2 <= len(paths) <= MOST_COMPARED or not all(looks[path].colours for path in paths):
        return []
    cells = np.frombuffer(b"".join(looks[path].colours for path in paths), np.uint8)
    cells_NC3 = cells.reshape(len(paths), GRID * GRID, 3).astype(np.float32)
    contrast_N = np.sqrt(cells_NC3.var(axis=1).mean(axis=1))
    by_brightness = np.argsort(cells_NC3.mean(axis=(1, 2)), kind="stable")
    by_brightness = by_brightness[contrast_N[by_brightness] >= MIN_CONTRAST]
    vectors_ND = cells_NC3.reshape(len(paths), -1)[by_brightness]
    pairs = _near_pairs(vectors_ND, contrast_N[by_brightness])
    groups = _joined((int(by_brightness[a]), int(by_brightness[b])) for a, b in pairs)
    return sorted(sorted(paths[index] for index in group) for group in groups)


def _near_pairs(vectors_ND: np.ndarray, contrast_N: np.ndarray) -> Iterable[tuple[int, int]]:
    """Pairs of rows that differ little; rows are sorted by their mean, which bounds how far to look.

    The root mean square of a difference is at least the difference of the means.
    """
    brightness_N = vectors_ND.mean(axis=1)
    squares_N = np.square(vectors_ND, dtype=np.float64).sum(axis=1)
    limit_N = np.minimum(MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * contrast_N)
    for start in range(0, len(vectors_ND), COMPARED_AT_ONCE):
        rows = slice(start, min(start + COMPARED_AT_ONCE, len(vectors_ND)))
        end = int(np.searchsorted(brightness_N, brightness_N[rows.stop - 1] + MAX_DIFFERENCE, side="right"))
        columns = slice(start, end)
        products = vectors_ND[rows] @ vectors_ND[columns].T
        squared = (squares_N[rows, None] + squares_N[None, columns] - 2.0 * products) / vectors_ND.shape[1]
        limit = np.minimum(limit_N[rows, None], limit_N[None, columns])
        for row, column in zip(*np.nonzero(squared <= limit**2), strict=True):
            if column > row:
                yield start + int(row), start + int(column)


def _joined(pairs: Iterable[tuple[int, int]]) -> list[set[int]]:
    """Groups of numbers that are connected by pairs."""
    group_of: dict[int, set[int]] = {}
    for a, b in pairs:
        if a in group_of and group_of[a] is group_of.get(b):
            continue
        small, large = sorted((group_of.get(a, {a}), group_of.get(b, {b})), key=len)
        large |= small
        for member in (*small, a, b):
            group_of[member] = large
    return list({id(group): group for group in group_of.values()}.values())
