"""What a metadata file's images are before they are encoded: found, sorted into buckets, with their files' names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.buckets import Placement, Size, aspect_error, place_images
from library.data.cache_files import CacheItem
from library.data.cache_names import cache_file_names
from library.data.entry_finder import EntryFinder
from library.data.images import find_broken
from library.data.metadata_file import metadata_entries
from library.data.metadata_source import scan_metadata
from library.data.metadata_tables import TRAIN_SIZE, image_tables, write_tables
from library.data.options import BucketOptions
from library.data.records import ImageRecord
from library.data.sources import listed, refuse_broken
from library.options import OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A metadata file's images and what they are trained at."""

    images: tuple[ImageRecord, ...]
    placements: tuple[Placement, ...]  # of each
    sizes: dict[str, Size]  # by the key of their entries; an image may have several

    def items(self, *, flipped_too: bool, alpha_too: bool, other_precisions: tuple[str, ...]) -> list[CacheItem]:
        """What is to be encoded; the file's names are those that the metadata's keys lead to."""
        names = cache_file_names(
            [(image.path, place) for image, place in zip(self.images, self.placements, strict=True)]
        )
        return [
            CacheItem(
                image.path,
                image.size_wh,
                image.orientation,
                placement,
                flipped_too,
                name,
                alpha_too=alpha_too,
                other_precisions=other_precisions,
            )
            for image, placement, name in zip(self.images, self.placements, names, strict=True)
        ]

    def counts(self) -> list[tuple[Size, int]]:
        """Images of each size, ascending."""
        return sorted(Counter(placement.bucket_wh for placement in self.placements).items())

    def aspect_error(self) -> float:
        """The mean of the absolute differences between aspect ratios of images and of their buckets."""
        pairs = zip(self.images, self.placements, strict=True)
        errors = [abs(aspect_error(image.size_wh, placement)) for image, placement in pairs]
        return sum(errors) / max(1, len(errors))


def find_images(path: Path, image_dir: Path, bucket: BucketOptions, *, on_bad_image: str) -> Prepared:
    """The images that a metadata file names and that are there; raises OptionError where none is.

    Entries that lead to no image are left as they are, and a sentence says so. Broken images stop the tool, or with
    `on_bad_image` "skip" are left out like them.
    """
    contents = scan_metadata(path, image_dir, between=", ")
    records = {image.path: image for image in contents.images if image.metadata and image.metadata.has_image}
    finder = EntryFinder(image_dir)
    keys = {entry.key: finder.find(entry.key).image for entry in metadata_entries(path, "in_json")}
    broken = {name: reason for name, reason in contents.broken.items() if name not in keys or keys[name]}
    broken |= find_broken(records)
    if on_bad_image == "stop":
        refuse_broken(broken)
    images = tuple(image for name, image in records.items() if name not in broken)
    if not images:
        problem = f"none of the {len(keys)} entries of {path} leads to an image in {image_dir}"
        raise OptionError("train_data_dir", problem, "name the folder that the metadata was made of")
    placements = tuple(place_images((image.size_wh for image in images), bucket))
    size_of = {image.path: placement.bucket_wh for image, placement in zip(images, placements, strict=True)}
    sizes = {key: size_of[image] for key, image in keys.items() if image in size_of}
    _tell("has no entry and is left out", "have no entry and are left out", contents.unnamed)
    _tell("leads to no image and stays as it is", "lead to no image and stay as they are",
          [key for key in keys if key not in sizes], "entry", "entries")  # fmt: skip
    return Prepared(images, placements, sizes)


def _tell(one: str, many: str, names: Sequence[str], noun: str = "image", plural: str = "images") -> None:
    if names:
        told = f"1 {noun} {one}" if len(names) == 1 else f"{len(names)} {plural} {many}"
        logger.warning("%s: %s", told, listed(names))


def write_sizes(source: Path, target: Path, prepared: Prepared) -> None:
    """Write the metadata with `train_resolution` for the images; everything else in it stays as it is."""

    def tables() -> Iterator[tuple[str, dict[str, Any]]]:
        for key, table, _ in image_tables(source, "in_json"):
            yield key, {**table, TRAIN_SIZE: list(prepared.sizes[key])} if key in prepared.sizes else table

    write_tables(target, tables(), "out_json")
