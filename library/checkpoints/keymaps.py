"""The key tables: where each tensor of a module lies in a single-file checkpoint.

A table pairs *paths*: the path of a module in the original (LDM) layout and in the Diffusers layout, down to the
point below which both layouts use the same names. Every consumer (loading, saving, names of network files, block
indices) reads these tables. A key is translated by its longest listed prefix, so nothing depends on the order of keys.

"Our" side are the parameter names of diffusers' UNet2DConditionModel and AutoencoderKL and of
library.models.text_encoder.TextEncoder (classic Hugging Face names, with the `text_model.` level).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."  # SD 1.x: Hugging Face names below
OPENCLIP_PREFIX = "cond_stage_model.model."  # SD 2.x: OpenCLIP names below
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."  # SDXL's first encoder: Hugging Face names below
SDXL_OPENCLIP_PREFIX = "conditioner.embedders.1.model."  # SDXL's second encoder: OpenCLIP names below
# In SDXL files, empty tensors of these names say what the model predicts, and that its last timestep is pure noise.
V_PREDICTION_MARKER = "v_pred"
ZERO_TERMINAL_SNR_MARKER = "ztsnr"

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_DIFFUSERS_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before 0.17
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPENCLIP_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
FUSED_QKV = ("q_proj", "k_proj", "v_proj")  # the order of OpenCLIP's in_proj rows
PROJECTION = "text_projection"  # OpenCLIP: a matrix P, pooled = x P; here and in Diffusers a Linear, x W^T: W = P^T


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a file: all of `key`, or the `part`-th third of its rows (fused q, k, v); the file may
    hold it transposed."""

    key: str
    part: int | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class UNetLayout:
    """What the module paths of a U-Net depend on."""

    attention_levels: tuple[bool, ...]  # per resolution level, from the finest
    resnets: int  # per level on the way down; one more on the way up


# ------------------------------------------------------------------------------------------------ U-Net


def unet_paths(layout: UNetLayout) -> dict[str, str]:
    """LDM module path -> Diffusers module path of a whole U-Net (SD 1.x, 2.x and SDXL)."""
    paths = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    paths |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    last = len(layout.attention_levels) - 1
    stride = layout.resnets + 1
    for level, has_attention in enumerate(layout.attention_levels):
        for j in range(layout.resnets):
            ldm = f"input_blocks.{stride * level + j + 1}"
            paths |= _resnet(f"{ldm}.0", f"down_blocks.{level}.resnets.{j}")
            if has_attention:
                paths[f"{ldm}.1"] = f"down_blocks.{level}.attentions.{j}"
        if level < last:
            paths[f"input_blocks.{stride * (level + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for i, has_attention in enumerate(reversed(layout.attention_levels)):
        for j in range(stride):
            ldm = f"output_blocks.{stride * i + j}"
            paths |= _resnet(f"{ldm}.0", f"up_blocks.{i}.resnets.{j}")
            if has_attention:
                paths[f"{ldm}.1"] = f"up_blocks.{i}.attentions.{j}"
        if i < last:
            upsampler = f"output_blocks.{stride * i + layout.resnets}.{2 if has_attention else 1}.conv"
            paths[upsampler] = f"up_blocks.{i}.upsamplers.0.conv"
    return paths


def _resnet(ldm: str, diffusers: str) -> dict[str, str]:
    return {f"{ldm}.{theirs}": f"{diffusers}.{ours}" for theirs, ours in RESNET.items()}


def unet_layout(diffusers_keys: Iterable[str]) -> UNetLayout:
    """The layout of a U-Net from its own parameter names."""
    keys = set(diffusers_keys)
    levels = count_items(keys, r"down_blocks\.(\d+)\.")
    attention = tuple(f"down_blocks.{i}.attentions.0.proj_in.weight" in keys for i in range(levels))
    return UNetLayout(attention, count_items(keys, r"down_blocks\.0\.resnets\.(\d+)\."))


def unet_slots(keys: Iterable[str], prefix: str = UNET_PREFIX) -> dict[str, Slot]:
    """Parameter name of a U-Net -> its place in a single file."""
    keys = tuple(keys)
    return _slots(keys, _inverted(unet_paths(unet_layout(keys))), prefix)


# ------------------------------------------------------------------------------------------- ControlNet

CONTROL_PREFIX = "control_model."  # in original files; files of the trade's own training have none
HINT_CONVOLUTIONS = 8  # of the small network that brings the guide image to the size of the latents


def control_paths(outputs: int) -> dict[str, str]:
    """Original module path -> Diffusers' of what a ControlNet has beside its half of a U-Net.

    `outputs` is the number of its zero convolutions for skip connections, see Zhang et al. 2023, arXiv:2302.05543.
    """
    inner = range(HINT_CONVOLUTIONS - 2)
    return {
        "input_hint_block.0": "controlnet_cond_embedding.conv_in",
        **{f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in inner},
        f"input_hint_block.{2 * HINT_CONVOLUTIONS - 2}": "controlnet_cond_embedding.conv_out",
        **{f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(outputs)},
        "middle_block_out.0": "controlnet_mid_block",
    }


def control_original_names(file_keys: Iterable[str]) -> dict[str, str]:
    """Original name, without prefix -> the key of a ControlNet's file, whichever of the known layouts it has.

    These are: the original one, with its prefix (what else such a file holds is left out) or without; Diffusers';
    Diffusers' around an original U-Net.
    """
    keys = tuple(file_keys)
    prefix = CONTROL_PREFIX if any(key.startswith(CONTROL_PREFIX) for key in keys) else ""
    names = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    paths = control_paths(count_items(names, r"controlnet_down_blocks\.(\d+)\."))
    if any(name.startswith("down_blocks.") for name in names):
        paths |= unet_paths(unet_layout(names))
    to_original = _inverted(paths)
    return {translate(name, to_original) or name: key for name, key in names.items()}


def control_slots(keys: Iterable[str], prefix: str = "") -> dict[str, Slot]:
    """Parameter name of diffusers' ControlNetModel -> its place in the original layout."""
    keys = tuple(keys)
    outputs = count_items(keys, r"controlnet_down_blocks\.(\d+)\.")
    return _slots(keys, _inverted(unet_paths(unet_layout(keys)) | control_paths(outputs)), prefix)


# -------------------------------------------------------------------------------------------------- VAE


def vae_paths(levels: int, resnets: int) -> dict[str, str]:
    """LDM module path -> Diffusers module path of an AutoencoderKL with `resnets` per encoder level."""
    paths = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        paths |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        paths[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for k in (0, 1):
            paths |= _vae_resnet(f"{half}.mid.block_{k + 1}", f"{half}.mid_block.resnets.{k}")
        for theirs, ours in VAE_ATTENTION.items():
            paths[f"{half}.mid.attn_1.{theirs}"] = f"{half}.mid_block.attentions.0.{ours}"
    for i in range(levels):
        up = levels - 1 - i
        for j in range(resnets):
            paths |= _vae_resnet(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(resnets + 1):
            paths |= _vae_resnet(f"decoder.up.{up}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}")
        if i < levels - 1:
            paths[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            paths[f"decoder.up.{up}.upsample.conv"] = f"decoder.up_blocks.{i}.upsamplers.0.conv"
    return paths


def _vae_resnet(ldm: str, diffusers: str) -> dict[str, str]:
    return {ldm: diffusers, f"{ldm}.nin_shortcut": f"{diffusers}.conv_shortcut"}


def vae_slots(keys: Iterable[str], prefix: str = VAE_PREFIX) -> dict[str, Slot]:
    """Parameter name of an AutoencoderKL -> its place in a single file."""
    keys = tuple(keys)
    levels = count_items(keys, r"encoder\.down_blocks\.(\d+)\.")
    resnets = count_items(keys, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    return _slots(keys, _inverted(vae_paths(levels, resnets)), prefix)


def is_vae_attention_weight(file_key: str) -> bool:
    """Whether a single file holds this VAE tensor as a 1x1 convolution, [c, c, 1, 1], where Diffusers has [c, c]."""
    return re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", file_key) is not None


def modern_vae_key(diffusers_key: str) -> str:
    """A VAE parameter name of any Diffusers version as today's."""
    if ".attentions." not in diffusers_key:
        return diffusers_key
    head, name, leaf = diffusers_key.rsplit(".", 2)
    return f"{head}.{OLD_DIFFUSERS_ATTENTION.get(name, name)}.{leaf}"


# ----------------------------------------------------------------------------------------- text encoders


def clip_slots(keys: Iterable[str], prefix: str = CLIP_PREFIX) -> dict[str, Slot]:
    """Parameter name of a TextEncoder -> its place in a file that keeps Hugging Face names (SD 1.x)."""
    return {key: Slot(prefix + key) for key in keys}


def classic_text_key(key: str) -> str:
    """A text encoder key with the `text_model.` level, which some files and transformers 5 leave out."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def openclip_slots(keys: Iterable[str], prefix: str = OPENCLIP_PREFIX) -> dict[str, Slot]:
    """Parameter name of a TextEncoder -> its place in a file that keeps OpenCLIP names (SD 2.x, SDXL's second)."""
    slots: dict[str, Slot] = {}
    top = _inverted(OPENCLIP_TOP)
    inner = _inverted(OPENCLIP_LAYER)
    for key in keys:
        if key in top:
            slots[key] = Slot(prefix + top[key])
            continue
        if key == f"{PROJECTION}.weight":
            slots[key] = Slot(prefix + PROJECTION, is_transposed=True)
            continue
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            raise KeyError(f"{key!r} is no parameter of a CLIP text encoder")
        layer, module, leaf = match.groups()
        block = f"{prefix}transformer.resblocks.{layer}."
        name = module.removeprefix("self_attn.")
        if name in FUSED_QKV:
            slots[key] = Slot(f"{block}attn.in_proj_{leaf}", FUSED_QKV.index(name))
        else:
            slots[key] = Slot(f"{block}{inner[module]}.{leaf}")
    return slots


# ---------------------------------------------------------------------------------------------- helpers


def translate(key: str, paths: Mapping[str, str]) -> str | None:
    """`key` with its longest prefix listed in `paths` replaced; None if no prefix is listed."""
    head = key
    while head:
        if head in paths:
            return paths[head] + key[len(head) :]
        head = head.rpartition(".")[0]
    return None


def _slots(keys: Iterable[str], to_file: Mapping[str, str], prefix: str) -> dict[str, Slot]:
    slots = {}
    for key in keys:
        file_key = translate(key, to_file)
        if file_key is None:
            raise KeyError(f"{key!r} is in no key table")
        slots[key] = Slot(prefix + file_key)
    return slots


def _inverted(paths: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in paths.items()}


def count_items(keys: Iterable[str], pattern: str) -> int:
    """How many numbers from 0 on the keys hold in the place `pattern` names."""
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, keys) if match), default=-1)
