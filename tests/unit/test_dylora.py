"""networks.dylora: the ranks that learn, the formula of training, files and arguments. See also the contracts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from library.options import OptionError
from library.targets.options import NetworkOptions
from networks import dylora, dylora_settings, lora
from networks.dylora import DyLoRAModule
from networks.dylora_settings import DyLoRASettings
from tests.network_targets import target
from tests.tiny_networks import outputs, perturb, tiny_parts

RANK = 6
LAYERS = {
    "linear": lambda: torch.nn.Linear(8, 5),
    "1x1": lambda: torch.nn.Conv2d(8, 5, 1),
    "3x3": lambda: torch.nn.Conv2d(8, 5, 3, stride=2, padding=1),
}


def module_on(layer: torch.nn.Module, *, unit: int = 1, rank: int = RANK, **settings) -> DyLoRAModule:
    torch.manual_seed(0)
    made = DyLoRAModule(
        "m", layer.requires_grad_(False), rank=rank, alpha=3.0, settings=DyLoRASettings(unit=unit, **settings)
    )
    perturb(made, std=0.5)
    made.hook()
    return made


def input_of(kind: str) -> torch.Tensor:
    return torch.randn(2, 7, 8) if kind == "linear" else torch.randn(2, 8, 6, 6)


def first_ranks(seeds: range, unit: int) -> list[int]:
    """The first rank b that a forward draws after each seed, as the module's documentation says."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(int(torch.randint(RANK // unit, ())) * unit)
    return found


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("unit", [1, 2, 6])
@pytest.mark.parametrize("kind", LAYERS)
def test_training_follows_the_formula(kind, unit):
    """Output and gradients, against the plain formula with b written out."""
    layer = LAYERS[kind]()
    module = module_on(layer, unit=unit)
    module.multiplier = 0.7
    x = input_of(kind)
    seeds = range(12)
    for seed, b in zip(seeds, first_ranks(seeds, unit), strict=True):
        module.zero_grad()
        down, up = (part.weight.detach().requires_grad_() for part in (module.lora_down, module.lora_up))
        factor = 0.7 * (3.0 / RANK) * math.sqrt(RANK / (b + unit))
        if kind == "linear":
            base, change = F.linear(x, layer.weight, layer.bias), F.linear(F.linear(x, down), up)
        else:
            geometry = layer.stride, layer.padding
            base, low = F.conv2d(x, layer.weight, layer.bias, *geometry), F.conv2d(x, down, None, *geometry)
            change = F.conv2d(low, up)
        expected = base + change * factor
        torch.manual_seed(seed)
        found = layer(x)
        torch.testing.assert_close(found, expected)
        for output in (expected, found):
            output.square().sum().backward()
        for part, whole, axis in ((module.lora_down, down, 0), (module.lora_up, up, 1)):
            for number, parameter in enumerate(part.parameters()):
                if number == b // unit:
                    torch.testing.assert_close(parameter.grad, whole.grad.narrow(axis, b, unit), rtol=1e-4, atol=1e-4)
                else:
                    assert parameter.grad is None


def test_every_part_is_drawn_as_often():
    layer = torch.nn.Linear(8, 5)
    module = module_on(layer, unit=2)
    drawn: Counter[int] = Counter()
    for _ in range(600):
        module.zero_grad()
        layer(torch.ones(1, 8)).sum().backward()
        (index,) = [number for number, part in enumerate(module.lora_up.parameters()) if part.grad is not None]
        drawn[index] += 1
    assert set(drawn) == {0, 1, 2} and min(drawn.values()) > 150


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_not_drawn_does_not_move(optimizer_class):
    """Neither by momentum nor by weight decay, after every part has learned before."""
    layer = torch.nn.Linear(8, 5)
    module = module_on(layer, unit=2)
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(module.parameters(), lr=0.01, weight_decay=0.1, **settings)
    for step in range(30):
        before = [parameter.detach().clone() for parameter in module.parameters()]
        optimizer.zero_grad(set_to_none=True)
        layer(torch.randn(4, 8)).square().sum().backward()
        learning = [parameter.grad is not None for parameter in module.parameters()]
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True)]
        assert moved == learning and sum(moved) == 2, step
    assert len(optimizer.state) == 6


def test_recomputed_blocks_draw_the_same():
    x = torch.randn(4, 8, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        layer = torch.nn.Linear(8, 5)
        layer.load_state_dict({"weight": torch.ones(5, 8), "bias": torch.zeros(5)})
        module = module_on(layer)
        torch.manual_seed(3)
        for _ in range(5):
            output = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            output.square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"rank_dropout": 0.5}])
def test_dropouts_work_beside_it(settings):
    layer = torch.nn.Linear(8, 5)
    module = module_on(layer, **settings)
    x = torch.ones(1, 8)
    torch.manual_seed(0)
    found = {tuple(round(value, 5) for value in layer(x)[0].tolist()) for _ in range(60)}
    plain = module_on(torch.nn.Linear(8, 5))
    assert len(found) > plain.num_parts
    assert sum(parameter.grad is not None for parameter in module.parameters()) == 0
    layer(x).sum().backward()
    assert sum(parameter.grad is not None for parameter in module.parameters()) == 2


def test_a_base_layer_that_learns_gets_its_gradient_and_one_part_too():
    layer = torch.nn.Linear(8, 5)
    module = module_on(layer)
    layer.requires_grad_(True)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert sum(parameter.grad is not None for parameter in module.parameters()) == 2


# ---------------------------------------------------------------------------------------------- evaluation, files


@torch.no_grad()
def test_evaluation_is_lora_with_all_ranks_and_draws_nothing(tmp_path):
    text_encoder, unet = tiny_parts()
    network = dylora.create_network(1.0, 4, 2.0, None, text_encoder, unet, unit="2")
    perturb(network)
    network.apply_to(text_encoder, unet)
    network.set_multiplier(0.6)
    network.eval()
    state = torch.get_rng_state()
    ours = outputs(text_encoder, unet)
    assert torch.equal(torch.get_rng_state(), state)
    file = tmp_path / "net.safetensors"
    network.save_weights(file, None, {})
    others = tiny_parts()
    plain, tensors = lora.create_network_from_weights(0.6, file, None, *others, for_inference=True)
    plain.apply_to(*others)
    plain.load_weights(file)
    assert tensors.keys() == plain.state_dict().keys()
    for a, b in zip(ours, outputs(*others), strict=True):
        assert torch.equal(a, b)


def test_networks_for_inference_draw_nothing():
    tensors = dylora.create_network(1.0, 4, 2.0, None, *tiny_parts()).state_dict()
    made = [
        dylora.create_network_from_weights(1.0, "f", None, *tiny_parts(), weights_sd=tensors, for_inference=inference)[
            0
        ]
        for inference in (True, False)
    ]
    assert [network.training for network in made] == [False, True]


def test_files_without_alpha_and_with_other_forms_of_projections():
    _, unet = tiny_parts("sd2")
    network = dylora.create_network(1.0, 4, 4.0, None, None, unet, unit="2")
    perturb(network)
    tensors = network.state_dict()
    other = {  # what another program makes of them
        key: value.flatten(1) if value.ndim == 4 else value[..., None, None] if "proj_in" in key else value
        for key, value in tensors.items()
        if not key.endswith("alpha")
    }
    again, _ = dylora.create_network_from_weights(1.0, "f", None, None, tiny_parts("sd2")[1], weights_sd=other)
    result = again.load_state_dict(other, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(value, tensors[key]) for key, value in again.state_dict().items())


def test_keys_that_a_file_lacks_are_counted_by_their_names_in_files():
    network = dylora.create_network(1.0, 4, 4.0, None, None, tiny_parts()[1])
    tensors = network.state_dict()
    name = network.adapters[0].name
    result = network.load_state_dict({key: tensors[key] for key in tensors if not key.startswith(name)}, strict=False)
    assert result.missing_keys == [f"{name}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]


# ---------------------------------------------------------------------------------------------- arguments


def rates(network, *arguments):
    groups, names = network.prepare_optimizer_params(*arguments)
    return {name: (group.get("lr"), len(group["params"])) for name, group in zip(names, groups, strict=True)}


def test_loraplus_and_rates_of_blocks():
    unet = tiny_parts()[1]
    plain = dylora.create_network(1.0, 4, 1.0, None, None, unet, unit="2", loraplus_lr_ratio="16")
    count = 2 * len(plain.adapters)
    assert rates(plain, None, 1e-4, None) == {"unet": (1e-4, count), "unet plus": (pytest.approx(1.6e-3), count)}
    ups = {id(part) for adapter in plain.adapters for part in adapter.lora_up.parameters()}
    groups, _ = plain.prepare_optimizer_params(None, 1e-4, None)
    assert {id(parameter) for parameter in groups[1]["params"]} == ups
    blocks = dylora.create_network(1.0, 4, 1.0, None, None, unet, down_lr_weight="zeros", mid_lr_weight="0.5")
    assert rates(blocks, None, 1e-2)["unet_block12"][0] == 5e-3
    assert not any("down_blocks" in adapter.name for adapter in blocks.adapters)


@pytest.mark.parametrize(("given", "expected"), [({}, 3.0), ({"conv_alpha": "1.5"}, 1.5)])
def test_alpha_of_convolutions(given, expected):
    network = dylora.create_network(1.0, 4, 3.0, None, None, tiny_parts()[1], conv_dim="4", **given)
    shapes = {(tuple(a.lora_down.weight.shape[2:]), float(a.alpha), a.rank) for a in network.adapters}
    assert {(alpha, rank) for shape, alpha, rank in shapes if shape == (3, 3)} == {(expected, 4)}
    assert {(alpha, rank) for shape, alpha, rank in shapes if shape != (3, 3)} == {(3.0, 4)}


MISTAKES = {
    "unit": ({"unit": "3"}, "--network_args unit: 3 does not divide the rank 4; use a --network_dim that is"),
    "no unit": ({"unit": "1.5"}, "--network_args unit: 1.5 is no number of ranks; use a whole number of 1 or more"),
    "negative unit": ({"unit": "-1"}, "--network_args unit: -1 is no number of ranks"),
    "other rank": ({"conv_dim": "2"}, "--network_args conv_dim: 2 is not --network_dim 4, and .* use conv_dim=4, or"),
    "ranks by block": ({"block_dims": ",".join(["4"] * 25)}, "--network_args block_dims: networks.dylora has one rank"),
    "typing error": ({"units": "2"}, "--network_args units: unknown name; did you mean unit"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_before_anything_is_loaded(name):
    arguments, sentence = MISTAKES[name]
    with pytest.raises(OptionError, match=sentence):
        dylora_settings.check_rank(None, **arguments)
    words = tuple(f"{key}={value}" for key, value in arguments.items())
    with pytest.raises(OptionError, match=sentence):
        NetworkOptions("networks.dylora", 4, network_args=words).check_before_start()
    with pytest.raises(OptionError, match=sentence):
        dylora.create_network(1.0, 4, 1.0, None, None, tiny_parts()[1], **arguments)


def test_the_unit_has_to_divide_the_ranks_of_a_file():
    tensors = lora.create_network(1.0, 3, 1.0, None, None, tiny_parts()[1]).state_dict()
    with pytest.raises(OptionError, match="--network_args unit: 2 does not divide the rank 3 of lora_unet_"):
        dylora.create_network_from_weights(1.0, "f", None, None, tiny_parts()[1], weights_sd=tensors, unit="2")


def test_targets_know_that_steps_leave_something_out():
    """So that processes exchange gradients that only some of them have."""
    found = {name: target(network_module=f"networks.{name}").skips_parameters for name in ("lora", "lora_fa", "dylora")}
    assert found == {"lora": False, "lora_fa": False, "dylora": True}
