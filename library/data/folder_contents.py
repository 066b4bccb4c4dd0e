"""What lies in a folder of images, or belongs to a metadata file."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from library.data.columns import Paths
from library.data.record_table import RecordTable
from library.data.records import ImageRecord
from library.data.same_files import path_key


@dataclass(frozen=True)
class FolderContents:
    """What a scan of one folder, or of the images of one metadata file, found."""

    images: Sequence[ImageRecord]
    broken: dict[str, str] = field(default_factory=dict)  # path -> reason
    uncaptioned: Sequence[str] = ()  # paths of images without a caption file
    caption_extension: str = ""  # the one used; empty where captions are in no files of their own
    unreadable_captions: tuple[str, ...] = ()  # not UTF-8
    passed_over: tuple[str, ...] = ()  # paths: images of other kinds, hidden ones, and folders named like an image
    unnamed: tuple[str, ...] = ()  # paths of images in the folder that the metadata file does not name
    alone: tuple[str, ...] = ()  # paths of caption files without an image
    sharing: tuple[str, ...] = ()  # paths of images whose caption file is also that of another: a.png and a.jpg

    def without(self, paths: Collection[str]) -> FolderContents:
        """The same, less these images."""
        if isinstance(self.images, RecordTable):
            uncaptioned = self.uncaptioned
            if isinstance(uncaptioned, Paths):
                uncaptioned = uncaptioned.without(paths)
            return replace(self, images=self.images.without(paths), uncaptioned=uncaptioned)
        gone = frozenset(paths)
        return replace(self, images=tuple(image for image in self.images if not _files_of(image) & gone))


def _files_of(image: ImageRecord) -> set[str]:
    return {image.path} | ({image.mask.path} if image.mask else set())


def under_one_name(found: Sequence[FolderContents]) -> list[FolderContents]:
    """The same with every folder called as it was called first, so that no file has two paths.

    A link to a file keeps its own.
    """
    first_name: dict[str, str] = {}
    called: dict[str, str] = {}

    def renamed(path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in called:
            called[folder] = first_name.setdefault(path_key(folder), folder)
        return os.path.join(called[folder], name)

    def renamed_record(image: ImageRecord) -> ImageRecord:
        facts, path = image.metadata, renamed(image.path)
        if facts is None and path == image.path:
            return image
        if facts is not None:
            npz, flipped_npz = (path and renamed(path) for path in (facts.npz, facts.flipped_npz))
            facts = replace(facts, npz=npz, flipped_npz=flipped_npz)
        return replace(image, path=path, metadata=facts)

    def renamed_contents(contents: FolderContents) -> FolderContents:
        images, uncaptioned = contents.images, contents.uncaptioned
        if isinstance(images, RecordTable):
            base = renamed(images.base)
            if base == images.base:
                return contents
            paths = Paths(base, uncaptioned.names, uncaptioned.rows) if isinstance(uncaptioned, Paths) else uncaptioned
            return replace(contents, images=replace(images, base=base), uncaptioned=paths)
        images = tuple(renamed_record(image) for image in images)
        return replace(contents, images=images, uncaptioned=tuple(map(renamed, uncaptioned)))

    return [renamed_contents(contents) for contents in found]
