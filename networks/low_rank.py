"""The arithmetic of low-rank weight changes: layers with one, their gradients, their sums and norms.

A low-rank change of a layer with weight W is scale * up @ down. The layer's output with it is computed in one autograd
step: the change is added in place on the base output and its gradient in place on the base's input gradient, so that
no tensor of the output's size is made or multiplied besides those the base layer makes anyway. The base weight counts
as frozen: it gets no gradient.

Shape letters: N tokens (all leading dimensions), I inputs, O outputs, R rank, B samples, H W pixels, P = H * W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from library.models.float8 import stored_weight, widened
from library.models.precision import compute_dtype

Size2 = tuple[int, int]


def linear(
    x: torch.Tensor, base: torch.nn.Linear, down_RI: torch.Tensor, up_OR: torch.Tensor, scale: float
) -> torch.Tensor:
    """base(x) + scale * x @ down.T @ up.T for x (..., I), in x's dtype or autocast's; base is frozen.

    `down_RI` and `up_OR` may be masters of a higher precision; they are cast inside and get gradients of their dtype.
    """
    return _LowRankLinear.apply(x, *stored_weight(base), base.bias, down_RI, up_OR, scale)


def conv2d(
    x_BIHW: torch.Tensor, base: torch.nn.Conv2d, down_RIkk: torch.Tensor, up_OR11: torch.Tensor, scale: float
) -> torch.Tensor:
    """base(x) + scale * up(down(x)), where down convolves like the frozen base and up is 1x1; see :func:`linear`.

    The base must have no groups, no dilation and numeric zero padding.
    """
    how = (scale, (base.stride, base.padding))
    return _LowRankConv.apply(x_BIHW, *stored_weight(base), base.bias, down_RIkk, up_OR11, how)


# ---------------------------------------------------------------------------------------------- layers


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, weight_scale, bias, down, up, scale):  # type: ignore[override]
        dtype = compute_dtype(x)
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        down, up = down.to(dtype), up.to(dtype)
        out_NO = F.linear(x_NI, widened(weight, weight_scale, dtype), None if bias is None else bias.to(dtype))
        low_NR = torch.mm(x_NI, down.t())
        out_NO.addmm_(low_NR, up.t(), alpha=scale)
        # the weight as it is stored: what it was widened to is not kept for the backward pass
        kept_x_NI = x_NI if ctx.needs_input_grad[4] else None  # a frozen down spares it (LoRA-FA)
        ctx.save_for_backward(kept_x_NI, weight, weight_scale, down, up, low_NR)
        ctx.scale, ctx.shape = scale, x.shape
        # not a view in autograd's books: callers may change the output in place
        return torch.ops.aten._unsafe_view.default(out_NO, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        x_NI, weight, weight_scale, down, up, low_NR = ctx.saved_tensors
        needs_x, _, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_down = grad_up = None
        if needs_up:
            grad_up = torch.addmm(up, grad_NO.t(), low_NR, beta=0, alpha=ctx.scale)
        if not (needs_x or needs_down):
            return None, None, None, None, None, grad_up, None
        grad_low_NR = torch.addmm(low_NR, grad_NO, up, beta=0, alpha=ctx.scale)
        if needs_down:
            grad_down = torch.mm(grad_low_NR.t(), x_NI)
        if needs_x:
            full = widened(weight, weight_scale, grad_NO.dtype)
            grad_x = torch.mm(grad_NO, full).addmm_(grad_low_NR, down).view(ctx.shape)
        return grad_x, None, None, None, grad_down, grad_up, None


class _LowRankConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, weight_scale, bias, down, up, how):  # type: ignore[override]
        dtype = compute_dtype(x)
        scale, geometry = how
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        stride, padding = geometry
        full = widened(weight, weight_scale, dtype)
        out = torch.conv2d(x, full, None if bias is None else bias.to(dtype), stride, padding)
        up_OR = up.flatten(1)
        pointwise = down.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0)
        low = _mix(down.flatten(1), x) if pointwise else torch.conv2d(x, down, None, stride, padding)
        _add_mix_(out, up_OR, low, scale)
        kept_x = x if ctx.needs_input_grad[4] else None  # a frozen down spares it (LoRA-FA)
        ctx.save_for_backward(kept_x, weight, weight_scale, down, up_OR, low)
        ctx.scale, ctx.geometry, ctx.pointwise = scale, geometry, pointwise
        ctx.x_layout = x.shape, x.stride()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        x, weight, weight_scale, down, up_OR, low = ctx.saved_tensors
        needs_x, _, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        grad_x: Any = None
        grad_down = grad_up = None
        if needs_up:
            grad_up = _outer(grad, low, ctx.scale)[:, :, None, None]
        if not (needs_x or needs_down):
            return None, None, None, None, None, grad_up, None
        if x is None:  # only its form matters to the gradient for it
            x = grad.new_empty_strided(*ctx.x_layout)
        grad_low = _mix(up_OR.t(), grad, ctx.scale)
        if needs_x:
            full = widened(weight, weight_scale, grad.dtype)
            grad_x = _conv_gradients(grad, x, full, ctx.geometry, (True, False))[0]
        if not ctx.pointwise:
            grad_x_low, grad_down = _conv_gradients(grad_low, x, down, ctx.geometry, (needs_x, needs_down))
            if needs_x:
                grad_x.add_(grad_x_low)
        else:
            if needs_down:
                grad_down = _outer(grad_low, x)[:, :, None, None]
            if needs_x:
                _add_mix_(grad_x, down.flatten(1).t(), grad_low, 1.0)
        return grad_x, None, None, None, grad_down, grad_up, None


def _conv_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: tuple[Size2, Size2], wanted: tuple[bool, bool]
) -> tuple[Any, Any]:
    """Gradients of conv2d(x, weight) for (x, weight), None where not wanted."""
    stride, padding = geometry
    mask = [*wanted, False]
    gradients = torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, mask
    )
    return gradients[0], gradients[1]


# ------------------------------------------------------------------------ matrices over the channels of pictures


def _mix(matrix_OI: torch.Tensor, x_BIHW: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale * matrix over the channels of x (a 1x1 convolution), in x's memory layout."""
    samples, _, height, width = x_BIHW.shape
    if _channels_last(x_BIHW):
        out_NO = torch.addmm(_nothing(x_BIHW), _tokens(x_BIHW), matrix_OI.t(), beta=0, alpha=scale)
        return out_NO.view(samples, height, width, -1).permute(0, 3, 1, 2)
    x_BIP = x_BIHW.reshape(samples, -1, height * width)
    out_BOP = torch.baddbmm(_nothing(x_BIHW), matrix_OI.expand(samples, -1, -1), x_BIP, beta=0, alpha=scale)
    return out_BOP.view(samples, -1, height, width)


def _add_mix_(out_BOHW: torch.Tensor, matrix_OI: torch.Tensor, x_BIHW: torch.Tensor, scale: float) -> None:
    """out += scale * matrix over the channels of x."""
    samples, outputs, height, width = out_BOHW.shape
    if _channels_last(out_BOHW):
        out_NO = out_BOHW.permute(0, 2, 3, 1).view(-1, outputs)
        out_NO.addmm_(_tokens(x_BIHW), matrix_OI.t(), alpha=scale)
    elif out_BOHW.is_contiguous():
        x_BIP = x_BIHW.reshape(samples, -1, height * width)
        out_BOP = out_BOHW.view(samples, outputs, height * width)
        out_BOP.baddbmm_(matrix_OI.expand(samples, -1, -1), x_BIP, alpha=scale)
    else:
        out_BOHW.add_(_mix(matrix_OI, x_BIHW), alpha=scale)


def _outer(a_BOHW: torch.Tensor, b_BIHW: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """(O, I): scale * the sum over samples and pixels of a's times b's channels; samples are added in float32."""
    if _channels_last(a_BOHW):
        return torch.addmm(_nothing(a_BOHW), _tokens(a_BOHW).t(), _tokens(b_BIHW), beta=0, alpha=scale)
    a_BOP, b_BPI = a_BOHW.flatten(2), b_BIHW.flatten(2).transpose(1, 2)
    out_BOI = torch.baddbmm(_nothing(a_BOHW), a_BOP, b_BPI, beta=0, alpha=scale)
    if len(out_BOI) == 1:
        return out_BOI[0]
    return out_BOI.sum(0, dtype=torch.promote_types(out_BOI.dtype, torch.float32))


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """The ignored summand of a scaled product (beta = 0)."""
    return like.new_empty(1)


def _channels_last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _tokens(x_BCHW: torch.Tensor) -> torch.Tensor:
    """(N, C); free of copying in channels-last layout."""
    return x_BCHW.permute(0, 2, 3, 1).reshape(-1, x_BCHW.shape[1])


# ---------------------------------------------------------------------------------------------- sums and norms


def weight_change(down: torch.Tensor, up: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """up @ down in float32 as a change of a weight of `shape`; either may be 2-D or 4-D with single pixels."""
    return torch.mm(up.float().flatten(1), down.float().flatten(1)).reshape(shape)


def add_weight_change_(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    """weight += scale * up @ down in place for a contiguous float32 weight, without a tensor of its size."""
    rows = weight.view(len(weight), -1)
    rows.addmm_(up.float().flatten(1), down.float().flatten(1), alpha=scale)


def frobenius_norms(downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor]) -> torch.Tensor:
    """(M,) norms of up @ down for M pairs of equal shapes, without the products.

    ||B A||^2 = tr(A A^T B^T B): the sum over two R x R matrices multiplied element by element.
    """
    down_MRI = torch.stack([down.detach().flatten(1) for down in downs]).float()
    up_MOR = torch.stack([up.detach().flatten(1) for up in ups]).float()
    gram = torch.bmm(down_MRI, down_MRI.transpose(1, 2)) * torch.bmm(up_MOR.transpose(1, 2), up_MOR)
    return gram.sum((1, 2)).clamp_min_(0).sqrt_()


@dataclass(frozen=True)
class Product:
    """The low-rank change scale * up @ down, and the parameters to make it smaller by."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    parts: Sequence[Sequence[torch.nn.Parameter]]  # of one factor or both: those of each that is trained


@torch.no_grad()
def limit_norms(products: Sequence[Product], max_norm: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale down every change whose Frobenius norm is above `max_norm`: each trained factor by the same root.

    Returns (changes scaled, mean norm, largest norm), norms as they are afterwards, as scalar tensors: nothing waits
    for the device.
    """
    by_shape: dict[tuple[Any, ...], list[Product]] = {}
    for product in products:
        shape = (product.down.shape, product.up.shape, product.scale, len(product.parts))
        by_shape.setdefault(shape, []).append(product)
    norms = []
    for (_, _, scale, num_factors), alike in by_shape.items():
        norm_M = frobenius_norms([product.down for product in alike], [product.up for product in alike]) * abs(scale)
        ratio_M = max_norm / norm_M.clamp(min=max_norm)
        roots = (ratio_M.sqrt() if num_factors == 2 else ratio_M).unbind()
        scaled = [
            (parameter, root)
            for product, root in zip(alike, roots, strict=True)
            for part in product.parts
            for parameter in part
        ]
        torch._foreach_mul_(*map(list, zip(*scaled, strict=True)))  # pyright: ignore
        norms.append(torch.stack([norm_M * ratio_M, ratio_M]))
    norm, ratio = torch.cat(norms, dim=1)
    return (ratio < 1).sum(), norm.mean(), norm.max()
