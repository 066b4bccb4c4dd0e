"""Cache files beside images that belong to nothing any more: the image is gone, or is no longer trained at that size.

What may be removed is narrow: files that hold what a cache holds and nothing else, by the names of their arrays, and
unfinished files that a killed run left. Everything that may belong to an image outside the data set stays.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from library.data.cache_files import KEYS, CacheItem
from library.data.listing import is_image
from library.data.newer_names import newer_name
from library.data.npz_files import DAMAGE, FINGERPRINT, array_names
from library.data.text_cache_files import ENDING, TextItem

# as save_arrays names them, of .npz files and packs
UNFINISHED = re.compile(r"(\.npz|^latents_\d+x\d+(\.\d+)?\.pack)\.[0-9a-f]{8}\.tmp$")
UNFINISHED_FOR = 3600  # seconds: younger ones may be another run's, at work
LATENT_ARRAYS = frozenset(KEYS[:1] + KEYS[2:4])  # latents, original_size, crop_ltrb: what every file has
TEXT_ARRAYS = frozenset({"hidden_state1"})
ANY_LATENT_ARRAY = re.compile("|".join(KEYS))
ANY_TEXT_ARRAY = re.compile(rf"(hidden_state|pool)\d(_v\d+)?|{FINGERPRINT}")  # as TextMaking.keys names them


class Leftover(NamedTuple):
    """A file that belongs to nothing any more."""

    file: str
    reason: str
    size: int  # bytes


@dataclass(frozen=True)
class Leftovers:
    """What was found in the folders of a data set."""

    files: tuple[Leftover, ...]
    num_looked_at: int  # files that may be caches, by their names

    def remove(self) -> dict[str, str]:
        """Remove them; returns why not by file, for those that are still there."""
        failures: dict[str, str] = {}
        for leftover in self.files:
            try:
                os.remove(leftover.file)
            except FileNotFoundError:
                pass
            except OSError as error:
                failures[leftover.file] = error.strerror or str(error)
        return failures


def latent_leftovers(items: Sequence[CacheItem]) -> Leftovers:
    """Files of cached latents in the items' folders that are of none of them."""
    expected = {name for item in items for name in (item.npz, item.flipped_npz, newer_name(item)) if name}
    return _leftovers(
        [item.path for item in items],
        expected,
        lambda path: (
            not os.path.splitext(path)[0].partition(ENDING)[1] and _holds(path, LATENT_ARRAYS, ANY_LATENT_ARRAY)
        ),
    )


def text_leftovers(items: Sequence[TextItem]) -> Leftovers:
    """Files of cached text in the items' folders that are of none of them."""
    return _leftovers(
        [item.image for item in items],
        {item.npz for item in items},
        lambda path: ENDING in os.path.basename(path) and _holds(path, TEXT_ARRAYS, ANY_TEXT_ARRAY),
    )


def _leftovers(images: Sequence[str], expected: Collection[str], is_cache: Callable[[str], bool]) -> Leftovers:
    known = {os.path.abspath(path) for path in images}
    kept = {os.path.abspath(name) for name in expected}
    files: list[Leftover] = []
    num_looked_at = 0
    for folder in sorted({os.path.dirname(path) for path in [*images, *expected]}):
        names = _names(folder)
        pictures = [name for name in names if is_image(name)]
        candidates = [name for name in names if name.endswith(".npz") or UNFINISHED.search(name)]
        num_looked_at += len(candidates)
        starts = {is_known: _starts(folder, pictures, known, is_known=is_known) for is_known in (True, False)}
        for name in candidates:
            path = os.path.join(folder, name)
            if os.path.abspath(path) in kept:
                continue
            if reason := _why_left_over(path, starts[True], starts[False], is_cache):
                files.append(Leftover(path, reason, os.path.getsize(path)))
    return Leftovers(tuple(files), num_looked_at)


def _why_left_over(path: str, of_data: Set[str], of_others: Set[str], is_cache: Callable[[str], bool]) -> str | None:
    """None for a file that has its place; else why it has none."""
    name = os.path.basename(path)
    if UNFINISHED.search(name):
        is_old = time.time() - os.path.getmtime(path) > UNFINISHED_FOR
        return "was left unfinished" if is_old else None
    if _beginnings(name) & of_others or not is_cache(path):
        return None
    if _beginnings(name) & of_data:
        return "its image is in the data, but not with this size or caption"
    return "its image is gone"


def _starts(folder: str, pictures: Iterable[str], known: Collection[str], *, is_known: bool) -> set[str]:
    """What names of cache files of these pictures begin with: of those in the data set, or of the others."""
    chosen = [name for name in pictures if (os.path.abspath(os.path.join(folder, name)) in known) == is_known]
    return {start for name in chosen for start in (name, os.path.splitext(name)[0])}


def _beginnings(name: str) -> set[str]:
    """What a cache file's image may be called, with or without extension: all that its name allows."""
    stem = name.removesuffix(".npz")
    found = {stem}
    for separator in (".", "_"):  # img.png.64x64, img_0080x0060_sd, img_flip, img_te_outputs.1a2b3c4d
        parts = stem.split(separator)
        found |= {separator.join(parts[:count]) for count in range(1, len(parts))}
    return found


def _holds(path: str, needed: Set[str], known: re.Pattern[str]) -> bool:
    """Whether a file has all the arrays of a cache that are needed, and none that a cache does not have."""
    try:
        names = array_names(path)
    except DAMAGE:
        return False
    return needed <= names and all(known.fullmatch(name) for name in names)


def _names(folder: str) -> list[str]:
    with os.scandir(folder or ".") as entries:
        return sorted(entry.name for entry in entries if entry.is_file())
