"""LoRA files as they come: the rank and alpha of each module, and whether they fit the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.network_kind import KIND_NAMES, kind_by_width
from library.models.ldm_view import file_names
from library.options import OptionError
from networks.injection import OTHER_NETWORK, modules_of_file
from networks.key_names import COPY_AGAIN, DOWN, MID, UP, file_key
from networks.layers import TEXT_PREFIX, UNET_PREFIX, layer_size
from networks.lora_settings import Rank
from networks.pair_rules import alpha_number, check_layer, check_pair, check_weight, pair_layer
from networks.weight_changes import kind_of

Parts = Mapping[str, torch.Tensor]  # a module's tensors by what follows its name


def diffusers_names(unet: torch.nn.Module) -> dict[str, str]:
    """Name of each layer of an SDXL U-Net by diffusers' path -> its name in files; empty for other U-Nets."""
    paths = file_names(unet).items()
    return {
        f"{UNET_PREFIX}.{theirs}".replace(".", "_"): f"{UNET_PREFIX}.{ours}".replace(".", "_") for theirs, ours in paths
    }


def in_our_names(
    tensors: Mapping[str, torch.Tensor],
    modules: Collection[str],
    other_names: Mapping[str, str],
    file: Path | str = "the network",
) -> Mapping[str, torch.Tensor]:
    """A file's tensors by the keys they have here, whether they have diffusers' names or its own form (lora_A, lora_B).

    `modules` are the names of the layers of this model, `other_names` leads from diffusers' names to them. Raises
    OptionError, which names the `file`, for what is there twice under two names.
    """
    has_two = any(name.startswith(f"{TEXT_PREFIX}1_") for name in modules)
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name, dot, rest = file_key(key, has_two=has_two).partition(".")
        new = f"{other_names.get(name, name)}{dot}{rest}"
        if new in renamed:
            raise OptionError("", f"{file} has {rest} of {new.partition('.')[0]} twice: {key} is one", COPY_AGAIN)
        renamed[new] = tensor
    return renamed


def ranks_of_file(tensors: Mapping[str, torch.Tensor], file: Path | str) -> dict[str, Rank]:
    """Rank and alpha of each LoRA module of a file; alpha = rank where the file has none.

    Raises OptionError, which names the file and the module, where half of a pair is missing or they don't fit together.
    """
    modules = modules_of_file(tensors)
    ranks = {name: _rank(name, parts, file) for name, parts in modules.items() if DOWN in parts or UP in parts}
    if not ranks:
        kind = next((kind.name for parts in modules.values() if (kind := kind_of(parts)) is not None), None)
        if kind is not None:
            problem = f"{file} holds {kind}, which networks.lora draws with and merges, but does not train"
            raise OptionError("", problem, "use --network_module lycoris.kohya")
        example = next(iter(tensors), "no tensor")
        problem = f"{file} holds no LoRA in the usual format (it has {example})"
        raise OptionError("", problem, "check file and network module")
    return ranks


def _rank(name: str, parts: Parts, file: Path | str) -> Rank:
    for part in (DOWN, UP):
        if part not in parts:
            raise OptionError("", f"{file} is incomplete: {name} has no {part}", COPY_AGAIN)
    if MID in parts:
        raise OptionError("", f"{file} is no plain LoRA: {name} has {MID}", "use --network_module lycoris.kohya")
    check_pair(name, tuple(parts[DOWN].shape), tuple(parts[UP].shape), file)
    for part in (DOWN, UP):
        check_weight(name, part, parts[part], file)
    rank = len(parts[DOWN])
    return rank, alpha_number(name, parts["alpha"], file) if "alpha" in parts else float(rank)


def check_sizes(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, torch.nn.Module], file: Path | str) -> None:
    """OptionError unless each module that both have changes a layer of this size; says which model the file is for."""
    modules = modules_of_file(tensors)
    sizes = {
        name: ((math.prod(parts[DOWN].shape[1:]), len(parts[UP])), layer_size(layers[name]))
        for name, parts in modules.items()
        if name in layers and DOWN in parts
    }
    others = [name for name, (in_file, in_model) in sizes.items() if in_file != in_model]
    if not others:
        for name in sizes:
            down, up = (tuple(modules[name][part].shape) for part in (DOWN, UP))
            if MID not in modules[name]:
                layer: Any = layers[name]
                check_layer(name, pair_layer(down, up), tuple(layer.weight.shape), file)
        return
    name = next((name for name in others if name.endswith(("attn2_to_k", "attn2_to_v"))), others[0])
    (inputs, outputs), (model_inputs, model_outputs) = sizes[name]
    if name.endswith(("attn2_to_k", "attn2_to_v")) and inputs != model_inputs:
        problem = f"its text states have {_width(inputs)} features, this model's {_width(model_inputs)}"
    else:
        problem = f"{name} has {inputs} inputs and {outputs} outputs there, {model_inputs} and {model_outputs} here"
    raise OptionError("", f"{file} was made for another model family: {problem}", OTHER_NETWORK)


def _width(width: int) -> str:
    kind = kind_by_width(width)
    return f"{width} ({KIND_NAMES[kind]})" if kind else str(width)
