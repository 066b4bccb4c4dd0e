"""What the training loop asks of a training target: what is trained, and which file it becomes.

A target is told about the run once, in `setup`, and from then on only answers. The defaults do nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
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
    log_name: str | None = None  # of its rate, where it does not follow from the part of the model


class TrainTarget(ABC):
    """One kind of training. Subclasses say what is trained and saved, and override of the rest what they need."""

    options: Any  # the target's own option group
    adapter: str | None  # what modelspec.* calls its files: "lora" and so on; None for whole models
    trains_whole: frozenset[str] = frozenset()  # parts of the model whose own weights learn: "unet", "text_encoders"
    needs_autocast: bool = True  # False: what is trained casts by itself, which is cheaper than autocast
    skips_parameters: bool = False  # whether a step may leave out some of what is trained, and which ones by chance

    saves_beside_training: bool = False  # True: `save` only reads weights, and may run in a thread beside a step

    @classmethod
    @abstractmethod
    def of(cls, config: Any) -> TrainTarget:
        """The target of a run with this configuration (library.train.config.RunConfig)."""

    @abstractmethod
    def setup(self, family: ModelFamily, bundle: ModelBundle, *, gradient_checkpointing: bool) -> None:
        """Attach to the loaded model: create parameters, choose what is trained. Called once."""

    @abstractmethod
    def trained_module(self) -> torch.nn.Module:
        """The module whose parameters are trained, and only those; what resume stores."""

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

    def saved_tensors(self) -> Iterable[torch.Tensor]:
        """What `save` writes, for its size."""
        return self.trained_module().state_dict().values()

    def prompt_tag(self, name: str) -> str:
        """What asks for the file `name` (without extension) in a prompt of web user interfaces; "" where none does."""
        return ""

    def notes(self) -> tuple[str, ...]:
        """Sentences on how it is trained, for the report before a run."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Metadata (ss_*) of this target."""
        return {}
