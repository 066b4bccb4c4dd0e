"""Extended textual inversion (Voynov et al. 2023, arXiv:2303.09522): each cross-attention layer has its own context.

A conditioning then holds the contexts of all layers side by side: T tokens of 16 D features. Whatever chooses among its
rows need not know of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from library.generate.drawing import Drawing, Part
from library.text.added_words import NUM_LAYERS


class LayeredContexts(Part):
    """Lets each cross-attention layer of the U-Net see its own share of the context."""

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        transformers = cross_attention_layers(drawing.bundle.unet)
        assert len(transformers) == NUM_LAYERS, "SD 1.x and 2.x have as many"
        with ExitStack() as hooks:
            for index, transformer in enumerate(transformers):
                hook = _share(index)
                hooks.callback(transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def cross_attention_layers(unet: Any) -> list[torch.nn.Module]:
    """The U-Net's transformers from its input to its output: (hidden states, encoder_hidden_states=context)."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [transformer for block in blocks for transformer in getattr(block, "attentions", ())]


def _share(index: int) -> Any:
    def hook(_module: torch.nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context_BTD = kwargs["encoder_hidden_states"].chunk(NUM_LAYERS, dim=-1)[index]
        return inputs, kwargs | {"encoder_hidden_states": context_BTD}

    return hook
