"""The negative scale with all that makes rows of the U-Net: single prompts, compositions, regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
from library.cli import generation
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from networks.lora import create_network
from tests.tiny_networks import perturb

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler", "--sequential_file_name", "--seed", "1"]
PROMPT = "a cat AND a red dog"


def draw(model: Path, folder: Path, *arguments: object) -> list[np.ndarray]:
    words = ["--ckpt", model, "--outdir", folder, *SMALL, *arguments]
    assert generation.run(gen_img_diffusers.SCRIPT, [str(word) for word in words]) == 0
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def regional(tiny_sd1_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The flags of two networks, each with a half of the picture."""
    folder = tmp_path_factory.mktemp("networks")
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = StableDiffusion().load(ModelOptions(str(tiny_sd1_path)), AttentionOptions(), plan)
    files = []
    for seed in range(2):
        network = create_network(1.0, 4, 4.0, bundle.vae, bundle.text_encoders[0], bundle.unet)
        perturb(network, seed=seed, std=0.15)
        files.append(folder / f"lora{seed}.safetensors")
        network.save_weights(files[-1], None, {})
    pixels = np.repeat(np.array([[(255, 0, 0)] * 32 + [(0, 255, 0)] * 32], np.uint8), 64, axis=0)
    Image.fromarray(pixels).save(folder / "map.png")
    modules = ["--network_module", "networks.lora", "networks.lora"]
    return [*modules, "--network_weights", *files, "--mask_path", folder / "map.png"]


@pytest.mark.parametrize("kind", ["plain", "composition", "regional"])
def test_a_scale_of_0_is_an_empty_negative_prompt(
    kind: str, tiny_sd1_path: Path, tmp_path: Path, regional: list[object]
) -> None:
    """e + s (c - e) - 0 (n - e): the negative prompt is out, and what is left is guidance from the empty one."""
    prompt = "a cat" if kind == "plain" else PROMPT
    (tmp_path / "prompts.txt").write_text(
        f"{prompt}\n{prompt} --n dark --nl 0\n{prompt} --n dark --nl 2\n{prompt} --n dark\n"
    )
    flags = regional if kind == "regional" else []
    made = draw(tiny_sd1_path, tmp_path / "out", "--from_file", tmp_path / "prompts.txt", "--iter_same_seed", *flags)
    empty, zero, two, usual = made
    assert np.abs(empty - zero).mean() < 0.05
    assert np.abs(empty - two).mean() > 0.5 < np.abs(usual - two).mean()


def test_the_flag_counts_where_a_line_says_nothing(tiny_sd1_path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --n dark\na cat --n dark --nl 2\na cat --n dark --nl none\n")
    lines = ["--from_file", tmp_path / "prompts.txt", "--iter_same_seed"]
    flag, line, none = draw(tiny_sd1_path, tmp_path / "with", *lines, "--negative_scale", 2, "--batch_size", 2)
    (without, *_) = draw(tiny_sd1_path, tmp_path / "without", *lines)
    assert np.array_equal(flag, line) and np.array_equal(none, without)
    assert np.abs(flag - none).mean() > 0.5
    text = Image.open(sorted((tmp_path / "with").glob("*.png"))[0]).text
    assert text["negative-scale"] == "2.0"
