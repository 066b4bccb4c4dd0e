"""networks.lora_fa: what is frozen, what that spares, and what it refuses. See also the contracts."""

from __future__ import annotations

import math

import pytest
import torch

from library.options import OptionError
from networks import lora, lora_fa
from tests.tiny_networks import outputs, perturb, tiny_parts


def network(*, module=lora_fa, **arguments):
    torch.manual_seed(0)
    made = module.create_network(1.0, 4, 2.0, None, *tiny_parts(), **arguments)
    made.prepare_grad_etc(None, None)
    return made


def test_initial_weights():
    made = network(conv_dim="4")
    for adapter in made.adapters:
        assert not adapter.lora_up.weight.any()
        inputs = adapter.lora_down.weight.shape[1]
        values = adapter.lora_down.weight * math.sqrt((inputs + adapter.rank) / 2)
        assert abs(values.mean()) < 0.3 and 0.7 < values.std() < 1.3
    everything = torch.cat([adapter.lora_down.weight.flatten() for adapter in made.unet_adapters[:40]])
    assert torch.unique(everything).numel() > 0.99 * everything.numel(), "each module has its own"


def test_down_stays_frozen():
    made = network()
    for ask in (lambda: made.prepare_grad_etc(None, None), lambda: made.requires_grad_(True)):
        ask()
        trained = {name.rpartition(".lora_")[2] for name, p in made.named_parameters() if p.requires_grad}
        assert trained == {"up.weight"}
    groups, names = made.prepare_optimizer_params(1e-5, 1e-4, None)
    assert names == ["textencoder", "unet"]
    ups = [id(adapter.lora_up.weight) for adapter in made.adapters]
    assert [id(parameter) for group in groups for parameter in group["params"]] == ups


def test_gradients_are_those_of_lora():
    weights, found = {}, []
    for module in (lora, lora_fa):
        text_encoder, unet = tiny_parts()
        made = module.create_network(1.0, 4, 2.0, None, text_encoder, unet, conv_dim="2")
        if not weights:
            perturb(made)
            weights = {key: value.clone() for key, value in made.state_dict().items()}
        made.load_state_dict(weights)
        made.apply_to(text_encoder, unet)
        made.prepare_grad_etc(text_encoder, unet)
        outputs(text_encoder, unet)[1].square().mean().backward()
        found.append([adapter.lora_up.weight.grad for adapter in made.adapters])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_a_layer_does_not_keep_its_input(kind):
    layer = (
        torch.nn.Linear(64, 8) if kind == "linear" else torch.nn.Conv2d(64, 8, int(kind[0]), padding=int(kind[0]) // 2)
    )
    x = torch.randn(2, 64, 16, 16).movedim(1, -1 if kind == "linear" else 1).requires_grad_()
    kept = {}
    for module_class in (lora.LoRAModule, lora_fa.LoRAFAModule):
        module = module_class("m", layer.requires_grad_(False), rank=2, alpha=1.0)
        module.hook()
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x).sum().backward()
        kept[module_class] = max(sizes)
        del layer.forward
    assert kept[lora.LoRAModule] == x.numel()
    assert kept[lora_fa.LoRAFAModule] < x.numel() // 4


def test_the_norm_limit_moves_up_alone():
    made = network()
    perturb(made, std=0.5)
    downs = [adapter.lora_down.weight.clone() for adapter in made.adapters]
    scaled, _, largest = made.apply_max_norm_regularization(0.01, "cpu")
    assert int(scaled) == len(made.adapters) and float(largest) == pytest.approx(0.01, rel=1e-4)
    norms = [torch.linalg.norm(adapter.weight_change()).item() for adapter in made.adapters]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    assert all(torch.equal(a.lora_down.weight, down) for a, down in zip(made.adapters, downs, strict=True))


@pytest.mark.parametrize("key", ["loraplus_lr_ratio", "loraplus_unet_lr_ratio"])
def test_loraplus_is_refused(key):
    with pytest.raises(OptionError, match=f"--network_args {key}: only one projection learns in networks.lora_fa"):
        lora_fa.check_arguments(**{key: "16"})


def test_further_training_keeps_the_down_of_a_file():
    first = network()
    perturb(first)
    tensors = first.state_dict()
    again, _ = lora_fa.create_network_from_weights(1.0, "f", None, *tiny_parts(), weights_sd=tensors)
    again.load_state_dict(tensors)
    again.prepare_grad_etc(None, None)
    assert not any(adapter.lora_down.weight.requires_grad for adapter in again.adapters)
    assert all(torch.equal(value, tensors[key]) for key, value in again.state_dict().items())
