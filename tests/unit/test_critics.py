"""Guidance by CLIP and VGG16: the networks from their files, the formulas, and that pictures come nearer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from library.checkpoints.critics import check_vgg16, find_clip, vgg16_convolutions
from library.checkpoints.safetensors_io import save_file
from library.checkpoints.weights import load_tensors
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate.conditions import PromptEncoder
from library.generate.control_options import Preprocessor
from library.generate.critic_options import CriticOptions
from library.generate.critics import (
    ClipImageCritic,
    ClipTextCritic,
    CriticGuidance,
    Vgg16Critic,
    critic_guidance,
    plain_text,
    spherical_distance,
)
from library.generate.denoise import begin, denoise
from library.generate.guidance import parts_rows, prompt_rows
from library.generate.hints import hints
from library.generate.request import GenerationRequest
from library.models import vae
from library.models.clip import MEAN, STD, image_embeddings, load_clip, load_clip_vision, text_embeddings
from library.models.options import AttentionOptions
from library.models.vgg import load_vgg16, vgg_features
from library.options import OptionError
from library.text.tokens import ClipTokenizer
from tests.tiny_control import guide_image
from tests.tiny_critics import tiny_clip, tiny_vgg16

CPU = torch.device("cpu")
PLAN = LoadPlan(torch.float32, torch.float32, torch.float32, CPU)
FAMILY = StableDiffusion()
REQUEST = GenerationRequest("a cat", "blurry", 64, 72, 4, 3.0, 1, sampler="ddim")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("critics")
    tiny_clip(made / "clip")
    tiny_vgg16(made / "vgg16.pth")
    guide_image(made / "guide.png", 3)
    return made


@pytest.fixture(scope="module")
def clip(folder: Path) -> Any:
    return load_clip(folder / "clip", dtype=torch.float32, device=CPU, flag="--flag")


def load(path: Path) -> ModelBundle:
    return FAMILY.load(ModelOptions(str(path)), AttentionOptions(), PLAN)


@pytest.fixture(scope="module")
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    return load(tiny_sd1_path)


# ---------------------------------------------------------------------------------------------- the networks


def test_clip_is_that_of_transformers(clip: Any, folder: Path) -> None:
    theirs = CLIPModel.from_pretrained(folder / "clip", local_files_only=True).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = ClipTokenizer("eos").windows(["a cat", "an old house"], 1)[:, 0]
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        output = theirs(input_ids=ids, pixel_values=pixels)
        assert torch.allclose(image_embeddings(clip, images), output.image_embeds, atol=1e-5)
        assert torch.allclose(text_embeddings(clip, ids), output.text_embeds, atol=1e-5)
        alone = load_clip_vision(folder / "clip", dtype=torch.float32, device=CPU, flag="--flag")
        assert torch.allclose(image_embeddings(alone, images), output.image_embeds, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert image_embeddings(clip, torch.rand(1, 3, 90, 40)).shape == (1, 24)


def test_what_is_no_clip_is_refused(folder: Path, tmp_path: Path, tiny_sd1_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for path, sentence in (
        (tmp_path / "nowhere.pt", "does not exist"), (tiny_sd1_path, "is a file; name the folder it is in"),
        (tmp_path / "bert", "is no CLIP model (it is bert)"), (tmp_path, "config.json is missing"),
    ):  # fmt: skip
        with pytest.raises(OptionError) as caught:
            find_clip(str(path), "--flag")
        assert sentence in str(caught.value)
    tensors = load_tensors(folder / "clip" / "model.safetensors")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((folder / "clip" / "config.json").read_bytes())
    save_file({name: value for name, value in tensors.items() if "vision" in name}, half / "model.safetensors")
    with pytest.raises(OptionError, match=r"half lacks \d+ tensors of a CLIP model"):
        load_clip(half, dtype=torch.float32, device=CPU, flag="--flag")


def test_vgg16_has_the_layers_of_torchvision(folder: Path) -> None:
    assert list(vgg16_convolutions()) == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    net = load_vgg16(folder / "vgg16.pth", 30, dtype=torch.float32, device=CPU)
    kinds = "".join(type(layer).__name__[0] for layer in net)
    assert kinds == "CRCRM" * 2 + "CRCRCRM" * 3
    tensors = load_tensors(folder / "vgg16.pth")
    assert torch.equal(net[19].weight, tensors["features.19.weight"])
    images = torch.rand(1, 3, 96, 64)
    assert vgg_features(load_vgg16(folder / "vgg16.pth", 6, dtype=torch.float32, device=CPU), images).shape == (
        1, 8, 12, 8,
    )  # fmt: skip


def test_what_is_no_vgg16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="vgg.pth is no file; name torchvision's weights"):
        check_vgg16(str(tmp_path / "vgg.pth"), 20, "--flag")
    torch.save({"features.0.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "other.pth")
    check_vgg16(str(tmp_path / "other.pth"), 1, "--flag")
    with pytest.raises(OptionError, match=r"is no VGG16: it has no features\.2\.weight"):
        check_vgg16(str(tmp_path / "other.pth"), 20, "--flag")


# ---------------------------------------------------------------------------------------------- formulas


def test_the_distance_is_half_the_square_of_the_angle() -> None:
    angle = torch.tensor(0.7)
    one, other = torch.tensor([[1.0, 0.0]]), torch.stack([angle.cos(), angle.sin()])[None]
    assert torch.allclose(spherical_distance(one, other), angle**2 / 2)
    same = one.clone().requires_grad_()
    spherical_distance(same, one).sum().backward()
    assert same.grad.isfinite().all()
    assert spherical_distance(one, -one).isfinite().all()


def test_prompts_are_read_without_signs() -> None:
    assert plain_text("a (red:1.3) [old] house BREAK at \\(night\\)") == "a red old house at (night)"


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "lms"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_formula_of_a_step(
    kind: str, sampler: str, clip: Any, folder: Path, request: pytest.FixtureRequest
) -> None:
    """epsilon - sqrt(1 - alpha-bar) g and z + sigma^2 g, g by finite differences; a velocity is taken for epsilon."""
    bundle = load(request.getfixturevalue(f"tiny_{kind}_path"))
    asked = [dataclasses.replace(REQUEST, sampler=sampler)]
    drawing = begin(
        FAMILY,
        bundle,
        asked,
        PromptEncoder(FAMILY, bundle),
        [torch.Generator().manual_seed(request.seed) for request in asked],
    )
    drawing.index = 2
    for step, timestep in enumerate(drawing.timesteps[:2]):  # brings the scheduler to where the drawing is
        drawing.index = step
        prediction = drawing.predict(drawing.latents_BChw, drawing.conditioning)[1:]
        drawing.latents_BChw = drawing.scheduler.step(prediction, timestep, drawing.latents_BChw)[0].detach()
    drawing.index = 2
    guidance = CriticGuidance([ClipTextCritic(clip, 10.0)])
    target = guidance.critics[0].target(asked)
    before = drawing.latents_BChw
    with guidance.taking_part(drawing), torch.no_grad():
        guidance.condition(drawing, drawing.conditioning)
        changed = guidance.guide(drawing, torch.zeros_like(before))
        moved = drawing.latents_BChw - before

    epsilon_of = drawing.predict(before, drawing.conditioning)
    scheduler: Any = drawing.scheduler
    is_velocity = kind == "sd2"
    sigma = float(scheduler.sigmas[2]) if sampler == "lms" else 0.0
    alpha_bar = 1 / (1 + sigma**2) if sampler == "lms" else float(scheduler.alphas_cumprod[drawing.timestep])

    @torch.no_grad()
    def judgement(latents: torch.Tensor) -> float:
        output = drawing.predict(latents, drawing.conditioning.rows(slice(1, 2)))
        scaled = latents * (alpha_bar**0.5 if sampler == "lms" else 1)  # of variance 1
        clean = (scaled - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5
        if is_velocity:
            clean = alpha_bar**0.5 * scaled - (1 - alpha_bar) ** 0.5 * output
        share = 1.0 if sampler == "lms" else (1 - alpha_bar) ** 0.5
        judged = clean * share + latents * (1 - share)
        images = vae.decode(bundle.vae, judged / FAMILY.latent_scale) / 2 + 0.5
        return float(guidance.critics[0].distance(images, target))

    direction = torch.randn(before.shape, generator=torch.Generator().manual_seed(5))
    step = 0.02 * float(before.std())
    slope = (judgement(before + step * direction) - judgement(before - step * direction)) / (2 * step)
    if sampler == "lms":
        assert torch.equal(changed, torch.zeros_like(changed))
        gradient = moved / sigma**2
    else:
        assert not moved.any()
        gradient = -changed / (1 - alpha_bar) ** 0.5 * (alpha_bar**0.5 if is_velocity else 1)
    assert float((gradient * direction).sum()) == pytest.approx(-slope, rel=0.05, abs=1e-4)
    assert epsilon_of.isfinite().all()


@pytest.mark.parametrize("sampler", ["ddim", "lms"])
def test_pictures_come_nearer(bundle: ModelBundle, clip: Any, folder: Path, sampler: str) -> None:
    pytest.importorskip("scipy")
    asked = dataclasses.replace(REQUEST, guide_images=(str(folder / "guide.png"),), sampler=sampler)
    net = load_vgg16(folder / "vgg16.pth", 8, dtype=torch.float32, device=CPU)
    for critic in (ClipTextCritic(clip, 1.0), ClipImageCritic(clip, 1.0), Vgg16Critic(net, 1.0)):
        target = critic.target([asked])
        distances = []
        for scale in (0.0, 30.0 if sampler == "ddim" else 0.3):
            guidance = [CriticGuidance([dataclasses.replace(critic, scale=scale)])] if scale else []
            latents = denoise(FAMILY, bundle, [asked], parts=guidance)
            images = vae.decode(bundle.vae, latents) / 2 + 0.5
            distances.append(float(critic.distance(images, target)))
        assert distances[1] < distances[0], critic


def test_rows_of_the_prompt() -> None:
    """Groups of rows stand in the order negative, parts of the prompt."""
    three = dataclasses.replace(REQUEST, prompt="a cat AND a dog AND a house")
    found = {
        (asked.prompt, asked.scale): (prompt_rows(asked, 2), parts_rows(asked, 2))
        for asked in (REQUEST, dataclasses.replace(REQUEST, scale=1.0), three)
    }
    assert list(found.values()) == [
        (slice(2, 4), slice(2, 4)), (slice(0, 2), slice(0, 2)), (slice(6, 8), slice(2, 8)),
    ]  # fmt: skip


def test_each_picture_has_its_own_target(bundle: ModelBundle, clip: Any) -> None:
    guidance = [CriticGuidance([ClipTextCritic(clip, 50.0)])]
    requests = [dataclasses.replace(REQUEST, seed=seed, clip_prompt=text) for seed, text in ((1, "a dog"), (2, None))]
    together = denoise(FAMILY, bundle, requests, parts=guidance)
    for index, request in enumerate(requests):
        alone = denoise(FAMILY, bundle, [request], parts=guidance)
        assert float((alone[0] - together[index]).abs().mean() / alone.abs().mean()) < 1e-3
    other = denoise(FAMILY, bundle, [dataclasses.replace(requests[0], clip_prompt=None)], parts=guidance)
    assert float((other[0] - together[0]).abs().mean() / other.abs().mean()) > 1e-3
    assert all(parameter.grad is None for parameter in bundle.unet.parameters())


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"clip_guidance_scale": 100}, "--clip_guidance_model: CLIP guidance needs CLIP; name a folder"),
        ({"clip_image_guidance_scale": 100}, "--clip_guidance_model: CLIP guidance needs CLIP; name a folder"),
        ({"vgg16_guidance_scale": 1}, "--vgg16_model: VGG16 guidance needs its weights; name torchvision's file"),
        ({"vgg16_guidance_layer": 31}, "--vgg16_guidance_layer: 31 is out of range; use 0 to 30"),
        ({"clip_guidance_scale": -1}, "--clip_guidance_scale: -1 is below 0"),
    ],
)
def test_mistakes(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        CriticOptions(**values)
    assert str(caught.value).startswith(sentence)


def test_pictures_that_cannot_be_guided(caplog: pytest.LogCaptureFixture) -> None:
    text = CriticOptions(clip_guidance_scale=1, clip_guidance_model="x")
    for sampler in ("ddim", "k_lms"):
        text.check_request(dataclasses.replace(REQUEST, sampler=sampler, clip_prompt="a dog"), "line 1")
    with pytest.raises(OptionError, match="--sampler: euler can't be guided by a network; use ddim, pndm, lms, k_lms"):
        text.check_request(dataclasses.replace(REQUEST, sampler="euler"), "line 1")
    image = CriticOptions(vgg16_guidance_scale=1, vgg16_model="x")
    with pytest.raises(OptionError, match="--guide_image_path: --vgg16_guidance_scale has no guide image; name one"):
        image.check_request(REQUEST, "line 1")
    assert not caplog.records
    CriticOptions().check_request(dataclasses.replace(REQUEST, clip_prompt="a dog"), "line 1")
    assert "line 1: --c has no effect without --clip_guidance_scale" in caplog.text


def test_parts_of_options(folder: Path) -> None:
    options = CriticOptions(
        clip_guidance_scale=2, clip_image_guidance_scale=3, clip_guidance_model=str(folder / "clip"),
        vgg16_guidance_scale=4, vgg16_guidance_layer=3, vgg16_model=str(folder / "vgg16.pth"),
    )  # fmt: skip
    (guidance,) = critic_guidance(options, PLAN)
    assert isinstance(guidance, CriticGuidance)
    assert [(type(critic), critic.scale) for critic in guidance.critics] == [
        (ClipTextCritic, 2), (ClipImageCritic, 3), (Vgg16Critic, 4),
    ]  # fmt: skip
    assert len(guidance.critics[2].net) == 4
    assert critic_guidance(CriticOptions(), PLAN) == []


def test_targets_are_the_guide_images(clip: Any, folder: Path) -> None:
    asked = [dataclasses.replace(REQUEST, guide_images=(str(folder / "guide.png"),))]
    critic = ClipImageCritic(clip, 5.0)
    assert float(critic.distance(hints(asked, 0, Preprocessor()), critic.target(asked))) < 1e-6
