"""A VAE in strips makes the same pictures and latents, and holds less at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.models import vae
from library.models.build import build_vae
from library.models.vae_strips import compute_in_strips
from tests.tiny_models import VAE


def made() -> Any:
    torch.manual_seed(0)
    return build_vae(VAE).eval().requires_grad_(False)


@pytest.mark.parametrize("strips", [1, 3, 16, 1000])
def test_the_same_picture_and_the_same_latents(strips: int) -> None:
    whole, sliced = made(), made()
    compute_in_strips(sliced, strips)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 9, 8, generator=generator)
    images = torch.rand(2, 3, 72, 64, generator=generator) * 2 - 1
    assert (vae.decode(whole, latents) - vae.decode(sliced, latents)).abs().max() < 1e-4
    noise = torch.randn(2, 4, 9, 8, generator=generator)
    assert (vae.encode(whole, images, noise) - vae.encode(sliced, images, noise)).abs().max() < 1e-4


def test_no_layer_sees_more_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.models import vae_strips

    heights = []
    convolve = vae_strips.conv2d

    def see(image: torch.Tensor, *arguments: Any) -> torch.Tensor:
        heights.append(image.shape[2])
        return convolve(image, *arguments)

    sliced = made()
    compute_in_strips(sliced, 8)
    monkeypatch.setattr(vae_strips, "conv2d", see)
    vae.decode(sliced, torch.zeros(1, 4, 8, 8))
    assert max(heights) == 64 // 8 + 2, "an eighth of the rows and one on each side"


def test_half_precision_in_strips() -> None:
    whole, sliced = made().bfloat16(), made().bfloat16()
    compute_in_strips(sliced, 4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    difference = (vae.decode(whole, latents) - vae.decode(sliced, latents)).abs()
    assert difference.mean() < 0.02
