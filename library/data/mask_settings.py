"""Which masks a run uses, settled before anything is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from library.data.config import DatasetConfig, SubsetConfig
from library.data.options import MaskOptions
from library.options import require

logger = logging.getLogger(__name__)


def settle_masks(configs: Sequence[DatasetConfig], *, masked_loss: bool) -> tuple[DatasetConfig, ...]:
    """The datasets with the masks that this run uses: files only with --masked_loss, alpha channels where asked for.

    Raises OptionError for a folder of masks that is not there, and for --masked_loss without any masks.
    """
    subsets = [subset for config in configs for subset in config.subsets]
    for folder in dict.fromkeys(subset.masks.conditioning_data_dir for subset in subsets):
        require(folder is None or os.path.isdir(folder), "conditioning_data_dir", f"{str(folder)!r} is not a folder")
    if masked_loss:
        way_out = "give a folder of masks (conditioning_data_dir) or use the images' alpha channel (alpha_mask)"
        if not configs:
            logger.warning("--masked_loss has no effect with --dataset_class, which brings no masks")
        has_masks = not configs or any(subset.masks.enabled for subset in subsets)
        require(has_masks, "--masked_loss", "there are no masks", way_out)
        return tuple(configs)
    if any(subset.masks.conditioning_data_dir for subset in subsets):
        logger.warning("conditioning_data_dir has no effect without --masked_loss")
    return tuple(
        replace(config, subsets=tuple(replace(subset, masks=_without_files(subset)) for subset in config.subsets))
        for config in configs
    )


def _without_files(subset: SubsetConfig) -> MaskOptions:
    return replace(subset.masks, conditioning_data_dir=None)
