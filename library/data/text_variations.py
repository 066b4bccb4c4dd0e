"""The captions that a cache of encoded text holds of an image, and which of them a draw gets.

Without options that vary a caption there is one; with them there are as many as --text_variations says. They follow
from the caption alone, so that a cache serves every run. Whole-caption dropout needs no versions: it is drawn as ever.
"""

from __future__ import annotations

import random
from dataclasses import replace

from library.data.captions import process_caption
from library.data.options import CaptionOptions
from library.data.text_cache_check import varies
from library.randomness import python_random

VERSION_SEED = 0


def versions_of(caption: str, options: CaptionOptions, num_versions: int | None) -> tuple[str, ...]:
    """The processed versions of a stored caption: a function of these arguments alone."""
    kept = replace(options, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    count = num_versions or 1 if varies(options) else 1
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
