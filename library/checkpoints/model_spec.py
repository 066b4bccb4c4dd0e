"""modelspec.* metadata: what a file is, in the words of Stability AI's model metadata standard 1.0.1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

STABILITY = "https://github.com/Stability-AI/generative-models"
DIFFUSERS = "diffusers"
WORDS = {
    None: "Checkpoint",
    "lora": "LoRA",
    "textual-inversion": "TextualInversion",
    "control-net-lllite": "ControlNet-LLLite",
}


@dataclass(frozen=True)
class ModelSpec:
    """What is known of a file to be written. Texts that are None are left out."""

    kind: str  # "sd1" | "sd2" | "sdxl"
    v_prediction: bool
    adapter: str | None = None  # "lora" | "textual-inversion" | "control-net-lllite"; None is a whole model
    as_diffusers: bool = False  # a whole model as a Diffusers folder
    title: str | None = None
    resolution: tuple[int, int] | None = None  # (width, height) in pixels
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    usage_hint: str | None = None
    trigger_phrase: str | None = None
    thumbnail: str | None = None  # data URL
    merged_from: str | None = None
    preprocessor: str | None = None
    is_negative_embedding: str | None = None
    timestep_range: tuple[int, int] | None = None  # (lowest, upper bound)
    clip_skip: int | None = None
    date: datetime = field(default_factory=datetime.now)  # local time


def model_spec_metadata(spec: ModelSpec) -> dict[str, str]:
    """The modelspec.* keys and texts of `spec`."""
    width, height = spec.resolution or (default_resolution(spec.kind, spec.v_prediction),) * 2
    is_diffusers = spec.as_diffusers or (spec.adapter == "lora" and spec.kind != "sdxl")
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(spec.kind, spec.v_prediction, spec.adapter),
        "modelspec.implementation": DIFFUSERS if is_diffusers else STABILITY,
        "modelspec.title": spec.title or f"{WORDS[spec.adapter]}@{int(spec.date.timestamp())}",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": spec.date.replace(microsecond=0, tzinfo=None).isoformat(),
        "modelspec.prediction_type": "v" if spec.v_prediction else "epsilon",
    }
    given = {
        "author": spec.author,
        "description": spec.description,
        "license": spec.license,
        "tags": spec.tags,
        "usage_hint": spec.usage_hint,
        "trigger_phrase": spec.trigger_phrase,
        "thumbnail": spec.thumbnail,
        "merged_from": spec.merged_from,
        "preprocessor": spec.preprocessor,
        "is_negative_embedding": spec.is_negative_embedding,
        "timestep_range": None if spec.timestep_range is None else "{},{}".format(*spec.timestep_range),
        "encoder_layer": None if spec.clip_skip is None else str(spec.clip_skip),
    }
    return metadata | {f"modelspec.{name}": text for name, text in given.items() if text is not None}


def architecture(kind: str, v_prediction: bool, adapter: str | None = None) -> str:
    """The name of the model's architecture, with "/lora" and the like for what hangs on a model."""
    base = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[kind]
    return f"{base}/{adapter}" if adapter else base


def default_resolution(kind: str, v_prediction: bool) -> int:
    """The side in pixels a model of this kind was trained at."""
    return 1024 if kind == "sdxl" else 768 if kind == "sd2" and v_prediction else 512


def resolution_of(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """(width, height) that a file's header says; None where it says nothing that can be understood."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", metadata.get("modelspec.resolution", ""))
    return (int(found[1]), int(found[2])) if found else None
