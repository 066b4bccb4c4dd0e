"""SDXL files under test: loaded, saved, changed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions

FAMILY = StableDiffusionXL()


def load(path: Path | str, dtype: torch.dtype = torch.float32, **options) -> ModelBundle:
    plan = LoadPlan(dtype, dtype, dtype, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(path), **options), AttentionOptions(), plan)


def save(bundle: ModelBundle, path: Path, dtype: torch.dtype | None = None, metadata: dict | None = None) -> Path:
    FAMILY.save(bundle, path, dtype=dtype, metadata=metadata or {}, as_diffusers=not path.suffix)
    return path


def rewritten(source: Path, path: Path, rename=lambda name: name, change=lambda name, tensor: tensor) -> Path:
    """A copy of a file with names and tensors changed; a name that becomes "" is left out."""
    content = {rename(name): change(name, tensor).contiguous() for name, tensor in load_file(source).items()}
    content.pop("", None)
    save_file(content, path)
    return path
