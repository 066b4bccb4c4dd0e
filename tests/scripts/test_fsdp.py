"""FSDP on two processes of the CPU: full weights split, and the same as on one process; files, states, previews."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file

import train_db
from tests.runs import equal_files, logged, run_script, with_fsdp

ONE = {"version": 1, "sharding_strategy": "FULL_SHARD", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
TWO = {"version": 2, "reshard_after_forward": "false", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture
def settings(options):
    """4 updates in 2 epochs of 3 batches: the second update of each has one batch, the others two."""
    return {
        **options, "network_module": None, "network_dim": None, "save_model_as": "safetensors", "resolution": 128,
        "gradient_accumulation_steps": 2, "max_train_steps": 4, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        "enable_bucket": None, "min_bucket_reso": None, "max_bucket_reso": None,
    }  # fmt: skip


def gap(first, second, part=""):
    a, b = load_file(first), load_file(second)
    assert all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a.keys() & b.keys())
    names = [name for name in a.keys() & b.keys() if name.startswith(part)]
    return float(sum((a[name].float() - b[name].float()).square().sum() for name in names)) ** 0.5


def test_two_processes_equal_one_and_go_on_at_their_state(settings, tmp_path, capfd):
    """Losses to 1e-5, weights to 1e-4 of the way they went; a resumed run ends in the same weights bit for bit."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a disc --s 2 --d 1\ntwo discs --s 2 --d 2\nno disc --s 2 --d 3\n", encoding="utf-8")
    plain = {
        **settings, "optimizer_type": "SGDNesterov", "learning_rate": 1e-2, "stop_text_encoder_training": 3,
        "ema_decay": 0.9, "gradient_checkpointing": True, "sample_prompts": prompts, "sample_every_n_steps": 2,
    }  # fmt: skip
    one = {**plain, "train_batch_size": 4, "output_dir": tmp_path / "one", "logging_dir": tmp_path / "log1"}
    assert run_script(train_db, {**one, "sample_at_first": True}) == 0
    two = {**plain, "train_batch_size": 2, "save_state": True}
    more = {"sample_at_first": True, "save_every_n_steps": 2, "logging_dir": tmp_path / "log2"}
    with_fsdp("train_db.py", ONE, tmp_path, **two, **more)

    losses = [logged(tmp_path / log, "loss/current") for log in ("log1", "log2")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)
    base = settings["pretrained_model_name_or_path"]
    for file in ("net.safetensors", "net-ema.safetensors"):
        first, second = tmp_path / "one" / file, tmp_path / "out" / file
        assert load_file(first).keys() == load_file(second).keys()
        for part in ("cond_stage_model", "model.diffusion_model"):
            assert gap(first, base, part) > 0 and gap(first, second, part) < 1e-4 * gap(first, base, part), (file, part)
    for number in range(3):
        shown = [sorted((tmp_path / run / "sample").glob(f"net_*_{number:02d}_*.png")) for run in ("one", "out")]
        assert len(shown[0]) == len(shown[1]) == 3
        for pair in zip(*shown, strict=True):
            first, second = (Image.open(path).convert("RGB") for path in pair)
            assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 2, pair

    state = tmp_path / "out" / "net-step00000002-state"
    again = {**two, "output_dir": tmp_path / "again", "resume": state}
    with_fsdp("train_db.py", ONE, tmp_path, **again)
    for file in ("net.safetensors", "net-ema.safetensors"):
        assert equal_files(tmp_path / "out" / file, tmp_path / "again" / file), file
    assert run_script(train_db, {**again, "output_dir": tmp_path / "alone"}) == 2
    assert "holds the shares of 2 processes, and this run has 1" in capfd.readouterr().err


def test_half_precision_weights_learn_from_all_processes(settings, tmp_path):
    """bfloat16 weights, rounded at random, whole until their backward pass: near one process, not half its data."""
    half = {
        **settings, "mixed_precision": "bf16", "full_bf16": True, "optimizer_type": "SGDNesterov",
        "learning_rate": 0.1, "lr_scheduler": None, "lr_warmup_steps": None,
    }  # fmt: skip
    for name, batch in (("one", 4), ("alone", 2)):  # alone: what one of the two would see without the other
        assert run_script(train_db, {**half, "train_batch_size": batch, "output_dir": tmp_path / name}) == 0
    with_fsdp("train_db.py", TWO, tmp_path, **{**half, "train_batch_size": 2, "output_dir": tmp_path / "two"})
    one, alone, two = (tmp_path / name / "net.safetensors" for name in ("one", "alone", "two"))
    assert 0 < gap(one, two) < 0.2 * gap(one, alone), (gap(one, two), gap(one, alone))
