"""What a training step receives: one process's share of one batch.

Shape letters: B samples, C channels, H W pixels or latent pixels, N windows of text tokens, T = 77 tokens a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One process's samples of one bucket, with everything random already drawn (CPU tensors, float32 unless said).

    Exactly one of `images_BCHW` and `latents_BCHW` is set. Latents are unscaled VAE samples. `loss_weight_B` is 0 for
    filler samples, which only keep the shapes of all processes equal; `denominator` is the number of real samples of
    the whole batch divided by the number of processes, so that the mean over processes of
    sum(weight * loss) / denominator is the mean over the batch.
    """

    noise_BCHW: torch.Tensor
    timesteps_B: torch.Tensor  # int64, 0-999
    token_ids: tuple[torch.Tensor, ...]  # one (B, N, 77) int64 per tokenizer
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
    conditioning_BCHW: torch.Tensor | None = None
    mask_B1HW: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self.timesteps_B.shape[0]


@dataclass(frozen=True)
class Position:
    """A place in a run: the batch `batch_index` (0-based, of the whole run's processes) of `epoch` (1-based)."""

    epoch: int
    batch_index: int
