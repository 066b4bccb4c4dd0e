"""ControlNet and ControlNet-LLLite on the command lines of the generators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation
from tests.tiny_control import control_net_file, guide_image, tiny_lllite

SMALL = ["--W", "64", "--H", "64", "--steps", "3", "--sampler", "ddim", "--seed", "1", "--prompt", "a cat"]


def run(script: generation.Script, *arguments: object) -> int:
    return generation.run(script, [str(argument) for argument in (*SMALL, *arguments)])


def picture(script: generation.Script, out: Path, *arguments: object) -> np.ndarray:
    assert run(script, "--outdir", out, *arguments) == 0
    (path,) = out.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference in steps of 1/255."""
    return float(np.abs(one - other).mean())


def test_each_control_net_flag_counts(tiny_sd1_path: Path, tmp_path: Path) -> None:
    nets = [control_net_file(tmp_path, seed=seed, name=f"net{seed}") for seed in (0, 1)]
    guides = tmp_path / "guides"
    guides.mkdir()
    for seed in (0, 1):
        guide_image(guides / f"{seed}.png", seed)
    both = ["--control_net_models", *nets, "--guide_image_path", guides]
    cases = {
        "plain": [],
        "one": ["--control_net_models", nets[0], "--guide_image_path", guides / "0.png"],
        "folder": both,
        "same_image": ["--control_net_models", *nets, "--guide_image_path", guides / "0.png"],
        "weights": [*both, "--control_net_weights", 0.5, 0.5],
        "multipliers": [*both, "--control_net_multipliers", 0.5, 0.5],
        "ratios": [*both, "--control_net_ratios", 1, 0.3],
        "preps": [*both, "--control_net_preps", "none", "canny_10_50"],
        "sum": [*both, "--control_net_mode", "sum"],
    }
    pictures = {
        name: picture(gen_img_diffusers.SCRIPT, tmp_path / name, "--ckpt", tiny_sd1_path, *flags)
        for name, flags in cases.items()
    }
    assert np.array_equal(pictures["weights"], pictures["multipliers"])
    del pictures["multipliers"]
    names = list(pictures)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert difference(pictures[name], pictures[other]) > 0.05, (name, other)


def test_sdxl_with_both_kinds(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    tiny_lllite(tmp_path / "lllite.safetensors")
    net = control_net_file(tmp_path, "sdxl")
    guide = ["--guide_image_path", guide_image(tmp_path / "guide.png")]
    lllite = ["--control_net_lllite_models", tmp_path / "lllite.safetensors"]
    cases = {
        "plain": [],
        "lllite": [*lllite, *guide],
        "net": ["--control_net_models", net, *guide],
        "both": ["--control_net_models", net, *lllite, *guide],
        "multiplier": ["--control_net_models", net, *lllite, *guide, "--control_net_multipliers", 1, 0.3],
        "ratio": [*lllite, *guide, "--control_net_ratios", 0.3],
    }
    pictures = {
        name: picture(sdxl_gen_img.SCRIPT, tmp_path / name, "--ckpt", tiny_sdxl_path, *flags)
        for name, flags in cases.items()
    }
    names = list(pictures)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert difference(pictures[name], pictures[other]) > 0.02, (name, other)


def test_a_second_stage_with_and_without_control(tiny_sd1_path: Path, tmp_path: Path) -> None:
    controlled = ["--control_net_models", control_net_file(tmp_path), "--guide_image_path"]
    controlled.append(guide_image(tmp_path / "guide.png"))
    highres = ["--W", 128, "--H", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2]
    cases = {
        "plain": highres,
        "control": [*controlled, *highres],
        "first_stage": [*controlled, *highres, "--highres_fix_disable_control_net"],
    }
    plain, control, first_stage = (
        picture(gen_img_diffusers.SCRIPT, tmp_path / name, "--ckpt", tiny_sd1_path, *flags)
        for name, flags in cases.items()
    )
    assert min(difference(plain, control), difference(plain, first_stage), difference(control, first_stage)) > 0.02


def test_control_where_prompts_have_parts(tiny_sd1_path: Path, tmp_path: Path) -> None:
    controlled = ["--control_net_models", control_net_file(tmp_path), "--guide_image_path"]
    controlled.append(guide_image(tmp_path / "guide.png"))
    prompt = ["--ckpt", tiny_sd1_path, "--prompt", "a cat AND an old house"]
    pictures = [
        picture(gen_img_diffusers.SCRIPT, tmp_path / str(len(flags)), *prompt, *flags) for flags in ([], controlled)
    ]
    assert difference(*pictures) > 0.05


def test_mistakes_are_told_before_the_model_is_loaded(
    tiny_sd1_path: Path, tiny_sdxl_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_lllite(tmp_path / "lllite.safetensors")
    net = control_net_file(tmp_path)
    guide = guide_image(tmp_path / "guide.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    controlled = ["--control_net_models", net, "--guide_image_path"]
    sd, xl = (gen_img_diffusers.SCRIPT, tiny_sd1_path), (sdxl_gen_img.SCRIPT, tiny_sdxl_path)
    cases = [
        (sd, ["--control_net_models", net], "--guide_image_path: the ControlNets have no guide image; name one"),
        (sd, [*controlled, "missing.png"], "--guide_image_path: missing.png does not exist"),
        (sd, [*controlled, tmp_path / "broken.png"], "--guide_image_path: "),
        (sd, ["--control_net_models", "no.pth", "--guide_image_path", guide], "--control_net_models: no.pth does not"),
        (sd, ["--control_net_models", tiny_sd1_path, "--guide_image_path", guide], "is no ControlNet: the tensor"),
        (xl, ["--control_net_lllite_models", net, "--guide_image_path", guide], "is no ControlNet-LLLite; give a"),
        (sd, [*controlled, guide, "--ds_depth_1", 1], "Deep Shrink and a ControlNet can't go together"),
    ]
    for (script, model), flags, sentence in cases:
        capsys.readouterr()
        assert run(script, "--ckpt", model, "--outdir", tmp_path / "out", *flags) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in said, said
    assert not list(tmp_path.glob("out/*.png"))
