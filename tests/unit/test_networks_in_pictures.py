"""Pictures with networks: regions, multipliers of a request, weights calculated beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.generate.conditions import PromptEncoder
from library.generate.denoise import begin, denoise
from library.generate.network_options import multipliers_of
from library.generate.networks import NetworkInUse, Networks
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from library.targets.adapter import Adapted
from networks.lora import create_network
from tests.tiny_networks import perturb, region_file

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


# ---------------------------------------------------------------------------------------------- regions


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
