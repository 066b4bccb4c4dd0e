"""CLIP (Radford et al. 2021, arXiv:2103.00020), which puts pictures and texts into one space.

Shape letters: B pictures or texts, C = 3 channels, H W pixels, T = 77 tokens, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from library.checkpoints.critics import CLIP_STEM, VISION, read_clip_config
from library.checkpoints.weights import open_component
from library.models.build import fill
from library.options import OptionError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training


def load_clip(folder: Path, *, dtype: torch.dtype, device: torch.device, flag: str) -> CLIPModel:
    """A CLIP model, frozen; OptionError naming `flag` where the folder lacks a part of it."""
    config = read_clip_config(folder, flag)
    if config.get("model_type") == VISION:
        raise OptionError(flag, f"{folder} is an image encoder alone", "name a whole CLIP model")
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig.from_dict(config))
    return _filled(model, folder, dtype, device, flag)


def load_clip_vision(
    folder: Path, *, dtype: torch.dtype, device: torch.device, flag: str
) -> CLIPVisionModelWithProjection:
    """The image encoder of a CLIP model, frozen; OptionError naming `flag` where the folder lacks a part of it."""
    config = read_clip_config(folder, flag)
    vision = config if config.get("model_type") == VISION else dict(config["vision_config"])
    if "projection_dim" in config:
        vision["projection_dim"] = config["projection_dim"]
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(vision))
    return _filled(model, folder, dtype, device, flag)


def _filled(model: Any, folder: Path, dtype: torch.dtype, device: torch.device, flag: str) -> Any:
    with open_component(folder, CLIP_STEM, flag) as weights:
        missing = sorted(set(model.state_dict()) - set(weights.shapes))
        if missing:
            problem = f"{folder} lacks {len(missing)} tensors of a CLIP model ({missing[0]} ...)"
            raise OptionError(flag, problem, "use a complete model")
        return fill(model, weights.tensor, dtype=dtype, device=device)


def image_embeddings(model: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, D) of unit length, float32, of pictures in [0, 1] of any size, which are squeezed to the model's square.

    Differentiable. `model` is one of those that are loaded here.
    """
    return F.normalize(projected_images(model, images_BCHW), dim=-1)


def projected_images(model: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
    """The same before it is brought to unit length."""
    weight = model.visual_projection.weight
    config = getattr(model.config, "vision_config", model.config)
    size = (config.image_size, config.image_size)
    images_BCHW = images_BCHW.to(weight.device, torch.float32)
    if images_BCHW.shape[-2:] != size:
        images_BCHW = F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values, device=weight.device).view(3, 1, 1) for values in (MEAN, STD))
    pixels_BCHW = ((images_BCHW - mean) / std).to(weight.dtype)
    return model.visual_projection(model.vision_model(pixel_values=pixels_BCHW).pooler_output).float()


def text_embeddings(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """(B, D) of unit length, float32, of token ids with begin and end, padded by the end token."""
    ids_BT = ids_BT.to(model.text_projection.weight.device)
    projected_BD = model.text_projection(model.text_model(input_ids=ids_BT).pooler_output)
    return F.normalize(projected_BD.float(), dim=-1)
