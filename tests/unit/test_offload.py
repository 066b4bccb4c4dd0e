"""Activations in the CPU's memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from library.train.offload import SMALLEST, ActivationOffload


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(3))

    def forward(self, x, checkpointed):
        for block in self.blocks:
            x = checkpoint(self._run, block, x, use_reentrant=False) if checkpointed else self._run(block, x)
        return x

    def _run(self, block, x):
        return torch.tanh(block(x)) * 1.5


class Watched(ActivationOffload):
    def __init__(self, module):
        super().__init__(module)
        self.copied = []

    def _to_cpu(self, tensor):
        self.copied.append(tensor)
        return super()._to_cpu(tensor)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_gradients_are_the_same_and_only_large_activations_move(checkpointed):
    x = torch.randn(128, 256)
    grads, offload = [], None
    for is_offloaded in (False, True):
        net = Net()
        if is_offloaded:
            offload = Watched(net)
            with offload():
                out = net(x, checkpointed)
            out.square().mean().backward()
        else:
            net(x, checkpointed).square().mean().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    weights = {parameter.data_ptr() for parameter in net.parameters()}
    assert all(t.data_ptr() not in weights and t.numel() * t.element_size() >= SMALLEST for t in offload.copied)
    assert len(offload.copied) == (3 if checkpointed else 6), "the blocks' inputs; else also what is inside them"


def test_small_tensors_stay():
    net = Net()
    offload = Watched(net)
    with offload():
        out = net(torch.randn(2, 256), True)
    out.sum().backward()
    assert not offload.copied
