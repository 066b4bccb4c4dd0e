"""Options of guidance by networks that look at the picture: CLIP and VGG16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.critics import VGG16_LAYERS, check_vgg16, find_clip
from library.generate.control_options import GUIDE
from library.generate.options import check_factor
from library.generate.request import GenerationRequest
from library.options import opt, require

logger = logging.getLogger(__name__)

GRADIENT_SAMPLERS = ("ddim", "pndm", "lms", "k_lms")
CLIP_SCALE = "--clip_guidance_scale"
CLIP_MODEL = "--clip_guidance_model"
VGG16_MODEL = "--vgg16_model"
VISION_MODEL = "--clip_vision_model"
LARGEST_SCALE = 1e6
USUAL_CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
USUAL_CLIP_VISION = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"  # its space is that of SDXL's pooled text


@dataclass(frozen=True)
class CriticOptions:
    """Guidance by networks that look at the picture after each step: slow, and with ddim, pndm and lms alone."""

    clip_guidance_scale: float | None = opt(
        help="how much CLIP pulls the picture to its prompt, or to the text of --c in its line; 100 is usual"
    )
    clip_image_guidance_scale: float | None = opt(
        help="how much CLIP pulls the picture to what its guide image (--guide_image_path) shows"
    )
    clip_guidance_model: str | None = opt(
        help=f"CLIP model for that: a folder of Hugging Face form, or a hub id such as {USUAL_CLIP}"
    )
    vgg16_guidance_scale: float | None = opt(
        help="how much VGG16 pulls the picture to its guide image, in texture and form"
    )
    vgg16_guidance_layer: int = opt(20, help="layer of VGG16 that is compared, 0 to 30: early texture, late form")
    vgg16_model: str | None = opt(help="VGG16's weights: torchvision's file vgg16-397923af.pth")

    def __post_init__(self) -> None:
        for name, scale in self._scales.items():
            require(scale is None or scale >= 0, f"--{name}", f"{scale} is below 0", "leave it out to switch it off")
            check_factor(f"--{name}", scale, "100", LARGEST_SCALE)
        needs_clip = bool(self.clip_guidance_scale or self.clip_image_guidance_scale)
        way_out = f"name a folder of Hugging Face form, or a hub id such as {USUAL_CLIP}"
        require(not needs_clip or bool(self.clip_guidance_model), CLIP_MODEL, "CLIP guidance needs CLIP", way_out)
        way_out = "name torchvision's file, vgg16-397923af.pth"
        has_vgg16 = not self.vgg16_guidance_scale or bool(self.vgg16_model)
        require(has_vgg16, VGG16_MODEL, "VGG16 guidance needs its weights", way_out)
        layer = self.vgg16_guidance_layer
        in_range = 0 <= layer < VGG16_LAYERS
        require(in_range, "--vgg16_guidance_layer", f"{layer} is out of range", f"use 0 to {VGG16_LAYERS - 1}")

    @property
    def _scales(self) -> Mapping[str, float | None]:
        names = ("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale")
        return {name: getattr(self, name) for name in names}

    @property
    def told(self) -> tuple[tuple[str, Any], ...]:
        """What pictures tell of it, by the names of the options; of models their names."""
        clip = self.clip_guidance_scale or self.clip_image_guidance_scale
        layer, model = "vgg16_guidance_layer", "clip_guidance_model"
        scales = [(name, scale) for name, scale in self._scales.items() if scale]
        layers = [(layer, self.vgg16_guidance_layer)] if self.vgg16_guidance_scale else []
        return (*scales, *layers, *([(model, Path(str(self.clip_guidance_model)).name)] if clip else []))

    @property
    def flags(self) -> tuple[str, ...]:
        """The guidances that are on."""
        return tuple(f"--{name}" for name, scale in self._scales.items() if scale)

    def check_models(self) -> None:
        """Raise OptionError for models that are not there; a hub id is fetched."""
        if self.clip_guidance_scale or self.clip_image_guidance_scale:
            find_clip(str(self.clip_guidance_model), CLIP_MODEL)
        if self.vgg16_guidance_scale:
            check_vgg16(str(self.vgg16_model), self.vgg16_guidance_layer, VGG16_MODEL)

    @property
    def needs_guides(self) -> bool:
        """Whether guide images are looked at."""
        return bool(self.clip_image_guidance_scale or self.vgg16_guidance_scale)

    def check_request(self, request: GenerationRequest, where: str) -> None:
        """Raise OptionError for a picture that can't be guided so; `where` names its line."""
        for flag in self.flags:
            is_known = request.sampler in GRADIENT_SAMPLERS
            way_out = f"use {', '.join(GRADIENT_SAMPLERS)}, or leave {flag} out"
            require(is_known, "--sampler", f"{request.sampler} can't be guided by a network", way_out)
            way_out = f"leave {flag} or --mask_path out"
            require(not request.is_regional, flag, "networks that work by regions can't be guided so", way_out)
            needs_guide = flag != CLIP_SCALE
            require(not needs_guide or bool(request.guide_images), GUIDE, f"{flag} has no guide image", "name one")
        if request.clip_prompt is not None and CLIP_SCALE not in self.flags:
            logger.warning("%s: --c has no effect without %s", where, CLIP_SCALE)


@dataclass(frozen=True)
class ClipVisionOptions:
    """A picture in place of the pooled text (SDXL)."""

    clip_vision_strength: float | None = opt(
        help="let what CLIP sees in the picture of --image_path, times this number, replace the pooled text; 1 is usual"
    )
    clip_vision_model: str | None = opt(
        help=f"CLIP model for that: a folder of Hugging Face form, or a hub id such as {USUAL_CLIP_VISION}"
    )

    def __post_init__(self) -> None:
        check_factor("--clip_vision_strength", self.clip_vision_strength, "1")
        way_out = f"name a folder of Hugging Face form, or a hub id such as {USUAL_CLIP_VISION}"
        has_model = self.clip_vision_strength is None or bool(self.clip_vision_model)
        require(has_model, VISION_MODEL, "--clip_vision_strength needs CLIP's image encoder", way_out)

    @property
    def told(self) -> tuple[tuple[str, Any], ...]:
        """What pictures tell of it, by the names of the options; of the model its name."""
        strength, model = self.clip_vision_strength, self.clip_vision_model
        told = (("clip_vision_strength", strength), ("clip_vision_model", Path(str(model)).name))
        return () if strength is None else told

    def check_model(self, image_path: str | None) -> None:
        """Raise OptionError where there is no model, which a hub id fetches, or no picture (--image_path)."""
        if self.clip_vision_strength is not None:
            require(image_path is not None, "--clip_vision_strength", "there is no picture to see", "add --image_path")
            find_clip(str(self.clip_vision_model), VISION_MODEL)
