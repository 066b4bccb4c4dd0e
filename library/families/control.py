"""A ControlNet beside the U-Net of either family (Zhang et al. 2023, arXiv:2302.05543).

Shape letters: B rows, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

import torch

from library.families.base import Conditioning, Residuals


def control_residuals(
    control_net: torch.nn.Module,
    noised_BChw: torch.Tensor,
    timesteps_B: torch.Tensor,
    conditioning: Conditioning,
    hint_BCHW: torch.Tensor,
    weight: float = 1.0,
) -> Residuals:
    """What `control_net` adds to the U-Net for the same input; differentiable.

    `hint_BCHW` are guide images in [0, 1], 8 times as high and wide as the latents. `weight` multiplies the result.
    """
    dtype = noised_BChw.dtype
    down, mid = control_net(
        noised_BChw,
        timesteps_B,
        conditioning.context_BTD.to(dtype),
        hint_BCHW.to(dtype),
        conditioning_scale=weight,
        added_cond_kwargs=conditioning.added_inputs(dtype),
        return_dict=False,
    )
    return Residuals(tuple(down), mid)
