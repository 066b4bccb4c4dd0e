"""What the training loop asks of a training target: what is trained, and which file it becomes.

A target is told about the run once, in `setup`, and from then on only answers. The defaults do nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.data.batch import Batch
from library.families.base import Conditioning, ModelBundle, ModelFamily


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate; `name` is what tables and logs call them."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    lr: float | None  # None: the optimizer's default


class TrainTarget(ABC):
    """One kind of training. Subclasses say what is trained and saved, and override of the rest what they need."""

    options: Any  # the target's own option group
    needs_autocast: bool = True  # False: what is trained casts by itself, which is cheaper than autocast
    skips_parameters: bool = False  # whether a step may leave out some of what is trained, and which ones by chance

    @abstractmethod
    def setup(self, family: ModelFamily, bundle: ModelBundle, *, gradient_checkpointing: bool) -> None:
        """Attach to the loaded model: create parameters, choose what is trained. Called once."""

    @abstractmethod
    def trained_module(self) -> torch.nn.Module:
        """The module whose parameters are trained: float32 masters; what resume stores."""

    @abstractmethod
    def param_groups(self, default_lr: float) -> list[ParamGroup]:
        """What is trained at which rate, in the optimizer's order; whatever is in no group takes no gradients."""

    def trains_text(self, step: int) -> bool:
        """Whether text is encoded with gradients at the optimizer update after `step` updates."""
        return False

    def before_forward(self, batch: Batch) -> None:  # noqa: B027
        """Called before a batch's text is encoded and its noise predicted."""

    def predict(
        self,
        family: ModelFamily,
        bundle: ModelBundle,
        noised_BCHW: torch.Tensor,
        conditioning: Conditioning,
        batch: Batch,
    ) -> torch.Tensor:
        return family.predict(bundle.unet, noised_BCHW, batch.timesteps_B, conditioning)

    def on_epoch_start(self, epoch: int) -> None:  # noqa: B027 (optional: the default does nothing)
        """Called before the first batch of each epoch (1-based)."""

    def on_step_start(self, step: int) -> None:  # noqa: B027
        """Called before each optimizer update's first batch."""

    def after_optimizer_step(self) -> Mapping[str, float | torch.Tensor]:
        """Called after each optimizer update; returns values to log."""
        return {}

    @abstractmethod
    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the file users take away, atomically; the extension decides the format."""

    def prompt_tag(self, name: str) -> str:
        """What asks for the file `name` (without extension) in a prompt of web user interfaces; "" where none does."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Metadata (ss_*) of this target."""
        return {}
