"""ControlNet-LLLite for SDXL: a guide image changes what the attention layers of the U-Net's first half are given.

For an attention layer with input x (B, T, D) and the guide image, c = conditioning1(image) as T tokens of E numbers,

    layer(x + multiplier * up(mid([c, down(x)])))

The format of the files is that of the trade: modules are named `lllite_unet_` and the layer's original path with "_",
and the names of the parts below (conditioning1, down, mid, up) are those of the keys. This is the form for drawing,
which computes c once per image.

Shape letters: B images, R rows of the U-Net (a multiple of B), T tokens, D features, E numbers of the condition.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from library.models.ldm_view import LdmView, as_files_name_it
from library.options import OptionError
from networks.injection import (
    OTHER_NETWORK,
    Adapter,
    Network,
    check_names,
    modules_of_file,
    read_network_file,
)
from networks.layers import layer_size

PREFIX = "lllite_unet"
TARGET = re.compile(
    r"(input_blocks\.(?P<block>\d+)|middle_block)\..*\.(attn1\.to_[qkv]|attn2\.to_q)"
)  # of original paths
FIRST_CONVOLUTION, FIRST_LINEAR = "conditioning1.0.weight", "down.0.weight"


def create_network_from_weights(
    multiplier: float,
    file: Path | str,
    vae: torch.nn.Module | None,
    text_encoder: Any,
    unet: torch.nn.Module,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = True,
    **kwargs: Any,
) -> tuple[ControlNetLLLite, Mapping[str, torch.Tensor]]:
    """The network of a file with its weights, not yet applied, and the file's tensors.

    Raises OptionError for what is no ControlNet-LLLite, and for one of another model. Layers that the file leaves out
    stay as they are.
    """
    tensors = read_network_file(file) if weights_sd is None else weights_sd
    modules = modules_of_file(tensors)
    first = next(iter(modules.values()), {})
    if not all(name.startswith(f"{PREFIX}_") for name in modules) or {FIRST_CONVOLUTION, FIRST_LINEAR} - set(first):
        raise OptionError("", f"{file} is no ControlNet-LLLite", "give networks such as LoRA as --network_weights")
    view = as_files_name_it(unet)
    if not isinstance(view, LdmView):
        raise OptionError("", f"{file} is a ControlNet-LLLite, which is for SDXL alone", OTHER_NETWORK)
    check_names(modules, (name for name, _, _ in targets(view)), str(file))
    network = ControlNetLLLite(
        view,
        cond_emb_dim=2 * len(first[FIRST_CONVOLUTION]),
        mlp_dim=len(first[FIRST_LINEAR]),
        multiplier=multiplier,
        names=list(modules),
    )
    _load(network, tensors, file)
    return network, tensors


def _load(network: ControlNetLLLite, tensors: Mapping[str, torch.Tensor], file: Path | str) -> None:
    own = network.state_dict()
    missing = sorted(set(own) - set(tensors))
    if missing:
        raise OptionError("", f"{file} is incomplete: {missing[0]} is missing", "copy or download it again")
    odd = next((key for key in own if own[key].shape != tensors[key].shape), None)
    if odd:
        shapes = f"{odd} is {list(tensors[odd].shape)} there and {list(own[odd].shape)} here"
        raise OptionError("", f"{file} was made for another model: {shapes}", OTHER_NETWORK)
    network.load_state_dict(tensors, strict=False)


def targets(view: LdmView) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """(name in files, layer, depth) of the attention layers that see the image, in the order of the U-Net.

    Depth 1, 2 and 3 stand for an eighth, a sixteenth and a thirty-second of the image's size.
    """
    for path, layer in view.named_modules():
        match = TARGET.fullmatch(path)
        if match is not None:
            depth = 3 if match["block"] is None else min(int(match["block"]) // 3 + 1, 3)
            yield f"{PREFIX}_{path}".replace(".", "_"), layer, depth


class ControlNetLLLite(Network):
    """The modules of a U-Net, as a network without text encoders. It can't be merged: it is about a picture."""

    def __init__(
        self,
        unet: torch.nn.Module,
        cond_emb_dim: int = 16,
        mlp_dim: int = 16,
        dropout: float | None = None,
        multiplier: float = 1.0,
        names: Sequence[str] | None = None,
    ) -> None:
        """`names` limits the layers to these names in files; None: all there are."""
        view = as_files_name_it(unet)
        assert isinstance(view, LdmView), "for SDXL alone"
        wanted = None if names is None else frozenset(names)
        super().__init__(
            [],
            [
                LLLiteModule(name, layer, depth, cond_emb_dim, mlp_dim, dropout=dropout, multiplier=multiplier)
                for name, layer, depth in targets(view)
                if wanted is None or name in wanted
            ],
        )

    def is_mergeable(self) -> bool:
        return False

    def set_cond_image(self, cond_image: torch.Tensor | None) -> None:
        """Guide images (B, 3, H, W), RGB in [-1, 1], for inputs of B rows or a multiple; None: change nothing."""
        for adapter in self.unet_adapters:
            assert isinstance(adapter, LLLiteModule)
            adapter.set_cond_image(cond_image)


class LLLiteModule(Adapter):
    """The change of one attention layer's input. With its initial weights, or without an image, there is none."""

    def __init__(
        self,
        name: str,
        layer: torch.nn.Module,
        depth: int,
        cond_emb_dim: int,
        mlp_dim: int,
        *,
        dropout: float | None = None,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__(name, layer, multiplier)
        inputs, _ = layer_size(layer)
        self.conditioning1 = _convolutions(depth, cond_emb_dim)
        self.down = torch.nn.Sequential(torch.nn.Linear(inputs, mlp_dim), torch.nn.ReLU())
        self.mid = torch.nn.Sequential(torch.nn.Linear(mlp_dim + cond_emb_dim, mlp_dim), torch.nn.ReLU())
        up = torch.nn.Linear(mlp_dim, inputs)
        torch.nn.init.zeros_(up.weight)
        self.up = torch.nn.Sequential(up)
        self.dropout = dropout
        self._condition_BEhw: torch.Tensor | None = None

    def set_cond_image(self, cond_image: torch.Tensor | None) -> None:
        weight = next(self.down.parameters())
        self._condition_BEhw = None if cond_image is None else self.conditioning1(cond_image.to(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for its changed input, (R, T, D)."""
        if self._condition_BEhw is None or self.multiplier == 0 or not self.enabled:
            return self._base_forward(x)
        condition = _as_tokens(self._condition_BEhw, x.shape[1]).repeat(x.shape[0] // len(self._condition_BEhw), 1, 1)
        hidden = self.mid(torch.cat([condition, self.down(x)], dim=-1))
        if self.dropout is not None:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self._base_forward(x + self.up(hidden) * self.multiplier)

    def weight_change(self) -> torch.Tensor:
        """There is none: what changes is the layer's input."""
        raise TypeError("a ControlNet-LLLite can't be merged")


def _convolutions(depth: int, width: int) -> torch.nn.Sequential:
    """RGB at full size to `width` channels at 1/8, 1/16 or 1/32 of it, for depth 1, 2 or 3."""
    half = width // 2
    steps = {1: [(half, width, 2)], 2: [(half, width, 4)], 3: [(half, half, 4), (half, width, 2)]}[depth]
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, half, 4, stride=4)]
    for inputs, outputs, stride in steps:
        layers += [torch.nn.ReLU(), torch.nn.Conv2d(inputs, outputs, stride, stride=stride)]
    return torch.nn.Sequential(*layers)


def _as_tokens(map_BEhw: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, T, E) of a map, brought to the size of the hidden states where some method draws smaller for a while."""
    height, width = map_BEhw.shape[-2:]
    if tokens != height * width:
        map_BEhw = F.interpolate(map_BEhw, _grid(tokens, height, width), mode="bilinear", antialias=True)
    return map_BEhw.flatten(2).transpose(1, 2)


@functools.cache
def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of so many tokens, of the proportions that come nearest to those of the map."""
    heights = (rows for rows in range(1, tokens + 1) if tokens % rows == 0)
    rows = min(heights, key=lambda rows: abs(rows * rows * width - tokens * height))
    return rows, tokens // rows
