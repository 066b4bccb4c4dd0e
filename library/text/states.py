"""What text encoders say of captions, before a family makes conditioning of it.

Shape letters: B captions, T = 75 N + 2 states of N windows of text, D features (each encoder has its own number), P
pooled features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TextStates:
    """The states of each text encoder, and for SDXL the pooled text."""

    by_encoder: tuple[torch.Tensor, ...]  # one (B, T, D) per encoder
    pooled_BP: torch.Tensor | None = None

    @property
    def context_BTD(self) -> torch.Tensor:
        """The states of all encoders side by side."""
        return self.by_encoder[0] if len(self.by_encoder) == 1 else torch.cat(self.by_encoder, dim=-1)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of it: the encoders' states, then the pooled text where there is one."""
        return self.by_encoder if self.pooled_BP is None else (*self.by_encoder, self.pooled_BP)
