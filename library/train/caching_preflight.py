"""Everything about filling a cache that can be refused before torch is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.probe import MODEL_FLAG, check_vae, probe_any
from library.data.config import DatasetConfig, check_cacheable, check_dataset_class, face_crop_notes, load_configs
from library.data.mask_settings import settle_masks
from library.data.text_cache_check import check_text_cacheable
from library.families.options import SDXL_BUCKET_STEP
from library.options import OptionError
from library.train.caching_options import CachingOptions
from library.train.config import RunConfig
from library.train.preflight import as_found, check_bucket_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedCaching:
    """What is to be cached, of files that are there."""

    config: RunConfig  # its cache or its text_cache is on, on disk
    options: CachingOptions
    datasets: tuple[DatasetConfig, ...]
    family: str  # "sd" | "sdxl"


def check_caching(config: RunConfig, options: CachingOptions) -> CheckedCaching:
    """Raise OptionError for whatever can't work."""
    model = config.model
    assert model.pretrained_model_name_or_path is not None
    source = probe_any(model.pretrained_model_name_or_path, v2=model.v2)
    if options.sdxl and source.kind != "sdxl":
        raise OptionError("--sdxl", f"the model {source.path} is {KIND_NAMES[source.kind]}", "remove the flag")
    if config.text_cache.enabled and source.kind != "sdxl":
        problem = f"{source.path} is an {KIND_NAMES[source.kind]} model, and only SDXL trains on cached text"
        raise OptionError(MODEL_FLAG, problem, "name an SDXL model, or train without a cache of text")
    config = as_found(config, source)
    config.precision.check_beside(config.training)
    if options.gc and config.cache.is_packed:
        way_out = "remove the .pack files to start anew, or leave the flag out to clean up .npz files"
        raise OptionError("--cache_format", "packed contradicts --gc: packs are never thinned out", way_out)
    if model.vae:
        check_vae(model.vae)
    datasets = load_configs(config.source, config.bucket, config.caption, config.augment, config.loader, config.split,
                            config.masks)  # fmt: skip
    datasets = settle_masks(datasets, masked_loss=config.loss.masked_loss)
    _check_data(datasets, config)
    if source.kind == "sdxl":
        check_bucket_steps(datasets, SDXL_BUCKET_STEP)
    return CheckedCaching(config, options, datasets, "sdxl" if source.kind == "sdxl" else "sd")


def _check_data(datasets: Sequence[DatasetConfig], config: RunConfig) -> None:
    check_dataset_class(config.source, config.cache, config.text_cache)
    check_cacheable(datasets, config.cache)
    for note in [*check_text_cacheable(datasets, config.text_cache), *face_crop_notes(datasets, config.cache)]:
        logger.warning(note)
