"""Latents and back, the half-precision policy, and the attention kernels."""

from __future__ import annotations

import inspect
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models import attention, vae
from library.models.options import AttentionOptions
from library.options import OptionError


@pytest.fixture()
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusion().load(ModelOptions(str(tiny_sd1_path)), AttentionOptions(), plan)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_encode_is_mean_plus_std_times_noise(bundle: ModelBundle):
    pictures, noise = images(2, 3, 64, 48), torch.randn(2, 4, 8, 6)
    posterior = bundle.vae.encode(pictures).latent_dist
    expected = posterior.mean + posterior.std * noise
    assert torch.allclose(vae.encode(bundle.vae, pictures, noise), expected, atol=1e-6)
    assert torch.allclose(vae.encode(bundle.vae, pictures, torch.zeros_like(noise)), posterior.mean, atol=1e-6)


@torch.no_grad()
def test_decode_gives_clamped_float32_pictures(bundle: ModelBundle):
    latents = torch.randn(2, 4, 8, 6) * 20
    for dtype in (torch.float32, torch.bfloat16):
        pictures = vae.decode(bundle.vae.to(dtype), latents)
        assert pictures.shape == (2, 3, 64, 48) and pictures.dtype == torch.float32
        assert pictures.min() >= -1 and pictures.max() <= 1


@torch.no_grad()
def test_autocast_does_not_reach_the_vae(bundle: ModelBundle):
    pictures, noise = images(1, 3, 64, 64), torch.zeros(1, 4, 8, 8)
    expected = vae.encode(bundle.vae, pictures, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(bundle.vae, pictures, noise), expected)


@torch.no_grad()
def test_float16_overflow_is_computed_again_in_float32(bundle: ModelBundle, caplog: pytest.LogCaptureFixture):
    model = bundle.vae
    model.encoder.conv_in.weight.mul_(1e5)  # activations beyond 65504; the norm behind it makes up for the scale
    model.encoder.conv_in.bias.zero_()
    pictures, noise = images(1, 3, 64, 64), torch.zeros(1, 4, 8, 8)
    model.half()
    assert not model.encode(pictures.half()).latent_dist.mean.isfinite().all()
    with caplog.at_level(logging.WARNING):
        latents = vae.encode(model, pictures, noise)
    assert latents.isfinite().all() and "overflows in float16" in caplog.text
    assert next(model.parameters()).dtype == torch.float16
    assert torch.allclose(vae.encode(model.float(), pictures, noise), latents, atol=1e-5)


def test_sizes(bundle: ModelBundle):
    assert vae.downscaling(bundle.vae) == 8 and vae.latent_size(bundle.vae, 512) == 64


def test_fingerprint_follows_what_makes_latents(bundle: ModelBundle):
    first = vae.fingerprint(bundle.vae)
    bundle.vae.decoder.conv_out.bias.data += 1
    assert vae.fingerprint(bundle.vae) == first
    bundle.vae.encoder.conv_out.bias.data[0] += 1e-4
    assert vae.fingerprint(bundle.vae) != first
    assert vae.fingerprint(bundle.vae.bfloat16()) != first


# -------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("upcast", [False, True])
def test_slices_equal_whole_attention(upcast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SLICE_ELEMENTS", 2 * 4 * 20 * 3)  # three queries at a time
    query, key, value = (torch.randn(2, 4, count, 16) for count in (50, 20, 20))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(attention.attend_in_slices(query, key, value, upcast), expected, atol=1e-6)


@pytest.mark.parametrize("upcast", [False, True])
def test_sliced_models_equal_plain_ones(upcast: bool, bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SLICE_ELEMENTS", 1000)
    noised, timesteps, context = torch.randn(2, 4, 8, 16), torch.tensor([3, 700]), torch.randn(2, 77, 64)
    latents = torch.randn(2, 4, 4, 4)

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return bundle.unet(noised, timesteps, context).sample, vae.decode(bundle.vae, latents)

    plain = results()
    for module in bundle.unet.modules():
        if hasattr(module, "upcast_attention"):
            module.upcast_attention = upcast
    attention.apply(bundle.unet, bundle.vae, "sliced")
    for sliced, expected in zip(results(), plain, strict=True):
        assert torch.allclose(sliced, expected, atol=1e-5)
    attention.apply(bundle.unet, bundle.vae, "sdpa")
    assert all(isinstance(processor, AttnProcessor2_0) for processor in bundle.unet.attn_processors.values())
    assert all(torch.equal(*pair) for pair in zip(results(), plain, strict=True))


def test_the_plain_kernel_is_that_of_diffusers(bundle: ModelBundle):
    noised, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    predictions = []
    for processor in (AttnProcessor2_0(), attention.Sdpa()):
        bundle.unet.set_attn_processor(processor)
        with torch.no_grad():
            predictions.append(bundle.unet(noised, torch.tensor([3]), context).sample)
    assert torch.equal(*predictions)
    names = list(inspect.signature(attention.Sdpa().__call__).parameters)
    assert names == ["attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb"]


def test_sliced_attention_trains(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SLICE_ELEMENTS", 1000)
    bundle.unet.double()
    noised, context = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 77, 64).double()
    weight = bundle.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.requires_grad_()
    gradients = []
    for kind in ("sdpa", "sliced"):
        attention.apply(bundle.unet, bundle.vae, kind)
        loss = bundle.unet(noised, torch.tensor([3]), context).sample.square().sum()
        gradients += torch.autograd.grad(loss, [weight])
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-9)


def test_gradient_checkpointing_of_the_unet(bundle: ModelBundle):
    noised, timesteps, context = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 77, 64)
    context.requires_grad_()
    gradients = []
    for enable in (bundle.unet.disable_gradient_checkpointing, bundle.unet.enable_gradient_checkpointing):
        enable()
        for training in (False, True):
            loss = bundle.unet.train(training)(noised, timesteps, context).sample.square().sum()
            gradients += torch.autograd.grad(loss, [context])
    assert all(torch.allclose(gradient, gradients[0], atol=1e-6) for gradient in gradients)


def test_xformers_is_switched_on_in_both_models(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    """By diffusers, which asks for a GPU; where there is none, its refusal becomes a sentence."""
    monkeypatch.setitem(sys.modules, "xformers.ops", ModuleType("xformers.ops"))
    switched_on: list[object] = []
    for model in (bundle.unet, bundle.vae):
        name = "enable_xformers_memory_efficient_attention"
        monkeypatch.setattr(type(model), name, lambda self: switched_on.append(self))
    attention.apply(bundle.unet, bundle.vae, AttentionOptions(xformers=True).kind)
    assert switched_on == [bundle.unet, bundle.vae]

    def refuse(self: object) -> None:
        raise ValueError("only available for GPU")

    monkeypatch.setattr(type(bundle.vae), "enable_xformers_memory_efficient_attention", refuse)
    with pytest.raises(OptionError, match="--xformers: xformers does not run here .*GPU.*; use --sdpa"):
        attention.apply(bundle.unet, bundle.vae, "xformers")


def test_missing_xformers_names_the_way_out(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("library.models.options.is_installed", lambda name: False)
    with pytest.raises(OptionError, match="--xformers: the package xformers is not installed; .*use --sdpa"):
        AttentionOptions(xformers=True).check_package()
    AttentionOptions(xformers=True, mem_eff_attn=True).check_package()
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # as if it were broken
    with pytest.raises(OptionError, match="--xformers: the package xformers can't be loaded .*; use --sdpa"):
        attention.apply(bundle.unet, bundle.vae, "xformers")


@pytest.mark.parametrize(
    ("asked", "kind", "note"),
    [
        (("mem_eff_attn", "sdpa"), "sliced", "--sdpa without effect: --mem_eff_attn goes first"),
        (("xformers", "sdpa"), "xformers", "--sdpa without effect: --xformers goes first"),
        (
            ("mem_eff_attn", "xformers", "sdpa"),
            "sliced",
            "--xformers and --sdpa without effect: --mem_eff_attn goes first",
        ),
        (("sdpa",), "sdpa", None),
        ((), "sdpa", None),
    ],
)
def test_of_several_kinds_the_first_is_used(asked, kind, note):
    options = AttentionOptions(**dict.fromkeys(asked, True))
    assert options.kind == kind and options.notes() == ([note] if note else [])
