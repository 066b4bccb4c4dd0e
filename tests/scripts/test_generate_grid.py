"""--grid: the same prompts and seeds with several networks, multipliers and models, on sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.checkpoints.safetensors_io import save_file
from library.cli import generation
from library.families.sd import StableDiffusion
from library.generate.images import Engine
from library.generate.picture_texts import picture_texts
from networks.lora import create_network
from tests.tiny_models import tiny_sd_checkpoint

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler_a", "--sequential_file_name"]


def run(model: Path, out: Path, *arguments: object, script: generation.Script = gen_img_diffusers.SCRIPT) -> int:
    words = ["--ckpt", model, "--outdir", out, *SMALL, *arguments]
    return generation.run(script, [str(word) for word in words])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("im_*.png"))


@pytest.fixture(scope="module")
def networks(tiny_sd1_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the networks of two epochs."""
    from library.families.options import ModelOptions
    from library.generate.images import load_plan
    from library.generate.options import ComputeOptions

    folder = tmp_path_factory.mktemp("networks")
    compute = ComputeOptions()
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_sd1_path))
    bundle = StableDiffusion().load(options, compute.attention, load_plan(compute))
    for seed, name in enumerate(("mine-000001", "mine")):
        network = create_network(1.0, 4, 4.0, bundle.vae, bundle.text_encoders[0], bundle.unet)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.5, generator=generator)
        network.save_weights(str(folder / f"{name}.safetensors"), None, {})
    return folder


def test_every_cell_is_what_a_run_of_its_own_draws(tiny_sd1_path: Path, networks: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1\na dog --d 2\n")
    asked = ["--from_file", prompts, "--batch_size", 2]
    comparison = ["--grid_networks", networks, "--grid_multipliers", 0, 0.5, 1]
    assert run(tiny_sd1_path, tmp_path / "all", *asked, *comparison) == 0
    drawn = pictures(tmp_path / "all")
    assert len(drawn) == 2 * 5, "two prompts; without network, and each of two networks with two multipliers"
    assert {path.name for path in (tmp_path / "all").glob("grid*")} == {"grid.png", "grid.html"}
    assert (tmp_path / "all" / "grid.html").read_text().count("<img ") == 2 * 2 * 3
    for number, (name, multiplier) in enumerate([("mine-000001", 0.5), ("mine-000001", 1), ("mine", 0.5), ("mine", 1)]):
        file = networks / f"{name}.safetensors"
        alone = ["--network_module", "networks.lora", "--network_weights", file, "--network_mul", multiplier]
        assert run(tiny_sd1_path, tmp_path / str(number), *asked, *alone) == 0
        cell = drawn[2 + 2 * number : 4 + 2 * number]
        for one, other in zip(cell, pictures(tmp_path / str(number)), strict=True):
            assert np.array_equal(pixels(one), pixels(other)), (name, multiplier)
        assert f"<lora:{name}:{multiplier:g}>" in picture_texts(cell[0], "")["parameters"]
    assert len({pixels(path).tobytes() for path in drawn}) == 10
    assert "<lora:" not in picture_texts(drawn[0], "")["parameters"]


def test_models_side_by_side(tiny_sd1_path: Path, networks: Path, tmp_path: Path) -> None:
    other = tiny_sd_checkpoint(tmp_path / "other.safetensors", "sd1", seed=1)
    asked = ["--prompt", "a cat", "--seed", 3, "--grid_ckpts", other]
    of_all = ["--network_module", "networks.lora", "--network_weights", networks / "mine.safetensors"]
    assert run(tiny_sd1_path, tmp_path / "all", *asked, *of_all) == 0
    first, second = pictures(tmp_path / "all")
    for path, model in ((first, tiny_sd1_path), (second, other)):
        out = tmp_path / f"alone_{model.stem}"
        assert run(model, out, "--prompt", "a cat", "--seed", 3, *of_all) == 0
        assert np.array_equal(pixels(path), pixels(pictures(out)[0]))
        assert f"Model: {model.stem}" in picture_texts(path, "")["parameters"]


def test_seeds_side_by_side_and_no_sheet_is_replaced(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    for _ in range(2):
        arguments = ["--prompt", "a cat", "--images_per_prompt", 2, "--steps", 1, "--grid"]
        assert run(tiny_sdxl_path, tmp_path, *arguments, script=sdxl_gen_img.SCRIPT) == 0
    assert {path.name for path in tmp_path.glob("grid*")} == {"grid.png", "grid_2.png", "grid.html", "grid_2.html"}


def test_what_is_finished_is_shown_when_something_goes_wrong(
    tiny_sd1_path: Path, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls = Engine.pictures, []

    def interrupted(engine: Engine, batch: list, **settings: object) -> list:
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(engine, batch, **settings)

    monkeypatch.setattr(Engine, "pictures", interrupted)
    assert run(tiny_sd1_path, tmp_path, "--prompt", "a cat", "--grid_networks", networks) == 130
    assert (tmp_path / "grid.html").read_text().count("<img ") == 1
    assert len(pictures(tmp_path)) == 1


def test_what_is_finished_of_the_first_version_is_shown(
    tiny_sd1_path: Path, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls = Engine.pictures, []

    def interrupted(engine: Engine, batch: list, **settings: object) -> list:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(engine, batch, **settings)

    monkeypatch.setattr(Engine, "pictures", interrupted)
    asked = ["--prompt", "a cat", "--images_per_prompt", 4, "--grid_networks", networks]
    assert run(tiny_sd1_path, tmp_path, *asked) == 130
    assert len(pictures(tmp_path)) == 2
    assert (tmp_path / "grid.html").read_text().count("<img ") == 2


def test_networks_and_models_that_do_not_fit_are_said_before_anything_is_loaded(
    tiny_sd1_path: Path, tiny_sd2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, width in (("sd1", 768), ("sd2", 1024)):  # of the published models' text states
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
        save_file({key: torch.zeros(2, width)}, tmp_path / f"of_{kind}.safetensors")
    mine = tmp_path / "of_sd1.safetensors"
    plain = ["--network_module", "networks.lora", "--network_weights", mine]
    for arguments, sentence in (
        (["--grid_networks", mine, tmp_path / "of_sd2.safetensors"],
         f"--grid_networks: {tmp_path / 'of_sd2.safetensors'} was made for SD 2.x, and {tiny_sd1_path} is SD 1.x"),
        (["--grid_networks", mine, "--grid_ckpts", tiny_sd2_path],
         f"--grid_networks: {mine} was made for SD 1.x, and {tiny_sd2_path} is SD 2.x"),
        (["--grid_ckpts", tiny_sd2_path, *plain],
         f"--network_weights: {mine} was made for SD 1.x, and {tiny_sd2_path} is SD 2.x"),
    ):  # fmt: skip
        assert run(tiny_sd1_path, tmp_path / "out", "--prompt", "a", *arguments) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--grid", "--interactive"], "--grid: all prompts have to be known beforehand; use --prompt or --from_file"),
        (["--grid", "--highres_fix_scale", "1", "--highres_fix_save_1st"], "--grid: shows no --highres_fix_save_1st"),
        (["--grid_ckpts", "missing.safetensors"], "--grid_ckpts: missing.safetensors"),
        (["--grid_networks", "missing.safetensors"], "--grid_networks: missing.safetensors does not exist"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(tiny_sd1_path, tmp_path / "out", "--prompt", "a", *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_network_names_its_flag(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    asked = ["--prompt", "a", "--grid_networks", tmp_path / "odd.safetensors"]
    assert run(tiny_sd1_path, tmp_path / "out", *asked) == 2
    said = capsys.readouterr().err
    assert "--grid_networks: " in said and "odd.safetensors" in said
