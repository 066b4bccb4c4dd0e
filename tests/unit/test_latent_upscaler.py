"""tools.latent_upscaler: its files, its contract, and models of any family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.safetensors_io import save_file
from library.data.images import to_tensor
from library.generate.latent_upscaler import Upscaler
from library.models.build import SDXL_VAE_SCALE, VAE_SCALE, build_vae
from library.options import OptionError
from tests.tiny_models import VAE
from tools.latent_upscaler import create_upscaler


def upscaler_file(path: Path, *, is_new: bool = True, has_inner_biases: bool = False) -> Path:
    torch.manual_seed(0)
    network = Upscaler(has_inner_biases=has_inner_biases)
    if not is_new:
        torch.nn.init.normal_(network.conv_final.weight, std=0.1)
    save_file(network.state_dict(), path)
    return path


def test_the_names_of_its_file() -> None:
    names = set(Upscaler().state_dict())
    assert {"conv1.weight", "bn1.running_var", "resblock1.conv1.weight", "resblock20.bn2.bias"} <= names
    assert {"conv2.weight", "bn3.weight", "conv_final.weight", "conv_final.bias"} <= names
    assert not {"conv1.bias", "resblock1.conv1.bias", "resblock0.conv1.weight", "resblock21.conv1.weight"} & names


@pytest.mark.parametrize("scale", [VAE_SCALE, SDXL_VAE_SCALE])
def test_latents_are_scaled_as_the_family_has_them(tmp_path: Path, scale: float) -> None:
    torch.manual_seed(0)
    vae = build_vae(VAE, scale=scale).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[::-1].copy())]
    upscaler = create_upscaler(weights=str(upscaler_file(tmp_path / "up.safetensors", has_inner_biases=True)))
    assert not upscaler.support_latents()
    made = upscaler.upscale(vae, images, None, torch.float32, 128, 96, batch_size=2, vae_batch_size=2)
    assert made.shape == (2, 4, 12, 16)
    alone = upscaler.upscale(vae, images[1:], None, torch.float32, 128, 96)
    assert torch.allclose(made[1:], alone, atol=1e-5)
    other = create_upscaler(weights=str(upscaler_file(tmp_path / "trained.safetensors", is_new=False)))
    assert (other.upscale(vae, images[1:], None, torch.float32, 128, 96) - alone).abs().mean() > 1e-3
    enlarged = np.asarray(images[1].resize((128, 96), Image.Resampling.LANCZOS))
    with torch.no_grad():
        mean = vae.encode(to_tensor(enlarged)[None]).latent_dist.mean
    # a new upscaler adds the bias of its last layer and nothing else; the VAE's samples have their own deviation
    bias = upscaler.network.conv_final.bias.view(1, 4, 1, 1)
    assert torch.corrcoef(torch.stack([(alone / scale - bias).flatten(), mean.flatten()]))[0, 1] > 0.2
    assert (alone / scale).std() < 2 * (mean.std() + 1)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no file given"):
        create_upscaler()
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match=r"other.safetensors does not hold a latent upscaler"):
        create_upscaler(weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(OptionError, match="weights"):
        create_upscaler(weights=str(tmp_path / "missing.safetensors"))
