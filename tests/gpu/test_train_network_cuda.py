"""train_network.py on a CUDA device: python -m pytest tests/gpu (all skipped where there is none)."""

from __future__ import annotations

import pytest
import torch

from tests.runs import equal_files, logged, train_network
from tests.tiny_data import tiny_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def options(tmp_path, tiny_sd1_path):
    tiny_images(tmp_path / "images" / "2_disc", 6)
    return {
        "pretrained_model_name_or_path": tiny_sd1_path, "train_data_dir": tmp_path / "images",
        "output_dir": tmp_path / "out", "output_name": "net", "network_module": "networks.lora", "network_dim": 4,
        "resolution": 256, "train_batch_size": 2, "max_train_steps": 6, "learning_rate": 1e-3, "seed": 1,
        "max_data_loader_n_workers": 0,
    }  # fmt: skip


def losses(tmp_path, name, **options):
    assert train_network(**{**options, "logging_dir": tmp_path / name, "output_dir": tmp_path / f"{name}-out"}) == 0
    return logged(tmp_path / name, "loss/current")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"cache_latents": True}])
def test_half_precision_follows_float32(options, tmp_path, precision, settings):
    full = losses(tmp_path, "full", **options, **settings)
    half = losses(tmp_path, "half", **options, **settings, mixed_precision=precision)
    assert half == pytest.approx(full, rel=2e-2)


def test_xformers_follows_sdpa(options, tmp_path):
    pytest.importorskip("xformers")
    sdpa = losses(tmp_path, "sdpa", **options, mixed_precision="bf16", sdpa=True)
    assert losses(tmp_path, "xformers", **options, mixed_precision="bf16", xformers=True) == pytest.approx(
        sdpa, rel=2e-2
    )


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "SGDNesterov8bit"])
def test_eight_bit_optimizers_learn(options, tmp_path, optimizer):
    pytest.importorskip("bitsandbytes")
    options |= {"max_train_steps": 40, "optimizer_type": optimizer, "mixed_precision": "bf16", "cache_latents": True}
    values = losses(tmp_path, "log", **options, min_timestep=500, max_timestep=501)
    assert sum(values[-10:]) < sum(values[:10])


def test_resume_ends_in_the_same_weights_where_kernels_are_deterministic(options, tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        options |= {"mixed_precision": "bf16", "save_every_n_steps": 3, "save_state": True}
        options |= {"validation_split": 0.34, "validate_every_n_steps": 2, "ema_decay": 0.9}
        assert train_network(**options) == 0
        again = {**options, "output_dir": tmp_path / "again", "resume": tmp_path / "out" / "net-step00000003-state"}
        assert train_network(**again) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("net.safetensors", "net-ema.safetensors"):
        assert equal_files(tmp_path / "out" / name, tmp_path / "again" / name)
