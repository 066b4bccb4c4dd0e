"""What train_network.py says when something is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import ROOT, flags, metadata_of, script, train_network


def poisoned(path: Path, source: Path) -> Path:
    """A checkpoint of finite weights whose U-Net gives so much for every input that no loss is finite."""
    tensors = load_file(source)
    tensors["model.diffusion_model.out.2.bias"] = torch.full_like(tensors["model.diffusion_model.out.2.bias"], 1e30)
    save_file(tensors, path)
    return path


def test_a_run_without_finite_losses_stops_and_says_why(options, tmp_path, tiny_sd1_path, capfd):
    options |= {"pretrained_model_name_or_path": poisoned(tmp_path / "nan.safetensors", tiny_sd1_path)}
    assert train_network(**{**options, "max_train_steps": 50}, max_nonfinite_steps=4) == 1
    messages = capfd.readouterr().err
    assert "step 1: loss or gradient is not finite" in messages and "image_00" in messages
    assert "4 updates in a row without a finite loss" in messages.splitlines()[-1]
    (saved,) = (tmp_path / "out").glob("net-step*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "first_stage_model.decoder.conv_in.bias",
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_base_model_that_is_not_finite_is_refused(options, tmp_path, tiny_sd1_path, capfd, key, value):
    """In any part, trained or not: at the end nothing could be saved, or nothing good."""
    tensors = load_file(tiny_sd1_path)
    tensors[key][0] = value
    save_file(tensors, tmp_path / "odd.safetensors")
    assert train_network(**{**options, "pretrained_model_name_or_path": tmp_path / "odd.safetensors"}) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"odd.safetensors holds NaN or infinity ({key})" in message


def test_a_base_model_that_the_precision_can_not_hold(options, tmp_path, tiny_sd1_path, capfd):
    tensors = load_file(tiny_sd1_path)
    tensors["first_stage_model.decoder.conv_in.bias"] = torch.full_like(
        tensors["first_stage_model.decoder.conv_in.bias"].float(), 3.39e38
    )
    save_file(tensors, tmp_path / "odd.safetensors")
    options |= {"pretrained_model_name_or_path": tmp_path / "odd.safetensors", "mixed_precision": "bf16"}
    assert train_network(**options) == 0
    tensors["first_stage_model.decoder.conv_in.bias"][0] = torch.finfo(torch.float32).max
    save_file(tensors, tmp_path / "odd.safetensors")
    assert train_network(**options) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "values in first_stage_model.decoder.conv_in.bias that bfloat16 can't hold" in message


def test_what_a_diverged_run_saves_is_good(options, tmp_path, capfd):
    """A learning rate that ruins the weights at once: what is saved are the weights before, not the ruined ones."""
    options |= {"learning_rate": 1e20, "max_train_steps": 50, "save_every_n_steps": 1, "save_state": True}
    assert train_network(**options, max_nonfinite_steps=4) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    (good,) = (tmp_path / "out").glob("net-step00000000.safetensors")
    assert "the last good state is" in message and "net-step00000000-state" in message
    assert all(tensor.abs().max() < 10 for tensor in load_file(good).values())
    assert len(list((tmp_path / "out").glob("*-state"))) <= 3, "ruined states are not written"


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"optimizer_type": "AdamWScheduleFree"}])
def test_a_run_that_ends_with_ruined_weights_saves_good_ones(options, tmp_path, settings, capfd):
    """It is over before so many updates were skipped that it stops by itself; the last update may be the ruin."""
    folder = tmp_path / "out"
    for steps in (1, 3):
        again = options | settings | {"learning_rate": 1e20, "max_train_steps": steps, "save_state_on_train_end": True}
        assert train_network(**again) == 0
        messages = capfd.readouterr().err
        assert f"the weights after step {steps} give no finite loss" in messages
        assert "nothing was learned by then" in messages and "lower --learning_rate" in messages
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == 1 + ("ema_decay" in settings)
        for file in files:
            assert all(tensor.abs().max() < 10 for tensor in load_file(file).values()), file
        assert metadata_of(folder / "net.safetensors")["ss_steps"] == "0"
        assert all(t.abs().max() < 10 for t in load_file(folder / "net-state" / "trained.safetensors").values())


def test_weights_that_half_precision_cannot_hold_are_saved_in_full(options, tmp_path, capfd):
    rates = {"unet_lr": 1e-9, "text_encoder_lr": 1e-9}
    assert train_network(**options, **rates, network_alpha=100_000, save_precision="fp16") == 0
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "--save_precision" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network_dim": 0}, ["--network_dim", "0"]),
        ({"network_args": ["algo=locon"]}, ["algo", "--network_module lycoris.kohya"]),
        ({"network_dim": 100000}, ["--network_dim", "100000"]),
        ({"resolution": 100, "enable_bucket": False}, ["--resolution", "100", "8"]),
        ({"train_data_dir": "no/such/folder"}, ["--train_data_dir", "no/such/folder"]),
        ({"pretrained_model_name_or_path": "missing.safetensors"}, ["missing.safetensors", "does not exist"]),
        ({"v2": True}, ["--v2", "SD 1.x"]),
        ({"vae": "missing.pt"}, ["--vae", "missing.pt"]),
        ({"network_module": "networks.lorra"}, ["--network_module", "networks.lorra"]),
        ({"network_module": None}, ["--network_module", "networks.lora"]),
        ({"network_args": ["conv_dimm=4"]}, ["conv_dimm", "conv_dim"]),
        ({"resume": "nowhere"}, ["--resume", "nowhere"]),
        ({"cache_latents": True, "random_crop": True}, ["random_crop", "--cache_latents"]),
        ({"lr_scheduler": "cosin"}, ["--lr_scheduler", "cosine"]),
        ({"optimizer_type": "AdmaW"}, ["--optimizer_type", "AdamW"]),
        ({"max_train_steps": 0}, ["--max_train_steps", "0"]),
        ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
        ({"learning_rate": "1e400"}, ["--learning_rate", "1e400"]),
        ({"unet_lr": -1}, ["--unet_lr", "-1"]),
        ({"network_args": ["conv_dim=4", "conv_dim=8"]}, ["--network_args", "conv_dim", "twice"]),
        ({"network_weights": "nowhere.safetensors"}, ["--network_weights", "nowhere.safetensors"]),
        ({"log_with": "wandb"}, ["--log_with", "wandb"]),
        ({"logging_dir": "/proc/nowhere"}, ["--logging_dir", "/proc/nowhere"]),
        ({"log_tracker_config": "nowhere.toml"}, ["--log_tracker_config", "nowhere.toml"]),
        ({"lr_scheduler_type": "os.system"}, ["--lr_scheduler_type", "os.system"]),
        ({"max_token_length": 80}, ["--max_token_length", "80", "150, 225"]),
        ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, ["--network_train_unet_only"]),
        ({"output_name": "a/b"}, ["--output_name", "a/b", "--output_dir"]),
        ({"mixed_precision": "fp16"}, ["--mixed_precision", "fp16", "GPU"]),
    ],
)
def test_mistakes_are_one_sentence(options, capfd, change, words):
    assert train_network(**{**options, **change}) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(word in last for word in words), last


def test_wrong_kinds_of_model_files(options, tmp_path, tiny_sd1_path, capfd):
    empty, text, cut = (tmp_path / name for name in ("empty.safetensors", "text.safetensors", "cut.safetensors"))
    empty.touch()
    text.write_text("hello, I am no model " * 50)
    cut.write_bytes(tiny_sd1_path.read_bytes()[:100_000])
    for path in (empty, text, cut):
        assert train_network(**{**options, "pretrained_model_name_or_path": path}) == 2
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert path.name in last and "--pretrained_model_name_or_path" in last, last


def test_a_file_where_the_output_folder_should_be(options, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert train_network(**{**options, "output_dir": tmp_path / "file" / "x"}) == 2
    assert "--output_dir" in capfd.readouterr().err


def test_broken_configuration_files_name_line_or_key(options, tmp_path, capfd):
    cases = {
        "resolution = \n": ["line 1", "is not TOML"],
        "[a]\nresolutoin = '64'": ["resolutoin", "resolution"],
        "network_dim = 'four'": ["network_dim", "'four'"],
        "mixed_precision = 'fp17'": ["mixed_precision", "'fp17'"],
        "output_dir = 5": ["output_dir", "5"],
    }
    for content, words in cases.items():
        (tmp_path / "run.toml").write_text(content)
        assert train_network(config_file=tmp_path / "run.toml", **options) == 2
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert all(word in last for word in words), last


def test_help_and_mistakes_do_not_load_torch(options):
    """What can be said without torch is said without it: help, typos, wrong files, wrong folders."""
    probe = (
        "import sys; sys.argv[0] = 'train_network.py'\n"
        "import train_network\nfrom library.cli.training import run\n"
        "try: code = run(train_network.SCRIPT)\nexcept SystemExit as stop: code = stop.code\n"
        "print(code, 'torch' in sys.modules)"
    )
    for words, code in (
        (["--help"], 0),
        (["--no_such_flag"], 2),
        (flags(**{**options, "v2": True}), 2),
        (flags(**{**options, "train_data_dir": "nowhere"}), 2),
        (flags(**{**options, "network_dim": 0}), 2),
    ):
        done = subprocess.run([sys.executable, "-c", probe, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.split("\n")[-2] == f"{code} False", done.stdout + done.stderr


def test_an_unexpected_error_is_one_sentence_with_the_traceback_in_the_log(options, tmp_path, capfd, monkeypatch):
    from library.train import session

    monkeypatch.setattr(session, "train", lambda run: 1 / 0)
    assert train_network(**options) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "ZeroDivisionError" in last and "net.log" in last and "Traceback" not in last
    assert "Traceback" in (tmp_path / "out" / "net.log").read_text()


def test_as_users_start_it(options, tmp_path):
    done = script("train_network.py", *flags(**options))
    assert done.returncode == 0, done.stderr
    assert "model saved." in done.stderr and "steps: 3 of 3 in " in done.stderr
    assert (tmp_path / "out" / "net.safetensors").exists()
