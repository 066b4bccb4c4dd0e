"""Which image files hold the same picture: byte for byte, or to the eye.

The look of a picture is its colours on a grid of GRID x GRID cells. Two pictures look alike where these differ little,
measured against the contrast of the pictures themselves: two drawings on white paper have nearly all cells in common
and are still not the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from library.data.index import DataIndex, Fact, now

GRID = 10
MAX_DIFFERENCE = 5.0  # of 255, root mean square over cells and colours
MAX_RELATIVE_DIFFERENCE = 0.15  # of the pictures' contrast: a correlation above 1 - 0.15^2 / 2 = 0.99
MIN_CONTRAST = 2.0  # of 255: below it a picture is one colour, of which nothing can be said
COMPARED_AT_ONCE = 1024
MOST_COMPARED = 200_000  # pictures; comparing more would take minutes
READ_AT_ONCE = 1 << 20


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
class Looks:
    """The looks of the pictures that a check decoded, by path. Threads may note at the same time."""

    by_path: dict[str, Look] = field(default_factory=dict)

    def note(self, path: str, image: Image.Image) -> Look:
        """Keep the look of an image that is decoded, maybe at a part of its size; returns it."""
        cells = image.convert("RGB").resize((GRID, GRID), Image.Resampling.BILINEAR)
        look = Look(cells.tobytes(), _has_transparent_pixels(image))
        self.add(path, look)
        return look

    def add(self, path: str, look: Look) -> None:
        """Keep a look, without its colours where there are too many to compare."""
        self.by_path[path] = look if len(self.by_path) < MOST_COMPARED else BARE[look.is_transparent]


def _has_transparent_pixels(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return sum(image.convert("RGBA").getchannel("A").histogram()[:255]) > 0


# ---------------------------------------------------------------------------------------------- equal files


def equal_files(files: Iterable[tuple[str, int]], threads: int, index: DataIndex | None = None) -> list[list[str]]:
    """Groups of files with the same content, each sorted; `files` are (path, bytes). Only files of one size are read,
    and only those of which the `index` doesn't know the hash.

    A file that can't be read any more is in no group.
    """
    index = index or DataIndex()
    by_size: dict[int, list[str]] = {}
    for path, size in dict(files).items():
        by_size.setdefault(size, []).append(path)
    suspects = [path for paths in by_size.values() if len(paths) > 1 for path in paths]
    hashes = dict(index.look_up(Fact.CONTENT, suspects))
    unknown = [path for path in suspects if path not in hashes]
    since = now()
    with ThreadPoolExecutor(threads) as pool:
        for path, content in zip(unknown, pool.map(_content_hash, unknown), strict=True):
            if content is not None:
                hashes[path] = content
                index.note(Fact.CONTENT, path, content, since)
    index.flush()
    by_hash: dict[bytes, list[str]] = {}
    for path in suspects:
        if path in hashes:
            by_hash.setdefault(hashes[path], []).append(path)
    return sorted(sorted(paths) for paths in by_hash.values() if len(paths) > 1)


def _content_hash(path: str) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while part := file.read(READ_AT_ONCE):
                digest.update(part)
    except OSError:
        return None
    return digest.digest()


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
