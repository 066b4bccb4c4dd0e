"""Pictures from pictures, in stages and at other resolutions, as users ask for them: each flag and each line option."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation
from library.generate.config import CONFIG_GROUPS, GenerationConfig
from library.generate.request import GenerationRequest
from library.options import build
from library.packages import is_installed
from tests.unit.test_latent_upscaler import upscaler_file

FAST = ["--steps", "2", "--sampler", "euler_a", "--seed", "1", "--prompt"]
SHRINK = "a --dsd1 2 --dst1 500"
GRADUAL = "a --glt 1000 --gle 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/a.png and b.png of 64 x 96, mask.png white below, other.png of other proportions, broken.png."""
    path = tmp_path_factory.mktemp("sources")
    (path / "images").mkdir()
    for seed, name in enumerate("ab"):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 96), Image.Resampling.BICUBIC).save(path / "images" / f"{name}.png")
    mask = np.zeros((96, 64), np.uint8)
    mask[64:] = 255
    Image.fromarray(mask).save(path / "mask.png")
    Image.fromarray(mask[:64]).save(path / "other.png")
    (path / "broken.png").write_bytes((path / "images" / "a.png").read_bytes()[:300])
    return path


@pytest.fixture
def drawn(tiny_sd1_path: Path, tiny_sdxl_path: Path, tmp_path: Path):
    """Draws with a script and returns pictures as arrays, by the order of their names."""
    runs = iter(range(1000))

    def draw(*arguments: object, is_sdxl: bool = False) -> list[np.ndarray]:
        out = tmp_path / str(next(runs))
        script, model = (sdxl_gen_img, tiny_sdxl_path) if is_sdxl else (gen_img_diffusers, tiny_sd1_path)
        words = [str(word) for word in ("--ckpt", model, "--outdir", out, "--sequential_file_name", *FAST, *arguments)]
        assert generation.run(script.SCRIPT, words) == 0
        return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]

    return draw


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def test_a_folder_of_pictures_is_taken_in_turn(drawn, folder: Path) -> None:
    turns = drawn("a --d 1", "--images_per_prompt", 3, "--image_path", folder / "images", "--n_iter", 2)
    assert [picture.shape for picture in turns] == [(96, 64, 3)] * 6
    assert apart(turns[0], turns[1]) > 3
    assert apart(turns[0], turns[2]) == apart(turns[0], turns[3]) == 0, "the same seed; a list begins with the first"
    assert apart(turns[1], turns[4]) == 0


def test_strength_of_the_flag_and_of_the_line(drawn, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ["--image_path", folder / "images" / "a.png"]
    (usual,), (strong,) = drawn("a", *image), drawn("a", *image, "--strength", 1)
    (by_line,) = drawn("a --t 1 --w 128", *image, "--force_scheduler_zero_steps_offset")
    said = capsys.readouterr().err
    assert "--w and --h have no effect" in said and "--force_scheduler_zero_steps_offset has no effect" in said
    assert apart(usual, strong) > 3
    assert apart(strong, by_line) == 0
    assert drawn("a", *image, "--W", 80, "--H", 72)[0].shape == (64, 64, 3), "multiples of 32"
    assert drawn("a", *image, "--W", 80)[0].shape == (96, 64, 3), "both or none"
    drawn("a --t 0.5")
    assert "--t has no effect" in capsys.readouterr().err
    drawn("a", "--strength", 0.5)
    assert "--strength has no effect" in capsys.readouterr().err


def test_a_mask_keeps_what_is_black(drawn, folder: Path) -> None:
    image = ["--image_path", folder / "images" / "a.png", "--strength", 1]
    (plain,), (masked,), (other,) = (
        drawn("a", *image), drawn("a", *image, "--mask_path", folder / "mask.png"),
        drawn("dog", *image, "--mask_path", folder / "mask.png"),
    )  # fmt: skip
    assert apart(masked, plain) > 3
    # what the VAE decodes at the upper end hardly sees the lower third
    assert apart(masked[:24], other[:24]) < apart(masked[64:], other[64:]) / 2


def test_highres_fix_in_all_forms(drawn, folder: Path, tmp_path: Path) -> None:
    base = ["a", "--W", 128, "--H", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2]
    weights = upscaler_file(tmp_path / "up.safetensors", is_new=False)
    module = ["--highres_fix_upscaler", "tools.latent_upscaler", "--highres_fix_upscaler_args", f"weights={weights}"]
    (plain,) = drawn(*base[:5])
    first, whole = drawn(*base, "--highres_fix_save_1st")
    assert (first.shape, whole.shape) == ((64, 64, 3), (128, 128, 3))
    assert apart(first, drawn("a", "--W", 64, "--H", 64)[0]) == 0, "the first stage is a picture like any other"
    small_first, _ = drawn(*base, "--highres_fix_save_1st", "--highres_fix_latents_upscaling")
    assert apart(first, small_first) == 0
    forms = {
        "plain": plain,
        "as a picture": whole,
        "as latents": drawn(*base, "--highres_fix_latents_upscaling")[0],
        "by a module": drawn(*base, *module)[0],
        "three steps": drawn(*base[:-1], 3)[0],
        "stronger": drawn(*base, "--strength", 1)[0],
        "by line": drawn("a --t 1", *base[1:])[0],
        "without control": drawn(*base, "--highres_fix_disable_control_net")[0],
    }
    assert apart(forms.pop("without control"), whole) == 0, "there is none"
    assert apart(forms.pop("by line"), forms["stronger"]) == 0
    names = list(forms)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert apart(forms[name], forms[other]) > 0.5, (name, other)
    image = ["--image_path", folder / "images" / "a.png", "--strength", 1]
    stages = [
        drawn("a", *image, *base[1:], "--highres_fix_save_1st", *more) for more in ([], ["--highres_fix_strength", 0.5])
    ]
    assert apart(stages[0][0], stages[1][0]) > 0.5


def test_highres_fix_of_sdxl_is_the_same_in_a_batch(drawn, tmp_path: Path) -> None:
    weights = upscaler_file(tmp_path / "up.safetensors", is_new=False)
    module = ["--highres_fix_upscaler", "tools.latent_upscaler", "--highres_fix_upscaler_args", f"weights={weights}"]
    base = ["a", "--W", 128, "--H", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2, *module]
    one, two = (drawn(*base, "--images_per_prompt", 2, "--batch_size", size, is_sdxl=True) for size in (1, 2))
    assert all(apart(first, second) < 0.1 for first, second in zip(one, two, strict=True))


def test_resolution_options_hold_for_their_line_alone(drawn, tmp_path: Path) -> None:
    lines = ["a --d 1", f"{SHRINK} --d 1", "a --d 1", f"{GRADUAL} --d 1", "a --d 1"]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    for is_sdxl in (False, True):
        size = ["--W", 128, "--H", 128, "--batch_size", 4]
        plain, shrunk, again, gradual, at_last = drawn(
            "unused", "--from_file", tmp_path / "lines.txt", *size, is_sdxl=is_sdxl
        )
        assert apart(plain, again) < 0.1 and apart(plain, at_last) < 0.1
        assert apart(plain, shrunk) > 0.5 and apart(plain, gradual) > 0.5


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--dsd1 1", ["--ds_depth_1", "1"]),
        ("--dsd1 1 --dst1 400", ["--ds_depth_1", "1", "--ds_timesteps_1", "400"]),
        ("--dsr 0.25", ["--ds_depth_1", "3", "--ds_ratio", "0.25"]),  # any of them switches it on, at block 3
        ("--dsd2 1 --dst2 10", ["--ds_depth_1", "3", "--ds_depth_2", "1", "--ds_timesteps_2", "10"]),
        ("--glt 500", ["--gradual_latent_timesteps", "500"]),
        ("--glr 0.75", ["--gradual_latent_timesteps", "650", "--gradual_latent_ratio", "0.75"]),
        ("--gls 0.25", ["--gradual_latent_timesteps", "650", "--gradual_latent_ratio_step", "0.25"]),
        ("--gle 2", ["--gradual_latent_timesteps", "650", "--gradual_latent_every_n_steps", "2"]),
        ("--glsn 0.5", ["--gradual_latent_timesteps", "650", "--gradual_latent_s_noise", "0.5"]),
        ("--glus 3,0.5,1,0", ["--gradual_latent_timesteps", "650", "--gradual_latent_unsharp_params", "3,0.5,1,0"]),
    ],
)
def test_lines_ask_for_the_same_as_flags(tiny_sd1_path: Path, line: str, flags: list[str]) -> None:
    def asked(*words: str) -> list[GenerationRequest]:
        parser = generation.build_parser(gen_img_diffusers.SCRIPT)
        values = vars(parser.parse_strictly(["--ckpt", str(tiny_sd1_path), *FAST, *words]))
        config = GenerationConfig(**{name: build(group, values) for name, group in CONFIG_GROUPS.items()})
        return generation.check(gen_img_diffusers.SCRIPT, config).requests

    assert asked(f"a {line}") == asked("a", *flags) != asked("a")


def test_start_noise_and_schedule(drawn) -> None:
    (plain,) = drawn("a", "--W", 64, "--H", 64)
    for flags in (
        ["--pyramid_noise_prob", 1, "--pyramid_noise_discount_range", 0.8, 0.9],
        ["--noise_offset_prob", 1, "--noise_offset_range", 0.5, 0.6],
        ["--zero_terminal_snr"],
    ):
        assert apart(plain, drawn("a", "--W", 64, "--H", 64, *flags)[0]) > 0.5, flags
        if "prob" in flags[0]:
            never = [flags[0], 0, *flags[2:]]
            assert apart(plain, drawn("a", "--W", 64, "--H", 64, *never)[0]) == 0


def test_how_it_is_computed_does_not_change_the_picture(drawn) -> None:
    size = ["a", "--W", 64, "--H", 64, "--images_per_prompt", 3, "--batch_size", 3]
    whole = drawn(*size)
    for flags in (["--vae_batch_size", 1], ["--vae_batch_size", 0.5], ["--vae_slices", 4], ["--opt_channels_last"]):
        assert max(map(apart, whole, drawn(*size, *flags))) < 0.1, flags


def test_the_vae_takes_as_many_at_once_as_asked(drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.models import vae

    decode, sizes = vae.decode, []

    def see(model: object, latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return decode(model, latents)

    monkeypatch.setattr(vae, "decode", see)
    size = ["a", "--W", 64, "--H", 64, "--images_per_prompt", 4, "--batch_size", 4, "--vae_batch_size"]
    drawn(*size, 3)
    drawn(*size, 0.5)
    assert sizes == [3, 1, 2, 2]


def test_mistakes_are_one_sentence(tiny_sd1_path: Path, folder: Path, tmp_path: Path, capsys) -> None:
    image = ["--image_path", folder / "images" / "a.png"]
    two = ["--W", 128, "--H", 128, "--highres_fix_scale", 0.5]
    (tmp_path / "empty").mkdir()
    cases = [
        (["a", "--image_path", "missing.png"], "--image_path: missing.png does not exist"),
        (["a", "--image_path", tmp_path / "empty"], "holds no picture; .png, .jpg, .jpeg, .webp are looked for"),
        (["a", "--image_path", folder / "broken.png"], "broken.png can't be read"),
        (["a", "--image_path", tiny_sd1_path], "is not an image"),
        (["a", "--mask_path", folder / "mask.png"], "--mask_path: there is no picture to draw anew; add --image_path"),
        (["a", *image, "--mask_path", folder / "other.png"], "other.png has 64x64 pixels, and its picture"),
        (["a", *image, "--strength", 1.5], "--strength: 1.5 is out of range"),
        (["a --t 0", *image], "--prompt: --t: 0.0 is out of range"),
        (["a", *image, "--strength", 0.3], "a strength of 0.3 leaves none of 2 steps; use more steps"),
        (["a", "--highres_fix_save_1st"], "--highres_fix_save_1st: there is no highres fix; add --highres_fix_scale"),
        (["a", "--highres_fix_scale", 0.1], "0.1 of 512x512 is a first stage of 32x32; 64 pixels are the least"),
        (["a", *two, "--highres_fix_upscaler", "tools.nothing"], "there is no Python module 'tools.nothing'"),
        (["a", *two, "--highres_fix_upscaler", "networks.lora"], "networks.lora has no function create_upscaler"),
        (["a", *two, "--highres_fix_upscaler", "tools.latent_upscaler"], "no file given; use"),
        (["a --dsd1 4"], "--prompt: this model has no block 4; use 0 to 3"),
        (["a --dsr 2"], "--prompt: --ds_ratio: 2.0 is out of range"),
        (["a --glus 4,1,1"], "--prompt: --gradual_latent_unsharp_params: the size 4 is not odd"),
        ([GRADUAL, *image, "--mask_path", folder / "mask.png"], "gradual latent and a mask can't go together"),
        (["a", "--vae_slices", 0], "--vae_slices: 0 is out of range"),
        (["a", "--vae_batch_size", 0], "--vae_batch_size: 0.0 is out of range"),
        (["a", "--pyramid_noise_prob", 1], "--pyramid_noise_prob: goes together with --pyramid_noise_discount_range"),
        (["a", "--noise_offset_prob", 2, "--noise_offset_range", 0, 1], "--noise_offset_prob: 2.0 is out of range"),
    ]  # fmt: skip
    if not is_installed("xformers"):
        cases.append((["a", "--diffusers_xformers"], "the package xformers is not installed"))
    for arguments, sentence in cases:
        words = ["--ckpt", tiny_sd1_path, "--outdir", tmp_path / "out", *FAST, *arguments]
        capsys.readouterr()
        assert generation.run(gen_img_diffusers.SCRIPT, [str(word) for word in words]) == 2, sentence
        said = capsys.readouterr().err
        assert sentence in said.strip().splitlines()[-1], said
    assert not list(tmp_path.glob("out/*.png"))


def test_what_has_no_effect_is_said(drawn, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(GRADUAL, "--W", 64, "--H", 64, "--sampler", "ddim", "--images_per_prompt", 2)
    said = capsys.readouterr().err
    assert said.count("gradual latent has no effect with ddim: euler_a alone can do it") == 1
