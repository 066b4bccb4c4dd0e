"""Which files the entries of a metadata file lead to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from library.data.caption_names import composed
from library.data.listing import is_file, is_image


@dataclass(frozen=True, slots=True)
class EntryFiles:
    """The files an entry leads to; None for each that is not there."""

    image: str | None
    npz: str | None  # latents
    flipped_npz: str | None  # latents of the mirrored image, in a file of their own as older tools wrote them


class EntryFinder:
    """Finds the files of entries; every folder is listed once."""

    def __init__(self, image_dir: Path) -> None:
        self.image_dir = str(image_dir)
        self._listings: dict[str, dict[str, list[str]]] = {}  # folder -> stem -> names, sorted

    def find(self, key: str) -> EntryFiles:
        """A key is a path in the image folder, with or without its extension, or one as it stands.

        One that Windows wrote is also read as a path of this system, and as the bare name of a file in the folder.
        """
        for name in _readings(key):
            found = self._find(name)
            if found.image or found.npz:
                return found
        return EntryFiles(None, None, None)

    def num_files(self, folder: str) -> int:
        """How many files lie directly in a folder."""
        return sum(map(len, self._listing(folder).values()))

    def _find(self, key: str) -> EntryFiles:
        inside = os.path.join(self.image_dir, key)
        image = self._image(inside) or next(filter(is_image, self._named(inside)), None) or self._image(key)
        if image is not None:
            bases = [os.path.splitext(image)[0], inside]
        else:  # a bare name is not looked up in the working folder: latents of other images may lie there
            places = [inside, *([key] if os.path.dirname(key) else [])]
            bases = [base for place in places for base in ([os.path.splitext(place)[0]] * is_image(place) + [place])]
        npz = next((path for base in bases if (path := self._path(f"{base}.npz"))), None)
        return EntryFiles(image, npz, self._path(f"{npz.removesuffix('.npz')}_flip.npz") if npz else None)

    def _image(self, path: str) -> str | None:
        return self._path(path) if is_image(path) else None

    def _path(self, path: str) -> str | None:
        """The path of a file as its folder spells it; None where it is not there."""
        folder, name = os.path.split(path)
        names = self._listing(folder).get(composed(os.path.splitext(name)[0]), ())
        found = name if name in names else next((each for each in names if composed(each) == composed(name)), None)
        return found and os.path.join(folder, found)

    def _named(self, path: str) -> list[str]:
        """Files called `path` and an extension."""
        folder, stem = os.path.split(path)
        return [os.path.join(folder, name) for name in self._listing(folder).get(composed(stem), ()) if name != stem]

    def _listing(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                with os.scandir(folder or ".") as entries:
                    for name in sorted(entry.name for entry in entries if is_file(entry)):
                        listing.setdefault(composed(os.path.splitext(name)[0]), []).append(name)
            except (OSError, ValueError):  # a key may contain anything
                pass
            self._listings[folder] = listing
        return self._listings[folder]


def _readings(key: str) -> list[str]:
    windows = PureWindowsPath(key)
    if os.name == "nt" or not ("\\" in key or windows.drive):
        return [key]
    return [key, windows.as_posix(), windows.name]
