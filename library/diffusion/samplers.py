"""Samplers: the trade's names as a table over diffusers' schedulers, all with one set of settings.

Importing this module imports neither torch nor diffusers, so command lines can offer the names at once.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from library.options import require

if TYPE_CHECKING:
    import torch


class Scheduler(Protocol):
    """What is used of diffusers' schedulers."""

    timesteps: torch.Tensor
    init_noise_sigma: float | torch.Tensor  # standard deviation of the noise that sampling starts from
    step: Callable[..., Any]

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor: ...

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """One row of the table: a scheduler class of diffusers and the settings it needs beyond the common ones."""

    scheduler: str
    label: str  # how web user interfaces call it
    settings: Mapping[str, Any]
    least_steps: int = 1
    most_steps: int = 1000
    takes_sigmas: bool = False  # whether its noise levels can be spaced otherwise, see SIGMAS


# Timesteps are spaced as by diffusers 0.21, with which the trade's pictures were made: "leading" (offset 1) for DDIM
# and PNDM, "linspace" for the others. Later versions of diffusers changed some of these defaults, so all are given.
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 1}
# What a schedule that ends in pure noise needs (Lin et al. 2023): to begin at its last timestep.
HAVE_ZERO_TERMINAL_SNR = (
    "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"
)  # fmt: skip
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# How noise levels are spaced: evenly in time, as Karras et al. (2022, equation 5) with rho = 7, or evenly in their
# logarithm; and how web user interfaces call that, behind the sampler's name.
SIGMAS = {"default": "", "karras": "Karras", "exponential": "Exponential"}
DPM = LINSPACE | {"final_sigmas_type": "sigma_min", "lower_order_final": True, "solver_order": 2}


def _dpm(label: str, scheduler: str, algorithm: str, **more: Any) -> Sampler:
    # more than 999 steps would visit a timestep twice and divide by zero
    settings = DPM | {"algorithm_type": algorithm} | more
    return Sampler(scheduler, label, settings, most_steps=999, takes_sigmas=True)


LMS_ORDER = 4  # steps that the linear multistep method looks back on
LMS = Sampler("LMSDiscreteScheduler", "LMS", LINSPACE, takes_sigmas=True)
EULER = Sampler("EulerDiscreteScheduler", "Euler", LINSPACE, takes_sigmas=True)
EULER_A = Sampler("EulerAncestralDiscreteScheduler", "Euler a", LINSPACE)
DPM_2 = Sampler("KDPM2DiscreteScheduler", "DPM2", LINSPACE, takes_sigmas=True)
DPM_2_A = Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", LINSPACE, takes_sigmas=True)
DDIM = Sampler("DDIMScheduler", "DDIM", LEADING | {"clip_sample": False, "set_alpha_to_one": True}, most_steps=999)
PNDM = Sampler("PNDMScheduler", "PNDM", LEADING | {"skip_prk_steps": False}, least_steps=4, most_steps=999)

SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": DDIM,
        "pndm": PNDM,
        "lms": LMS,
        "euler": EULER,
        "euler_a": EULER_A,
        "heun": Sampler("HeunDiscreteScheduler", "Heun", LINSPACE | {"clip_sample": False}, takes_sigmas=True),
        "dpm_2": DPM_2,
        "dpm_2_a": DPM_2_A,
        "dpmsolver": _dpm("DPM 2M", "DPMSolverMultistepScheduler", "dpmsolver"),
        "dpmsolver++": _dpm("DPM++ 2M", "DPMSolverMultistepScheduler", "dpmsolver++"),
        # adds noise at each step; not of the trade's table
        "dpmsolver++_sde": _dpm(
            "DPM++ 2M SDE", "DPMSolverMultistepScheduler", "sde-dpmsolver++", final_sigmas_type="zero"
        ),
        "dpmsingle": _dpm("DPM++ 2S", "DPMSolverSinglestepScheduler", "dpmsolver++"),
        "k_lms": LMS,
        "k_euler": EULER,
        "k_euler_a": EULER_A,
        "k_dpm_2": DPM_2,
        "k_dpm_2_a": DPM_2_A,
    }
)


def check_steps(where: str, sampler: str, steps: int) -> None:
    """Raise OptionError unless `sampler` can take this many steps; `where` names the option."""
    row = SAMPLERS[sampler]
    problem = f"{steps} is out of range for the sampler {sampler}"
    require(row.least_steps <= steps <= row.most_steps, where, problem, f"use {row.least_steps} to {row.most_steps}")


def check_sigmas(where: str, sampler: str, sigmas: str) -> None:
    """Raise OptionError unless the noise levels of `sampler` can be spaced so; `where` names the option."""
    takers = ", ".join(name for name, row in SAMPLERS.items() if row.takes_sigmas and not name.startswith("k_"))
    is_fine = sigmas == "default" or SAMPLERS[sampler].takes_sigmas
    require(is_fine, where, f"{sampler} has noise levels of its own, not {sigmas!r} ones", f"use one of {takers}")


def label_of(sampler: str, sigmas: str = "default") -> str:
    """How web user interfaces call the sampler with this spacing: "DPM++ 2M Karras"."""
    return f"{SAMPLERS[sampler].label} {SIGMAS[sigmas]}".strip()


def check_packages(where: str, sampler: str) -> None:
    """Raise OptionError when a package that `sampler` needs is missing; `where` names the option.

    diffusers imports without scipy, but its LMS scheduler cannot take a step then.
    """
    is_there = SAMPLERS[sampler] is not LMS or importlib.util.find_spec("scipy") is not None
    require(is_there, where, f"{sampler!r} needs the package scipy", "run `pip install scipy`, or use euler")


def takes_zero_terminal_snr(sampler: str) -> bool:
    """Whether diffusers has a schedule that ends in pure noise for it."""
    return SAMPLERS[sampler].scheduler in HAVE_ZERO_TERMINAL_SNR


def make_scheduler(
    sampler: str, *, v_prediction: bool, zero_terminal_snr: bool = False, sigmas: str = "default"
) -> Scheduler:
    """A fresh diffusers scheduler for one batch; raises OptionError when a package it needs is missing.

    `v_prediction`: the model predicts velocity (Salimans and Ho 2022) instead of noise. `zero_terminal_snr`: its last
    timestep is pure noise; of use to DDIM, Euler, Euler a and DPM 2M, the others have no such schedule in diffusers.
    `sigmas`: one of SIGMAS; all but the default ones end at no noise, as in web user interfaces.
    """
    import diffusers

    from library.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS

    row = SAMPLERS[sampler]
    check_packages("--sampler", sampler)
    scheduler_class = getattr(diffusers, row.scheduler)
    known = inspect.signature(scheduler_class.__init__).parameters
    settings = dict(row.settings)
    if zero_terminal_snr and takes_zero_terminal_snr(sampler):
        settings |= ZERO_TERMINAL_SNR
    if sigmas != "default":
        settings[f"use_{sigmas}_sigmas"] = True
        if settings.get("algorithm_type") != "dpmsolver":  # which can't: it divides by the last noise level
            settings["final_sigmas_type"] = "zero"
    with warnings.catch_warnings():  # "dpmsolver" is announced to go in diffusers 1.0; the name stays the trade's
        warnings.simplefilter("ignore", FutureWarning)
        return scheduler_class(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_start=BETA_START,
            beta_end=BETA_END,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction" if v_prediction else "epsilon",
            **{name: value for name, value in settings.items() if name in known},
        )


def begin_with(scheduler: Any, num_steps: int) -> torch.Tensor:
    """Let a fresh schedule begin at the noise of its last `num_steps` steps; returns the timesteps to go through.

    Samplers of diffusers that evaluate the model twice a step count their entries by `order`. PNDM can't begin on its
    way: its warm-up is laid anew from where it begins, three Runge-Kutta steps of four evaluations each or, where fewer
    than four steps are left, one step of two.
    """
    if type(scheduler).__name__ == "PNDMScheduler":
        return _begin_pndm(scheduler, num_steps)
    begin = (scheduler.num_inference_steps - num_steps) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def _begin_pndm(scheduler: Any, num_steps: int) -> torch.Tensor:
    """As diffusers' PNDMScheduler.set_timesteps lays its entries (Liu et al. 2022), over the last steps alone."""
    import torch

    steps = torch.as_tensor(scheduler._timesteps[:num_steps].astype("int64"))  # ascending
    warm_up = scheduler.pndm_order
    if num_steps >= warm_up:
        half = scheduler.config.num_train_timesteps // scheduler.num_inference_steps // 2
        first = steps[-warm_up:].repeat_interleave(2) + torch.tensor([0, half]).repeat(warm_up)
        scheduler.prk_timesteps = first[:-1].repeat_interleave(2)[1:-1].flip(0).numpy()
        rest = steps[:-3].flip(0)
    else:
        scheduler.register_to_config(skip_prk_steps=True)
        scheduler.prk_timesteps = steps[:0].numpy()
        rest = torch.cat([steps[:-1], steps[-2:-1], steps[-1:]]).flip(0)
    scheduler.plms_timesteps = rest.numpy()
    scheduler.timesteps = torch.cat([torch.as_tensor(scheduler.prk_timesteps), rest])
    return scheduler.timesteps


def stepper(
    scheduler: Scheduler, generators: Sequence[torch.Generator]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """step(prediction_BCHW, timestep, latents_BCHW) -> the next latents_BCHW.

    A sampler that adds noise draws it for image i from `generators[i]`, so a picture does not depend on its batch.
    """
    takes = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": list(generators)} if "generator" in takes else {}
    done = itertools.count(1)

    def step(prediction_BCHW: torch.Tensor, timestep: torch.Tensor, latents_BCHW: torch.Tensor) -> torch.Tensor:
        if "order" in takes:  # LMS: never of more steps than were made, also where it began on its way
            arguments["order"] = min(next(done), LMS_ORDER)
        return scheduler.step(prediction_BCHW, timestep, latents_BCHW, return_dict=False, **arguments)[0]

    return step
