"""Which text file in a folder is the caption of which image. Nothing is opened here."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from library.data.listing import is_hidden

CAPTION_FALLBACKS = (".txt", ".caption")  # what people have when nothing has the extension asked for
FACE_PIECES = 4  # "name_cx_cy_w_h": a face position in the file name, which the caption's name may lack


def caption_files(names: Iterable[str], files: Sequence[str], extension: str) -> dict[str, str | None]:
    """Image name -> name of its caption file among the sorted `files` of the same folder; None where there is none."""
    spellings = Spellings(files)
    return {name: caption_name(name, spellings, extension) for name in names}


class Spellings:
    """The files of a folder, sorted by name: found as they are, composed, and with their extension in lower case."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self._others: dict[str, str] = {}
        odd = [name for name in files if not name.isascii() or name != name.lower()]  # others have one spelling
        for spelling in (composed, _with_small_extension):
            for name in odd:
                self._others.setdefault(spelling(name), name)

    def get(self, name: str) -> str | None:
        """The file of a name; None where there is none."""
        row = bisect_left(self.files, name)
        if row < len(self.files) and self.files[row] == name:
            return self.files[row]
        return self._others.get(name)


def _with_small_extension(name: str) -> str:
    stem, extension = os.path.splitext(composed(name))
    return stem + extension.lower()


def composed(name: str) -> str:
    """The one of Unicode's ways to write a name that most systems use; macOS writes accents as letters (UAX #15)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def extension_in_use(names: Sequence[str], files: Spellings, asked: str) -> str:
    """The extension asked for, or another where only that occurs."""
    for extension in (asked, *CAPTION_FALLBACKS):
        ending = extension.lower()
        if any(name.lower().endswith(ending) for name in files.files) and any(
            caption_name(name, files, extension) for name in names
        ):
            return extension
    return asked


def caption_name(image_name: str, files: Spellings, extension: str) -> str | None:
    """The caption file of an image, whose extension may be in capitals."""
    stem = os.path.splitext(image_name)[0]
    if (usual := files.get(stem + extension)) is not None:
        return usual
    pieces = stem.split("_")
    stems = [stem, "_".join(pieces[:-FACE_PIECES])] if len(pieces) > FACE_PIECES else [stem]
    tries = [stem + ending for stem in stems for ending in (extension, extension.lower())]
    tries += [composed(name) for name in tries]
    return next((found for name in tries if (found := files.get(name)) is not None), None)


def captions_alone(files: Iterable[str], used: Iterable[str | None], *extensions: str) -> list[str]:
    """Those of a folder's `files` that are caption files by their name and not `used` by any image."""
    of_images, endings = frozenset(used), tuple(extension.lower() for extension in extensions)
    return [name for name in files if name not in of_images and name.lower().endswith(endings) and not is_hidden(name)]


def sharing(names: Sequence[str], texts: Sequence[str | None]) -> list[str]:
    """The images whose caption file is that of another image too; `texts` are the images' caption files."""
    if len(set(texts) - {None}) == len(texts) - texts.count(None):
        return []
    uses = Counter(texts)
    return [name for name, text in zip(names, texts, strict=True) if text is not None and uses[text] > 1]
