"""Caches of latents and of text, filled, checked and cleaned before any training.

The data, the models and their precision are those of a training run with the same options, so that what is written
here is what that run looks for. Processes share the work by number and never wait for each other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator

from library.data.cache_audit import FileState, latent_states, text_states, verdicts
from library.data.cache_leftovers import Leftovers, latent_leftovers, text_leftovers
from library.data.dataset import TrainingData
from library.data.text_cache import EncodeText
from library.families.base import ModelBundle, ModelFamily
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.models import float8, vae
from library.train import placement
from library.train.caching_preflight import CheckedCaching
from library.train.run_sections import size
from library.train.text_caching import encoded, fingerprint
from library.wording import counted

logger = logging.getLogger(__name__)

FAMILIES: dict[str, type[ModelFamily]] = {"sd": StableDiffusion, "sdxl": StableDiffusionXL}


def cache_latents(checked: CheckedCaching) -> int:
    """Fill the cache of latents, or check or clean it; returns the exit code."""
    options, config = checked.options, checked.config
    data = _data(checked, checks_images=not (options.verify or options.gc))
    if options.gc:
        return _cleaned(latent_leftovers(data.cache_items()), is_confirmed=options.yes)
    accelerator = placement.make_accelerator(config, autocast=False)
    _, bundle = _loaded(checked, "vae", torch.device("cpu") if options.verify else accelerator.device)
    vae_fingerprint = vae.fingerprint(bundle.vae)
    if options.verify:
        return _verified(latent_states(data.cache_items(), vae_fingerprint, packed=config.cache.is_packed))
    data.cache_latents(
        partial(vae.encode, bundle.vae),
        vae_fingerprint,
        config.cache,
        trusts_others=options.skip_existing,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    _leave(accelerator)
    return 0


def cache_texts(checked: CheckedCaching) -> int:
    """Fill the cache of text, or check or clean it; returns the exit code."""
    options, config = checked.options, checked.config
    data = _data(checked, checks_images=False)
    items = data.text_items(config.text_cache.text_variations)
    if options.gc:
        return _cleaned(text_leftovers(items), is_confirmed=options.yes)
    accelerator = placement.make_accelerator(config, autocast=False)
    encode, encoders = _text_encoding(checked, accelerator.device)
    if options.verify:
        return _verified(text_states(items, encode, encoders))
    data.cache_texts(
        encode,
        encoders,
        config.text_cache,
        is_checked=not config.cache.skip_cache_check,
        trusts_others=options.skip_existing,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    _leave(accelerator)
    return 0


def _data(checked: CheckedCaching, *, checks_images: bool) -> TrainingData:
    config = checked.config
    return TrainingData.build(
        checked.datasets,
        seed=config.training.seed or 0,
        on_bad_image=config.source.on_bad_image,
        checks_images=checks_images,
    )


def _loaded(checked: CheckedCaching, part: str, device: torch.device) -> tuple[ModelFamily, ModelBundle]:
    """The model of which only one part is read, in the precision that training gives it."""
    config, family = checked.config, FAMILIES[checked.family]()
    plan = replace(placement.load_plan(config, device), parts=frozenset({part}))
    return family, family.load(config.model, config.attention, plan)


def _text_encoding(checked: CheckedCaching, device: torch.device) -> tuple[EncodeText, str]:
    """What encodes captions, and what identifies it."""
    config = checked.config
    family, bundle = _loaded(checked, "text_encoders", device)
    if config.precision.stores_text_in_8_bits:
        for encoder in bundle.text_encoders:
            float8.store(encoder)
    return partial(encoded, family, bundle, config.text), fingerprint(bundle.text_encoders, config.text)


def _leave(accelerator: Accelerator) -> None:
    """Part from the other processes without waiting for them."""
    if accelerator.num_processes > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------- checking, cleaning


def _verified(states: Sequence[FileState]) -> int:
    """Say what was found; 1 where a file is not as it should be."""
    for state in states:
        if not state.is_valid:
            logger.warning("%s: %s", state.file, state.reason)
    width = max(len(verdict) for verdict in verdicts(states))
    for verdict, count in verdicts(states).items():
        logger.info("  %s  %6d", verdict.ljust(width), count)
    invalid = sum(not state.is_valid for state in states)
    logger.info("%s checked, %d not valid", counted(len(states), "cache file"), invalid)
    return 1 if invalid else 0


def _cleaned(leftovers: Leftovers, *, is_confirmed: bool) -> int:
    """List what belongs to nothing any more, and remove it where that is confirmed; 1 where that fails."""
    num_bytes = sum(leftover.size for leftover in leftovers.files)
    for leftover in leftovers.files:
        logger.info("%s: %s", leftover.file, leftover.reason)
    found = f"{counted(len(leftovers.files), 'file')} ({size(num_bytes)}) of {leftovers.num_looked_at:,} looked at"
    if not leftovers.files:
        logger.info("nothing to remove: every cache file (%s looked at) belongs to the data", leftovers.num_looked_at)
    elif is_confirmed:
        failures = leftovers.remove()
        for file, why in failures.items():
            logger.error("can't remove %s (%s)", file, why)
        logger.info("%s: %d removed", found, len(leftovers.files) - len(failures))
        return 1 if failures else 0
    else:
        logger.info("%s: would be removed, add --yes", found)
    return 0
