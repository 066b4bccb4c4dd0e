"""Prompts of several parts without regions: how they are split, and what follows of their predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from library.diffusion.samplers import make_scheduler
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate.composition import PromptPart, prompt_parts, split_prompt
from library.generate.conditions import PromptEncoder
from library.generate.denoise import begin, denoise
from library.generate.guidance import guided
from library.generate.options import PictureOptions
from library.generate.prompt_line import parse_prompt_line
from library.generate.request import GenerationRequest, checked_line, request_of
from library.models.options import AttentionOptions
from library.options import OptionError

REQUEST = GenerationRequest(
    prompt="a cat AND a dog :0.5",
    negative_prompt="blurry",
    width=64,
    height=64,
    steps=2,
    scale=4.0,
    seed=1,
    sampler="euler",
)


@pytest.fixture(scope="module")
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusion().load(
        ModelOptions(pretrained_model_name_or_path=str(tiny_sd1_path)), AttentionOptions(), plan
    )


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat :0.7", [("a cat :0.7", 1.0)]),
        ("a AND b", [("a", 1.0), ("b", 1.0)]),
        ("a :0.7 AND b:-.5 AND c : +2.", [("a", 0.7), ("b", -0.5), ("c", 2.0)]),
        ("(a:1.2) AND b: x", [("(a:1.2)", 1.0), ("b: x", 1.0)]),
        ("aANDb and c", [("aANDb and c", 1.0)]),
        ("a AND  AND b", [("a", 1.0), ("", 1.0), ("b", 1.0)]),
    ],
)
def test_a_prompt_is_split_at_and(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert prompt_parts(prompt) == tuple(PromptPart(*part) for part in parts)
    assert len(split_prompt(prompt)) == len(parts)


def test_texts_and_weights_of_a_request() -> None:
    assert REQUEST.texts == ("blurry", "a cat", "a dog")
    assert REQUEST.part_weights == (1.0, 0.5)
    regional = dataclasses.replace(REQUEST, region_map="map.png")
    assert regional.texts == ("blurry", "a cat", "a dog :0.5"), "weights are read in a composition alone"
    assert (regional.part_weights, regional.parts_per_row, REQUEST.parts_per_row) == ((1.0,), 2, 1)
    other = dataclasses.replace(REQUEST, prompt="a cat AND a dog :0.6")
    assert REQUEST.batch_key != other.batch_key, "weights are those of a whole batch"


def test_composition_is_the_papers_formula() -> None:
    rows = torch.tensor([1.0, 2.0, 5.0, 9.0, 3.0, 4.0]).view(6, 1, 1, 1)
    expected = [1 + 4 * ((5 - 1) + 0.5 * (3 - 1)), 2 + 4 * ((9 - 2) + 0.5 * (4 - 2))]
    assert guided(REQUEST, rows.split(2)).flatten().tolist() == expected
    unguided = dataclasses.replace(REQUEST, scale=1.0)
    assert unguided.is_guided
    assert guided(unguided, rows.split(2))[0].item() == 1 + (5 - 1) + 0.5 * (3 - 1)


def test_the_first_step_is_that_of_the_composed_prediction(bundle: ModelBundle) -> None:
    family, encoder = StableDiffusion(), PromptEncoder(StableDiffusion(), bundle)
    request = dataclasses.replace(REQUEST, steps=1)

    def prediction(prompt: str) -> torch.Tensor:
        alone = dataclasses.replace(request, prompt=prompt, scale=1.0)
        drawing = begin(family, bundle, [alone], encoder, [torch.Generator().manual_seed(1)])
        return drawing.predict(drawing.latents_BChw, drawing.conditioning)

    with torch.no_grad():
        u, cat, dog = map(prediction, ("blurry", "a cat", "a dog"))
        drawing = begin(family, bundle, [request], encoder, [torch.Generator().manual_seed(1)])
    composed = u + 4.0 * ((cat - u) + 0.5 * (dog - u))
    scheduler = make_scheduler("euler", v_prediction=False, zero_terminal_snr=False)
    scheduler.set_timesteps(1)
    stepped = scheduler.step(composed, scheduler.timesteps[0], drawing.latents_BChw).prev_sample
    expected = stepped / family.latent_scale
    assert torch.allclose(denoise(family, bundle, [request]), expected, atol=1e-3, rtol=1e-4)


def test_a_part_of_weight_zero_and_a_part_twice(bundle: ModelBundle) -> None:
    def make(prompt: str, scale: float = 4.0) -> torch.Tensor:
        return denoise(StableDiffusion(), bundle, [dataclasses.replace(REQUEST, prompt=prompt, scale=scale)])

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().mean() / one.abs().mean())

    assert difference(make("a cat"), make("a cat AND a dog :0")) < 1e-4
    assert difference(make("a cat"), make("a cat :0.5 AND a cat :0.5")) < 1e-4
    assert difference(make("a cat", scale=1), make("a cat :0.5 AND a cat :0.5", scale=1)) < 1e-4
    assert difference(make("a cat"), make("a cat AND a dog")) > 1e-2


def test_a_picture_of_parts_does_not_depend_on_its_batch(bundle: ModelBundle) -> None:
    requests = [dataclasses.replace(REQUEST, prompt=f"a {thing} AND a dog :0.5") for thing in ("cat", "house")]
    together = denoise(StableDiffusion(), bundle, requests)
    for index, request in enumerate(requests):
        alone = denoise(StableDiffusion(), bundle, [request])[0]
        assert float((together[index] - alone).abs().mean() / alone.abs().mean()) < 1e-4


# ---------------------------------------------------------------------------------------------- prompt lines


def test_multipliers_of_a_line() -> None:
    line = parse_prompt_line("a cat --am 0.5,-1, 2 --s 3")
    assert line.multipliers == (0.5, -1.0, 2.0)
    request = request_of(line, PictureOptions(), seed=1)
    assert request.multipliers == (0.5, -1.0, 2.0)
    assert request.batch_key != dataclasses.replace(request, multipliers=(0.5,)).batch_key
    assert request_of(parse_prompt_line("a"), PictureOptions(), seed=1).multipliers is None


@pytest.mark.parametrize("value", ["", "x", "0.5;1", "nan", "1,inf"])
def test_multipliers_that_are_no_numbers(value: str) -> None:
    with pytest.raises(
        OptionError, match="prompts.txt, line 2: --am .* is not a multiplier or several joined by commas"
    ):
        parse_prompt_line(f"a cat --am {value}", "prompts.txt, line 2")


def test_weights_beyond_all_arithmetic_name_the_line() -> None:
    line = parse_prompt_line(f"a AND b :{'9' * 400}", "prompts.txt, line 2")
    with pytest.raises(OptionError, match="prompts.txt, line 2: a part of it has a weight of inf"):
        checked_line(line, "euler")
