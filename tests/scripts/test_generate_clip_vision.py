"""--clip_vision_strength: what CLIP sees in a picture in place of SDXL's pooled text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdxl_gen_img
from library.cli import generation
from tests.tiny_control import guide_image
from tests.tiny_critics import tiny_clip

SMALL = ["--W", "64", "--H", "64", "--steps", "3", "--seed", "1", "--prompt", "a cat", "--strength", "0.7"]


def run(*arguments: object) -> int:
    return generation.run(sdxl_gen_img.SCRIPT, [str(argument) for argument in (*SMALL, *arguments)])


def test_the_picture_is_seen(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    model = ["--clip_vision_model", tiny_clip(tmp_path / "clip", projection=128)]
    images = [guide_image(tmp_path / f"{seed}.png", seed) for seed in (0, 1)]
    cases = {
        "plain": [images[0]],
        "seen": [images[0], *model, "--clip_vision_strength", 1],
        "weaker": [images[0], *model, "--clip_vision_strength", 0.3],
        "without guidance": [images[0], *model, "--clip_vision_strength", 1, "--scale", 1],
        "two stages": [images[0], *model, "--clip_vision_strength", 1, "--highres_fix_scale", 1],
    }
    pictures = {}
    for name, flags in cases.items():
        out = tmp_path / name
        assert run("--ckpt", tiny_sdxl_path, "--outdir", out, "--image_path", *flags) == 0
        (path,) = out.glob("*.png")
        pictures[name] = np.asarray(Image.open(path)).astype(int)
    names = list(pictures)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert np.abs(pictures[name] - pictures[other]).mean() > 0.02, (name, other)


def test_mistakes(tiny_sdxl_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = ["--clip_vision_model", tiny_clip(tmp_path / "clip", projection=24)]
    image = ["--image_path", guide_image(tmp_path / "guide.png")]
    strength = ["--clip_vision_strength", 1]
    cases = [
        ([*strength, *image], "--clip_vision_model: --clip_vision_strength needs CLIP's image encoder; name a folder"),
        ([*strength, *narrow], "--clip_vision_strength: there is no picture to see; add --image_path"),
        ([*strength, *narrow, *image], "sees pictures in 24 numbers, this model's pooled text has 128; use laion/CLIP"),
    ]
    for flags, sentence in cases:
        capsys.readouterr()
        assert run("--ckpt", tiny_sdxl_path, "--outdir", tmp_path / "out", *flags) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in said, said
    assert not list(tmp_path.glob("out/*.png"))
