"""Infotext as web user interfaces write it, there and back again; and the JSON beside pictures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.checkpoints.safetensors_io import network_hash, read_header, save_file
from library.diffusion.samplers import SAMPLERS
from library.generate.critic_options import ClipVisionOptions, CriticOptions
from library.generate.infotext import infotext, parse_infotext
from library.generate.model_names import ModelNames
from library.generate.options import OutputOptions
from library.generate.output import PictureWriter, metadata
from library.generate.request import GenerationRequest
from library.generate.resolution_options import DeepShrinkOptions, GradualLatentOptions
from library.generate.start_options import UpscalerChoice

REQUEST = GenerationRequest("a cat", "bad", 512, 768, 20, 7.0, 5, "euler_a", 2)
NAMES = ModelNames(
    "model", "0123456789", "<lora:a:0.5>", (("a", "12ab"), ("b, c", "34cd")), (("mine", "56ef"),), "v.pt", "78ab"
)


def last_line(request: GenerationRequest, names: ModelNames = NAMES) -> str:
    return infotext(request, names).split("\n")[-1]


def test_all_values_in_the_order_of_web_uis() -> None:
    assert infotext(REQUEST, NAMES).split("\n")[:2] == ["a cat <lora:a:0.5>", "Negative prompt: bad"]
    assert last_line(REQUEST) == (
        "Steps: 20, Sampler: Euler a, Schedule type: Uniform, CFG scale: 7, Seed: 5, Size: 512x768, "
        "Model hash: 0123456789, Model: model, VAE hash: 78ab, VAE: v.pt, Clip skip: 2, RNG: CPU, "
        'Lora hashes: "a: 12ab, b, c: 34cd", TI hashes: "mine: 56ef", '
        "Version: Training scripts for Stable Diffusion"
    )


def test_two_stages_as_web_uis_write_them(caplog: pytest.LogCaptureFixture) -> None:
    first = replace(REQUEST, width=256, height=384, steps=28)
    request = replace(REQUEST, first_stage=first, strength=0.6, upscaler=UpscalerChoice(in_latents=True))
    text = infotext(request, ModelNames("m"))
    for said in ("Steps: 28,", "Size: 256x384,", "Denoising strength: 0.6,", "Hires resize: 512x768, Hires steps: 20, "
                 "Hires upscaler: Latent"):  # fmt: skip
        assert said in text
    line = parse_infotext(text, "here")
    assert (line.width, line.height, line.steps, line.strength) == (512, 768, 20, 0.6)
    assert (
        "here: it was drawn in two stages; --highres_fix_scale 0.5 --highres_fix_steps 28 --highres_fix_latents"
        in caplog.text
    )
    of_web_ui = parse_infotext("a\nSteps: 9, Size: 512x640, Hires upscale: 1.5, Hires steps: 0")
    assert (of_web_ui.width, of_web_ui.height, of_web_ui.steps) == (768, 960, 9)


def test_the_strength_of_a_first_stage_that_starts_from_a_picture(caplog: pytest.LogCaptureFixture) -> None:
    first = replace(REQUEST, width=256, height=384, image="a.png", strength=0.4)
    text = infotext(replace(REQUEST, first_stage=first, strength=0.6), NAMES)
    assert "Denoising strength: 0.6," in text and "highres_fix_strength: 0.4," in text
    parse_infotext(text, "here")
    assert "--highres_fix_scale 0.5 --highres_fix_steps 20 --highres_fix_strength 0.4 does so here" in caplog.text
    assert "highres_fix_strength" not in infotext(replace(REQUEST, first_stage=replace(first, image="")), NAMES)


def test_networks_that_look_at_pictures_are_told_with_their_flags(caplog: pytest.LogCaptureFixture) -> None:
    critics = CriticOptions(50.0, None, "clips/mine", 100.0, 5, "vgg16.pth")
    names = replace(NAMES, looks=(*critics.told, *ClipVisionOptions(1.5, "vision").told))
    text = last_line(REQUEST, names)
    for said in ("clip_guidance_scale: 50, clip_guidance_model: mine, vgg16_guidance_scale: 100, "
                 "vgg16_guidance_layer: 5, clip_vision_strength: 1.5, clip_vision_model: vision,",):  # fmt: skip
        assert said in text
    assert CriticOptions().told == ClipVisionOptions().told == ()
    parse_infotext(f"a\n{text}", "x")
    assert "x: it was made with vgg16_guidance_scale: 100; --vgg16_guidance_scale does so here" in caplog.text


def test_a_start_picture_and_its_strength() -> None:
    assert "Denoising strength: 0.8" in last_line(replace(REQUEST, image="a.png", strength=0.8))
    assert "Denoising" not in last_line(REQUEST)


def test_what_prompts_cannot_say_is_named_with_its_flag(caplog: pytest.LogCaptureFixture) -> None:
    text = infotext(replace(REQUEST, zero_terminal_snr=True), NAMES)
    parse_infotext(text, "x")
    assert "x: it was made with VAE: v.pt; --vae does so here" in caplog.text
    assert "x: it was made with Noise Schedule: Zero Terminal SNR; --zero_terminal_snr does so here" in caplog.text


@pytest.mark.parametrize("text", ["Sampler: DPM++ 2M {}", "Sampler: DPM++ 2M, Schedule type: {}"])
def test_schedules_of_web_uis(text: str, caplog: pytest.LogCaptureFixture) -> None:
    for schedule, sigmas in (("Karras", "karras"), ("Exponential", "exponential"), ("Automatic", "default")):
        line = parse_infotext(f"a\nSteps: 3, {text.format(schedule)}", "x")
        assert (line.sampler, line.sigmas) == ("dpmsolver++", sigmas)
    assert not caplog.text
    line = parse_infotext(f"a\nSteps: 3, {text.format('Beta')}", "x")
    assert (line.sampler, line.sigmas) == ("dpmsolver++", "default")
    assert "x: its schedule 'Beta' is not known here: Uniform takes its place" in caplog.text


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=40).map(str.strip)
NAME = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
SIZE = st.integers(8, 256).map(lambda units: units * 8)
NUMBER = st.floats(-1e6, 1e6)
DEEP_SHRINK = st.builds(
    DeepShrinkOptions, ds_depth_1=st.none() | st.integers(0, 8), ds_timesteps_1=st.integers(0, 1000),
    ds_depth_2=st.none() | st.integers(0, 8), ds_ratio=st.floats(0.1, 1),
)  # fmt: skip
GRADUAL = st.builds(
    GradualLatentOptions, gradual_latent_timesteps=st.none() | st.integers(0, 1000),
    gradual_latent_ratio=st.floats(0.1, 0.9), gradual_latent_unsharp_params=st.none() | st.just("3,0.5,0.5"),
)  # fmt: skip
REQUESTS = st.builds(
    GenerationRequest, prompt=TEXT, negative_prompt=TEXT, width=SIZE, height=SIZE, steps=st.integers(1, 1000),
    scale=NUMBER, seed=st.integers(0, 2**64 - 1), sampler=st.sampled_from(list(SAMPLERS)),
    clip_skip=st.none() | st.integers(1, 12), max_windows=st.integers(1, 5), strength=st.floats(0.01, 1),
    image=st.sampled_from(["", "a.png"]), deep_shrink=DEEP_SHRINK, gradual_latent=GRADUAL,
)  # fmt: skip


@given(REQUESTS, NAME, st.booleans())
def test_what_is_written_is_read(request: GenerationRequest, model: str, has_stages: bool) -> None:
    if has_stages:
        request = replace(request, first_stage=replace(request, width=64, height=64, steps=7))
    line = parse_infotext(infotext(request, ModelNames(model, "0123", vae=model)))
    ours = (request.width, request.height, request.steps, request.scale, (request.seed,))
    assert (line.width, line.height, line.steps, line.scale, line.seeds) == ours
    if "<lora:" not in request.prompt and not request.prompt.startswith("Negative prompt:"):
        assert line.prompt == request.prompt
        assert line.negative_prompt == request.negative_prompt
    assert line.sampler is not None and SAMPLERS[line.sampler] is SAMPLERS[request.sampler]
    assert (line.clip_skip, line.windows or 1) == (request.clip_skip, request.max_windows)
    assert line.strength == (request.strength if has_stages or request.image else None)
    shrink, gradual = request.deep_shrink, request.gradual_latent
    for options, is_on in ((shrink, shrink.ds_depth_1 is not None), (gradual, gradual.gradual_latent_timesteps)):
        for name, value in vars(options).items():
            assert getattr(line, name) == (value if is_on is not None and is_on is not False else None), name


def test_hashes_of_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "plain.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "noted.safetensors", {"sshs_model_hash": "ab" * 32})
    (tmp_path / "pickle.pt").write_bytes(b"x")
    start = read_header(tmp_path / "plain.safetensors").data_start
    payload = hashlib.sha256((tmp_path / "plain.safetensors").read_bytes()[start:]).hexdigest()
    assert network_hash(tmp_path / "plain.safetensors") == payload
    assert network_hash(tmp_path / "noted.safetensors") == "ab" * 32
    files = [tmp_path / f"{name}" for name in ("plain.safetensors", "noted.safetensors", "gone.safetensors")]
    names = ModelNames.of(tmp_path, "", files, [tmp_path / "pickle.pt"], vae=str(tmp_path / "pickle.pt"))
    digest = hashlib.sha256(b"x").hexdigest()[:10]
    assert names.network_hashes == (("plain", payload[:12]), ("noted", "ab" * 6))
    assert (names.embedding_hashes, names.vae, names.vae_hash) == ((("pickle", digest),), "pickle.pt", digest)
    assert names.model_hash == "", "a folder has none"


def test_the_raw_prompt_stands_behind_the_trades_texts() -> None:
    texts = metadata(replace(REQUEST, raw_prompt="a {cat|dog}"), NAMES)
    assert list(texts) == ["prompt", "seed", "sampler", "steps", "scale", "negative-prompt", "raw-prompt", "parameters"]
    assert texts["raw-prompt"] == "a {cat|dog}"


def test_everything_as_json_beside_the_picture(tmp_path: Path) -> None:
    request = replace(REQUEST, first_stage=replace(REQUEST, steps=9))
    for _ in range(2):
        with PictureWriter(tmp_path, OutputOptions(sidecar=True), lambda: NAMES) as writer:
            writer.write(Image.new("RGB", (8, 8)), replace(request, file_name="ä.webp"), 0)
    assert {path.name for path in tmp_path.iterdir()} == {"ä.webp", "ä.webp.json", "ä_2.webp", "ä_2.webp.json"}
    told = json.loads((tmp_path / "ä.webp.json").read_text(encoding="utf-8"))
    assert (told["prompt"], told["seed"], told["steps"], told["first_stage"]["steps"]) == ("a cat", 5, 20, 9)
    assert told["weights"]["network_hashes"] == [["a", "12ab"], ["b, c", "34cd"]]
    assert (told["deep_shrink"]["ds_depth_1"], told["first_stage"]["first_stage"]) == (None, None)
