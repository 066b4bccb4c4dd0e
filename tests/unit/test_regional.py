"""Regions: networks that each have a part of the prompt and a place of their own, from one layer to whole pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.generate.conditions import PromptEncoder
from library.generate.denoise import begin, denoise
from library.generate.network_options import multipliers_of
from library.generate.networks import NetworkInUse, Networks, region_masks
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from library.targets.adapter import Adapted
from networks.injection import Network
from networks.lora import LoRAModule, create_network
from networks.regional import LEAST_WEIGHT, Generation, rule_of
from tests.tiny_networks import perturb

CPU = torch.device("cpu")
FAMILIES = {"sd1": StableDiffusion(), "sdxl": StableDiffusionXL()}
REQUEST = GenerationRequest(
    prompt="a cat",
    negative_prompt="blurry",
    width=64,
    height=64,
    steps=2,
    scale=1.0,
    seed=1,
    sampler="euler",
)


def load(kind: str, path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, CPU)
    return FAMILIES[kind].load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)


@pytest.fixture(scope="module")
def paths(tiny_sd1_path: Path, tiny_sdxl_path: Path) -> dict[str, Path]:
    return {"sd1": tiny_sd1_path, "sdxl": tiny_sdxl_path}


def hooked(bundle: ModelBundle, *, seed: int, **arguments: Any) -> Adapted:
    encoders = list(bundle.text_encoders)
    text: Any = encoders[0] if len(encoders) == 1 else encoders
    network = create_network(1.0, 4, 4, bundle.vae, text, bundle.unet, **arguments)
    network.apply_to(text, bundle.unet)
    perturb(network, seed=seed, std=0.15)
    return Adapted("networks.lora", network.eval().requires_grad_(False))


class Studio:
    """A model with networks, to draw with."""

    def __init__(self, kind: str, path: Path, seeds: tuple[int, ...], **arguments: Any) -> None:
        self.family, self.bundle = FAMILIES[kind], load(kind, path)
        self.networks = [hooked(self.bundle, seed=seed, **arguments) for seed in seeds]
        self.part = Networks([NetworkInUse(network, 1.0) for network in self.networks], CPU)
        self.encoder = PromptEncoder(self.family, self.bundle)
        self.encoder.networks = self.part

    def draw(self, *requests: GenerationRequest) -> torch.Tensor:
        return denoise(self.family, self.bundle, requests, encoder=self.encoder, parts=[self.part])


def changed(**values: Any) -> GenerationRequest:
    return dataclasses.replace(REQUEST, **values)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / one.abs().mean())


def region_file(folder: Path, *colors: tuple[int, int, int]) -> str:
    """A picture of equally wide stripes."""
    pixels = np.repeat(np.array([colors], np.uint8), 64 // len(colors), axis=1).repeat(64, axis=0)
    path = folder / f"{'_'.join(map(str, colors))}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


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


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_one_network_everywhere_is_the_plain_network(kind: str, paths: dict[str, Path], tmp_path: Path) -> None:
    studio = Studio(kind, paths[kind], (1,), conv_dim="2", conv_alpha="2")
    plain = studio.draw(REQUEST)
    regional = studio.draw(changed(region_map=region_file(tmp_path, (255, 255, 255))))
    assert difference(plain, regional) < 1e-4
    assert torch.equal(studio.draw(REQUEST), plain), "nothing is left of the region"
    assert difference(plain, studio.draw(changed(multipliers=(0.0,)))) > 1e-2


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_regions_of_a_batch_are_those_of_each_picture(
    kind: str, scale: float, paths: dict[str, Path], tmp_path: Path
) -> None:
    studio = Studio(kind, paths[kind], (1, 2))
    path = region_file(tmp_path, (255, 0, 0), (0, 255, 0))
    requests = [
        changed(prompt=f"{prompt} AND a dog AND a house", scale=scale, seed=seed, region_map=path)
        for seed, prompt in enumerate(["a cat", "two (birds:1.4)", "a tree"])
    ]
    together = studio.draw(*requests)
    for index, request in enumerate(requests):
        assert difference(studio.draw(request)[0], together[index]) < 1e-4
    assert difference(together, studio.draw(*(dataclasses.replace(r, multipliers=(1.0, 0.0)) for r in requests))) > 1e-3


def test_another_network_and_another_text_change_cross_attention_in_their_half_alone(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    """Exactly so before other layers, which mix places, have seen the change; afterwards all of the picture knows."""
    studio = Studio("sd1", paths["sd1"], (1, 2))
    for network in studio.networks:
        for adapter in network.network.adapters:
            if "attn2" not in adapter.name:
                adapter.lora_up.weight.zero_()
    name, attention = next(item for item in studio.bundle.unet.named_modules() if item[0].endswith("attn2"))
    seen: list[torch.Tensor] = []
    attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output.unflatten(1, (8, 8))))
    path = region_file(tmp_path, (255, 0, 0), (0, 255, 0))
    request = changed(prompt="a cat AND a dog", region_map=path, steps=1)
    for values in ({}, {"multipliers": (1.0, 0.3)}, {"prompt": "a cat AND a house"}):
        studio.draw(dataclasses.replace(request, **values))
    before, *after = seen
    for other in after:
        assert torch.equal(other[:, :, :4], before[:, :, :4]), name
        assert bool(((other[:, :, 4:] - before[:, :, 4:]).abs().amax(dim=-1) > 1e-4).all())


def test_attention_is_coupled_where_no_network_stands(paths: dict[str, Path], tmp_path: Path) -> None:
    dims = {"block_dims": ",".join(["0"] * 24 + ["4"])}  # the outermost block alone
    studio = Studio("sd1", paths["sd1"], (1, 2), **dims)
    assert not any("down_blocks" in adapter.name for adapter in studio.networks[1].network.adapters)
    path = region_file(tmp_path, (255, 0, 0), (0, 255, 0))
    one, other = (
        studio.draw(changed(prompt=f"a cat AND a {thing}", scale=4.0, region_map=path)) for thing in ("dog", "house")
    )
    assert difference(one, other) > 1e-3


def test_each_text_is_encoded_with_its_own_network(paths: dict[str, Path], tmp_path: Path) -> None:
    """Rows: the negative prompt without networks, then each part with its network alone; one pooled text, the last."""
    studio = Studio("sdxl", paths["sdxl"], (1, 2))
    path = region_file(tmp_path, (255, 0, 0), (0, 255, 0))
    request = changed(prompt="a cat AND a dog AND a tree", scale=4.0, region_map=path)

    def conditioning(asked: GenerationRequest) -> Any:
        with torch.no_grad(), studio.part.prepared([asked]):
            return begin(studio.family, studio.bundle, [asked], studio.encoder, [torch.Generator()]).conditioning

    got = conditioning(request)
    alone = [("blurry", (0.0, 0.0)), ("a cat", (1.0, 0.0)), ("a dog", (0.0, 1.0)), ("a tree", (0.0, 0.0))]
    rows = [conditioning(changed(prompt=text, multipliers=multipliers)) for text, multipliers in alone]
    assert torch.allclose(got.context_BTD, torch.cat([row.context_BTD for row in rows]), atol=1e-5)
    assert torch.allclose(got.vector_BD, torch.cat([rows[0].vector_BD, rows[3].vector_BD]), atol=1e-5)
    assert len(got.sizes_B6) == 2
    plain = conditioning(changed(prompt="a cat", multipliers=(0.0, 0.0)))
    assert not torch.allclose(got.context_BTD[1], plain.context_BTD[0], atol=1e-3)
    assert studio.part._now == (1.0, 1.0)


def test_models_beside_the_unet_get_the_last_part(paths: dict[str, Path], tmp_path: Path) -> None:
    studio = Studio("sd1", paths["sd1"], (1,))
    path = region_file(tmp_path, (255, 255, 255))
    requests = [changed(prompt=f"a {x} AND b AND c {x}", scale=4.0, region_map=path) for x in ("cat", "dog")]
    with torch.no_grad(), studio.part.prepared(requests):
        drawing = begin(studio.family, studio.bundle, requests, studio.encoder, [torch.Generator()] * 2)
    context = drawing.conditioning.context_BTD
    assert len(context) == 2 + 2 * 3
    assert torch.equal(drawing.without_regions(drawing.conditioning).context_BTD, context[[0, 1, 4, 7]])


# ---------------------------------------------------------------------------------------------- multipliers


def test_short_lists_are_padded_with_their_last_value() -> None:
    defaults = (0.1, 0.2, 0.3)
    asked = [None, (1.0,), (1.0, 2.0), (1.0, 2.0, 3.0, 4.0)]
    got = [multipliers_of(multipliers, defaults) for multipliers in asked]
    assert got == [defaults, (1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 2.0, 3.0)]


def test_multipliers_of_a_prompt_hold_for_it_alone(paths: dict[str, Path]) -> None:
    studio = Studio("sd1", paths["sd1"], (1, 2))
    bare = denoise(studio.family, load("sd1", paths["sd1"]), [REQUEST])
    default = studio.draw(REQUEST)
    assert torch.equal(studio.draw(changed(multipliers=(0.0,))), bare), "text encoders, too"
    assert torch.equal(studio.draw(REQUEST), default)
    assert difference(default, studio.draw(changed(multipliers=(1.0, 0.3)))) > 1e-3
    assert torch.equal(studio.draw(changed(multipliers=(1.0,))), default)


def test_weights_calculated_beforehand_are_the_applied_networks(paths: dict[str, Path]) -> None:
    applied = Studio("sd1", paths["sd1"], (1, 2))
    studio = Studio("sd1", paths["sd1"], (1, 2))
    before = {name: value.clone() for name, value in studio.bundle.unet.state_dict().items()}
    studio.part = Networks([NetworkInUse(network, 1.0, is_calculated=True) for network in studio.networks], CPU)
    for multipliers in (None, (0.5, -0.5), (0.0,), None):
        request = changed(multipliers=multipliers)
        assert difference(applied.draw(request), studio.draw(request)) < 1e-4
    assert any(not torch.equal(value, before[name]) for name, value in studio.bundle.unet.state_dict().items())
    for network in studio.networks:
        network.restore_weights()
    assert all(torch.equal(value, before[name]) for name, value in studio.bundle.unet.state_dict().items())
