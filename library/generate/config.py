"""Everything a generator is asked to do: its option groups, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.generate.grid_options import GridOptions
from library.generate.network_options import NetworkOptions
from library.generate.options import (
    CheckpointOptions,
    ComputeOptions,
    OutputOptions,
    PictureOptions,
    PromptOptions,
)
from library.generate.resolution_options import DeepShrinkOptions, GradualLatentOptions
from library.generate.schedule_options import ScheduleOptions
from library.generate.start_options import HighresOptions, StartNoiseOptions, StartOptions
from library.generate.vae_options import VaeOptions


@dataclass(frozen=True)
class GenerationConfig:
    """Everything a generation run was asked to do: one field per option group."""

    checkpoint: CheckpointOptions
    compute: ComputeOptions
    prompts: PromptOptions
    picture: PictureOptions
    networks: NetworkOptions
    output: OutputOptions
    start: StartOptions
    highres: HighresOptions
    deep_shrink: DeepShrinkOptions
    gradual_latent: GradualLatentOptions
    start_noise: StartNoiseOptions
    schedule: ScheduleOptions
    vae: VaeOptions
    grid: GridOptions


CONFIG_GROUPS: dict[str, Any] = {
    "checkpoint": CheckpointOptions,
    "prompts": PromptOptions,
    "picture": PictureOptions,
    "start": StartOptions,
    "highres": HighresOptions,
    "deep_shrink": DeepShrinkOptions,
    "gradual_latent": GradualLatentOptions,
    "start_noise": StartNoiseOptions,
    "schedule": ScheduleOptions,
    "networks": NetworkOptions,
    "vae": VaeOptions,
    "compute": ComputeOptions,
    "output": OutputOptions,
    "grid": GridOptions,
}
