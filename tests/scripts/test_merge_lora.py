"""networks/merge_lora.py, sdxl_merge_lora.py and merge_lora_old.py as commands."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from library.checkpoints.safetensors_io import read_header
from library.checkpoints.weights import load_tensors
from networks import merge_lora, sdxl_merge_lora
from tests.rules.test_help_without_torch import RUN_AND_REPORT
from tests.runs import ROOT
from tests.tiny_loras import tiny_lora

NOT_FOR_MOVING_TENSORS = "diffusers,transformers,accelerate,cv2,PIL"


def command(name, *words, cwd=None):
    words = [sys.executable, ROOT / "networks" / f"{name}.py", *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def two(tmp_path):
    return [tiny_lora(tmp_path / f"{name}.safetensors", "sd1", seed=seed, every=9) for seed, name in enumerate("ab")]


def test_networks_together_from_another_folder(two, tmp_path):
    for name in ("merge_lora", "sdxl_merge_lora", "merge_lora_old"):
        words = f"--models a.safetensors b.safetensors --ratios 0.5 0.5 --save_to {name}.safetensors".split()
        result = command(name, *words, "--save_precision", "fp16", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "total" in result.stderr and f"{name}.safetensors: 33 modules, rank 4, alpha 2.0" in result.stderr
    one, other, third = (load_tensors(tmp_path / f"{name}.safetensors") for name in
                         ("merge_lora", "sdxl_merge_lora", "merge_lora_old"))  # fmt: skip
    assert all(torch.equal(tensor, other[name]) and torch.equal(tensor, third[name]) for name, tensor in one.items())


@pytest.mark.parametrize("into_model", [False, True])
def test_the_picture_of_the_sum(into_model, two, tmp_path, tiny_sd1_path):
    model = ["--sd_model", tiny_sd1_path] if into_model else []
    words = [*model, "--models", *two, "--ratios", "1", "-0.5", "--save_to", tmp_path / "out.safetensors"]
    result = command("merge_lora", *words, "--plot", tmp_path / "energy.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "energy.png") as picture:
        assert picture.width == 1100


def test_moving_tensors_takes_nothing_but_torch(two, tmp_path, tiny_sd1_path):
    output = tmp_path / "out.safetensors"
    words = ["--sd_model", tiny_sd1_path, "--models", two[0], "--ratios", "1", "--save_to", output]
    script = ROOT / "networks" / "sdxl_merge_lora.py"  # the other family's command does the same
    words = [sys.executable, "-c", RUN_AND_REPORT, script, NOT_FOR_MOVING_TENSORS, *map(str, words)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "exit 0 loaded []", result.stderr
    assert "SD 1.x, 33 tensors changed by 1 network" in result.stderr
    assert read_header(output).metadata["modelspec.architecture"] == "stable-diffusion-v1"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--models a --ratios 1", "--save_to is needed"),
        ("--save_to o --ratios 1", "--models is needed"),
        ("--save_to o --models a", "--ratios is needed"),
        ("--save_to o --models a --ratios 1 2", "--ratios: 2 ratios for 1 model"),
        ("--save_to o --models a --ratios x", "--ratios: 'x' is not a number"),
        ("--save_to o --models a --ratios 1 --precision half", "--precision: 'half' is not one of float, fp16, bf16"),
        ("--save_to o --models a --ratios 1 --exakt", "--exakt: unknown flag; did you mean --exact?"),
        ("--save_to o.safetensors --models a.safetensors --ratios 1", "--models: a.safetensors does not exist"),
        ("--save_to {0} --models {0} {1} --ratios 1 1", "--save_to: {0} is one of the networks"),
        ("--save_to {2} --models {0} --ratios 1", "--save_to: {2} is a folder"),
        ("--save_to o.safetensors --models {0} --ratios 1 --sd_model {1}", "is a network, not a model"),
    ],
)
def test_mistakes(words, sentence, two, tmp_path, capfd):
    words = words.format(*two, tmp_path).split()
    for tool in (merge_lora.TOOL, sdxl_merge_lora.TOOL):
        try:
            code = tool.run(words)
        except SystemExit as end:
            code = end.code
        assert code == 2 and sentence.format(*two, tmp_path) in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_flags_without_effect_are_named(two, tmp_path, tiny_sd1_path, caplog):
    words = ["--sd_model", str(tiny_sd1_path), "--models", str(two[0]), "--ratios", "1", "--save_to",
             str(tmp_path / "out.safetensors")]  # fmt: skip
    assert merge_lora.TOOL.run([*words, "--concat", "--shuffle"]) == 0
    assert "--concat, --shuffle: no effect with --sd_model" in caplog.text
