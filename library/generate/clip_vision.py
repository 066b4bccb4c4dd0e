"""What CLIP sees in a picture in place of the pooled text (SDXL).

SDXL's second text encoder and its image encoder share a space, so the embedding of a picture can stand where the U-Net
expects that of the prompt; revision is another name of this.

Shape letters: B pictures, P pooled features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from library.checkpoints.architecture import SIZE_NUMBERS, SIZE_WIDTH
from library.checkpoints.critics import find_clip
from library.families.base import Conditioning, LoadPlan, ModelBundle
from library.generate.critic_options import USUAL_CLIP_VISION, VISION_MODEL, ClipVisionOptions
from library.generate.drawing import Drawing, Part
from library.generate.guidance import parts_rows
from library.generate.request import GenerationRequest
from library.generate.start import picture
from library.models.clip import load_clip_vision, projected_images
from library.options import require


def clip_vision(options: ClipVisionOptions, bundle: ModelBundle, plan: LoadPlan) -> list[Part]:
    """The part that the options ask for; OptionError for a CLIP model of another width."""
    if options.clip_vision_strength is None:
        return []
    folder = find_clip(str(options.clip_vision_model), VISION_MODEL)
    model = load_clip_vision(folder, dtype=plan.text_encoders, device=plan.device, flag=VISION_MODEL)
    unet: Any = bundle.unet
    width = unet.config.projection_class_embeddings_input_dim - SIZE_NUMBERS * SIZE_WIDTH
    own = model.config.projection_dim
    problem = f"{folder} sees pictures in {own} numbers, this model's pooled text has {width}"
    require(own == width, VISION_MODEL, problem, f"use {USUAL_CLIP_VISION}")
    return [ClipVision(model, options.clip_vision_strength)]


class ClipVision(Part):
    """Replaces the pooled text of the prompt by what CLIP sees in the picture that a drawing starts from."""

    def __init__(self, model: Any, strength: float) -> None:
        self.model = model
        self.strength = strength
        self._seen_BP: torch.Tensor | None = None

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        size = self.model.config.image_size
        pictures = torch.stack([_cut_square(request, size) for request in drawing.requests])
        self._seen_BP = projected_images(self.model, pictures) * self.strength
        try:
            yield
        finally:
            self._seen_BP = None

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        assert self._seen_BP is not None and conditioning.vector_BD is not None
        vector_RP = conditioning.vector_BD.clone()
        rows = parts_rows(drawing.first, len(drawing.requests))
        vector_RP[rows] = self._seen_BP.to(vector_RP).repeat(len(vector_RP[rows]) // len(self._seen_BP), 1)
        return replace(conditioning, vector_BD=vector_RP)


def _cut_square(request: GenerationRequest, size: int) -> torch.Tensor:
    """(3, size, size) in [0, 1]: the middle of the picture that a request, or its first stage, starts from."""
    first = request.first_stage or request
    square = ImageOps.fit(picture(first.image, "--image_path"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
