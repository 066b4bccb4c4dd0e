"""ControlNets and ControlNet-LLLites while drawing: when each takes part, with which image, for which rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.families.base import Conditioning, LoadPlan, ModelBundle, Residuals
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate import hints
from library.generate.control import Control, ControlNets
from library.generate.control_options import ControlFile, ControlOptions, Preprocessor
from library.generate.denoise import denoise
from library.generate.guide_images import GuideImages
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from library.options import OptionError
from tests.tiny_control import guide_image, tiny_control_net

REQUEST = GenerationRequest("a cat", "blurry", 64, 72, 4, 7.5, 1, sampler="euler")
FAMILY = StableDiffusion()


@pytest.fixture(scope="module")
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(tiny_sd1_path)), AttentionOptions(), plan)


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("guides")
    return tuple(str(guide_image(folder / f"{seed}.png", seed)) for seed in range(4))


class Counting(torch.nn.Module):
    """A ControlNet that notes in which step it is asked, and for how many rows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net, self.asked = tiny_control_net(seed=seed), []
        self.config = self.net.config

    def forward(self, noised: torch.Tensor, timesteps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((len(noised), int(timesteps[0])))
        return self.net(noised, timesteps, *args, **kwargs)


def control(net: Any, index: int = 0, weight: float = 1.0, ratio: float = 1.0) -> Control:
    return Control(net, ControlFile("", "", Preprocessor(), weight, ratio), index)


def draw(bundle: ModelBundle, *requests: GenerationRequest, controls: list[Control], sums: bool = False):
    return denoise(FAMILY, bundle, requests, parts=[ControlNets(controls, sums=sums)])


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / one.abs().mean())


def with_guides(*guides: str, **values: Any) -> GenerationRequest:
    return dataclasses.replace(REQUEST, guide_images=guides, **values)


def test_several_take_turns_or_are_summed(bundle: ModelBundle, guides: tuple[str, ...]) -> None:
    nets = [Counting(0), Counting(1)]
    controls = [control(net, index) for index, net in enumerate(nets)]
    request = with_guides(*guides[:2])
    in_turn = draw(bundle, request, controls=controls)
    first, second = (net.asked for net in nets)
    assert [rows for rows, _ in first] == [2, 2]
    assert first[0][1] > second[0][1] > first[1][1] > second[1][1]
    summed = draw(bundle, request, controls=controls, sums=True)
    assert [len(net.asked) for net in nets] == [6, 6]
    assert difference(in_turn, summed) > 0.01
    assert difference(in_turn, draw(bundle, with_guides(*guides[1::-1]), controls=controls)) > 1e-3, "images in order"


def test_ratios_and_weights(bundle: ModelBundle, guides: tuple[str, ...]) -> None:
    """Step i of n is left out where ratio < i / n."""
    for ratio, steps in ((0.5, 3), (0.49, 2), (0.0, 1), (1.0, 4)):
        net = Counting()
        draw(bundle, with_guides(guides[0]), controls=[control(net, ratio=ratio)])
        assert len(net.asked) == steps
    plain = denoise(FAMILY, bundle, [REQUEST])
    net = Counting()
    assert torch.equal(plain, draw(bundle, with_guides(guides[0]), controls=[control(net, weight=0.0)]))
    assert not net.asked
    whole, half = (draw(bundle, with_guides(guides[0]), controls=[control(net, weight=weight)]) for weight in (1, 0.5))
    assert difference(plain, whole) > difference(plain, half) > 1e-3


def test_a_request_may_do_without(bundle: ModelBundle, guides: tuple[str, ...]) -> None:
    net = Counting()
    alone = with_guides(guides[0], is_controlled=False)
    assert torch.equal(denoise(FAMILY, bundle, [REQUEST]), draw(bundle, alone, controls=[control(net)]))
    assert alone.batch_key != with_guides(guides[0]).batch_key


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_each_picture_has_its_own_guide(bundle: ModelBundle, guides: tuple[str, ...], scale: float) -> None:
    requests = [with_guides(guide, seed=seed, scale=scale) for seed, guide in enumerate(guides[:3])]
    controls = [control(tiny_control_net())]
    together = draw(bundle, *requests, controls=controls)
    for index, request in enumerate(requests):
        assert difference(draw(bundle, request, controls=controls)[0], together[index]) < 1e-4
    same = [with_guides(guide) for guide in guides[:2]]
    assert difference(*draw(bundle, *same, controls=controls)) > 1e-3


def test_without_residuals_nothing_is_passed_on() -> None:
    context = torch.zeros(2, 77, 8)
    assert Conditioning(context).residual_inputs == {}
    assert Conditioning(context).added_inputs(torch.float32) is None


def test_rows_of_conditioning() -> None:
    rows = torch.arange(3.0)
    one = Residuals((rows.view(3, 1), rows.view(3, 1) + 1), rows.view(3, 1) * 2)
    part = Conditioning(rows.view(3, 1, 1), rows.view(3, 1), rows.view(3, 1), one).rows(slice(1, 3))
    assert part.context_BTD.flatten().tolist() == part.vector_BD.flatten().tolist() == [1, 2]
    assert part.residuals.down[1].flatten().tolist() == [2, 3]
    both = one.plus(one)
    assert both.mid.flatten().tolist() == [0, 4, 8]
    assert one.plus(None) is one


# ---------------------------------------------------------------------------------------------- guide images


def test_hints(guides: tuple[str, ...], tmp_path: Path) -> None:
    request = with_guides(*guides)
    plain, edges, fewer = (
        hints.hints([request, request], 1, Preprocessor.parse(name)) for name in ("none", "canny", "canny_250_2000")
    )
    assert plain.shape == (2, 3, 72, 64)
    resized = Image.open(guides[1]).convert("RGB").resize((64, 72), Image.Resampling.LANCZOS)
    assert np.array_equal((plain[0].permute(1, 2, 0) * 255).round().byte().numpy(), np.asarray(resized))
    assert set(edges.unique().tolist()) == {0, 1}
    assert torch.equal(edges[:, 0], edges[:, 2])
    assert 0 < edges.mean() < 0.5
    assert fewer.mean() < edges.mean()
    smaller = hints.at_size_of(plain, torch.empty(2, 4, 4, 5), 8)
    assert smaller.shape == (2, 3, 32, 40)


@pytest.mark.parametrize(
    ("text", "thresholds"),
    [("none", None), ("canny", (63, 191)), ("canny_50", (50, 191)), ("canny_50_100", (50, 100))],
)
def test_preprocessors_by_name(text: str, thresholds: tuple[int, int] | None) -> None:
    assert Preprocessor.parse(text).thresholds == thresholds


def test_guide_images_go_round(guides: tuple[str, ...], tmp_path: Path) -> None:
    """Picture p of n networks has the images from number p n on."""
    options = ControlOptions(guide_image_path=guides[:3], control_net_models=("a", "b"))
    given = GuideImages.of(options)
    assert [tuple(map(guides.index, given.of_picture(number))) for number in range(3)] == [(0, 1), (2, 0), (1, 2)]
    assert GuideImages.of(ControlOptions(guide_image_path=guides[:1])).of_picture(5) == guides[:1]
    assert GuideImages.of(ControlOptions()).of_picture(0) == ()
    folder = str(Path(guides[0]).parent)
    assert GuideImages.of(ControlOptions(guide_image_path=(guides[3], folder))).paths == (guides[3], *guides)
    (tmp_path / "broken.png").write_bytes(Path(guides[0]).read_bytes()[:200])
    for path, problem in (("missing.png", "does not exist"), (".", "can't be read"), ("broken.png", "can't be read")):
        with pytest.raises(OptionError) as caught:
            GuideImages.of(ControlOptions(guide_image_path=(str(tmp_path / path),)))
        assert str(caught.value).startswith("--guide_image_path: ") and problem in str(caught.value)


def test_lists_go_side_by_side() -> None:
    files = ControlOptions(
        guide_image_path=("x",),
        control_net_models=("a",),
        control_net_lllite_models=("b", "c"),
        control_net_preps=("none", "canny"),
        control_net_multipliers=(0.5,),
        control_net_ratios=(0.5, 0.25, 0.0),
    ).files
    assert [(file.path, file.preprocessor.name, file.weight, file.ratio) for file in files] == [
        ("a", "none", 0.5, 0.5), ("b", "canny", 1.0, 0.25), ("c", "none", 1.0, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"control_net_models": ("a",), "guide_image_path": None}, "--guide_image_path: the ControlNets have no guide"),
        ({"control_net_weights": (1, 2)}, "--control_net_weights: 2 values for 1 network; give at most one"),
        ({"control_net_preps": ("cany",)}, "--control_net_preps: 'cany' is no preprocessor; use none, canny or"),
        ({"control_net_weights": (1,), "control_net_multipliers": (1,)}, "--control_net_multipliers: is the same as"),
    ],
)
def test_mistakes(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        ControlOptions(**{"guide_image_path": ("x",), "control_net_models": ("a",), **values})
    assert str(caught.value).startswith(sentence)
