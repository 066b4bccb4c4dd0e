"""Which captions can be cached as encoded text. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from library.data.config import DatasetConfig
from library.data.options import CaptionOptions
from library.data.text_cache_options import FLAG, TextCacheOptions
from library.options import require

VARYING = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")  # what makes versions of a caption


def check_text_cacheable(configs: Sequence[DatasetConfig], cache: TextCacheOptions) -> list[str]:
    """Raise OptionError where text is to be cached that changes with every draw; returns notes on what has no effect.

    With --text_variations what changes by chance may be cached, but nothing that changes with the step. Whole-caption
    dropout puts the empty caption in place of another, which every cache holds.
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
        chances = [name for name in VARYING if getattr(subset.caption, name)]
        require(
            not chances or cache.text_variations is not None,
            FLAG,
            f"contradicts {' and '.join(chances)} of {subset.source}: cached captions stay the same in every epoch",
            "add --text_variations 10 to cache ten versions of each, or leave out one of them",
        )
    if cache.text_variations is not None and not any(varies(subset.caption) for subset in subsets):
        return ["--text_variations: one version of each caption is cached, no option makes others"]
    return []


def varies(options: CaptionOptions) -> bool:
    """Whether an option makes versions of captions."""
    return any(getattr(options, name) for name in VARYING)
