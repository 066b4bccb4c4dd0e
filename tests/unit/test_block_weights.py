"""Slots of modules, and lists of weights for them."""

import logging

import pytest

from library.options import OptionError
from networks.weights.block_weights import FORMS, SLOTS, parse_block_weights, slot_of, weight_of


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "BASE"),
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj", "BASE"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_3_resnets_1_conv1", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "MID"),
        ("lora_unet_up_blocks_0_resnets_0_conv1", "OUT00"),
        ("lora_unet_up_blocks_2_upsamplers_0_conv", "OUT08"),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", "OUT11"),
        ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
        ("lora_unet_input_blocks_0_0", "IN00"),
        ("lora_unet_middle_block_2_in_layers_2", "MID"),
        ("lora_unet_output_blocks_0_0_in_layers_2", "OUT00"),
        ("lora_unet_output_blocks_8_0_skip_connection", "OUT08"),
        ("lora_unet_label_emb_0_0", "IN00"),
        ("lora_unet_out_2", "OUT09"),
        ("something_else", "other"),
    ],
)
def test_slots(name, slot):
    assert slot_of(name) == slot


def test_forms_have_the_number_of_values_they_are_known_by():
    assert all(len(form.slots) == length for length, form in FORMS.items())
    assert all(set(form.slots) <= set(SLOTS) for form in FORMS.values())


def test_lists():
    first, second = parse_block_weights(["[0,1,2,3,4,5,6,7,8,9,10,11]", "1," * 11 + "0"], 2, is_sdxl=True)
    assert weight_of(first, "lora_te1_text_model_encoder_layers_0_mlp_fc1") == 0
    assert weight_of(first, "lora_unet_input_blocks_7_1_proj_in") == 3
    assert weight_of(first, "lora_unet_output_blocks_5_1_proj_in") == 11
    assert weight_of(first, "lora_unet_output_blocks_6_0_in_layers_2") == 1  # not in the list
    assert weight_of(second, "lora_unet_output_blocks_5_1_proj_in") == 0
    assert parse_block_weights(None, 3) == [{}, {}, {}]


@pytest.mark.parametrize(
    ("lists", "problem"),
    [
        (["[1,2,3]", "[1,2,3]"], "a list has 3 values; use one of 12, 17, 20, 26 values"),
        ([str([1] * 12)], "1 lists for 2 models"),
        ([str([1] * 12), str([1] * 20)], "the lists have 12 and 20 values"),
        (["[1,", "[1]"], "is no list of numbers"),
        (["{}", "[1]"], "is no list of numbers"),
        (["[NaN]", "[1]"], "is no finite number"),
    ],
)
def test_mistakes(lists, problem):
    with pytest.raises(OptionError, match=r"^--lbws: ") as error:
        parse_block_weights(lists, 2)
    assert problem in str(error.value)


def test_lists_of_the_other_family(caplog):
    with caplog.at_level(logging.WARNING):
        parse_block_weights([str([1] * 17)], 1, is_sdxl=True)
    assert "lists of 17 values are meant for SD 1.x / 2.x, and the models are of SDXL" in caplog.text
