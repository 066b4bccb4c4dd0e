"""Network targets on tiny models, as the tests of NetworkTarget set them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from library.targets.network import NetworkTarget
from library.targets.options import NetworkOptions
from tests.tiny_networks import perturb

FAMILY = StableDiffusion()


def load(path: Path, dtype: torch.dtype = torch.float32) -> ModelBundle:
    plan = LoadPlan(unet=dtype, text_encoders=torch.float32, vae=torch.float32, device=torch.device("cpu"))
    return FAMILY.load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)


def target(text: TextOptions | None = None, **options: Any) -> NetworkTarget:
    return NetworkTarget(NetworkOptions(**{"network_module": "networks.lora", **options}), text)


def ready(bundle: ModelBundle, text: TextOptions | None = None, *, default_lr: float = 1e-3, **options: Any):
    """(target after setup, its groups as {name: (tensors, lr)})."""
    made = target(text, **options)
    made.setup(FAMILY, bundle, gradient_checkpointing=False)
    groups = made.param_groups(default_lr)
    return made, {group.name: (len(group.parameters), group.lr) for group in groups}


def trained_file(path: Path, bundle: ModelBundle, **options: Any) -> NetworkTarget:
    made, _ = ready(bundle, **options)
    perturb(made.trained_module())
    made.save(path, dtype=None, metadata={"ss_network_dim": "4"})
    return made
