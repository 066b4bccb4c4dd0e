"""networks/lora_diffusers.py: LoRA files on plain diffusers pipelines, with the names of their models."""

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from networks import lora_diffusers
from networks.lora import create_network
from networks.lora_diffusers import LoRANetwork, create_network_from_weights, merge_lora_weights
from tests.compat.test_lora_conversion import outputs, pipeline_of
from tests.tiny_networks import perturb, tiny_parts
from tools import convert_diffusers20_original_sd, convert_lora

KINDS = ("sd1", "sd2", "sdxl")


def parts(kind):
    """(text encoder, U-Net, pipeline, LoRA's tensors, outputs with it, outputs without it)."""
    text_encoder, unet = tiny_parts(kind)
    pipeline = pipeline_of(kind, text_encoder, unet)
    network = create_network(1.0, 4, 3.0, None, text_encoder, unet, conv_dim="2")
    perturb(network)
    tensors = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    without = outputs(kind, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    return pipeline, tensors, outputs(kind, text_encoder, unet), without


def encoders_of(kind, pipeline):
    return [pipeline.text_encoder, pipeline.text_encoder_2] if kind == "sdxl" else pipeline.text_encoder


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_trades_snippets_use_it(kind):
    pipeline, tensors, with_it, without = parts(kind)
    network = create_network_from_weights(encoders_of(kind, pipeline), pipeline.unet, tensors, multiplier=1.0)
    assert isinstance(network, LoRANetwork)
    assert not network.load_state_dict(tensors).unexpected_keys
    network.apply_to(multiplier=1.0)
    assert_same(outputs(kind, None, None, pipeline), with_it)
    network.set_multiplier(0.0)
    assert_same(outputs(kind, None, None, pipeline), without)
    network.set_multiplier(1.0)
    network.unapply_to()
    assert all("forward" not in vars(module) for module in pipeline.unet.modules())
    assert_same(outputs(kind, None, None, pipeline), without)
    network.merge_to(multiplier=1.0)
    assert_same(outputs(kind, None, None, pipeline), with_it)
    network.restore_from(multiplier=1.0)
    assert_same(outputs(kind, None, None, pipeline), without)
    network.apply_to(0.5)
    assert network.multiplier == 0.5


def test_two_networks_leave_in_any_order():
    pipeline, tensors, with_it, without = parts("sd1")
    first = create_network_from_weights(pipeline.text_encoder, pipeline.unet, tensors)
    second = create_network_from_weights(pipeline.text_encoder, pipeline.unet, tensors)
    first.apply_to()
    second.apply_to()
    first.unapply_to()
    assert_same(outputs("sd1", None, None, pipeline), with_it)
    second.unapply_to()
    assert_same(outputs("sd1", None, None, pipeline), without)


def test_merging_in_one_call():
    pipeline, tensors, with_it, without = parts("sdxl")
    network = merge_lora_weights(pipeline, tensors)
    assert_same(outputs("sdxl", None, None, pipeline), with_it)
    network.restore_from()
    assert_same(outputs("sdxl", None, None, pipeline), without)


@pytest.mark.parametrize("is_path", [True, False])
def test_alphas_of_a_header_count_where_a_path_is_given(is_path, tmp_path, caplog):
    pipeline, tensors, with_it, _ = parts("sd1")
    file, converted = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, file)
    assert convert_lora.TOOL.run([str(file), str(converted)]) == 0
    caplog.clear()
    network = merge_lora_weights(pipeline, str(converted) if is_path else load_file(converted))
    found = outputs("sd1", None, None, pipeline)
    if is_path:
        assert_same(found, with_it)
        assert not caplog.messages[:-1], "nothing but the number of modules"
        network.restore_from()
        merge_lora_weights(pipeline, file)
        assert_same(outputs("sd1", None, None, pipeline), with_it)
    else:
        assert not torch.allclose(found[0], with_it[0], atol=1e-3)
        assert "give its path in place of its tensors" in caplog.text


def test_the_lora_of_another_model_is_refused():
    from library.options import OptionError

    pipeline, _, _, _ = parts("sd1")
    _, tensors, _, _ = parts("sdxl")
    before = copy.deepcopy(pipeline.unet.state_dict())
    with pytest.raises(OptionError, match="made for SDXL"):
        create_network_from_weights(pipeline.text_encoder, pipeline.unet, tensors)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_command_draws(kind, tmp_path: Path, request, capsys):
    model = request.getfixturevalue(f"tiny_{kind}_path")
    text_encoder, unet = tiny_parts(kind)
    network = create_network(1.0, 4, 3.0, None, text_encoder, unet)
    perturb(network, std=0.3)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    words = [str(model), str(tmp_path / "folder"), "--use_safetensors"]
    assert convert_diffusers20_original_sd.TOOL.run(words) == 0
    config = tmp_path / "folder" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))  # pictures of 128 pixels
    words = [
        "--model_id", str(tmp_path / "folder"), "--lora_weights", str(tmp_path / "lora.safetensors"), "--seed", "3",
        "--output_dir", str(tmp_path), "--steps", "2",
    ]  # fmt: skip
    assert lora_diffusers.TOOL.run([*words, *([] if kind == "sdxl" else ["--sdxl"])]) == 2
    assert "SDXL model" in capsys.readouterr().err
    assert lora_diffusers.TOOL.run([*words, *(["--sdxl"] if kind == "sdxl" else [])]) == 0
    pictures = {name: Image.open(tmp_path / f"lora_{name}.png").tobytes() for name in ("none", "applied", "merged")}
    assert pictures["none"] != pictures["applied"]
    differences = [abs(a - b) for a, b in zip(pictures["applied"], pictures["merged"], strict=True)]
    assert max(differences) <= 2
