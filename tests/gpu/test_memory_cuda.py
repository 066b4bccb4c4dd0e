"""Precision and memory on a CUDA device: python -m pytest tests/gpu (all skipped where there is none)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from library.train import loop
from library.train.offload import ActivationOffload
from tests.runs import ENVIRONMENT, ROOT, flags, logged, train_network
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
        "max_data_loader_n_workers": 0, "cache_latents": True,
    }  # fmt: skip


def losses(tmp_path, name, **options):
    folder = tmp_path / name
    assert train_network(**{**options, "logging_dir": folder / "log", "output_dir": folder}) == 0
    return logged(folder / "log", "loss/current")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_adapters_in_half_precision_follow_those_in_float32(options, tmp_path, precision):
    full = losses(tmp_path, "full", **options, mixed_precision=precision)
    half = losses(tmp_path, "half", **options, mixed_precision=precision, **{f"full_{precision}": True})
    assert half == pytest.approx(full, rel=2e-2)
    tensors = load_file(tmp_path / "half" / "net.safetensors")
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {tensors[name].dtype for name in tensors if "lora_up" in name} == {expected}
    assert any(tensors[name].any() for name in tensors if "lora_up" in name)


def test_full_fp16_goes_on_after_gradients_that_overflow(options, tmp_path):
    """The scaler starts at 65536: gradients of float16 overflow first, the update is skipped, the scale halved."""
    values = losses(tmp_path, "half", **options, mixed_precision="fp16", full_fp16=True, prior_loss_weight=1.0)
    assert all(value == value and value < 10 for value in values)


@pytest.mark.parametrize("flag", ["fp8_base", "fp8_base_unet"])
def test_a_base_in_8_bits_follows_one_in_16(options, tmp_path, flag):
    half = losses(tmp_path, "half", **options, mixed_precision="bf16")
    assert losses(tmp_path, "eighth", **options, mixed_precision="bf16", **{flag: True}) == pytest.approx(
        half, rel=5e-2
    )


def test_offloaded_checkpoints_give_the_same_losses(options, tmp_path, monkeypatch):
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    moved = []
    to_cpu = ActivationOffload._to_cpu
    monkeypatch.setattr(ActivationOffload, "_to_cpu", lambda self, t: moved.append(t.numel()) or to_cpu(self, t))
    plain = losses(tmp_path, "plain", **options)
    assert not moved
    assert losses(tmp_path, "offloaded", **options, cpu_offload_checkpointing=True) == pytest.approx(plain, rel=1e-3)
    assert moved


def test_fused_backward_pass(options, tmp_path):
    options |= {"mixed_precision": "bf16", "max_grad_norm": 0}
    plain = losses(tmp_path, "plain", **options)
    assert losses(tmp_path, "fused", **options, fused_backward_pass=True) == pytest.approx(plain, rel=1e-3)


def test_compiled(options, tmp_path):
    pytest.importorskip("triton")
    options |= {"mixed_precision": "bf16"}
    plain = losses(tmp_path, "plain", **options)
    assert losses(tmp_path, "compiled", **options, torch_compile=True) == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("highvram", [False, True])
def test_highvram_leaves_the_vae_on_the_gpu(options, monkeypatch, highvram):
    places = []

    def watch(run, batches, step, update=loop.update):
        places.append(next(run.bundle.vae.parameters()).device.type)
        return update(run, batches, step)

    monkeypatch.setattr(loop, "update", watch)
    assert train_network(**options, highvram=highvram) == 0
    assert set(places) == {"cuda" if highvram else "cpu"}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(options, tmp_path, stage):
    pytest.importorskip("deepspeed")
    options |= {"max_train_steps": 3, "mixed_precision": "bf16", "logging_dir": tmp_path / "log"}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "1",
        ROOT / "train_network.py", *flags(**options, deepspeed=True, zero_stage=stage),
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = logged(tmp_path / "log", "loss/current")
    single = losses(tmp_path, "single", **{**options, "logging_dir": None})
    assert values == pytest.approx(single, rel=2e-2)
