"""diffusers' own pipeline on our weights: the reference for pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False, steps_offset=1, timestep_spacing="leading", **BETAS),
    "euler": EulerDiscreteScheduler(steps_offset=1, timestep_spacing="linspace", **BETAS),
}


def load(path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusion().load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)


def diffusers_pipeline(bundle: ModelBundle, folder: Path, sampler: str) -> StableDiffusionPipeline:
    StableDiffusion().save(bundle, folder, dtype=None, metadata={}, as_diffusers=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    prediction = "v_prediction" if bundle.source.v_prediction else "epsilon"
    scheduler = SCHEDULERS[sampler]
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
