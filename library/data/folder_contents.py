"""What lies in a folder of images, or belongs to a metadata file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from library.data.columns import Paths
from library.data.record_table import RecordTable
from library.data.records import ImageRecord


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
