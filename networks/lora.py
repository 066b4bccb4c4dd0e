"""LoRA: low-rank changes of Linear and Conv2d layers (Hu et al. 2021, arXiv:2106.09685; convolutions after LoCon).

The trade's file format: per module `<name>.alpha`, `<name>.lora_down.weight`, `<name>.lora_up.weight`. With rank r a
layer computes base(x) + up(down(x)) * multiplier * alpha / r.

Class and attribute names `lora_down`, `lora_up`, `alpha` are part of the file's keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from library.models.float8 import stored_weight
from library.options import OptionError
from networks import low_rank
from networks.any_kind import AnyKindNetwork, network_of_any_kind
from networks.blocks import layout_of
from networks.injection import Adapter, Network, read_network_file
from networks.layers import (
    TEXT_PREFIX,
    TextEncoders,
    is_simple_conv,
)
from networks.lora_creation import network_of_file, new_network, settings_beside_file
from networks.lora_files import check_sizes, in_our_names, ranks_of_file
from networks.lora_settings import LoRASettings
from networks.lora_settings import check_arguments as check_arguments  # part of the contract of network modules
from networks.pair_rules import alpha_number, essential

CASTS_ITSELF = True  # needs no autocast: float32 masters are cast to the activations' dtype where they are used


# ---------------------------------------------------------------------------------------------- module-level contract


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A new network for a model, starting as a change of zero; OptionError names the argument that can't be met.

    Rank 4 and alpha 1 where they are None; an alpha of 0 stands for the rank, which makes a strength of 1.
    """
    settings = LoRASettings.parse(neuron_dropout, kwargs)
    return new_network(LoRANetwork, multiplier, (network_dim, network_alpha), (text_encoder, unet), settings)


def create_network_from_weights(
    multiplier: float,
    file: Path | str,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork | AnyKindNetwork, Mapping[str, torch.Tensor]]:
    """(network, tensors): modules, ranks and alphas of a file. The weights are not loaded into it yet.

    For inference the file may be of any kind that networks.weight_changes knows.

    Dropouts and learning-rate weights are taken from `kwargs`, for training on; inference has neither.
    """
    settings = settings_beside_file(LoRASettings, file, kwargs, for_inference=for_inference)
    source, models = (file, read_network_file(file) if weights_sd is None else weights_sd), (text_encoder, unet)
    if for_inference and (made := network_of_any_kind(multiplier, source, models, LoRAModule)) is not None:
        return made
    return network_of_file(LoRANetwork, multiplier, source, models, settings)


# ---------------------------------------------------------------------------------------------- module


class LoRAModule(Adapter):
    """One layer's low-rank change."""

    alpha: torch.Tensor

    def __init__(
        self,
        name: str,
        layer: torch.nn.Module,
        *,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        settings: LoRASettings | None = None,
    ) -> None:
        super().__init__(name, layer, multiplier)
        self.rank = rank
        self.settings = settings or LoRASettings()
        self.lora_down, self.lora_up = _projections(layer, rank)
        self.init_weights()
        # its dtype is a fact of the trade's files: float32 for a float, int64 for an int
        self.register_buffer("alpha", torch.tensor(alpha or rank))
        self.scale = float(self.alpha) / rank
        self._drops = bool(self.settings.dropout or self.settings.rank_dropout or self.settings.module_dropout)
        self._is_linear = isinstance(self.lora_down, torch.nn.Linear)
        self._can_fuse = self._is_linear or is_simple_conv(layer)

    def init_weights(self) -> None:
        """down ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), up = 0: the network starts as no change."""
        torch.nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the change; the base layer's alone while disabled or at multiplier 0."""
        if not self.enabled or self.multiplier == 0:
            return self._base_forward(x)
        if self.training and self._drops:
            return self._forward_with_dropout(x)
        layer: Any = self._layer[0]
        if not (self._can_fuse and self._base_is_plain) or stored_weight(layer)[0].requires_grad:
            return self._base_forward(x) + self.change(x)
        layer_with_change = low_rank.linear if self._is_linear else low_rank.conv2d
        return layer_with_change(x, layer, *self.factors())

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(down, up, scale) of one forward: what it adds is scale * up(down(x))."""
        return self.lora_down.weight, self.lora_up.weight, self.multiplier * self.scale

    @property
    def trained_parts(self) -> tuple[torch.nn.Module, ...]:
        """Those of the two projections that learn."""
        return self.lora_down, self.lora_up

    def change(self, x: torch.Tensor) -> torch.Tensor:
        down, up, scale = self.factors()
        return self._up(self._down(x, down), up) * scale

    def _forward_with_dropout(self, x: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        base = self._base_forward(x)
        if settings.module_dropout and torch.rand(()).item() < settings.module_dropout:  # CPU generator: no device sync
            return base
        down, up, scale = self.factors()
        low = self._down(x, down)
        if settings.dropout:
            low = F.dropout(low, settings.dropout)
        if settings.rank_dropout:
            keep = torch.rand(low.shape[0], self.rank, device=low.device) > settings.rank_dropout
            middle = (1,) * (low.ndim - 2)
            low = low * keep.view(-1, *((*middle, self.rank) if self._is_linear else (self.rank, *middle)))
            scale /= 1 - settings.rank_dropout
        return base + self._up(low, up) * scale

    def _down(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype = low_rank.compute_dtype(x)
        weight = weight.to(dtype)
        if self._is_linear:
            return F.linear(x.to(dtype), weight)
        return F.conv2d(x.to(dtype), weight, None, self.lora_down.stride, self.lora_down.padding)

    def _up(self, low: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(low.dtype)
        return F.linear(low, weight) if self._is_linear else F.conv2d(low, weight)

    def weight_change(self) -> torch.Tensor:
        down, up = self.lora_down.weight.detach(), self.lora_up.weight.detach()
        return low_rank.weight_change(down, up, self.layer.weight.shape) * (self.multiplier * self.scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept alpha of any type or none, and 2-D for 4-D weights and back; then follow the loaded alpha."""
        for part in (self.lora_down, self.lora_up):
            key = prefix + ("lora_down.weight" if part is self.lora_down else "lora_up.weight")
            tensor = state_dict.get(key)
            if tensor is None or tensor.shape == part.weight.shape:
                continue
            if essential(tuple(tensor.shape)) == essential(tuple(part.weight.shape)):
                state_dict[key] = tensor.reshape(part.weight.shape)
                continue
            problem = f"has the shape {list(tensor.shape)} where the network has {list(part.weight.shape)}"
            raise OptionError(key, problem)
        if prefix + "alpha" in state_dict:
            alpha_number(self.name, state_dict[prefix + "alpha"], "the network")
            state_dict[prefix + "alpha"] = state_dict[prefix + "alpha"].reshape(())
        elif prefix + "lora_down.weight" in state_dict:
            state_dict[prefix + "alpha"] = torch.tensor(self.rank)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.scale = float(self.alpha) / self.rank


def _projections(layer: Any, rank: int) -> tuple[Any, Any]:
    """Down and up projections of a layer, uninitialised, float32 on the CPU; a convolution's down has its geometry."""
    skip_init = torch.nn.utils.skip_init
    if type(layer).__name__ == "Linear":
        return (
            skip_init(torch.nn.Linear, layer.in_features, rank, bias=False),
            skip_init(torch.nn.Linear, rank, layer.out_features, bias=False),
        )
    down = skip_init(
        torch.nn.Conv2d, layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    return down, skip_init(torch.nn.Conv2d, rank, layer.out_channels, (1, 1), bias=False)


# ---------------------------------------------------------------------------------------------- network


class LoRANetwork(Network):
    """The LoRA modules of a model."""

    module_class = LoRAModule

    def __init__(
        self, text_adapters: list[LoRAModule], unet_adapters: list[LoRAModule], settings: LoRASettings | None = None
    ) -> None:
        super().__init__(text_adapters, unet_adapters)
        self.settings = settings or LoRASettings()
        layout = layout_of([module.name for module in unet_adapters])
        self.block_index = layout.index
        self.block_lr_weights = self.settings.blocks.lr_weights(layout)

    def load_weights(self, file: Path | str) -> Any:
        """As of any network; OptionError for files of other ranks or for other models."""
        modules_here = [module.name for module in self.adapters]
        tensors = in_our_names(read_network_file(file), modules_here, self.other_names)
        ranks = ranks_of_file(tensors, file)
        modules: list[Any] = self.adapters
        check_sizes(tensors, {module.name: module.layer for module in modules}, file)
        for module in modules:
            rank, _ = ranks.get(module.name, (module.rank, None))
            if rank != module.rank:
                problem = f"{file} has rank {rank} where the network has {module.rank} ({module.name})"
                raise OptionError("", problem, "take the ranks from the file: --dim_from_weights")
        return self.load_state_dict(tensors, strict=False)

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """(parameter groups, their names): text encoder, then U-Net or its blocks; a rate of 0 leaves a group out."""
        return self._groups([("textencoder", self.text_adapters, text_encoder_lr)], unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Sequence[float | None], unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same with a rate for each text encoder (the last one for all further ones) and a group for each."""
        by_encoder: dict[str, list[Adapter]] = {}
        for adapter in self.text_adapters:
            by_encoder.setdefault(adapter.name[: len(TEXT_PREFIX) + 1], []).append(adapter)
        text = [
            (f"textencoder{number}", by_encoder[prefix], text_encoder_lr[min(number, len(text_encoder_lr)) - 1])
            for number, prefix in enumerate(sorted(by_encoder), start=1)
        ]
        return self._groups(text, unet_lr, default_lr)

    def _groups(
        self, text: Sequence[tuple[str, list[Adapter], float | None]], unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """`text` has a name, modules and a rate for each group of text modules."""
        groups: list[dict[str, Any]] = []
        names: list[str] = []

        def add(name: str, part: str, modules: list[Adapter], lr: float | None, weight: float) -> None:
            ratio = self.settings.loraplus_ratio(part)
            for suffix, factor, parameters in _split_by_rate(modules, ratio):
                rate = None if lr is None else lr * weight * factor
                if parameters and weight != 0 and rate != 0:
                    groups.append({"params": parameters} | ({} if rate is None else {"lr": rate}))
                    names.append(name + suffix)

        for name, modules, rate in text:
            add(name, "text_encoder", modules, default_lr if rate is None else rate, 1.0)
        lr = default_lr if unet_lr is None else unet_lr
        if self.block_lr_weights is None:
            add("unet", "unet", self.unet_adapters, lr, 1.0)
            return groups, names
        by_block: dict[int, list[Adapter]] = {}
        for module in self.unet_adapters:
            by_block.setdefault(self.block_index(module.name), []).append(module)
        for index in sorted(by_block):
            add(f"unet_block{index}", "unet", by_block[index], lr, self.block_lr_weights[index])
        return groups, names

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale down every module whose weight change (multiplier 1) has a Frobenius norm above `max_norm`.

        Returns (modules scaled, mean norm, largest norm), norms as they are afterwards, as scalar tensors: nothing
        waits for the device.
        """
        modules: list[Any] = self.adapters
        return low_rank.limit_norms(
            [
                low_rank.Product(
                    module.lora_down.weight,
                    module.lora_up.weight,
                    module.scale,
                    [[*part.parameters()] for part in module.trained_parts],
                )
                for module in modules
            ],
            max_norm,
        )


def _split_by_rate(modules: Iterable[Any], ratio: float | None) -> list[tuple[str, float, list[torch.nn.Parameter]]]:
    """[(name suffix, factor of the learning rate, parameters)]: up weights apart where LoRA+ gives them a ratio."""
    modules = list(modules)
    if ratio is None:
        parts = [part for module in modules for part in module.trained_parts]
        return [("", 1.0, [parameter for part in parts for parameter in part.parameters()])]
    return [
        ("", 1.0, [parameter for module in modules for parameter in module.lora_down.parameters()]),
        (" plus", ratio, [parameter for module in modules for parameter in module.lora_up.parameters()]),
    ]
