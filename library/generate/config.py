"""Everything a generator is asked to do: its option groups, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.diffusion.samplers import takes_zero_terminal_snr
from library.generate.control_options import ControlOptions
from library.generate.critic_options import ClipVisionOptions, CriticOptions
from library.generate.embedding_options import EmbeddingOptions
from library.generate.grid_options import GridOptions
from library.generate.guidance_options import GuidanceOptions
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
from library.generate.size_options import SizeOptions
from library.generate.start_options import HighresOptions, StartNoiseOptions, StartOptions
from library.generate.vae_options import VaeOptions
from library.options import require


@dataclass(frozen=True)
class GenerationConfig:
    """Everything a generation run was asked to do: one field per option group."""

    checkpoint: CheckpointOptions
    compute: ComputeOptions
    prompts: PromptOptions
    picture: PictureOptions
    networks: NetworkOptions
    control: ControlOptions
    critics: CriticOptions
    clip_vision: ClipVisionOptions
    output: OutputOptions
    start: StartOptions
    highres: HighresOptions
    deep_shrink: DeepShrinkOptions
    gradual_latent: GradualLatentOptions
    start_noise: StartNoiseOptions
    schedule: ScheduleOptions
    vae: VaeOptions
    sizes: SizeOptions
    guidance: GuidanceOptions
    embeddings: EmbeddingOptions
    grid: GridOptions

    def check(self) -> list[str]:
        """The rules between groups; raises OptionError, and returns a sentence for each flag without effect."""
        require(
            not (self.embeddings.XTI_embeddings and self.control.control_net_models),
            "--XTI_embeddings",
            "can't go together with --control_net_models: a ControlNet has no layers of its own for such words",
            "leave one of them out",
        )
        self._check_regions()
        sampler, notes = self.picture.sampler, []
        sees_guides = self.control.files or self.critics.needs_guides
        if self.control.guide_image_path and not sees_guides:
            notes.append("--guide_image_path has no effect: nothing looks at it (--control_net_models)")
        if self.schedule.zero_terminal_snr and not takes_zero_terminal_snr(sampler):
            notes.append(f"--zero_terminal_snr has no effect with {sampler}")
        return notes

    def _check_regions(self) -> None:
        """Raise OptionError for a mask that can't be a map of networks' regions and is no picture's, either."""
        mask, networks = self.start.mask_path, self.networks
        compared = self.grid.grid_networks is not None
        if mask is None or not (networks.files or compared):
            return
        problem = "networks that are compared have no regions, and --mask_path is the map of those of --network_weights"
        require(not (networks.applied and compared), "--grid_networks", problem, "leave one of them out")
        if networks.applied or self.start.image_path is not None:
            return
        which = "merged into the model" if networks.files else "compared (--grid_networks)"
        way_out = "leave --network_merge out for regions" if networks.files else "leave --mask_path out"
        problem = f"networks that are {which} have no regions, and there is no picture (--image_path) that it masks"
        require(False, "--mask_path", problem, way_out)


CONFIG_GROUPS: dict[str, Any] = {
    "checkpoint": CheckpointOptions,
    "prompts": PromptOptions,
    "picture": PictureOptions,
    "guidance": GuidanceOptions,
    "sizes": SizeOptions,
    "embeddings": EmbeddingOptions,
    "start": StartOptions,
    "highres": HighresOptions,
    "deep_shrink": DeepShrinkOptions,
    "gradual_latent": GradualLatentOptions,
    "start_noise": StartNoiseOptions,
    "schedule": ScheduleOptions,
    "networks": NetworkOptions,
    "control": ControlOptions,
    "critics": CriticOptions,
    "clip_vision": ClipVisionOptions,
    "vae": VaeOptions,
    "compute": ComputeOptions,
    "output": OutputOptions,
    "grid": GridOptions,
}
