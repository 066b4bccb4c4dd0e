"""Full-size SD 1.5 and SD 2.1 architectures: load, save to Diffusers and back, bit-equal; every key of public files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from library.checkpoints.weights import SafetensorsWeights
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from tests.full_size import write_full_size

PARTS = {"model.diffusion_model.": 686, "first_stage_model.": 248}
TEXT_TENSORS = {"sd1": 197, "sd2": 294}  # with position ids; with the unused layer, the projection and the logit scale
PARAMETERS = {"sd1": (859_520_964, 123_060_480), "sd2": (865_910_724, 340_387_840)}  # U-Net, text encoder
FULL = torch.float16


def load(path: Path) -> ModelBundle:
    plan = LoadPlan(FULL, FULL, FULL, torch.device("cpu"))
    return StableDiffusion().load(ModelOptions(str(path)), AttentionOptions(), plan)


@pytest.fixture()
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest would keep gigabytes of several runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_round_trip_through_diffusers(kind: str, scratch: Path):
    source = write_full_size(scratch / "source.safetensors", kind, FULL)
    names = SafetensorsWeights(source).shapes
    for prefix, count in PARTS.items():
        assert sum(name.startswith(prefix) for name in names) == count
    assert sum(name.startswith("cond_stage_model.") for name in names) == TEXT_TENSORS[kind]

    bundle = load(source)
    assert bundle.source.kind == kind
    parts = (bundle.unet, bundle.text_encoders[0])
    assert PARAMETERS[kind] == tuple(sum(p.numel() for p in part.parameters()) for part in parts)
    StableDiffusion().save(bundle, scratch / "folder", dtype=None, metadata={}, as_diffusers=True)
    del bundle, parts
    source.rename(scratch / "moved.safetensors")  # the way back must not need it

    StableDiffusion().save(
        load(scratch / "folder"), scratch / "back.safetensors", dtype=None, metadata={}, as_diffusers=False
    )
    before, after = (SafetensorsWeights(scratch / f"{name}.safetensors") for name in ("moved", "back"))
    assert after.shapes == before.shapes and after.dtypes == before.dtypes
    for name in names:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
