"""A VAE in strips: its layers one after the other on a few rows at a time, the picture between them in main memory.

The result is that of the whole picture but for rounding, unlike that of tiles, which know nothing of each other. The
device holds the weights, one strip and what attention needs at the smallest size; the rest waits in main memory.

Shape letters: B images, C channels, H W pixels of a layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import conv2d, group_norm, pad


def compute_in_strips(vae: Any, num_strips: int) -> None:
    """Let diffusers' AutoencoderKL compute its convolutions and norms in this many horizontal strips, for good."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.forward = functools.partial(_convolution, module, num_strips)
        elif isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(_norm, module, num_strips)
        elif type(module).__name__ == "Attention":
            module.register_forward_pre_hook(_to_device)
            module.register_forward_hook(lambda _module, _inputs, output: output.cpu())


def _convolution(module: torch.nn.Conv2d, num_strips: int, image_BCHW: torch.Tensor) -> torch.Tensor:
    """The convolution, on the CPU, of an image anywhere: rows [a, b) of it need rows [a s - p, (b - 1) s - p + k)."""
    weight = module.weight
    (kernel, _), (step, _), (edge, side) = module.kernel_size, module.stride, module.padding
    height = image_BCHW.shape[2]
    rows_out = (height + 2 * int(edge) - kernel) // step + 1
    parts = []
    for start, stop in _strips(rows_out, num_strips):
        first, last = start * step - int(edge), (stop - 1) * step - int(edge) + kernel
        strip_BChW = image_BCHW[:, :, max(first, 0) : last].to(weight.device)
        strip_BChW = pad(strip_BChW, (0, 0, max(-first, 0), max(last - height, 0)))
        parts.append(conv2d(strip_BChW, weight, module.bias, module.stride, (0, int(side))).cpu())
    return torch.cat(parts, dim=2)


def _norm(module: torch.nn.GroupNorm, num_strips: int, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Group normalisation by the mean and variance of the whole image, which are summed up in float32 strip by strip.

    Attention gives it (B, C, tokens), which is small and taken as a whole.
    """
    if image_BCHW.ndim == 3:
        return group_norm(image_BCHW, module.num_groups, module.weight, module.bias, module.eps)
    batch, channels, height, width = image_BCHW.shape
    device = module.weight.device
    strips = [image_BCHW[:, :, start:stop] for start, stop in _strips(height, num_strips)]
    shape = (batch, module.num_groups, -1)
    count = channels // module.num_groups * height * width
    sums_BG = sum(strip.to(device).reshape(shape).float().sum(-1) for strip in strips)
    mean_BG1 = (torch.as_tensor(sums_BG) / count).unsqueeze(-1)
    squares_BG = sum(((strip.to(device).reshape(shape).float() - mean_BG1) ** 2).sum(-1) for strip in strips)
    scale_BG1 = (torch.as_tensor(squares_BG) / count + module.eps).rsqrt().unsqueeze(-1)
    weight_C11, bias_C11 = module.weight.float().view(-1, 1, 1), module.bias.float().view(-1, 1, 1)
    parts = []
    for strip in strips:
        moved = strip.to(device)
        normal = ((moved.reshape(shape).float() - mean_BG1.float()) * scale_BG1.float()).view(moved.shape)
        parts.append((normal * weight_C11 + bias_C11).to(image_BCHW.dtype).cpu())
    return torch.cat(parts, dim=2)


def _to_device(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    device = next(module.parameters()).device
    return tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs)


def _strips(rows: int, num_strips: int) -> list[tuple[int, int]]:
    """Consecutive ranges of rows of nearly equal height, none of them empty."""
    num_strips = min(num_strips, rows)
    edges = [rows * index // num_strips for index in range(num_strips + 1)]
    return list(zip(edges, edges[1:], strict=False))
