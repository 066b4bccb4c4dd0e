"""Stochastic rounding, and optimizers that work on float32 copies of half-precision parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.targets.base import ParamGroup
from library.train.optimizers import build_optimizer
from library.train.options import OptimizerOptions
from library.train.rounding import Rows, WideUpdates, round_stochastically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), st.integers(0, 1000))
def test_the_result_is_one_of_the_two_neighbours(value, seed):
    exact = torch.tensor([value])
    rounded = round_stochastically(exact, generator(seed)).float()
    nearest = exact.to(torch.bfloat16)
    below, above = (
        torch.nextafter(nearest, torch.tensor([end], dtype=torch.bfloat16)) for end in (-torch.inf, torch.inf)
    )
    assert float(rounded) in {float(below), float(nearest), float(above)}
    assert abs(float(rounded) - value) <= abs(value) * 2**-7 + 1e-38, "less than one step of bfloat16"


def test_the_mean_is_the_value_itself():
    for value in (1.0 + 2**-10, -0.3, 1e-3 + 1e-7, 5e-39):
        many = round_stochastically(torch.full((200_000,), value), generator()).double()
        step = abs(value) * 2**-7
        assert abs(float(many.mean()) - value) < 0.01 * step, value
        assert len(many.unique()) == 2


def test_what_bfloat16_holds_stays_and_so_does_what_is_not_finite():
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), generator()), exact)
    all_ones = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a NaN that noise would carry to zero
    odd = torch.cat([torch.tensor([torch.inf, -torch.inf, torch.nan]), all_ones])
    rounded = round_stochastically(odd, generator())
    assert rounded[:2].tolist() == [torch.inf, -torch.inf] and rounded[2:].isnan().all()


def half_parameter(dtype, value=1.0, size=1000):
    return torch.nn.Parameter(torch.full((size,), value, dtype=dtype))


def train(parameter, steps, *, name="SGD", lr=1.0, gradient=2**-12, seed=1):
    built = build_optimizer(
        OptimizerOptions(name, learning_rate=lr), [ParamGroup("unet", (parameter,), None)]
    )  # fmt: skip
    step = 0
    built.wide.draw_with(seed, lambda: step)
    for step in range(steps):  # noqa: B007 (the noise follows it)
        parameter.grad = torch.full_like(parameter, gradient)
        built.wide.widen([parameter])
        built.optimizer.step()
        built.wide.narrow()
        assert parameter.dtype is parameter.grad.dtype is torch.bfloat16
        parameter.grad = None
    return built


def test_small_steps_add_up():
    """64 steps of 1/4096 down from 1, each below half a step of bfloat16 there (1/512)."""
    parameter = half_parameter(torch.bfloat16)
    train(parameter, 64)
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - 64 / 4096, abs=5e-4)
    plain = half_parameter(torch.bfloat16)
    for _ in range(64):
        plain.data -= torch.full_like(plain, 2**-12)
    assert torch.equal(plain, half_parameter(torch.bfloat16)), "this is what they would do otherwise"


def test_the_noise_follows_from_seed_and_step():
    first, again, other = (half_parameter(torch.bfloat16) for _ in range(3))
    train(first, 5, seed=1)
    train(again, 5, seed=1)
    train(other, 5, seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    train(half_parameter(torch.bfloat16), 1)
    assert torch.equal(state, torch.get_rng_state()), "nothing else is drawn from"


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdaFactor", "Prodigy"])
def test_the_state_is_float32_and_comes_back_as_it_was(name):
    parameter = half_parameter(torch.bfloat16, size=5000)
    built = train(parameter, 3, name=name, lr=1e-2, gradient=0.3)
    saved = {
        key: value.clone() for key, value in built.optimizer.state[parameter].items() if isinstance(value, torch.Tensor)
    }
    assert saved and torch.bfloat16 not in {value.dtype for value in saved.values()}
    before = parameter.detach().clone()
    built.load_state_dict(built.state_dict())
    for key, value in built.optimizer.state[parameter].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype is saved[key].dtype and torch.equal(value, saved[key]), key
    assert torch.equal(parameter, before) and parameter.dtype is torch.bfloat16


def test_float16_keeps_its_small_second_moments():
    """In float16 the square of a gradient of 1e-5 is 0, and AdamW would divide by its epsilon, which is 0 too."""
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    built = build_optimizer(OptimizerOptions(learning_rate=1e-2), [ParamGroup("unet", (parameter,), None)])
    parameter.grad = torch.full_like(parameter, 1e-5)
    built.wide.widen([parameter])
    built.optimizer.step()
    built.wide.narrow()
    assert parameter.dtype is torch.float16 and torch.allclose(parameter.float(), torch.tensor(0.99), atol=1e-3)


def test_full_precision_is_left_alone():
    parameter = torch.nn.Parameter(torch.ones(4))
    storage = parameter.data_ptr()
    wide = WideUpdates([parameter])
    wide.widen([parameter])
    assert parameter.data_ptr() == storage
    wide.narrow()


def test_rows_have_the_noise_of_the_whole():
    """Which process holds an element has no say in how it is rounded."""
    whole = [torch.randn(6, 5), torch.randn(3)]
    cut = [
        (whole[0][:4], Rows(30, 0)),
        (whole[0][4:], Rows(30, 20)),
        (whole[1][:2], Rows(3, 0)),
        (whole[1][2:], Rows(3, 2)),
    ]

    def rounded(tensors, rows=None):
        parameters = [torch.nn.Parameter(tensor.clone().bfloat16()) for tensor in tensors]
        updates = WideUpdates(parameters)
        updates.draw_for({id(p): place for p, place in zip(parameters, rows or (), strict=False)})
        updates.draw_with(7, lambda: 3)
        updates.widen(parameters)
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data.copy_(tensor)
        updates.narrow()
        return parameters

    expected = rounded(whole)
    for process in (0, 1):
        mine = cut[process::2]
        parts = rounded([tensor for tensor, _ in mine], [rows for _, rows in mine])
        for part, all_of_it, (tensor, rows) in zip(parts, expected, mine, strict=True):
            assert torch.equal(part.flatten(), all_of_it.flatten()[rows.start : rows.start + tensor.numel()])
