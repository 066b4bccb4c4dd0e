"""LoRA files between diffusers and us: every key understood, the same text states and U-Net output on both sides.

Those of the relatives of networks.lora are such files too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.models.build import build_unet, build_vae
from library.models.text_encoder import clip_config
from networks import dylora, lora_fa
from networks.lora import create_network, create_network_from_weights
from networks.lora_files import diffusers_names
from tests.tiny_models import SECOND_TEXT_ENCODER, TEXT_ENCODERS, UNETS, VAE
from tests.tiny_networks import perturb, tiny_parts

pytest.importorskip("peft")

CASES = {
    "linear": ("sd1", create_network, {}),
    "linear sd2": ("sd2", create_network, {}),
    "conv": ("sd1", create_network, {"conv_dim": "2", "conv_alpha": "1.5"}),
    "conv sd2": ("sd2", create_network, {"conv_dim": "2", "conv_alpha": "1.5"}),
    "upper half": ("sd1", create_network, {"block_dims": ",".join(["0"] * 12 + ["2"] * 13)}),
    "frozen down": ("sd1", lora_fa.create_network, {"conv_dim": "2"}),
    "ranks in parts": ("sd2", dylora.create_network, {"conv_dim": "4", "conv_alpha": "1.5", "unit": "2"}),
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
    kind, create, arguments = CASES[case]
    text_encoder, unet = tiny_parts(kind)
    pipeline = diffusers_pipeline(kind, text_encoder, unet)
    network = create(1.0, 4, 3.0, None, text_encoder, unet, **arguments).eval()
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


# ---------------------------------------------------------------------------------------------- SDXL


def sdxl_pipeline(text_encoders: list[Any], unet: Any) -> Any:
    """diffusers' own SDXL pipeline with the weights of our parts."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = ((CLIPTextModel, TEXT_ENCODERS["sdxl"]), (CLIPTextModelWithProjection, SECOND_TEXT_ENCODER))
    theirs = []
    for (kind, sizes), ours in zip(kinds, text_encoders, strict=True):
        model = kind(clip_config(sizes))
        names = set(model.state_dict())
        weights = ours.state_dict().items()
        model.load_state_dict(
            {key if key in names else key.removeprefix("text_model."): value for key, value in weights}
        )
        theirs.append(model.eval())
    copy = build_unet(UNETS["sdxl"])
    copy.load_state_dict(unet.state_dict())
    return StableDiffusionXLPipeline(
        vae=build_vae(VAE), text_encoder=theirs[0], text_encoder_2=theirs[1], tokenizer=None, tokenizer_2=None,
        unet=copy.eval(), scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


SDXL_CASES = {
    "linear": (create_network, {}),
    "conv": (create_network, {"conv_dim": "2", "conv_alpha": "1.5"}),
    "output blocks": (create_network, {"block_dims": ",".join(["0"] * 13 + ["2"] * 10)}),
    "frozen down": (lora_fa.create_network, {"conv_dim": "2"}),
    "ranks in parts": (dylora.create_network, {"conv_dim": "4", "conv_alpha": "1.5", "unit": "2"}),
}


@torch.no_grad()
def sdxl_outputs(text_encoders: Any, unet: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states of both encoders' last layer but one, U-Net output) of ours or of transformers' encoders."""
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    states = []
    for encoder in text_encoders:
        if hasattr(encoder, "num_layers"):
            found = encoder(ids, layer_from_end=2, normalized=False)
            states.append(found[0] if isinstance(found, tuple) else found)
        else:
            states.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
    context = torch.cat(states, dim=-1)
    added = {"text_embeds": context[:, 0, -128:], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return context, unet(latents, torch.tensor([10, 700]), context, added_cond_kwargs=added).sample


@pytest.mark.parametrize("case", SDXL_CASES)
def test_diffusers_loads_our_sdxl_files(case: str, tmp_path: Path, caplog: Any) -> None:
    text_encoders, unet = tiny_parts("sdxl")
    pipeline = sdxl_pipeline(text_encoders, unet)
    create, arguments = SDXL_CASES[case]
    network = create(1.0, 4, 3.0, None, text_encoders, unet, **arguments).eval()
    perturb(network)
    network.save_weights(tmp_path / "lora.safetensors", None, {"ss_network_dim": "4"})
    plain = sdxl_outputs(text_encoders, unet)[1]
    network.apply_to(text_encoders, unet)
    states, ours = sdxl_outputs(text_encoders, unet)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    their_states, theirs = sdxl_outputs((pipeline.text_encoder, pipeline.text_encoder_2), pipeline.unet)
    assert not [record for record in caplog.messages if "key" in record.lower()]
    assert lora_layers(pipeline.unet) == len(network.unet_adapters)
    assert lora_layers(pipeline.text_encoder) + lora_layers(pipeline.text_encoder_2) == len(network.text_adapters)
    torch.testing.assert_close(their_states, states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)
    assert (ours - plain).abs().mean() > 100 * (ours - theirs).abs().mean()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_we_read_what_diffusers_writes(kind: str, tmp_path: Path) -> None:
    """A LoRA that peft made on diffusers' models, saved by the pipeline: the same network here."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    text_encoder, unet = tiny_parts(kind)
    pipeline = sdxl_pipeline(text_encoder, unet) if kind == "sdxl" else diffusers_pipeline(kind, text_encoder, unet)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=layers))
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"]))
    perturb(pipeline.unet)
    perturb(pipeline.text_encoder)
    writer = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    saved = {
        "unet_lora_layers": get_peft_model_state_dict(pipeline.unet),
        "text_encoder_lora_layers": get_peft_model_state_dict(pipeline.text_encoder),
    }
    writer.save_lora_weights(tmp_path, **saved, weight_name="theirs.safetensors")
    file = tmp_path / "theirs.safetensors"
    network, _ = create_network_from_weights(1.0, file, None, text_encoder, unet, for_inference=True)
    network.apply_to(text_encoder, unet)
    result = network.load_weights(file)
    assert not result.missing_keys and not result.unexpected_keys
    assert len(network.unet_adapters) == lora_layers(pipeline.unet)
    assert len(network.text_adapters) == lora_layers(pipeline.text_encoder)
    if kind == "sdxl":
        ours = sdxl_outputs(text_encoder, unet)[1]
        theirs = sdxl_outputs((pipeline.text_encoder, pipeline.text_encoder_2), pipeline.unet)[1]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_we_read_sdxl_files_with_diffusers_names(tmp_path: Path) -> None:
    """The trade's form, but layers named as in diffusers: the same network as with the trade's names."""
    text_encoders, unet = tiny_parts("sdxl")
    network = create_network(1.0, 4, 3.0, None, text_encoders, unet, conv_dim="2")
    perturb(network)
    to_theirs = {ours: theirs for theirs, ours in diffusers_names(unet).items()}
    tensors = network.state_dict()
    renamed = {
        f"{to_theirs.get(key.split('.')[0], key.split('.')[0])}.{key.split('.', 1)[1]}": tensors[key] for key in tensors
    }
    assert any(key.startswith("lora_unet_down_blocks_1_attentions_0_") for key in renamed)
    save_file(renamed, tmp_path / "theirs.safetensors")
    other_encoders, other_unet = tiny_parts("sdxl")
    again, _ = create_network_from_weights(1.0, tmp_path / "theirs.safetensors", None, other_encoders, other_unet)
    again.load_weights(tmp_path / "theirs.safetensors")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in again.state_dict().items())
    assert again.state_dict().keys() == tensors.keys()
