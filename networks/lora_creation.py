"""Making LoRA networks: the layers of a model that can take a module, the rank of each, the modules.

`network_class` is that of networks.lora, or of one of its relatives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.models.ldm_view import as_files_name_it
from library.options import OptionError
from networks.blocks import argument, layout_of
from networks.injection import check_names
from networks.layers import (
    CONV_CONTAINERS,
    TEXT_CONTAINERS,
    TRANSFORMER_CONTAINERS,
    UNET_PREFIX,
    TextEncoders,
    find_layers,
    is_pointwise,
    layer_size,
    text_encoder_prefixes,
)
from networks.lora_files import check_sizes, diffusers_names, in_our_names, ranks_of_file
from networks.lora_settings import DEFAULT_DIM, RANK_KEYS, LoRASettings, RankRule, Settings

if TYPE_CHECKING:
    from networks.lora import LoRAModule, LoRANetwork

logger = logging.getLogger(__name__)


def new_network(
    network_class: type[LoRANetwork],
    multiplier: float,
    rank: tuple[int | None, float | None],
    models: tuple[TextEncoders | None, torch.nn.Module | None],
    settings: LoRASettings,
) -> Any:
    """A new network of `network_class` for (text encoders, U-Net); `rank` is network_dim and network_alpha.

    OptionError names the argument that can't be met.
    """
    network_dim, network_alpha = rank
    dim = DEFAULT_DIM if network_dim is None else network_dim
    alpha = 1.0 if network_alpha is None else network_alpha
    if not 0 <= alpha < math.inf:
        raise OptionError("--network_alpha", f"{alpha:g} is out of range", "use 0 (the rank) or more")
    layers = model_layers(*models, has_convs=settings.has_convs)
    layout = layout_of([name for name, _ in layers.unet])
    network = build_network(multiplier, layers, settings.rank_rule(dim, alpha, layout), settings, network_class)
    check_ranks(network)
    if not network.adapters:
        raise OptionError(
            "--network_args", "no layer of the model gets a rank above 0", "raise network_dim or block_dims"
        )
    return network


def settings_beside_file(
    settings_class: type[Settings], file: Path | str, arguments: dict[str, Any], *, for_inference: bool
) -> Settings:
    """What arguments say that a file doesn't; a warning names those without effect."""
    settings = settings_class.parse(arguments.pop("neuron_dropout", None), arguments)
    idle = [key for key, value in arguments.items() if value is not None and (for_inference or key in RANK_KEYS)]
    if idle:
        why = "the network is not trained" if for_inference else f"{file} decides about ranks and alphas"
        logger.warning("%s: no effect, %s", argument(", ".join(idle)), why)
    return settings_class() if for_inference else settings


def network_of_file(
    network_class: type[LoRANetwork],
    multiplier: float,
    source: tuple[Path | str, Mapping[str, torch.Tensor]],
    models: tuple[TextEncoders | None, torch.nn.Module | None],
    settings: LoRASettings,
) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """(network of `network_class`, tensors by our names) for a file and its tensors, which are not loaded yet."""
    file, tensors = source
    layers = model_layers(*models, has_convs=True)
    tensors = in_our_names(tensors, [name for name, _ in layers.all], layers.other_names, file)
    ranks = ranks_of_file(tensors, file)
    check_names(ranks, (name for name, _ in layers.all), str(file))
    check_sizes(tensors, dict(layers.all), file)
    rule: RankRule = lambda name, layer: ranks.get(name, (0, None))  # noqa: E731
    return build_network(multiplier, layers, rule, settings, network_class), tensors


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


def build_network(
    multiplier: float,
    layers: ModelLayers,
    rule: RankRule,
    settings: LoRASettings,
    network_class: type[LoRANetwork],
) -> LoRANetwork:
    """A network with a module on each layer that the rule gives a rank."""

    def modules(part: Iterable[tuple[str, torch.nn.Module]]) -> list[LoRAModule]:
        ranked = [(name, layer, *rule(name, layer)) for name, layer in part]
        make = network_class.module_class
        return [
            make(name, layer, rank=rank, alpha=alpha, multiplier=multiplier, settings=settings)
            for name, layer, rank, alpha in ranked
            if rank
        ]

    network = network_class(modules(layers.text), modules(layers.unet), settings)
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
