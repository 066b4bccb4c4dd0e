"""Frozen layers with weights in 8 bits (float8 e4m3, Micikevicius et al. 2022), widened when they are used.

Each output (row) has a power of two as its scale, such that the largest of its weights is near the largest number of
the format, 448: small weights keep their 4 significant bits, and scaling itself rounds nothing. A layer's widened
weight lives as long as its product: the backward pass, which needs it for the gradient of the inputs, widens it again.
(Hooks that cast whole modules, as diffusers has them, leave the widened weights to autograd: in training they then
take more memory than weights in half precision.)

Shape letters: O outputs (rows of a weight).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from library.models.precision import compute_dtype

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max


class _In8Bits:
    """What the two kinds of layers share: 8-bit numbers, and the weight they stand for."""

    stored: torch.Tensor  # 8 bits, of the weight's shape
    weight_scale: torch.Tensor  # float32 (O,)
    full_dtype: torch.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The widened weight, made anew each time: for networks that compute with weights themselves."""
        return widened(self.stored, self.weight_scale, self.full_dtype)


class Linear(_In8Bits, torch.nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer in 8 bits; named as its base, because networks find layers by the names of their classes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self.stored, self.weight_scale, self.bias, None)


class Conv2d(_In8Bits, torch.nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution in 8 bits; named as its base."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Product.apply(input, self.stored, self.weight_scale, self.bias, geometry)


def store(module: torch.nn.Module) -> int:
    """Keep every frozen linear layer and convolution inside `module` in 8 bits; returns how many bytes that saves.

    Layers directly under `module` stay as they are: they read and write the picture, and are small. So do convolutions
    that pad otherwise than with zeros.
    """
    saved = 0
    classes = {torch.nn.Linear: Linear, torch.nn.Conv2d: Conv2d}
    for name, layer in module.named_modules():
        narrow = classes.get(type(layer))
        if narrow is None or "." not in name or getattr(layer, "padding_mode", "zeros") != "zeros":
            continue
        weight: Any = layer.weight
        assert not weight.requires_grad, f"{name} is trained"
        assert isinstance(getattr(layer, "padding", ()), tuple), f"{name}: padding by name"
        stored, scale_O = narrowed(weight.detach())
        saved += weight.numel() * weight.element_size() - stored.numel() - scale_O.numel() * scale_O.element_size()
        del layer.weight
        layer.__class__ = narrow
        layer.register_buffer("stored", stored, persistent=False)
        layer.register_buffer("weight_scale", scale_O, persistent=False)
        layer.full_dtype = weight.dtype  # pyright: ignore
    return saved


def layers_in_8_bits(module: torch.nn.Module) -> dict[str, Linear | Conv2d]:
    """The layers of `module` that are kept in 8 bits by name; their weights are not in its `state_dict`."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear | Conv2d)}


def stored_weight(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight as it is kept, for :func:`widened`: 8-bit numbers and scales, or the weight and None."""
    return (layer.stored, layer.weight_scale) if isinstance(layer, _In8Bits) else (layer.weight, None)


def narrowed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(8-bit weight, float32 scale of each output) of a weight (O, ...): weight = 8-bit weight * scale."""
    largest_O = weight.float().flatten(1).abs().amax(1)
    _, exponent_O = torch.frexp(largest_O / LARGEST)
    # 1 for a row of zeros; and no smaller than what float16 can hold
    scale_O = torch.ldexp(torch.ones_like(largest_O), exponent_O.clamp(min=-24))
    return (weight.float() / _by_row(scale_O, weight)).to(FORMAT), scale_O


def widened(weight: torch.Tensor, scale_O: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight in `dtype`; `scale_O` is None for a weight that is not kept in 8 bits."""
    if scale_O is None:
        return weight.to(dtype)
    return weight.to(dtype) * _by_row(scale_O, weight).to(dtype)


def _by_row(scale_O: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scale_O.view(-1, *(1,) * (weight.ndim - 1))


class _Product(torch.autograd.Function):
    """A layer of a frozen 8-bit weight: gradients go to its input only. `geometry` is None for a linear layer."""

    @staticmethod
    def forward(ctx: Any, x, weight, scale, bias, geometry):  # type: ignore[override]
        x = x.to(compute_dtype(x))
        full = widened(weight, scale, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(weight, scale)
        ctx.geometry, ctx.shape = geometry, x.shape
        if geometry is None:
            return F.linear(x, full, bias)
        stride, padding, dilation, groups = geometry
        return F.conv2d(x, full, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        full = widened(weight, scale, grad.dtype)
        if ctx.geometry is None:
            return grad @ full, None, None, None, None
        stride, padding, dilation, groups = ctx.geometry
        grad_x = conv2d_input(ctx.shape, full, grad, stride, padding, dilation, groups)
        return grad_x, None, None, None, None
