"""Which parameters on the way of the text have a say in what conditions: others never get a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.families.base import ModelBundle, ModelFamily
from library.families.options import TextOptions


def reached_by_text(
    family: ModelFamily, bundle: ModelBundle, text: TextOptions, parameters: Sequence[torch.nn.Parameter]
) -> list[bool]:
    """For each parameter whether encoded text depends on it; found by encoding the empty caption once.

    Layers behind the one that is taken, as clip skip has it, are not reached. What drops out by chance must be switched
    off before.
    """
    if not parameters:
        return []
    device = next(bundle.text_encoders[0].parameters()).device
    token_ids = [ids.to(device) for ids in family.tokenize(bundle.tokenizers, [""], 1).ids]
    with torch.enable_grad():
        said = family.encode_text(bundle.text_encoders, token_ids, text)
        states = [states for states in said.tensors if states.requires_grad]
        total = sum((part.float().sum() for part in states), torch.zeros((), device=device))
    if not states:
        return [False] * len(parameters)
    return [gradient is not None for gradient in torch.autograd.grad(total, parameters, allow_unused=True)]
