"""Captions: what becomes of a stored caption each time its image is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from library.data.options import CaptionOptions
from library.text.wildcards import expand_wildcards


def process_caption(
    caption: str, options: CaptionOptions, draw: random.Random, *, epoch: int, step: int, max_train_steps: int
) -> str:
    """The caption to train on, for one draw.

    In this order: whole-caption dropout; with wildcards, the choice of one line; prefix and suffix; wildcards; then,
    on the parts between separators, warm-up, shuffling and dropout of all but the kept ones; the secondary separator.
    A caption that needs none of this keeps its spacing. `epoch` counts from 1; `step` is the number of optimizer
    updates done; `draw` belongs to this draw alone.
    """
    every = options.caption_dropout_every_n_epochs
    if options.caption_dropout_rate > 0 and draw.random() < options.caption_dropout_rate:
        return ""
    if every > 0 and epoch % every == 0:
        return ""
    if options.enable_wildcard:
        caption = _one_line(caption, draw)
    if options.caption_prefix:
        caption = f"{options.caption_prefix} {caption}"
    if options.caption_suffix:
        caption = f"{caption} {options.caption_suffix}"
    if options.enable_wildcard:
        caption = expand_wildcards(caption, draw)
    if options.varies_parts or _is_divided(caption, options):
        parts = _divided(caption, options)
        loose = parts.loose[: _warmed_up(len(parts.loose), options, step, max_train_steps)]
        if options.shuffle_caption:
            draw.shuffle(loose)
        if options.caption_tag_dropout_rate > 0:
            loose = [part for part in loose if draw.random() >= options.caption_tag_dropout_rate]
        caption = options.joint.join(parts.first + loose + parts.last)
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def _one_line(caption: str, draw: random.Random) -> str:
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    return draw.choice(lines) if len(lines) > 1 else caption


class _Parts(NamedTuple):
    first: list[str]  # kept in place, as `last`
    loose: list[str]
    last: list[str]


def _is_divided(caption: str, options: CaptionOptions) -> bool:
    """Whether the caption itself says which of its parts are kept."""
    return bool(options.keep_tokens_separator) and options.keep_tokens_separator in caption


def _divided(caption: str, options: CaptionOptions) -> _Parts:
    if not _is_divided(caption, options):
        parts = _split(caption.strip(), options)
        return _Parts(parts[: options.keep_tokens], parts[options.keep_tokens :], [])
    sections = caption.split(options.keep_tokens_separator, 2)
    first, loose, last = ([part for part in _split(section, options) if part] for section in (*sections, "")[:3])
    return _Parts(first, loose, last)


def _split(text: str, options: CaptionOptions) -> list[str]:
    return [part.strip() for part in text.split(options.caption_separator)]


def _warmed_up(num_loose: int, options: CaptionOptions, step: int, max_train_steps: int) -> int:
    """How many of the loose parts are used at `step`."""
    length = options.token_warmup_step
    if length < 1:
        length = int(length * max_train_steps)
    if step >= length:
        return num_loose
    return int(step * (num_loose - options.token_warmup_min) / length) + options.token_warmup_min


def tag_frequency(captions: Iterable[str], separator: str = ",") -> dict[str, int]:
    """How often each part between separators occurs, in lower case, before any processing."""
    tags = (part.strip().lower() for caption in captions for part in caption.split(separator))
    return dict(Counter(tag for tag in tags if tag))
