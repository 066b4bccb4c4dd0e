"""Classifier-free guidance (Ho and Salimans 2022) and composition (Liu et al. 2022, arXiv:2206.01714).

A request's `texts` are asked about side by side, each a group of rows of the U-Net, in the order negative, then each
part of the prompt, then the empty prompt where the negative one has a scale of its own. In regional use all parts share
one group, see library.generate.region_map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.generate.request import GenerationRequest


def guided(request: GenerationRequest, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
    """One prediction of those for the request's `texts`: u + scale * sum of w (c - u) over the parts c and weights w.

    u is the negative prompt's. That is composition by conjunction (equation 11 there); a single part has the weight 1,
    which leaves classifier-free guidance. A scale below 1 counts as 1.

    With a negative scale k both prompts are measured from the empty one's e: e + scale * sum of w (c - e) - k (u - e),
    as the trade does.
    """
    if not request.is_guided:
        (positive_BChw,) = predictions
        return positive_BChw
    negative_BChw, *parts = predictions
    origin_BChw = parts.pop() if request.weighs_negative else negative_BChw
    changes = [
        weight * (part_BChw - origin_BChw) for weight, part_BChw in zip(request.part_weights, parts, strict=True)
    ]
    guided_BChw = origin_BChw + max(request.scale, 1.0) * torch.stack(changes).sum(0)
    if request.negative_scale is None:
        return guided_BChw
    return guided_BChw - request.negative_scale * (negative_BChw - origin_BChw)


def prompt_rows(request: GenerationRequest, num_pictures: int) -> slice:
    """The rows of the prompt's last part among those of the U-Net."""
    end = parts_rows(request, num_pictures).stop
    return slice(end - num_pictures, end)


def parts_rows(request: GenerationRequest, num_pictures: int) -> slice:
    """The rows of all parts of the prompt."""
    start = num_pictures * request.is_guided
    return slice(start, start + num_pictures * len(request.part_weights))
