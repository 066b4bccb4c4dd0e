"""Files of networks for tiny models, with random weights, and what they change by dense float64 products."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from library.checkpoints.weights import load_tensors
from networks.lora_creation import model_layers
from tests.tiny_networks import tiny_parts

BASES = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}  # by the notes of trained files


@functools.cache
def layer_shapes(kind: str) -> Mapping[str, tuple[int, ...]]:
    """Name of each layer that LoRA may stand on, convolutions too, and the shape of its weight."""
    text_encoder, unet = tiny_parts(kind)
    return {name: tuple(layer.weight.shape) for name, layer in model_layers(text_encoder, unet, has_convs=True).all}


def lora_tensors(
    kind: str, *, seed: int = 1, rank: int = 4, alpha: float | None = 2.0, std: float = 0.3, every: int = 1
) -> dict[str, torch.Tensor]:
    """A LoRA for every `every`-th layer of a tiny model, convolutions too; without alphas where that is None."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(layer_shapes(kind).items()):
        if number % every:
            continue
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator) * std
        one = (1, 1) if len(shape) == 4 else ()
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *one, generator=generator) * std
    return tensors


def tiny_lora(
    path: Path, kind: str, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None, **how: Any
) -> Path:
    """Write a LoRA file (see `lora_tensors`), with the notes on its base model that trained files have."""
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in lora_tensors(kind, **how).items()}
    notes = {"ss_base_model_version": BASES[kind], "ss_v2": str(kind == "sd2"), "ss_network_module": "networks.lora"}
    save_file(tensors, path, notes | dict(metadata or {}))
    return path


def dense_changes(path: Path) -> dict[str, torch.Tensor]:
    """Module -> alpha / r * up @ down, as a float64 matrix [out, in (x height x width)]."""
    tensors = load_tensors(path)
    names = [key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")]
    changes = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
        alpha = float(tensors.get(f"{name}.alpha", torch.tensor(float(len(down)))))
        changes[name] = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
    return changes
