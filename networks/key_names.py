"""What files call the parts of a LoRA, and how the names of other programs become the trade's. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from library.checkpoints.keymaps import classic_text_key
from networks.layers import TEXT_PREFIX, UNET_PREFIX

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
PEFT_MAGNITUDE = "lora_magnitude_vector"
MAGNITUDES = ("dora_scale", PEFT_MAGNITUDE)  # norms of a DoRA
COPY_AGAIN = "copy or download it again, or take another one"

# diffusers' own keys: part, path and side of a pair; its newer and older words for down and up
PEFT_KEY = re.compile(r"(unet|text_encoder|text_encoder_2)\.(.+)\.(?:lora_(A|B)|lora\.(down|up))(?:\.default)?\.weight")
PEFT_NORMS = re.compile(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
OF_TWO_ENCODERS = re.compile(rf"{TEXT_PREFIX}[12]_|text_encoder_2\.")
# other words for the parts of a module, below its name
PARTS = {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "down.weight": DOWN,
    "up.weight": UP,
    "lora_A": DOWN,
    "lora_B": UP,
    "lora_down": DOWN,
    "lora_up": UP,
    "down": DOWN,
    "up": UP,
}


def has_two_encoders(keys: Iterable[str]) -> bool:
    """Whether the keys of a file speak of two text encoders, as SDXL has them."""
    return any(OF_TWO_ENCODERS.match(key) for key in keys)


def file_key(key: str, *, has_two: bool) -> str:
    """A key as the trade's files have it: `<module>.lora_down.weight`; U-Net paths stay as they are.

    `has_two`: the first text encoder is one of two.
    """
    if match := PEFT_KEY.fullmatch(key) or PEFT_NORMS.fullmatch(key):
        part, path, *side = match.groups()
        prefix = {
            "unet": UNET_PREFIX,
            "text_encoder": f"{TEXT_PREFIX}1" if has_two else TEXT_PREFIX,
            "text_encoder_2": f"{TEXT_PREFIX}2",
        }[part]
        path = path if part == "unet" else classic_text_key(path)  # transformers 5 leaves a level out
        below = PEFT_MAGNITUDE if not side else DOWN if "A" in side or "down" in side else UP
        return f"{prefix}_{path}".replace(".", "_") + f".{below}"
    name, dot, part = key.partition(".")
    return f"{name}{dot}{PARTS.get(part, part)}"
