"""The estimate of memory against the same step computed with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from library.data.options import CacheOptions
from library.data.text_cache_options import TextCacheOptions
from library.families.base import LoadPlan
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from library.targets.network import NetworkTarget
from library.targets.options import NetworkOptions
from library.train import placement
from library.train.course_options import AverageOptions
from library.train.memory_estimate import (
    AliveBytes,
    StepShape,
    _CountedAttention,
    _meta_batch,
    estimate,
    known_parts,
    step_bytes,
)
from library.train.memory_options import MemoryOptions
from library.train.options import TrainingOptions
from library.train.placement import StepModule

FAMILY = StableDiffusion()


@dataclass
class Settings:
    """The groups of a RunConfig that memory depends on."""

    text: TextOptions = TextOptions()
    cache: CacheOptions = CacheOptions(cache_latents=True)
    training: TrainingOptions = TrainingOptions()
    memory: MemoryOptions = MemoryOptions()
    average: AverageOptions = AverageOptions()
    text_cache: TextCacheOptions = TextCacheOptions()


def with_network(bundle, *, checkpointing=False, **network) -> NetworkTarget:
    if checkpointing:
        placement.enable_gradient_checkpointing(bundle)
    target = NetworkTarget(NetworkOptions(**{"network_module": "networks.lora", "network_dim": 4, **network}))
    target.setup(FAMILY, bundle, gradient_checkpointing=checkpointing)
    return target


def outline(path, dtype=torch.float32):
    plan = LoadPlan(dtype, dtype, dtype, torch.device("cpu"))
    return FAMILY.outline(ModelOptions(str(path)), plan)


def loaded(path, dtype=torch.float32):
    return FAMILY.load(ModelOptions(str(path)), AttentionOptions(), LoadPlan(dtype, dtype, dtype, torch.device("cpu")))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_an_outline_is_the_model_without_weights(kind, tiny_sd1_path, tiny_sd2_path):
    path = {"sd1": tiny_sd1_path, "sd2": tiny_sd2_path}[kind]
    empty, full = outline(path, torch.bfloat16), loaded(path, torch.bfloat16)
    assert (empty.source, empty.tokenizers[0].pad_token) == (full.source, full.tokenizers[0].pad_token)
    for part, other in (
        (empty.unet, full.unet),
        (empty.text_encoders[0], full.text_encoders[0]),
        (empty.vae, full.vae),
    ):
        found = {name: (p.shape, p.dtype, p.requires_grad) for name, p in part.named_parameters()}
        assert found == {name: (p.shape, p.dtype, p.requires_grad) for name, p in other.named_parameters()}
        assert all(parameter.is_meta for parameter in part.parameters())


@pytest.mark.parametrize(
    "network",
    [{}, {"network_train_unet_only": True}, {"network_args": ("conv_dim=2", "block_lr_zero_threshold=0.1")}],
)
def test_trained_parameters_are_those_of_the_run(tiny_sd1_path, network):
    empty, full = outline(tiny_sd1_path), loaded(tiny_sd1_path)
    planned, real = with_network(empty, **network), with_network(full, **network)
    found = [(group.name, len(group.parameters), sum(p.numel() for p in group.parameters), group.lr)
             for group in planned.param_groups(1e-3)]  # fmt: skip
    assert found == [(group.name, len(group.parameters), sum(p.numel() for p in group.parameters), group.lr)
                     for group in real.param_groups(1e-3)]  # fmt: skip
    parts = {part.name: part.size for part in known_parts(Settings(), empty, planned.param_groups(1e-3), 8.0)}
    count = sum(numbers for _, _, numbers, _ in found)
    assert parts["trained parameters"] == parts["gradients"] == 4 * count and parts["optimizer"] == 8 * count
    assert parts["U-Net weights"] == sum(p.numel() * 4 for p in full.unet.parameters())
    assert "VAE weights" not in parts, "it leaves the device once latents are cached"


def measured(bundle, target, shape: StepShape) -> int:
    """As the estimate counts, in a step with real numbers."""
    unet: Any = bundle.unet
    unet.set_attn_processor(_CountedAttention())
    step = StepModule(FAMILY, bundle, target, TextOptions())
    batch = _meta_batch(shape, 1)
    noise_BCHW = torch.randn(batch.noise_BCHW.shape)
    batch = placement.replace(
        batch, noise_BCHW=noise_BCHW, timesteps_B=torch.ones_like(batch.timesteps_B, device="cpu"),
        token_ids=tuple(torch.ones_like(ids, device="cpu") for ids in batch.token_ids),
    )  # fmt: skip
    for parameter in step.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = [*step.parameters(), *step.buffers(), *(p.grad for p in step.parameters() if p.grad is not None)]
    noised_BCHW = noise_BCHW.to(next(unet.parameters()).dtype)
    with AliveBytes(known) as alive:
        F.mse_loss(step(noised_BCHW, batch, target.trains_text(0)).float(), noise_BCHW).backward()
    return alive.most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_step(tiny_sd1_path, checkpointing):
    shape = StepShape(2, (128, 96), 1)
    empty, full = outline(tiny_sd1_path), loaded(tiny_sd1_path)
    planned, real = (with_network(bundle, checkpointing=checkpointing) for bundle in (empty, full))
    for target in (planned, real):
        target.param_groups(1e-3)
    assert step_bytes(Settings(), FAMILY, empty, planned, shape) == pytest.approx(measured(full, real, shape), rel=0.05)


def test_what_makes_a_step_larger(tiny_sd1_path):
    def activations(batch_size=1, size=(64, 64), dtype=torch.float32, **network) -> int:
        bundle = outline(tiny_sd1_path, dtype)
        target = with_network(bundle, **network)
        target.param_groups(1e-3)
        return step_bytes(Settings(), FAMILY, bundle, target, StepShape(batch_size, size, 1))

    one = activations()
    assert activations(4) == pytest.approx(4 * one, rel=0.1)
    assert activations(size=(128, 64)) == pytest.approx(2 * one, rel=0.3)
    assert activations(4, dtype=torch.bfloat16) < 0.65 * activations(4)
    assert activations(4, (128, 128), checkpointing=True) < 0.6 * activations(4, (128, 128))
    assert activations(network_train_unet_only=True) < one
    assert activations(network_module="networks.lora_fa") < 0.9 * one, "inputs are not kept for the network"


def test_the_whole_estimate(tiny_sd1_path):
    config = Settings(cache=CacheOptions(), average=AverageOptions(ema_decay=0.9))
    bundle = outline(tiny_sd1_path)
    target = with_network(bundle)
    parts = known_parts(config, bundle, target.param_groups(1e-3), None)
    found = estimate(config, FAMILY, bundle, target, parts, StepShape(2, (64, 64), 1), on_gpu=True)
    names = [part.name for part in found.parts]
    assert names[:3] == ["U-Net weights", "text encoder weights", "VAE weights"] and "moving average" in names
    assert found.is_complete and found.total == sum(part.size for part in found.parts) and found.caching is None


def test_what_a_network_has_frozen_takes_memory_too(tiny_sd1_path):
    bundle = outline(tiny_sd1_path)
    target = with_network(bundle, network_module="networks.lora_fa")
    groups = target.param_groups(1e-3)
    parts = {part.name: part.size for part in known_parts(Settings(), bundle, groups, 8.0, target.trained_module())}
    total = sum(parameter.numel() for parameter in target.trained_module().parameters())
    assert parts["the network's frozen weights"] + parts["trained parameters"] == 4 * total
    assert parts["gradients"] == parts["trained parameters"] < 2.4 * total


def test_a_network_that_needs_values_leaves_activations_out(tiny_sd1_path):
    bundle = outline(tiny_sd1_path)
    target = with_network(bundle)
    parts = known_parts(Settings(), bundle, target.param_groups(1e-3), 8.0)
    bundle.unet.conv_in.register_forward_hook(lambda module, inputs, output: output * float(output.mean()))
    found = estimate(Settings(), FAMILY, bundle, target, parts, StepShape(1, (64, 64), 1), on_gpu=False)
    assert not found.is_complete and [part.name for part in found.parts] == [part.name for part in parts]
