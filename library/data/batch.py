"""What a training step receives: one process's share of one batch.

Shape letters: B samples, C channels, H W pixels or latent pixels, N windows of text of 77 tokens, D features, P pooled
features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Batch:
    """One process's samples of one bucket, with everything random already drawn (CPU tensors, float32 unless said).

    Exactly one of `images_BCHW` and `latents_BCHW` is set. Latents are unscaled VAE samples. `loss_weight_B` is 0 for
    filler samples, which only keep the shapes of all processes equal; `denominator` is the number of real samples of
    the whole batch divided by the number of processes, so that the mean over processes of
    sum(weight * loss) / denominator is the mean over the batch.
    """

    noise_BCHW: torch.Tensor  # what the latents are mixed with, save for the offset where that is set below
    timesteps_B: torch.Tensor  # int64, 0-999
    token_ids: tuple[torch.Tensor, ...]  # one (B, N, 77) int64 per tokenizer; none where the text is encoded already
    captions: tuple[str, ...]  # as processed: what was tokenized
    loss_weight_B: torch.Tensor
    denominator: float
    original_hw_B2: torch.Tensor  # int64, of the source file
    crop_yx_B2: torch.Tensor
    target_hw_B2: torch.Tensor
    image_names: tuple[str, ...]  # for messages
    images_BCHW: torch.Tensor | None = None  # [-1, 1]
    latents_BCHW: torch.Tensor | None = None
    posterior_noise_BCHW: torch.Tensor | None = None  # N(0, 1) for the VAE's sample; set with images
    offset_noise_BC11: torch.Tensor | None = None  # N(0, 1), to be added at a strength that depends on the latents
    noise_offset_B: torch.Tensor | None = None  # that strength without the latents' part; set with the offset noise
    input_perturbation_BCHW: torch.Tensor | None = None  # noise that the model sees beside `noise`, not to be predicted
    token_weights: tuple[torch.Tensor, ...] | None = None  # emphasis, float32, shaped like the ids
    text_states: tuple[torch.Tensor, ...] | None = None  # of a cache: one (B, 75 N + 2, D) per text encoder
    pooled_BP: torch.Tensor | None = None  # of a cache: the pooled text, where the models have one
    conditioning_BCHW: torch.Tensor | None = None
    network_multiplier: float = 1.0  # strength of the network that is trained, on these samples
    mask_B1HW: torch.Tensor | None = None  # weight of each latent pixel in the loss, [0, 1]

    @property
    def size(self) -> int:
        return self.timesteps_B.shape[0]


class NoiseDraw(NamedTuple):
    """What is drawn for one sample: its part of the fields of `Batch` that have these names."""

    noise_CHW: torch.Tensor
    timestep: int
    offset_noise_C11: torch.Tensor | None = None
    noise_offset: torch.Tensor | None = None  # a scalar
    input_perturbation_CHW: torch.Tensor | None = None


@dataclass(frozen=True)
class Position:
    """A place in a run: the batch `batch_index` (0-based, of the whole run's processes) of `epoch` (1-based)."""

    epoch: int
    batch_index: int
