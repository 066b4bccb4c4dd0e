"""What accelerate's FSDP configuration asks for; runs with it are in tests/scripts/test_fsdp.py."""

import os
from types import SimpleNamespace

import pytest

from library.options import OptionError
from library.train.fsdp_settings import UNITS, check_split, notes_on, split_settings, take_over, wanted
from library.train.memory_options import DistributedOptions, MemoryOptions
from library.train.options import TrainingOptions

ON = {"ACCELERATE_USE_FSDP": "true"}


def config(*, distributed=None, memory=None, mixed_precision="no"):
    return SimpleNamespace(
        distributed=DistributedOptions(**(distributed or {})),
        memory=MemoryOptions(**(memory or {})),
        training=TrainingOptions(mixed_precision=mixed_precision),
    )


def test_nothing_without_the_switch():
    assert split_settings({}) is None and split_settings({"ACCELERATE_USE_FSDP": "false"}) is None


@pytest.mark.parametrize(
    ("environment", "frees"),
    [
        ({}, True),
        ({"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, True),
        ({"FSDP_SHARDING_STRATEGY": "1"}, True),
        ({"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, False),
        ({"FSDP_SHARDING_STRATEGY": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, False),
        ({"FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, True),  # of version 1
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, True),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, False),
    ],
)
def test_what_is_freed_is_read_as_the_version_has_it(environment, frees):
    settings = split_settings({**ON, **environment})
    assert settings is not None and settings.frees_after_forward == frees and settings.units == UNITS


def test_units_by_name():
    settings = split_settings({**ON, "FSDP_TRANSFORMER_CLS_TO_WRAP": "UpBlock2D, CLIPEncoderLayer"})
    assert settings is not None and settings.units == {"UpBlock2D", "CLIPEncoderLayer"} and settings.has_own_units


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, ["--fsdp_offload_params", "--offload_optimizer_device"]),
        ({"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, ["--fsdp_sharding_strategy", "NO_SHARD", "--multi_gpu"]),
        ({"FSDP_SHARDING_STRATEGY": "4"}, ["--fsdp_sharding_strategy", "4", "FULL_SHARD"]),
        ({"FSDP_IGNORED_MODULES": "unet.*"}, ["FSDP_IGNORED_MODULES"]),
    ],
)
def test_what_is_not_done_is_refused(environment, words):
    with pytest.raises(OptionError) as error:
        split_settings({**ON, **environment})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distributed": {"deepspeed": True}}, ["--deepspeed", "FSDP"]),
        ({"distributed": {"ddp_static_graph": True}}, ["--ddp_static_graph"]),
        ({"distributed": {"ddp_gradient_as_bucket_view": True}}, ["--ddp_gradient_as_bucket_view"]),
        ({"memory": {"torch_compile": True}}, ["--torch_compile"]),
        ({"memory": {"cpu_offload_checkpointing": True}}, ["--cpu_offload_checkpointing"]),
        ({"memory": {"fused_backward_pass": True}}, ["--fused_backward_pass"]),
        ({"mixed_precision": "fp16"}, ["--mixed_precision", "bf16"]),
    ],
)
def test_what_does_not_go_together(settings, words):
    with pytest.raises(OptionError) as error:
        check_split(config(**settings))
    assert all(word in str(error.value) for word in words), error.value


def test_what_goes_together():
    check_split(config(mixed_precision="bf16"))


def test_settings_without_effect_are_named():
    notes = notes_on({"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_AUTO_WRAP_POLICY": "size_based_wrap"})
    assert len(notes) == 2 and "--gradient_checkpointing" in notes[0] and "SIZE_BASED_WRAP" in notes[1]
    assert notes_on({"FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}) == []


def test_what_splits(monkeypatch, caplog):
    """Whole models on several processes; anything else trains as without FSDP, and a line says so."""
    whole, network = SimpleNamespace(trains_whole=frozenset({"unet"})), SimpleNamespace(trains_whole=frozenset())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wanted(config(), whole) is not None and not caplog.text
    assert wanted(config(memory={"torch_compile": True}), network) is None
    assert "FSDP has no effect: a network is not split" in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert wanted(config(), whole) is None and "there is one process" in caplog.text
    take_over()
    assert os.environ["ACCELERATE_USE_FSDP"] == "false" and wanted(config(), whole) is None
