"""Gradients of several processes: their mean, on each of them, where data parallelism does not see to it.

torch's DistributedDataParallel hears of gradients through the graph nodes that add them up. A parameter that gets
storage of another dtype, as half-precision ones do while an optimizer works on them in float32 (rounding.py), gets a
new such node, of which it does not hear: from the second update on, each process would train by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator

BUCKET = 2**25  # numbers that are sent at a time: 64 MiB in half precision


@torch.no_grad()
def exchange_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter], *, may_differ: bool) -> None:
    """Make each gradient the mean of all processes' gradients. All processes call it with the same parameters.

    `may_differ`: some processes may lack gradients that others have, which then count as 0; the host waits for the
    device to find out. Parameters without a gradient on any process keep none.
    """
    if may_differ:
        _complete(accelerator, parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]) / accelerator.num_processes
        total = accelerator.reduce(flat, "sum")
        assert isinstance(total, torch.Tensor)
        parts = total.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


def _complete(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give a gradient of zeros to what has one elsewhere."""
    there = [float(parameter.grad is not None) for parameter in parameters]
    counts = accelerator.reduce(torch.tensor(there, device=accelerator.device), "sum")
    assert isinstance(counts, torch.Tensor)
    for parameter, count in zip(parameters, counts.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one dtype in a row, up to BUCKET numbers at a time; a larger one is alone."""
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        size = sum(other.numel() for other in bucket) + gradient.numel()
        if bucket and (size > BUCKET or gradient.dtype is not bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
