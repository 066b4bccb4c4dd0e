"""Which image files are equal, byte for byte.

Shape letters: M images, K of them that share their number of bytes with another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from library.data.columns import Column
from library.data.images import usable_cores
from library.data.index import DataIndex, Fact, now
from library.data.record_table import RecordTable
from library.data.train_images import TrainImages

READ_AT_ONCE = 1 << 20
HASH_BYTES = 16


class EqualFiles(Column[tuple[str, ...]]):
    """Groups of paths of equal files, each sorted, as places in a sequence of paths."""

    def __init__(self, paths: Sequence[str], places: np.ndarray, ends: np.ndarray) -> None:
        self.paths = paths
        self.places = places
        self.ends = ends  # of each group in `places`

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, row: int) -> tuple[str, ...]:
        start = int(self.ends[row - 1]) if row else 0
        return tuple(sorted(str(self.paths[place]) for place in self.places[start : self.ends[row]].tolist()))

    @property
    def num_copies(self) -> int:
        """Files that are equal to another one of their group."""
        return len(self.places) - len(self.ends)

    def copies(self) -> set[str]:
        """Of every group all but the first."""
        return {path for group in self for path in group[1:]}


def equal_pictures(images: TrainImages, places: np.ndarray, index: DataIndex) -> EqualFiles:
    """Groups of equal files among the images at these places, each of a file of its own.

    Only files of one size are read, and only those of which the `index` doesn't know the hash. A file that can't be
    read any more is in no group.
    """
    paths = images.paths
    suspects = places[_occur_twice(images.num_bytes_M[places])]
    hashes_K2 = np.zeros((len(suspects), 2), np.int64)
    is_known_K = _known_hashes(images, suspects, hashes_K2, index)
    unknown = np.flatnonzero(~is_known_K)
    if len(unknown):
        _hash_files([paths[place] for place in suspects[unknown].tolist()], unknown, hashes_K2, is_known_K, index)
    suspects, hashes_K2 = suspects[is_known_K], hashes_K2[is_known_K]
    order = np.lexsort((suspects, hashes_K2[:, 0], hashes_K2[:, 1]))
    suspects, hashes_K2 = suspects[order], hashes_K2[order]
    starts = np.flatnonzero(np.r_[True, (hashes_K2[1:] != hashes_K2[:-1]).any(axis=1)][: len(suspects)])
    lengths = np.diff(np.r_[starts, len(suspects)])
    starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    firsts = np.argsort(
        [paths[place] for place in suspects[starts].tolist()] if images.num_folders > 1 else suspects[starts]
    )
    groups = [suspects[starts[row] : starts[row] + lengths[row]] for row in firsts.tolist()]
    return EqualFiles(paths, np.concatenate([np.empty(0, np.int32), *groups]), np.cumsum(lengths[firsts]))


def _occur_twice(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[which.reshape(-1)] > 1


def _known_hashes(images: TrainImages, suspects: np.ndarray, hashes_K2: np.ndarray, index: DataIndex) -> np.ndarray:
    """Fill in the hashes that the index's columns know; (K,) of which images they do."""
    is_known_K = np.zeros(len(suspects), bool)
    rows_K = images.rows[suspects]
    start = 0
    for records in images.records:
        if isinstance(records, RecordTable):
            for match in index.of_seen(Fact.CONTENT, records.base, records.num_in_scan):
                hashes = match.part.fixed(HASH_BYTES)
                if hashes is not None:
                    rows = records.rows_here(match.files_M)
                    place = np.searchsorted(rows_K, rows + start)
                    is_meant = (rows >= 0) & (place < len(rows_K))
                    is_meant[is_meant] = rows_K[place[is_meant]] == rows[is_meant] + start
                    hashes_K2[place[is_meant]] = hashes[match.rows_M[is_meant]].view(np.int64)
                    is_known_K[place[is_meant]] = True
        start += len(records)
    return is_known_K


def _hash_files(
    paths: Sequence[str], places: np.ndarray, hashes_K2: np.ndarray, is_known_K: np.ndarray, index: DataIndex
) -> None:
    """Fill in the hashes of these files, at their places: as the index has them, or read."""
    known = {path: content for path, content in index.look_up(Fact.CONTENT, paths) if len(content) == HASH_BYTES}
    rest = [path for path in paths if path not in known]
    since = now()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for path, content in zip(rest, pool.map(_content_hash, rest), strict=True):
            if content is not None:
                known[path] = content
                index.note(Fact.CONTENT, path, content, since)
    index.flush()
    for path, place in zip(paths, places.tolist(), strict=True):
        if path in known:
            hashes_K2[place] = np.frombuffer(known[path], np.int64)
            is_known_K[place] = True


def _content_hash(path: str) -> bytes | None:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with open(path, "rb") as file:
            while part := file.read(READ_AT_ONCE):
                digest.update(part)
    except OSError:
        return None
    return digest.digest()
