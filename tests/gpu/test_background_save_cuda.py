"""A writer beside training reads the weights of its moment, whatever the device has yet to do."""

from __future__ import annotations

import pytest
import torch

from library.train.background_save import BackgroundSave

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_weights_are_read_after_the_updates_that_are_queued_and_beside_the_kernels_that_follow():
    device = torch.device("cuda")
    save, weights, work = BackgroundSave(device), torch.zeros(1 << 24, device=device), torch.randn(4096, 4096).cuda()
    read, streams = [], []

    def write() -> None:
        streams.append(torch.cuda.current_stream(device))
        read.append(weights.to("cpu").to(torch.float16))

    for step in range(1, 4):
        for _ in range(20):
            work = torch.nn.functional.normalize(work @ work)  # keeps the device busy
        weights += 1
        save.begin(write, lambda error: None)
        for _ in range(20):
            work = torch.nn.functional.normalize(work @ work)
        save.wait()
        assert bool((read.pop() == step).all())
    assert torch.cuda.current_stream(device) not in streams
