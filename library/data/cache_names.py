"""How files of cached latents are named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence

from library.data.buckets import Placement
from library.data.cache_files import size_text


def cache_file_names(images: Sequence[tuple[str, Placement]], taken: Collection[str] = ()) -> list[str]:
    """The cache file of each image: `<base>.npz` as in the trade, longer where two would share that name.

    Images of one stem but several extensions use the whole file name; one image trained at several sizes has the
    sizes in the name. Equal (path, placement) pairs share a file. Names that are `taken` count as shared.
    """
    unique = list(dict.fromkeys(images))
    names = {image: f"{os.path.splitext(image[0])[0]}.npz" for image in unique}
    for lengthen in (
        lambda path, _: f"{path}.npz",
        lambda path, placement: f"{path}.{size_text(placement.bucket_wh)}.npz",
        lambda path, placement: f"{path}.{size_text(placement.bucket_wh)}.{size_text(placement.resized_wh)}.npz",
        lambda path, placement: (
            f"{path}.{size_text(placement.bucket_wh)}.{size_text(placement.resized_wh)}"
            f".{placement.interpolation or 'default'}.npz"
        ),
    ):
        uses = Counter([*names.values(), *taken])
        names = {image: lengthen(*image) if uses[name] > 1 else name for image, name in names.items()}
    return [names[image] for image in images]
