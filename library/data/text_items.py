"""What of a run's images goes into a cache of encoded text: one item per image."""

from __future__ import annotations

import os

from library.data.config import SubsetConfig
from library.data.loading import Samples
from library.data.text_cache_files import TextItem, text_file_names
from library.data.text_variations import versions_of

CAPTION_EXTENSIONS = (".txt", ".caption")


def text_items(samples: Samples, num_versions: int | None) -> list[TextItem]:
    """The captions of each image of `samples`, in their order; `num_versions` where an option varies them."""
    versions = [
        versions_of(image.record.caption, samples.subsets[image.subset].caption, num_versions)
        for image in samples.images
    ]
    paths = [image.record.path for image in samples.images]
    names = text_file_names(list(zip(paths, versions, strict=True)))
    return [
        TextItem(
            image=image.record.path,
            captions=captions,
            stored=image.record.caption,
            sources=_sources(image.record.path, samples.subsets[image.subset]),
            npz=name,
        )
        for image, captions, name in zip(samples.images, versions, names, strict=True)
    ]


def _sources(path: str, subset: SubsetConfig) -> tuple[str, ...]:
    """The files that an image's stored caption may come from, whether they are there or not."""
    if subset.is_metadata:
        return (str(subset.source),)
    base = os.path.splitext(path)[0]
    return tuple(
        base + extension for extension in dict.fromkeys((subset.caption.caption_extension, *CAPTION_EXTENSIONS))
    )
