"""Which parts of images count in the loss: masks beside the images, and alpha channels. Nothing is decoded here."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.caption_names import composed
from library.data.config import SubsetConfig
from library.data.headers import BadImage, read_header
from library.data.listing import entries_of, is_file, is_image
from library.data.records import ImageRecord, MaskFile
from library.data.sources import listed
from library.options import OptionError
from library.wording import counted

if TYPE_CHECKING:
    from library.data.folder_contents import FolderContents

logger = logging.getLogger(__name__)

LARGEST_STRETCH = 0.02  # by which a mask's aspect ratio may differ from its image's without a word


def with_mask_files(
    found: Sequence[FolderContents], subsets: Sequence[SubsetConfig]
) -> tuple[list[FolderContents], dict[str, str]]:
    """The contents with each image's mask, where a subset has a folder of them; and broken masks with the reason.

    The mask of `a.jpg` is an image `a` of any kind in the folder, or in its sub-folder of the name of the images'
    folder; that of `sub/a.jpg`, which a metadata file may name, first of all in its sub-folder `sub`. Raises
    OptionError listing all images that have none, or share one with another image.
    """
    contents, broken, missing = [], {}, []
    shared: dict[str, list[str]] = {}  # mask -> images of several folders
    for folder_contents, subset in zip(found, subsets, strict=True):
        folder = subset.masks.conditioning_data_dir
        if folder is not None:
            masks = _Masks(folder, subset.image_dir)
            paths = masks.of([image.path for image in folder_contents.images])
            shared |= masks.shared
            images = []
            for image, path in zip(folder_contents.images, paths, strict=True):
                if path is None:
                    missing.append(image.path)
                    continue
                try:
                    images.append(replace(image, mask=_mask_file(path)))
                except BadImage as error:
                    broken[path] = str(error)
            folder_contents = replace(folder_contents, images=tuple(images))
        contents.append(folder_contents)
    if shared:
        table = "".join(f"\n  {mask}: {listed(paths)}" for mask, paths in sorted(shared.items()))
        way_out = "put the masks into sub-folders named as those of the images"
        raise OptionError("conditioning_data_dir", f"images of several folders have one mask; {way_out}:{table}")
    if missing:
        problem = f"{len(missing)} image{'s have' if len(missing) > 1 else ' has'} no mask: {listed(missing)}"
        way_out = "add pictures of these names, white where the image counts and black where it does not"
        raise OptionError("conditioning_data_dir", problem, way_out)
    return contents, broken


class _Masks:
    """The masks in a folder; every sub-folder is listed once."""

    def __init__(self, folder: Path, image_dir: Path) -> None:
        self.folder = os.path.join(folder, "")
        self.image_dir = os.path.abspath(image_dir)
        self.shared: dict[str, list[str]] = {}
        self._listings: dict[str, dict[str, str]] = {}  # sub-folder -> stem -> mask

    def of(self, images: Sequence[str]) -> list[str | None]:
        """The mask of each image; notes those that images of several folders would share."""
        found: list[str | None] = []
        users: dict[str, dict[str, str]] = {}  # mask -> folder -> image
        for image in images:
            folder, name = os.path.split(os.path.abspath(image))
            stem = composed(os.path.splitext(name)[0])
            below = os.path.join(folder, "").removeprefix(
                os.path.join(self.image_dir, "")
            )  # whole where it lies elsewhere
            places = [below] * bool(below and not os.path.isabs(below)) + [os.path.basename(self.image_dir), ""]
            mask = next((mask for place in places if (mask := self._listing(place).get(stem))), None)
            found.append(mask)
            if mask is not None:
                users.setdefault(mask, {}).setdefault(folder, image)
        self.shared = {mask: list(by_folder.values()) for mask, by_folder in users.items() if len(by_folder) > 1}
        return found

    def _listing(self, place: str) -> dict[str, str]:
        if place not in self._listings:
            folder = os.path.join(self.folder, place)
            entries = entries_of(folder, "conditioning_data_dir") if os.path.isdir(folder) else []
            names = [entry for entry in reversed(entries) if is_image(entry.name) and is_file(entry)]
            self._listings[place] = {composed(os.path.splitext(entry.name)[0]): entry.path for entry in names}
        return self._listings[place]


def _mask_file(path: str) -> MaskFile:
    header = read_header(path)
    return MaskFile(path, header.size_wh, header.orientation, header.num_bytes)


def report_masks(contents: Sequence[FolderContents], subsets: Sequence[SubsetConfig]) -> None:
    """Log how many images are masked by what, and which are not."""
    if not any(subset.masks.enabled for subset in subsets):
        return
    pairs = [(image, subset) for c, subset in zip(contents, subsets, strict=True) for image in c.images]
    by_file = [image for image, _ in pairs if image.mask]
    by_alpha = [image for image, subset in pairs if subset.masks.alpha_mask and image.has_alpha]
    if by_file:
        logger.info("masks: %d of %d images are masked by files", len(by_file), len(pairs))
    if any(subset.masks.alpha_mask for subset in subsets):
        logger.info("masks: %d of %d images are masked by their alpha channel", len(by_alpha), len(pairs))
    if any(subset.masks.enabled for subset in subsets):
        whole = [i for i, subset in pairs if not (i.mask or (subset.masks.alpha_mask and i.has_alpha))]
        if whole:
            paths = [image.path for image in whole]
            count = counted(len(whole), "image")
            logger.warning("masks: %s without one, counted as a whole: %s", count, listed(paths))
    stretched = [image.path for image in by_file if _stretch(image) > LARGEST_STRETCH]
    if stretched:
        count = counted(len(stretched), "mask")
        logger.warning("masks: %s of another shape than the image, stretched: %s", count, listed(stretched))


def _stretch(image: ImageRecord) -> float:
    assert image.mask is not None
    (width, height), (mask_width, mask_height) = image.size_wh, image.mask.size_wh
    return abs(width * mask_height / (height * mask_width) - 1)
