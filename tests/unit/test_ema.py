"""The moving average of the weights, and that looking at other weights leaves training as it was."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import schedulefree
import torch
from torch.nn import Parameter

from library.train.ema import WeightAverage, given_out_by
from library.train.rounding import WideUpdates


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))]


def trained(average, steps):
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        for parameter in average.parameters:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        average.after_step(step)


def test_the_average_follows_its_formula():
    average = WeightAverage(parameters(), 0.7)
    expected = average.parameters[0].detach().numpy().astype(np.float64)
    generator = torch.Generator().manual_seed(1)
    for n in range(40):
        for parameter in average.parameters:
            parameter.data += torch.randn(parameter.shape, generator=generator)
        average.after_step(n + 1)
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * average.parameters[0].detach().numpy()
    assert average.averages[0].numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_and_put_back_bit_for_bit(dtype):
    average = WeightAverage(parameters(dtype), 0.9)
    trained(average, 5)
    before = [parameter.detach().clone() for parameter in average.parameters]
    with pytest.raises(KeyboardInterrupt), average.applied():
        for parameter, mean in zip(average.parameters, average.averages, strict=True):
            assert mean.dtype == torch.float32 and torch.equal(parameter, mean.to(dtype))
        raise KeyboardInterrupt
    for parameter, value in zip(average.parameters, before, strict=True):
        assert torch.equal(parameter, value) and parameter.dtype == dtype


def test_saved_and_restored_it_goes_on_alike():
    whole, again = WeightAverage(parameters(), 0.9), WeightAverage(parameters(), 0.9)
    trained(whole, 3)
    again.load_state_dict(whole.state_dict())
    for first, second in zip(whole.parameters, again.parameters, strict=True):
        second.data.copy_(first)
    trained(whole, 4)
    trained(again, 4)
    assert all(map(torch.equal, whole.averages, again.averages))


def test_weights_that_an_optimizer_gives_out_and_the_way_back():
    trained_parameters = parameters()
    optimizer = schedulefree.AdamWScheduleFree(trained_parameters, lr=0.1)
    optimizer.train()
    for _ in range(3):
        for parameter in trained_parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    before = [parameter.detach().clone() for parameter in trained_parameters]
    wrapped = SimpleNamespace(optimizer=optimizer, eval=optimizer.eval, train=optimizer.train)
    with given_out_by(wrapped, trained_parameters):
        assert not any(map(torch.equal, trained_parameters, before))
    assert all(map(torch.equal, trained_parameters, before)) and optimizer.param_groups[0]["train_mode"]


def test_half_precision_weights_are_given_out_in_their_precision():
    """Their optimizer's state is float32, as updates are computed (WideUpdates)."""
    (parameter,) = trained_parameters = [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    wide = WideUpdates(trained_parameters)
    optimizer = schedulefree.AdamWScheduleFree(trained_parameters, lr=0.1)
    optimizer.train()
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        wide.widen(trained_parameters)
        optimizer.step()
        wide.narrow()
        optimizer.zero_grad()
    y, z = parameter.detach().float(), optimizer.state[parameter]["z"]
    wrapped = SimpleNamespace(optimizer=optimizer, eval=optimizer.eval, train=optimizer.train)
    with given_out_by(wrapped, trained_parameters):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, y.lerp(z, 1 - 1 / 0.9).bfloat16())  # x = y + (1 - 1/beta) (z - y)
    assert torch.equal(parameter, y.bfloat16()) and optimizer.param_groups[0]["train_mode"]


def test_other_optimizers_give_out_what_is_trained():
    trained_parameters = parameters()
    before = [parameter.detach().clone() for parameter in trained_parameters]
    with given_out_by(SimpleNamespace(optimizer=torch.optim.AdamW(trained_parameters)), trained_parameters):
        assert all(map(torch.equal, trained_parameters, before))
