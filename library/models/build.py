"""Modules from sizes, without weights: built on the meta device, then filled with each tensor copied once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from library.checkpoints.architecture import (
    SIZE_WIDTH,
    ControlNetArchitecture,
    TextArchitecture,
    UNetArchitecture,
    VaeArchitecture,
)
from library.models.text_encoder import ProjectedTextEncoder, TextEncoder

VAE_SCALE = 0.18215
SDXL_VAE_SCALE = 0.13025


def build_unet(architecture: UNetArchitecture, *, sample_size: int = 64) -> UNet2DConditionModel:
    """diffusers' U-Net of these sizes; `sample_size` in latent pixels is only recorded."""
    has_attention = [depth > 0 for depth in architecture.transformer_depths]
    return UNet2DConditionModel(
        sample_size=sample_size,
        out_channels=architecture.out_channels,
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
        **_sizes_on_the_way_down(architecture),
    )


def build_control_net(architecture: ControlNetArchitecture) -> ControlNetModel:
    """diffusers' ControlNet of these sizes."""
    return ControlNetModel(
        conditioning_channels=architecture.image_channels,
        conditioning_embedding_out_channels=architecture.hint_channels,
        **_sizes_on_the_way_down(architecture.unet),
    )


def _sizes_on_the_way_down(architecture: UNetArchitecture) -> dict[str, Any]:
    """What U-Nets and ControlNets have in common, in diffusers' words."""
    sizes: dict[str, Any] = dict(
        in_channels=architecture.in_channels,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if depth > 0 else "DownBlock2D" for depth in architecture.transformer_depths
        ),
        block_out_channels=architecture.channels,
        layers_per_block=architecture.resnets,
        cross_attention_dim=architecture.context_width,
        transformer_layers_per_block=tuple(max(depth, 1) for depth in architecture.transformer_depths),
        attention_head_dim=architecture.heads,  # diffusers' name for the number of heads
        use_linear_projection=architecture.linear_projection,
        upcast_attention=architecture.upcast_attention,
    )
    if architecture.vector_width:
        sizes |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=architecture.vector_width,
        )
    return sizes


def build_vae(architecture: VaeArchitecture, *, sample_size: int = 512, scale: float = VAE_SCALE) -> AutoencoderKL:
    """diffusers' VAE of these sizes; `sample_size` in pixels and `scale`, the family's, are only recorded."""
    levels = len(architecture.channels)
    sizes: dict[str, Any] = dict(
        in_channels=architecture.image_channels,
        out_channels=architecture.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=architecture.channels,
        layers_per_block=architecture.resnets,
        latent_channels=architecture.latent_channels,
        sample_size=sample_size,
        scaling_factor=scale,
    )
    return AutoencoderKL(**sizes)


def build_text_encoder(architecture: TextArchitecture) -> TextEncoder:
    """A CLIP text encoder of these sizes; one that also gives the pooled state where they name a projection."""
    return TextEncoder(architecture) if architecture.projection is None else ProjectedTextEncoder(architecture)


def build_from_config(model_class: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    """A diffusers model of the sizes its config.json states; entries of other versions are left aside."""
    known = inspect.signature(model_class.__init__).parameters
    return model_class(**{name: value for name, value in config.items() if name in known})


def fill(
    module: torch.nn.Module,
    tensor: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.nn.Module:
    """Give a module on `meta` its weights, frozen and in eval mode.

    `tensor` names a parameter and gets a CPU tensor of as many elements, often a view of a mapped file; it is copied
    once, in the file's precision to the device and only there to `dtype`.
    """
    state = {}
    for name, parameter in module.state_dict().items():
        source = tensor(name).reshape(parameter.shape)
        moved = source.to(device).to(dtype)
        state[name] = moved.clone() if moved.data_ptr() == source.data_ptr() else moved
    module.load_state_dict(state, strict=True, assign=True)
    for part in module.modules():  # what no file holds: the position numbers of a text encoder
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", f"{name} has no value"
                setattr(part, name, torch.arange(buffer.shape[-1], device=device).expand(1, -1))
    return module.requires_grad_(False).eval()
