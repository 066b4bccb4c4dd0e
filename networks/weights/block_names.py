"""The block a tensor belongs to, by its key in any file of the trade, as tables show it. No torch."""

from __future__ import annotations

import re

from networks.layers import UNET_PREFIX
from networks.weights.block_weights import MID, SLOTS, slot_of

ORIGINAL = re.compile(r"(?:^|[._])(input_blocks|middle_block|output_blocks)[._](\d+)[._]")
DIFFUSERS = re.compile(r"(?:^|[._])(down|up)_blocks[._](\d+)[._](attentions|resnets|downsamplers|upsamplers)[._](\d+)")
MIDDLE = re.compile(r"(?:^|[._])mid_block[._]")
PARTS = (  # what a key begins with, and what its blocks belong to
    (re.compile(r"^(lora|oft|boft|lycoris)_unet_|^unet\.|^model\.diffusion_model\.|^lllite_unet_"), "U-Net"),
    (re.compile(r"^lora_te1_|^conditioner\.embedders\.0\."), "TE1"),
    (re.compile(r"^lora_te2_|^conditioner\.embedders\.1\.|^text_encoder_2\."), "TE2"),
    (re.compile(r"^lora_te_|^cond_stage_model\.|^text_encoder\.|^text_model\."), "TE"),
    (re.compile(r"^first_stage_model\.|^(encoder|decoder|quant_conv|post_quant_conv)\."), "VAE"),
    (re.compile(r"^model_ema\."), "EMA copy"),
    (re.compile(r"^(betas|alphas_|sqrt_|log_one_|posterior_|denoiser\.|v_pred$|ztsnr$)"), "noise schedule"),
    (re.compile(r"^control_model\."), "ControlNet"),
)


def block_name(key: str) -> str:
    """ "IN04", "MID", "OUT11" as in other reports, "TE", "TE2", "VAE decoder", "U-Net out", "ControlNet IN04" ..."""
    part, rest = next(
        ((word, key[match.end() :]) for pattern, word in PARTS if (match := pattern.match(key))), ("", key)
    )
    if part == "VAE":
        half = re.search(r"(encoder|decoder)\.", key)
        return f"VAE {half[1]}" if half else "VAE"
    if part not in ("", "U-Net", "ControlNet"):
        return part
    slot = _slot(rest)
    if slot and part != "ControlNet":
        return slot
    return f"{part} {slot or rest.split('.')[0]}".strip()


def _slot(path: str) -> str:
    """IN00 ..., MID, OUT00 ... of a path in a U-Net of either layout, "" for what is in no block."""
    if match := ORIGINAL.search(path):
        return (
            MID if match[1] == "middle_block" else f"{'IN' if match[1] == 'input_blocks' else 'OUT'}{int(match[2]):02d}"
        )
    if match := DIFFUSERS.search(path) or MIDDLE.search(path):
        return slot_of(f"{UNET_PREFIX}_{match[0].strip('._')}_".replace(".", "_"))
    return ""


def block_order(block: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """To sort blocks as a picture passes through them: text encoders, the U-Net's, all others; block 2 before 10."""
    place = -1 if block.startswith("TE") else SLOTS.index(block) if block in SLOTS else len(SLOTS)
    numbers = re.split(r"(\d+)", block)
    return place, [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in numbers]
