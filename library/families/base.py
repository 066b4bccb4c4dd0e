"""What the training loop and the generator ask of a model family (SD 1.x / 2.x, SDXL).

Shape letters: B samples, C channels, H W latent pixels, N windows of text tokens, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from library.checkpoints.source import ModelSource
from library.families.options import ModelOptions, TextOptions
from library.models.options import AttentionOptions
from library.text.states import TextStates
from library.text.tokens import Tokens


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds inside the U-Net, of as many rows as its input."""

    down: tuple[torch.Tensor, ...]  # to each skip connection, (B, C, h, w) each
    mid: torch.Tensor  # to the output of the middle block

    def plus(self, other: Residuals | None) -> Residuals:
        if other is None:
            return self
        down = tuple(one + another for one, another in zip(self.down, other.down, strict=True))
        return Residuals(down, self.mid + other.mid)


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told about the picture: text states and, for SDXL, the pooled text and the sizes."""

    context_BTD: torch.Tensor
    vector_BD: torch.Tensor | None = None  # the pooled text
    sizes_B6: torch.Tensor | None = None  # float32; what the U-Net itself turns into sinusoids, see PictureSizes
    residuals: Residuals | None = None

    def rows(self, part: slice) -> Conditioning:
        """Some of the rows."""
        residuals = self.residuals and Residuals(
            tuple(down[part] for down in self.residuals.down), self.residuals.mid[part]
        )
        vector = None if self.vector_BD is None else self.vector_BD[part]
        sizes = None if self.sizes_B6 is None else self.sizes_B6[part]
        return Conditioning(self.context_BTD[part], vector, sizes, residuals)

    @property
    def residual_inputs(self) -> dict[str, Any]:
        """The residuals as arguments of diffusers' U-Net; no argument where there are none."""
        if self.residuals is None:
            return {}
        return {
            "down_block_additional_residuals": self.residuals.down,
            "mid_block_additional_residual": self.residuals.mid,
        }

    def added_inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """The vector and the sizes as diffusers' U-Net and ControlNet of SDXL take them; None without a vector."""
        if self.vector_BD is None:
            return None
        assert self.sizes_B6 is not None
        return {"text_embeds": self.vector_BD.to(dtype), "time_ids": self.sizes_B6}


@dataclass(frozen=True)
class PictureSizes:
    """Where the pictures of a batch come from, in pixels: integers, (B, 2) each."""

    original_hw_B2: torch.Tensor  # of the file
    crop_yx_B2: torch.Tensor  # top and left of what was cut out of it
    target_hw_B2: torch.Tensor  # of what is trained or drawn

    @classmethod
    def whole(cls, width: int, height: int, count: int, device: torch.device) -> PictureSizes:
        """Of `count` pictures of this size that are cut from nothing."""
        hw_B2 = torch.tensor([[height, width]] * count, device=device)
        return cls(hw_B2, torch.zeros_like(hw_B2), hw_B2)


@dataclass
class ModelBundle:
    """The parts of one model. `text_encoders` and `tokenizers` have one entry for SD 1.x / 2.x and two for SDXL."""

    unet: torch.nn.Module
    text_encoders: tuple[torch.nn.Module, ...]
    vae: torch.nn.Module
    tokenizers: tuple[Any, ...]  # library.text.tokens.ClipTokenizer
    source: ModelSource


MODEL_PARTS = frozenset({"unet", "text_encoders", "vae"})


@dataclass(frozen=True)
class LoadPlan:
    """dtype and device for each part, decided by train/placement.py or the generator; weights go there in one copy.

    What is not in `parts` stays an outline on the meta device: nothing of it is read but its sizes.
    """

    unet: torch.dtype
    text_encoders: torch.dtype
    vae: torch.dtype
    device: torch.device
    parts: frozenset[str] = MODEL_PARTS


class ModelFamily(Protocol):
    """One family of models; instances hold no state of a run."""

    name: str  # "sd" | "sdxl"
    latent_scale: float  # latents the U-Net sees = VAE latents * latent_scale
    bucket_step: int  # bucket sizes must be multiples of this many pixels

    def load(self, options: ModelOptions, attention: AttentionOptions, plan: LoadPlan) -> ModelBundle:
        """The model on its device, frozen and in eval mode; raises OptionError on a wrong file."""
        ...

    def outline(self, options: ModelOptions, plan: LoadPlan) -> ModelBundle:
        """The same without weights, on the meta device and from headers alone: for what depends on sizes only."""
        ...

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], windows: int, *, weighted: bool = False
    ) -> Tokens:
        """Ids (B, N, 77) per tokenizer: `windows` = N windows of 75 content tokens, begin, end, padding.

        `weighted` captions hold emphasis, which becomes the weights that go with the ids.
        """
        ...

    def encode_text(
        self,
        text_encoders: Sequence[torch.nn.Module],
        token_ids: Sequence[torch.Tensor],
        text: TextOptions,
        token_weights: Sequence[torch.Tensor] | None = None,
    ) -> TextStates:
        """What the encoders say of (B, N, 77) ids and their weights, if any: T = 75 N + 2 states. Differentiable."""
        ...

    def condition(self, text: TextStates, sizes: PictureSizes) -> Conditioning:
        """What the U-Net is told: the text, and where the family's models know of them, the sizes."""
        ...

    def predict(
        self, unet: torch.nn.Module, noised_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The U-Net's output, shaped like `noised_BCHW`; conditioning may be of another precision."""
        ...

    def save(
        self,
        bundle: ModelBundle,
        path: Path,
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        as_diffusers: bool,
        safe_serialization: bool = True,
    ) -> None:
        """Write a single file (.safetensors or .ckpt by extension) or a Diffusers folder, atomically.

        The files of a folder are .safetensors, or .bin without `safe_serialization`. The weights are only read.
        """
        ...

    def describe(self, bundle: ModelBundle) -> dict[str, Any]:
        """Metadata (ss_*) of the model."""
        ...
