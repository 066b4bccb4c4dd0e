"""sdxl_minimal_inference.py: the same picture as sdxl_gen_img.py makes, a second prompt, LoRA files, questions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdxl_gen_img
import sdxl_minimal_inference
from library.cli import generation
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
from networks.lora import create_network

SMALL = ["--width", "64", "--height", "72", "--steps", "3"]
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> int:
    return sdxl_minimal_inference.run([str(argument) for argument in arguments])


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def lora_path(tiny_sdxl_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = StableDiffusionXL().load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)
    encoders = list(bundle.text_encoders)
    network = create_network(1.0, 4, 4.0, bundle.vae, encoders, bundle.unet)
    network.apply_to(encoders, bundle.unet)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if "up" in name else 0.1)
    path = tmp_path_factory.mktemp("networks") / "lora.safetensors"
    network.save_weights(path, None, {})
    return path


def test_the_same_picture_as_the_large_script(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    model = ["--ckpt_path", tiny_sdxl_path, "--prompt", "a cat", "--negative_prompt", "dog", "--seed", 5, *SMALL]
    assert run(*model, "--output_dir", tmp_path / "minimal") == 0
    large = ["--ckpt", tiny_sdxl_path, "--prompt", "a cat --n dog", "--seed", 5, "--W", 64, "--H", 72, "--steps", 3]
    large += ["--sampler", "euler", "--scale", 7, "--outdir", tmp_path / "large"]
    assert generation.run(sdxl_gen_img.SCRIPT, [str(argument) for argument in large]) == 0
    (one,), (other,) = pictures(tmp_path / "minimal"), pictures(tmp_path / "large")
    assert one.shape == (72, 64, 3) and np.abs(one - other).mean() < 0.02
    (path,) = (tmp_path / "minimal").iterdir()
    assert path.name.startswith("image_2") and path.name.endswith("_000.png")


def test_every_option_counts(tiny_sdxl_path: Path, lora_path: Path, tmp_path: Path) -> None:
    model = ["--ckpt_path", tiny_sdxl_path, "--prompt", "a cat", "--seed", 5, *SMALL]
    variants = {
        "plain": [], "again": ["--prompt2", "a cat"], "prompt2": ["--prompt2", "a dog"], "seed": ["--seed", 6],
        "steps": ["--steps", 4], "negative": ["--negative_prompt", "dog"], "lora": ["--lora_weights", lora_path],
        "half": ["--lora_weights", f"{lora_path};0.5"], "zero": ["--lora_weights", f"{lora_path};0"],
    }  # fmt: skip
    made = {}
    for name, flags in variants.items():
        assert run(*model, *flags, "--output_dir", tmp_path / name) == 0
        (made[name],) = pictures(tmp_path / name)
    for name in ("prompt2", "seed", "steps", "negative", "lora", "half"):
        assert np.abs(made["plain"] - made[name]).mean() > 0.1, name
    assert np.array_equal(made["plain"], made["again"]) and np.array_equal(made["plain"], made["zero"])
    assert np.abs(made["lora"] - made["half"]).mean() > 0.1


def test_prompts_are_asked_for(tiny_sdxl_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["a cat", "", "", "5", "a cat", "a dog", "blurry", "5", "a", "", "", "many", "a", "", "", "", ""])
    monkeypatch.setattr("builtins.input", lambda _question: next(answers))
    assert run("--ckpt_path", tiny_sdxl_path, *SMALL, "--interactive", "--output_dir", tmp_path) == 0
    first, second, third = pictures(tmp_path)
    assert np.abs(first - second).mean() > 0.1 < np.abs(first - third).mean()


def test_each_mistake_is_one_sentence(
    tiny_sdxl_path: Path, tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--ckpt_path", tiny_sdxl_path, "--output_dir", tmp_path / "out"]
    (tmp_path / "file").touch()
    cases = [
        ([], "--ckpt_path: no model given"),
        (["--ckpt_path", tiny_sd1_path], "is an SD 1.x model; use gen_img_diffusers.py"),
        ([*model, "--width", 65], "--width: 65 is not a multiple of 8; use 64 or 72"),
        ([*model, "--steps", 0], "--steps: 0 is out of range"),
        ([*model, "--lora_weights", "missing.pt"], "--lora_weights: missing.pt does not exist"),
        ([*model, "--lora_weights", "a.pt;much"], "--lora_weights: 'much' is not a number; write file;0.8"),
        ([*model[:2], "--output_dir", tmp_path / "file" / "x"], "--output_dir: can't write to"),
    ]
    for arguments, sentence in cases:
        capsys.readouterr()
        assert run(*arguments) == 2
        assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_help_loads_no_torch() -> None:
    program = (
        "import sys, atexit, runpy; sys.argv = ['sdxl_minimal_inference.py', '--help'];"
        "atexit.register(lambda: print('HEAVY', [n for n in ('torch', 'numpy', 'diffusers') if n in sys.modules]));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "HEAVY []" in done.stdout and "--lora_weights" in done.stdout
