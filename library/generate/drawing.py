"""A batch while it is drawn, and what may take part in that beside the U-Net.

Shape letters: B pictures, R = B x groups rows of the U-Net, C channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from library.diffusion.samplers import Scheduler
from library.families.base import Conditioning, ModelBundle, ModelFamily
from library.generate.request import GenerationRequest


@dataclass
class Drawing:
    """The state of one batch, from its first step to its last; `denoise` alone makes and advances it."""

    family: ModelFamily
    bundle: ModelBundle
    requests: Sequence[GenerationRequest]  # of equal `batch_key`
    scheduler: Scheduler
    timesteps: torch.Tensor  # those that are gone through, on the CPU
    noise_BChw: torch.Tensor  # standard normal, float32: what each picture starts from
    latents_BChw: torch.Tensor  # float32, at the place in the schedule where the next step begins
    # of R rows: a group of B rows for each of the first request's `texts`; in regional use the context has more rows,
    # for those of all parts, picture by picture, stand in place of one group
    conditioning: Conditioning
    index: int = 0  # of the step at hand
    source_BChw: torch.Tensor | None = None  # clean latents, scaled, where pictures don't start from noise alone
    beside_BChw: torch.Tensor | None = None  # further channels of the U-Net's input: what inpainting models ask for

    @property
    def first(self) -> GenerationRequest:
        """A request that stands for all in what their `batch_key` holds."""
        return self.requests[0]

    @property
    def timestep(self) -> torch.Tensor:
        """Of the step at hand, on the CPU."""
        return self.timesteps[self.index]

    @property
    def progress(self) -> float:
        """The share of the steps that are done before this one, 0 <= progress < 1."""
        return self.index / len(self.timesteps)

    @property
    def is_last_step(self) -> bool:
        return self.index == len(self.timesteps) - 1

    def predict(self, latents_BChw: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The U-Net's output for every row of `conditioning`, float32, at the step at hand."""
        inputs_RChw, timesteps_R = self.unet_inputs(latents_BChw, conditioning)
        return self.family.predict(self.bundle.unet, inputs_RChw, timesteps_R, conditioning).float()

    def unet_inputs(self, latents_BChw: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents as the U-Net takes them at the step at hand, group after group, and their timesteps: R rows."""
        weight = next(self.bundle.unet.parameters())
        num_rows = len(conditioning.context_BTD) - len(latents_BChw) * (self.first.parts_per_row - 1)
        inputs_BChw = self.scheduler.scale_model_input(latents_BChw, self.timestep).to(weight.dtype)
        if self.beside_BChw is not None:
            inputs_BChw = torch.cat([inputs_BChw, self.beside_BChw.to(inputs_BChw)], dim=1)
        inputs_RChw = inputs_BChw.repeat(num_rows // len(inputs_BChw), 1, 1, 1)
        timesteps_R = torch.full((num_rows,), self.timestep.item(), dtype=self.timestep.dtype, device=weight.device)
        return inputs_RChw, timesteps_R

    def without_regions(self, conditioning: Conditioning) -> Conditioning:
        """As models beside the U-Net take it, such as ControlNet: of parts that share a row, the last one's text."""
        num_parts, B = self.first.parts_per_row, len(self.requests)
        if num_parts == 1:
            return conditioning
        context_BTD = conditioning.context_BTD
        start = B if self.first.is_guided else 0
        end = start + B * num_parts
        kept = [*range(start), *range(start + num_parts - 1, end, num_parts), *range(end, len(context_BTD))]
        return replace(conditioning, context_BTD=context_BTD[kept])


class Part:
    """Something that takes part in drawing: networks, control, other guidance, a region that stays as it was.

    Every method's default does nothing. A part holds nothing of a drawing but between the two ends of its block.
    """

    def prepared(self, requests: Sequence[GenerationRequest]) -> AbstractContextManager[None]:
        """The block around one batch from before its prompts are encoded: for what changes text encoders, too."""
        return nullcontext()

    def taking_part(self, drawing: Drawing) -> AbstractContextManager[None]:
        """The block around all steps of one batch: what is prepared when it begins is put back when it ends."""
        return nullcontext()

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        """What the U-Net is told at the step at hand."""
        return conditioning

    def guide(self, drawing: Drawing, prediction_BChw: torch.Tensor) -> torch.Tensor:
        """The prediction after guidance, changed; may change `drawing.latents_BChw`, too."""
        return prediction_BChw

    def after_step(self, drawing: Drawing) -> None:
        """May change `drawing.latents_BChw`, which are those that the next step begins with."""
