"""LoRA-FA: LoRA with a frozen down projection (Zhang et al. 2023, arXiv:2308.03303).

down is drawn once, from N(0, 2 / (inputs + rank)), and only up learns: half of the parameters, gradients and optimizer
state, and no layer keeps its input for the backward pass on behalf of the network. Files are those of networks.lora.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from networks.injection import read_network_file
from networks.layers import TextEncoders
from networks.lora import LoRAModule, LoRANetwork
from networks.lora_creation import network_of_file, new_network, settings_beside_file
from networks.lora_fa_settings import LoRAFASettings
from networks.lora_fa_settings import check_arguments as check_arguments  # part of the contract of network modules

CASTS_ITSELF = True  # as networks.lora


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRAFANetwork:
    """As that of networks.lora."""
    settings = LoRAFASettings.parse(neuron_dropout, kwargs)
    return new_network(LoRAFANetwork, multiplier, (network_dim, network_alpha), (text_encoder, unet), settings)


def create_network_from_weights(
    multiplier: float,
    file: Path | str,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRAFANetwork, Mapping[str, torch.Tensor]]:
    """As that of networks.lora; the down projections of a file stay as they are in further training."""
    settings = settings_beside_file(LoRAFASettings, file, kwargs, for_inference=for_inference)
    tensors = read_network_file(file) if weights_sd is None else weights_sd
    return network_of_file(LoRAFANetwork, multiplier, (file, tensors), (text_encoder, unet), settings)


class LoRAFAModule(LoRAModule):
    """One layer's low-rank change, of which only up is trained."""

    def init_weights(self) -> None:
        """down ~ N(0, 2 / (inputs + rank)), where a convolution's inputs are its channels; up = 0."""
        weight = self.lora_down.weight.requires_grad_(False)
        torch.nn.init.normal_(weight, std=math.sqrt(2 / (weight.shape[1] + self.rank)))
        torch.nn.init.zeros_(self.lora_up.weight)

    @property
    def trained_parts(self) -> tuple[torch.nn.Module, ...]:
        return (self.lora_up,)


class LoRAFANetwork(LoRANetwork):
    """The LoRA-FA modules of a model."""

    module_class = LoRAFAModule
    about_training = "the down projections are frozen, only the up projections learn"

    def requires_grad_(self, requires_grad: bool = True) -> LoRAFANetwork:
        """As of any module, but down projections never learn."""
        super().requires_grad_(requires_grad)
        module: Any
        for module in self.adapters:
            module.lora_down.requires_grad_(False)
        return self
