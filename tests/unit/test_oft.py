"""OFT: the rotations of the format, arguments, files, and that turning an output is turning the weight."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

from library.options import OptionError
from networks import oft
from networks.oft import OFTModule, create_network, create_network_from_weights, rotations
from tests.tiny_networks import full_size_parts, outputs, perturb, tiny_parts

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "oft_rotations.json").read_text())


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"alpha {case['alpha']:g}")
def test_rotations_of_the_format(case):
    blocks = torch.tensor(VECTORS["blocks"])
    turned = rotations(blocks[None], torch.tensor([case["alpha"] * VECTORS["outputs"]]))[0] + torch.eye(2)
    torch.testing.assert_close(turned, torch.tensor(case["rotations"]), atol=5e-5, rtol=0)


def test_rotations_are_rotations():
    blocks = torch.randn(3, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    turned = (rotations(blocks, torch.tensor([1.0, 5.0, 100.0])) + torch.eye(10)).double()
    torch.testing.assert_close(turned @ turned.mT, torch.eye(10).double().expand(3, 4, 10, 10), atol=2e-6, rtol=0)
    assert torch.allclose(torch.linalg.det(turned), torch.ones(3, 4).double(), atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Linear(6, 8),
        torch.nn.Linear(6, 8, bias=False),
        torch.nn.Conv2d(6, 8, 1),
        torch.nn.Conv2d(6, 8, 3, stride=2, padding=1),
    ],
    ids=["linear", "without bias", "1x1", "3x3"],
)
@pytest.mark.parametrize("multiplier", [1.0, 0.6, -1.5])
def test_the_weight_is_turned_and_the_bias_is_not(layer, multiplier):
    """Output with W'[p] = sum over o of W[o] R[o, p], R = I + m (R1 - I), in float64."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    x = torch.randn(2, 5, 6) if isinstance(layer, torch.nn.Linear) else torch.randn(2, 6, 9, 7)
    module = OFTModule("oft_unet_x", layer, 2, 0.1, multiplier)
    perturb(module, std=0.5)
    P = module.oft_blocks.detach().double()
    Q = P - P.mT
    Q = Q * min(1.0, 0.1 * 8 / float(Q.norm()))
    blocks = (torch.eye(4) + Q) @ torch.linalg.inv(torch.eye(4) - Q)
    R = torch.eye(8) + multiplier * (torch.block_diag(*blocks) - torch.eye(8))
    reference = torch.nn.Linear(6, 8).double() if isinstance(layer, torch.nn.Linear) else None
    weight = torch.einsum("oi,op->pi", layer.weight.flatten(1).double(), R).reshape(layer.weight.shape)
    bias = None if layer.bias is None else layer.bias.double()
    if reference is not None:
        wanted = torch.nn.functional.linear(x.double(), weight, bias)
    else:
        wanted = torch.nn.functional.conv2d(x.double(), weight, bias, layer.stride, layer.padding)
    module.hook()
    torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.weight_change().double(), weight - layer.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments", "count"),
    [
        ("sd1", {}, 128),
        ("sd1", {"enable_all_linear": "true"}, 192),
        ("sd1", {"enable_conv": "1", "enable_all_linear": "1"}, 278),
        ("sdxl", {"enable_all_linear": "yes"}, 722),
    ],
)
def test_number_of_layers(kind, arguments, count):
    network = create_network(1.0, 4, 1e-3, None, *full_size_parts(kind), **arguments)
    assert len(network.adapters) == count
    assert all(name.startswith("oft_unet_") for name, _ in network.named_children())


def test_words_for_switches():
    unet = tiny_parts()[1]
    plain = len(create_network(1.0, 4, 1e-3, None, None, unet).adapters)
    for word, more in (("False", False), ("0", False), ("no", False), ("True", True), ("1", True)):
        network = create_network(1.0, 4, 1e-3, None, None, unet, enable_conv=word)
        assert (len(network.adapters) > plain) == more, word


@pytest.mark.parametrize(
    ("dim", "alpha", "arguments", "said"),
    [
        (5, 1e-3, {}, r"--network_dim: 5 blocks don't divide the 32 outputs of oft_unet_\w+; use 4"),
        (4, 0.0, {}, "--network_alpha: 0 lets OFT learn nothing"),
        (4, 1e-3, {"enable_conv": "maybe"}, "--network_args enable_conv: 'maybe' is neither true nor false"),
        (4, 1e-3, {"enable_convs": "true"}, "--network_args enable_convs: unknown name; did you mean enable_conv"),
    ],
)
def test_mistakes_are_one_sentence(dim, alpha, arguments, said):
    with pytest.raises(OptionError, match=said):
        create_network(1.0, dim, alpha, None, *tiny_parts(), **arguments)


def test_defaults_and_what_has_no_effect(caplog):
    with caplog.at_level(logging.WARNING):
        network = create_network(1.0, None, None, None, *tiny_parts(), dropout=0.1)
    module = network.unet_adapters[0]
    assert len(module.oft_blocks) == 4 and float(module.alpha) == pytest.approx(1e-3)
    assert caplog.messages == ["--network_dropout has no effect: OFT drops nothing"]
    with caplog.at_level(logging.WARNING):
        create_network(1.0, 4, 1.0, None, *tiny_parts())
    assert "--network_alpha 1 is OFT's constraint" in caplog.messages[-1]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_files_bring_their_layers(kind, tmp_path):
    """Blocks, constraints and which layers there are come from the file; convolutions are found by their names."""
    text_encoder, unet = tiny_parts(kind)
    network = create_network(1.0, 2, 0.02, None, text_encoder, unet, enable_conv="true")
    perturb(network)
    network.save_weights(tmp_path / "oft.safetensors", torch.float16, {})
    other, tensors = create_network_from_weights(1.0, tmp_path / "oft.safetensors", None, text_encoder, unet)
    assert list(other.state_dict()) == list(network.state_dict())
    assert set(tensors) == set(network.state_dict())
    info = other.load_weights(tmp_path / "oft.safetensors")
    assert not info.missing_keys and not info.unexpected_keys
    assert {module.limit for module in other.unet_adapters} == {
        float(torch.tensor(0.02).half()) * module.layer.weight.shape[0] for module in network.unet_adapters
    }


def test_files_of_other_models_are_refused():
    unet = tiny_parts()[1]
    name = create_network(1.0, 2, 0.02, None, None, unet).adapters[0].name

    def made(tensors):
        create_network_from_weights(1.0, "some.pt", None, None, unet, weights_sd=tensors)

    with pytest.raises(OptionError, match=rf"some.pt was made for another model: it turns 12 outputs of {name}"):
        made({f"{name}.oft_blocks": torch.zeros(2, 6, 6)})
    with pytest.raises(OptionError, match=f"some.pt is damaged: oft_blocks of {name} has the shape"):
        made({f"{name}.oft_blocks": torch.zeros(2, 6, 5)})
    with pytest.raises(OptionError, match="some.pt was made for SDXL: none of its 1 modules is in this model"):
        made({"oft_unet_input_blocks_4_1_proj_in.oft_blocks": torch.zeros(2, 6, 6)})
    with pytest.raises(OptionError, match="some.pt holds no OFT in the usual format"):
        made({"lora_unet_x.lora_up.weight": torch.zeros(2, 6)})


def test_rotations_are_made_once_a_pass(monkeypatch):
    """All layers of one size in one product of matrices, and none at all in the next pass where nothing learns."""
    calls = []
    real = oft.rotations
    monkeypatch.setattr(oft, "rotations", lambda blocks, limits: calls.append(blocks.shape) or real(blocks, limits))
    text_encoder, unet = tiny_parts()
    network = create_network(1.0, 4, 1e-3, None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    perturb(network)
    sizes = {tuple(module.oft_blocks.shape) for module in network.unet_adapters}
    outputs(text_encoder, unet)[1].sum().backward()
    assert len(calls) == len(sizes) and sum(shape[0] for shape in calls) == len(network.unet_adapters)
    network.requires_grad_(False)
    with torch.no_grad():
        first = outputs(text_encoder, unet)[1]
        calls.clear()
        assert torch.equal(outputs(text_encoder, unet)[1], first) and not calls
        network.unet_adapters[0].oft_blocks.neg_()
        assert not torch.equal(outputs(text_encoder, unet)[1], first) and len(calls) == 1


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        text_encoder, unet = tiny_parts()
        network = create_network(1.0, 4, 1e-3, None, text_encoder, unet, enable_conv="true")
        network.apply_to(text_encoder, unet)
        perturb(network)
        unet.train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        for _ in range(2):  # accumulated
            outputs(text_encoder, unet)[1].square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain)
