"""ControlNet-LLLite: which layers, which files, what it computes, and that it is silent until it is shown an image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from library.checkpoints.architecture import UNetArchitecture
from library.checkpoints.safetensors_io import save_file
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.generate.control_lllite import LLLite, LLLiteControl
from library.generate.control_options import ControlFile, Preprocessor
from library.generate.denoise import denoise
from library.generate.request import GenerationRequest
from library.models.build import build_unet
from library.models.options import AttentionOptions
from library.options import OptionError
from networks import control_net_lllite
from networks.control_net_lllite import ControlNetLLLite, create_network_from_weights
from tests.tiny_control import guide_image, tiny_lllite
from tests.tiny_models import UNETS

FAMILY = StableDiffusionXL()
REQUEST = GenerationRequest("a cat", "blurry", 64, 128, 3, 7.5, 1, sampler="ddim")


@pytest.fixture
def bundle(tiny_sdxl_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)


def hooked(file: Path, bundle: ModelBundle) -> ControlNetLLLite:
    network, _ = create_network_from_weights(1.0, file, None, None, bundle.unet)
    network.apply_to(None, bundle.unet, False, True)
    return network.eval().requires_grad_(False)


def part(network: ControlNetLLLite, weight: float = 1.0, ratio: float = 1.0, index: int = 0) -> LLLiteControl:
    return LLLiteControl([LLLite(network, ControlFile("", "", Preprocessor(), weight, ratio), index)])


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / one.abs().mean())


def test_the_136_modules_of_sdxl() -> None:
    sizes = UNetArchitecture(4, 4, (320, 640, 1280), (5, 10, 20), (0, 2, 10), 2, 2048, True, vector_width=2816)
    with torch.device("meta"):
        state = ControlNetLLLite(build_unet(sizes), cond_emb_dim=32, mlp_dim=64).state_dict()
    names = {key.partition(".")[0] for key in state}
    assert len(names) == 136
    assert all(name.startswith(("lllite_unet_input_blocks_", "lllite_unet_middle_block_1_")) for name in names)
    assert {name[name.index("attn") :] for name in names} == {"attn1_to_q", "attn1_to_k", "attn1_to_v", "attn2_to_q"}
    first, deep = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.", "lllite_unet_middle_block_1_"
    deep += "transformer_blocks_9_attn2_to_q."
    assert {key.removeprefix(first): tuple(value.shape) for key, value in state.items() if key.startswith(first)} == {
        "conditioning1.0.weight": (16, 3, 4, 4), "conditioning1.0.bias": (16,),
        "conditioning1.2.weight": (32, 16, 4, 4), "conditioning1.2.bias": (32,),
        "down.0.weight": (64, 640), "down.0.bias": (64,),
        "mid.0.weight": (64, 96), "mid.0.bias": (64,),
        "up.0.weight": (640, 64), "up.0.bias": (640,),
    }  # fmt: skip
    assert state[f"{deep}conditioning1.2.weight"].shape == (16, 16, 4, 4)
    assert state[f"{deep}conditioning1.4.weight"].shape == (32, 16, 2, 2)


def test_files_go_round(tmp_path: Path) -> None:
    tensors = tiny_lllite(tmp_path / "lllite.safetensors")
    unet = build_unet(UNETS["sdxl"])
    network, _ = create_network_from_weights(1.0, tmp_path / "lllite.safetensors", None, None, unet)
    network.save_weights(tmp_path / "again.safetensors", None, {})
    again, _ = create_network_from_weights(1.0, tmp_path / "again.safetensors", None, None, unet)
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in again.state_dict().items())


def test_as_training_begins_it_changes_nothing(bundle: ModelBundle, tmp_path: Path) -> None:
    plain = denoise(FAMILY, bundle, [REQUEST])
    tiny_lllite(tmp_path / "zero.safetensors", is_zero=True)
    network = hooked(tmp_path / "zero.safetensors", bundle)
    guided = dataclasses.replace(REQUEST, guide_images=(str(guide_image(tmp_path / "guide.png")),))
    assert torch.equal(plain, denoise(FAMILY, bundle, [guided], parts=[part(network)]))


def test_it_steers_by_its_image(bundle: ModelBundle, tmp_path: Path) -> None:
    plain = denoise(FAMILY, bundle, [REQUEST])
    tiny_lllite(tmp_path / "lllite.safetensors")
    network = hooked(tmp_path / "lllite.safetensors", bundle)
    assert torch.equal(plain, denoise(FAMILY, bundle, [REQUEST])), "without an image it is silent"
    guides = [str(guide_image(tmp_path / f"{seed}.png", seed)) for seed in (0, 1)]
    requests = [dataclasses.replace(REQUEST, guide_images=(guide,)) for guide in guides]
    together = denoise(FAMILY, bundle, requests, parts=[part(network)])
    assert difference(plain, together[:1]) > 0.01
    assert difference(*together) > 1e-3
    for index, request in enumerate(requests):
        assert difference(denoise(FAMILY, bundle, [request], parts=[part(network)])[0], together[index]) < 1e-4
    half = denoise(FAMILY, bundle, requests[:1], parts=[part(network, ratio=0.1)])
    assert difference(half, together[:1]) > 1e-3
    assert torch.equal(plain, denoise(FAMILY, bundle, requests[:1], parts=[part(network, weight=0.0)]))
    alone = dataclasses.replace(requests[0], is_controlled=False)
    assert torch.equal(plain, denoise(FAMILY, bundle, [alone], parts=[part(network)]))
    assert torch.equal(plain, denoise(FAMILY, bundle, [REQUEST])), "nothing is left behind"


def test_the_formula(tmp_path: Path) -> None:
    tiny_lllite(tmp_path / "lllite.safetensors")
    unet = build_unet(UNETS["sdxl"]).requires_grad_(False)
    network, _ = create_network_from_weights(0.5, tmp_path / "lllite.safetensors", None, None, unet)
    network.apply_to(None, unet, False, True)
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    adapter = dict(network.named_modules())["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"]
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 64, 128, generator=generator) * 2 - 1
    x = torch.randn(2, 32, 64, generator=generator)
    assert torch.equal(layer(x), torch.nn.Linear.forward(layer, x))
    network.set_cond_image(image)
    tensors = {key: value for key, value in adapter.named_parameters()}

    def linear(name: str, of: torch.Tensor) -> torch.Tensor:
        return of @ tensors[f"{name}.0.weight"].T + tensors[f"{name}.0.bias"]

    condition = torch.nn.functional.conv2d(
        image, tensors["conditioning1.0.weight"], tensors["conditioning1.0.bias"], 4
    ).relu()
    condition = torch.nn.functional.conv2d(
        condition, tensors["conditioning1.2.weight"], tensors["conditioning1.2.bias"], 4
    )
    tokens = condition.flatten(2).transpose(1, 2).expand(2, -1, -1)
    change = linear("up", linear("mid", torch.cat([tokens, linear("down", x).relu()], -1)).relu()) * 0.5
    assert torch.allclose(layer(x), torch.nn.Linear.forward(layer, x + change), atol=1e-5)


def test_hidden_states_that_are_drawn_smaller() -> None:
    map_BEhw = torch.arange(32.0).view(1, 1, 4, 8)
    assert control_net_lllite._as_tokens(map_BEhw, 32).flatten().tolist() == list(range(32))
    assert control_net_lllite._grid(8, 4, 8) == (2, 4)
    assert control_net_lllite._grid(3 * 5, 6, 10) == (3, 5)
    assert control_net_lllite._as_tokens(map_BEhw, 8).shape == (1, 8, 1)


def test_other_files_are_refused(tmp_path: Path) -> None:
    tensors = dict(tiny_lllite(tmp_path / "lllite.safetensors"))
    unet = build_unet(UNETS["sdxl"])

    def refusal(changed: dict[str, torch.Tensor], unet: torch.nn.Module = unet) -> str:
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(OptionError) as caught:
            create_network_from_weights(1.0, tmp_path / "changed.safetensors", None, None, unet)
        return str(caught.value)

    assert "is no ControlNet-LLLite" in refusal({"lora_unet_x.lora_down.weight": torch.ones(2)})
    assert "is for SDXL alone" in refusal(tensors, build_unet(UNETS["sd1"]))
    last = list(tensors)[-1]
    assert f"is incomplete: {last} is missing" in refusal({key: tensors[key] for key in tensors if key != last})
    assert "was made for another model" in refusal({**tensors, last: torch.ones(7)})
    other = {
        key.replace("input_blocks_", "input_blocks_9").replace("middle", "muddle"): tensors[key] for key in tensors
    }
    assert "none of its" in refusal(other)
    few = {key: value for key, value in tensors.items() if "middle_block" in key}
    save_file(few, tmp_path / "few.safetensors")
    network, _ = create_network_from_weights(1.0, tmp_path / "few.safetensors", None, None, unet)
    assert network.state_dict().keys() == few.keys()
    assert not network.is_mergeable()
