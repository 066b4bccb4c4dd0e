"""Lists per U-Net block: indices, presets, thresholds."""

from __future__ import annotations

import pytest

from library.options import OptionError
from networks.blocks import (
    SD_LAYOUT,
    SDXL_LAYOUT,
    Curve,
    layout_of,
    parse_blocks,
    parse_weights,
    sd_block_index,
    sdxl_block_index,
)

SINE = [0, 0.1423, 0.2817, 0.4154, 0.5406, 0.6549, 0.7557, 0.8413, 0.9096, 0.9595, 0.9898, 1]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 1),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", 3),
        ("lora_unet_down_blocks_3_resnets_1_conv1", 11),
        ("lora_unet_mid_block_attentions_0_proj_in", 12),
        ("lora_unet_mid_block_resnets_1_conv2", 12),
        ("lora_unet_up_blocks_0_resnets_0_conv1", 13),
        ("lora_unet_up_blocks_2_upsamplers_0_conv", 21),
        ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_q", 24),
        ("lora_unet_input_blocks_4_1_proj_in", -1),
        ("lora_unet_middle_block_1_proj_in", -1),
    ],
)
def test_sd_block_index(name, index):
    assert sd_block_index(name) == index


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("lora_unet_input_blocks_1_0_in_layers_2", 2),
        ("lora_unet_input_blocks_8_1_proj_in", 9),
        ("lora_unet_middle_block_0_in_layers_2", 10),
        ("lora_unet_middle_block_2_out_layers_3", 12),
        ("lora_unet_output_blocks_0_1_proj_in", 13),
        ("lora_unet_output_blocks_8_0_skip_connection", 21),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", -1),
    ],
)
def test_sdxl_block_index(name, index):
    assert sdxl_block_index(name) == index


def test_layouts():
    assert SD_LAYOUT.size == 25
    assert SDXL_LAYOUT.size == 23
    assert layout_of(["lora_unet_input_blocks_4_1_proj_in"]) is SDXL_LAYOUT
    assert layout_of(["lora_unet_down_blocks_0_attentions_0_proj_in"]) is SD_LAYOUT


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("sine", SINE),
        ("cosine", SINE[::-1]),
        ("cosine+0.25", [value + 0.25 for value in SINE[::-1]]),
        ("linear", [i / 11 for i in range(12)]),
        ("reverse_linear", [1 - i / 11 for i in range(12)]),
        ("zeros+.1", [0.1] * 12),
        ("0.5", [0.5] * 12),  # a lone number is that weight everywhere
    ],
)
def test_presets(text, values):
    curve = parse_weights(text, "down_lr_weight")
    assert isinstance(curve, Curve)
    assert curve.values(12) == pytest.approx(values, abs=5e-5)


def test_lists_fill_up_and_threshold():
    settings = parse_blocks(
        {"down_lr_weight": "0.1,0.0,0.5", "mid_lr_weight": "0.05", "block_lr_zero_threshold": "0.1"}
    )
    weights = settings.lr_weights(SD_LAYOUT)
    assert weights == (0, 0, 0.5, *[1.0] * 9, 0, *[1.0] * 12)


def test_empty_items_are_zero_and_long_lists_are_cut(caplog):
    settings = parse_blocks({"up_lr_weight": "," + ",".join(["0.5"] * 13)})
    assert settings.lr_weights(SD_LAYOUT) == (*[1.0] * 13, 0.0, *[0.5] * 11)
    assert "14 values for 12 blocks" in caplog.text


def test_sdxl_weights_have_three_mid_values_and_ends_of_one():
    weights = parse_blocks({"mid_lr_weight": "0.1,0.2,0.3"}).lr_weights(SDXL_LAYOUT)
    assert weights == (*[1.0] * 10, 0.1, 0.2, 0.3, *[1.0] * 10)


def test_nothing_per_block():
    settings = parse_blocks({"conv_dim": "4"})
    assert settings.lr_weights(SD_LAYOUT) is None
    assert settings.ranks(SD_LAYOUT, dim=4, alpha=1, conv_dim=4, conv_alpha=None) is None


def test_a_weight_of_zero_takes_the_rank_away():
    settings = parse_blocks({"down_lr_weight": "zeros", "block_dims": ",".join(["2"] * 25)})
    ranks = settings.ranks(SD_LAYOUT, dim=4, alpha=3.0, conv_dim=8, conv_alpha=2.0)
    assert ranks.dims == (0,) * 12 + (2,) * 13
    assert ranks.alphas == (3.0,) * 25
    assert ranks.conv_dims == (0,) * 12 + (8,) * 13
    assert ranks.conv_alphas == (2.0,) * 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"down_lr_weight": "sin"}, "down_lr_weight: 'sin' is neither numbers nor a preset; did you mean sine"),
        ({"down_lr_weight": "1,two"}, "'two' is not a number"),
        ({"down_lr_weight": "sine+x"}, "'x' is not a number"),
        ({"block_dims": "4,4.5"}, "must be whole numbers"),
        ({"block_dims": "4,-1"}, "must be whole numbers"),
        ({"block_alphas": "a"}, "block_alphas: 'a' is not a number"),
        ({"block_alphas": "1,nan"}, "block_alphas: 'nan' is not a number"),
        ({"block_alphas": "1,-2"}, "block_alphas: -2 is negative"),
        ({"conv_block_dims": "4,inf"}, "conv_block_dims: 'inf' is not a number"),
        ({"down_lr_weight": "nan"}, "down_lr_weight: 'nan' is not a number"),
        ({"up_lr_weight": "1,inf"}, "up_lr_weight: 'inf' is not a number"),
        ({"mid_lr_weight": "sine+nan"}, "mid_lr_weight: 'nan' is not a number"),
        ({"block_lr_zero_threshold": "nan"}, "block_lr_zero_threshold: 'nan' is not a number"),
        ({"block_lr_zero_threshold": "-1"}, "block_lr_zero_threshold: -1 is negative"),
    ],
)
def test_mistakes_name_the_argument(arguments, message):
    with pytest.raises(OptionError, match=message):
        parse_blocks(arguments)


def test_wrong_number_of_values_says_how_many():
    settings = parse_blocks({"conv_block_dims": "4,4,4"})
    with pytest.raises(OptionError, match="conv_block_dims: has 3 values; an SD 1.x / 2.x U-Net has 25 blocks"):
        settings.ranks(SD_LAYOUT, dim=4, alpha=1, conv_dim=None, conv_alpha=None)
