"""Everything a generator is asked to do: its option groups, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.generate.mask_options import MaskOptions
from library.generate.network_options import NetworkOptions
from library.generate.options import (
    CheckpointOptions,
    ComputeOptions,
    OutputOptions,
    PictureOptions,
    PromptOptions,
)


@dataclass(frozen=True)
class GenerationConfig:
    """Everything a generation run was asked to do: one field per option group."""

    checkpoint: CheckpointOptions
    compute: ComputeOptions
    prompts: PromptOptions
    picture: PictureOptions
    masks: MaskOptions
    networks: NetworkOptions
    output: OutputOptions


CONFIG_GROUPS: dict[str, Any] = {
    "checkpoint": CheckpointOptions,
    "prompts": PromptOptions,
    "picture": PictureOptions,
    "masks": MaskOptions,
    "networks": NetworkOptions,
    "compute": ComputeOptions,
    "output": OutputOptions,
}
