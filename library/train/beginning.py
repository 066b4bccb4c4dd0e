"""What a run is before its model is loaded: its data, its length, its place when it goes on from a state."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.checkpoints.safetensors_io import legacy_model_hash
from library.data.dataset import TrainingData
from library.data.dataset_class import ForeignData, make_dataset
from library.families.base import ModelFamily
from library.options import OptionError
from library.targets.base import ParamGroup, TrainTarget
from library.train import placement
from library.train.config import RunConfig
from library.train.lr_schedulers import depends_on_length
from library.train.options import ScheduleOptions
from library.train.plan import TrainPlan
from library.train.preflight import CheckedRun
from library.train.resume import MODEL_FILES, RunState, check_processes, check_same_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beginning:
    """What a run is before its model is loaded."""

    seed: int
    data: TrainingData | ForeignData
    plan: TrainPlan
    digest: dict[str, Any]  # what a resumed run must find again
    start_step: int


def begin(checked: CheckedRun, accelerator: Accelerator, family: ModelFamily) -> Beginning:
    """Find and check the data, count the steps; OptionError where a state to resume belongs to other data."""
    config = checked.config
    seed = _seed(checked, accelerator)
    data = _data(checked, accelerator, family, seed)
    plan = TrainPlan.make(config.training, config.saving, data.batches_per_epoch(accelerator.num_processes))
    digest = {"batches per epoch": plan.batches_per_epoch, **data.digest(), **file_digests(config)}
    if checked.resume_folder is None or checked.resume_state is None:
        return Beginning(seed, data, plan, digest, plan.steps_before(config.start))
    check_processes(checked.resume_folder, accelerator.num_processes)
    check_same_data(checked.resume_folder, checked.resume_state, digest)
    check_length(plan, checked.resume_state, config.schedule)
    return Beginning(seed, data, plan, digest, checked.resume_state.step)


def _data(checked: CheckedRun, accelerator: Accelerator, family: ModelFamily, seed: int) -> TrainingData | ForeignData:
    config = checked.config
    name = config.source.dataset_class
    if not name:
        on_bad_image = "skip" if config.training.plan else config.source.on_bad_image  # a plan lists them
        return TrainingData.build(checked.datasets, seed=seed, on_bad_image=on_bad_image)
    bundle = family.outline(config.model, placement.load_plan(config, accelerator.device))
    dataset = make_dataset(
        name,
        [tokenizer.for_transformers() for tokenizer in bundle.tokenizers],
        max_token_length=config.text.max_token_length,
        resolution=config.bucket.resolution,
        debug_dataset=config.source.debug_dataset,
    )
    return ForeignData(name, dataset, seed)


def param_groups(target: TrainTarget, default_lr: float) -> tuple[ParamGroup, ...]:
    """What is trained; OptionError where that is nothing."""
    groups = tuple(target.param_groups(default_lr))
    if not any(group.parameters for group in groups):
        raise OptionError(
            "", "nothing is left to train with these settings", "look at learning rates and at what is trained"
        )
    return groups


def _seed(checked: CheckedRun, accelerator: Accelerator) -> int:
    """The seed given, or the resumed run's, or one drawn by the main process for all."""
    if checked.config.training.seed is not None:
        return checked.config.training.seed
    if checked.resume_state is not None:
        return int(checked.resume_state.settings["seed"])
    drawn = random.SystemRandom().randrange(2**31) if accelerator.is_main_process else 0
    seed = int(placement.reduced(accelerator, torch.tensor([drawn], device=accelerator.device), "sum"))
    logger.info("--seed not given: %d was drawn", seed)
    return seed


def file_digests(config: RunConfig) -> dict[str, str | None]:
    """What a resumed run must find again of its model files: size and a part's hash, or the name of what is no file."""
    digests: dict[str, str | None] = {}
    files_of = (
        [config.model.pretrained_model_name_or_path],
        [config.model.vae],
        list(getattr(config.target, "base_weights", None) or ()),
    )
    for what, files in zip(MODEL_FILES, files_of, strict=True):
        parts = []
        for name in files:
            path = Path(name) if name else None
            is_file = path is not None and path.is_file()
            parts.append(f"{path.stat().st_size} bytes, {legacy_model_hash(path)}" if path and is_file else str(name))
        digests[what] = "; ".join(parts)
    return digests


def check_length(plan: TrainPlan, state: RunState, schedule: ScheduleOptions) -> None:
    """Raise OptionError for a run that should end before the state it resumes; say it when another length matters."""
    if state.step > plan.steps:
        raise OptionError(
            "--resume", f"the state is from step {state.step}, beyond this run's {plan.steps}", "train longer, or anew"
        )
    if state.step == plan.steps:
        logger.info("this run is complete: nothing is left to train")
    if state.planned_steps not in (None, plan.steps) and depends_on_length(schedule):
        logger.warning(
            "the run was planned for %s steps and now has %d: from here on, the schedule %s is that of the new length",
            state.planned_steps, plan.steps, schedule.name,
        )  # fmt: skip
