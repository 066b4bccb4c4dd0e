"""One file under several names: relative and absolute, through links, on Windows in other capitals."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from library.data.columns import Paths
from library.data.folder_contents import FolderContents
from library.data.record_table import RecordTable
from library.data.records import ImageRecord


def path_key(path: Path | str) -> str:
    """What is equal for all names of one file or folder, links followed."""
    return os.path.normcase(os.path.realpath(path))


def file_keys(paths: Iterable[str]) -> dict[str, str]:
    """Path -> what is equal for all names of one file. Hard links count as files of their own."""
    folder_keys: dict[str, str] = {}
    keys: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folder_keys:
            folder_keys[folder] = path_key(folder)
        keys[path] = (
            path_key(path) if os.path.islink(path) else os.path.join(folder_keys[folder], os.path.normcase(name))
        )
    return keys


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
