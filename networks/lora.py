"""LoRA: low-rank changes of Linear and Conv2d layers (Hu et al. 2021, arXiv:2106.09685; convolutions after LoCon).

The trade's file format: per module `<name>.alpha`, `<name>.lora_down.weight`, `<name>.lora_up.weight`. With rank r a
layer computes base(x) + up(down(x)) * multiplier * alpha / r.

Class and attribute names `lora_down`, `lora_up`, `alpha` are part of the file's keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from library.models.float8 import stored_weight
from library.models.ldm_view import as_files_name_it
from library.options import OptionError
from networks import low_rank
from networks.blocks import argument, layout_of
from networks.injection import Adapter, Network, check_names, read_network_file
from networks.layers import (
    CONV_CONTAINERS,
    TEXT_CONTAINERS,
    TEXT_PREFIX,
    TRANSFORMER_CONTAINERS,
    UNET_PREFIX,
    TextEncoders,
    find_layers,
    is_pointwise,
    is_simple_conv,
    layer_size,
    text_encoder_prefixes,
)
from networks.lora_files import check_sizes, diffusers_names, in_our_names, ranks_of_file
from networks.lora_settings import RANK_KEYS, LoRASettings, RankRule
from networks.lora_settings import check_arguments as check_arguments  # part of the contract of network modules

logger = logging.getLogger(__name__)

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
    dim = 4 if network_dim is None else network_dim
    alpha = 1.0 if network_alpha is None else network_alpha
    if not 0 <= alpha < math.inf:
        raise OptionError("--network_alpha", f"{alpha:g} is out of range", "use 0 (the rank) or more")
    layers = model_layers(text_encoder, unet, has_convs=settings.has_convs)
    layout = layout_of([name for name, _ in layers.unet])
    network = build_network(multiplier, layers, settings.rank_rule(dim, alpha, layout), settings)
    check_ranks(network)
    if not network.adapters:
        raise OptionError(
            "--network_args", "no layer of the model gets a rank above 0", "raise network_dim or block_dims"
        )
    return network


def create_network_from_weights(
    multiplier: float,
    file: Path | str,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, Mapping[str, torch.Tensor]]:
    """(network, tensors): modules, ranks and alphas of a file. The weights are not loaded into it yet.

    Dropouts and learning-rate weights are taken from `kwargs`, for training on; inference has neither.
    """
    settings = LoRASettings.parse(kwargs.pop("neuron_dropout", None), kwargs)
    idle = [key for key, value in kwargs.items() if value is not None and (for_inference or key in RANK_KEYS)]
    if idle:
        why = "the network is not trained" if for_inference else f"{file} decides about ranks and alphas"
        logger.warning("%s: no effect, %s", argument(", ".join(idle)), why)
    if for_inference:
        settings = LoRASettings()
    layers = model_layers(text_encoder, unet, has_convs=True)
    tensors = read_network_file(file) if weights_sd is None else weights_sd
    tensors = in_our_names(tensors, [name for name, _ in layers.all], layers.other_names)
    ranks = ranks_of_file(tensors, file)
    check_names(ranks, (name for name, _ in layers.all), str(file))
    check_sizes(tensors, dict(layers.all), file)
    network = build_network(multiplier, layers, lambda name, layer: ranks.get(name, (0, None)), settings)
    return network, tensors


# ---------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model that can take a module, by name."""

    text: list[tuple[str, torch.nn.Module]]
    unet: list[tuple[str, torch.nn.Module]]
    other_names: Mapping[str, str]  # names by which files of other programs call them -> ours

    @property
    def all(self) -> list[tuple[str, torch.nn.Module]]:
        return [*self.text, *self.unet]


def model_layers(text_encoder: TextEncoders | None, unet: torch.nn.Module | None, *, has_convs: bool) -> ModelLayers:
    """The layers LoRA stands on: attention and MLP of text encoders, transformers (and ResNet blocks) of the U-Net."""
    containers = (*TRANSFORMER_CONTAINERS, *(CONV_CONTAINERS if has_convs else ()))
    return ModelLayers(
        text=[
            found
            for prefix, encoder in text_encoder_prefixes(text_encoder)
            for found in find_layers(encoder, prefix, TEXT_CONTAINERS)
        ],
        unet=[] if unet is None else list(find_layers(as_files_name_it(unet), UNET_PREFIX, containers)),
        other_names={} if unet is None else diffusers_names(unet),
    )


def build_network(multiplier: float, layers: ModelLayers, rule: RankRule, settings: LoRASettings) -> LoRANetwork:
    """A network with a module on each layer that the rule gives a rank."""

    def modules(part: Iterable[tuple[str, torch.nn.Module]]) -> list[LoRAModule]:
        ranked = [(name, layer, *rule(name, layer)) for name, layer in part]
        return [
            LoRAModule(name, layer, rank=rank, alpha=alpha, multiplier=multiplier, settings=settings)
            for name, layer, rank, alpha in ranked
            if rank
        ]

    network = LoRANetwork(modules(layers.text), modules(layers.unet), settings)
    network.other_names = layers.other_names
    return network


def check_ranks(network: LoRANetwork) -> None:
    """OptionError when a rank exceeds what its layer's matrix can have; names the narrowest such layer."""
    modules: list[Any] = network.adapters
    too_large = [module for module in modules if module.rank > min(layer_size(module.layer))]
    if not too_large:
        return
    module = min(too_large, key=lambda module: min(layer_size(module.layer)))
    where = "--network_dim" if is_pointwise(module.layer) else argument("conv_dim")
    way_out = f"use {min(layer_size(module.layer))} or less"
    raise OptionError(where, f"{module.rank} is larger than {module.name} allows", way_out)


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
        scale = self.multiplier * self.scale
        if not (self._can_fuse and self._base_is_plain) or stored_weight(layer)[0].requires_grad:
            return self._base_forward(x) + self.change(x)
        layer_with_change = low_rank.linear if self._is_linear else low_rank.conv2d
        return layer_with_change(x, layer, self.lora_down.weight, self.lora_up.weight, scale)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return self._up(self._down(x)) * (self.multiplier * self.scale)

    def _forward_with_dropout(self, x: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        base = self._base_forward(x)
        if settings.module_dropout and torch.rand(()).item() < settings.module_dropout:  # CPU generator: no device sync
            return base
        low = self._down(x)
        if settings.dropout:
            low = F.dropout(low, settings.dropout)
        scale = self.multiplier * self.scale
        if settings.rank_dropout:
            keep = torch.rand(low.shape[0], self.rank, device=low.device) > settings.rank_dropout
            middle = (1,) * (low.ndim - 2)
            low = low * keep.view(-1, *((*middle, self.rank) if self._is_linear else (self.rank, *middle)))
            scale /= 1 - settings.rank_dropout
        return base + self._up(low) * scale

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        dtype = low_rank.compute_dtype(x)
        weight = self.lora_down.weight.to(dtype)
        if self._is_linear:
            return F.linear(x.to(dtype), weight)
        return F.conv2d(x.to(dtype), weight, None, self.lora_down.stride, self.lora_down.padding)

    def _up(self, low: torch.Tensor) -> torch.Tensor:
        weight = self.lora_up.weight.to(low.dtype)
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
            if tensor.shape[0] == part.weight.shape[0] and tensor.numel() == part.weight.numel():
                state_dict[key] = tensor.reshape(part.weight.shape)
                continue
            problem = f"has the shape {list(tensor.shape)} where the network has {list(part.weight.shape)}"
            raise OptionError(key, problem)
        if prefix + "alpha" in state_dict:
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

    def __init__(
        self, text_adapters: list[LoRAModule], unet_adapters: list[LoRAModule], settings: LoRASettings | None = None
    ) -> None:
        super().__init__(text_adapters, unet_adapters)
        self.settings = settings or LoRASettings()
        self.other_names: Mapping[str, str] = {}
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
        by_shape: dict[tuple[Any, ...], list[Any]] = {}
        module: Any
        for module in self.adapters:
            shape = (module.lora_down.weight.shape, module.lora_up.weight.shape, module.scale)
            by_shape.setdefault(shape, []).append(module)
        norms = []
        for (_, _, scale), modules in by_shape.items():
            downs, ups = [module.lora_down.weight for module in modules], [module.lora_up.weight for module in modules]
            norm_M = low_rank.frobenius_norms(downs, ups) * abs(scale)
            ratio_M = max_norm / norm_M.clamp(min=max_norm)
            root_M = ratio_M.sqrt()
            torch._foreach_mul_([*downs, *ups], [*root_M.unbind(), *root_M.unbind()])  # pyright: ignore
            norms.append(torch.stack([norm_M * ratio_M, ratio_M]))
        norm, ratio = torch.cat(norms, dim=1)
        return (ratio < 1).sum(), norm.mean(), norm.max()


def _split_by_rate(modules: Iterable[Any], ratio: float | None) -> list[tuple[str, float, list[torch.nn.Parameter]]]:
    """[(name suffix, factor of the learning rate, parameters)]: up weights apart where LoRA+ gives them a ratio."""
    modules = list(modules)
    if ratio is None:
        return [("", 1.0, [parameter for module in modules for parameter in module.parameters()])]
    return [
        ("", 1.0, [module.lora_down.weight for module in modules]),
        (" plus", ratio, [module.lora_up.weight for module in modules]),
    ]
