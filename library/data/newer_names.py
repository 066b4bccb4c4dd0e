"""Caches of latents under the name that newer programs of the trade give them: `<base>_<width>x<height>_sd.npz`.

Width and height, four digits each, are the image's own. Such files are only read; what is written here goes by the
older name `<base>.npz`, which also counts where both are valid.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from library.data.cache_files import VALID, CacheItem, state_of


def under_found_names(items: Sequence[CacheItem], vae_fingerprint: str, *, is_checked: bool = True) -> list[CacheItem]:
    """The items with the newer name of their file, where the older one is of no use and the newer one is.

    The same in every process, whatever others write meanwhile: a file is only written where neither name is of use.
    Without `is_checked`, every file that is there is of use.
    """

    def is_useful(item: CacheItem) -> bool:
        return state_of(item, vae_fingerprint).reason in VALID if is_checked else os.path.isfile(item.npz)

    found = []
    for item in items:
        other = newer_name(item)
        is_newer = other is not None and os.path.isfile(other) and not is_useful(item)
        renamed = replace(item, npz=other) if is_newer else item
        found.append(renamed if renamed is item or is_useful(renamed) else item)
    return found


def newer_name(item: CacheItem) -> str | None:
    """None for an image that shares its older name: whose the newer one would be can't be told.

    Nor for latents that a dataset is to bring along: metadata lead to the older name.
    """
    base = os.path.splitext(item.path)[0]
    if not item.has_image or item.other_precisions or item.npz != f"{base}.npz":
        return None
    width, height = item.size_wh
    return f"{base}_{width:04d}x{height:04d}_sd.npz"
