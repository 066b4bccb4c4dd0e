"""Captions: what becomes of a stored caption each time its image is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from library.data.options import CaptionOptions


def process_caption(
    caption: str, options: CaptionOptions, draw: random.Random, *, epoch: int, step: int, max_train_steps: int
) -> str:
    """The caption to train on, for one draw.

    In this order: prefix and suffix; whole-caption dropout; then, on the comma-separated parts, warm-up, shuffling
    and dropout of all but the first `keep_tokens`. A caption that needs none of the last three keeps its spacing.
    `epoch` counts from 1; `step` is the number of optimizer updates done; `draw` belongs to this draw alone.
    """
    if options.caption_prefix:
        caption = f"{options.caption_prefix} {caption}"
    if options.caption_suffix:
        caption = f"{caption} {options.caption_suffix}"
    every = options.caption_dropout_every_n_epochs
    if options.caption_dropout_rate > 0 and draw.random() < options.caption_dropout_rate:
        return ""
    if every > 0 and epoch % every == 0:
        return ""
    if not (options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0):
        return caption
    parts = [part.strip() for part in caption.strip().split(",")]
    parts = parts[: _warmed_up(len(parts), options, step, max_train_steps)]
    fixed, loose = parts[: options.keep_tokens], parts[options.keep_tokens :]
    if options.shuffle_caption:
        draw.shuffle(loose)
    if options.caption_tag_dropout_rate > 0:
        loose = [part for part in loose if draw.random() >= options.caption_tag_dropout_rate]
    return ", ".join(fixed + loose)


def _warmed_up(num_parts: int, options: CaptionOptions, step: int, max_train_steps: int) -> int:
    """How many parts of the caption are used at `step`."""
    length = options.token_warmup_step
    if length < 1:
        length = int(length * max_train_steps)
    if step >= length:
        return num_parts
    return int(step * (num_parts - options.token_warmup_min) / length) + options.token_warmup_min


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part occurs, in lower case, before any processing."""
    tags = (part.strip().lower() for caption in captions for part in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))
