"""The blocks of a model as users of block weights count them, and lists of weights for them. No torch.

The trade's table has 26 slots: BASE (text encoders), IN00-IN11, MID, OUT00-OUT11. Lists leave out the slots that
nothing stands in, or that a family does not have: 17 and 26 values are for SD 1.x / 2.x, 12 and 20 for SDXL.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.checkpoints.ratios import LARGEST_RATIO
from library.options import OptionError
from networks.blocks import SDXL_BLOCK, sd_block_index, sdxl_block_index
from networks.layers import UNET_PREFIX

logger = logging.getLogger(__name__)

SHOWN = 200  # characters of a list in a message
BASE, MID, OTHER = "BASE", "MID", "other"
IN = tuple(f"IN{number:02}" for number in range(12))
OUT = tuple(f"OUT{number:02}" for number in range(12))
SLOTS = (BASE, *IN, MID, *OUT)


@dataclass(frozen=True)
class ListForm:
    """What the values of a list stand for, by their number."""

    slots: tuple[str, ...]
    is_sdxl: bool


FORMS = {
    12: ListForm((BASE, "IN04", "IN05", "IN07", "IN08", MID, *OUT[:6]), True),
    17: ListForm((BASE, "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", MID, *OUT[3:]), False),
    20: ListForm((BASE, *IN[:9], MID, *OUT[:9]), True),
    26: ListForm(SLOTS, False),
}
BlockWeights = Mapping[str, float]  # slot -> weight; slots that are not in it weigh 1


def slot_of(name: str) -> str:
    """The slot of a module by its name in files of networks; "other" for what stands in none."""
    if "text_model_encoder_" in name:
        return BASE
    if SDXL_BLOCK.search(f"{name}_"):
        index = sdxl_block_index(name)  # 1-9 input, 10-12 middle, 13-21 output
        slots = (BASE, *IN[:9], MID, MID, MID, *OUT[:9])
        return slots[index] if 0 < index < len(slots) else OTHER
    if "_time_embed" in name or "_label_emb" in name:
        return IN[0]
    if name.startswith(f"{UNET_PREFIX}_out_"):  # SDXL's last layer, where the trade's table has it
        return OUT[9]
    index = sd_block_index(name)  # 1-11 down, 12 mid, 13-24 up
    if 0 < index < len(SLOTS) - 1:
        return SLOTS[index + 1]
    return OTHER


def weight_of(weights: BlockWeights, name: str) -> float:
    """The weight of a module."""
    return weights.get(slot_of(name), 1.0)


def parse_block_weights(
    lists: Sequence[str] | None, count: int, where: str = "--lbws", *, is_sdxl: bool | None = None
) -> list[BlockWeights]:
    """A mapping for each of `count` models from JSON lists; empty mappings without lists.

    Raises OptionError for lists that can't be read, of other lengths than the trade's or than each other. Lists of the
    other family than `is_sdxl` says are taken with a warning.
    """
    if not lists:
        return [{}] * count
    if len(lists) != count:
        raise OptionError(where, f"{len(lists)} lists for {count} models", "give one for each of --models")
    values = [_numbers(text, where) for text in lists]
    lengths = sorted({len(numbers) for numbers in values})
    known = ", ".join(map(str, FORMS))
    for length in lengths:
        if length not in FORMS:
            raise OptionError(where, f"a list has {length} values", f"use one of {known} values")
    if len(lengths) > 1:
        raise OptionError(where, f"the lists have {' and '.join(map(str, lengths))} values", "give lists of one length")
    form = FORMS[lengths[0]]
    if is_sdxl is not None and form.is_sdxl is not is_sdxl:
        families = ("SD 1.x / 2.x", "SDXL")
        logger.warning("%s: lists of %d values are meant for %s, and the models are of %s", where, lengths[0],
                       families[form.is_sdxl], families[is_sdxl])  # fmt: skip
    return [dict(zip(form.slots, numbers, strict=True)) for numbers in values]


def _numbers(text: str, where: str) -> list[float]:
    try:
        found = json.loads(text if text.strip().startswith("[") else f"[{text}]")
        numbers = [float(value) for value in found]
    except (ValueError, TypeError, RecursionError):
        raise OptionError(where, f"{text[:SHOWN]!r} is no list of numbers", "write it as [1,0.5,...]") from None
    if not all(abs(number) <= LARGEST_RATIO for number in numbers):  # NaN is none of these
        raise OptionError(where, f"{text!r} holds what is no finite number up to {LARGEST_RATIO:g}")
    return numbers
