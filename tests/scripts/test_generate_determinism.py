"""A picture is the same alone, in a batch, behind other prompts, and made again from its own file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation

LINE = "a photo of a (cat:1.2) BREAK in the rain --n blurry --d 7"
OTHERS = [f"prompt number {number}, {'long ' * number}--d {number}" for number in range(10)]
SETTINGS = ["--H", "72", "--steps", "3", "--scale", "6.3", "--max_embeddings_multiples", "2", "--clip_skip", "2"]
CASES = [("sd1", "euler_a"), ("sd1", "dpm_2_a"), ("sdxl", "euler_a")]


@pytest.mark.parametrize(("kind", "sampler"), CASES, ids="-".join)
def test_a_picture_is_the_same_wherever_it_is_drawn(
    kind: str, sampler: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = sdxl_gen_img.SCRIPT if kind == "sdxl" else gen_img_diffusers.SCRIPT
    model = request.getfixturevalue(f"tiny_{kind}_path")

    def drawn(name: str, *arguments: object) -> list[Path]:
        words = ["--ckpt", model, "--outdir", tmp_path / name, "--sequential_file_name", *arguments]
        assert generation.run(script, [str(word) for word in words]) == 0
        return sorted((tmp_path / name).glob("*.png"))

    def pixels(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path)).astype(int)

    asked = ["--W", 64, *SETTINGS, "--sampler", sampler]
    (alone,) = drawn("alone", "--prompt", LINE, *asked)
    (tmp_path / "many.txt").write_text("\n".join([*OTHERS, LINE]), encoding="utf-8")
    behind = drawn("behind", "--from_file", tmp_path / "many.txt", *asked)
    assert len(behind) == 11
    assert np.array_equal(pixels(alone), pixels(behind[-1])), "behind ten other prompts"
    same = "a photo of a (cat:1.2) BREAK in the rain --n blurry"
    lines = [f"{same} --d {seed}" for seed in (5, 6, 7, 8)]
    (tmp_path / "four.txt").write_text("\n".join(lines), encoding="utf-8")
    batch = drawn("batch", "--from_file", tmp_path / "four.txt", "--batch_size", 4, *asked)
    # sums of a larger batch are added up in another order
    assert np.abs(pixels(alone) - pixels(batch[2])).max() <= 1, "in a batch of four"
    assert np.abs(pixels(batch[1]) - pixels(batch[2])).mean() > 1, "while another seed is another picture"
    (again,) = drawn("again", "--from_file", alone)
    assert np.array_equal(pixels(alone), pixels(again)), "from its own file, without any flag"
    assert Image.open(alone).text == Image.open(again).text
