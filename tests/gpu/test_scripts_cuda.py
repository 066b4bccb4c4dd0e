"""The other training scripts on a CUDA device: python -m pytest tests/gpu (all skipped where there is none)."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.runs import logged, run_script
from tests.tiny_data import tiny_images
from tests.tiny_metadata import tiny_metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NETWORK = {"network_module": "networks.lora", "network_dim": 4}
FULL = {"save_model_as": "safetensors"}
SCRIPTS = {
    "sdxl_train_network": NETWORK, "train_db": FULL, "fine_tune": FULL | {"train_text_encoder": True},
    "sdxl_train": FULL | {"train_text_encoder": True},
}  # fmt: skip


@pytest.fixture
def losses(tmp_path, tiny_sd1_path, tiny_sdxl_path):
    folder = tmp_path / "images" / "2_disc"
    tiny_images(folder, 6)

    def run(script: str, name: str, **settings) -> list[float]:
        source = {"train_data_dir": tmp_path / "images"}
        if script == "fine_tune":
            source = {"train_data_dir": folder, "in_json": tiny_metadata(folder, tmp_path / "meta.json")}
        options = {
            "pretrained_model_name_or_path": tiny_sdxl_path if script.startswith("sdxl") else tiny_sd1_path,
            **source, **SCRIPTS[script], "output_dir": tmp_path / f"{name}-out", "output_name": "net",
            "resolution": 256, "train_batch_size": 2, "max_train_steps": 6, "learning_rate": 1e-4, "seed": 1,
            "max_data_loader_n_workers": 0, "logging_dir": tmp_path / name, **settings,
        }  # fmt: skip
        assert run_script(importlib.import_module(script), options) == 0
        return logged(tmp_path / name, "loss/current")

    return run


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(losses, script, precision):
    assert losses(script, "half", mixed_precision=precision) == pytest.approx(losses(script, "full"), rel=2e-2)


@pytest.mark.parametrize("script", ["train_db", "sdxl_train"])
def test_bfloat16_weights_learn(losses, script):
    settings = {"mixed_precision": "bf16", "full_bf16": True, "max_train_steps": 40, "cache_latents": True}
    settings |= {"min_timestep": 500, "max_timestep": 501, "learning_rate": 1e-3}
    values = losses(script, "log", **settings)
    assert sum(values[-10:]) < sum(values[:10])


@pytest.mark.parametrize("settings", [{"fused_backward_pass": True}, {"fused_optimizer_groups": 4}])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdaFactor"])
def test_updates_inside_the_backward_pass(losses, settings, optimizer):
    shared = {"max_grad_norm": 0.0, "optimizer_type": optimizer, "mixed_precision": "bf16"}
    if optimizer == "AdaFactor":
        shared["optimizer_args"] = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
    plain = losses("sdxl_train", "plain", **shared)
    assert losses("sdxl_train", "fused", **shared, **settings) == pytest.approx(plain, rel=1e-3)


def test_cached_text_leaves_the_text_encoders_behind(losses):
    plain = losses("sdxl_train", "plain", train_text_encoder=False)
    cached = losses("sdxl_train", "cached", train_text_encoder=False, cache_text_encoder_outputs=True)
    assert cached == pytest.approx(plain, rel=1e-3)
