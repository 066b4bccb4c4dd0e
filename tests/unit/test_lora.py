"""networks.lora: creation rules, forward, dropout, learning rates, norm limit."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from library.options import OptionError
from networks import lora
from networks.lora import LoRAModule, LoRANetwork, create_network, create_network_from_weights
from networks.lora_settings import LoRASettings
from tests.tiny_networks import outputs, perturb, tiny_parts

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 25


def unet_network(**arguments) -> LoRANetwork:
    return create_network(1.0, 4, 1.0, None, None, tiny_parts()[1], **arguments)


def module_on(layer: torch.nn.Module, *, rank: int = 2, alpha: float | None = 1.0, **settings) -> LoRAModule:
    """A hooked module with random weights on one layer."""
    torch.manual_seed(0)
    module = LoRAModule("m", layer.requires_grad_(False), rank=rank, alpha=alpha, settings=LoRASettings(**settings))
    perturb(module, std=0.5)
    module.hook()
    return module


# ---------------------------------------------------------------------------------------------- creation


def test_initial_weights():
    module = LoRAModule("m", torch.nn.Conv2d(8, 6, 3, padding=1, stride=2), rank=4, alpha=2.0)
    bound = 1 / math.sqrt(8 * 9)
    assert module.lora_down.weight.shape == (4, 8, 3, 3)
    assert (module.lora_down.stride, module.lora_down.padding) == ((2, 2), (1, 1))
    assert 0.9 * bound < module.lora_down.weight.abs().max() <= bound
    assert module.lora_up.weight.shape == (6, 4, 1, 1)
    assert not module.lora_up.weight.any()
    assert module.scale == 0.5


@pytest.mark.parametrize(
    ("alpha", "value", "dtype"),
    [(2.0, 2, torch.float32), (2, 2, torch.int64), (0, 4, torch.int64), (None, 4, torch.int64)],
)
def test_alpha_is_a_tensor_without_dimensions(alpha, value, dtype):
    module = LoRAModule("m", torch.nn.Linear(8, 6), rank=4, alpha=alpha)
    assert (module.alpha.item(), module.alpha.dtype, module.alpha.shape) == (value, dtype, ())
    assert list(module.state_dict()) == ["alpha", "lora_down.weight", "lora_up.weight"]
    assert module.scale == value / 4


def test_defaults_of_rank_and_alpha():
    network = create_network(1.0, None, None, None, None, tiny_parts()[1])
    assert {(module.rank, module.scale) for module in network.adapters} == {(4, 0.25)}


def test_block_dims_and_alphas():
    dims = ",".join(str(index % 3) for index in range(BLOCKS))
    network = unet_network(
        block_dims=dims, block_alphas=",".join(["2"] * BLOCKS), conv_block_dims=",".join(["3"] * BLOCKS)
    )
    for module in network.adapters:
        index = network.block_index(module.name)
        is_3x3 = module.lora_down.weight.shape[2:] == (3, 3)
        assert module.rank == (3 if is_3x3 else index % 3)
        assert float(module.alpha) == (1 if is_3x3 else 2)
    linear_blocks = {network.block_index(m.name) for m in network.adapters if m.lora_down.weight.shape[2:] != (3, 3)}
    assert linear_blocks == {index for index in range(1, BLOCKS) if index % 3}


def test_conv_lists_alone_switch_to_blocks():
    network = unet_network(conv_block_dims=",".join(["2"] * 12 + ["0"] * 13))
    convs = [module for module in network.adapters if module.lora_down.weight.shape[2:] == (3, 3)]
    assert {network.block_index(module.name) for module in convs} == set(range(1, 12))


def test_text_encoder_keeps_the_plain_rank():
    text_encoder, unet = tiny_parts()
    network = create_network(1.0, 6, 3.0, None, text_encoder, unet, block_dims=",".join(["1"] * BLOCKS))
    assert {(module.rank, module.scale) for module in network.text_adapters} == {(6, 0.5)}
    assert {module.rank for module in network.unet_adapters} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_dims": "4"}, "conv_dims: unknown name; did you mean conv_dim"),
        ({"algo": "loha"}, "algo: unknown name"),
        ({"conv_dim": "four"}, "conv_dim: 'four' is not a number"),
        ({"conv_dim": "1.5"}, "conv_dim: 1.5 is no rank"),
        ({"conv_dim": "nan"}, "conv_dim: 'nan' is not a number"),
        ({"conv_dim": "inf"}, "conv_dim: 'inf' is not a number"),
        ({"conv_alpha": "nan"}, "conv_alpha: 'nan' is not a number"),
        ({"conv_alpha": "-1"}, "conv_alpha: -1 is negative"),
        ({"loraplus_lr_ratio": "nan"}, "loraplus_lr_ratio: 'nan' is not a number"),
        ({"loraplus_unet_lr_ratio": "0"}, "loraplus_unet_lr_ratio: 0 is no ratio; use a number above 0"),
        ({"loraplus_text_encoder_lr_ratio": "-1"}, "loraplus_text_encoder_lr_ratio: -1 is no ratio"),
        ({"rank_dropout": "1"}, "rank_dropout: 1 is out of range"),
        ({"block_dims": "1,2"}, "block_dims: has 2 values"),
        ({"block_dims": ",".join(["0"] * BLOCKS)}, "no layer of the model gets a rank"),
        ({"conv_dim": "65"}, "conv_dim: 65 is larger than lora_unet_.* allows; use 64 or less|use 32 or less"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(OptionError, match=message):
        unet_network(**arguments)


def test_rank_larger_than_the_layer():
    with pytest.raises(OptionError, match="--network_dim: 33 is larger than lora_unet_.* allows; use 32 or less"):
        create_network(1.0, 33, 1.0, None, None, tiny_parts()[1])


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0])
def test_alpha_that_is_none(alpha):
    with pytest.raises(OptionError, match=f"--network_alpha: {alpha:g} is out of range; use 0 .the rank. or more"):
        create_network(1.0, 4, alpha, None, None, tiny_parts()[1])


def test_arguments_are_checked_without_torch():
    program = (
        "import sys, networks.lora_settings as settings;"
        "settings.check_arguments(conv_dim='4', block_dims='1,2', loraplus_lr_ratio='16', down_lr_weight='sine');"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "settings.check_arguments(conv_dimm='4')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("--network_args conv_dimm: unknown name; did you mean conv_dim?"), done.stderr


def test_arguments_are_checked_without_a_model():
    lora.check_arguments(conv_dim="4", dropout=None, loraplus_lr_ratio="16", down_lr_weight="sine")
    with pytest.raises(OptionError, match="unknown name"):
        lora.check_arguments(con_dim="4")


def test_conv_alpha_alone_is_said_to_have_no_effect(caplog):
    unet_network(conv_alpha="1")
    assert "conv_alpha has no effect without conv_dim" in caplog.text


# ---------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_output_follows_the_formula(kind):
    layer = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Conv2d(6, 5, 3, padding=1)
    x = torch.randn(2, 3, 6) if kind == "linear" else torch.randn(2, 6, 4, 4)
    base = layer(x)
    module = module_on(layer, alpha=3.0)
    module.multiplier = 0.7
    expected = base + module.lora_up(module.lora_down(x)) * (0.7 * 3 / 2)
    torch.testing.assert_close(layer(x), expected)
    merged = F.linear if kind == "linear" else lambda x, w, b: F.conv2d(x, w, b, padding=1)
    torch.testing.assert_close(merged(x, layer.weight + module.weight_change(), layer.bias), expected)


def test_off_is_exactly_the_base_layer():
    layer, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    base = layer(x)
    module = module_on(layer)
    assert not torch.equal(layer(x), base)
    module.multiplier = 0.0
    assert torch.equal(layer(x), base)
    module.multiplier, module.enabled = 1.0, False
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_networks_stand_on_each_other(kind):
    """The second network on a layer gets the same output and gradients as the formula says."""
    layer = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Conv2d(6, 5, 1)
    x = torch.randn(2, 3, 6) if kind == "linear" else torch.randn(2, 6, 4, 4)
    base = layer(x)
    first, second = module_on(layer), module_on(layer, alpha=4.0)
    expected = base + first.lora_up(first.lora_down(x)) * 0.5 + second.lora_up(second.lora_down(x)) * 2
    torch.testing.assert_close(layer(x), expected)
    gradients = [torch.autograd.grad(out.square().sum(), [*first.parameters(), *second.parameters()])
                 for out in (layer(x), expected)]  # fmt: skip
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain)


def test_a_trained_base_layer_gets_its_gradient():
    layer = torch.nn.Linear(6, 5)
    module_on(layer)
    layer.weight.requires_grad_(True)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is not None


# ---------------------------------------------------------------------------------------------- dropout


def test_dropout_only_in_training_mode():
    layer, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    module = module_on(layer, dropout=0.5, rank_dropout=0.5, module_dropout=0.5)
    plain = module.eval()(x)
    assert torch.equal(module(x), plain)
    module.train()
    assert any(not torch.equal(module(x), plain) for _ in range(8))


def test_module_dropout_leaves_the_module_out():
    layer, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    base = layer(x)
    module = module_on(layer, module_dropout=0.3)
    whole = module.eval()(x)
    module.train()
    torch.manual_seed(0)
    outs = [layer(x) for _ in range(400)]
    left_out = [torch.equal(out, base) for out in outs]
    assert 0.22 < sum(left_out) / 400 < 0.38
    for out, is_out in zip(outs, left_out, strict=True):
        torch.testing.assert_close(out, base if is_out else whole)


@pytest.mark.parametrize("shape", [(64, 6), (64, 3, 6), (64, 6, 2, 2)])
def test_rank_dropout_drops_ranks_per_sample_and_rescales(shape):
    """With one rank, each sample has either nothing or 1 / (1 - p) of the change, over all its tokens or pixels."""
    layer = torch.nn.Linear(6, 5) if len(shape) < 4 else torch.nn.Conv2d(6, 5, 1)
    x = torch.randn(shape)
    base = layer(x)
    module = module_on(layer, rank=1, rank_dropout=0.25)
    change = module.eval()(x) - base
    module.train()
    torch.manual_seed(0)
    dropped = module(x) - base
    ratio = (dropped / change).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-2, rtol=1e-2)
    kept = ratio[:, 0] > 0.5
    torch.testing.assert_close(ratio[kept, 0], torch.full_like(ratio[kept, 0], 4 / 3), atol=1e-2, rtol=1e-2)
    assert 0.6 < kept.float().mean() < 0.9


def test_neuron_dropout_keeps_the_mean():
    layer, x = torch.nn.Linear(6, 5), torch.randn(1, 6)
    base = layer(x)
    module = module_on(layer, dropout=0.5)
    change = module.eval()(x) - base
    module.train()
    torch.manual_seed(0)
    mean = torch.stack([module(x) - base for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, change, atol=0.1 * change.abs().max().item(), rtol=0)


# ---------------------------------------------------------------------------------------------- learning rates


def rates(network, *arguments):
    groups, names = network.prepare_optimizer_params(*arguments)
    return {name: group.get("lr") for name, group in zip(names, groups, strict=True)}


def test_groups_of_a_plain_network():
    network = create_network(1.0, 4, 1.0, None, *tiny_parts())
    assert rates(network, 1e-5, 1e-4, 1e-3) == {"textencoder": 1e-5, "unet": 1e-4}
    assert rates(network, None, None, 1e-3) == {"textencoder": 1e-3, "unet": 1e-3}
    assert rates(network, None, 1e-4, None) == {"textencoder": None, "unet": 1e-4}
    assert rates(network, 0, None, 1e-3) == {"unet": 1e-3}


def test_a_rate_for_each_text_encoder():
    network = create_network(1.0, 4, 1.0, None, *tiny_parts("sdxl"))
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5, 2e-5], None, 1e-3)
    assert names == ["textencoder1", "textencoder2", "unet"]
    assert [group["lr"] for group in groups] == [1e-5, 2e-5, 1e-3]
    first = {id(p) for module in network.text_adapters if "_te1_" in module.name for p in module.parameters()}
    assert {id(parameter) for parameter in groups[0]["params"]} == first
    _, names = network.prepare_optimizer_params_with_multiple_te_lrs([0.0, 2e-5], 0.0, 1e-3)
    assert names == ["textencoder2"]
    assert rates(network, 1e-5, 1e-4, 1e-3) == {"textencoder": 1e-5, "unet": 1e-4}


def test_groups_per_block():
    network = unet_network(down_lr_weight="zeros", mid_lr_weight="0.5", up_lr_weight=",".join(["0.25"] * 12))
    found = rates(network, None, 1e-2, 1e-3)
    assert found == {"unet_block12": 5e-3} | {f"unet_block{index}": 2.5e-3 for index in range(16, 25)}
    assert not any("down_blocks" in module.name for module in network.adapters)


def test_from_weights_keeps_modules_of_blocks_that_are_not_trained():
    _, unet = tiny_parts()
    tensors = create_network(1.0, 4, 1.0, None, None, unet).state_dict()
    network, _ = create_network_from_weights(1, "f", None, None, unet, weights_sd=tensors, down_lr_weight="zeros")
    assert len(network.adapters) == 192
    assert not any(name in rates(network, None, 1e-3) for name in ("unet_block1", "unet_block2"))
    assert rates(network, None, None)["unet_block12"] is None
    assert "unet_block1" not in rates(network, None, None)


def test_loraplus_gives_up_weights_their_own_rate():
    arguments = {"loraplus_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}
    network = create_network(1.0, 4, 1.0, None, *tiny_parts(), **arguments)
    assert rates(network, 1e-5, 1e-4, None) == pytest.approx(
        {"textencoder": 1e-5, "textencoder plus": 4e-5, "unet": 1e-4, "unet plus": 1.6e-3}
    )
    groups, names = network.prepare_optimizer_params(1e-5, 1e-4, None)
    ups = {id(module.lora_up.weight) for module in network.unet_adapters}
    assert {id(parameter) for parameter in groups[names.index("unet plus")]["params"]} == ups


# ---------------------------------------------------------------------------------------------- norm limit


def test_max_norm_vector():
    module = LoRAModule("m", torch.nn.Linear(3, 5), rank=2, alpha=1.0)
    with torch.no_grad():
        module.lora_down.weight.copy_(torch.arange(6.0).reshape(2, 3))
        module.lora_up.weight.fill_(1)
    assert torch.linalg.norm(module.weight_change()).item() == pytest.approx(10.1858, abs=1e-4)
    scaled, mean, largest = LoRANetwork([], [module]).apply_max_norm_regularization(5.0, "cpu")
    assert (int(scaled), round(float(mean), 5), round(float(largest), 5)) == (1, 5.0, 5.0)
    torch.testing.assert_close(module.lora_up.weight, torch.full((5, 2), 0.70063), atol=1e-5, rtol=0)
    torch.testing.assert_close(module.lora_down.weight, torch.arange(6.0).reshape(2, 3) * 0.70063, atol=1e-4, rtol=0)


def test_max_norm_of_a_whole_network():
    """Only modules above the limit change, each to the limit, as the dense norms say."""
    text_encoder, unet = tiny_parts()
    network = create_network(0.5, 4, 2.0, None, text_encoder, unet, conv_dim="2")
    perturb(network, std=0.2)

    def norms():
        changes = (module.weight_change() / module.multiplier for module in network.adapters)
        return torch.stack([torch.linalg.norm(change) for change in changes])

    before = norms()
    limit = before.median().item()
    expected = before.clamp(max=limit)
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert int(scaled) == (before > limit * (1 + 1e-6)).sum()
    torch.testing.assert_close(norms(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([mean, largest]), torch.stack([expected.mean(), expected.max()]))


# ---------------------------------------------------------------------------------------------- whole models


def model_gradients(dtype: torch.dtype, *, fused: bool) -> torch.Tensor:
    text_encoder, unet = (part.to(dtype) for part in tiny_parts())
    network = create_network(1.0, 4, 4.0, None, text_encoder, unet, conv_dim="2")
    perturb(network)
    network.apply_to(text_encoder, unet)
    for module in network.adapters:
        module._can_fuse = module._can_fuse and fused
    outputs(text_encoder, unet)[1].float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def test_fused_layers_in_a_whole_model():
    """In float32 as the plain formula; in bf16 no further from float32 than the plain formula is."""
    exact = model_gradients(torch.float32, fused=False)

    def distance(gradients):
        return ((gradients - exact).norm() / exact.norm()).item()

    assert distance(model_gradients(torch.float32, fused=True)) < 1e-5
    rounded = {fused: distance(model_gradients(torch.bfloat16, fused=fused)) for fused in (True, False)}
    assert rounded[True] < min(0.05, 1.2 * rounded[False])
