"""U-Net blocks as lists of values: block index of a module, ranks, alphas and learning-rate weights per block.

The lists are a format of the trade. SD 1.x / 2.x count 25 blocks (12 down, 1 mid, 12 up); SDXL counts 23: the
embeddings (never adapted), 9 input, 3 middle, 9 output blocks and the output layer (never adapted).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from library.options import OptionError, did_you_mean

logger = logging.getLogger(__name__)

SD_BLOCK = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
SDXL_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_")


def sd_block_index(name: str) -> int:
    """The block of an SD 1.x / 2.x U-Net module by its underscored name: 1-11 down, 12 mid, 13-24 up; -1 for others."""
    if "mid_block_" in name:
        return 12
    match = SD_BLOCK.search(name + "_")
    if match is None:
        return -1
    direction, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
    within = layer if kind in ("resnets", "attentions") else 2
    return (1 if direction == "down" else 13) + 3 * level + within


def sdxl_block_index(name: str) -> int:
    """The block of an SDXL U-Net module by its underscored name: 1-9 input, 10-12 mid, 13-21 output; -1 for others."""
    match = SDXL_BLOCK.search(name + "_")
    if match is None:
        return -1
    return {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}[match[1]] + int(match[2])


@dataclass(frozen=True)
class BlockLayout:
    """How the blocks of one kind of U-Net are counted."""

    model: str
    ends: int  # positions before the first down and after the last up block, adapted by nothing
    down: int
    mid: int
    up: int
    index: Callable[[str], int]

    @property
    def size(self) -> int:
        return 2 * self.ends + self.down + self.mid + self.up


SD_LAYOUT = BlockLayout("SD 1.x / 2.x", 0, 12, 1, 12, sd_block_index)
SDXL_LAYOUT = BlockLayout("SDXL", 1, 9, 3, 9, sdxl_block_index)


def layout_of(names: list[str]) -> BlockLayout:
    """The layout that the names of a U-Net's modules belong to."""
    return SDXL_LAYOUT if any(SDXL_BLOCK.search(name) for name in names) else SD_LAYOUT


# ------------------------------------------------------------------------------------ learning-rate weights


@dataclass(frozen=True)
class Curve:
    """A preset of learning-rate weights: its shape over positions 0 (first block) to 1 (last block), plus `base`."""

    preset: str
    base: float

    def values(self, count: int) -> tuple[float, ...]:
        last = max(count - 1, 1)
        return tuple(PRESETS[self.preset](i / last) + self.base for i in range(count))


PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda position: math.sin(math.pi / 2 * position),
    "cosine": lambda position: math.sin(math.pi / 2 * (1 - position)),
    "linear": lambda position: position,
    "reverse_linear": lambda position: 1 - position,
    "zeros": lambda position: 0.0,
}

Weights = Curve | tuple[float, ...]


def parse_weights(text: str | float, key: str) -> Weights:
    """ "0.1,,1" is a list (empty = 0), "sine" or "sine+0.25" a preset, a lone number that weight for every block."""
    text = str(text).strip()
    if "," in text:
        return tuple(number(item, key) if item.strip() else 0.0 for item in text.split(","))
    preset, plus, base = text.partition("+")
    if preset.strip() in PRESETS:
        return Curve(preset.strip(), number(base, key) if plus else 0.0)
    if not _reads_as_number(text):
        known = ", ".join(PRESETS)
        hint = (
            did_you_mean(preset, PRESETS) or f"use comma-separated numbers, or one of {known}, with +number if wanted"
        )
        raise OptionError(argument(key), f"{text!r} is neither numbers nor a preset", hint)
    return Curve("zeros", number(text, key))


def _expanded(weights: Weights, count: int, key: str) -> tuple[float, ...]:
    if isinstance(weights, Curve):
        return weights.values(count)
    if len(weights) > count:
        logger.warning("%s has %d values for %d blocks; the last %d are left out",
                       argument(key), len(weights), count, len(weights) - count)  # fmt: skip
    if len(weights) < count:
        logger.warning("%s has %d values for %d blocks; the others get 1.0", argument(key), len(weights), count)
    return (weights + (1.0,) * count)[:count]


# ------------------------------------------------------------------------------------ all settings per block


@dataclass(frozen=True)
class BlockRanks:
    """Ranks and alphas by block index; `conv_*` for k x k convolutions, `conv_dims` None if they get no module."""

    dims: tuple[int, ...]
    alphas: tuple[float, ...]
    conv_dims: tuple[int, ...] | None
    conv_alphas: tuple[float, ...]


@dataclass(frozen=True)
class BlockSettings:
    """The per-block arguments as given, by their keys; None where not given."""

    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: Weights | None = None
    mid_lr_weight: Weights | None = None
    up_lr_weight: Weights | None = None
    block_lr_zero_threshold: float = 0.0

    def lr_weights(self, layout: BlockLayout) -> tuple[float, ...] | None:
        """A weight per block index, None if none is given: 1 for parts not given, 0 where not above the threshold."""
        parts = (("down_lr_weight", layout.down), ("mid_lr_weight", layout.mid), ("up_lr_weight", layout.up))
        if all(getattr(self, key) is None for key, _ in parts):
            return None
        values: list[float] = []
        for key, count in parts:
            weights = getattr(self, key)
            if weights is None:
                values += [1.0] * count
            else:
                expanded = _expanded(weights, count, key)
                values += [weight if weight > self.block_lr_zero_threshold else 0.0 for weight in expanded]
        ends = [1.0] * layout.ends
        return (*ends, *values, *ends)

    def ranks(
        self, layout: BlockLayout, *, dim: int, alpha: float, conv_dim: int | None, conv_alpha: float | None
    ) -> BlockRanks | None:
        """Ranks and alphas per block, rank 0 where the learning-rate weight is 0; None if nothing is set per block."""
        lists = {key: getattr(self, key) for key in LIST_KEYS}
        weights = self.lr_weights(layout)
        if weights is None and all(values is None for values in lists.values()):
            return None
        for key, values in lists.items():
            if values is not None and len(values) != layout.size:
                raise OptionError(
                    argument(key), f"has {len(values)} values; an {layout.model} U-Net has {layout.size} blocks"
                )
        trained = [weight != 0 for weight in weights or (1.0,) * layout.size]

        def switched(ranks: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(rank * on for rank, on in zip(ranks, trained, strict=True))

        conv_dims = self.conv_block_dims or ((conv_dim,) * layout.size if conv_dim else None)
        return BlockRanks(
            dims=switched(self.block_dims or (dim,) * layout.size),
            alphas=self.block_alphas or (alpha,) * layout.size,
            conv_dims=switched(conv_dims) if conv_dims else None,
            conv_alphas=self.conv_block_alphas or (1.0 if conv_alpha is None else conv_alpha,) * layout.size,
        )


LIST_KEYS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
WEIGHT_KEYS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
BLOCK_KEYS = (*LIST_KEYS, *WEIGHT_KEYS, "block_lr_zero_threshold")


def parse_blocks(arguments: Mapping[str, str | float | None]) -> BlockSettings:
    """The per-block settings among network arguments; OptionError names the one that can't be read."""
    given: dict[str, Any] = {key: arguments[key] for key in BLOCK_KEYS if arguments.get(key) is not None}
    for key in given:
        if key in WEIGHT_KEYS:
            given[key] = parse_weights(given[key], key)
        elif key in LIST_KEYS:
            given[key] = _numbers(given[key], key)
        else:
            given[key] = not_negative(number(given[key], key), key)
    return BlockSettings(**given)


def argument(key: str) -> str:
    """How messages name a network argument."""
    return f"--network_args {key}"


def _numbers(text: str | float, key: str) -> tuple[float, ...]:
    values = tuple(number(item, key) for item in str(text).split(","))
    if not key.endswith("dims"):
        return tuple(not_negative(value, key) for value in values)
    if any(value < 0 or value != int(value) for value in values):
        raise OptionError(argument(key), f"{text!r} must be whole numbers of 0 or more")
    return tuple(int(value) for value in values)


def number(value: str | float, key: str) -> float:
    """A network argument's value as a finite number; OptionError names the argument."""
    if not _reads_as_number(value) or not math.isfinite(float(value)):
        raise OptionError(argument(key), f"{str(value).strip()!r} is not a number")
    return float(value)


def not_negative(value: float, key: str) -> float:
    """The value of a network argument that can't be below 0."""
    if value < 0:
        raise OptionError(argument(key), f"{value:g} is negative", "use 0 or more")
    return value


def _reads_as_number(value: str | float) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
