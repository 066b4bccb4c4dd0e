"""A LoRA of full-size SD 1.5: trained by the real script, loaded by diffusers, drawn by both: the same picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from library.families.sd import StableDiffusion
from library.generate.denoise import decode, denoise
from library.generate.request import GenerationRequest
from networks.lora import create_network_from_weights
from tests.diffusers_reference import diffusers_pipeline, load
from tests.full_size import write_full_size
from tests.runs import train_network
from tests.tiny_data import tiny_images

REQUEST = GenerationRequest("a photo of a cat", "blurry", 64, 64, 3, 5.0, 7, sampler="euler")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_trained_here_drawn_there(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("peft")
    model = write_full_size(scratch / "model.safetensors", "sd1", torch.float16)
    tiny_images(scratch / "images", 2, sizes=[(64, 64)])
    code = train_network(
        pretrained_model_name_or_path=model, train_data_dir=scratch / "images", output_dir=scratch, output_name="lora",
        network_module="networks.lora", network_dim=4, network_alpha=4, resolution=64, max_train_steps=3, seed=1,
        learning_rate=0.02, max_data_loader_n_workers=0, cache_latents=True,
    )  # fmt: skip
    assert code == 0
    tensors = load_file(scratch / "lora.safetensors")
    modules = {name.rsplit(".", 2 if name.endswith(".weight") else 1)[0] for name in tensors}
    assert len(modules) == 264 and len(tensors) == 3 * 264
    assert sum(name.startswith("lora_te_") for name in modules) == 72

    bundle = load(model)
    pipeline = diffusers_pipeline(bundle, scratch / "folder", "euler")
    plain = drawn(bundle)
    network, weights = create_network_from_weights(
        1.0, str(scratch / "lora.safetensors"), bundle.vae, bundle.text_encoders[0], bundle.unet, for_inference=True
    )
    network.apply_to(bundle.text_encoders[0], bundle.unet)
    assert not network.load_state_dict(weights, strict=False).unexpected_keys
    ours = drawn(bundle)
    pipeline.load_lora_weights(scratch / "lora.safetensors")
    assert not [record for record in caplog.records if "unexpected" in record.getMessage().lower()]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(REQUEST.seed))
    theirs = pipeline(
        prompt=REQUEST.prompt, negative_prompt=REQUEST.negative_prompt, width=64, height=64, num_inference_steps=3,
        guidance_scale=5.0, latents=noise, output_type="np",
    ).images  # fmt: skip
    difference = np.abs(ours - theirs).mean() * 255
    print(f"mean difference {difference:.4f} of 255 levels; the LoRA changes {np.abs(ours - plain).mean() * 255:.2f}")
    assert difference < 1
    assert np.abs(ours - plain).mean() > 10 * np.abs(ours - theirs).mean()


def drawn(bundle) -> np.ndarray:
    return decode(bundle, denoise(StableDiffusion(), bundle, [REQUEST])).numpy() / 255
