"""Classifier-free guidance (Ho and Salimans 2022): which texts the U-Net is asked about, and what follows of them.

A request's `texts` are asked about side by side, each a group of rows of the U-Net, in the order negative, positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.generate.request import GenerationRequest


def guided(request: GenerationRequest, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
    """One prediction of those for the request's `texts`: u + scale (c - u) of the negative u and the positive c."""
    if not request.is_guided:
        (positive_BChw,) = predictions
        return positive_BChw
    negative_BChw, positive_BChw = predictions
    return negative_BChw + request.scale * (positive_BChw - negative_BChw)


def prompt_rows(request: GenerationRequest, num_pictures: int) -> slice:
    """The rows of the prompt itself among those of the U-Net."""
    start = num_pictures if request.is_guided else 0
    return slice(start, start + num_pictures)
