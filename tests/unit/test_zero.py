"""DeepSpeed's settings, as accelerate takes them; a run with it is in tests/gpu."""

from types import SimpleNamespace

import pytest
import torch

from library.data.options import LoaderOptions
from library.options import OptionError
from library.train.memory_options import DistributedOptions
from library.train.options import OptimizerOptions
from library.train.zero import deepspeed_plugin, keep_whole


def config(**options):
    return SimpleNamespace(
        distributed=DistributedOptions(deepspeed=True, **options),
        optimizer=OptimizerOptions(max_grad_norm=0.5),
        loader=LoaderOptions(train_batch_size=3),
    )


def test_the_settings_reach_deepspeed(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(
        config(
            zero_stage=2,
            offload_optimizer_device="nvme",
            offload_optimizer_nvme_path="/fast",
        )
    )
    settings = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast"}
    assert settings["train_micro_batch_size_per_gpu"] == 3 and settings["gradient_accumulation_steps"] == 1
    assert settings["gradient_clipping"] == 0.5 and settings["zero_force_ds_cpu_optimizer"] is False
    assert "fp16" not in settings


def test_weights_in_16_bits_and_trained_parameters_whole(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(
        config(offload_optimizer_device="cpu", fp16_master_weights_and_gradients=True)
    )  # fmt: skip
    assert plugin.deepspeed_config["fp16"]["fp16_master_weights_and_grads"] is True
    keep_whole(plugin, [torch.nn.Parameter(torch.empty(1000, 500, device="meta"))])
    assert plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] > 500_000


def test_weights_on_the_disk(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(config(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/fast"))
    assert plugin.deepspeed_config["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/fast"}


def test_without_a_launcher_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match="--deepspeed.*accelerate launch"):
        deepspeed_plugin(config())


def test_nothing_without_the_option():
    assert deepspeed_plugin(SimpleNamespace(distributed=DistributedOptions())) is None
