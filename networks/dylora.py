"""DyLoRA: LoRA that learns a few of its ranks at a time (after Valipour et al. 2022, arXiv:2210.07558).

The rank r is divided into parts of `unit` ranks. In training each forward of each module draws a first rank b, a
multiple of `unit`; only the part b ... b + unit - 1 learns from it. All ranks take part in the output,

    base(x) + up(down(x)) * multiplier * alpha / r * sqrt(r / (b + unit))

In evaluation nothing is drawn, and the output is that of LoRA with all ranks. Files are those of networks.lora: they
can be used there, and cut at any multiple of `unit`.

A part is a pair of parameters of its own. As one parameter of all ranks with masked gradients, the ranks that were not
drawn would not stand still: optimizers would move them by their moments and shrink them by weight decay, and count
their steps. A part without a gradient is left out by every optimizer, and several processes may draw different parts.

b comes from torch's global generator of the CPU, which the trainers seed before each batch: a resumed run draws the
same, checkpointed blocks draw the same when they are computed again, and no device is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.options import OptionError
from networks.blocks import argument
from networks.dylora_settings import DyLoRASettings
from networks.dylora_settings import check_arguments as check_arguments  # part of the contract of network modules
from networks.injection import read_network_file
from networks.layers import TextEncoders
from networks.lora import LoRAModule, LoRANetwork
from networks.lora_creation import network_of_file, new_network, settings_beside_file

CASTS_ITSELF = True  # as networks.lora
SKIPS_PARAMETERS = True  # a step leaves out what it has not drawn


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> DyLoRANetwork:
    """As that of networks.lora."""
    settings = DyLoRASettings.parse(neuron_dropout, kwargs)
    return new_network(DyLoRANetwork, multiplier, (network_dim, network_alpha), (text_encoder, unet), settings)


def create_network_from_weights(
    multiplier: float,
    file: Path | str,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[DyLoRANetwork, Mapping[str, torch.Tensor]]:
    """As that of networks.lora; for inference the network is in evaluation mode."""
    settings = settings_beside_file(DyLoRASettings, file, kwargs, for_inference=for_inference)
    tensors = read_network_file(file) if weights_sd is None else weights_sd
    models = text_encoder, unet
    network, tensors = network_of_file(DyLoRANetwork, multiplier, (file, tensors), models, settings)
    return network.train(not for_inference), tensors


class RankParts(torch.nn.Module):
    """A projection as parameters of `unit` ranks each. In files, and to its module, it is the one tensor `weight`."""

    def __init__(self, projection: Any, unit: int, rank_axis: int) -> None:
        super().__init__()
        self.unit, self.rank_axis = unit, rank_axis
        if isinstance(projection, torch.nn.Conv2d):
            self.stride, self.padding = projection.stride, projection.padding
        for number, part in enumerate(projection.weight.detach().split(unit, rank_axis)):
            self.register_parameter(str(number), torch.nn.Parameter(part.clone()))

    @property
    def weight(self) -> torch.Tensor:
        """All ranks; gradients reach every part."""
        return torch.cat(tuple(self.parameters()), self.rank_axis)

    def learning_in(self, index: int) -> torch.Tensor:
        """All ranks; gradients reach part `index` alone."""
        parts = [part if number == index else part.detach() for number, part in enumerate(self.parameters())]
        return torch.cat(parts, self.rank_axis)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *further: Any
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
            return
        with torch.no_grad():
            for part, values in zip(self.parameters(), weight.split(self.unit, self.rank_axis), strict=True):
                part.copy_(values)


class DyLoRAModule(LoRAModule):
    """One layer's low-rank change, one part of which learns at a time."""

    settings: DyLoRASettings

    def __init__(self, name: str, layer: torch.nn.Module, *, rank: int, **kwargs: Any) -> None:
        super().__init__(name, layer, rank=rank, **kwargs)
        unit = self.settings.unit
        if rank % unit:  # ranks of a file; those of the command line are checked before
            problem = f"{unit} does not divide the rank {rank} of {name}"
            raise OptionError(argument("unit"), problem, "use a number that divides all ranks of the file")
        self.lora_down, self.lora_up = RankParts(self.lora_down, unit, 0), RankParts(self.lora_up, unit, 1)
        self.num_parts = rank // unit

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(down, up, scale) of one forward: in training with a part drawn anew, which alone gets gradients."""
        if not self.training:
            return super().factors()
        index = int(torch.randint(self.num_parts, (), device="cpu"))
        scale = self.multiplier * self.scale * math.sqrt(self.num_parts / (index + 1))
        return self.lora_down.learning_in(index), self.lora_up.learning_in(index), scale


class DyLoRANetwork(LoRANetwork):
    """The DyLoRA modules of a model."""

    module_class = DyLoRAModule
    settings: DyLoRASettings

    @property
    def about_training(self) -> str:
        modules: list[Any] = self.adapters
        ranks = sorted({module.rank for module in modules})
        of = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"each step draws the ranks that learn in each module: {self.settings.unit} of {of}"
