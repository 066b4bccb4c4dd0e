"""Which layers of a model networks stand on, and what files call them. Importing this brings no torch.

Class names and paths are part of the file format: a layer is a module whose class is called exactly "Linear" or
"Conv2d" inside a container of a listed class, and its file key is the path with "_" for "." behind a prefix:
`lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

TextEncoders: TypeAlias = "torch.nn.Module | Sequence[torch.nn.Module]"

TEXT_CONTAINERS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
TRANSFORMER_CONTAINERS = ("Transformer2DModel",)
CONV_CONTAINERS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
LEAVES = ("Linear", "Conv2d")

UNET_PREFIX = "lora_unet"
TEXT_PREFIX = "lora_te"


def find_layers(root: torch.nn.Module, prefix: str, containers: Iterable[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, layer) of every Linear and Conv2d inside the containers, in order of `named_modules`."""
    wanted = frozenset(containers)
    for path, module in root.named_modules():
        if type(module).__name__ not in wanted:
            continue
        for leaf_path, leaf in module.named_modules():
            if type(leaf).__name__ in LEAVES:
                yield ".".join(part for part in (prefix, path, leaf_path) if part).replace(".", "_"), leaf


def text_encoder_prefixes(text_encoders: TextEncoders | None) -> list[tuple[str, torch.nn.Module]]:
    """(prefix, encoder): lora_te for one encoder; lora_te1, lora_te2 for a list of more."""
    if text_encoders is None:
        return []
    encoders = list(text_encoders) if isinstance(text_encoders, Sequence) else [text_encoders]
    if len(encoders) == 1:
        return [(TEXT_PREFIX, encoders[0])]
    return [(f"{TEXT_PREFIX}{number}", encoder) for number, encoder in enumerate(encoders, start=1)]


def layer_size(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a layer's weight seen as a matrix; a convolution's inputs count its kernel."""
    weight = layer.weight
    return weight[0].numel(), weight.shape[0]


def is_pointwise(layer: Any) -> bool:
    """Whether a layer is a matrix per token or pixel: Linear or 1x1 Conv2d."""
    return type(layer).__name__ == "Linear" or tuple(layer.kernel_size) == (1, 1)


def is_simple_conv(layer: Any) -> bool:
    """Whether a Conv2d has no groups and no dilation, and pads with a given number of zeros."""
    is_plain = layer.groups == 1 and tuple(layer.dilation) == (1, 1) and layer.padding_mode == "zeros"
    return is_plain and not isinstance(layer.padding, str)
