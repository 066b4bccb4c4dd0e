"""LoRA files in every variant that the trade has written."""

from __future__ import annotations

import math

import pytest
import torch

from library.options import OptionError
from networks.lora import create_network, create_network_from_weights
from tests.tiny_networks import full_size_parts, perturb, tiny_parts


def saved(tmp_path, dtype=None, **arguments):
    """A saved, perturbed network of the tiny model: (parts, network, file)."""
    parts = tiny_parts()
    network = create_network(1.0, 4, 2.0, None, *parts, **arguments)
    perturb(network)
    network.save_weights(tmp_path / "lora.safetensors", dtype, {"ss_network_dim": "4"})
    return parts, network, tmp_path / "lora.safetensors"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_save_precision_applies_to_every_tensor(tmp_path, dtype):
    from safetensors.torch import load_file

    _, network, file = saved(tmp_path, dtype)
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    assert set(tensors) == set(network.state_dict())


def test_load_weights_takes_over_the_files_alpha(tmp_path):
    parts, network, file = saved(tmp_path)
    other = create_network(1.0, 4, 16.0, None, *parts)
    assert {module.scale for module in other.adapters} == {4.0}
    info = other.load_weights(file)
    assert not info.missing_keys and not info.unexpected_keys
    assert {module.scale for module in other.adapters} == {0.5}
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    "alpha", [torch.tensor(2), torch.tensor([2.0], dtype=torch.float16), torch.tensor(2.0).bfloat16()]
)
def test_alpha_of_any_type(tmp_path, alpha):
    parts, network, _ = saved(tmp_path)
    tensors = {key: (alpha if key.endswith("alpha") else value) for key, value in network.state_dict().items()}
    other, _ = create_network_from_weights(1.0, "f", None, *parts, weights_sd=tensors)
    assert {module.scale for module in other.adapters} == {0.5}
    other.load_state_dict(tensors, False)
    assert {module.scale for module in other.adapters} == {0.5}


def test_absent_alpha_means_the_rank(tmp_path):
    parts, network, _ = saved(tmp_path)
    tensors = {key: value for key, value in network.state_dict().items() if not key.endswith("alpha")}
    other, _ = create_network_from_weights(1.0, "f", None, *parts, weights_sd=tensors)
    assert {module.scale for module in other.adapters} == {1.0}
    loaded = create_network(1.0, 4, 1.0, None, *parts)
    loaded.load_state_dict(tensors, False)
    assert {module.scale for module in loaded.adapters} == {1.0}


@pytest.mark.parametrize(("made", "used"), [("sd1", "sd2"), ("sd2", "sd1")])
def test_projections_are_read_in_both_ranks(made, used):
    """SD 2.x files of other trainers have 1x1 convolutions where the model has Linear, and the reverse."""
    unet = tiny_parts(used)[1]
    network = create_network(1.0, 4, 1.0, None, None, unet)
    perturb(network)
    tensors = dict(network.state_dict())
    projections = [key for key in tensors if "_proj_in.lora" in key or "_proj_out.lora" in key]
    for key in projections:
        flat = tensors[key].flatten(1)
        assert tensors[key].ndim == (2 if used == "sd2" else 4)
        tensors[key] = flat if used == "sd1" else flat[:, :, None, None]
    other, _ = create_network_from_weights(1.0, "f", None, None, unet, weights_sd=tensors)
    info = other.load_state_dict(tensors, strict=True)
    assert not info.missing_keys
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())


def test_other_ranks_are_refused_with_the_way_out(tmp_path):
    parts, _, file = saved(tmp_path)
    message = r"lora.safetensors has rank 4 where the network has 8 \(lora_te_.*\); .*--dim_from_weights"
    with pytest.raises(OptionError, match=message):
        create_network(1.0, 8, 1.0, None, *parts).load_weights(file)


def test_from_weights_keeps_dropouts_for_training_only(tmp_path):
    parts, _, file = saved(tmp_path, conv_dim="2")
    arguments = {"dropout": 0.1, "rank_dropout": "0.2", "module_dropout": "0.3"}
    network, _ = create_network_from_weights(1, file, None, *parts, **arguments)
    settings = network.adapters[0].settings
    assert (settings.dropout, settings.rank_dropout, settings.module_dropout) == (0.1, 0.2, 0.3)
    network, _ = create_network_from_weights(1, file, None, *parts, for_inference=True, **arguments)
    assert network.adapters[0].settings.dropout == 0
    assert {module.rank for module in network.adapters} == {2, 4}


def test_files_that_are_no_lora(tmp_path):
    parts = tiny_parts()
    with pytest.raises(
        OptionError, match="f holds LoHa, which networks.lora draws with and merges, but does not train"
    ):
        create_network_from_weights(1, "f", None, *parts, weights_sd={"lora_unet_x.hada_w1_a": torch.ones(1)})
    with pytest.raises(OptionError, match="holds no LoRA in the usual format .it has lora_unet_x.oft_blocks"):
        create_network_from_weights(1, "f", None, *parts, weights_sd={"lora_unet_x.oft_blocks": torch.ones(1)})
    name = "lora_unet_input_blocks_4_1_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
    with pytest.raises(OptionError, match="made for SDXL"):
        create_network_from_weights(1, "f", None, *parts, weights_sd=tensors)
    with pytest.raises(OptionError, match="does not exist"):
        create_network_from_weights(1, tmp_path / "missing.safetensors", None, *parts)


NAME = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def _permuted(weight):
    """Kernel before inputs, as no program's convolutions are."""
    return weight.movedim(1, -1)


def _without_rank(key, weight):
    return weight if "alpha" in key else weight[:0] if "lora_down" in key else weight[:, :0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, value: None if "lora_up" in key else value, "is incomplete: lora_te_.* has no lora_up.weight"),
        (lambda key, value: None if key == f"{NAME}.lora_down.weight" else value, f"{NAME} has no lora_down.weight"),
        (lambda key, value: None if key == f"{NAME}.lora_up.weight" else value, f"{NAME} has no lora_up.weight"),
        (lambda key, value: torch.cat([value] * 2) if "lora_down" in key else value, "is damaged: .* don't fit togeth"),
        (lambda key, value: value.new_ones(2) if "alpha" in key else value, "is damaged: alpha of .* is no single"),
        (lambda key, value: value * math.nan if "alpha" in key else value, "alpha of .* is nan, no finite number"),
        (lambda key, value: value * 1j if "alpha" in key else value, "is damaged: alpha of .* is no single number"),
        (lambda key, value: value * math.inf if "lora_up" in key else value, "lora_up.weight of .* holds NaN or inf"),
        (lambda key, value: value.int() if "lora_up" in key else value, "lora_up.weight of .* is of type int32"),
        (lambda key, value: _permuted(value) if "lora_down" in key else value, "is damaged: .* don't fit together"),
        (lambda key, value: value.flatten(1) if "lora_down" in key else value, r"for a weight of \[.*, of \[.* here"),
        (lambda key, value: _without_rank(key, value), "is damaged: .* don't fit together"),
    ],
)
def test_damaged_files_are_named_with_the_module(tmp_path, change, message):
    """Both when a network is made from the file and when it is loaded into one."""
    parts, network, _ = saved(tmp_path, conv_dim="2")
    changed = {key: change(key, value) for key, value in network.state_dict().items()}
    file = tmp_path / "damaged.pt"
    torch.save({key: value for key, value in changed.items() if value is not None}, file)
    for load in (
        lambda: create_network_from_weights(1.0, file, None, *parts, for_inference=True),
        lambda: create_network(1.0, 4, 1.0, None, *parts, conv_dim="2").load_weights(file),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            load()
        assert "damaged.pt" in str(caught.value)


def test_modules_under_two_names_are_refused(tmp_path):
    parts, network, _ = saved(tmp_path)
    tensors = network.state_dict()
    tensors |= {f"{NAME}.lora_A.weight": tensors[f"{NAME}.lora_down.weight"]}
    with pytest.raises(OptionError, match=f"f has lora_down.weight of {NAME} twice: .*{NAME}.lora_A.weight"):
        create_network_from_weights(1.0, "f", None, *parts, weights_sd=tensors)


def test_other_decompositions_are_named(tmp_path):
    parts, network, _ = saved(tmp_path)
    tensors = {**network.state_dict(), f"{NAME}.lora_mid.weight": torch.ones(4, 4)}
    with pytest.raises(OptionError, match="lora_mid.weight; use --network_module lycoris.kohya"):
        create_network_from_weights(1.0, "f", None, *parts, weights_sd=tensors)


def test_a_file_of_another_family_says_so(tmp_path):
    _, _, file = saved(tmp_path)
    for load in (
        lambda: create_network_from_weights(1.0, file, None, *tiny_parts("sd2"), for_inference=True),
        lambda: create_network(1.0, 4, 1.0, None, *tiny_parts("sd2")).load_weights(file),
    ):
        with pytest.raises(OptionError, match="lora.safetensors was made for another model family: lora_") as caught:
            load()
        assert "--" not in str(caught.value)


def test_the_width_of_the_text_states_tells_the_family():
    _, unet = full_size_parts("sd1")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 1024), f"{name}.lora_up.weight": torch.ones(320, 4)}
    message = r"family: its text states have 1024 \(SD 2.x\) features, this model's 768 \(SD 1.x\); use a network that"
    with pytest.raises(OptionError, match=message):
        create_network_from_weights(1.0, "f", None, None, unet, weights_sd=tensors)


def test_arguments_that_a_file_decides_are_said_to_have_no_effect(tmp_path, caplog):
    parts, _, file = saved(tmp_path)
    create_network_from_weights(1, file, None, *parts, dropout=0.1, conv_dim="4", block_dims=",".join(["2"] * 25))
    assert [record.message for record in caplog.records] == [
        f"--network_args conv_dim, block_dims: no effect, {file} decides about ranks and alphas"
    ]
    caplog.clear()
    create_network_from_weights(1, file, None, *parts, for_inference=True, rank_dropout="0.1", dropout=None)
    assert [record.message for record in caplog.records] == [
        "--network_args rank_dropout: no effect, the network is not trained"
    ]
    with pytest.raises(OptionError, match="--network_args foo: unknown name"):
        create_network_from_weights(1, file, None, *parts, for_inference=True, foo="1")
