"""Updates that are not finite, and requests to stop."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator

from library.train.guard import NonFiniteGuard, StopRequest, apply_if_finite


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, fused=True), torch.optim.AdamW, torch.optim.Adagrad])
def test_a_non_finite_update_changes_nothing(make):
    """With torch's fused optimizers the device decides, with others the host: same result."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = Accelerator(cpu=True).prepare(make([parameter]))
    parameter.grad = torch.ones(4)
    apply_if_finite(optimizer, torch.tensor(True))
    good = parameter.detach().clone()
    state = {name: torch.as_tensor(value).clone() for name, value in optimizer.state[parameter].items()}
    assert not torch.equal(good, torch.ones(4))
    parameter.grad = torch.full((4,), float("nan"))
    apply_if_finite(optimizer, torch.tensor(False))
    assert torch.equal(parameter, good)
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(torch.as_tensor(value), state[name]), name


def test_guard_counts_and_gives_up(caplog):
    guard = NonFiniteGuard(limit=3)
    for step, is_finite in enumerate([False, False, True, False, False, False], start=1):
        assert not guard.gives_up
        guard.note(step, is_finite, ("a.png", "b.png"))
    assert guard.gives_up and guard.total == 5
    assert "step 6" in caplog.text and "a.png, b.png" in caplog.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_request_hears_signals_and_gives_the_handlers_back(number, code):
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.listening():
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
