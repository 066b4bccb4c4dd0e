"""Full weights on two processes: accumulation, schedule, a text encoder that stops, states. See also the contracts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import train_db
from tests.runs import equal_files, in_two_processes, logged, run_script


@pytest.fixture
def settings(options, tmp_path):
    """4 updates in 2 epochs of 3 batches: the second update of each has one batch, the others two."""
    return {
        **options, "network_module": None, "network_dim": None, "save_model_as": "safetensors", "resolution": 128,
        "gradient_accumulation_steps": 2, "max_train_steps": 4, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        "optimizer_type": "SGDNesterov", "stop_text_encoder_training": 3, "enable_bucket": None,
        "min_bucket_reso": None, "max_bucket_reso": None,
    }  # fmt: skip


def test_accumulated_gradients_and_schedule_are_those_of_one_process(settings, tmp_path):
    one = {**settings, "train_batch_size": 4, "output_dir": tmp_path / "one", "logging_dir": tmp_path / "log1"}
    assert run_script(train_db, one) == 0
    two = {**settings, "train_batch_size": 2, "logging_dir": tmp_path / "log2"}
    in_two_processes("train_db.py", **two, save_state=True, save_every_n_steps=2)
    for tag, precision in (("loss/current", 1e-5), ("lr", 0.0)):
        values = [logged(tmp_path / log, tag) for log in ("log1", "log2")]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], abs=precision, rel=0), tag
    first, second = (load_file(tmp_path / name / "net.safetensors") for name in ("one", "out"))
    base = load_file(settings["pretrained_model_name_or_path"])
    length = sum((first[name] - base.get(name, torch.zeros(()))).float().square().sum() for name in first).sqrt()
    gap = sum((first[name] - second[name]).float().square().sum() for name in first).sqrt()
    assert length > 0 and gap < 1e-4 * length, "the same training up to rounding"

    again = {**two, "logging_dir": None, "output_dir": tmp_path / "again"}
    in_two_processes("train_db.py", **again, save_state=True, resume=tmp_path / "out" / "net-step00000002-state")
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


def test_half_precision_weights_learn_from_all_processes(settings, tmp_path):
    """Each of two processes with one picture must not train on its own from the second update on."""
    half = {
        **settings, "mixed_precision": "bf16", "full_bf16": True, "stop_text_encoder_training": None,
        "learning_rate": 0.1, "lr_scheduler": None, "lr_warmup_steps": None,
    }  # fmt: skip
    for name, batch in (("one", 4), ("alone", 2)):  # alone: what one of the two would see without the other
        assert run_script(train_db, {**half, "train_batch_size": batch, "output_dir": tmp_path / name}) == 0
    in_two_processes("train_db.py", **{**half, "train_batch_size": 2, "output_dir": tmp_path / "two"})
    one, alone, two = (load_file(tmp_path / name / "net.safetensors") for name in ("one", "alone", "two"))

    def gap(other):
        return sum((one[name].float() - other[name].float()).square().sum() for name in one).sqrt()

    assert 0 < gap(two) < 0.2 * gap(alone), (gap(two), gap(alone))
