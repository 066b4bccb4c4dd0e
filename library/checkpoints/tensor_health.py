"""NaN, infinity and norms of tensors, a piece at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PIECE = 1 << 20  # elements looked at at a time: few enough for a processor's cache


@dataclass
class Health:
    """Of all tensors of a block together."""

    tensors: int = 0
    numbers: int = 0  # elements
    square_sum: float = 0.0  # of the finite elements of weights
    largest: float = 0.0  # magnitude of a finite element
    nans: int = 0
    infinities: int = 0
    dtypes: set[str] = field(default_factory=set)

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(self.square_sum)

    @property
    def is_sound(self) -> bool:
        return not (self.nans or self.infinities)

    def add(self, tensor: torch.Tensor, dtype: str, *, is_weight: bool = True) -> tuple[int, int]:
        """Count a tensor in, and return its own numbers of NaN and of infinities; `dtype` as headers name it."""
        import torch

        self.tensors += 1
        self.numbers += tensor.numel()
        self.dtypes.add(dtype)
        nans = infinities = 0
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return nans, infinities
        for piece in tensor.reshape(-1).split(PIECE):
            values = piece.float()
            low, high = torch.aminmax(values)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):  # NaN is the lowest and the highest, too
                finite = values.isfinite()
                nans += int(values.isnan().sum())
                infinities += int(values.isinf().sum())
                values = values[finite]
                low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
            if is_weight:
                self.square_sum += float(torch.linalg.vector_norm(values)) ** 2
                self.largest = max(self.largest, float(high), -float(low))
        self.nans += nans
        self.infinities += infinities
        return nans, infinities
