"""A way round a fault of torch in the backward pass of group normalisation on CPUs."""

from __future__ import annotations

from typing import Any

import torch


def mend_norms(module: torch.nn.Module) -> None:
    """Let learning GroupNorms on the CPU see pictures that need no gradient with their channels first in memory.

    torch 2.13 writes to an address that is none where such a picture has its channels last, as convolutions on CPUs
    leave them: GroupNorm(32, 320)(x.to(memory_format=torch.channels_last)).sum().backward() ends the program.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.GroupNorm) and layer.weight.device.type == "cpu":
            layer.register_forward_pre_hook(_channels_first)


def _channels_first(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    picture, *more = inputs
    return None if picture.requires_grad else (picture.contiguous(), *more)
