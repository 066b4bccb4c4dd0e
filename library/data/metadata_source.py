"""The images of a metadata file: found on disk, with headers, and with the latents that lie beside them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from library.data.cache_files import DAMAGE, original_size
from library.data.entry_finder import EntryFiles, EntryFinder
from library.data.folder_contents import FolderContents
from library.data.headers import BadImage, Header
from library.data.index import NOTED_TOGETHER, DataIndex
from library.data.listing import is_image, listing, why_closed
from library.data.metadata_file import MetadataEntry, Size, metadata_entries
from library.data.progress import progress
from library.data.records import FromMetadata, ImageRecord
from library.data.same_files import file_keys
from library.data.slow_files import FileCalls
from library.data.sources import known_or_read, listed
from library.options import OptionError
from library.wording import counted

logger = logging.getLogger(__name__)


def scan_metadata(
    path: Path,
    image_dir: Path,
    *,
    between: str,
    all_lines: bool = False,
    index: DataIndex | None = None,
    index_policy: str = "auto",
) -> FolderContents:
    """The images that the entries of a metadata file name, in its order; entries that lead nowhere are broken.

    An entry that has no image but latents in a .npz file is found by that. `between` stands between caption and tags,
    with `all_lines` in each line of the caption. What the `index` knows of images is not read again; `index_policy`
    says whether it takes up their folders (--data_index).
    """
    index = index or DataIndex()
    finder = EntryFinder(image_dir)
    images: list[ImageRecord] = []
    turned: list[str] = []
    broken: dict[str, str] = {}
    for entry, files, header in _read(metadata_entries(path, "metadata_file"), finder, path.name, index, index_policy):
        file = files.image or files.npz
        if file is None:
            broken[entry.key] = f"is in {path}, but no image and no .npz file of that name is in {image_dir}"
        elif isinstance(header, BadImage):
            broken[file] = str(header)
        else:
            images.append(_record(entry, entry.joined(between, all_lines=all_lines), files, header))
            facts = images[-1].metadata
            turned += [file] if facts is not None and facts.train_wh != entry.train_size else []
    if broken and not images and not any(os.path.exists(file) for file in broken):
        problem = f"none of the {len(broken)} entries of {path} leads to an image in {image_dir}"
        raise OptionError("train_data_dir", problem, "name the folder that the metadata was made of")
    _report(path, images, turned)
    empty = tuple(image.path for image in images if not image.caption)
    others, passed_over = _beside(image_dir, images)
    return FolderContents(tuple(images), broken, empty, passed_over=passed_over, unnamed=others)


def _read(
    entries: Iterator[MetadataEntry], finder: EntryFinder, name: str, index: DataIndex, index_policy: str
) -> Iterator[tuple[MetadataEntry, EntryFiles, Header | BadImage]]:
    """The entries with their files and headers, some thousand at a time, so that no more of them are in memory."""
    folders: set[str] = set()
    with progress(f"reading {name}", None) as bar, FileCalls() as calls:
        while chunk := list(islice(entries, NOTED_TOGETHER)):
            found = [finder.find(entry.key) for entry in chunk]
            for folder in {os.path.dirname(each.image) for each in found if each.image} - folders:
                folders.add(folder)
                index.use(folder, index_policy, finder.num_files(folder))
            yield from zip(chunk, found, _headers(found, index, calls), strict=True)
            bar.update(len(chunk))
    index.flush()


def _beside(image_dir: Path, images: list[ImageRecord]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(images in the folder that no entry names, files that would be passed over in any folder of images)."""
    if why_closed(image_dir):
        return (), ()
    found = listing(image_dir)
    paths = [os.path.join(image_dir, name) for name in found.files if is_image(name)]
    keys = file_keys([*paths, *(image.path for image in images)])
    named = {keys[image.path] for image in images}
    return tuple(path for path in paths if keys[path] not in named), found.passed_over


def _headers(files: list[EntryFiles], index: DataIndex, calls: FileCalls) -> Iterator[Header | BadImage]:
    of_images = known_or_read([(each.image, None) for each in files if each.image], index, calls)
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


def _record(entry: MetadataEntry, caption: str, files: EntryFiles, header: Header) -> ImageRecord:
    path = files.image or files.npz
    assert path is not None
    train_wh = _turned(entry.train_size, header) if entry.train_size else None
    facts = FromMetadata(entry.tags, train_wh, files.npz, files.flipped_npz, has_image=files.image is not None)
    return ImageRecord(
        path,
        header.size_wh,
        header.orientation,
        caption,
        header.num_bytes,
        has_alpha=header.has_alpha,
        metadata=facts,
    )


def _turned(train_wh: Size, header: Header) -> Size:
    """The size to train at, its sides swapped where it is that of a picture on its side.

    Tools that take no notice of Exif wrote it from the stored picture; one that does would have written what fits the
    upright one better.
    """
    width, height = train_wh
    upright_w, upright_h = header.size_wh
    is_wide, should_be_wide = width > height, upright_w > upright_h
    is_on_its_side = (
        header.orientation >= 5 and width != height and upright_w != upright_h and is_wide != should_be_wide
    )
    return (height, width) if is_on_its_side else train_wh


def _report(path: Path, images: list[ImageRecord], turned: list[str]) -> None:
    """Say which images several entries name, and which sizes were turned."""
    keys = file_keys(image.path for image in images)
    uses = Counter(keys[image.path] for image in images)
    doubles = [image.path for image in {keys[image.path]: image for image in images}.values()
               if uses[keys[image.path]] > 1]  # fmt: skip
    if doubles:
        told = f"{path}: {counted(len(doubles), 'image')} named by several entries and trained once for each"
        logger.warning("%s: %s", told, listed(doubles))
    if turned:
        photos = counted(len(turned), "photo")
        told = f"the train_resolution of {photos} is that of the camera's sensor, its sides are swapped"
        logger.info("%s: %s: %s", path, told, listed(turned))
