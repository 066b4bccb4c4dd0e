"""Which images can be decoded to their end: as far as the index knows, it is not tried again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from PIL import Image

from library.data.images import find_broken
from library.data.index import DataIndex, Fact, now
from library.data.lookalikes import Look, Looks


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
