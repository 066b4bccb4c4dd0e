"""Files of networks as tools see them: modules by the trade's names, whatever the file calls them."""

import pytest
import torch

from library.checkpoints.safetensors_io import save_file
from library.checkpoints.weights import load_tensors
from library.options import OptionError
from networks.weights.network_file import NetworkFile, original_name

DOWN, UP = torch.arange(6.0).reshape(2, 3), torch.ones(5, 2)


def written(path, tensors):
    save_file(tensors, path)
    return path


def pair(down_key, up_key):
    return {down_key: DOWN, up_key: UP}


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (pair("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"), "lora_unet_x"),
        (pair("lora_unet_x.lora_A.weight", "lora_unet_x.lora_B.weight"), "lora_unet_x"),
        (pair("lora_unet_x.down.weight", "lora_unet_x.up.weight"), "lora_unet_x"),
        (pair("lora_unet_x.lora_down", "lora_unet_x.lora_up"), "lora_unet_x"),
        (pair("unet.mid_block.x.lora_A.weight", "unet.mid_block.x.lora_B.weight"), "lora_unet_mid_block_x"),
        (pair("unet.mid_block.x.lora.down.weight", "unet.mid_block.x.lora.up.weight"), "lora_unet_mid_block_x"),
        (
            pair(
                "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
                "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight",
            ),
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
        ),
    ],
)
def test_every_spelling_of_a_pair(tmp_path, tensors, name):
    with NetworkFile(written(tmp_path / "n.safetensors", tensors)) as file:
        assert file.pairs == [name]
        assert (file.rank(name), file.alpha(name), file.scale(name)) == (2, None, 1.0)
        down, up = file.pair(name)
    assert torch.equal(down, DOWN) and torch.equal(up, UP)


def test_sdxl_in_diffusers_names_has_the_original_ones(tmp_path):
    attention = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    tensors = {
        f"unet.{attention}.lora_A.weight": torch.ones(2, 2048),
        f"unet.{attention}.lora_B.weight": torch.ones(640, 2),
        **pair("text_encoder.text_model.x.lora_A.weight", "text_encoder.text_model.x.lora_B.weight"),
        **pair("text_encoder_2.text_model.x.lora_A.weight", "text_encoder_2.text_model.x.lora_B.weight"),
    }
    with NetworkFile(written(tmp_path / "n.safetensors", tensors)) as file:
        assert file.kind == "sdxl"
        assert sorted(file.pairs) == [
            "lora_te1_text_model_x",
            "lora_te2_text_model_x",
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lora_unet_up_blocks_0_attentions_2_proj_in", "lora_unet_output_blocks_2_1_proj_in"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "lora_unet_input_blocks_2_0_in_layers_2"),
        ("lora_unet_mid_block_resnets_1_time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
        ("lora_unet_down_blocks_1_downsamplers_0_conv", "lora_unet_input_blocks_6_0_op"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_input_blocks_4_1_proj_in"),
    ],
)
def test_original_names(theirs, ours):
    assert original_name(theirs) == ours


@pytest.mark.parametrize("alpha", [torch.tensor(4, dtype=torch.int64), torch.tensor([[4.0]])])
def test_alpha_and_scale(tmp_path, alpha):
    tensors = pair("m.lora_down.weight", "m.lora_up.weight") | {"m.alpha": alpha}
    with NetworkFile(written(tmp_path / "n.safetensors", tensors)) as file:
        assert file.pairs == ["m"]
        assert (file.alpha("m"), file.scale("m")) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        (torch.tensor(float("nan")), "alpha of m is nan, no finite number"),
        (torch.tensor([[float("inf")]]), "alpha of m is inf, no finite number"),
        (torch.tensor(1j), "is damaged: alpha of m is no single number"),
    ],
)
def test_alphas_that_are_no_numbers(tmp_path, alpha, said):
    path = tmp_path / "n.pt"
    torch.save(pair("m.lora_down.weight", "m.lora_up.weight") | {"m.alpha": alpha}, path)
    with NetworkFile(path, "--model") as file, pytest.raises(OptionError, match=said) as error:
        file.scale("m")
    assert str(path) in str(error.value)


def test_alphas_in_headers_are_finite_numbers(tmp_path):
    tensors = pair("unet.mid_block.x.lora_A.weight", "unet.mid_block.x.lora_B.weight")
    header = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": NaN}'}
    save_file(tensors, tmp_path / "n.safetensors", header)
    said = "n.safetensors: .* can't be understood .the alpha of unet.mid_block.x is nan"
    with NetworkFile(tmp_path / "n.safetensors") as file, pytest.raises(OptionError, match=said):
        file.scale("lora_unet_mid_block_x")
    with pytest.raises(OptionError, match=said):
        load_tensors(tmp_path / "n.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"m.lora_down.weight": DOWN}, "is incomplete: m has no lora_up.weight"),
        ({"m.lora_down.weight": DOWN, "m.lora_up.weight": torch.ones(5, 3)}, "don't fit together"),
        (pair("m.lora_down.weight", "m.lora_up.weight") | {"m.alpha": torch.ones(2)}, "is no single number"),
        ({"m.lora_down.weight": DOWN, "m.lora_up.weight": torch.ones(5, 2, 3, 3)}, "don't fit together"),
        ({"m.lora_down.weight": torch.ones(2, 3, 3, 4), "m.lora_up.weight": torch.ones(5, 2, 1, 1)}, "don't fit"),
        ({"m.lora_down.weight": torch.ones(2, 3, 1), "m.lora_up.weight": torch.ones(5, 2)}, "don't fit together"),
        ({"m.lora_down.weight": torch.ones(0, 3), "m.lora_up.weight": torch.ones(5, 0)}, "don't fit together"),
        ({"m.lora_down.weight": DOWN.to(torch.int8), "m.lora_up.weight": torch.ones(5, 2)}, "is of type I8"),
        ({"m.lora_down.weight": DOWN, "m.lora_up.weight": torch.ones(5, 2) + 0j}, "is of type C64"),
        ({"plain": DOWN}, "holds no network"),
        (pair("m.lora_down.weight", "m.lora_A.weight"), "twice"),
    ],
)
def test_damaged_files_are_named(tmp_path, tensors, said):
    path = written(tmp_path / "n.safetensors", tensors)
    with pytest.raises(OptionError, match=said) as error, NetworkFile(path, "--model") as file:
        _ = file.pairs
    assert str(error.value).startswith(f"--model: {path} ")
