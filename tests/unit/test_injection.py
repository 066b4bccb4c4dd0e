"""Which layers networks stand on, how they are called, and what merging does to them."""

from __future__ import annotations

import itertools

import pytest
import torch

from library.checkpoints.safetensors_io import NonFiniteError, read_header
from library.options import OptionError
from networks import lora
from networks.injection import check_names, modules_of_file, read_network_file, write_network_file
from tests.tiny_networks import full_size_parts, outputs, perturb, tiny_parts


def text_names(layers: int, prefix: str = "lora_te") -> list[str]:
    leaves = ("self_attn_k_proj", "self_attn_v_proj", "self_attn_q_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    return [f"{prefix}_text_model_encoder_layers_{n}_{leaf}" for n in range(layers) for leaf in leaves]


def transformer_names() -> set[str]:
    """The 192 names of the transformers of SD 1.x and 2.x, from the format's description."""
    places = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    places += ["mid_block_attentions_0"]
    places += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    inner = [f"attn{a}_to_{kind}" for a in (1, 2) for kind in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    leaves = ["proj_in", "proj_out", *(f"transformer_blocks_0_{leaf}" for leaf in inner)]
    return {f"lora_unet_{place}_{leaf}" for place, leaf in itertools.product(places, leaves)}


def conv_names() -> set[str]:
    """The 86 further names of networks with convolutions."""
    resnets = [f"down_blocks_{i}_resnets_{j}" for i in range(4) for j in range(2)]
    resnets += [f"mid_block_resnets_{j}" for j in range(2)]
    up = [f"up_blocks_{i}_resnets_{j}" for i in range(4) for j in range(3)]
    names = {f"{place}_{leaf}" for place in resnets + up for leaf in ("conv1", "conv2", "time_emb_proj")}
    names |= {f"{place}_conv_shortcut" for place in [*up, "down_blocks_1_resnets_0", "down_blocks_2_resnets_0"]}
    names |= {f"down_blocks_{i}_downsamplers_0_conv" for i in range(3)}
    names |= {f"up_blocks_{i}_upsamplers_0_conv" for i in range(3)}
    return {f"lora_unet_{name}" for name in names}


@pytest.mark.parametrize(("kind", "text_layers", "in_all"), [("sd1", 12, 264), ("sd2", 23, 330)])
def test_full_size_modules(kind, text_layers, in_all):
    text_encoder, unet = full_size_parts(kind)
    network = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet)
    assert [module.name for module in network.text_adapters] == text_names(text_layers)
    assert {module.name for module in network.unet_adapters} == transformer_names()
    assert len(network.unet_adapters) == 192
    assert len(network.adapters) == in_all


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_full_size_modules_with_convolutions(kind):
    _, unet = full_size_parts(kind)
    network = lora.create_network(1.0, 4, 1.0, None, None, unet, conv_dim="2")
    assert {module.name for module in network.adapters} == transformer_names() | conv_names()
    assert len(network.adapters) == 278
    ranks = {module.name: module.rank for module in network.adapters}
    assert sum(rank == 2 for rank in ranks.values()) == 50  # the 3x3 convolutions
    assert ranks["lora_unet_down_blocks_0_resnets_0_time_emb_proj"] == 4
    assert ranks["lora_unet_up_blocks_0_resnets_0_conv_shortcut"] == 4


def test_conv_network_leaves_later_networks_alone():
    _, unet = tiny_parts()
    lora.create_network(1.0, 4, 1.0, None, None, unet, conv_dim="2")
    assert len(lora.create_network(1.0, 4, 1.0, None, None, unet).adapters) == 192


def test_two_text_encoders_are_numbered():
    text_encoder, unet = tiny_parts()
    other, _ = tiny_parts(seed=1)
    network = lora.create_network(1.0, 4, 1.0, None, [text_encoder, other], unet)
    assert [module.name for module in network.text_adapters] == text_names(2, "lora_te1") + text_names(2, "lora_te2")
    assert {m.name for m in lora.create_network(1.0, 4, 1.0, None, [other], None).adapters} == set(text_names(2))


def test_parts_not_applied_leave_the_file():
    text_encoder, unet = tiny_parts()
    network = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, False, True)
    assert all(key.startswith("lora_unet_") for key in network.state_dict())
    assert "forward" not in vars(text_encoder.text_model.encoder.layers[0].mlp.fc1)


def test_merging_matches_whole_names():
    """mlp_fc1 of layer 1 must not take what belongs to layer 10, nor up_blocks_1 what up_blocks_10 has."""
    text_encoder, unet = tiny_parts()
    network = lora.create_network(1.0, 4, 1.0, None, text_encoder, None)
    perturb(network)
    name = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    tensors = {key: value.clone() for key, value in network.state_dict().items() if key.startswith(name + ".")}
    longer = {key.replace("_fc1.", "_fc12."): torch.full_like(value, 9) for key, value in tensors.items()}
    before = {key: value.clone() for key, value in text_encoder.state_dict().items()}
    lora.create_network(1.0, 4, 1.0, None, text_encoder, None).merge_to(text_encoder, unet, tensors | longer)
    changed = [key for key, value in text_encoder.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["text_model.encoder.layers.1.mlp.fc1.weight"]
    difference = text_encoder.state_dict()[changed[0]] - before[changed[0]]
    expected = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / 4
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=1e-4)


def test_merging_sums_in_float32_and_keeps_or_sets_the_dtype():
    text_encoder, _ = tiny_parts()
    layer = text_encoder.text_model.encoder.layers[0].mlp.fc1
    whole = layer.weight.detach().clone()
    text_encoder.bfloat16()
    network = lora.create_network(1.0, 4, 1.0, None, text_encoder, None)
    perturb(network)
    change = next(module for module in network.adapters if module.layer is layer).weight_change()
    network.merge_to(text_encoder, None)
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer.weight, (whole.bfloat16().float() + change).bfloat16())
    network.merge_to(text_encoder, None, network.state_dict(), torch.float16, "cpu")
    assert layer.weight.dtype is torch.float16


def test_several_networks_pre_calculate_and_restore():
    """Two networks merged at once equal both applied; restoring gives every weight back bit for bit."""
    parts = tiny_parts()
    original = {key: value.clone() for part in parts for key, value in part.state_dict().items()}
    networks = [lora.create_network(0.7, 4, 2.0, None, *parts, conv_dim="2") for _ in range(2)]
    for seed, network in enumerate(networks):
        perturb(network, seed=seed)
        network.apply_to(*parts)
    with torch.no_grad():
        applied = outputs(*parts)
        for network in networks:
            network.backup_weights()
        for network in networks:
            network.pre_calculation()
        merged = outputs(*parts)
        for network in networks:
            network.restore_weights()
        restored = outputs(*parts)
        for network in networks:
            network.set_enabled(False)
        plain = outputs(*parts)
    for a, b, c, d in zip(applied, merged, restored, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        assert torch.equal(a, c)
        assert not torch.allclose(a, d, atol=1e-3)
    assert all(torch.equal(value, original[key]) for part in parts for key, value in part.state_dict().items())


def test_hooks_work_inside_a_wrapper_and_under_checkpointing():
    """Gradients are the same with the model's gradient checkpointing, and when an outer module is wrapped."""
    gradients = []
    for checkpointed in (False, True):
        text_encoder, unet = tiny_parts()
        network = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet)
        perturb(network)
        network.apply_to(text_encoder, unet)
        network.prepare_grad_etc(text_encoder, unet)
        if checkpointed:
            unet.enable_gradient_checkpointing()
            text_encoder.gradient_checkpointing_enable()
            unet.train()  # diffusers checkpoints in train mode only
        outer = torch.nn.ModuleDict({"unet": unet, "text": text_encoder, "network": network})
        outputs(outer["text"], outer["unet"])[1].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


# ---------------------------------------------------------------------------------------------- files


def test_hashes_are_the_trades(tmp_path):
    tensors = {
        "m.alpha": torch.tensor(4.0),
        "m.lora_down.weight": torch.arange(6.0).reshape(2, 3),
        "m.lora_up.weight": torch.ones(5, 2),
    }
    for metadata in ({}, {"ss_network_dim": "2", "other": "x"}):
        write_network_file(tensors, tmp_path / "n.safetensors", metadata)
        written = read_header(tmp_path / "n.safetensors").metadata
        assert written["sshs_model_hash"] == "38f2a3f035b648366c9f78dce294db56885a5fca449eb04b1130666a2ef77a87"
        assert written["sshs_legacy_hash"] == "e3b0c442"
        assert metadata.items() <= written.items()


def test_pickles_hold_a_plain_dictionary(tmp_path):
    tensors = {"m.alpha": torch.tensor(4.0), "m.lora_up.weight": torch.ones(5, 2)}
    write_network_file(tensors, tmp_path / "n.pt", {"ss_x": "1"})
    assert list(torch.load(tmp_path / "n.pt", weights_only=True)) == list(tensors)
    assert list(read_network_file(tmp_path / "n.pt")) == list(tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_nan_is_never_written(tmp_path, suffix):
    file = tmp_path / f"n.{suffix}"
    with pytest.raises(NonFiniteError, match="m.lora_up.weight"):
        write_network_file({"m.lora_up.weight": torch.tensor([1.0, float("nan")])}, file)
    assert list(tmp_path.iterdir()) == []


def test_modules_of_file():
    tensors = {"a.alpha": torch.tensor(1.0), "a.lora_up.weight": torch.ones(1), "loose": torch.ones(1)}
    assert {name: list(parts) for name, parts in modules_of_file(tensors).items()} == {"a": ["alpha", "lora_up.weight"]}


def test_files_for_other_models_are_named(caplog):
    with pytest.raises(OptionError, match="^f.safetensors was made for SDXL: none of its 1 modules is in this model"):
        check_names(["lora_te1_text_model_x"], ["lora_te_text_model_x"], "f.safetensors")
    check_names(["a", "b"], ["a"], "f.safetensors")
    assert "1 of 2 modules are not in this model" in caplog.text
