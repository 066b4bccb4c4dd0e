"""Which dtype products are computed in."""

from __future__ import annotations

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product on `x` runs in: autocast's where it is on (it leaves float64 alone), else x's own."""
    kind = x.device.type  # "meta" has no autocast, and torch raises when it is asked
    if x.dtype is not torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
