"""How prompts are weighed: a negative scale, what emphasis keeps, and what SDXL is told of sizes."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.generate.conditions import PromptEncoder
from library.generate.denoise import denoise
from library.generate.guidance import guided
from library.generate.infotext import parse_infotext
from library.generate.output import ModelNames, infotext, metadata
from library.generate.prompt_line import PromptLine, parse_prompt_line
from library.generate.request import GenerationRequest
from library.generate.size_options import SizeOptions
from library.models.options import AttentionOptions
from library.options import OptionError
from library.text.weighted_tokens import apply_weights

FAMILY = StableDiffusionXL()
REQUEST = GenerationRequest("a cat", "blurry", 64, 72, 2, 7.5, 1, sampler="euler")


def changed(**values: object) -> GenerationRequest:
    return dataclasses.replace(REQUEST, **values)


def rows(*values: float) -> list[torch.Tensor]:
    return list(torch.tensor(values).view(-1, 1, 1, 1, 1))


def test_the_negative_scale_measures_from_the_empty_prompt() -> None:
    request = changed(scale=3.0, negative_scale=2.0)
    assert request.texts == ("blurry", "a cat", "")
    assert guided(request, rows(1.0, 5.0, 2.0)).item() == 2 + 3 * (5 - 2) - 2 * (1 - 2)
    composed = changed(prompt="a AND b :0.5", scale=3.0, negative_scale=2.0)
    assert composed.texts == ("blurry", "a", "b", "")
    assert guided(composed, rows(1.0, 5.0, 9.0, 2.0)).item() == 2 + 3 * ((5 - 2) + 0.5 * (9 - 2)) - 2 * (1 - 2)


def test_the_negative_scale_needs_guidance() -> None:
    request = changed(scale=1.0, negative_scale=2.0)
    assert request.texts == ("a cat",)
    assert guided(request, rows(4.0)).item() == 4
    assert changed(negative_scale=2.0).batch_key != REQUEST.batch_key != changed(sigmas="karras").batch_key


def test_what_emphasis_keeps() -> None:
    states = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.ones(2, 77)
    weights[:, 3:20] = 1.5
    plain = states * weights.unsqueeze(-1)
    assert torch.equal(apply_weights(states, weights, "none"), plain)
    by_abs, by_mean = (apply_weights(states, weights, keep) for keep in ("abs", "original"))
    torch.testing.assert_close(by_abs.abs().mean((1, 2)), states.abs().mean((1, 2)))
    torch.testing.assert_close(by_mean.mean((1, 2)), states.mean((1, 2)))
    assert len({float(each.sum()) for each in (plain, by_abs, by_mean)}) == 3


# ---------------------------------------------------------------------------------------------- sizes


@pytest.fixture(scope="module")
def bundle(tiny_sdxl_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / one.abs().mean())


def told(bundle: ModelBundle, *requests: GenerationRequest) -> list[list[float]]:
    sizes = PromptEncoder(FAMILY, bundle)(requests).sizes_B6
    assert sizes is not None
    return sizes.tolist()


def test_sizes_are_those_of_the_picture(bundle: ModelBundle) -> None:
    assert told(bundle, REQUEST) == [[72, 64, 0, 0, 72, 64]] * 2


def test_each_prompt_has_sizes_of_its_own(bundle: ModelBundle) -> None:
    sizes = SizeOptions(original_height=800, original_width=900, original_height_negative=100, crop_top=7, crop_left=9)
    positive, negative = [800, 900, 7, 9, 72, 64], [100, 900, 7, 9, 72, 64]
    plain = [72, 64, 0, 0, 72, 64]
    assert told(bundle, changed(sizes=sizes)) == [negative, positive]
    assert told(bundle, changed(sizes=sizes, scale=1.0)) == [positive]
    assert told(bundle, changed(sizes=sizes, negative_scale=1.0)) == [negative, positive, positive]
    assert told(bundle, changed(sizes=sizes), REQUEST) == [negative, plain, positive, plain]
    regional = changed(sizes=sizes, prompt="a AND b", region_map="map.png")
    assert told(bundle, regional) == [negative, positive]


@pytest.mark.parametrize("told_sizes", [{"original_height": 640}, {"original_width_negative": 640}, {"crop_left": 640}])
def test_sizes_change_the_picture(bundle: ModelBundle, told_sizes: dict[str, int]) -> None:
    """And pictures that are told different sizes can share a batch."""
    request = changed(sizes=SizeOptions(**told_sizes))
    other, plain = denoise(FAMILY, bundle, [request, REQUEST])
    alone = denoise(FAMILY, bundle, [request])[0]
    assert difference(other, plain) > 1e-3
    assert difference(other, alone) < 1e-4  # matrix products of other sizes round differently


def test_a_line_goes_before_the_flags() -> None:
    line = parse_prompt_line("a --ow 1 --oh 2 --nw 3 --nh 4 --ct 5 --cl 0")
    flags = SizeOptions(original_width=10, crop_left=20)
    assert flags.of_line(line) == SizeOptions(2, 1, 4, 3, 5, 0)
    assert flags.of_line(PromptLine("a")) == flags


def test_a_first_stage_is_told_smaller_sizes() -> None:
    assert SizeOptions(original_height=1025, crop_top=0).scaled(0.5) == SizeOptions(original_height=513, crop_top=0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a --ow 0", "--prompt: --original_width: 0 is out of range; use 1 to 1000000"),
        ("a --cl -1", "--prompt: --crop_left: -1 is out of range; use 0 to 1000000"),
    ],
)
def test_sizes_out_of_range(line: str, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        SizeOptions().of_line(parse_prompt_line(line))


# ---------------------------------------------------------------------------------------------- what is written down


def test_texts_of_a_picture() -> None:
    names = ModelNames("model")
    request = changed(negative_scale=2.0, sizes=SizeOptions(original_height=5, crop_top=6), sigmas="karras",
                      sampler="dpmsolver++", weighting="none")  # fmt: skip
    texts = metadata(request, names)
    assert list(texts)[5:9] == ["negative-prompt", "negative-scale", "original-height", "crop-top"]
    assert (texts["negative-scale"], texts["original-height"], texts["crop-top"]) == ("2.0", "5", "6")
    assert (
        "Sampler: DPM++ 2M, Schedule type: Karras" in texts["parameters"] and "Emphasis: No norm" in texts["parameters"]
    )
    assert set(metadata(REQUEST, names)) == {"prompt", "seed", "sampler", "steps", "scale", "negative-prompt",
                                             "parameters"}  # fmt: skip


@pytest.mark.parametrize("weighting", ["original", "none", "abs"])
def test_what_is_written_is_read_again(weighting: str) -> None:
    sizes = SizeOptions(original_width_negative=5, crop_left=0)
    request = changed(negative_scale=2.5, sizes=sizes, weighting=weighting, sampler="heun", sigmas="exponential")
    line = parse_infotext(infotext(request, ModelNames("m")), "x.png")
    assert (line.negative_scale, line.sampler, line.sigmas) == (2.5, "heun", "exponential")
    assert SizeOptions().of_line(line) == sizes
    assert (line.weighting or "original") == weighting


@pytest.mark.parametrize(
    ("label", "sampler", "sigmas"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmsolver++", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmsolver++", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmsolver++_sde", "exponential"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", "default"),
        ("Sampler: Heun", "heun", "default"),
        ("Sampler: DDIM Karras", "ddim", "default"),
    ],
)
def test_samplers_are_read_again(
    label: str, sampler: str | None, sigmas: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    line = parse_infotext(f"a cat\nSteps: 2, {label}, CFG scale: 7, Seed: 1, Size: 64x64, Model: m", "x.png")
    assert (line.sampler, line.sigmas) == (sampler, sigmas)
    assert bool(caplog.records) == (label == "Sampler: DDIM Karras"), "said where the schedule is not known"
    assert "Seed: 1" in infotext(changed(sampler="heun"), ModelNames("m"))


def test_a_line_may_have_a_negative_scale_or_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse_prompt_line("a --nl 2.5").negative_scale == 2.5
        assert parse_prompt_line("a --nl None").negative_scale == "none"
    assert not caplog.records
    with pytest.raises(OptionError, match="--nl 'much' is not a number or none"):
        parse_prompt_line("a --nl much")
