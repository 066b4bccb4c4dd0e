"""train_network.py end to end on tiny models: golden losses, files, resume, workers, processes, mistakes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import ENVIRONMENT, ROOT, equal_files, flags, logged, metadata_of, script, train_network
from tests.tiny_data import tiny_images

GOLDEN = Path(__file__).parents[1] / "data" / "golden_losses_train_network.json"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tiny_images(folder / "2_disc", 6)
    return folder


def short_run(folder, images, model):
    """A short run; tests change what they are about."""
    return {
        "pretrained_model_name_or_path": model, "train_data_dir": images, "output_dir": folder / "out",
        "output_name": "net", "network_module": "networks.lora", "network_dim": 4, "resolution": 64,
        "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128, "train_batch_size": 2,
        "max_train_steps": 3, "learning_rate": 1e-3, "seed": 1, "max_data_loader_n_workers": 0,
    }  # fmt: skip


@pytest.fixture
def options(tmp_path, images, tiny_sd1_path):
    return short_run(tmp_path, images, tiny_sd1_path)


# ---------------------------------------------------------------------------------------------- golden losses

GOLDEN_RUNS = {
    "sd1 epsilon": {},
    "sd1 conv-LoRA": {"network_args": ["conv_dim=2", "conv_alpha=1"], "min_snr_gamma": 5, "noise_offset": 0.1},
    "sd2 v-prediction": {"v2": True, "v_parameterization": True},
}


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_golden_losses(options, tmp_path, name, tiny_sd2_path):
    """Three steps' losses as stored; made by running this test with GOLDEN_UPDATE=1."""
    if name.startswith("sd2"):
        options["pretrained_model_name_or_path"] = tiny_sd2_path
    assert train_network(**options, **GOLDEN_RUNS[name], logging_dir=tmp_path / "log") == 0
    losses = logged(tmp_path / "log", "loss/current")
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN_UPDATE"):
        stored[name] = losses
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    assert losses == pytest.approx(stored[name], rel=1e-4)
    assert len(losses) == 3


# ---------------------------------------------------------------------------------------------- what is written


def test_files_and_metadata(options, tmp_path, images, tiny_sd1_path):
    code = train_network(
        **options, save_every_n_steps=2, save_precision="fp16", metadata_author="me", training_comment="hello",
        caption_tag_dropout_rate=0.5, save_every_n_epochs=1, lr_scheduler="cosine", lr_warmup_steps=1,
    )  # fmt: skip
    assert code == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["net-step00000002.safetensors", "net.log", "net.safetensors"]
    tensors, metadata = load_file(out / "net.safetensors"), metadata_of(out / "net.safetensors")
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors.values())
    expected = {
        "ss_steps": "3", "ss_epoch": "1", "ss_max_train_steps": "3", "ss_network_module": "networks.lora",
        "ss_network_dim": "4", "ss_network_alpha": "1.0", "ss_learning_rate": "0.001", "ss_unet_lr": "None",
        "ss_num_train_images": "12", "ss_num_reg_images": "0", "ss_resolution": "(64, 64)", "ss_v2": "False",
        "ss_base_model_version": "sd_v1", "ss_seed": "1", "ss_training_comment": "hello", "ss_lr_scheduler": "cosine",
        "ss_optimizer": "torch.optim.adamw.AdamW", "ss_caption_tag_dropout_rate": "0.5", "ss_mixed_precision": "no",
        "ss_sd_model_name": tiny_sd1_path.name, "ss_output_name": "net", "ss_enable_bucket": "True",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.author": "me", "modelspec.title": "net",
        "modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_disc": {"n_repeats": 2, "img_count": 6}}
    assert len(metadata["sshs_model_hash"]) == 64 and len(metadata["ss_new_sd_model_hash"]) == 64
    assert not any(str(tmp_path) in value for value in metadata.values()), "no paths in metadata"
    assert metadata_of(out / "net-step00000002.safetensors")["ss_steps"] == "2"


def test_no_metadata_keeps_what_loading_needs(options, tmp_path):
    assert train_network(**options, no_metadata=True) == 0
    names = {name for name in metadata_of(tmp_path / "out" / "net.safetensors") if name.startswith("ss_")}
    assert names == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    }  # fmt: skip


@pytest.mark.parametrize("extension", ["ckpt", "pt"])
def test_other_file_formats(options, tmp_path, extension):
    assert train_network(**options, save_model_as=extension) == 0
    tensors = torch.load(tmp_path / "out" / f"net.{extension}", weights_only=True)
    assert any(name.endswith("lora_up.weight") for name in tensors)


@pytest.mark.parametrize(
    ("settings", "prefixes"),
    [
        ({"network_train_unet_only": True}, {"lora_unet"}),
        ({"network_train_text_encoder_only": True}, {"lora_te"}),
        ({}, {"lora_unet", "lora_te"}),
    ],
)
def test_what_is_trained_is_what_is_saved(options, tmp_path, settings, prefixes):
    assert train_network(**options, **settings) == 0
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert {"_".join(name.split("_")[:2]) for name in tensors} == prefixes
    untouched = {name for name, tensor in tensors.items() if "lora_up" in name and not tensor.any()}
    # at 64 px the middle block sees one position: its self-attention has nothing to choose, so q and k get no gradient
    assert all("mid_block" in name and "attn1_to_" in name for name in untouched)


# ---------------------------------------------------------------------------------------------- options act

VARIATIONS = {
    "gradient_checkpointing": ({"gradient_checkpointing": True}, "same"),
    "cache_latents": ({"cache_latents": True}, "differs"),  # cached latents are one fixed sample of the VAE
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, "differs"),
    "noise_offset": ({"noise_offset": 0.1}, "differs"),
    "min_snr_gamma": ({"min_snr_gamma": 1.0}, "differs"),
    "min_timestep": ({"min_timestep": 900}, "differs"),
    "max_timestep": ({"max_timestep": 100}, "differs"),
    "max_grad_norm": ({"max_grad_norm": 1e-6, "optimizer_type": "SGDNesterov"}, "differs"),
    "network_dropout": ({"network_dropout": 0.5}, "differs"),
    "scale_weight_norms": ({"scale_weight_norms": 1e-3}, "differs"),
    "shuffle_caption": ({"shuffle_caption": True}, "differs"),
    "caption_dropout_rate": ({"caption_dropout_rate": 1.0}, "differs"),
    "flip_aug": ({"flip_aug": True}, "differs"),
    "clip_skip": ({"clip_skip": 2}, "differs"),
    "max_token_length": ({"max_token_length": 150}, "differs"),
    "mixed_precision": ({"mixed_precision": "bf16"}, "differs"),
    "unet_lr": ({"unet_lr": 1e-2}, "differs"),
    "text_encoder_lr": ({"text_encoder_lr": 1e-2}, "differs"),
    "optimizer_type": ({"optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False"]}, "differs"),
    "lr_scheduler": ({"lr_scheduler": "linear"}, "differs"),
    "v_parameterization": ({"v_parameterization": True}, "differs"),
    "seed": ({"seed": 2}, "differs"),
    "mem_eff_attn": ({"mem_eff_attn": True}, "close"),
    "workers": ({"max_data_loader_n_workers": 2}, "same"),
}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, images, tiny_sd1_path):
    folder = tmp_path_factory.mktemp("plain")
    assert train_network(**short_run(folder, images, tiny_sd1_path)) == 0
    return folder / "out" / "net.safetensors"


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_option_changes_what_it_should(options, tmp_path, plain_run, name):
    settings, outcome = VARIATIONS[name]
    assert train_network(**{**options, **settings}) == 0
    result, plain = load_file(tmp_path / "out" / "net.safetensors"), load_file(plain_run)
    assert all(tensor.isfinite().all() for tensor in result.values())
    difference = max((result[key].float() - plain[key].float()).abs().max().item() for key in plain)
    if outcome == "same":
        assert difference == 0
    elif outcome == "close":
        assert difference < 1e-4
    else:
        assert difference > 1e-6


# ---------------------------------------------------------------------------------------------- resume


def test_resume_in_mid_epoch_ends_in_the_same_weights(options, tmp_path):
    options |= {
        "max_train_steps": 9,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "network_dropout": 0.1,
    }
    options |= {"shuffle_caption": True, "flip_aug": True, "caption_dropout_rate": 0.3}
    assert train_network(**options, save_every_n_steps=2, save_state=True) == 0
    whole = tmp_path / "out" / "net.safetensors"
    for step in (2, 4):
        state = tmp_path / "out" / f"net-step{step:08d}-state"
        again = {**options, "output_dir": tmp_path / f"again{step}"}
        assert train_network(**again, resume=state) == 0
        assert equal_files(whole, tmp_path / f"again{step}" / "net.safetensors")


def test_a_state_holds_only_what_is_trained(options, tmp_path, tiny_sd1_path):
    assert train_network(**options, save_state=True) == 0
    state = tmp_path / "out" / "net-state"
    size = sum(path.stat().st_size for path in state.iterdir())
    trained = (tmp_path / "out" / "net.safetensors").stat().st_size
    assert size < 5 * trained, "weights and two moments, nothing of the frozen model"


def test_resume_with_other_settings_says_which(options, tmp_path, capfd):
    assert train_network(**options, save_state=True) == 0
    capfd.readouterr()
    state = tmp_path / "out" / "net-state"
    assert train_network(**{**options, "learning_rate": 5e-4, "network_dim": 2}, resume=state) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "--learning_rate was 0.001 and is 0.0005" in message and "--network_dim was 4 and is 2" in message


def test_resume_with_other_images_is_refused(options, tmp_path, images, capfd):
    assert train_network(**options, save_state=True) == 0
    copied = tmp_path / "more"
    shutil.copytree(images, copied)
    first = sorted((copied / "2_disc").glob("*.txt"))[0]
    first.write_text("another caption")
    again = {**options, "train_data_dir": copied, "resume": tmp_path / "out" / "net-state"}
    capfd.readouterr()
    assert train_network(**again) == 2
    assert "train_data_dir" in capfd.readouterr().err  # the path differs, said first
    shutil.copytree(copied, images.parent / "same", dirs_exist_ok=True)


def test_resume_latest(options, tmp_path, capfd):
    options |= {"save_every_n_steps": 2, "save_state": True, "max_train_steps": 5, "resume": "latest"}
    assert train_network(**options) == 0
    assert "there is no state of this run yet" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out" / "net-state")
    first = (tmp_path / "out" / "net.safetensors").read_bytes()
    assert train_network(**options) == 0
    assert "going on after step 4" in capfd.readouterr().err
    del first
    assert train_network(**{**options, "output_dir": tmp_path / "b", "resume": None}) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "b" / "net.safetensors")


def test_kill_at_random_steps_and_resume_ends_in_the_same_weights(options, tmp_path):
    """Three times SIGKILL while it runs, each time resumed from the newest complete state: bit for bit the same."""
    options |= {"max_train_steps": 24, "save_every_n_steps": 3, "save_state": True, "lr_scheduler": "linear"}
    assert train_network(**options) == 0
    whole = tmp_path / "out" / "net.safetensors"
    options |= {"output_dir": tmp_path / "killed", "resume": "latest"}
    draw = random.Random(3)
    for _ in range(3):
        target = f"net-step{3 * draw.randrange(1, 3) + _progress(tmp_path / 'killed'):08d}-state"
        process = subprocess.Popen(
            [sys.executable, ROOT / "train_network.py", *flags(**options)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        _wait_for(tmp_path / "killed" / target, process)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "net.safetensors").exists(), "killed too late to show anything"
    assert train_network(**options) == 0
    assert equal_files(whole, tmp_path / "killed" / "net.safetensors")


def _progress(folder: Path) -> int:
    steps = [int(path.name.split("step")[1][:8]) for path in folder.glob("net-step*-state")]
    return max(steps, default=0)


def _wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, f"{path.name} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(options, tmp_path, number, code):
    options |= {"max_train_steps": 5000, "max_data_loader_n_workers": 1}
    command = [sys.executable, ROOT / "train_network.py", *flags(**options, save_every_n_steps=2)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "out" / "net-step00000002.safetensors", process)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code
    (state,) = (tmp_path / "out").glob("net-step*-state")
    assert f'--resume "{state}"' in messages and "Traceback" not in messages
    step = int(state.name.split("step")[1][:8])
    assert (tmp_path / "out" / f"net-step{step:08d}.safetensors").exists()
    assert train_network(**{**options, "max_train_steps": step + 1}, resume=state) == 0


# ---------------------------------------------------------------------------------------------- equalities


def test_any_number_of_workers_gives_the_same_weights(options, tmp_path):
    options |= {"max_train_steps": 5, "flip_aug": True, "shuffle_caption": True, "random_crop": True}
    files = []
    for workers in (0, 1, 4):
        folder = tmp_path / str(workers)
        assert train_network(**{**options, "output_dir": folder, "max_data_loader_n_workers": workers}) == 0
        files.append(folder / "net.safetensors")
    assert equal_files(files[0], files[1]) and equal_files(files[0], files[2])


def test_two_processes_equal_one(options, tmp_path):
    """2 processes x batch 2 = 1 process x batch 4: the same losses to 1e-5, the same steps and rates."""
    # plain SGD: AdamW divides by the size of a gradient, and would turn rounding of tiny ones into large steps
    options |= {"max_train_steps": 5, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    options |= {"optimizer_type": "SGDNesterov", "learning_rate": 0.1, "max_grad_norm": 1.0}
    options |= {"resolution": 256, "max_bucket_reso": 256}  # at 64 px a group norm sees two numbers: all rounding
    one = {**options, "train_batch_size": 4, "logging_dir": tmp_path / "log1", "output_dir": tmp_path / "one"}
    assert train_network(**one) == 0
    two = {**options, "train_batch_size": 2, "logging_dir": tmp_path / "log2", "output_dir": tmp_path / "two"}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", ROOT / "train_network.py", *flags(**two),
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "log1", "loss/current") == pytest.approx(
        logged(tmp_path / "log2", "loss/current"), abs=1e-5
    )
    for tag in ("lr/unet", "lr/textencoder"):
        assert logged(tmp_path / "log1", tag) == logged(tmp_path / "log2", tag)
    first, second = (load_file(tmp_path / name / "net.safetensors") for name in ("one", "two"))
    distance = sum((first[name] - second[name]).square().sum() for name in first).sqrt()
    length = sum(first[name].square().sum() for name in first if "lora_up" in name).sqrt()
    assert 0 < distance < 1e-4 * length, "the same training up to rounding"
    steps = [metadata_of(tmp_path / name / "net.safetensors")["ss_steps"] for name in ("one", "two")]
    assert steps == ["5", "5"]


# ---------------------------------------------------------------------------------------------- not a number


def poisoned(path: Path, source: Path) -> Path:
    """A checkpoint whose U-Net gives NaN for every input."""
    tensors = load_file(source)
    tensors["model.diffusion_model.out.2.bias"] = torch.full_like(tensors["model.diffusion_model.out.2.bias"], math.nan)
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


# ---------------------------------------------------------------------------------------------- config files


def test_config_file_is_the_same_as_flags(options, tmp_path, plain_run):
    lines = [
        f"{name} = {json.dumps(value if isinstance(value, (int, float)) else str(value))}"
        for name, value in options.items()
    ]
    (tmp_path / "run.toml").write_text("\ufeff[any_section]\n" + "\n".join(lines), encoding="utf-8")
    assert train_network(config_file=tmp_path / "run") == 0
    assert equal_files(plain_run, tmp_path / "out" / "net.safetensors")


def test_the_command_line_wins_over_the_file(options, tmp_path):
    (tmp_path / "run.toml").write_text("network_dim = 2\nmax_train_steps = 1\n")
    assert train_network(config_file=tmp_path / "run.toml", **options) == 0
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name} == {4}


def test_output_config_round_trip_without_secrets(options, tmp_path, plain_run):
    file = tmp_path / "written.toml"
    assert train_network(config_file=file, output_config=True, wandb_api_key="secret", **options) == 0
    assert "secret" not in file.read_text()
    assert train_network(config_file=file) == 0
    assert equal_files(plain_run, tmp_path / "out" / "net.safetensors")


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network_dim": 0}, ["--network_dim", "0"]),
        ({"network_dim": 100000}, ["--network_dim", "100000"]),
        ({"resolution": 100}, ["--resolution", "100", "8"]),
        ({"train_data_dir": "no/such/folder"}, ["--train_data_dir", "no/such/folder"]),
        ({"pretrained_model_name_or_path": "missing.safetensors"}, ["missing.safetensors", "does not exist"]),
        ({"v2": True}, ["--v2", "SD 1.x"]),
        ({"network_module": "networks.lorra"}, ["--network_module", "networks.lorra"]),
        ({"network_module": None}, ["--network_module", "networks.lora"]),
        ({"network_args": ["conv_dimm=4"]}, ["conv_dimm", "conv_dim"]),
        ({"resume": "nowhere"}, ["--resume", "nowhere"]),
        ({"cache_latents": True, "random_crop": True}, ["--random_crop", "--cache_latents"]),
        ({"lr_scheduler": "cosin"}, ["--lr_scheduler", "cosine"]),
        ({"optimizer_type": "AdmaW"}, ["--optimizer_type", "AdamW"]),
        ({"max_train_steps": 0}, ["--max_train_steps", "0"]),
        ({"xformers": True, "sdpa": True}, ["--xformers", "--sdpa"]),
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
        "resolution = \n": ["not valid TOML", "line 1"],
        "[a]\nresolutoin = '64'": ["resolutoin", "resolution"],
        "network_dim = 'four'": ["network_dim", "'four'"],
        "mixed_precision = 'fp17'": ["mixed_precision", "'fp17'"],
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
    assert "model saved." in done.stderr and "100%" in done.stderr
    assert (tmp_path / "out" / "net.safetensors").exists()
