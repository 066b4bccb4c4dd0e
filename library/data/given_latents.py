"""Latents that a metadata file's images bring along: used without caching, where a whole dataset has them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence

from library.data.cache import DiskLatents, refuse_without_image, states_of
from library.data.cache_files import UNCHECKED, VALID, CacheItem
from library.data.config import DatasetConfig
from library.data.folder_contents import FolderContents
from library.data.images import find_broken
from library.data.record_table import RecordTable
from library.data.records import ImageRecord
from library.options import OptionError
from library.wording import counted

logger = logging.getLogger(__name__)


def datasets_with_latents(
    configs: Sequence[DatasetConfig], found: Sequence[FolderContents]
) -> tuple[frozenset[int], dict[str, str]]:
    """The numbers of the datasets that bring latents for all their images, as far as can be told without reading them.

    Also the images that only come as latents and can't be used, with the reason. `found` has what each subset's
    folder holds, dataset by dataset.
    """
    contents = iter(found)
    with_latents, unusable = set(), {}
    for number, config in enumerate(configs):
        folders = [next(contents).images for _ in config.subsets]
        if all(isinstance(images, RecordTable) for images in folders):  # folders bring none
            continue
        records = [record for images in folders for record in images]
        if not any(record.metadata and record.metadata.npz for record in records):
            continue
        why_not = _why_not(config, records)
        if why_not is None:
            with_latents.add(number)
            continue
        names = ", ".join(subset.source.name for subset in config.subsets)
        logger.info("%s: the latents beside the images are not used: %s", names, why_not)
        without_image = [record.path for record in records if record.metadata and not record.metadata.has_image]
        unusable |= dict.fromkeys(without_image, f"there is no image, and its latents can't be used: {why_not}")
    return frozenset(with_latents), unusable


def _why_not(config: DatasetConfig, records: Sequence[ImageRecord]) -> str | None:
    """What speaks against using the latents beside a dataset's images; all or none, as they share batches."""
    total = len(records)
    for name in ("color_aug", "random_crop"):
        if any(getattr(subset.augment, name) for subset in config.subsets):
            return f"{name} changes the images"
    if config.train_sizes is None:
        without = sum(record.metadata is None or record.metadata.train_wh is None for record in records)
        return f"{without} of {total} images have no train_resolution"
    without = sum(record.metadata is None or record.metadata.npz is None for record in records)
    return f"{without} of {total} images have none" if without else None


def given_latents(
    items: Sequence[CacheItem], vae_fingerprint: str, *, left_to: str | None = None, is_checked: bool = True
) -> DiskLatents:
    """The latents that datasets bring along, as far as all of a dataset's are valid.

    `left_to` says what becomes of the images of other datasets; None where they will be encoded one by one, so that
    each valid file counts for itself. Raises OptionError for invalid latents without an image.
    """
    given = [index for index, item in enumerate(items) if item.given_with is not None]
    states = states_of(items, given, vae_fingerprint, is_checked=is_checked)
    invalid = {index: state.reason for index, state in states.items() if state.reason not in VALID}
    refuse_without_image({items[index].npz: why for index, why in invalid.items() if not items[index].has_image})
    if left_to is None:
        used = [index for index in given if index not in invalid]
    else:
        spoilt = {items[index].given_with for index in invalid}
        used = [index for index in given if items[index].given_with not in spoilt]
        if invalid:
            _fall_back(
                [items[index] for index in given if items[index].given_with in spoilt], invalid.values(), left_to
            )
    _report(Counter(states[index].reason for index in used))
    image_hashes = {index: states[index].image_hash for index in used if states[index].reason != UNCHECKED}
    return DiskLatents(items, vae_fingerprint, image_hashes, used, is_checked=is_checked)


def _fall_back(items: Sequence[CacheItem], reasons: Collection[str], left_to: str) -> None:
    """Say why a dataset's latents are not used, and check its images, which nobody has looked at."""
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()))
    logger.warning("latents beside %s are not used (%s); %s", counted(len(items), "image"), told, left_to)
    refuse_without_image({item.npz: "others of its dataset can't be used" for item in items if not item.has_image})
    if broken := find_broken([item.path for item in items]):
        table = "".join(f"\n  {path}: {why}" for path, why in sorted(broken.items()))
        problem = f"{counted(len(broken), 'broken image')}, and latents beside them can't be used ({told})"
        raise OptionError("training images", f"{problem}; mend or remove them:{table}")


def _report(used: Counter[str]) -> None:
    if not used:
        return
    foreign = used["of another program"]
    unknown = f"; {foreign} can't be checked: they don't say which VAE made them" if foreign else ""
    logger.info("latents: %d taken from the files beside the images%s", sum(used.values()), unknown)
