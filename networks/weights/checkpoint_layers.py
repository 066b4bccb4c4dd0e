"""The layers of a checkpoint that networks change, by the names files of networks have for them, without a model.

The same layers as `networks.layers.find_layers` finds in a model, from the names and sizes in the header alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.architecture import Shapes, TextArchitecture, text_architectures, unet_architecture
from library.checkpoints.keymaps import FUSED_QKV, UNET_PREFIX, Slot, UNetLayout, translate, unet_paths
from library.checkpoints.sd import part_slots
from library.checkpoints.weights import Weights
from networks.layers import TEXT_PREFIX
from networks.layers import UNET_PREFIX as NAME_PREFIX

if TYPE_CHECKING:
    import torch

# inside Transformer2DModel; inside ResnetBlock2D, Downsample2D and Upsample2D
IN_TRANSFORMER = re.compile(r"\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\..+)$")
IN_CONV_BLOCK = re.compile(r"\.(resnets|downsamplers|upsamplers)\.\d+\.(conv|conv1|conv2|conv_shortcut|time_emb_proj)$")
OF_TEXT_LAYER = (*(f"self_attn.{name}" for name in (*FUSED_QKV, "out_proj")), "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class CheckpointLayer:
    """A Linear or Conv2d of a checkpoint."""

    name: str  # in files of networks: "lora_unet_down_blocks_0_attentions_0_proj_in"
    slot: Slot  # where its weight lies
    shape: tuple[int, ...]  # of its weight: [out, in] or [out, in, height, width]
    is_in_conv_block: bool  # where LoRA stands only if it has ranks for convolutions

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution of more than one pixel, which has a rank of its own."""
        return len(self.shape) == 4 and self.shape[2:] != (1, 1)

    def weight(self, weights: Weights) -> torch.Tensor:
        """Its weight as the file has it: a view, to be copied by whoever keeps or changes it."""
        return rows_of(self.slot, weights.tensor(self.slot.key))


def rows_of(slot: Slot, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a file's tensor that is a slot's."""
    return tensor if slot.part is None else tensor.chunk(len(FUSED_QKV))[slot.part]


def checkpoint_layers(shapes: Shapes, kind: str) -> dict[str, CheckpointLayer]:
    """All layers of a single file that a network may stand on, by name: text encoders first, then the U-Net.

    `kind` is "sd1", "sd2" or "sdxl". Raises ArchitectureError for a file that is no whole model of this kind.
    """
    return {layer.name: layer for layer in (*_text_layers(shapes, kind), *_unet_layers(shapes, kind))}


def other_layers(shapes: Shapes, kind: str) -> dict[str, CheckpointLayer]:
    """The layers and normalisations beside those of :func:`checkpoint_layers`, which some kinds of networks change."""
    usual = checkpoint_layers(shapes, kind)
    return {layer.name: layer for layer in _other_layers(shapes, kind) if layer.name not in usual}


def _other_layers(shapes: Shapes, kind: str) -> Iterator[CheckpointLayer]:
    for prefix, part, encoder in _encoders(shapes, kind):
        paths = [
            *(f"text_model.encoder.layers.{layer}.layer_norm{i}" for layer in range(encoder.layers) for i in (1, 2)),
            "text_model.final_layer_norm",
        ]
        slots = part_slots(part, [f"{path}.weight" for path in paths], kind=kind, file_keys=shapes)
        for path in paths:
            slot = slots[f"{path}.weight"]
            yield CheckpointLayer(f"{prefix}_{path}".replace(".", "_"), slot, shapes[slot.key], False)
    for name, key, _ in _unet_weights(shapes, kind):
        yield CheckpointLayer(name, Slot(key), shapes[key], False)


def bias_slot(layer: CheckpointLayer) -> Slot:
    """Where the bias of a layer lies, if it has one."""
    is_fused = layer.slot.part is not None
    old, new = ("in_proj_weight", "in_proj_bias") if is_fused else (".weight", ".bias")
    return Slot(layer.slot.key.removesuffix(old) + new, layer.slot.part)


def _encoders(shapes: Shapes, kind: str) -> Iterator[tuple[str, str, TextArchitecture]]:
    """(prefix of names, part of the model, sizes) of each text encoder."""
    encoders = text_architectures(shapes, kind)
    for number, encoder in enumerate(encoders, start=1):
        prefix = TEXT_PREFIX if len(encoders) == 1 else f"{TEXT_PREFIX}{number}"
        yield prefix, "text_encoder" if number == 1 else "text_encoder_2", encoder


def _text_layers(shapes: Shapes, kind: str) -> Iterator[CheckpointLayer]:
    for prefix, part, encoder in _encoders(shapes, kind):
        paths = [
            f"text_model.encoder.layers.{layer}.{leaf}" for layer in range(encoder.layers) for leaf in OF_TEXT_LAYER
        ]
        slots = part_slots(part, [f"{path}.weight" for path in paths], kind=kind, file_keys=shapes)
        for path in paths:
            slot = slots[f"{path}.weight"]
            shape = shapes[slot.key]
            rows = shape[0] if slot.part is None else shape[0] // len(FUSED_QKV)
            yield CheckpointLayer(f"{prefix}_{path}".replace(".", "_"), slot, (rows, *shape[1:]), False)


def _unet_layers(shapes: Shapes, kind: str) -> Iterator[CheckpointLayer]:
    for name, key, path in _unet_weights(shapes, kind):
        is_in_conv_block = IN_CONV_BLOCK.search(path) is not None
        if len(shapes[key]) in (2, 4) and (is_in_conv_block or IN_TRANSFORMER.search(path)):
            yield CheckpointLayer(name, Slot(key), shapes[key], is_in_conv_block)


def _unet_weights(shapes: Shapes, kind: str) -> Iterator[tuple[str, str, str]]:
    """(name in files of networks, key, path in diffusers' U-Net) of every weight of the U-Net."""
    architecture = unet_architecture(shapes, kind)
    layout = UNetLayout(tuple(depth > 0 for depth in architecture.transformer_depths), architecture.resnets)
    paths = unet_paths(layout)
    for key in shapes:
        if key.startswith(UNET_PREFIX) and key.endswith(".weight"):
            original = key.removeprefix(UNET_PREFIX).removesuffix(".weight")
            path = translate(original, paths) or ""
            named_by = original if kind == "sdxl" else path
            yield f"{NAME_PREFIX}_{named_by}".replace(".", "_"), key, path
