"""DoRA files of diffusers and PEFT are read as they mean it. (diffusers drops the norms of the trade's files.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.models.build import build_unet
from networks.lora import create_network_from_weights
from tests.tiny_models import UNETS
from tests.tiny_networks import tiny_parts

pytest.importorskip("peft")

IDS = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def drawn(unet: Any, states: torch.Tensor) -> torch.Tensor:
    return unet(LATENTS, torch.tensor([10, 700]), states, return_dict=False)[0]


def drawn_by_us(file: Path, text_encoder: Any, unet: Any) -> torch.Tensor:
    network, tensors = create_network_from_weights(1.0, file, None, text_encoder, unet, for_inference=True)
    network.apply_to(text_encoder, unet)
    info = network.load_weights(file)
    assert not info.missing_keys and not info.unexpected_keys and len(tensors) == len(load_file(file))
    return drawn(unet, text_encoder(IDS))


@torch.no_grad()
def test_we_read_files_of_peft(tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    text_encoder, unet = tiny_parts()
    theirs = build_unet(UNETS["sd1"])
    theirs.load_state_dict(unet.state_dict())
    names = ["to_q", "to_v", "ff.net.2", "conv1", "proj_out"]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=names, init_lora_weights=False))
    for key, parameter in theirs.named_parameters():
        if "lora_magnitude_vector" in key:
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
    layers = {key: value.contiguous() for key, value in get_peft_model_state_dict(theirs).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    (file,) = tmp_path.glob("*.safetensors")
    wanted = drawn(theirs.eval(), text_encoder(IDS))
    assert not torch.allclose(wanted, drawn(unet, text_encoder(IDS)), atol=1e-2)
    torch.testing.assert_close(drawn_by_us(file, text_encoder, unet), wanted, atol=1e-4, rtol=1e-3)
