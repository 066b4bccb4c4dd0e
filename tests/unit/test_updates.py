"""Gradients applied all together, or one by one inside the backward pass."""

import pytest
import torch
from accelerate import Accelerator

from library.options import OptionError
from library.targets.base import ParamGroup
from library.train.optimizers import build_optimizer
from library.train.options import OptimizerOptions
from library.train.updates import FusedUpdates, PieceUpdates, Updates


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 80), torch.nn.Linear(80, 8)
        self.to(dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def make(name="", *, fused, max_grad_norm=0.0, dtype=torch.float32, lr=1e-2, unet_lr=5e-3):
    net = Net(dtype)
    groups = [ParamGroup("text encoder", tuple(net.first.parameters()), None),
              ParamGroup("unet", tuple(net.second.parameters()), unet_lr)]  # fmt: skip
    built = build_optimizer(OptimizerOptions(name, learning_rate=lr), groups)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(built.optimizer)
    settings = {"max_grad_norm": max_grad_norm, "wide": built.wide}
    arguments = accelerator, optimizer, list(net.parameters())
    updates = FusedUpdates(built, *arguments, **settings) if fused else Updates(*arguments, **settings)
    return net, updates


def train(net, updates, steps=3, scale=1.0):
    norms = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(net.first.weight.dtype)
        (net(x).square().mean() * scale).backward()
        norms.append(updates.clip())
        updates.apply(torch.tensor(True))
        updates.optimizer.zero_grad(set_to_none=True)
    return torch.stack(norms)


def weights(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "SGDNesterov", "AdaFactor"])
def test_one_by_one_is_the_same_as_all_together(name):
    together, one_by_one = make(name, fused=False), make(name, fused=True)
    assert torch.allclose(train(*together), train(*one_by_one))
    assert all(torch.equal(a, b) for a, b in zip(weights(together[0]), weights(one_by_one[0]), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "SGDNesterov", "AdaFactor"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_piece_by_piece_is_the_same_as_all_together(name, max_grad_norm):
    """In float32, where nothing is rounded at random: the same norms, clipping and weights."""
    together = make(name, fused=False, max_grad_norm=max_grad_norm)
    net, plain = make(name, fused=False, max_grad_norm=max_grad_norm)
    built = type("Built", (), {"optimizer": plain.optimizer.optimizer})
    settings = {"max_grad_norm": max_grad_norm, "wide": plain.wide, "piece": 100}
    pieces = PieceUpdates(built, plain.accelerator, plain.optimizer, plain.parameters, **settings)
    assert len(pieces._pieces) > 3
    assert torch.allclose(train(*together), train(net, pieces))
    assert all(torch.allclose(a, b) for a, b in zip(weights(together[0]), weights(net), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "AdaFactor"])
def test_only_one_piece_is_wide_at_a_time(name, monkeypatch):
    net, plain = make(name, fused=False, dtype=torch.bfloat16)
    built = type("Built", (), {"optimizer": plain.optimizer.optimizer})
    settings = {"max_grad_norm": 1.0, "wide": plain.wide, "piece": 100}
    pieces = PieceUpdates(built, plain.accelerator, plain.optimizer, plain.parameters, **settings)
    wide, step = [], plain.optimizer.optimizer.step

    def counted(*args, **kwargs):
        wide.append(sum(p.numel() for p in net.parameters() if p.dtype is torch.float32))
        return step(*args, **kwargs)

    monkeypatch.setattr(plain.optimizer.optimizer, "step", counted)
    before = weights(net)
    train(net, pieces, steps=1)
    assert sum(wide) == sum(p.numel() for p in net.parameters()) and max(wide) <= 740
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    pieces.apply(torch.tensor(False))


def test_no_two_gradients_are_there_at_the_same_time():
    net, updates = make(fused=True)
    seen = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(p.grad is not None for p in net.parameters()))
        )
    train(net, updates, steps=1)
    assert seen == [0] * 4, "freed by the time the next hook runs"


def test_half_precision_is_rounded_the_same_way_each_time():
    first, again = make(fused=True, dtype=torch.bfloat16), make(fused=True, dtype=torch.bfloat16)
    train(*first)
    train(*again)
    assert all(torch.equal(a, b) for a, b in zip(weights(first[0]), weights(again[0]), strict=True))
    assert {weight.dtype for weight in weights(first[0])} == {torch.bfloat16}


def test_together_the_global_norm_is_clipped_and_one_by_one_each_norm():
    start = weights(Net())
    together, one_by_one = (make("SGD", fused=fused, max_grad_norm=0.5, lr=1.0) for fused in (False, True))
    for net, updates in (together, one_by_one):
        updates.bare = updates.optimizer.optimizer
        for group in updates.bare.param_groups:
            group["lr"] = 1.0
        assert train(net, updates, steps=1, scale=1000.0) > 100, "the norm before clipping"
    moved = [torch.stack([(a - b).norm() for a, b in zip(weights(net), start, strict=True)]) for net, _ in
             (together, one_by_one)]  # fmt: skip
    assert moved[0].norm() == pytest.approx(0.5, rel=1e-3)
    assert moved[1].tolist() == pytest.approx([0.5] * 4, rel=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing():
    net, updates = make("AdaFactor", fused=True)
    before = weights(net)
    norms = train(net, updates, steps=1, scale=float("nan"))
    assert not norms.isfinite().any()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert train(net, updates, steps=1).isfinite().all() and not torch.equal(before[0], net.first.weight)


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "AdamWScheduleFree"])
def test_optimizers_that_need_all_gradients_are_refused(name):
    with pytest.raises(OptionError, match="--fused_backward_pass.*all gradients together"):
        make(name, fused=True, lr=1.0, unet_lr=1.0)


class Counting(torch.optim.SGD):
    """An optimizer of somebody's own that counts its steps in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_counts_for_all_parameters_is_found_out():
    net, updates = make(f"{__name__}.Counting", fused=True)
    with pytest.raises(OptionError, match="--fused_backward_pass.*Counting"):
        train(net, updates, steps=1)


def test_scaled_float16_gradients_are_unscaled_in_float32(monkeypatch):
    """As with --full_fp16 on a GPU: gradients of 1e-9 survive, and an overflow skips the update, halves the scale."""
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    built = build_optimizer(OptimizerOptions(learning_rate=1e-2), [ParamGroup("unet", (parameter,), None)])
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**24), True
    optimizer = accelerator.prepare_optimizer(built.optimizer)
    updates = Updates(accelerator, optimizer, [parameter], max_grad_norm=1.0, wide=built.wide)

    def step(gradient):
        accelerator.scaler.scale((parameter.float() * gradient).sum()).backward()
        norm = updates.clip()
        assert parameter.grad.dtype is torch.float32
        updates.apply(torch.tensor(True))
        optimizer.zero_grad(set_to_none=True)
        assert parameter.dtype is torch.float16 and parameter.grad is None
        return float(norm)

    assert step(1.0) == float("inf"), "2^24 is above what float16 holds"
    assert torch.equal(parameter, torch.ones_like(parameter))
    assert accelerator.scaler.get_scale() == 2.0**23
    assert step(1e-9) == pytest.approx(8e-9, rel=0.01)
    # Adam's first step is lr * g / (|g| + eps), with eps = 1e-8
    assert torch.allclose(parameter.float(), torch.tensor(1 - 1e-2 * 1e-9 / 1.1e-8), atol=5e-4)
