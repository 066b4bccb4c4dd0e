"""Guidance by CLIP and VGG16 on the command lines of the generators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation
from tests.tiny_control import control_net_file, guide_image
from tests.tiny_critics import tiny_clip, tiny_vgg16

SMALL = ["--W", "64", "--H", "64", "--steps", "3", "--seed", "1"]


def run(script: generation.Script, *arguments: object) -> int:
    return generation.run(script, [str(argument) for argument in (*SMALL, *arguments)])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference in steps of 1/255."""
    return float(np.abs(one - other).mean())


def test_each_flag_counts(tiny_sd1_path: Path, tmp_path: Path) -> None:
    clip, vgg = tiny_clip(tmp_path / "clip"), tiny_vgg16(tmp_path / "vgg16.pth")
    guide = ["--guide_image_path", guide_image(tmp_path / "guide.png")]
    model = ["--clip_guidance_model", clip]
    vgg16 = ["--vgg16_guidance_scale", 100, "--vgg16_model", vgg, *guide]
    net = control_net_file(tmp_path)
    cases = {
        "plain": [],
        "clip": ["--clip_guidance_scale", 50, *model],
        "scale": ["--clip_guidance_scale", 10, *model],
        "line": ["--clip_guidance_scale", 50, *model, "--prompt", "a cat --c an old house"],
        "image": ["--clip_image_guidance_scale", 50, *model, *guide],
        "vgg16": vgg16,
        "layer": [*vgg16, "--vgg16_guidance_layer", 5],
        "control": [*vgg16, "--control_net_models", net],
        "all": [*vgg16, "--clip_image_guidance_scale", 50, "--clip_guidance_scale", 50, *model],
    }
    pictures = {}
    for name, flags in cases.items():
        out = tmp_path / name
        arguments = ["--ckpt", tiny_sd1_path, "--prompt", "a cat", "--outdir", out, *flags]
        assert run(gen_img_diffusers.SCRIPT, *arguments) == 0
        (path,) = out.glob("*.png")
        pictures[name] = np.asarray(Image.open(path)).astype(int)
    names = list(pictures)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert difference(pictures[name], pictures[other]) > 0.02, (name, other)
    (path,) = (tmp_path / "line").glob("*.png")
    text = Image.open(path).text
    assert text["prompt"] == "a cat"
    assert text["clip-prompt"] == "an old house"


def test_sdxl_can_be_guided_too(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "clip")
    pictures = []
    for flags in ([], ["--clip_guidance_scale", 50, "--clip_guidance_model", clip]):
        out = tmp_path / f"out{len(flags)}"
        assert run(sdxl_gen_img.SCRIPT, "--ckpt", tiny_sdxl_path, "--prompt", "a cat", "--outdir", out, *flags) == 0
        pictures += [np.asarray(Image.open(path)).astype(int) for path in out.glob("*.png")]
    assert difference(*pictures) > 0.1


def test_mistakes_are_told_before_the_model_is_loaded(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = ["--clip_guidance_model", tiny_clip(tmp_path / "clip")]
    cases = [
        (["--clip_guidance_scale", 1], "--clip_guidance_model: CLIP guidance needs CLIP"),
        (["--clip_guidance_scale", 1, "--clip_guidance_model", "gone.pt"], "--clip_guidance_model: gone.pt does not"),
        (
            ["--clip_guidance_scale", 1, *clip, "--sampler", "euler_a"],
            "--sampler: euler_a can't be guided by a network",
        ),
        (["--clip_image_guidance_scale", 1, *clip], "--guide_image_path: --clip_image_guidance_scale has no guide"),
        (["--vgg16_guidance_scale", 1], "--vgg16_model: VGG16 guidance needs its weights"),
        (["--vgg16_guidance_layer", 99], "--vgg16_guidance_layer: 99 is out of range"),
    ]
    for flags, sentence in cases:
        capsys.readouterr()
        arguments = ["--ckpt", tiny_sd1_path, "--prompt", "a cat", "--outdir", tmp_path / "out", *flags]
        assert run(gen_img_diffusers.SCRIPT, *arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in said, said
    assert not list(tmp_path.glob("out/*.png"))
