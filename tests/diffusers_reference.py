"""diffusers' own pipeline on our weights: the reference for pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from library.diffusion.samplers import make_scheduler
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, **BETAS}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 1, **BETAS}
# The table of samplers, as users of diffusers write it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of "dpmsolver"
    SCHEDULERS = {
        "ddim": DDIMScheduler(clip_sample=False, **LEADING),
        "pndm": PNDMScheduler(**LEADING),
        "lms": LMSDiscreteScheduler(**LINSPACE),
        "euler": EulerDiscreteScheduler(**LINSPACE),
        "euler_a": EulerAncestralDiscreteScheduler(**LINSPACE),
        "heun": HeunDiscreteScheduler(**LINSPACE),
        "dpm_2": KDPM2DiscreteScheduler(**LINSPACE),
        "dpm_2_a": KDPM2AncestralDiscreteScheduler(**LINSPACE),
        "dpmsolver": DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **LINSPACE),
        "dpmsolver++": DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", **LINSPACE),
        "dpmsolver++_sde": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **LINSPACE),
        "dpmsingle": DPMSolverSinglestepScheduler(lower_order_final=True, final_sigmas_type="sigma_min", **BETAS),
    }


def load(path: Path) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusion().load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)


def diffusers_pipeline(bundle: ModelBundle, folder: Path, sampler: str) -> StableDiffusionPipeline:
    StableDiffusion().save(bundle, folder, dtype=None, metadata={}, as_diffusers=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    prediction = "v_prediction" if bundle.source.v_prediction else "epsilon"
    pipeline.scheduler = fresh_scheduler(sampler, prediction)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fresh_scheduler(sampler: str, prediction: str = "epsilon") -> Any:
    scheduler = SCHEDULERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return type(scheduler).from_config(scheduler.config, prediction_type=prediction)


def arguments(asked: list[GenerationRequest]) -> dict[str, Any]:
    """What a diffusers pipeline that starts from pictures is called with for our requests."""
    return {
        "prompt": [item.prompt for item in asked],
        "negative_prompt": [item.negative_prompt for item in asked],
        "strength": asked[0].strength,
        "num_inference_steps": asked[0].steps,
        "guidance_scale": asked[0].scale,
        "generator": [torch.Generator().manual_seed(item.seed) for item in asked],
        "output_type": "np",
    }


def check(mine: np.ndarray, theirs: np.ndarray, label: str) -> None:
    """Say how far two pictures (values 0 to 1) are apart; on average it has to be less than one of 255 levels."""
    differences = np.abs(mine - theirs) * 255
    print(f"{label}: mean {differences.mean():.4f}, largest {differences.max():.2f} of 255")
    assert differences.mean() < 1
    assert theirs.std() > 0.02


def with_our_scheduler(pipeline: Any, sampler: str, v_prediction: bool = False) -> Any:
    pipeline.scheduler = make_scheduler(sampler, v_prediction=v_prediction)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
