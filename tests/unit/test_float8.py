"""Frozen layers kept in 8 bits."""

import pytest
import torch

from library.models import float8
from library.models.build import build_unet
from networks import low_rank
from tests.tiny_models import UNETS


def layer(kind, scale=0.05):
    torch.manual_seed(0)
    made = torch.nn.Linear(32, 48) if kind == "linear" else torch.nn.Conv2d(32, 48, 3, stride=2, padding=1)
    made.weight.data.normal_(std=scale)
    return made.requires_grad_(False)


def inputs(kind, dtype):
    shape = (2, 5, 32) if kind == "linear" else (2, 32, 9, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def stored(made):
    holder = torch.nn.Sequential(torch.nn.Sequential(made))
    assert float8.store(holder) > 0
    return holder[0][0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scale", [0.05, 1e-4, 30.0])
def test_forward_and_gradient_are_those_of_the_rounded_weight(kind, scale):
    plain, narrow = layer(kind, scale), stored(layer(kind, scale))
    assert narrow.stored.dtype is torch.float8_e4m3fn and type(narrow).__name__ == type(plain).__name__
    full = narrow.weight
    assert full.dtype is torch.float32
    assert torch.allclose(full, plain.weight, rtol=2**-4, atol=float(plain.weight.abs().max()) * 2**-14)
    plain.weight.data.copy_(full)
    x, y = inputs(kind, torch.float32), inputs(kind, torch.float32)
    out, expected = narrow(x), plain(y)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6 * scale)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5 * scale**2)


def test_scales_are_powers_of_two_and_round_nothing():
    weight = torch.randn(6, 10) * torch.tensor([1e-6, 1e-3, 0.1, 1.0, 500.0, 0.0])[:, None]
    narrow, scale = float8.narrowed(weight)
    assert torch.equal(torch.frexp(scale)[0], torch.full((6,), 0.5))
    for dtype in (torch.bfloat16, torch.float16):
        wide = float8.widened(narrow, scale, dtype)
        assert wide.dtype is dtype and torch.equal(wide, (narrow.float() * scale[:, None]).to(dtype))
    again, same = float8.narrowed(narrow.float() * scale[:, None])
    assert torch.equal(again.float() * same[:, None], narrow.float() * scale[:, None])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_backward_pass_keeps_no_widened_weight(kind):
    """Neither alone nor under a LoRA: only 8-bit weights are saved by autograd."""
    base = stored(layer(kind))
    down, up = (
        (torch.randn(4, 32), torch.randn(48, 4))
        if kind == "linear"
        else (torch.randn(4, 32, 3, 3), torch.randn(48, 4, 1, 1))
    )
    down, up = down.requires_grad_(), up.requires_grad_()
    with_lora = low_rank.linear if kind == "linear" else low_rank.conv2d
    for call in (base, lambda x: with_lora(x, base, down, up, 0.5)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out = call(inputs(kind, torch.bfloat16))
        sizes = [t.dtype for t in saved if t.numel() == base.weight.numel()]
        assert sizes == [torch.float8_e4m3fn]
        out.float().sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_lora_on_it_is_the_sum_of_both(kind):
    base = stored(layer(kind))
    x, y = inputs(kind, torch.bfloat16), inputs(kind, torch.bfloat16)
    shapes = ((4, 32), (48, 4)) if kind == "linear" else ((4, 32, 3, 3), (48, 4, 1, 1))
    factors = [(torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1) for shape in shapes]
    (down, up), (down2, up2) = ([factor.clone().requires_grad_() for factor in factors] for _ in range(2))
    if kind == "linear":
        fused = low_rank.linear(x, base, down, up, 0.5)
        apart = base(y) + y @ down2.bfloat16().t() @ up2.bfloat16().t() * 0.5
    else:
        fused = low_rank.conv2d(x, base, down, up, 0.5)
        low = torch.conv2d(y, down2.bfloat16(), None, base.stride, base.padding)
        apart = base(y) + torch.conv2d(low, up2.bfloat16()) * 0.5
    fused.float().square().sum().backward()
    apart.float().square().sum().backward()
    for one, other in ((fused, apart), (x.grad, y.grad), (down.grad, down2.grad), (up.grad, up2.grad)):
        assert torch.allclose(one.float(), other.float(), rtol=0.05, atol=0.02 * float(other.float().abs().max()))


def test_autocast_decides_what_it_computes_in():
    narrow = stored(layer("linear"))
    with torch.autocast("cpu", torch.bfloat16):
        x = inputs("linear", torch.float32)
        out = narrow(x)
        out.float().sum().backward()
    assert out.dtype is torch.bfloat16 and x.grad.dtype is torch.float32


def test_what_reads_and_writes_pictures_stays_as_it_is():
    unet = build_unet(UNETS["sd1"]).to(torch.bfloat16).requires_grad_(False)
    before = sum(p.numel() * p.element_size() for p in unet.parameters())
    saved = float8.store(unet)
    assert unet.conv_in.weight.dtype is unet.conv_out.weight.dtype is torch.bfloat16
    assert unet.down_blocks[0].resnets[0].norm1.weight.dtype is torch.bfloat16
    assert unet.mid_block.attentions[0].proj_in.stored.dtype is torch.float8_e4m3fn
    assert next(unet.parameters()).dtype is torch.bfloat16, "what dtypes of inputs are read from"
    assert 0.4 * before < saved < 0.5 * before
    assert unet.dtype is torch.bfloat16
    assert not any("weight_scale" in name for name in unet.state_dict())
    assert unet.mid_block.attentions[0].proj_in.weight.dtype is torch.bfloat16, "as others see it"


def test_trained_layers_are_refused():
    with pytest.raises(AssertionError, match="is trained"):
        float8.store(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2))))
