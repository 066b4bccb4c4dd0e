"""Tiny CLIP and VGG16 models for tests: real layouts, random weights, few channels."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from library.checkpoints.critics import vgg16_convolutions
from library.checkpoints.safetensors_io import save_file


def tiny_clip(folder: Path, projection: int = 24, seed: int = 0) -> Path:
    """A whole CLIP model in a folder of Hugging Face form: pictures of 32 x 32."""
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=dict(layers),
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=projection,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 if "embedding" in name else 0.25)
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str), encoding="utf-8")
    return folder


def tiny_vgg16(path: Path, seed: int = 0) -> Path:
    """VGG16's weights as torchvision writes them, of 4 channels in the first block, 8 in the second and so on."""
    generator = torch.Generator().manual_seed(seed)
    tensors, inputs = {}, 3
    for place, block in vgg16_convolutions().items():
        outputs = 4 * 2 ** min(block, 3)
        tensors[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) / inputs**0.5 / 2
        tensors[f"features.{place}.bias"] = torch.randn(outputs, generator=generator) / 10
        inputs = outputs
    torch.save({**tensors, "classifier.0.weight": torch.ones(2, 2)}, path)
    return path
