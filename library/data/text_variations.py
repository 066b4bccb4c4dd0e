"""The captions that a cache of encoded text holds of an image, and which of them a draw gets.

Without options that vary a caption there is one; with them there are as many as --text_variations says. They follow
from the caption alone, so that a cache serves every run. Whole-caption dropout needs no versions: it is drawn as ever.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from library.data.captions import process_caption
from library.data.config import DatasetConfig
from library.data.options import CaptionOptions
from library.data.text_cache_options import FLAG, TextCacheOptions
from library.options import require
from library.randomness import python_random

VERSION_SEED = 0
VARYING = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")  # what makes versions of a caption
DROPPING = ("caption_dropout_rate", "caption_dropout_every_n_epochs")  # what replaces it by the empty one


def check_text_cacheable(configs: Sequence[DatasetConfig], cache: TextCacheOptions) -> list[str]:
    """Raise OptionError where text is to be cached that changes with every draw; returns notes on what has no effect.

    With --text_variations what changes by chance may be cached, but nothing that changes with the step.
    """
    if not cache.enabled:
        return []
    subsets = [subset for config in configs for subset in config.subsets]
    for subset in subsets:
        require(
            not subset.caption.token_warmup_step,
            FLAG,
            f"contradicts token_warmup_step of {subset.source}: cached captions can't grow from step to step",
            "leave out one of them",
        )
        chances = [name for name in (*VARYING, *DROPPING) if getattr(subset.caption, name)]
        require(
            not chances or cache.text_variations is not None,
            FLAG,
            f"contradicts {' and '.join(chances)} of {subset.source}: cached captions stay the same in every epoch",
            "add --text_variations 10 to cache ten versions of each, or leave out one of them",
        )
    if cache.text_variations is not None and not any(_varies(subset.caption) for subset in subsets):
        return ["--text_variations: one version of each caption is cached, no option makes others"]
    return []


def _varies(options: CaptionOptions) -> bool:
    return any(getattr(options, name) for name in VARYING)


def versions_of(caption: str, options: CaptionOptions, num_versions: int | None) -> tuple[str, ...]:
    """The processed versions of a stored caption: a function of these arguments alone."""
    kept = replace(options, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    count = num_versions or 1 if _varies(options) else 1
    return tuple(
        process_caption(
            caption,
            kept,
            python_random(VERSION_SEED, "caption version", caption, index),
            epoch=1,
            step=0,
            max_train_steps=1,
        )
        for index in range(count)
    )


def drawn_version(options: CaptionOptions, num_versions: int, draw: random.Random, *, epoch: int) -> int | None:
    """Which of the versions one draw gets; None is the empty caption. `draw` belongs to this draw alone."""
    every = options.caption_dropout_every_n_epochs
    if options.caption_dropout_rate > 0 and draw.random() < options.caption_dropout_rate:
        return None
    if every > 0 and epoch % every == 0:
        return None
    return draw.randrange(num_versions) if num_versions > 1 else 0
