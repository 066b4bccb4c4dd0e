"""Taking networks off a model again, whoever wrote them: they come by replacing forwards or by hooks of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

OWN = (
    "forward",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


@contextlib.contextmanager
def networks_taken_off(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """A block at whose end all layers compute as before it. Weights that are changed in it stay so."""
    layers = [layer for model in models for layer in model.modules()]
    before = [{name: _copied(vars(layer)[name]) for name in OWN if name in vars(layer)} for layer in layers]
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            for name in OWN:
                if name in kept:
                    vars(layer)[name] = kept[name]
                else:
                    vars(layer).pop(name, None)


def _copied(value: object) -> object:
    return value.copy() if isinstance(value, dict) else value
