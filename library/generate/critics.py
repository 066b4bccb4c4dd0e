"""Guidance by networks that look at the picture: CLIP and VGG16 pull it along the gradient of their judgement.

At each step the clean picture is estimated from the U-Net's prediction c for the prompt and judged; with g, the
gradient of the judgement with respect to the latents z, downhill,

    DDIM, PNDM:  epsilon <- epsilon - sqrt(1 - alpha-bar) g        (Dhariwal and Nichol 2021, algorithm 2)
    LMS:         z <- z + sigma^2 g

What is judged is x0 sqrt(1 - alpha-bar) + z (1 - sqrt(1 - alpha-bar)) with the estimate x0, for LMS x0 itself, as the
trade's scripts (and diffusers' CLIP guided pipeline) do.

Shape letters: B pictures, C channels, h w latent pixels, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from library.checkpoints.critics import check_vgg16, find_clip
from library.families.base import Conditioning, LoadPlan
from library.generate.control_options import Preprocessor
from library.generate.critic_options import CLIP_MODEL, VGG16_MODEL, CriticOptions
from library.generate.drawing import Drawing, Part
from library.generate.guidance import prompt_rows
from library.generate.hints import hints
from library.generate.request import GenerationRequest
from library.models import vae
from library.models.clip import image_embeddings, load_clip, text_embeddings
from library.models.vgg import load_vgg16, vgg_features
from library.text.prompt_weights import BREAK, parse_prompt_weights
from library.text.tokens import ClipTokenizer


class Critic(Protocol):
    """A judge of pictures."""

    def target(self, requests: Sequence[GenerationRequest]) -> torch.Tensor:
        """What the pictures shall come near to, one row for each."""
        ...

    def distance(self, images_BCHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """How far each picture, in [0, 1], is from that: (B,), float32, differentiable."""
        ...


@dataclass
class ClipTextCritic:
    """CLIP compares the picture with a text."""

    model: Any
    scale: float

    def target(self, requests: Sequence[GenerationRequest]) -> torch.Tensor:
        texts = [plain_text(request.prompt) if request.clip_prompt is None else request.clip_prompt
                 for request in requests]  # fmt: skip
        return text_embeddings(self.model, ClipTokenizer("eos").windows(texts, 1)[:, 0])

    def distance(self, images_BCHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.scale * spherical_distance(image_embeddings(self.model, images_BCHW), target)


@dataclass
class ClipImageCritic:
    """CLIP compares the picture with its guide image."""

    model: Any
    scale: float

    def target(self, requests: Sequence[GenerationRequest]) -> torch.Tensor:
        return image_embeddings(self.model, hints(requests, 0, Preprocessor()))

    def distance(self, images_BCHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.scale * spherical_distance(image_embeddings(self.model, images_BCHW), target)


@dataclass
class Vgg16Critic:
    """A layer of VGG16 compares the picture with its guide image."""

    net: torch.nn.Sequential
    scale: float

    def target(self, requests: Sequence[GenerationRequest]) -> torch.Tensor:
        return vgg_features(self.net, hints(requests, 0, Preprocessor()))

    def distance(self, images_BCHW: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.scale * (vgg_features(self.net, images_BCHW) - target).square().flatten(1).mean(1)


def spherical_distance(one_BD: torch.Tensor, other_BD: torch.Tensor) -> torch.Tensor:
    """2 asin^2(|x - y| / 2) of vectors of unit length: half the square of the angle between them."""
    half = (one_BD - other_BD).norm(dim=-1) / 2
    return 2 * half.clamp(max=1 - 1e-6).asin().square()


def plain_text(prompt: str) -> str:
    """A prompt without the signs of its emphasis."""
    return " ".join("".join(" " if part == BREAK else part[0] for part in parse_prompt_weights(prompt)).split())


def critic_guidance(options: CriticOptions, plan: LoadPlan) -> list[Part]:
    """The guidance that the options ask for, with its networks in float32; OptionError where one is incomplete."""
    critics: list[Critic] = []
    if options.clip_guidance_scale or options.clip_image_guidance_scale:
        folder = find_clip(str(options.clip_guidance_model), CLIP_MODEL)
        clip = load_clip(folder, dtype=torch.float32, device=plan.device, flag=CLIP_MODEL)
        if options.clip_guidance_scale:
            critics.append(ClipTextCritic(clip, options.clip_guidance_scale))
        if options.clip_image_guidance_scale:
            critics.append(ClipImageCritic(clip, options.clip_image_guidance_scale))
    if options.vgg16_guidance_scale:
        layer = options.vgg16_guidance_layer
        path = check_vgg16(str(options.vgg16_model), layer, VGG16_MODEL)
        net = load_vgg16(path, layer, dtype=torch.float32, device=plan.device)
        critics.append(Vgg16Critic(net, options.vgg16_guidance_scale))
    return [CriticGuidance(critics)] if critics else []


class CriticGuidance(Part):
    """Pulls each picture to where its critics are content. Must be the last of the parts: it asks the U-Net again."""

    def __init__(self, critics: Sequence[Critic]) -> None:
        self.critics = critics
        self._targets: list[torch.Tensor] = []
        self._conditioning: Conditioning | None = None

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        self._targets = [critic.target(drawing.requests) for critic in self.critics]
        try:
            yield
        finally:
            self._targets, self._conditioning = [], None

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        self._conditioning = conditioning
        return conditioning

    def guide(self, drawing: Drawing, prediction_BChw: torch.Tensor) -> torch.Tensor:
        scheduler: Any = drawing.scheduler
        sigma = _sigma(scheduler)
        if sigma is not None:
            drawing.latents_BChw = drawing.latents_BChw + sigma**2 * self._gradient(drawing)
            return prediction_BChw
        alpha_bar = float(scheduler.alphas_cumprod[drawing.timestep])
        if alpha_bar == 0:  # a first step from pure noise (zero terminal SNR) shows nothing to judge
            return prediction_BChw
        change_BChw = -((1 - alpha_bar) ** 0.5) * self._gradient(drawing)  # of epsilon
        # a velocity sqrt(alpha-bar) epsilon - sqrt(1 - alpha-bar) x0 changes by this much with epsilon at fixed z
        return prediction_BChw + (change_BChw / alpha_bar**0.5 if _is_velocity(scheduler) else change_BChw)

    def _gradient(self, drawing: Drawing) -> torch.Tensor:
        """g, of the latents' shape: downhill for the critics together."""
        assert self._conditioning is not None
        conditioning = self._conditioning.rows(prompt_rows(drawing.first, len(drawing.requests)))
        with torch.enable_grad():
            latents_BChw = drawing.latents_BChw.detach().requires_grad_()
            prediction_BChw = drawing.predict(latents_BChw, conditioning)
            judged_BChw = _judged(drawing, latents_BChw, prediction_BChw)
            images_BCHW = vae.decode(drawing.bundle.vae, judged_BChw / drawing.family.latent_scale) / 2 + 0.5
            distances_B = [
                critic.distance(images_BCHW, target) for critic, target in zip(self.critics, self._targets, strict=True)
            ]
            (gradient_BChw,) = torch.autograd.grad(torch.stack(distances_B).sum(), latents_BChw)
        return -gradient_BChw


def _sigma(scheduler: Any) -> float | None:
    """The standard deviation of the noise at the step at hand, for samplers that count so: LMS."""
    return float(scheduler.sigmas[scheduler.step_index]) if hasattr(scheduler, "sigmas") else None


def _is_velocity(scheduler: Any) -> bool:
    return scheduler.config.prediction_type == "v_prediction"


def _judged(drawing: Drawing, latents_BChw: torch.Tensor, prediction_BChw: torch.Tensor) -> torch.Tensor:
    """The latents of what the critics see: the estimate of the clean picture, mixed with what there is."""
    scheduler: Any = drawing.scheduler
    sigma = _sigma(scheduler)
    if sigma is not None:
        if _is_velocity(scheduler):
            return latents_BChw / (sigma**2 + 1) - prediction_BChw * sigma / (sigma**2 + 1) ** 0.5
        return latents_BChw - sigma * prediction_BChw
    alpha_bar = float(scheduler.alphas_cumprod[drawing.timestep])
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if _is_velocity(scheduler):
        clean_BChw = signal * latents_BChw - noise * prediction_BChw
    else:
        clean_BChw = (latents_BChw - noise * prediction_BChw) / signal
    return clean_BChw * noise + latents_BChw * (1 - noise)
