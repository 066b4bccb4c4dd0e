"""What decoding takes at least, and the sentence where that is not there."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints.architecture import VaeArchitecture
from library.generate.memory import check_fits, decoding_bytes, free_memory
from library.generate.request import GenerationRequest
from library.models import vae as vae_code
from library.models.build import VAE_SCALE, build_vae
from library.options import OptionError

VAE = VaeArchitecture(3, 4, (32, 64, 64, 64), resnets=1)
REQUEST = GenerationRequest("a", "", 64, 96, 1, 1.0, 1)


def largest_layer(vae: torch.nn.Module) -> int:
    """Bytes of the largest input and output of a convolution while a picture of the request's size is decoded."""
    sizes = []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].nbytes + output.nbytes))
    with torch.no_grad():
        vae_code.decode(vae, torch.zeros(1, 4, 12, 8))
    return max(sizes)


def test_it_is_the_largest_layer_of_the_decoder() -> None:
    vae = build_vae(VAE, scale=VAE_SCALE)
    assert decoding_bytes(64, 96, vae.config["block_out_channels"], 4) == largest_layer(vae)


def test_what_does_not_fit_is_said() -> None:
    vae = build_vae(VAE, scale=VAE_SCALE)
    needed = decoding_bytes(64, 96, vae.config["block_out_channels"], 4)
    check_fits([REQUEST] * 4, vae, 1, needed)
    with pytest.raises(OptionError, match=r"^a picture of 64x96 would take at least .* GB of memory, and .* are free"):
        check_fits([REQUEST], vae, 1, needed - 1)
    with pytest.raises(OptionError, match=r"^2 pictures of 64x96 would .*; use --vae_batch_size 1"):
        check_fits([REQUEST] * 4, vae, 2, needed)


def test_the_machine_tells_what_is_free() -> None:
    free = free_memory()
    assert free is None or 10**8 < free < 10**15
