"""What goes wrong on the way to pictures: one sentence, an exit code, and what is finished is kept whole."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save_file as save_anything

import gen_img_diffusers
import sdxl_gen_img
from library.checkpoints.safetensors_io import save_file
from library.cli import generation
from library.generate import memory
from library.generate.prompt_line import file_name
from library.models.build import build_text_encoder, build_unet
from networks.lora import create_network
from tests.tiny_models import TEXT_ENCODERS, UNETS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--W", "64", "--H", "64", "--steps", "1", "--sampler", "euler_a"]


def run(model: Path, *arguments: object, script: generation.Script = gen_img_diffusers.SCRIPT) -> int:
    return generation.run(script, [str(word) for word in ("--ckpt", model, *SMALL, *arguments)])


def the_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of the mistake: one line, the last one."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


@pytest.mark.parametrize("script", [gen_img_diffusers.SCRIPT, sdxl_gen_img.SCRIPT], ids=["sd", "sdxl"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sampler", "euler_b"], "--sampler: 'euler_b' is not one of"),
        (["--network_weights", "a.safetensors"], "--network_weights: no --network_module says what kind"),
        (["--network_module", "networks.lora", "--network_weights", "gone.safetensors"], "gone.safetensors"),
        (["--network_module", "networks.nosuch", "--network_weights", "x"], "networks.nosuch"),
        (["--from_file", "gone.txt"], "--from_file: can't read gone.txt (No such file or directory)"),
        (["--vae", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_mistakes_of_the_command_line(
    script: generation.Script, arguments: list[str], sentence: str, request: pytest.FixtureRequest,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = request.getfixturevalue(f"tiny_{'sdxl' if script is sdxl_gen_img.SCRIPT else 'sd1'}_path")
    try:
        code = run(model, "--prompt", "a", "--outdir", tmp_path / "out", *arguments, script=script)
    except SystemExit as ending:  # of the parser
        code = ending.code
    assert code == 2
    assert sentence in the_sentence(capsys)
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_the_script_for_other_models_is_named(
    tiny_sd1_path: Path, tiny_sdxl_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_sdxl_path, "--prompt", "a", "--outdir", tmp_path / "out") == 2
    assert "sdxl_gen_img.py" in the_sentence(capsys)
    assert run(tiny_sd1_path, "--prompt", "a", "--outdir", tmp_path / "out", script=sdxl_gen_img.SCRIPT) == 2
    assert "gen_img_diffusers.py" in the_sentence(capsys)


def test_a_network_of_another_family(tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet, text = build_unet(UNETS["sd2"]), build_text_encoder(TEXT_ENCODERS["sd2"])
    network = create_network(1.0, 2, 1.0, None, text, unet)
    network.save_weights(tmp_path / "of_sd2.safetensors", torch.float16, {})
    arguments = ["--network_module", "networks.lora", "--network_weights", tmp_path / "of_sd2.safetensors"]
    assert run(tiny_sd1_path, "--prompt", "a", "--outdir", tmp_path / "out", *arguments) == 2
    said = the_sentence(capsys)
    assert "--network_weights" in said and "of_sd2.safetensors" in said
    assert not pictures(tmp_path / "out")


def test_a_network_that_is_none(tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"something.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    arguments = ["--network_module", "networks.lora", "--network_weights", tmp_path / "odd.safetensors"]
    assert run(tiny_sd1_path, "--prompt", "a", "--outdir", tmp_path / "out", *arguments) == 2
    assert "odd.safetensors" in the_sentence(capsys)


def test_a_folder_that_cannot_be_written(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(tiny_sd1_path, "--prompt", "a", "--outdir", tmp_path / "file" / "out") == 2
    assert "--outdir: can't write to" in the_sentence(capsys)


def test_a_broken_file_of_prompts_names_its_line(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"a cat\n\xff\xfe broken\na dog --w wide\n")
    assert run(tiny_sd1_path, "--from_file", prompts, "--outdir", tmp_path / "out") == 2
    assert f"{prompts}, line 2: is not UTF-8 text; write it in UTF-8" in the_sentence(capsys)
    arguments = ["--from_file", prompts, "--outdir", tmp_path / "out", "--skip_errors"]
    assert run(tiny_sd1_path, *arguments) == 2
    assert len(pictures(tmp_path / "out")) == 1, "the line that is right is drawn"
    assert "2 prompts could not be drawn" in the_sentence(capsys)


def test_a_disk_that_gets_full_keeps_what_is_finished(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, calls = os.fsync, []

    def full_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    arguments = ["--prompt", "a", "--images_per_prompt", 6, "--outdir", tmp_path]
    assert run(tiny_sd1_path, *arguments) == 2
    assert "No space left on device" in the_sentence(capsys)
    assert len(pictures(tmp_path)) == 2
    assert all(Image.open(path).load() for path in pictures(tmp_path))
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_keeps_whole_pictures_only(tiny_sd1_path: Path, tmp_path: Path) -> None:
    words = ["--ckpt", tiny_sd1_path, *SMALL, "--prompt", "a", "--images_per_prompt", 100_000, "--outdir", tmp_path]
    command = [sys.executable, "gen_img_diffusers.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        start = time.monotonic()
        while len(pictures(tmp_path)) < 3:
            assert process.poll() is None and time.monotonic() - start < 300
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].endswith("interrupted")
    assert len(pictures(tmp_path)) >= 3
    assert all(Image.open(path).load() for path in pictures(tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_flags_without_effect_are_said(tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "guide.png")
    arguments = ["--prompt", "a --d 1", "--outdir", tmp_path / "out"]
    assert (
        run(
            tiny_sd1_path,
            *arguments,
            "--guide_image_path",
            tmp_path / "guide.png",
            "--zero_terminal_snr",
            "--sampler",
            "lms",
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "--guide_image_path has no effect" in said and "--zero_terminal_snr has no effect with lms" in said


def test_a_vae_that_is_not_finite_draws_no_black_pictures(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(tiny_sd1_path)
    name = next(name for name in tensors if name.startswith("first_stage_model.decoder.mid"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_anything(tensors, tmp_path / "nan.safetensors")
    assert run(tmp_path / "nan.safetensors", "--prompt", "a --d 1", "--outdir", tmp_path / "out") == 2
    assert "the VAE's output is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


LORA = ["--network_module", "networks.lora", "--network_weights", "{lora}"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*LORA, "--network_mul", "1e300"], "--network_mul: 1e+300 is out of range; use 1 or so, 10000 at most"),
        ([*LORA, "--prompt", "a --am 1,1e30"], "--prompt: --am: 1e+30 is out of range"),
        (["--prompt", "a --l 1e30"], "--prompt: --l: 1e+30 is out of range; use 7.5 or so, 10000 at most"),
        (["--prompt", "a --nl -1e30"], "--prompt: --nl: -1e+30 is out of range"),
        (["--scale", "1e30"], "--scale: 1e+30 is out of range"),
        (["--negative_scale", "1e30"], "--negative_scale: 1e+30 is out of range"),
        (["--noise_offset_prob", "1", "--noise_offset_range", "0", "1e30"], "--noise_offset_range: 1e+30 is out of"),
        (["--pyramid_noise_prob", "1", "--pyramid_noise_discount_range", "0", "11"], "0.8 or so, 10 at most"),
        (["--gradual_latent_s_noise", "1e30"], "--gradual_latent_s_noise: 1e+30 is out of range"),
        (["--gradual_latent_unsharp_params", "3,1,1e30"], "use a strength of 0.5 or so"),
        (["--grid_networks", "{lora}", "--grid_multipliers", "1e30"], "--grid_multipliers: 1e+30 is out of range"),
        (["--clip_guidance_scale", "1e30"], "--clip_guidance_scale: 1e+30 is out of range; use 100 or so"),
        (["--control_net_weights", "1e30", "--control_net_models", "x"], "--control_net_weights: 1e+30 is out of"),
        (["--prompt", "a --f CON.png"], "--prompt: --f 'CON.png' is not the name of a file of the kind .png, .webp"),
        (["--prompt", "a --f lpt1"], "not that of a device, as CON is on Windows"),
        (["--prompt", "a --f x.gif"], "--f 'x.gif' is not the name of a file of the kind .png, .webp or .jpg"),
        ([*LORA, "--network_merge", "--mask_path", "{mask}"],
         "--mask_path: networks that are merged into the model have no regions, and there is no picture (--image_path) "
         "that it masks; leave --network_merge out for regions"),
        (["--grid_networks", "{lora}", "--mask_path", "{mask}"],
         "--mask_path: networks that are compared (--grid_networks) have no regions, and there is no picture"),
        ([*LORA, "--grid_networks", "{lora}", "--mask_path", "{mask}"],
         "--grid_networks: networks that are compared have no regions"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    network = create_network(1.0, 2, 1.0, None, build_text_encoder(TEXT_ENCODERS["sd1"]), build_unet(UNETS["sd1"]))
    network.save_weights(tmp_path / "lora.safetensors", torch.float16, {})
    Image.new("RGB", (64, 64)).save(tmp_path / "mask.png")
    files = {"lora": tmp_path / "lora.safetensors", "mask": tmp_path / "mask.png"}
    words = [word.format(**files) for word in arguments]
    words = words if "--prompt" in words else ["--prompt", "a", *words]
    assert run(tiny_sd1_path, "--outdir", tmp_path / "out", *words) == 2
    assert sentence in the_sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["console.png", "v1.5", "a.JPG", "aux_2", "com10"])
def test_names_that_are_as_good_as_others(name: str) -> None:
    assert file_name(name) == name


def test_a_picture_that_memory_cannot_hold(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1_500_000)
    monkeypatch.setattr(sys, "stdin", io.StringIO("large --w 128\nsmall\n"))
    assert run(tiny_sd1_path, "--outdir", tmp_path, "--interactive", "--no_preview") == 0
    said = capsys.readouterr().err
    assert "a picture of 128x64 would take at least 0.0021 GB of memory, and 0.0015 GB are free; draw a smaller" in said
    assert len(pictures(tmp_path)) == 1
    assert run(tiny_sd1_path, "--outdir", tmp_path, "--prompt", "large --w 128") == 2


def test_a_sidecar_lies_beside_the_picture(tiny_sd1_path: Path, tmp_path: Path) -> None:
    assert run(tiny_sd1_path, "--prompt", "a --d 7", "--outdir", tmp_path / "out", "--sidecar") == 0
    (path,) = (tmp_path / "out").glob("*.png.json")
    assert json.loads(path.read_text(encoding="utf-8"))["seed"] == 7
