"""Metadata files: captions and tags of many images in one .json, .jsonl or .parquet file.

A .json file is an object {image key: {"caption", "tags", "train_resolution"}}, as the trade's tagging and caching tools
write it. In a .jsonl file every line is such an object with the key under one of KEY_NAMES, and so is every row of a
.parquet file. An image key is a path, or a name without extension in the folder of the images. Nothing here needs torch
or numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.listing import is_utf8
from library.data.metadata_tables import TRAIN_SIZE, image_tables
from library.data.options import LATENT_STRIDE, MAX_SIDE
from library.options import OptionError

CAPTION_NAMES = ("caption", "text")

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """What a metadata file says of one image."""

    key: str
    caption: str  # without the tags; empty where there is none
    tags: str  # empty where there are none
    train_size: Size | None  # (width, height) the image is to be trained at

    def joined(self, between: str, *, all_lines: bool = False) -> str:
        """Caption and tags with `between` between them; with `all_lines`, one of which is drawn, in every line."""
        if not self.tags or not self.caption:
            return self.caption or self.tags
        if not all_lines:
            return f"{self.caption}{between}{self.tags}"
        lines = (line.strip() for line in self.caption.split("\n"))
        return "\n".join(f"{line}{between}{self.tags}" for line in lines if line)


def metadata_entries(path: Path, where: str) -> Iterator[MetadataEntry]:
    """The entries of a metadata file in their order, read as they are asked for.

    Raises OptionError naming `where`, or the file with line and key.
    """
    return (_entry(key, table, place) for key, table, place in image_tables(path, where))


def read_metadata(path: Path, where: str) -> tuple[MetadataEntry, ...]:
    """All entries at once; see :func:`metadata_entries`."""
    return tuple(metadata_entries(path, where))


def common_train_sizes(entries: Iterable[MetadataEntry]) -> tuple[Size, ...] | None:
    """The sizes that the entries are to be trained at, ascending; None unless every entry has one."""
    sizes = {entry.train_size for entry in entries}
    return None if None in sizes else tuple(sorted(size for size in sizes if size))


def _entry(key: str, table: Any, place: str) -> MetadataEntry:
    if not isinstance(table, dict):
        raise OptionError(place, f"{table!r} is not a table", 'write {"caption": "..."} in its place')
    caption = next((_text(table, name, place) for name in CAPTION_NAMES if table.get(name) is not None), "")
    tags = _text(table, "tags", place)
    return MetadataEntry(key, caption, tags, _train_size(table.get(TRAIN_SIZE), place))


def _text(table: Mapping[str, Any], name: str, place: str) -> str:
    value = table.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise OptionError(place, f"{name} {value!r} is not a text")
    if not is_utf8(value):
        raise OptionError(place, f"{name} {value!r} has half a character", "write it anew")
    return value


def _train_size(value: Any, place: str) -> Size | None:
    """(width, height), rounded down to what the VAE can encode, as the trade's caching tool does."""
    if value is None:
        return None
    is_size = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if not is_size or not LATENT_STRIDE <= min(value) <= max(value) <= MAX_SIDE:
        raise OptionError(place, f"train_resolution {value!r} is no size", "write [width, height]")
    width, height = (side // LATENT_STRIDE * LATENT_STRIDE for side in value)
    return width, height
