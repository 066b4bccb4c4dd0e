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
    ControlNetArchitecture,
    TextArchitecture,
    UNetArchitecture,
    VaeArchitecture,
)
from library.checkpoints.configs import SDXL_VAE_SCALE as SDXL_VAE_SCALE
from library.checkpoints.configs import VAE_SCALE as VAE_SCALE
from library.checkpoints.configs import control_net_config, unet_config, vae_config
from library.models.text_encoder import ProjectedTextEncoder, TextEncoder


def build_unet(architecture: UNetArchitecture, *, sample_size: int = 64) -> UNet2DConditionModel:
    """diffusers' U-Net of these sizes; `sample_size` in latent pixels is only recorded."""
    return UNet2DConditionModel(**unet_config(architecture, sample_size=sample_size))


def build_control_net(architecture: ControlNetArchitecture) -> ControlNetModel:
    """diffusers' ControlNet of these sizes."""
    return ControlNetModel(**control_net_config(architecture))


def build_vae(architecture: VaeArchitecture, *, sample_size: int = 512, scale: float = VAE_SCALE) -> AutoencoderKL:
    """diffusers' VAE of these sizes; `sample_size` in pixels and `scale`, the family's, are only recorded."""
    return AutoencoderKL(**vae_config(architecture, sample_size=sample_size, scale=scale))


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
