"""modelspec.* metadata."""

from __future__ import annotations

from datetime import datetime

import pytest

from library.checkpoints.model_spec import ModelSpec, model_spec_metadata

NOON = datetime(2024, 2, 3, 12, 0, 5, 250_000)


def test_minimal_lora():
    assert model_spec_metadata(ModelSpec("sd1", v_prediction=False, adapter="lora", title="cat", date=NOON)) == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "cat",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2024-02-03T12:00:05",
        "modelspec.prediction_type": "epsilon",
    }


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ModelSpec("sd2", True), ("stable-diffusion-v2-768-v", "768x768", "v")),
        (ModelSpec("sd2", False), ("stable-diffusion-v2-512", "512x512", "epsilon")),
        (ModelSpec("sd1", True), ("stable-diffusion-v1", "512x512", "v")),
        (ModelSpec("sdxl", False), ("stable-diffusion-xl-v1-base", "1024x1024", "epsilon")),
        (
            ModelSpec("sdxl", False, adapter="control-net-lllite"),
            ("stable-diffusion-xl-v1-base/control-net-lllite", "1024x1024", "epsilon"),
        ),
        (ModelSpec("sd1", False, resolution=(640, 448)), ("stable-diffusion-v1", "640x448", "epsilon")),
    ],
)
def test_architecture_resolution_and_prediction(spec: ModelSpec, expected: tuple[str, str, str]):
    metadata = model_spec_metadata(spec)
    assert expected == tuple(metadata[f"modelspec.{key}"] for key in ("architecture", "resolution", "prediction_type"))


@pytest.mark.parametrize(
    ("spec", "is_diffusers"),
    [
        (ModelSpec("sd1", False, adapter="lora"), True),
        (ModelSpec("sdxl", False, adapter="lora"), False),
        (ModelSpec("sd1", False, adapter="textual-inversion"), False),
        (ModelSpec("sd1", False), False),
        (ModelSpec("sd1", False, as_diffusers=True), True),
    ],
)
def test_implementation(spec: ModelSpec, is_diffusers: bool):
    expected = "diffusers" if is_diffusers else "https://github.com/Stability-AI/generative-models"
    assert model_spec_metadata(spec)["modelspec.implementation"] == expected


def test_optional_texts():
    spec = ModelSpec(
        "sd1", False, author="A", description="D", license="L", tags="t, u", merged_from="x, y",
        timestep_range=(0, 500), clip_skip=2, date=NOON, usage_hint="U", trigger_phrase="T", thumbnail="data:",
        preprocessor="P", is_negative_embedding="False",
    )  # fmt: skip
    expected = {
        "author": "A", "description": "D", "license": "L", "tags": "t, u", "merged_from": "x, y", "usage_hint": "U",
        "trigger_phrase": "T", "thumbnail": "data:", "preprocessor": "P", "is_negative_embedding": "False",
        "timestep_range": "0,500", "encoder_layer": "2", "title": f"Checkpoint@{int(NOON.timestamp())}",
    }  # fmt: skip
    metadata = model_spec_metadata(spec)
    assert {name: metadata[f"modelspec.{name}"] for name in expected} == expected
