"""Tensors that are read or gathered when their values are asked for, so that savers can hold a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Deferred(torch.Tensor):
    """Stands for a tensor, which `produce` makes for the first thing that asks for more than shape and precision.

    It is made again for each that asks: nothing is kept.
    """

    produce: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        produce: Callable[[], torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> Deferred:
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        tensor.produce = produce
        return tensor

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        values, named_values = tree_map_only(cls, lambda tensor: tensor.produce(), (given, named or {}))
        return func(*values, **named_values)
