"""The fused low-rank layers against the plain formula."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from networks import low_rank

SCALE = 0.3
CONVS = {"1x1": (1, 1, 0), "3x3": (3, 1, 1), "3x3 stride 2": (3, 2, 1), "1x1 stride 2": (1, 2, 0)}


def linear_case(dtype: torch.dtype, *, bias: bool = True):
    base = torch.nn.Linear(5, 7, bias=bias).to(dtype).requires_grad_(False)
    x, down, up = (torch.randn(shape, dtype=dtype) for shape in ((2, 3, 5), (2, 5), (7, 2)))
    return base, x, down, up


def conv_case(dtype: torch.dtype, kind: str, *, channels_last: bool = False, samples: int = 2):
    kernel, stride, padding = CONVS[kind]
    base = torch.nn.Conv2d(4, 6, kernel, stride, padding).to(dtype).requires_grad_(False)
    shapes = ((samples, 4, 4, 6), (3, 4, kernel, kernel), (6, 3, 1, 1))
    x, down, up = (torch.randn(shape, dtype=dtype) for shape in shapes)
    if channels_last:
        x, base = x.to(memory_format=torch.channels_last), base.to(memory_format=torch.channels_last)
    return base, x, down, up


def plain_linear(x, base, down, up, scale):
    return base(x) + F.linear(F.linear(x, down), up) * scale


def plain_conv(x, base, down, up, scale):
    return base(x) + F.conv2d(F.conv2d(x, down, None, base.stride, base.padding), up) * scale


def with_gradients(function, base, x, down, up):
    """(output, gradients of x, down, up) for a fixed, uneven output gradient."""
    inputs = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, down, up)]
    out = function(inputs[0], base, *inputs[1:], SCALE)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients_are_exact(bias):
    base, *tensors = linear_case(torch.float64, bias=bias)
    inputs = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(lambda x, down, up: low_rank.linear(x, base, down, up, SCALE), inputs)
    torch.testing.assert_close(
        low_rank.linear(*inputs[:1], base, *inputs[1:], SCALE), plain_linear(inputs[0], base, *inputs[1:], SCALE)
    )


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_conv_gradients_are_exact(kind, channels_last, samples):
    base, *tensors = conv_case(torch.float64, kind, channels_last=channels_last, samples=samples)
    inputs = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(lambda x, down, up: low_rank.conv2d(x, base, down, up, SCALE), inputs)
    fused, plain = (function(inputs[0], base, *inputs[1:], SCALE) for function in (low_rank.conv2d, plain_conv))
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_only_wanted_gradients_are_made(kind, wanted):
    """A frozen down weight (LoRA-FA) or an input without gradient costs nothing and changes no other gradient."""
    base, *tensors = linear_case(torch.float64) if kind == "linear" else conv_case(torch.float64, kind)
    function = low_rank.linear if kind == "linear" else low_rank.conv2d
    whole = with_gradients(function, base, *tensors)[1:]
    inputs = [tensor.detach().clone().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
    out = function(inputs[0], base, *inputs[1:], SCALE)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    (out * weight).sum().backward()
    for i, tensor in enumerate(inputs):
        if i in wanted:
            torch.testing.assert_close(tensor.grad, whole[i])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_bf16_activations_with_float32_masters(kind, autocast):
    """Masters get float32 gradients; results differ from float32 by bf16's rounding only."""
    torch.manual_seed(0)
    base, x, down, up = linear_case(torch.float32) if kind == "linear" else conv_case(torch.float32, kind)
    function = low_rank.linear if kind == "linear" else low_rank.conv2d
    exact = with_gradients(function, base, x, down, up)
    if not autocast:
        base, x = base.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = with_gradients(function, base, x, down, up)
    assert rounded[0].dtype is torch.bfloat16
    assert rounded[1].dtype is x.dtype
    assert rounded[2].dtype is rounded[3].dtype is torch.float32
    for low, high in zip(rounded, exact, strict=True):
        assert (low.float() - high).norm() < 0.02 * high.norm()


def test_output_may_be_changed_in_place():
    base, x, down, up = linear_case(torch.float64)
    x.requires_grad_()
    out = low_rank.linear(x, base, down, up, SCALE)
    out += 1
    out.sum().backward()
    expected = (base.weight + SCALE * up @ down).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected)


class OpCounter(TorchDispatchMode):
    """Counts operators that launch a kernel: not views, not bookkeeping."""

    FREE = {
        "view",
        "t",
        "transpose",
        "expand",
        "permute",
        "unsqueeze",
        "select",
        "_unsafe_view",
        "detach",
        "new_empty",
        "alias",
    }

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def kernels(function, base, x, down, up) -> int:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, down, up)]
    gradient = torch.ones_like(base(x))
    with OpCounter() as counter:
        function(inputs[0], base, *inputs[1:], SCALE).backward(gradient)
    return counter.kernels.total()


def test_a_step_issues_few_kernels():
    """A guard for speed on GPUs, where issuing kernels is the limit; base layer's own forward and backward included."""
    base, *tensors = linear_case(torch.float32)
    assert kernels(low_rank.linear, base, *tensors) <= 8 < kernels(plain_linear, base, *tensors)
    base, *tensors = conv_case(torch.float32, "1x1", samples=1)
    assert kernels(low_rank.conv2d, base, *tensors) <= 8
    base, *tensors = conv_case(torch.float32, "3x3", samples=1)
    assert kernels(low_rank.conv2d, base, *tensors) <= 8


def test_frobenius_norms_need_no_product():
    torch.manual_seed(0)
    downs, ups = [torch.randn(3, 4, 3, 3) for _ in range(5)], [torch.randn(6, 3, 1, 1) for _ in range(5)]
    expected = [torch.linalg.norm(up.flatten(1) @ down.flatten(1)) for down, up in zip(downs, ups, strict=True)]
    torch.testing.assert_close(low_rank.frobenius_norms(downs, ups), torch.stack(expected))


def test_weight_change_takes_either_rank():
    torch.manual_seed(0)
    down, up = torch.randn(2, 5), torch.randn(7, 2)
    flat = low_rank.weight_change(down, up, torch.Size([7, 5]))
    torch.testing.assert_close(flat, up @ down)
    mixed = low_rank.weight_change(down[:, :, None, None], up, torch.Size([7, 5, 1, 1]))
    torch.testing.assert_close(mixed[:, :, 0, 0], flat)
