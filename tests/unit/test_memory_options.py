"""Rules of the options of precision, memory and several devices."""

import pytest

from library.options import OptionError, build
from library.train.memory_options import DistributedOptions, MemoryOptions, PrecisionOptions
from library.train.options import OptimizerOptions, TrainingOptions
from library.train.output_options import SavingOptions

FUSED = {"fused_backward_pass": True}
ON_DISK = {"deepspeed": True, "offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/x"}


def check(
    precision=None,
    memory=None,
    distributed=None,
    training=None,
    optimizer=None,
    saving=None,
    previews=False,
    average=False,
):
    """All notes; raises OptionError."""
    groups = [
        build(group, values or {})
        for group, values in (
            (PrecisionOptions, precision), (MemoryOptions, memory), (DistributedOptions, distributed),
            (TrainingOptions, training), (OptimizerOptions, optimizer),
            (SavingOptions, {"output_dir": "out", **(saving or {})}),
        )
    ]  # fmt: skip
    precision, memory, distributed, training, optimizer, saving = groups
    precision.check_beside(training)
    notes = precision.notes() + memory.check_beside(training, optimizer) + distributed.notes()
    distributed.check_beside(training, saving, memory, precision)
    return notes + distributed.check_engine(optimizer, has_previews=previews, has_average=average)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": {"full_fp16": True, "full_bf16": True}}, ["--full_fp16", "--full_bf16"]),
        ({"precision": {"full_fp16": True}}, ["--full_fp16", "--mixed_precision fp16", "not no"]),
        ({"precision": {"full_bf16": True}, "training": {"mixed_precision": "fp16"}}, ["--full_bf16", "not fp16"]),
        ({"precision": {"fp8_base": True}}, ["--fp8_base", "--mixed_precision"]),
        ({"precision": {"fp8_base_unet": True}}, ["--fp8_base_unet", "--mixed_precision"]),
        ({"memory": FUSED, "training": {"gradient_accumulation_steps": 2}}, ["--fused_backward_pass", "steps 2"]),
        ({"memory": FUSED, "training": {"mixed_precision": "fp16"}}, ["--fused_backward_pass", "fp16"]),
        ({"memory": FUSED, "optimizer": {"optimizer_type": "prodigy"}}, ["--fused_backward_pass", "prodigy"]),
        ({"memory": FUSED, "optimizer": {"optimizer_type": "SGDScheduleFree"}}, ["SGDScheduleFree"]),
        ({"memory": FUSED, "distributed": {"deepspeed": True}}, ["--fused_backward_pass", "--deepspeed"]),
        ({"memory": {"dynamo_backend": "indictor"}}, ["--dynamo_backend", "inductor?"]),
        ({"distributed": {"ddp_timeout": 0}}, ["--ddp_timeout", "0"]),
        ({"distributed": {"zero_stage": 4}}, ["--zero_stage", "4"]),
        ({"distributed": {"deepspeed": True, "zero_stage": 1, "offload_optimizer_device": "cpu"}},
         ["--offload_optimizer_device", "--zero_stage 2 or 3"]),
        ({"distributed": {"deepspeed": True, "offload_param_device": "cpu"}}, ["--offload_param_device", "stage 3"]),
        ({"distributed": {"deepspeed": True, "offload_optimizer_device": "nvme"}}, ["--offload_optimizer_nvme_path"]),
        ({"distributed": {"deepspeed": True, "fp16_master_weights_and_gradients": True}},
         ["--fp16_master_weights_and_gradients", "--offload_optimizer_device cpu"]),
        ({"distributed": {"deepspeed": True, "fp16_master_weights_and_gradients": True,
                          "offload_optimizer_device": "cpu"}}, ["--mixed_precision fp16"]),
        ({"distributed": ON_DISK, "saving": {"save_state": True}}, ["--save_state", "nvme", "use cpu"]),
        ({"distributed": ON_DISK, "saving": {"resume": "x"}}, ["--resume", "nvme"]),
        ({"distributed": {"deepspeed": True}, "optimizer": {"optimizer_type": "prodigy"}}, ["prodigy looks at all"]),
        ({"distributed": {"deepspeed": True}, "optimizer": {"optimizer_type": "SGDScheduleFree"}},
         ["SGDScheduleFree gives out an average", "--deepspeed"]),
        ({"distributed": {"deepspeed": True, "zero_stage": 3}, "previews": True}, ["--sample_at_first", "stage 2"]),
        ({"distributed": {"deepspeed": True, "zero_stage": 3}, "average": True}, ["--ema_decay", "stage 2"]),
        ({"distributed": {"deepspeed": True}, "precision": {"fp8_base": True}, "training": {"mixed_precision": "bf16"}},
         ["--fp8_base", "--deepspeed"]),
    ],
)  # fmt: skip
def test_contradictions(settings, words):
    with pytest.raises(OptionError) as error:
        check(**settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": FUSED}, ["--max_grad_norm 1", "each gradient is clipped by its own norm"]),
        ({"memory": {"cpu_offload_checkpointing": True}}, ["no effect without --gradient_checkpointing"]),
        ({"memory": {"dynamo_backend": "eager"}}, ["--dynamo_backend has no effect without --torch_compile"]),
        ({"distributed": {"zero_stage": 3}}, ["--zero_stage has no effect without --deepspeed"]),
        ({"distributed": {"zero3_init_flag": True}}, ["--zero3_init_flag has no effect"]),
        ({"distributed": {"deepspeed": True, "ddp_static_graph": True}}, ["--ddp_static_graph has no effect beside"]),
        ({"distributed": {"deepspeed": True, "zero3_save_16bit_model": True}}, ["--zero3_save_16bit_model has no eff"]),
        ({"distributed": {"deepspeed": True, "offload_param_nvme_path": "/x"}}, ["--offload_param_nvme_path has"]),
        ({"distributed": {"deepspeed": True}, "optimizer": {"optimizer_type": "AdaFactor"}}, ["AdaFactor", "flat"]),
        ({"precision": {"fp8_base": True, "fp8_base_unet": True}, "training": {"mixed_precision": "bf16"}},
         ["only the U-Net"]),
    ],
)  # fmt: skip
def test_settings_without_effect_are_named(settings, words):
    (note,) = check(**settings)
    assert all(word in note for word in words), note


def test_what_goes_together():
    half = {"mixed_precision": "bf16"}
    assert not check(precision={"full_bf16": True, "fp8_base": True}, training=half)
    assert not check(memory=FUSED, optimizer={"max_grad_norm": 0.0, "optimizer_type": "AdaFactor"})
    offload = {"cpu_offload_checkpointing": True, "torch_compile": True, "dynamo_backend": "aot_eager"}
    assert not check(memory=offload, training={"gradient_checkpointing": True})
    nvme = {"deepspeed": True, "zero_stage": 3, "offload_param_device": "nvme", "offload_param_nvme_path": "/x"}
    assert not check(distributed=nvme)


@pytest.mark.parametrize("both", [True, False])
def test_which_parts_are_kept_in_8_bits(both):
    options = PrecisionOptions(fp8_base=True, fp8_base_unet=both)
    assert options.stores_unet_in_8_bits and options.stores_text_in_8_bits is not both
