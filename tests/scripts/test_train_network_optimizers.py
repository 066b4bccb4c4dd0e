"""train_network.py with each kind of optimizer and schedule: resumed bit for bit, logged, recorded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import equal_files, logged, metadata_of, train_network

ADAPTING = {"learning_rate": 1.0, "lr_scheduler": "cosine", "lr_warmup_steps": 1}


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("AdamW8bit", {}),
        ("Lion8bit", {}),
        ("AdEMAMix8bit", {}),
        ("Lion", {}),
        ("SGDNesterov", {}),
        ("AdaFactor", {}),
        ("DAdaptAdan", ADAPTING),
        ("Prodigy", ADAPTING),
        ("RAdamScheduleFree", {"learning_rate": 1e-2, "optimizer_args": ["silent_sgd_phase=False"]}),
        ("AdamWScheduleFree", {"learning_rate": 1e-2}),
        ("AdaFactor", {"fused_backward_pass": True, "mixed_precision": "bf16", "full_bf16": True}),
        ("AdamW8bit", {"mixed_precision": "bf16", "full_bf16": True}),
        ("AdamWScheduleFree", {"mixed_precision": "bf16", "full_bf16": True, "learning_rate": 1e-2}),
    ],
)
def test_resume_with_each_optimizer(options, tmp_path, optimizer, settings):
    options |= {"optimizer_type": optimizer, "max_train_steps": 4, "cache_latents": True, "network_dim": 32, **settings}
    assert train_network(**options, save_every_n_steps=2, save_state=True) == 0
    state = tmp_path / "out" / "net-step00000002-state"
    assert train_network(**{**options, "output_dir": tmp_path / "again"}, resume=state) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name), "it has learned"


@pytest.mark.parametrize("optimizer", ["SGDNesterov", "AdamW", "AdaFactor"])
def test_parameters_that_some_steps_leave_out(options, tmp_path, optimizer):
    """Some have moments from the start, others later."""
    options |= {"network_args": ["module_dropout=0.7"], "optimizer_type": optimizer, "max_train_steps": 4}
    assert train_network(**options) == 0
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


def test_a_schedule_free_optimizer_saves_its_average_and_trains_on(options, tmp_path):
    options |= {"optimizer_type": "AdamWScheduleFree", "learning_rate": 1e-2}
    assert train_network(**options, save_every_n_steps=1, save_state=True) == 0
    trained = load_file(tmp_path / "out" / "net-state" / "trained.safetensors")
    given_out = load_file(tmp_path / "out" / "net.safetensors")
    assert any(not torch.equal(trained[name], given_out[name]) for name in given_out)
    assert train_network(**{**options, "output_dir": tmp_path / "quiet"}) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "quiet" / "net.safetensors")


def test_the_true_rate_of_an_adapting_optimizer_is_logged(options, tmp_path, capfd):
    options |= {"optimizer_type": "Prodigy", "learning_rate": 0.05, "lr_scheduler": "linear"}
    assert train_network(**options, logging_dir=tmp_path / "log") == 0
    rates, true_rates = logged(tmp_path / "log", "lr/unet"), logged(tmp_path / "log", "lr/d*lr")
    assert rates == pytest.approx([0.05, 0.05 * 2 / 3, 0.05 / 3])
    assert true_rates[0] == pytest.approx(1e-6 * 0.05) and all(0 < rate < 1e-3 for rate in true_rates)
    assert "--learning_rate: 0.05 is small for Prodigy" in capfd.readouterr().err


def test_with_many_groups_each_has_its_rate(options, tmp_path):
    options |= {"optimizer_type": "Prodigy", "learning_rate": 1.0, "network_args": ["down_lr_weight=1,1,1"]}
    assert train_network(**options, logging_dir=tmp_path / "log") == 0
    assert logged(tmp_path / "log", "lr/textencoder") == [1.0] * 3
    assert logged(tmp_path / "log", "lr/group2") == [1.0] * 3
    assert logged(tmp_path / "log", "lr/d*lr/group2")[0] == pytest.approx(1e-6)


def test_adafactor_chooses_its_rate_and_says_so(options, tmp_path, capfd):
    options |= {"optimizer_type": "adafactor", "unet_lr": 1e-4, "lr_scheduler": "cosine"}
    assert train_network(**options, logging_dir=tmp_path / "log") == 0
    metadata = metadata_of(tmp_path / "out" / "net.safetensors")
    assert [metadata[f"ss_{name}"] for name in ("learning_rate", "unet_lr", "text_encoder_lr")] == ["None"] * 3
    assert metadata["ss_lr_scheduler"] == "adafactor:0.001"
    assert metadata["ss_optimizer"] == "transformers.optimization.Adafactor(relative_step=True)"
    assert all(0 < rate <= 0.01 for rate in logged(tmp_path / "log", "lr/unet"))
    messages = capfd.readouterr().err
    assert "--unet_lr has no effect" in messages and "--lr_scheduler and --lr_warmup_steps have no effect" in messages


def test_with_more_than_two_groups_rates_go_by_number(options, tmp_path):
    options |= {"network_args": ["loraplus_lr_ratio=4"], "max_train_steps": 1, "logging_dir": tmp_path / "log"}
    assert train_network(**options) == 0
    found = [logged(tmp_path / "log", f"lr/{name}") for name in ("textencoder", "group1", "group2", "group3")]
    assert found == [pytest.approx([rate]) for rate in (1e-3, 4e-3, 1e-3, 4e-3)]
    with pytest.raises(KeyError):
        logged(tmp_path / "log", "lr/unet")


@pytest.mark.parametrize("length", [{"max_train_steps": 3}, {"max_train_steps": None, "max_train_epochs": 1}])
def test_a_warm_up_longer_than_the_run_trains_with_one_warning(options, tmp_path, length, capfd):
    options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 100, "logging_dir": tmp_path / "log", **length}
    assert train_network(**options) == 0
    assert capfd.readouterr().err.count("ends within its warm-up") == 1
    rates = logged(tmp_path / "log", "lr/unet")
    assert rates == pytest.approx([1e-3 * step / 100 for step in range(len(rates))])


def test_a_share_of_the_run_as_warm_up_from_a_file(options, tmp_path):
    (tmp_path / "run.toml").write_text('lr_scheduler = "warmup_stable_decay"\nlr_warmup_steps = 0.5\n'
                                       'lr_decay_steps = "25%"\nlr_scheduler_min_lr_ratio = 0.0\n')  # fmt: skip
    options |= {"config_file": tmp_path / "run.toml", "max_train_steps": 8, "logging_dir": tmp_path / "log"}
    assert train_network(**options) == 0
    steps = [0, 0.25, 0.5, 0.75, 1, 1, 1, 0.5]
    assert logged(tmp_path / "log", "lr/unet") == pytest.approx([1e-3 * share for share in steps], abs=1e-9)
    assert metadata_of(tmp_path / "out" / "net.safetensors")["ss_lr_warmup_steps"] == "0.5"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer_type": "Prodigee"}, ["--optimizer_type", "Prodigy?"]),
        ({"optimizer_type": "Prodigy", "learning_rate": 1, "unet_lr": 0.5}, ["Prodigy", "different rates"]),
        ({"optimizer_type": "DAdaptSGD", "lr_warmup_steps": 1}, ["--lr_warmup_steps", "DAdaptSGD"]),
        ({"lr_scheduler": "adafactor"}, ["--lr_scheduler", "AdaFactor's own"]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": "101%"}, ["--lr_warmup_steps", "101%", "10%"]),
        ({"full_bf16": True}, ["--full_bf16", "--mixed_precision bf16"]),
        ({"fp8_base": True}, ["--fp8_base", "--mixed_precision"]),
        ({"fused_backward_pass": True, "gradient_accumulation_steps": 2}, ["--fused_backward_pass", "steps 2"]),
        ({"torch_compile": True, "dynamo_backend": "ofi"}, ["--dynamo_backend", "ofi", "inductor"]),
        ({"deepspeed": True}, ["--deepspeed"]),
    ],
)
def test_mistakes_are_one_sentence(options, capfd, change, words):
    assert train_network(**{**options, **change}) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(word in last for word in words), last
