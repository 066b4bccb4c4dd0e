"""The images of a metadata file: found on disk, with headers, and with the latents that lie beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from library.data.cache_files import DAMAGE, original_size
from library.data.headers import BadImage, Header
from library.data.metadata_file import EntryFiles, EntryFinder, MetadataEntry, read_metadata
from library.data.sources import FolderContents, FromMetadata, ImageRecord, is_image, read_all


def scan_metadata(path: Path, image_dir: Path) -> FolderContents:
    """The images that the entries of a metadata file name, in its order; entries that lead nowhere are broken.

    An entry that has no image but latents in a .npz file is found by that.
    """
    entries = read_metadata(path, "metadata_file")
    finder = EntryFinder(image_dir, is_image)
    found = [(entry, finder.find(entry.key)) for entry in entries]
    images: list[ImageRecord] = []
    broken: dict[str, str] = {}
    for (entry, files), header in zip(found, _headers([files for _, files in found], path.name), strict=True):
        file = files.image or files.npz
        if file is None:
            broken[entry.key] = f"is in {path}, but no image and no .npz file of that name is in {image_dir}"
        elif isinstance(header, BadImage):
            broken[file] = str(header)
        else:
            images.append(_record(entry, files, file, header))
    empty = tuple(image.path for image in images if not image.caption)
    return FolderContents(tuple(images), broken, empty)


def _headers(files: list[EntryFiles], name: str) -> Iterator[Header | BadImage]:
    of_images = read_all([(each.image, None) for each in files if each.image], name)
    for each in files:
        if each.image:
            yield next(of_images)[0]
        else:
            yield _header_of_latents(each.npz) if each.npz else BadImage("is missing")


def _header_of_latents(npz: str) -> Header | BadImage:
    try:
        return Header(original_size(npz), 1, os.path.getsize(npz))
    except DAMAGE:
        return BadImage("holds no latents, and there is no image")


def _record(entry: MetadataEntry, files: EntryFiles, path: str, header: Header) -> ImageRecord:
    has_image = files.image is not None
    facts = FromMetadata(entry.tags, entry.train_size, files.npz, files.flipped_npz, has_image)
    return ImageRecord(
        path,
        header.size_wh,
        header.orientation,
        entry.caption,
        header.num_bytes,
        has_alpha=header.has_alpha,
        metadata=facts,
    )
