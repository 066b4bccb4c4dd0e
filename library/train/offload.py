"""Activations in the CPU's memory between the forward and the backward pass.

With gradient checkpointing a block keeps nothing but its inputs; these are what is moved here. Copies to the CPU run
on a stream of their own beside the computation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

SMALLEST = 1 << 16  # bytes; a smaller tensor is not worth a copy


class ActivationOffload:
    """A context around a forward pass in which what autograd saves of the activations goes to the CPU.

    The weights of `module` stay where they are, and so does what is small.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self._streams: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        kept = itertools.chain(self.module.parameters(), self.module.buffers())
        weights = frozenset(tensor.untyped_storage().data_ptr() for tensor in kept)

        def pack(tensor: torch.Tensor) -> Any:
            is_large = tensor.numel() * tensor.element_size() >= SMALLEST
            if not is_large or tensor.untyped_storage().data_ptr() in weights:
                return tensor.detach()  # a tensor that is kept as it is would keep its own graph alive
            return tensor.device, self._to_cpu(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._back):
            yield

    def _to_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor.detach().to("cpu", copy=True)
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream = self._streams[tensor.device]
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            copy.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)  # its memory may be used again only after the copy
        return copy

    def _back(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, copy = packed
        if device in self._streams:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        return copy.to(device, non_blocking=True)
