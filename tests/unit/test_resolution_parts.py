"""Deep Shrink and gradual latent: when they change sizes, that pictures keep theirs, and that they leave no trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from library.families.base import LoadPlan, ModelBundle, ModelFamily
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.generate.deep_shrink import DeepShrink, entries
from library.generate.denoise import denoise
from library.generate.gradual_latent import GradualLatent, scaled_size, sharpened
from library.generate.request import GenerationRequest
from library.generate.resolution_options import DeepShrinkOptions, GradualLatentOptions, Unsharp
from library.models.options import AttentionOptions
from library.options import OptionError

REQUEST = GenerationRequest("a cat", "", 128, 144, 4, 3.0, 1, sampler="euler_a")
MODELS: dict[str, ModelFamily] = {"sd1": StableDiffusion(), "sdxl": StableDiffusionXL()}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> tuple[ModelFamily, ModelBundle]:
    family = MODELS[request.param]
    path: Path = request.getfixturevalue(f"tiny_{request.param}_path")
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return family, family.load(ModelOptions(str(path)), AttentionOptions(), plan)


def shrunk(depth: int, **values: Any) -> DeepShrinkOptions:
    return DeepShrinkOptions(**{"ds_depth_1": depth, "ds_timesteps_1": 650, **values})


def drawn(model: tuple[ModelFamily, ModelBundle], **values: Any) -> torch.Tensor:
    request = dataclasses.replace(REQUEST, **values)
    return denoise(*model, [request], parts=(DeepShrink(), GradualLatent()))


def sizes_of(model: tuple[ModelFamily, ModelBundle], module: torch.nn.Module, **values: Any) -> list[tuple[int, int]]:
    """Heights and widths of a module's outputs, step by step."""
    seen: list[tuple[int, int]] = []

    def see(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append((hidden.shape[2], hidden.shape[3]))

    hook = module.register_forward_hook(see)
    try:
        drawn(model, **values)
    finally:
        hook.remove()
    return seen


def test_deep_shrink_at_every_depth(model: tuple[ModelFamily, ModelBundle]) -> None:
    plain = drawn(model)
    depths = range(len(entries(model[1].unet, model[0].name)))
    assert len(depths) == {"sd": 4, "sdxl": 9}[model[0].name]
    for depth in depths:
        other = drawn(model, deep_shrink=shrunk(depth))
        assert other.shape == plain.shape
        assert other.isfinite().all()
        assert (other - plain).abs().mean() > 1e-3, depth
    assert torch.equal(drawn(model), plain), "no trace is left"


def test_deep_shrink_follows_its_timesteps(model: tuple[ModelFamily, ModelBundle]) -> None:
    unet: Any = model[1].unet  # steps of euler_a at 999, 666, 333 and 0
    whole, half = sizes_of(model, unet.mid_block)[0], sizes_of(model, unet.mid_block, deep_shrink=shrunk(1))[0]
    assert half[0] < whole[0]
    two = shrunk(1, ds_timesteps_1=800, ds_depth_2=2, ds_timesteps_2=300)
    assert sizes_of(model, unet.mid_block, deep_shrink=shrunk(1)) == [half, half, whole, whole]
    second = unet.down_blocks[1] if model[0].name == "sd" else unet.down_blocks[0].resnets[0]
    first_sizes = sizes_of(model, second.resnets[0] if model[0].name == "sd" else second, deep_shrink=two)
    assert first_sizes[0][0] < first_sizes[1][0] == first_sizes[3][0], "depth 2 is behind this layer"
    assert sizes_of(model, unet.mid_block, deep_shrink=two)[2][0] < whole[0]


@pytest.mark.parametrize(
    "values",
    [{"ds_timesteps_1": 300}, {"ds_depth_2": 1, "ds_timesteps_2": 300}, {"ds_ratio": 0.25}, {"ds_depth_1": 1}],
    ids=str,
)
def test_every_option_of_deep_shrink_counts(model: tuple[ModelFamily, ModelBundle], values: dict[str, Any]) -> None:
    base = shrunk(2)
    one, other = (drawn(model, deep_shrink=item) for item in (base, dataclasses.replace(base, **values)))
    assert (one - other).abs().mean() > 1e-3


def test_gradual_latent_grows_to_the_whole_size(model: tuple[ModelFamily, ModelBundle]) -> None:
    options = GradualLatentOptions(
        gradual_latent_timesteps=700, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=1
    )
    unet: Any = model[1].unet
    assert sizes_of(model, unet.conv_in, gradual_latent=options) == [(8, 8), (8, 8), (8, 8), (18, 16)]
    assert drawn(model, gradual_latent=options).shape == drawn(model).shape
    late = dataclasses.replace(options, gradual_latent_timesteps=100)
    assert sizes_of(model, unet.conv_in, gradual_latent=late)[-1] == (8, 8)
    assert drawn(model, gradual_latent=late).shape[2:] == (18, 16), "enlarged by the last step, at the latest"


@pytest.mark.parametrize(
    "values",
    [
        {"gradual_latent_s_noise": 0.5}, {"gradual_latent_every_n_steps": 2}, {"gradual_latent_ratio": 0.9},
        {"gradual_latent_unsharp_params": "3,0.5,0.5"}, {"gradual_latent_unsharp_params": "3,0.5,0.5,0"},
        {"gradual_latent_ratio_step": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_of_gradual_latent_counts(tiny_sd1_path: Path, values: dict[str, Any]) -> None:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    model = MODELS["sd1"], MODELS["sd1"].load(ModelOptions(str(tiny_sd1_path)), AttentionOptions(), plan)
    base = GradualLatentOptions(
        gradual_latent_timesteps=1000, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=1
    )
    one, other = (drawn(model, gradual_latent=item) for item in (base, dataclasses.replace(base, **values)))
    assert (one - other).abs().mean() > 1e-3


def test_gradual_latent_with_nothing_to_enlarge_is_the_sampler_itself(tiny_sd1_path: Path) -> None:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    model = MODELS["sd1"], MODELS["sd1"].load(ModelOptions(str(tiny_sd1_path)), AttentionOptions(), plan)
    whole = GradualLatentOptions(gradual_latent_timesteps=1000, gradual_latent_ratio=1.0)
    assert torch.allclose(drawn(model, gradual_latent=whole), drawn(model), atol=1e-4)


def test_sizes_and_sharpening() -> None:
    assert scaled_size((64, 96), 0.5) == (32, 48)
    assert scaled_size((64, 96), 0.7) == (40, 64)
    assert scaled_size((12, 9), 0.5) == (8, 8)
    assert scaled_size((9, 11), 1.0) == (9, 11)
    flat = torch.full((1, 4, 8, 8), 2.0)
    assert torch.allclose(sharpened(flat, Unsharp(3, 0.5, 1.0)), flat)
    edge = torch.zeros(1, 4, 8, 8)
    edge[..., 4:] = 1.0
    sharp = sharpened(edge, Unsharp(3, 1.0, 1.0))
    assert sharp.max() > 1.1 and sharp.min() < -0.1


@pytest.mark.parametrize("text", ["3", "3,0.5", "a,b,c", "4,0.5,0.5", "3,0,0.5", "3,0.5,0.5,1,1"])
def test_unsharp_parameters_are_checked(text: str) -> None:
    with pytest.raises(OptionError, match="--gradual_latent_unsharp_params: "):
        GradualLatentOptions(gradual_latent_unsharp_params=text)
