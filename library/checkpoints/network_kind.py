"""Which kind of model a network file (LoRA and its relatives) was made for, by its keys and shapes. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

KINDS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the text states that cross-attention takes
KIND_NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
ARCHITECTURES = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl-v1-base": "sdxl"}
OF_SDXL = re.compile(r"lora_te[12]_|(lora|oft)_unet_(input_blocks|middle_block|output_blocks)_|text_encoder_2\.")
# a first factor, whose last or second size is the layer's number of inputs
FACTOR = re.compile(r"\.(lora_down\.weight|lora_A\.weight|lora\.down\.weight|hada_w1_b)$")
CONTEXT_LAYER = re.compile(r"attn2[._]to_[kv]\.")
TEXT_LAYER = re.compile(r"^(lora_te_|text_encoder\.).*[qkv]_proj\.")


def kind_by_names(names: Iterable[str]) -> str:
    """ "sdxl" where the names of keys or modules tell, else ""."""
    return "sdxl" if any(OF_SDXL.match(name) for name in names) else ""


def kind_by_header(metadata: Mapping[str, str]) -> str:
    """ "sd1", "sd2" or "sdxl" by what the trade and modelspec.* say of the base model; "" where nothing tells."""
    base, architecture = (metadata.get(key, "").lower() for key in ("ss_base_model_version", "modelspec.architecture"))
    if base.startswith("sdxl"):
        return "sdxl"
    if base.startswith("sd_v2") or metadata.get("ss_v2") == "True":
        return "sd2"
    if base.startswith("sd_v1"):
        return "sd1"
    return next((kind for name, kind in ARCHITECTURES.items() if architecture.startswith(name)), "")


def kind_by_width(width: int) -> str:
    """ "sd1", "sd2" or "sdxl" by the number of features of the text states; "" for any other number."""
    return KINDS.get(width, "")


def network_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "sd1", "sd2" or "sdxl", or "" where neither names nor sizes tell."""
    if kind := kind_by_names(shapes):
        return kind
    for layers in (CONTEXT_LAYER, TEXT_LAYER):
        for key, shape in shapes.items():
            if layers.search(key) and FACTOR.search(key) and len(shape) > 1:
                return kind_by_width(shape[1])
    return ""
