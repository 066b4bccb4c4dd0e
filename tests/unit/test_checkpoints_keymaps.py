"""The key tables, against the published layout of Stable Diffusion checkpoints."""

from __future__ import annotations

import random

import pytest
import torch

from library.checkpoints import keymaps
from library.checkpoints.architecture import (
    UNetArchitecture,
    text_architectures,
    unet_architecture,
    vae_architecture,
)
from library.checkpoints.sd import model_entries, part_slots
from library.models.build import build_unet, build_vae
from tests.full_size import SECOND_TEXT_ENCODER, TEXT_ENCODERS, UNETS, VAE, meta_state
from tests.tiny_models import UNETS as TINY_UNETS

FULL = keymaps.UNetLayout((True, True, True, False), 2)
XL = keymaps.UNetLayout((False, True, True), 2)
UNET_EXAMPLES = {
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.0.0.weight": "conv_in.weight",
    "out.0.weight": "conv_norm_out.weight",
    "out.2.weight": "conv_out.weight",
    "input_blocks.2.0.in_layers.2.weight": "down_blocks.0.resnets.1.conv1.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.8.1.transformer_blocks.0.attn1.to_out.0.bias": (
        "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.bias"
    ),
    "input_blocks.9.0.op.weight": "down_blocks.2.downsamplers.0.conv.weight",
    "input_blocks.11.0.emb_layers.1.weight": "down_blocks.3.resnets.1.time_emb_proj.weight",
    "middle_block.0.out_layers.3.weight": "mid_block.resnets.0.conv2.weight",
    "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    "middle_block.2.out_layers.0.bias": "mid_block.resnets.1.norm2.bias",
    "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    "output_blocks.8.2.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
    "output_blocks.5.1.norm.weight": "up_blocks.1.attentions.2.norm.weight",
    "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight"
    ),
}
XL_EXAMPLES = {
    "time_embed.0.weight": "time_embedding.linear_1.weight",
    "label_emb.0.0.weight": "add_embedding.linear_1.weight",
    "label_emb.0.2.bias": "add_embedding.linear_2.bias",
    "input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.conv1.weight",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.5.1.proj_in.weight": "down_blocks.1.attentions.1.proj_in.weight",
    "input_blocks.6.0.op.bias": "down_blocks.1.downsamplers.0.conv.bias",
    "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"
    ),
    "middle_block.1.transformer_blocks.9.ff.net.2.weight": (
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2.weight"
    ),
    "middle_block.2.emb_layers.1.weight": "mid_block.resnets.1.time_emb_proj.weight",
    "output_blocks.0.1.norm.weight": "up_blocks.0.attentions.0.norm.weight",
    "output_blocks.2.2.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    "output_blocks.8.0.out_layers.3.weight": "up_blocks.2.resnets.2.conv2.weight",
    "out.2.bias": "conv_out.bias",
}
VAE_EXAMPLES = {
    "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.down.2.downsample.conv.bias": "encoder.down_blocks.2.downsamplers.0.conv.bias",
    "decoder.up.3.block.2.norm1.weight": "decoder.up_blocks.0.resnets.2.norm1.weight",
    "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
    "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
    "encoder.mid.attn_1.norm.bias": "encoder.mid_block.attentions.0.group_norm.bias",
    "encoder.mid.block_2.conv2.weight": "encoder.mid_block.resnets.1.conv2.weight",
    "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
    "quant_conv.weight": "quant_conv.weight",
}


@pytest.mark.parametrize(("theirs", "ours"), UNET_EXAMPLES.items())
def test_unet_examples(theirs: str, ours: str):
    assert keymaps.translate(theirs, keymaps.unet_paths(FULL)) == ours


@pytest.mark.parametrize(("theirs", "ours"), XL_EXAMPLES.items())
def test_sdxl_unet_examples(theirs: str, ours: str):
    assert keymaps.translate(theirs, keymaps.unet_paths(XL)) == ours


@pytest.mark.parametrize(("theirs", "ours"), VAE_EXAMPLES.items())
def test_vae_examples(theirs: str, ours: str):
    assert keymaps.translate(theirs, keymaps.vae_paths(4, 2)) == ours


@pytest.mark.parametrize(("kind", "tensors", "layout"), [("sd1", 686, FULL), ("sd2", 686, FULL), ("sdxl", 1680, XL)])
def test_full_size_tables_are_complete_and_reversible(kind: str, tensors: int, layout: keymaps.UNetLayout):
    model = meta_state(kind)
    unet, vae = keymaps.unet_slots(model.unet), keymaps.vae_slots(model.vae)
    assert len({slot.key for slot in unet.values()}) == len(unet) == tensors
    assert len({slot.key for slot in vae.values()}) == len(vae) == 248
    paths = keymaps.unet_paths(layout)
    for ours, slot in unet.items():
        assert keymaps.translate(slot.key.removeprefix(keymaps.UNET_PREFIX), paths) == ours


def test_tables_do_not_depend_on_key_order():
    keys = list(meta_state("sd1").unet)
    slots = keymaps.unet_slots(keys)
    random.Random(0).shuffle(keys)
    assert keymaps.unet_slots(keys) == slots


def test_openclip_names_and_fused_projections():
    slots = keymaps.openclip_slots(meta_state("sd2").text_encoder)
    block = "cond_stage_model.model.transformer.resblocks.7."
    layer = "text_model.encoder.layers.7."
    assert slots[f"{layer}self_attn.q_proj.weight"] == keymaps.Slot(f"{block}attn.in_proj_weight", 0)
    assert slots[f"{layer}self_attn.k_proj.bias"] == keymaps.Slot(f"{block}attn.in_proj_bias", 1)
    assert slots[f"{layer}self_attn.v_proj.weight"] == keymaps.Slot(f"{block}attn.in_proj_weight", 2)
    assert slots[f"{layer}self_attn.out_proj.weight"].key == f"{block}attn.out_proj.weight"
    assert slots[f"{layer}mlp.fc2.bias"].key == f"{block}mlp.c_proj.bias"
    assert slots[f"{layer}layer_norm2.weight"].key == f"{block}ln_2.weight"
    assert len({slot.key for slot in slots.values()}) == 4 + 23 * 12


def test_sdxl_text_encoders_have_their_own_places():
    model = meta_state("sdxl")
    first = part_slots("text_encoder", model.text_encoder, kind="sdxl")
    second = part_slots("text_encoder_2", model.text_encoder_2, kind="sdxl")
    assert {slot.key for slot in first.values()} == {f"conditioner.embedders.0.transformer.{n}" for n in first}
    assert (len(first), len({slot.key for slot in second.values()})) == (196, 5 + 32 * 12)
    block = "conditioner.embedders.1.model.transformer.resblocks.31."
    q_proj = second["text_model.encoder.layers.31.self_attn.q_proj.weight"]
    assert q_proj == keymaps.Slot(f"{block}attn.in_proj_weight", 0)
    projection = second["text_projection.weight"]
    assert projection == keymaps.Slot("conditioner.embedders.1.model.text_projection", is_transposed=True)


def test_sdxl_text_encoders_come_back_from_shapes():
    model = meta_state("sdxl")
    shapes = {entry.name: entry.shape for entry in model_entries(model, torch.float16)}
    assert text_architectures(shapes, "sdxl") == (TEXT_ENCODERS["sdxl"], SECOND_TEXT_ENCODER)


def test_old_diffusers_attention_names():
    old = "encoder.mid_block.attentions.0."
    assert keymaps.modern_vae_key(f"{old}query.weight") == f"{old}to_q.weight"
    assert keymaps.modern_vae_key(f"{old}proj_attn.bias") == f"{old}to_out.0.bias"
    assert keymaps.modern_vae_key(f"{old}to_out.0.bias") == f"{old}to_out.0.bias"
    assert keymaps.modern_vae_key("encoder.conv_in.weight") == "encoder.conv_in.weight"


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("unets", [UNETS, TINY_UNETS], ids=["full", "tiny"])
def test_unet_sizes_come_back_from_shapes(kind: str, unets: dict[str, UNetArchitecture]):
    with torch.device("meta"):
        state = build_unet(unets[kind]).state_dict()
    shapes = {slot.key: tuple(state[name].shape) for name, slot in keymaps.unet_slots(state).items()}
    assert unet_architecture(shapes, kind) == unets[kind]


@pytest.mark.parametrize(
    "architecture",
    [
        UNetArchitecture(4, 4, (64, 128, 128), (8, 8, 8), (0, 2, 3), 2, 64, linear_projection=False),
        UNetArchitecture(9, 4, (32, 64), (8, 8), (1, 0), 1, 96, linear_projection=True),
    ],
)
def test_other_shapes_of_unets(architecture: UNetArchitecture):
    """Levels without attention at the top, several transformer blocks, other numbers of levels."""
    with torch.device("meta"):
        state = build_unet(architecture).state_dict()
    shapes = {slot.key: tuple(state[name].shape) for name, slot in keymaps.unet_slots(state).items()}
    assert len(shapes) == len(state)
    assert unet_architecture(shapes, "sd1") == architecture


def test_vae_sizes_come_back_from_shapes_of_either_layout():
    with torch.device("meta"):
        state = build_vae(VAE).state_dict()
    shapes = {slot.key: tuple(state[name].shape) for name, slot in keymaps.vae_slots(state).items()}
    assert vae_architecture(shapes) == VAE
    assert vae_architecture({name: tuple(tensor.shape) for name, tensor in state.items()}, "") == VAE


@pytest.mark.parametrize(("in_file", "used"), [(24, 23), (23, 23), (5, 4)])
def test_sd2_uses_the_last_layer_but_one(in_file: int, used: int):
    prefix = keymaps.OPENCLIP_PREFIX
    shapes = {f"{prefix}token_embedding.weight": (49408, 1024), f"{prefix}positional_embedding": (77, 1024)}
    for i in range(in_file):
        shapes[f"{prefix}transformer.resblocks.{i}.mlp.c_fc.weight"] = (4096, 1024)
    (found,) = text_architectures(shapes, "sd2")
    assert found.layers == used
    assert (found.heads, found.mlp_width, found.activation) == (16, 4096, "gelu")
    assert (found == TEXT_ENCODERS["sd2"]) == (used == 23)
