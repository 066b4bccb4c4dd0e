"""Training with DeepSpeed on two processes of the CPU: the same as without, whole files, states. Needs deepspeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_db
import train_network
from tests.runs import equal_files, logged, run_script, with_deepspeed

pytest.importorskip("deepspeed")

SCRIPTS = {"train_db": train_db, "train_network": train_network}
OF_SCRIPT = {
    "train_db": {"save_model_as": "safetensors", "learning_rate": 1e-3, "network_module": None, "network_dim": None},
    "train_network": {"learning_rate": 1e-2},
}


@pytest.fixture
def settings(options, tmp_path):
    def of(script: str, **more):
        return {
            **options, **OF_SCRIPT[script], "resolution": 128, "optimizer_type": "AdamW", "lr_scheduler": "cosine",
            "max_train_steps": 4, "train_batch_size": 1, "logging_dir": tmp_path / "log", **more,
        }  # fmt: skip

    return of


def succeeds(script: str, **options) -> None:
    done = with_deepspeed(f"{script}.py", **options)
    assert done.returncode == 0, done.stderr


def distance(first: Path, second: Path) -> float:
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    return float(sum((a[name].float() - b[name].float()).square().sum() for name in a).sqrt())


@pytest.mark.parametrize(("script", "stage"), [("train_db", 2), ("train_db", 3), ("train_network", 3)])
def test_two_processes_equal_one_and_go_on_at_their_state(script, stage, settings, tmp_path):
    """Losses to 1e-5, weights to rounding; a resumed run ends in the same weights bit for bit."""
    plain = {"optimizer_type": "SGDNesterov", "learning_rate": 1e-3 if script == "train_db" else 0.1}
    one = settings(script, **plain, train_batch_size=2, logging_dir=tmp_path / "log1", output_dir=tmp_path / "one")
    assert run_script(SCRIPTS[script], one) == 0
    succeeds(script, **settings(script, **plain, zero_stage=stage, output_dir=tmp_path / "two"))
    assert logged(tmp_path / "log", "loss/current") == pytest.approx(
        logged(tmp_path / "log1", "loss/current"), abs=1e-5
    )
    assert distance(tmp_path / "one" / "net.safetensors", tmp_path / "two" / "net.safetensors") < 1e-5

    whole = settings(script, zero_stage=stage, save_state=True, save_every_n_steps=2, logging_dir=None)
    if stage != 3:
        whole |= {"ema_decay": 0.9}
    succeeds(script, **whole)
    state = tmp_path / "out" / "net-step00000002-state"
    assert (state / "trained.safetensors").exists() == (stage != 3)
    succeeds(script, **{**whole, "output_dir": tmp_path / "again", "resume": state})
    files = sorted((tmp_path / "out").glob("net*.safetensors"))
    for file in (file for file in files if "step" not in file.name):
        assert equal_files(file, tmp_path / "again" / file.name), file.name

    done = with_deepspeed(f"{script}.py", 1, **{**whole, "output_dir": tmp_path / "one_only", "resume": state})
    assert done.returncode != 0 and "the shares of 2 processes" in done.stderr and "this run has 1" in done.stderr


def test_half_precision_goes_on_with_its_masters(settings, tmp_path):
    """bfloat16 weights have float32 masters in the state: without them, small steps would be lost on resume."""
    half = settings("train_db", zero_stage=1, mixed_precision="bf16", save_state=True, save_every_n_steps=2)
    half |= {"learning_rate": 1e-5, "logging_dir": None}
    succeeds("train_db", **half)
    state = tmp_path / "out" / "net-step00000002-state"
    succeeds("train_db", **{**half, "output_dir": tmp_path / "again", "resume": state})
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")
    assert torch.load(state / "optimizer.pt", weights_only=True).keys() >= {"lr_scheduler"}


def test_weights_that_are_left_out_are_refused(settings):
    done = with_deepspeed("train_db.py", **settings("train_db", stop_text_encoder_training=1))
    assert done.returncode != 0 and "--deepspeed: updates every weight in every step" in done.stderr
