"""Which images can be decoded to their end: as far as the index knows, it is not tried again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from library.data.cache_files import CacheItem
from library.data.images import find_broken
from library.data.index import DataIndex, Fact, now
from library.data.lookalikes import OPAQUE, TRANSPARENT, UNKNOWN, Look, Looks
from library.data.record_table import RecordTable
from library.data.train_images import TrainImages


def items_of_unknown_looks(
    images: TrainImages, items: Sequence[CacheItem], looks: Looks, index: DataIndex
) -> Sequence[CacheItem]:
    """The items of images whose looks the index's columns don't know; those that they know go into `looks`."""
    is_unknown_N = np.ones(len(images), bool)
    start = 0
    for records in images.records:
        if isinstance(records, RecordTable):
            looks.take_known(records, index)
            states_N = looks.states_of(records)
            if states_N is not None:
                is_unknown_N[start : start + len(records)] = states_N == UNKNOWN
        start += len(records)
    if is_unknown_N.all():
        return items
    return [items[item] for item in dict.fromkeys(images.item_N[is_unknown_N].tolist())]


def look_states(images: TrainImages, looks: Looks) -> np.ndarray:
    """(M,) UNKNOWN, OPAQUE or TRANSPARENT of each image."""
    columns = []
    for records in images.records:
        states_N = looks.states_of(records) if isinstance(records, RecordTable) else None
        if states_N is None:
            found = (looks.get(record.path) for record in records)
            states = [UNKNOWN if look is None else TRANSPARENT if look.is_transparent else OPAQUE for look in found]
            states_N = np.array(states, np.uint8)
        columns.append(states_N)
    return np.concatenate([np.empty(0, np.uint8), *columns])[images.rows]


def known_whole(paths: Iterable[str], index: DataIndex) -> Iterator[tuple[str, Look]]:
    """The images that were decoded at an earlier start and have not changed since, with their looks."""
    for path, packed in index.look_up(Fact.LOOK, list(paths)):
        look = Look.unpacked(packed)
        if look is not None:
            yield path, look


def find_broken_images(paths: Iterable[str], looks: Looks, index: DataIndex) -> dict[str, str]:
    """Paths of images that can't be decoded, with the reason; the looks of the others go into `looks` and the index."""
    since = now()

    def note(path: str, image: Image.Image) -> None:
        index.note(Fact.LOOK, path, looks.note(path, image).packed(), since)

    try:
        return find_broken(paths, note)
    finally:
        index.flush()  # also of a check that was broken off
