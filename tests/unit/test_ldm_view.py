"""SDXL's U-Net under its original paths: counts, names and order of the modules that networks stand on."""

from __future__ import annotations

import torch

from library.models.ldm_view import LdmView, as_files_name_it, file_names
from networks.blocks import layout_of
from networks.lora_creation import model_layers
from tests.tiny_networks import full_size_parts, tiny_parts


def test_counts_of_full_size_sdxl():
    """The numbers of the trade: 722 modules, 788 with convolutions (38 of them 3 x 3), 72 + 192 of text."""
    text_encoders, unet = full_size_parts("sdxl")
    linear, everything = (model_layers(text_encoders, unet, has_convs=convs) for convs in (False, True))
    assert (len(linear.unet), len(everything.unet)) == (722, 788)
    assert sum(getattr(layer, "kernel_size", None) == (3, 3) for _, layer in everything.unet) == 38
    names = [name for name, _ in linear.text]
    assert sum(name.startswith("lora_te1_text_model_encoder_layers_") for name in names) == 72
    assert sum(name.startswith("lora_te2_text_model_encoder_layers_") for name in names) == 192


def test_names_are_those_of_the_trade():
    text_encoders, unet = full_size_parts("sdxl")
    names = [name for name, _ in model_layers(text_encoders, unet, has_convs=True).unet]
    for name in (
        "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_0_skip_connection", "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0", "lora_unet_middle_block_0_emb_layers_1",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj", "lora_unet_middle_block_2_out_layers_3",
        "lora_unet_output_blocks_2_2_conv", "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2",
        "lora_unet_output_blocks_8_0_skip_connection",
    ):  # fmt: skip
        assert name in names
    assert not any("down_blocks" in name or "up_blocks" in name for name in names)


def test_modules_come_in_the_original_order_with_a_block_each():
    text_encoders, unet = full_size_parts("sdxl")
    names = [name for name, _ in model_layers(text_encoders, unet, has_convs=True).unet]
    layout = layout_of(names)
    blocks = [layout.index(name) for name in names]
    assert (layout.model, layout.size) == ("SDXL", 23)
    assert blocks == sorted(blocks) and set(blocks) == set(range(2, 22))
    resnet = [name.split("_0_", 1)[1] for name in names if name.startswith("lora_unet_output_blocks_8_0_")]
    assert resnet == ["in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection"]


def test_the_view_is_the_model_itself():
    _, unet = tiny_parts("sdxl")
    view = as_files_name_it(unet)
    assert isinstance(view, LdmView) and as_files_name_it(view) is view
    assert {id(parameter) for parameter in view.parameters()} == {id(parameter) for parameter in unet.parameters()}
    assert view.dtype is torch.float32 and view.config is unet.config
    assert file_names(unet)["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"


def test_other_models_are_seen_as_they_are():
    _, unet = tiny_parts("sd1")
    assert as_files_name_it(unet) is unet and file_names(unet) == {}
