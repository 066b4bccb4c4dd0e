"""The denoising function on a tiny model: what a picture depends on, and what it must not touch."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate.conditions import PromptEncoder
from library.generate.denoise import decode, denoise
from library.generate.guidance import guided
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions

REQUEST = GenerationRequest(
    prompt="a photo of a cat",
    negative_prompt="blurry",
    width=64,
    height=72,
    steps=4,
    scale=7.5,
    seed=1,
    sampler="euler",
)


def load(path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusion().load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)


@pytest.fixture(scope="module")
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    return load(tiny_sd1_path)


def make(bundle: ModelBundle, *requests: GenerationRequest) -> torch.Tensor:
    return denoise(StableDiffusion(), bundle, requests)


def changed(**values: object) -> GenerationRequest:
    return dataclasses.replace(REQUEST, **values)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / one.abs().mean())


def test_pictures_come_out(bundle: ModelBundle) -> None:
    latents = make(bundle, REQUEST, changed(seed=2))
    assert latents.shape == (2, 4, 9, 8)
    assert latents.dtype == torch.float32
    pixels = decode(bundle, latents)
    assert pixels.shape == (2, 72, 64, 3)
    assert pixels.dtype == torch.uint8
    assert pixels.float().std() > 5


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a", "dpmsolver++"])
def test_a_picture_does_not_depend_on_its_batch(bundle: ModelBundle, sampler: str) -> None:
    prompts = ["a cat", "a dog", "two (birds:1.4)", ""]
    requests = [changed(prompt=prompt, seed=seed, sampler=sampler) for seed, prompt in enumerate(prompts)]
    together = make(bundle, *requests)
    for index, request in enumerate(requests):
        alone = make(bundle, request)
        assert difference(alone[0], together[index]) < 1e-4  # matrix products of other sizes round differently
        assert decode(bundle, alone)[0].int().sub(decode(bundle, together)[index].int()).abs().max() <= 1


def test_equal_requests_make_equal_pictures(bundle: ModelBundle) -> None:
    assert torch.equal(make(bundle, REQUEST), make(bundle, REQUEST))


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "a dog"}, {"negative_prompt": ""}, {"seed": 2}, {"steps": 5}, {"scale": 3.0},
        {"sampler": "euler_a"}, {"prompt": "a photo of a (cat:1.6)"}, {"clip_skip": 2},
    ],
    ids=str,
)  # fmt: skip
def test_everything_in_a_request_counts(bundle: ModelBundle, values: dict[str, object]) -> None:
    assert difference(make(bundle, REQUEST), make(bundle, changed(**values))) > 1e-3


def test_without_guidance_the_negative_prompt_is_not_computed(bundle: ModelBundle) -> None:
    rows = []
    hook = bundle.unet.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    try:
        plain = make(bundle, changed(scale=1.0))
        assert torch.equal(plain, make(bundle, changed(scale=1.0, negative_prompt="other")))
    finally:
        hook.remove()
    assert set(rows) == {1}


def test_guidance_is_the_papers_formula() -> None:
    rows = torch.tensor([1.0, 2.0, 5.0, 9.0]).view(4, 1, 1, 1)
    assert guided(changed(scale=3.0), rows.split(2)).flatten().tolist() == [1 + 3 * 4, 2 + 3 * 7]


def test_no_global_generator_and_no_module_is_touched(bundle: ModelBundle) -> None:
    weights = {name: value.clone() for name, value in bundle.unet.state_dict().items()}
    bundle.unet.train()
    try:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        decode(bundle, make(bundle, changed(sampler="euler_a"), changed(sampler="euler_a", seed=2)))
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        assert bundle.unet.training
    finally:
        bundle.unet.eval()
    assert all(torch.equal(weights[name], value) for name, value in bundle.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in bundle.unet.parameters())


def test_progress_is_told_of_every_step(bundle: ModelBundle) -> None:
    told: list[tuple[int, int]] = []
    denoise(
        StableDiffusion(),
        bundle,
        [changed(sampler="heun")],
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(index + 1, 7) for index in range(7)]


def test_equal_texts_are_encoded_once(bundle: ModelBundle) -> None:
    calls = []
    hook = bundle.text_encoders[0].text_model.final_layer_norm.register_forward_hook(lambda *_: calls.append(1))
    try:
        encoder = PromptEncoder(StableDiffusion(), bundle)
        encoder([REQUEST, changed(seed=2)])
        encoder([changed(prompt="another")])
    finally:
        hook.remove()
    assert len(calls) == 3  # the prompt, the other prompt, the negative prompt


def test_windows_follow_the_longer_text(bundle: ModelBundle) -> None:
    encoder = PromptEncoder(StableDiffusion(), bundle)
    long = changed(prompt="cat " * 100, max_windows=3)
    assert encoder.windows(long) == 2
    assert encoder([long]).context_BTD.shape[:2] == (2, 154)
    assert encoder.windows(changed(prompt="cat " * 100)) == 1
    assert encoder.windows(changed(negative_prompt="cat " * 200, max_windows=3)) == 3
    assert encoder.windows(changed(negative_prompt="cat " * 200, max_windows=3, scale=1.0)) == 1


def test_what_is_cut_off_is_said_once(bundle: ModelBundle, caplog: pytest.LogCaptureFixture) -> None:
    encoder = PromptEncoder(StableDiffusion(), bundle, "--flag raises it")
    for _ in range(2):
        encoder([changed(prompt="cat " * 80)])
    (record,) = caplog.records
    assert record.getMessage().startswith("5 tokens beyond the limit of 75 are cut off (--flag raises it): cat cat")


def test_break_is_two_prompts_side_by_side(bundle: ModelBundle) -> None:
    encoder = PromptEncoder(StableDiffusion(), bundle)
    both = encoder([changed(prompt="a cat BREAK a dog", max_windows=2, scale=1.0)]).context_BTD
    cat, dog = (encoder([changed(prompt=prompt, scale=1.0)]).context_BTD for prompt in ("a cat ", " a dog"))
    assert torch.allclose(both, torch.cat([cat, dog], dim=1), atol=1e-5)


def test_weights_scale_their_tokens(bundle: ModelBundle) -> None:
    encoder = PromptEncoder(StableDiffusion(), bundle)
    plain = encoder([changed(prompt="a cat", scale=1.0)]).context_BTD
    weighted = encoder([changed(prompt="a (cat:1.5)", scale=1.0)]).context_BTD
    ratio = weighted / plain
    assert torch.allclose(ratio[0, 2] / ratio[0, 1], torch.full_like(ratio[0, 2], 1.5), rtol=1e-3)


def test_velocity_models_use_their_own_formula(tiny_sd2_path: Path) -> None:
    bundle = load(tiny_sd2_path)
    assert bundle.source.v_prediction
    as_velocity = make(bundle, REQUEST)
    source = dataclasses.replace(bundle.source, v_prediction=False)
    as_noise = make(dataclasses.replace(bundle, source=source), REQUEST)
    assert difference(as_velocity, as_noise) > 0.01
