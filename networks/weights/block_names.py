"""The block a tensor belongs to, by its key in any file of the trade, as tables show it. No torch."""

from __future__ import annotations

import re

ORIGINAL = re.compile(r"(?:^|[._])(input_blocks|middle_block|output_blocks)[._](\d+)[._]")
DIFFUSERS = re.compile(r"(?:^|[._])(down|up)_blocks[._](\d+)[._](attentions|resnets|downsamplers|upsamplers)[._](\d+)")
MIDDLE = re.compile(r"(?:^|[._])mid_block[._]")
PARTS = (  # what a key begins with, and what its blocks belong to
    (re.compile(r"^(lora|oft|boft|lycoris)_unet_|^unet\.|^model\.diffusion_model\.|^lllite_unet_"), "U-Net"),
    (re.compile(r"^lora_te1_|^conditioner\.embedders\.0\."), "text encoder 1"),
    (re.compile(r"^lora_te2_|^conditioner\.embedders\.1\.|^text_encoder_2\."), "text encoder 2"),
    (re.compile(r"^lora_te_|^cond_stage_model\.|^text_encoder\.|^text_model\."), "text encoder"),
    (re.compile(r"^first_stage_model\.|^(encoder|decoder|quant_conv|post_quant_conv)\."), "VAE"),
    (re.compile(r"^model_ema\."), "EMA copy"),
    (re.compile(r"^(betas|alphas_|sqrt_|log_one_|posterior_|denoiser\.|v_pred$|ztsnr$)"), "noise schedule"),
    (re.compile(r"^control_model\."), "ControlNet"),
)


def block_name(key: str) -> str:
    """ "U-Net input_blocks.4", "U-Net down_blocks.1.attentions.0", "text encoder 2", "VAE decoder" ..."""
    part, rest = next(
        ((word, key[match.end() :]) for pattern, word in PARTS if (match := pattern.match(key))), ("", key)
    )
    if part == "VAE":
        half = re.search(r"(encoder|decoder)\.", key)
        return f"VAE {half[1]}" if half else "VAE"
    if part not in ("", "U-Net", "ControlNet"):
        return part
    return f"{part} {_within(rest)}".strip()


def _within(path: str) -> str:
    """The block in a U-Net or whatever the file is."""
    if match := ORIGINAL.search(path):
        return f"{match[1]}.{match[2]}"
    if match := DIFFUSERS.search(path):
        return f"{match[1]}_blocks.{match[2]}.{match[3]}.{match[4]}"
    if MIDDLE.search(path):
        return "mid_block"
    return path.split(".")[0]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sorting key by which block 2 comes before block 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
