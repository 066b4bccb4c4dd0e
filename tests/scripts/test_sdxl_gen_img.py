"""sdxl_gen_img.py as users run it: its flags, pictures, and one sentence for models of the other family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler", "--sequential_file_name"]
PROMPTS = """a cat --n dog --d 1
a cat --n dog --d 1 --oh 512
a cat --n dog --d 1 --ow 512
a cat --n dog --d 1 --nh 512
a cat --n dog --d 1 --nw 512
a cat --n dog --d 1 --ct 100
a cat --n dog --d 1 --cl 100
a cat --n dog --d 1 --nl 3
a cat --n dog --d 1 --nl none
a cat --n dog --d 1 --l 1
"""


def run(*arguments: object, script: generation.Script = sdxl_gen_img.SCRIPT) -> int:
    return generation.run(script, [str(argument) for argument in arguments])


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


def test_help_loads_no_torch() -> None:
    program = (
        "import sys, atexit, runpy; sys.argv = ['sdxl_gen_img.py', '--help'];"
        "atexit.register(lambda: print('HEAVY', [n for n in ('torch', 'numpy', 'diffusers') if n in sys.modules]));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "HEAVY []" in done.stdout
    for flag in ("--original_height_negative", "--crop_left", "--negative_scale", "--textual_inversion_embeddings"):
        assert f"{flag} " in done.stdout
    assert "--v2" not in done.stdout and "--XTI_embeddings" not in done.stdout


def test_every_line_option_counts_in_any_batch(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    model = ["--ckpt", tiny_sdxl_path, "--from_file", tmp_path / "prompts.txt", *SMALL]
    for size in (1, 4):
        assert run(*model, "--outdir", tmp_path / str(size), "--batch_size", size) == 0
    made = pictures(tmp_path / "1")
    assert np.array_equal(made[0], made[8])
    for index in (1, 2, 3, 4, 5, 6, 7, 9):
        assert np.abs(made[0] - made[index]).mean() > 0.05, PROMPTS.splitlines()[index]
    together = pictures(tmp_path / "4")
    assert max(np.abs(alone - other).mean() for alone, other in zip(made, together, strict=True)) < 0.02
    texts = Image.open(sorted((tmp_path / "1").iterdir())[1]).text
    assert texts["original-height"] == "512" and "original-width" not in texts


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--original_height", 512], "--oh 512"), (["--original_width", 512], "--ow 512"),
        (["--original_height_negative", 512], "--nh 512"), (["--original_width_negative", 512], "--nw 512"),
        (["--crop_top", 100], "--ct 100"), (["--crop_left", 100], "--cl 100"), (["--negative_scale", 3], "--nl 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_flags_are_requests_as_line_options_are(tiny_sdxl_path: Path, flags: list[object], line: str) -> None:
    def asked(prompt: str, *more: object) -> list:
        arguments = ["--ckpt", tiny_sdxl_path, "--seed", 1, *SMALL, "--prompt", prompt, *more]
        parser = generation.build_parser(sdxl_gen_img.SCRIPT)
        values = vars(parser.parse_strictly([str(argument) for argument in arguments]))
        groups = {name: generation.build(group, values) for name, group in generation.CONFIG_GROUPS.items()}
        return generation.check(sdxl_gen_img.SCRIPT, generation.GenerationConfig(**groups)).requests

    assert asked("a cat", *flags) == asked(f"a cat {line}") != asked("a cat")


def test_flags_of_the_text_and_the_schedule(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    model = ["--ckpt", tiny_sdxl_path, "--prompt", "a (cat:1.4)", "--seed", 1, *SMALL]
    variants = {
        "plain": [], "skip1": ["--clip_skip", 1], "skip2": ["--clip_skip", 2], "none": ["--emb_normalize_mode", "none"],
        "karras": ["--sigmas", "karras", "--steps", 4], "four": ["--steps", 4], "v": ["--v_parameterization"],
    }  # fmt: skip
    made = {}
    for name, flags in variants.items():
        assert run(*model, *flags, "--outdir", tmp_path / name) == 0
        (made[name],) = pictures(tmp_path / name)
    assert np.array_equal(made["plain"], made["skip2"])
    for one, other in (("plain", "skip1"), ("plain", "none"), ("four", "karras"), ("plain", "v")):
        assert np.abs(made[one] - made[other]).mean() > 0.05, other


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, **script: generation.Script) -> str:
    capsys.readouterr()
    assert run(*arguments, **script) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_models_of_the_other_family_and_other_mistakes(
    tiny_sd1_path: Path, tiny_sdxl_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--prompt", "a", "--outdir", tmp_path / "out"]
    said = refusal(capsys, "--ckpt", tiny_sd1_path, *usual)
    assert f"--ckpt: {tiny_sd1_path} is an SD 1.x model; use gen_img_diffusers.py" in said
    said = refusal(capsys, "--ckpt", tiny_sdxl_path, *usual, script=gen_img_diffusers.SCRIPT)
    assert f"--ckpt: {tiny_sdxl_path} is an SDXL model; use sdxl_gen_img.py" in said
    model = ["--ckpt", tiny_sdxl_path, *usual]
    assert "--crop_top: -1 is out of range; use 0 to" in refusal(capsys, *model, "--crop_top", -1)
    said = refusal(capsys, *model, "--sigmas", "karras", "--sampler", "ddim")
    assert "--sigmas: ddim has noise levels of its own, not 'karras' ones; use one of lms, euler" in said
    assert not list(tmp_path.glob("out/*.png"))


def test_sizes_mean_nothing_to_other_models(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--ckpt", tiny_sd1_path, "--outdir", tmp_path, "--seed", 1, *SMALL]
    assert run(*model, "--prompt", "a --ow 512", script=gen_img_diffusers.SCRIPT) == 0
    assert "--prompt: --ow, --oh, --nw, --nh, --ct and --cl have no effect" in capsys.readouterr().err
    assert run(*model, "--prompt", "a", script=gen_img_diffusers.SCRIPT) == 0
    assert np.array_equal(*pictures(tmp_path))
