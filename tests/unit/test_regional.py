"""Regions from masks to single layers: what each layer of a network does with its part and its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from library.generate.networks import region_masks
from networks.injection import Network
from networks.lora import LoRAModule
from networks.regional import LEAST_WEIGHT, Generation, rule_of
from tests.tiny_networks import perturb, region_file

# ---------------------------------------------------------------------------------------------- masks


def test_channels_are_the_masks_of_the_first_three_networks(tmp_path: Path) -> None:
    path = region_file(tmp_path, (255, 0, 51), (0, 255, 102))
    red, green, blue, fourth = region_masks(path, None, 4)
    assert red[0, 0] == 1 and red[0, 63] == 0
    assert green[5, 0] == 0 and green[5, 63] == 1
    assert blue[0, [0, 63]].tolist() == pytest.approx([0.2, 0.4])
    assert bool((fourth == 1).all())


def test_color_codes(tmp_path: Path) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255), (255, 255, 255)]
    path = region_file(tmp_path, *colors, (254, 0, 0))
    masks = region_masks(path, 7, 7)
    for index, mask in enumerate(masks):
        expected = torch.zeros(64)
        expected[index * 8 : index * 8 + 8] = 1
        assert torch.equal(mask, expected.expand(64, 64))
    two, _, third = region_masks(path, 2, 3)
    assert torch.equal(two, masks[0]) and bool((third == 1).all())


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [
        ((64, 64), 4096, (64, 64)),
        ((64, 64), 1024, (32, 32)),
        ((9, 8), 20, (5, 4)),  # halved and rounded up
        ((64, 36), 2304, (64, 36)),
        ((64, 64), 48 * 48, (48, 48)),  # of a deep shrink
        ((128, 64), 96 * 48, (96, 48)),
        ((64, 64), 77, None),
    ],
)
def test_the_size_of_so_many_tokens(size: tuple[int, int], tokens: int, expected: tuple[int, int] | None) -> None:
    assert Generation(1, 1, *size, {}).size_of(tokens) == expected


# ---------------------------------------------------------------------------------------------- layers


def adapter_on(name: str, layer: torch.nn.Module, network_index: int, num_parts: int, mask: torch.Tensor) -> LoRAModule:
    """A LoRA on one layer, in the midst of a generation of 2 pictures of 32 x 32 pixels."""
    adapter = LoRAModule(name, layer, rank=2, alpha=2.0)
    perturb(adapter, std=1.0)
    adapter.hook()
    network = Network([], [adapter])
    network.set_region(network_index, False, mask)
    network.set_current_generation(2, num_parts, 32, 32, {})
    return adapter


def halves() -> torch.Tensor:
    """1 in the left half."""
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    return mask


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_te2_"])
def test_text_layers_change_the_rows_of_their_part(prefix: str) -> None:
    layer = torch.nn.Linear(6, 5)
    x = torch.randn(6, 7, 6)
    plain = layer(x)
    adapter_on(f"{prefix}text_model_encoder_layers_0_self_attn_q_proj", layer, 1, 3, halves())
    rows = (layer(x) - plain).abs().amax(dim=(1, 2)) > 1e-3
    assert rows.tolist() == [False, True, False] * 2
    assert torch.equal(layer(x[:2]), plain[:2]), "as many rows as pictures: negative prompts"


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn2_to_k", "attn2_to_v"])
@pytest.mark.parametrize(("groups", "begin"), [(0, 0), (1, 2), (2, 2)])
def test_context_layers_change_the_rows_of_their_part(name: str, groups: int, begin: int) -> None:
    layer = torch.nn.Linear(6, 5)
    x = torch.randn(2 * 3 + 2 * groups, 7, 6)
    plain = layer(x)
    adapter_on(f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{name}", layer, 2, 3, halves())
    rows = ((layer(x) - plain).abs().amax(dim=(1, 2)) > 1e-3).nonzero().flatten().tolist()
    assert rows == [begin + 2, begin + 5]


@torch.no_grad()
def test_other_layers_change_their_region_exactly() -> None:
    linear, conv = torch.nn.Linear(6, 5), torch.nn.Conv2d(6, 5, 3, padding=1)
    tokens, pixels = torch.randn(4, 16, 6), torch.randn(4, 6, 4, 4)
    plain = linear(tokens), conv(pixels)
    adapters = [
        adapter_on("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", linear, 0, 2, halves()),
        adapter_on("lora_unet_up_blocks_1_resnets_0_conv1", conv, 0, 2, halves()),
    ]
    by_place = linear(tokens).unflatten(1, (4, 4)), conv(pixels).permute(0, 2, 3, 1)
    for got, before in zip(by_place, (plain[0].unflatten(1, (4, 4)), plain[1].permute(0, 2, 3, 1)), strict=True):
        assert torch.equal(got[:, :, 2:], before[:, :, 2:])
        assert bool(((got[:, :, :2] - before[:, :, :2]).abs() > 1e-4).any(dim=-1).all())
    for adapter in adapters:
        adapter.region.generation = None  # everywhere again
    assert not torch.equal(linear(tokens).unflatten(1, (4, 4))[:, :, 2:], plain[0].unflatten(1, (4, 4))[:, :, 2:])


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["lora_unet_mid_block_resnets_0_time_emb_proj", "lora_unet_middle_block_0_emb_layers_1"]
)
def test_layers_of_the_time_have_no_place(name: str) -> None:
    layer = torch.nn.Linear(6, 5)
    x = torch.randn(4, 6)
    adapter = adapter_on(name, layer, 1, 2, halves())
    assert torch.equal(layer(x), adapter.forward(x))


@torch.no_grad()
def test_a_mask_of_zeros_is_the_whole_picture() -> None:
    layer = torch.nn.Conv2d(6, 5, 1)
    x = torch.randn(2, 6, 4, 4)
    adapter = adapter_on("lora_unet_conv", layer, 0, 1, torch.zeros(16, 16))
    assert torch.allclose(layer(x), adapter.forward(x), atol=1e-6)


class Attention(torch.nn.Module):
    """Layers of a cross-attention that leaves queries as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(4, 4)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(4, 4)])


@torch.no_grad()
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_parts_are_put_together_by_their_masks(groups: int) -> None:
    """Two pictures, three parts of which two have a network: by hand, as the formula says."""
    unet = torch.nn.Module()
    unet.attn2 = Attention()
    to_out: Any = unet.attn2.to_out[0]
    plain = torch.nn.Linear(4, 4)
    plain.load_state_dict(to_out.state_dict())
    masks = [halves(), torch.full((16, 16), 0.5)]
    adapters, shared = [], {}
    networks = []
    for _ in masks:
        adapter = LoRAModule("lora_unet_attn2_to_out_0", to_out, rank=2, alpha=2.0)
        perturb(adapter, seed=len(adapters), std=1.0)
        adapters.append(adapter)
        networks.append(Network([], [adapter]))
        networks[-1].apply_to(None, unet)
    for index, network in enumerate(networks):
        network.set_region(index, index == 1, masks[index])
        network.set_current_generation(2, 3, 32, 32, shared)
    hidden = torch.randn(2 * max(1, groups + 1), 16, 4)
    queries = unet.attn2.to_q(hidden)
    begin = 2 if groups else 0
    assert len(queries) == 2 * (groups + 3)
    lone = torch.nn.functional.linear(hidden, unet.attn2.to_q.weight, unet.attn2.to_q.bias)
    repeated = lone[begin : begin + 2].repeat_interleave(3, dim=0)
    assert torch.allclose(queries[begin : begin + 6], repeated, atol=1e-6)
    x = torch.randn(2 * (groups + 3), 16, 4)
    got = to_out(x)
    assert len(got) == 2 * (groups + 1) or (groups == 0 and len(got) == 2)
    weight = [mask[::4, ::4].reshape(1, 16, 1) for mask in masks]
    parts = x[begin : begin + 6].unflatten(0, (2, 3))
    total = (weight[0] + weight[1]).clamp(min=LEAST_WEIGHT)
    expected = sum(weight[s] * plain(parts[:, s]) for s in (0, 1)) / total
    expected += sum(weight[s] * adapters[s].change(parts[:, s]) for s in (0, 1))
    assert torch.allclose(got[begin : begin + 2], expected, atol=1e-5)
    if groups:
        assert torch.allclose(got[:2], plain(x[:2]), atol=1e-6)
    if groups == 2:
        assert torch.allclose(got[-2:], plain(x[-2:]), atol=1e-6)


def test_rules_by_name() -> None:
    names = [
        "lora_te_a",
        "lora_te1_a",
        "lora_te2_a",
        "x_attn2_to_k",
        "x_attn2_to_out_0",
        "x_time_emb_proj",
        "x_attn2_to_q",
    ]
    rules = [rule_of(name).__name__ for name in names]
    assert rules == ["_of_own_text"] * 3 + ["_of_own_context", "_put_aside", "_everywhere", "_masked"]
