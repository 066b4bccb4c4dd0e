"""A load plan that names parts: the others are outlines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.checkpoints.probe import probe_any
from library.families.base import MODEL_PARTS, LoadPlan
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
from library.options import OptionError

FULL = torch.float32
PLAN = LoadPlan(unet=FULL, text_encoders=FULL, vae=FULL, device=torch.device("cpu"))


def is_read(module):
    (is_outline,) = {parameter.is_meta for parameter in module.parameters()}
    return not is_outline


@pytest.fixture(params=["file", "folder", "own VAE"])
def options(request, tiny_sdxl_path, tmp_path):
    if request.param == "file":
        return ModelOptions(str(tiny_sdxl_path))
    if request.param == "own VAE":
        return ModelOptions(str(tiny_sdxl_path), vae=str(tiny_sdxl_path))
    bundle = StableDiffusionXL().load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), PLAN)
    StableDiffusionXL().save(bundle, tmp_path / "folder", dtype=None, metadata={}, as_diffusers=True)
    return ModelOptions(str(tmp_path / "folder"))


@pytest.mark.parametrize("part", sorted(MODEL_PARTS))
def test_only_the_parts_of_the_plan_are_read(options, part):
    whole = StableDiffusionXL().load(options, AttentionOptions(), PLAN)
    bundle = StableDiffusionXL().load(options, AttentionOptions(), replace(PLAN, parts=frozenset({part})))
    modules = {"unet": [bundle.unet], "vae": [bundle.vae], "text_encoders": list(bundle.text_encoders)}
    for name, loaded in modules.items():
        assert all(is_read(module) == (name == part) for module in loaded), name
    named = zip(modules[part], [getattr(whole, part)] if part != "text_encoders" else whole.text_encoders, strict=True)
    for ours, theirs in named:
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_models_of_either_family_are_found(tiny_sd1_path, tiny_sd2_path, tiny_sdxl_path, tmp_path):
    kinds = [probe_any(str(path)).kind for path in (tiny_sd1_path, tiny_sd2_path, tiny_sdxl_path)]
    assert kinds == ["sd1", "sd2", "sdxl"]
    bundle = StableDiffusion().load(ModelOptions(str(tiny_sd2_path)), AttentionOptions(), PLAN)
    StableDiffusion().save(bundle, tmp_path / "folder", dtype=None, metadata={}, as_diffusers=True)
    assert probe_any(str(tmp_path / "folder"), v2=True).kind == "sd2"
    with pytest.raises(OptionError, match="--v2"):
        probe_any(str(tiny_sdxl_path), v2=True)
