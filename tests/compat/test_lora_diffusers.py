"""Our LoRA files in diffusers' own loader: every key understood, the same text states and U-Net output as ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from library.models.build import build_unet, build_vae
from library.models.text_encoder import clip_config
from networks.lora import create_network
from tests.tiny_models import TEXT_ENCODERS, UNETS, VAE
from tests.tiny_networks import perturb, tiny_parts

pytest.importorskip("peft")

CASES = {
    "linear": ("sd1", {}),
    "linear sd2": ("sd2", {}),
    "conv": ("sd1", {"conv_dim": "2", "conv_alpha": "1.5"}),
    "conv sd2": ("sd2", {"conv_dim": "2", "conv_alpha": "1.5"}),
    "upper half": ("sd1", {"block_dims": ",".join(["0"] * 12 + ["2"] * 13)}),
}


def diffusers_pipeline(kind: str, text_encoder: Any, unet: Any) -> Any:
    """diffusers' own pipeline with the weights of our parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    theirs = CLIPTextModel(clip_config(TEXT_ENCODERS[kind]))
    weights = text_encoder.state_dict()
    if not hasattr(theirs, "text_model"):  # transformers 5
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    theirs.load_state_dict(weights)
    copy = build_unet(UNETS[kind])
    copy.load_state_dict(unet.state_dict())
    return StableDiffusionPipeline(
        vae=build_vae(VAE), text_encoder=theirs.eval(), tokenizer=None, unet=copy.eval(), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def lora_layers(model: torch.nn.Module) -> int:
    return sum(hasattr(module, "lora_A") for module in model.modules())


@pytest.mark.parametrize(("case", "dtype"), [*((case, None) for case in CASES), ("conv", torch.float16)])
def test_diffusers_loads_our_files(case: str, dtype: torch.dtype | None, tmp_path: Path, caplog: Any) -> None:
    kind, arguments = CASES[case]
    text_encoder, unet = tiny_parts(kind)
    pipeline = diffusers_pipeline(kind, text_encoder, unet)
    network = create_network(1.0, 4, 3.0, None, text_encoder, unet, **arguments)
    perturb(network)
    network.save_weights(tmp_path / "lora.safetensors", dtype, {"ss_network_dim": "4"})
    network.load_weights(tmp_path / "lora.safetensors")  # what half precision rounds, both sides round

    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([10, 700])
    with torch.no_grad():
        plain = unet(latents, timesteps, text_encoder(ids), return_dict=False)[0]
        network.apply_to(text_encoder, unet)
        states = text_encoder(ids)
        ours = unet(latents, timesteps, states, return_dict=False)[0]
        with caplog.at_level(logging.WARNING):
            logging.getLogger("diffusers").addHandler(caplog.handler)
            pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        their_states = pipeline.text_encoder(ids)[0]
        theirs = pipeline.unet(latents, timesteps, their_states, return_dict=False)[0]

    assert not [record for record in caplog.messages if "key" in record.lower()]
    assert lora_layers(pipeline.unet) == len(network.unet_adapters)
    assert lora_layers(pipeline.text_encoder) == len(network.text_adapters)
    torch.testing.assert_close(their_states, states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)
    assert (ours - plain).abs().mean() > 100 * (ours - theirs).abs().mean()
