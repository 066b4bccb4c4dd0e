"""train_network.py end to end on tiny models: golden losses, files, configuration files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import equal_files, logged, metadata_of, train_network

GOLDEN = Path(__file__).parents[1] / "data" / "golden_losses_train_network.json"


GOLDEN_RUNS = {
    "sd1 epsilon": {},
    "sd1 conv-LoRA": {"network_args": ["conv_dim=2", "conv_alpha=1"], "min_snr_gamma": 5, "noise_offset": 0.1},
    "sd2 v-prediction": {"v2": True, "v_parameterization": True},
    "sd1 every kind of noise": {
        "noise_offset": 0.1, "adaptive_noise_scale": 0.2, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1,
        "loss_type": "huber", "huber_schedule": "snr", "debiased_estimation_loss": True,
    },
}  # fmt: skip


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
    expected = ["net-step00000002.safetensors", "net.log", "net.safetensors", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == expected
    tensors, metadata = load_file(out / "net.safetensors"), metadata_of(out / "net.safetensors")
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors.values())
    expected = {
        "ss_steps": "3", "ss_epoch": "1", "ss_max_train_steps": "3", "ss_network_module": "networks.lora",
        "ss_network_dim": "4", "ss_network_alpha": "1", "ss_learning_rate": "0.001", "ss_unet_lr": "None",
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
